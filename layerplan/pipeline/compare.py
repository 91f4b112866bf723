"""Verdicts over finished runs.

The untouched base of the first run is arm zero: every run is compared with it, then every run with every run before
it. Runs whose configs differ in nothing but the seed are pooled into one arm when `--pool-seeds` is given. P-values
are corrected over all comparisons made; runs scored under unequal protocols cannot be put into one table. Held-out texts
are compared document by document (`compare_texts.py`), fine-tunings on labels by their predictions (`compare_labels.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path

from eval.artifacts import Results, load_answers, load_results
from eval.significance import Arm, Comparison, Verdict, judge_comparisons
from eval.tables import render_scores
from layerplan.artifacts import compute_sha256, write_json, write_text
from layerplan.config.base import StrictModel
from layerplan.errors import EvaluationError
from layerplan.pipeline.compare_labels import NEEDED, is_label_run, judge_label_runs, render_label_scores
from layerplan.pipeline.compare_names import check_no_sweep, find_trained_scores, list_unscored, name_runs
from layerplan.pipeline.compare_scoring import list_unlike
from layerplan.pipeline.compare_texts import TextComparison, judge_texts, list_doubts, list_other_documents
from layerplan.pipeline.run_folder import fetch_run
from layerplan.pipeline.summary import print_verdicts
from layerplan.run_folder import BASE, CONFIG_NAME, EVALUATION_NAME, RESULT_NAME, RunFolder

DIFFERS_BETWEEN_SEEDS = ("name", "storage_path", "working_path", "seed", "cluster", "tracking")


def compare(
    paths: Sequence[str], *, out: str | None = None, table: str | None = None, pool_seeds: bool = False
) -> None:
    """Compares the runs, prints the table, and writes what was asked for.

    Args:
        paths: Folders or addresses of finished runs; the base of the first is what all are compared with.
        out: File for the verdicts as JSON.
        table: File for the scores, LaTeX when it ends in `.tex`, else Markdown.
        pool_seeds: Whether runs that differ in the seed alone are one arm.

    Raises:
        EvaluationError: When runs cannot be compared.
    """
    found = [fetch_run(path, EVALUATION_NAME, RESULT_NAME, CONFIG_NAME, *NEEDED) for path in paths]
    runs = [run.expanduser().resolve() for run in found]
    names = name_runs(runs)
    for run in runs:
        check_no_sweep(run)
    if any(map(is_label_run, runs)):
        comparisons = judge_label_runs(group_seeds(runs) if pool_seeds else [[run] for run in runs], names)
        for comparison in comparisons:
            print(comparison.sentence)
        _write(comparisons, partial(render_label_scores, comparisons), out=out, table=table)
        return
    verdicts = judge_runs(runs, pool_seeds=pool_seeds, names=names)
    print_verdicts(verdicts)
    texts = judge_texts(runs, names, arms=group_seeds(runs) if pool_seeds else None)
    for line in (*_describe_texts(texts, runs, names), *_list_unscored(runs, names), *list_unlike(runs, names)):
        print(line)
    _write([*verdicts, *texts], partial(_render_scores, names), out=out, table=table)


def _write(verdicts: Sequence[StrictModel], render: Callable[..., str], *, out: str | None, table: str | None) -> None:
    """Writes verdicts and table where files are named for them; `render` takes the table's `style`."""
    if out:
        write_json(Path(out), [verdict.model_dump(mode="json") for verdict in verdicts])
        print(f"\nverdicts  {Path(out).resolve()}")
    if table:
        style = "latex" if Path(table).suffix == ".tex" else "markdown"
        write_text(Path(table), render(style=style))
        print(f"\ntable     {Path(table).resolve()}")


def _render_scores(names: Mapping[Path, str], *, style: str) -> str:
    rows = {BASE: load_results(RunFolder(next(iter(names))).scores_of(BASE))}
    rows |= {name: load_results(find_trained_scores(run)) for run, name in names.items()}
    return render_scores(rows, style=style)


