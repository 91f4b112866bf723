"""SmolLM2-135M-Instruct measured and trained: against the oracle, a plain loop, and another engine.

The file is also the program the test starts: `python test_real_model_trained.py FOLDER` trains `FOLDER/base` on the cluster of
RAY_ADDRESS until a step kills its driver. `... record FOLDER_OF_THE_MODEL` measures
the model and writes the profile that the first test compares with.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ray_script import run_script

pytestmark = [pytest.mark.real_model, pytest.mark.long]

GOLDEN = Path(__file__).resolve().parents[1] / "unit" / "data" / "smollm2_profile.json"
CURVES = ("task_particle", "js", "layer_sensitivity")
LEARNING_RATE, EPS, BETAS, CLIP, DECAY = 1e-3, 1e-5, (0.9, 0.95), 1.0, 0.01
STEPS, SEQ_LEN = 10, 128
RAY_STEPS, RAY_ROWS, KILLED_AT = 5, 2, 4
SAME_WAY = 2e-3
RAY_PREFIXES = ("model.layers.0.", "model.layers.1.")
NUM_PROMPTS, NEW_TOKENS = 64, 3
PROBES: dict[str, Any] = {"probes_per_group": 2, "batch_size": 20, "bootstrap_samples": 20}


def trace_fixed_probes(model: str, out_dir: Path) -> Any:
    """The profile of 20 probes, two of each group."""
    from layerplan.config.trace import TraceConfig
    from layerplan.models.ref import ModelRef
    from layerplan.tracer.pool import trace_model

    return trace_model(ModelRef(model), TraceConfig(**PROBES), out_dir=out_dir)


def list_golden(profile: Any) -> dict[str, Any]:
    """What of a profile is compared."""
    golden = {name: getattr(profile, name) for name in CURVES}
    golden["eof"] = {kind: item.eof_layer for kind, item in profile.semantic.items()}
    return golden | {"probe_set_sha256": profile.probe_set_sha256, "num_right": profile.num_right}


@pytest.mark.usefixtures("ray_local")
def test_its_profile_is_the_recorded_one_and_of_one_probe_the_oracles(smollm2: str, tmp_path: Path) -> None:
    """Recorded on AVX2; other vector units round otherwise, and a small JS divides what rounding leaves."""
    import naive_tracer
    import pyarrow.parquet as pq
    import torch

    from layerplan.config.trace import TraceConfig
    from layerplan.models.causal_lm import find_decoder_parts, load_causal_lm, load_tokenizer
    from layerplan.tracer.encode import encode_probes
    from layerplan.tracer.pool import PROBES_NAME
    from layerplan.tracer.probes import collect_probes

    profile, golden = trace_fixed_probes(smollm2, tmp_path), json.loads(GOLDEN.read_text(encoding="utf-8"))
    found = list_golden(profile)
    assert found["probe_set_sha256"] == golden["probe_set_sha256"], "other probes than the recorded ones: record again"
    for name in CURVES:
        assert found[name] == pytest.approx(golden[name], rel=5e-3, abs=1e-5), name
    assert found["eof"] == golden["eof"] and found["num_right"] == golden["num_right"]

    config = TraceConfig(**PROBES)
    probe = encode_probes(collect_probes(config), load_tokenizer(smollm2))[0]
    (record,) = [row for row in pq.read_table(tmp_path / PROBES_NAME).to_pylist() if row["id"] == probe.id]
    model = load_causal_lm(smollm2)
    ids, context = torch.tensor([probe.input_ids]), torch.tensor([probe.is_context])
    with torch.no_grad():
        js = naive_tracer.trace_naively(
            model, find_decoder_parts(model).layers, ids, context, config.mask, config.js_top_k
        )
    assert np.abs(np.array(record["js"][:-1]) - js[0]).max() < 1e-5


PLANS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "full": ({"type": "full"}, ("model.",)),
    "freeze_deep": ({"type": "freeze_deep", "boundary": 15}, tuple(f"model.layers.{layer}." for layer in range(15))),
    "freeze_shallow": (
        {"type": "freeze_shallow", "boundary": 15},
        tuple(f"model.layers.{layer}." for layer in range(15, 30)),
    ),
}
"""Each plan, and the first part of the names of what it trains; the head is the embedding."""


@pytest.mark.parametrize("name", PLANS)
def test_ten_steps_are_those_of_a_plain_loop(name: str, smollm2: str, texts: list[str]) -> None:
    """Losses and weights; what is frozen keeps its bits."""
    import torch
    from safetensors.torch import load_file

    from layerplan.models.causal_lm import load_tokenizer

    settings, prefixes = PLANS[name]
    joined = "\n\n".join(texts[:100] + texts[-100:])
    tokens = load_tokenizer(smollm2)(joined, return_tensors="np")["input_ids"][0]
    assert len(tokens) >= STEPS * SEQ_LEN
    rows = tokens[: STEPS * SEQ_LEN].reshape(STEPS, 1, SEQ_LEN)
    base = load_file(Path(smollm2) / "model.safetensors")
    losses, weights = train_in_the_loop(smollm2, settings, rows)
    expected_losses, expected = train_plainly(smollm2, prefixes, rows.tolist())
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    for parameter, value in expected.items():
        trains = parameter.startswith(prefixes)
        assert torch.equal(base[parameter], weights[parameter]) != trains, parameter
        assert_moved_alike(weights[parameter], value, base[parameter], parameter)


def assert_moved_alike(found: Any, expected: Any, before: Any, name: str) -> None:
    """Adam divides small gradients by themselves, so single weights differ by their rounding; a tensor's way does not."""
    assert (found - expected).norm() <= SAME_WAY * (expected - before).norm(), name


