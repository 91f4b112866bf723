"""What KubeRay's custom resources allow, as far as the files in `cluster/kuberay` reach, kept beside the tests.

    python -m tests.kuberay_schema KUBERAY_CHECKOUT v1.7.0      writes tests/unit/data/kuberay_v1.7.0.json

The definitions of a release are megabytes of Kubernetes' own pod templates. Kept is every field name of the objects that the
files have, and type, choices and required fields of what they set.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "cluster" / "kuberay").glob("*.yaml"))
RELEASE = "v1.7.0"
KEPT = ROOT / "tests" / "unit" / "data" / f"kuberay_{RELEASE}.json"
_TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float)}


def load_manifests() -> Iterator[tuple[Path, dict[str, Any]]]:
    """The resources of Ray in the files, with the file of each."""
    for path in FILES:
        for document in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            if str(document.get("apiVersion", "")).startswith("ray.io/"):
                yield path, document


def reduce_schema(schema: dict[str, Any], values: list[Any]) -> dict[str, Any]:
    """The part of a schema that some values of it can be checked with."""
    kept = {key: schema[key] for key in ("type", "enum", "required", "x-kubernetes-int-or-string") if key in schema}
    if "x-kubernetes-preserve-unknown-fields" in schema:
        return kept | {"open": True}
    mappings = [value for value in values if isinstance(value, dict)]
    if "properties" in schema:
        kept["fields"] = {
            name: reduce_schema(child, [value[name] for value in mappings if name in value])
            if any(name in value for value in mappings)
            else None
            for name, child in schema["properties"].items()
        }
    if isinstance(schema.get("additionalProperties"), dict):
        kept["every"] = reduce_schema(
            schema["additionalProperties"], [child for value in mappings for child in value.values()]
        )
    if "items" in schema:
        kept["items"] = reduce_schema(schema["items"], [child for value in values for child in value or []])
    return kept


def find_faults(schema: dict[str, Any], value: Any, path: str = "") -> Iterator[str]:
    """Where a value is not what its kept schema allows."""
    wanted = _TYPES.get(schema.get("type", ""))
    if "x-kubernetes-int-or-string" in schema:
        wanted = (int, str)
    if wanted and (not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool)):
        yield f"{path}: {value!r} is no {schema.get('type', 'number or string')}"
        return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{path}: {value!r} is none of {schema['enum']}"
    if schema.get("open"):
        return
    if isinstance(value, dict):
        for name in set(schema.get("required", ())) - set(value):
            yield f"{path}.{name}: is required"
        for name, child in value.items():
            inner = schema.get("every") or (schema.get("fields") or {}).get(name)
            if inner is None:
                yield f"{path}.{name}: is no field"
            else:
                yield from find_faults(inner, child, f"{path}.{name}")
    if isinstance(value, list):
        for index, child in enumerate(value):
            yield from find_faults(schema.get("items", {}), child, f"{path}.{index}")


def main() -> None:
    """Reads the definitions of a release and keeps what the files need of them."""
    checkout, release = sys.argv[1:3]
    kept: dict[str, Any] = {"release": release}
    manifests = [manifest for _, manifest in load_manifests()]
    for kind in sorted({str(manifest["kind"]) for manifest in manifests}):
        place = f"{release}:ray-operator/config/crd/bases/ray.io_{kind.lower()}s.yaml"
        text = subprocess.run(["git", "-C", checkout, "show", place], capture_output=True, check=True, text=True).stdout
        versions = {each["name"]: each for each in yaml.load(text, yaml.CSafeLoader)["spec"]["versions"]}
        schema = versions["v1"]["schema"]["openAPIV3Schema"]
        kept[kind] = reduce_schema(schema, [manifest for manifest in manifests if manifest["kind"] == kind])
        kept[kind]["fields"]["metadata"] = {"type": "object", "open": True}
    KEPT.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