def _describe_texts(texts: Sequence[TextComparison], runs: Sequence[Path], names: Mapping[Path, str]) -> list[str]:
    lines = [text.line for text in texts]
    if len(runs) > 1 and lines:
        lines.append(
            f"p values of texts are corrected over these {len(lines)} comparisons, on a run's own page over that run's alone."
        )
    return [*lines, *list_other_documents(runs, names), *list_doubts(runs, names)]


def _list_unscored(runs: Sequence[Path], names: Mapping[Path, str]) -> list[str]:
    return [line for run in runs for line in list_unscored(run, names[run], find_trained_scores(run))]


def judge_runs(
    runs: Sequence[Path], *, pool_seeds: bool = False, names: Mapping[Path, str] | None = None
) -> list[Verdict]:
    """Verdicts of every benchmark and protocol: runs against the first run's base, then against each other.

    Args:
        runs: Folders of finished runs.
        pool_seeds: Whether runs that differ in the seed alone are one arm.
        names: What each is called; by its folder where that tells them apart, when left out.

    Raises:
        EvaluationError: When a run has no scores, protocols differ, or a run started from another base.
    """
    base_dir = RunFolder(runs[0]).scores_of(BASE)
    base = load_results(base_dir)
    if not base:
        raise EvaluationError(f"{base_dir}: has no scores; the first run must have evaluated its base")
    for run in runs[1:]:
        _check_same_base(base, base_dir, RunFolder(run).scores_of(BASE))
    names = names or name_runs(runs)
    arms = group_seeds(runs) if pool_seeds else [[run] for run in runs]
    comparisons: list[Comparison] = []
    for key, result in base.items():
        reference = [("the base", result, load_answers(base_dir, result.benchmark, result.protocol))]
        loaded = [[_load_arm(run, names[run], key, base) for run in arm] for arm in arms]
        comparisons += [(reference, arm) for arm in loaded]
        comparisons += list(combinations(loaded, 2))
    return judge_comparisons(comparisons)


def group_seeds(runs: Sequence[Path]) -> list[list[Path]]:
    """Runs in order, those together whose resolved configs differ in nothing that the seed does not.

    Raises:
        EvaluationError: When a run has no readable config, or two runs of a group have one seed: the same training twice
            says nothing of how far seeds lie apart.
    """
    groups: dict[str, dict[str, Path]] = {}
    for run in runs:
        path = RunFolder(run).config
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise EvaluationError(f"{path}: cannot be read ({error}); pooling seeds needs each run's config") from None
        kept = {key: value for key, value in values.items() if key not in DIFFERS_BETWEEN_SEEDS}
        group, seed = groups.setdefault(compute_sha256(kept), {}), json.dumps(values.get("seed"))
        if seed in group:
            raise EvaluationError(
                f"{run}: has the config and the seed ({seed}) of {group[seed]}; --pool-seeds takes each seed once"
            )
        group[seed] = run
    return [list(group.values()) for group in groups.values()]


def _load_arm(run: Path, name: str, key: str, base: Results) -> Arm:
    folder = find_trained_scores(run)
    results = load_results(folder)
    if key not in results:
        raise EvaluationError(f"{folder}: has no {key}; the base has {', '.join(base)}")
    result = results[key]
    return name, result, load_answers(folder, result.benchmark, result.protocol)


def _check_same_base(base: Results, base_dir: Path, other_dir: Path) -> None:
    """Two runs are compared through one base, so a base of other weights is refused; a run may have scored none."""
    for key, result in load_results(other_dir).items():
        mine, theirs = (item.origin for item in (base.get(key, result), result))
        if mine is not None and theirs is not None and mine.weights_sha256 != theirs.weights_sha256:
            raise EvaluationError(f"{other_dir}: is the base of other weights than {base_dir}; compare them apart")