def train_in_the_loop(model_folder: str, plan_settings: dict[str, Any], rows: np.ndarray) -> tuple[list[float], Any]:
    """Losses of each step and the weights after the last, by the training loop in this process."""
    import torch

    from layerplan.corpus.rows import PackedRows
    from layerplan.models.causal_lm import load_causal_lm
    from layerplan.train.loop import run_loop
    from layerplan.train.state import TrainState
    from tests.tiny_loop import Sink, make_loop

    zeros, places = np.zeros((1, SEQ_LEN), dtype=np.int32), np.arange(SEQ_LEN, dtype=np.int32)[None]

    def rows_of_step(step: int) -> PackedRows:
        return PackedRows(np.array([step]), rows[step].astype(np.int32), zeros, places)

    model, sink = load_causal_lm(model_folder, dtype=torch.float32), Sink()
    config = make_train_config(len(rows), 1, log_every_steps=1)
    plan = make_plan_for(model_folder, plan_settings)
    setup, hooks = make_loop(model, plan, config, rows_of_step=rows_of_step, sink=sink)
    run_loop(setup, TrainState(), hooks)
    losses = [sink.metrics[step]["train/loss"] for step in range(1, len(rows) + 1)]
    return losses, {name: value.detach() for name, value in model.named_parameters()}


def train_plainly(
    model_folder: str, prefixes: tuple[str, ...], steps: Iterable[Sequence[Sequence[int]]]
) -> tuple[list[float], dict[str, Any]]:
    """The same by transformers' own loss of every document of a step alone and `torch.optim.AdamW`, one process."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(prefixes))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPS)
    losses = []
    for documents in steps:
        num_labels = sum(len(document) - 1 for document in documents)
        parts = []
        for document in documents:
            ids = torch.tensor([list(document)])
            part = model(input_ids=ids, labels=ids).loss * (len(document) - 1) / num_labels
            part.backward()
            parts.append(float(part.detach()))
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(sum(parts))
    return losses, {name: value.detach() for name, value in model.named_parameters()}


def make_train_config(max_steps: int, batch: int, **values: Any) -> Any:
    """A constant rate, and a denominator that does not magnify the rounding of small gradients."""
    from layerplan.config.train import OptimizerConfig, ScheduleConfig, TrainConfig

    optimizer = OptimizerConfig(
        learning_rate=LEARNING_RATE, eps=EPS, betas=BETAS, max_grad_norm=CLIP, weight_decay=DECAY
    )
    return TrainConfig(
        max_steps=max_steps,
        global_batch_size=batch,
        micro_batch_size=1,
        compute_dtype="float32",
        optimizer=optimizer,
        schedule=ScheduleConfig(type="constant", warmup_ratio=0.0),
        **values,
    )


def make_plan_for(model_folder: str, settings: dict[str, Any]) -> Any:
    from pydantic import TypeAdapter

    from layerplan.config.plan import FixedPlanConfig
    from layerplan.models.files import identify_model, load_hf_config
    from layerplan.plan.model_shape import ModelShape
    from layerplan.plan.policies import make_plan

    config: Any = TypeAdapter(FixedPlanConfig).validate_python(settings)
    shape = ModelShape.from_hf_config(load_hf_config(model_folder))
    return make_plan(config, model=identify_model(model_folder), shape=shape, profile=None)


def test_a_killed_run_ends_as_a_plain_loop_does_and_both_engines_read_its_export(
    smollm2: str, texts: list[str], tmp_path: Path, shared_cluster: dict[str, str]
) -> None:
    """One worker on Ray, two rows of two documents a step, two of thirty layers; 64 prompts for vLLM and transformers."""
    import torch
    from safetensors.torch import load_file

    from layerplan.train.trainer import run_training
    from tests.tiny_store import make_store

    (tmp_path / "base").symlink_to(smollm2)
    make_store(tmp_path / "store")
    killed = run_script(__file__, tmp_path, timeout_s=400, **shared_cluster)
    assert killed.returncode == -signal.SIGKILL, killed.stdout[-3000:]
    result = run_training(make_request(tmp_path, lambda start: StartKeeper(tmp_path, start)))
    assert result.final_step == RAY_STEPS
    assert (tmp_path / "started_at").read_text() in ("2", "4"), "training began again from nothing"
    export = tmp_path / "run" / f"hf/step_{RAY_STEPS:08d}"
    weights = load_file(export / "model.safetensors")
    _, expected = train_plainly(smollm2, RAY_PREFIXES, iter_steps_of(tmp_path / "store"))
    base = load_file(Path(smollm2) / "model.safetensors")
    for name, value in expected.items():
        assert_moved_alike(weights[name], value, base[name], name)
    assert {name for name in base if not torch.equal(base[name], weights[name])} == {
        name for name in base if name.startswith(RAY_PREFIXES)
    }
    check_engines(str(export), texts)


def check_engines(export: str, texts: list[str]) -> None:
    """Greedy tokens and the letters' log-probabilities, engines in this process one after the other."""
    from vllm.distributed import cleanup_dist_env_and_memory

    from eval.engine import EngineSpec
    from eval.open_engine import open_engine
    from layerplan.models.causal_lm import load_tokenizer
    from layerplan.models.ref import ModelRef

    tokenizer = load_tokenizer(export)
    prompts = [tokenizer(text)["input_ids"][: 8 + number % 4] for number, text in enumerate(texts[-NUM_PROMPTS:])]
    letters = tuple(tokenizer.encode(letter)[0] for letter in "ABCD")
    answers = {}
    for backend in ("transformers", "vllm"):
        engine = open_engine(EngineSpec(ModelRef(export), backend, "float32", 0, letters, 64))
        answers[backend] = engine.ask(prompts, [NEW_TOKENS] * len(prompts))
        del engine
    cleanup_dist_env_and_memory()  # vLLM leaves its process group to whoever comes after it in this process
    for mine, theirs in zip(answers["vllm"], answers["transformers"], strict=True):
        assert mine.token_ids == theirs.token_ids
        assert mine.letter_logprobs == pytest.approx(theirs.letter_logprobs, abs=1e-3)


