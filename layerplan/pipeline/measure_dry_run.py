"""`layerplan measure --dry-run`: what would be measured, on how much text, and the arithmetic it takes."""

from __future__ import annotations

from collections.abc import Sequence

from layerplan.config.load import dump_config
from layerplan.config.measure import MEASUREMENTS, Measurement
from layerplan.config.run import RunConfig
from layerplan.errors import LayerplanError
from layerplan.measure.costs import predict_flops
from layerplan.measure.pilot import count_pilot_steps
from layerplan.measure.work import FOLDS
from layerplan.pipeline.dry_run import describe_model, print_probes
from layerplan.pipeline.measure_layers import TRACED
from layerplan.pipeline.texts import print_faults, print_texts_here


def print_measure_dry_run(config: RunConfig, names: Sequence[str]) -> None:
    """Prints the resolved config, the model and the named measurements, all of them when none is named.

    Raises:
        LayerplanError: When the model or the probes cannot be read.
    """
    print(dump_config(config))
    model, shape = describe_model(config)
    asked = list(names) or [*MEASUREMENTS, TRACED]
    wanted = [name for name in MEASUREMENTS if name in asked]
    faults: list[LayerplanError] = []
    if any(name != "spectrum" for name in wanted):
        faults = print_texts_here(config)
    for name in wanted:
        tokens = _count_tokens(name, config)
        if not tokens:
            print(f"measure {name}: of the weights, reads no text")
            continue
        flops = predict_flops(name, shape, model, config.measure, tokens)
        print(f"measure {name}: {tokens:,} tokens in rows of {config.measure.seq_len:,}, {flops:.2g} FLOPs")
    if TRACED in asked:
        print_probes(config)
    print("writes layer_measurements.json, a table and a figure; trains no plan")
    print_faults(faults)


def _count_tokens(name: Measurement, config: RunConfig) -> int:
    measure = config.measure
    if name == "spectrum":
        return 0
    rows = measure.num_rows
    if name == "pilot":
        rows = count_pilot_steps(config.train.max_steps, measure.pilot_share) * measure.pilot_rows
    if name == "tuned_lens_gain":
        rows *= len(FOLDS)
    return rows * measure.seq_len
