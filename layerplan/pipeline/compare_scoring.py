"""Whether compared models were scored alike: a difference of precisions, or of bases, is no difference of plans."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from eval.artifacts import load_results
from eval.held_out import load_held_out
from layerplan.config.evaluation import settle_dtype
from layerplan.pipeline.compare_names import find_trained_scores, list_texts, read_evaluation
from layerplan.run_folder import BASE, RunFolder


def list_unlike(runs: Sequence[Path], names: Mapping[Path, str]) -> list[str]:
    """A warning where models were scored in several precisions, and one where runs started from bases of several configs."""
    dtypes: dict[str, dict[str, None]] = {}
    configs: dict[str, dict[str, None]] = {}
    for run in runs:
        base, evaluation = RunFolder(run).scores_of(BASE), read_evaluation(run)
        for label, folder in ((f"{names[run]}'s base", base), (names[run], find_trained_scores(run))):
            for dtype, config_sha256 in _iter_origins(folder, list_texts(evaluation)):
                # `auto` of earlier versions is what the run's engines make of it
                computed = settle_dtype(dtype, on_gpu=evaluation.get("num_gpus_per_actor", 0) > 0)
                dtypes.setdefault(computed, {})[label] = None
                if folder == base and config_sha256 is not None:
                    configs.setdefault(config_sha256, {})[names[run]] = None
    lines = []
    if len(dtypes) > 1:
        told = "; ".join(f"in {dtype}: {_join(labels)}" for dtype, labels in dtypes.items())
        lines.append(f"scored in several precisions, which differences between them may come from: {told}")
    if len(configs) > 1:
        told = "; ".join(map(_join, configs.values()))
        lines.append(f"the bases have equal weights and unequal configs, which differences may come from: {told}")
    return lines


def _iter_origins(folder: Path, texts: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Precision and hash of the model's config of every score; scores that do not say where they come from are left out."""
    for result in load_results(folder).values():
        if result.origin is not None:
            yield result.origin.dtype, result.origin.config_sha256
    for text in load_held_out(folder, texts or None).values():
        yield text.dtype, text.config_sha256


def _join(labels: Iterable[str]) -> str:
    return ", ".join(labels)