def iter_steps_of(store: Path) -> Iterable[list[list[int]]]:
    """The documents of every step, which begin where positions begin anew."""
    from layerplan.corpus.stream import iter_rank_steps

    place = {"num_lanes": RAY_ROWS, "seed": 0, "rank": 0, "world_size": 1, "start_step": 0, "stop_step": RAY_STEPS}
    for rows in iter_rank_steps(store, **place):  # type: ignore[arg-type]
        yield [
            ids[start:stop].tolist()
            for ids, positions in zip(rows.input_ids, rows.position_ids, strict=True)
            for start, stop in itertools.pairwise([*np.flatnonzero(positions == 0), len(ids)])
        ]


@dataclass
class StartKeeper:
    """A sink in the worker that keeps the step at which training began."""

    folder: Path
    start: int

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None: ...

    def log_event(self, name: str, step: int, message: str) -> None: ...

    def close(self) -> None:
        (self.folder / "started_at").write_text(str(self.start))


@dataclass
class DriverKiller:
    """A sink in the worker that kills the driver at a step."""

    driver: int

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        if "train/loss" in metrics and step == KILLED_AT:
            os.kill(self.driver, signal.SIGKILL)
            time.sleep(5)

    def log_event(self, name: str, step: int, message: str) -> None: ...

    def close(self) -> None: ...


def make_request(folder: Path, sink: Callable[[int], Any]) -> Any:
    """Trains two layers of `folder/base` with one worker."""
    from layerplan.models.ref import ModelRef
    from layerplan.train.request import TrainRequest

    base = str(folder / "base")
    every = {"log_every_steps": 1, "checkpoint_every_steps": 2, "validate_every_steps": RAY_STEPS}
    config = make_train_config(RAY_STEPS, RAY_ROWS, num_workers=1, num_cpus_per_worker=1, **every)
    plan = make_plan_for(base, {"type": "freeze_deep", "boundary": len(RAY_PREFIXES)})
    request = TrainRequest(folder / "run", ModelRef(base), plan, folder / "store", config, seed=0, sink_factory=sink)
    return replace(request, env={"OMP_NUM_THREADS": "1"})


def main() -> None:
    from layerplan.config.cluster import ClusterConfig
    from layerplan.ray_session import connect
    from layerplan.train.trainer import run_training

    driver = os.getpid()
    connect(ClusterConfig(), min_cpus=1)
    run_training(make_request(Path(sys.argv[1]), lambda start: DriverKiller(driver)))


def record(model: str) -> None:
    """Measures and writes the golden profile."""
    import tempfile

    from layerplan.config.cluster import ClusterConfig
    from layerplan.ray_session import connect

    connect(ClusterConfig(num_cpus=2), min_cpus=1)
    with tempfile.TemporaryDirectory() as folder:
        golden = list_golden(trace_fixed_probes(model, Path(folder)))
    rounded = {name: [float(f"{x:.6g}") for x in value] if name in CURVES else value for name, value in golden.items()}
    GOLDEN.write_text(json.dumps(rounded, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    from layerplan.entry import run_guarded

    sys.exit(run_guarded(lambda: record(sys.argv[2]) if sys.argv[1] == "record" else main()))
