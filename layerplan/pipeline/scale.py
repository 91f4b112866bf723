"""`layerplan plan scale`: what a config's plan and its usual alternatives take on more and more nodes, before any is bought."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from layerplan.config.run import RunConfig
from layerplan.config.train import TrainConfig
from layerplan.errors import ConfigError, first_line
from layerplan.pipeline.dry_run import describe_model, find_plan, list_beside
from layerplan.plan.cluster_rates import ClusterRates, assume_cpus, read_check, take_sheet
from layerplan.plan.cost import GIB
from layerplan.plan.scale import ScalePoint, choose_best, compute_efficiency, find_saturation, predict_scale

HEADINGS = (
    "nodes", "workers", "placement", "step s", "compute", "exposed", "(of)", "rows", "saves", "GiB", "GiB/worker",
    "GiB/node", "hours", "worker h", "USD", "efficiency",
)  # fmt: skip
LEGEND = """\
step s      compute + exposed communication (of all communication) + waiting for rows + saves spread over their steps
GiB         memory of a worker; /worker and /node: sent in a step by a worker within its node, and by a node to others
efficiency  worker seconds of a step on the fewest nodes, of those here; * is the quickest placement that fits"""


def print_scale(
    config: RunConfig,
    nodes: str,
    *,
    device: str,
    constants: str | None = None,
    workers_per_node: int | None = None,
) -> None:
    """Prints a table per plan: every placement on every count of nodes, and where it saturates.

    Args:
        config: Of the run; its global batch stays, how many workers it names does not count.
        nodes: Counts, separated by commas.
        device: Data sheet that rates are taken from for a run on GPUs.
        constants: File of a checked cluster, in place of it.
        workers_per_node: Workers of a node; left out, its GPUs, or one.

    Raises:
        ConfigError: When a count or the file is none.
        LayerplanError: When model, plan or profile do not fit together.
    """
    counts = parse_counts(nodes)
    if workers_per_node is not None and workers_per_node < 1:
        raise ConfigError(f"--workers-per-node {workers_per_node}: at least 1 is expected")
    rates = find_rates(config.train, device, constants, workers_per_node)
    model, shape = describe_model(config)
    plan, note = find_plan(config, model, shape)
    train = config.train.assume_dtype().assume_compile()
    print(f"plan   {plan.plan_type}: {note}")
    print(
        f"batch  {train.global_batch_size} rows of {config.corpus.seq_len:,} tokens a step, {train.max_steps:,} steps"
    )
    for name, source in rates.sources.items():
        print(f"{name:<8}{source}")
    print(LEGEND)
    sent: dict[str, float] = {}
    shown: dict[str, dict[int, list[ScalePoint]]] = {}
    for name, each in list_beside(plan, model, shape).items():
        points = {
            count: predict_scale(each, shape, train, rates, seq_len=config.corpus.seq_len, nodes=count)
            for count in counts
        }
        same = next((other for other, found in shown.items() if found == points), None)
        shown[name] = points
        if same is not None:
            print(f"\n{name}: as {same}")
            continue
        print(f"\n{name}\n{render_table([point for found in points.values() for point in found], train)}")
        print(describe_saturation(points, train, rates.workers_per_node))
        best = [point for found in points.values() if (point := choose_best(found)) is not None]
        if best:
            sent[name] = best[-1].gradient_bytes
    print(f"\n{describe_gradients(sent)}")


def parse_counts(text: str) -> list[int]:
    """Counts of nodes, in order.

    Raises:
        ConfigError: When one is no positive number.
    """
    words = text.split(",")
    if not all(word.strip().isascii() and word.strip().isdecimal() and 0 < int(word) <= 100_000 for word in words):
        raise ConfigError(f"--nodes {text}: numbers from 1 to 100000, separated by commas, are expected")
    return sorted({int(word) for word in words})


def find_rates(train: TrainConfig, device: str, constants: str | None, workers_per_node: int | None) -> ClusterRates:
    """Rates of a checked cluster's file, of a data sheet for a run on GPUs, or assumed.

    Raises:
        ConfigError: When the file cannot be read.
    """
    if constants is not None:
        try:
            values = json.loads(Path(constants).expanduser().read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"--constants {constants}: cannot be read ({first_line(error)})") from None
        return read_check(values, constants, workers_per_node=workers_per_node)
    if train.use_gpu:
        return take_sheet(device, **({} if workers_per_node is None else {"workers_per_node": workers_per_node}))
    return assume_cpus(workers_per_node=workers_per_node or 1)


def render_table(points: Sequence[ScalePoint], train: TrainConfig) -> str:
    """The table of one plan as text."""
    by_nodes: dict[int, list[ScalePoint]] = {}
    for point in points:
        by_nodes.setdefault(point.nodes, []).append(point)
    bests = {nodes: choose_best(found) for nodes, found in by_nodes.items()}
    first = next((best for best in bests.values() if best is not None), None)
    rows = [list(HEADINGS)]
    rows += [_make_row(point, train, first, is_best=point is bests[point.nodes]) for point in points]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    is_left = [heading == "placement" for heading in HEADINGS]
    cells = [[f"{cell:{'<' if left else '>'}{w}}" for cell, w, left in zip(row, widths, is_left)] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in cells)


def _make_row(point: ScalePoint, train: TrainConfig, first: ScalePoint | None, *, is_best: bool) -> list[str]:
    hours = train.max_steps * point.step_s / 3600
    price = train.usd_per_worker_hour
    cells = [str(point.nodes), str(point.workers), f"{point.placement}{' *' if is_best else ''}"]
    if not point.fits:
        return [*cells, "-", "-", "-", "-", "-", "-", f"{point.memory / GIB:.1f}", "", "", "", "", "", "does not fit"]
    times = (point.step_s, point.compute_s, point.exposed_s, point.communication_s, point.data_s, point.checkpoint_s)
    return [
        *cells,
        *(f"{value:.4f}" for value in times),
        f"{point.memory / GIB:.1f}",
        f"{point.worker_bytes / GIB:.2f}",
        f"{point.node_bytes / GIB:.2f}",
        f"{hours:,.1f}",
        f"{hours * point.workers:,.0f}",
        "-" if price is None else f"{hours * point.workers * price:,.0f}",
        "" if first is None else f"{compute_efficiency(first, point):.0%}",
    ]


def describe_saturation(points: dict[int, list[ScalePoint]], train: TrainConfig, workers_per_node: int) -> str:
    """Where more nodes stop to pay, and which counts the batch cannot be dealt to."""
    best = [point for found in points.values() if (point := choose_best(found)) is not None]
    undealt = [count for count, found in points.items() if not found]
    parts = []
    if not best:
        parts.append("no placement fits on any of these")
    elif (where := find_saturation(best)) is not None:
        gain = best[0].step_s / where.step_s
        parts.append(
            f"saturates at {where.nodes} nodes: {gain:.1f} times as fast as on {best[0].nodes} with"
            f" {where.workers / best[0].workers:g} times the workers ({_name_bound(where)})"
        )
    else:
        parts.append(f"does not saturate up to {best[-1].nodes} nodes")
    if undealt:
        most = train.global_batch_size // workers_per_node
        parts.append(
            f"{train.global_batch_size} rows cannot be dealt evenly to {', '.join(map(str, undealt))} nodes of"
            f" {workers_per_node} workers, {most} at most: --set train.global_batch_size=N prices a larger batch"
        )
    return "; ".join(parts)


def _name_bound(point: ScalePoint) -> str:
    parts = {"communication": point.exposed_s, "rows": point.data_s, "saves": point.checkpoint_s}
    name = max(parts, key=lambda each: parts[each])
    return f"{name} takes {parts[name] / point.step_s:.0%} of a step"


def describe_gradients(sent: dict[str, float]) -> str:
    """Gradients that plans send on the most nodes, beside full training: what is frozen sends none."""
    full = sent.get("full")
    if not full:
        return "gradients: one worker sends none"
    listed = ", ".join(f"{name} {size / GIB:.3g} GiB ({size / full:.0%})" for name, size in sent.items())
    return f"gradients a worker sends in a step, frozen layers none: {listed}"
