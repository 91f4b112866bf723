"""Docs that are made from code are current, and what docs name exists."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from layerplan.config.load import load_config
from layerplan.config.reference import render_reference
from layerplan.plan.schema import render_schema

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.md"))
CONFIGS = sorted((ROOT / "jobs" / "configs").glob("*.yaml"))


def test_the_configuration_reference_is_current() -> None:
    assert (ROOT / "docs/configuration.md").read_text(encoding="utf-8") == render_reference() + "\n"


def test_the_schema_of_the_freeze_plan_is_current() -> None:
    assert (ROOT / "docs/freeze_plan.schema.json").read_text(encoding="utf-8") == render_schema() + "\n"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_link_and_path_of_a_page_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    missing = [link for link in links if link and not (page.parent / link).exists()]
    paths = re.findall(r"`((?:layerplan|eval|jobs|cluster|tests|benchmarks|docs|requirements)/[\w./-]+)`", text)
    assert missing + [path for path in paths if not (ROOT / path).exists()] == []


def test_the_site_names_every_page_once_and_no_other() -> None:
    nav = runpy.run_path(str(ROOT / "docs/site/stage.py"))["list_pages"]()
    linked = ["requirements/README.md", *(f"benchmarks/results/{path.name}" for path in RESULTS)]
    assert sorted(nav) == sorted([*(str(page.relative_to(ROOT)) for page in PAGES), *linked])


def test_the_reference_names_what_exists() -> None:
    named = re.findall(r"^::: (\S+)$", (ROOT / "docs/reference.md").read_text(encoding="utf-8"), re.MULTILINE)
    modules = [name if name == "layerplan.errors" else name.rpartition(".")[0] for name in named]
    sources = [(ROOT / module.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8") for module in modules]
    assert named and all(
        module == name or re.search(rf"^(def|class) {name.rpartition('.')[2]}\b", source, re.MULTILINE)
        for name, module, source in zip(named, modules, sources)
    )


@pytest.mark.parametrize(
    "modules",
    [
        "layerplan.config.run",
        "layerplan.pipeline.chain, layerplan.pipeline.dry_run",
        "layerplan.pipeline.status_table",
    ],
)
def test_configs_dry_runs_and_a_runs_status_import_no_engine(modules: str) -> None:
    engines = ("torch", "ray", "transformers", "vllm", "mlflow", "datasets")
    code = f"import sys, {modules}; print([name for name in {engines!r} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "[]"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_loads_and_is_named_after_its_file(path: Path) -> None:
    assert load_config(path, []).name == path.stem
