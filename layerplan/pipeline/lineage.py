"""What the parent run of the lineage carries, so that runs can be sorted and compared without opening their stages."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

from layerplan.config.load import dump_config, flatten_values
from layerplan.config.run import RunConfig
from layerplan.corpus.location import hide_keys
from layerplan.corpus.manifest import Manifest
from layerplan.report.answers import read_answers
from layerplan.report.lineage import list_results, list_tags, render_note
from layerplan.tracking.outbox import Dataset
from layerplan.tracking.tracker import NOTE_TAG, Tracker

PARAM_CHARS = 500
"""What every version of MLflow takes; the whole value is in `resolved_config.json`."""
NAMED_SOURCES = 3
SHOWN_DIGITS = 12
"""Of the corpus's hash, in a table's cell; the whole is a tag."""


def note_config(tracker: Tracker, config: RunConfig) -> None:
    """Every resolved value by its dotted path, credentials hidden."""
    tracker.log_params({"seed": config.seed, "model": config.model.type, "plan": config.plan.type})
    tracker.log_params(list_params(config))


def list_params(config: RunConfig) -> dict[str, str]:
    """The config as flat texts; a list is one value, as JSON."""
    return {key: _shorten(value) for key, value in flatten_values(json.loads(dump_config(config))).items()}


def note_corpus(tracker: Tracker, manifest: Manifest, store: Path | str) -> None:
    """The corpus as the run's input, and its hash as a tag."""
    digest = manifest.content_sha256
    tracker.set_tags({"layerplan.corpus_sha256": digest})
    shown = digest[:SHOWN_DIGITS]
    tracker.log_dataset(Dataset(_name_corpus(manifest), shown, hide_keys(store), _measure_corpus(manifest)))


def note_results(tracker: Tracker, run_dir: Path) -> None:
    """Numbers, hashes and the description, as far as the run has come."""
    answers = read_answers(run_dir)
    tracker.set_tags({**list_tags(run_dir), NOTE_TAG: render_note(run_dir, answers)})
    tracker.log_metrics(list_results(run_dir, answers), step=answers.final_step or 0)


def _shorten(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= PARAM_CHARS else text[: PARAM_CHARS - 1] + "…"


def _name_corpus(manifest: Manifest) -> str:
    names = [PurePosixPath(source.path).name or source.path for source in manifest.sources]
    more = len(names) - NAMED_SOURCES
    return " + ".join(names[:NAMED_SOURCES]) + (f" + {more} more" if more > 0 else "")


def _measure_corpus(manifest: Manifest) -> dict[str, Any]:
    fields = ("num_rows", "seq_len", "num_tokens", "num_validation_rows")
    return {name: getattr(manifest, name) for name in fields} | {"documents": manifest.counts}
