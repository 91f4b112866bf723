"""Every causal LM class of the installed transformers through load, lens, loss, cost, plans and export: `docs/families.md`.

    OMP_NUM_THREADS=1 python benchmarks/families.py
    python benchmarks/families.py qwen3 gemma2

The first writes the table (about five minutes on one idle core), the second prints the rows of some model types. The
models are random and tiny (`tests/families.py`), the oracle is transformers' own loss of each document alone
(`tests/family_oracle.py`), and what each stage compares with it is in `tests/family_checks.py`. `--keep` names a folder where
finished rows are kept, so that a run that was cut goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.families import list_model_types  # noqa: E402
from tests.family_checks import FamilyReport, check_family  # noqa: E402
from tests.family_table import PAGE, render_page  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_types", nargs="*", help="all when none is given, and then the page is written")
    parser.add_argument("--keep", type=Path, help="folder of finished rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    reports = []
    for model_type in options.model_types or list_model_types():
        reports.append(ask(model_type, options.keep))
        print(reports[-1].to_json(), flush=True)
    if not options.model_types:
        (ROOT / PAGE).write_text(render_page(reports), encoding="utf-8")


def ask(model_type: str, keep: Path | None) -> FamilyReport:
    """The model type's row, kept or made."""
    kept = None if keep is None else keep / f"{model_type}.json"
    if kept is not None and kept.exists():
        return FamilyReport(**json.loads(kept.read_text(encoding="utf-8")))
    with tempfile.TemporaryDirectory() as folder:
        report = check_family(model_type, Path(folder))
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(report.to_json(), encoding="utf-8")
    return report


if __name__ == "__main__":
    main()
