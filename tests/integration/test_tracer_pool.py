"""The tracer on Ray's actor pool, with a small model that was trained on the probe tasks: exact, and told as found."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from layerplan.config.trace import TraceConfig
from layerplan.errors import ModelError, ProbeError
from layerplan.models.ref import ModelRef
from layerplan.plan.layer_profile import LayerProfile
from layerplan.run_folder import PROBES_NAME
from layerplan.tracer import pool
from layerplan.tracer.actor import TracerActor
from layerplan.tracer.aggregate import build_profile
from layerplan.tracer.encode import encode_probes
from layerplan.tracer.lexicon import Lexicon, load_builtin_lexicon
from layerplan.tracer.pool import trace_model
from layerplan.tracer.probes import Probe, make_probes

TRAIN_STEPS = 200
PAIRS_PER_RELATION = 8
"""Few words are learned in seconds; all 663 pairs of the lexicon take 26 s of CPU."""
PROBES_PER_GROUP = 6


def read_records(folder: Path) -> list[dict[str, Any]]:
    """What was measured of each probe."""
    records: list[dict[str, Any]] = pq.read_table(folder / PROBES_NAME).to_pylist()
    return records


@pytest.fixture(scope="module")
def trained_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A four-layer Qwen3 that answers most probes, after seconds of training on others from the same words."""
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("model") / "small"
    probes = [probe for seed in range(3) for probe in make_small_probes(per_group=60, seed=seed)]
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()])
    words.train_from_iterator(
        [probe.prompt + probe.answer for probe in probes],
        trainer=trainers.WordLevelTrainer(special_tokens=["<unk>"], show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=words.get_vocab_size(), hidden_size=64, intermediate_size=128, num_hidden_layers=4,
                num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
                tie_word_embeddings=True,
            )
        )  # fmt: skip
        train(model, encode_probes(probes, tokenizer))
    torch.set_num_threads(threads)
    model.save_pretrained(folder)
    return folder


def make_small_probes(*, per_group: int, seed: int) -> list[Probe]:
    lexicon = Lexicon(**{name: pairs[:PAIRS_PER_RELATION] for name, pairs in vars(load_builtin_lexicon()).items()})
    return make_probes(lexicon, per_group=per_group, style="mixed", seed=seed)


def train(model: Any, encoded: list[Any]) -> None:
    """Batches of one length, the answer's first token as the only label."""
    by_length: dict[int, list[Any]] = {}
    for probe in encoded:
        by_length.setdefault(len(probe.input_ids), []).append(probe)
    lengths = list(by_length)
    weights = np.array([len(by_length[length]) for length in lengths], dtype=float)
    rng = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, TRAIN_STEPS)
    for _ in range(TRAIN_STEPS):
        members = by_length[int(rng.choice(lengths, p=weights / weights.sum()))]
        batch = [members[index] for index in rng.integers(0, len(members), 48)]
        ids = torch.tensor([probe.input_ids for probe in batch])
        gold = torch.tensor([probe.gold_id for probe in batch])
        logits = model(input_ids=ids, logits_to_keep=1).logits[:, -1]
        torch.nn.functional.cross_entropy(logits, gold).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TraceConfig:
    """Probes of a seed the training did not draw, from a JSONL file of their own."""
    path = tmp_path_factory.mktemp("probes") / "probes.jsonl"
    path.write_text(
        "".join(json.dumps(vars(probe)) + "\n" for probe in make_small_probes(per_group=PROBES_PER_GROUP, seed=7)),
        encoding="utf-8",
    )
    return TraceConfig(probes=str(path), batch_size=4, bootstrap_samples=100, num_cpus_per_actor=0.5)


@pytest.fixture
def quiet(ray_local: None, trained_model: Path, config: TraceConfig) -> tuple[LayerProfile, Path]:
    """The measurement by one actor that nothing disturbed, made once."""
    out_dir = trained_model.parent / "quiet"
    if not (out_dir / pool.PROFILE_NAME).exists():
        trace_model(ModelRef(str(trained_model)), config, out_dir=out_dir)
    return LayerProfile.load(out_dir / pool.PROFILE_NAME), out_dir


def make_dying_actor(folder: Path) -> type[TracerActor]:
    """An actor that is killed once, on its second batch, after it measured and before it delivered."""

    class DyingActor(TracerActor):
        calls = 0

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            measured = super().__call__(batch)
            self.calls += 1
            with (folder / "batches").open("a") as lines:
                lines.write(json.dumps(sorted(measured["id"])) + "\n")
            if self.calls == 2:
                with contextlib.suppress(FileExistsError):
                    (folder / "died").touch(exist_ok=False)  # one of two actors dies, whoever is first
                    os.kill(os.getpid(), signal.SIGKILL)
            return measured

    return DyingActor


def test_an_actor_killed_mid_way_loses_nothing_and_counts_nothing_twice(
    trained_model: Path,
    config: TraceConfig,
    quiet: tuple[LayerProfile, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool, "TracerActor", make_dying_actor(tmp_path))
    lines: list[str] = []
    two = config.model_copy(update={"num_actors": 2})
    disturbed = trace_model(ModelRef(str(trained_model)), two, out_dir=tmp_path / "out", report=lines.append)
    assert (tmp_path / "died").exists()
    batches = [tuple(json.loads(line)) for line in (tmp_path / "batches").read_text().splitlines()]
    # the killed one, and what the actor had finished but Ray had not taken over yet
    assert len(batches) > len(set(batches)) == 15, "a batch was measured again"
    profile, out_dir = quiet
    # other actors, another order, a death: the same bytes
    assert disturbed.sha256 == profile.sha256
    np.testing.assert_equal(read_records(tmp_path / "out"), read_records(out_dir))
    assert disturbed.num_probes == 60 == sum(disturbed.measured_by["zero"].values())
    assert re.fullmatch(r"60 probes took [\d.,]+ s of the tracing processes: .*zero mask \d+%.*", lines[-1])


def test_every_aggregate_can_be_made_again_without_the_model(
    config: TraceConfig, quiet: tuple[LayerProfile, Path]
) -> None:
    profile, out_dir = quiet
    records = read_records(out_dir)
    assert len(records) == profile.num_probes
    again = build_profile(records, model=profile.model, config=config, probe_set_sha256=profile.probe_set_sha256)
    assert again.sha256 == profile.sha256 == LayerProfile.load(out_dir / pool.PROFILE_NAME).sha256
    other = config.model_copy(update={"ratio_denominator": "previous", "sensitivity_eps": 1e-2})
    changed = build_profile(records, model=profile.model, config=other, probe_set_sha256=profile.probe_set_sha256)
    assert changed.task_particle != profile.task_particle
    assert changed.layer_sensitivity != profile.layer_sensitivity


def test_a_model_trained_on_the_tasks_shows_what_it_shows(
    quiet: tuple[LayerProfile, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A regression fixture, not a claim: the numbers are printed, the sanity of the measurement is asserted."""
    profile, _ = quiet
    answered = float(np.mean(list(profile.answered_share.values())))
    with capsys.disabled():
        print(f"\ntrained model: {answered:.0%} right, by group {profile.answered_share}")
        print(
            f"  TP {np.round(profile.task_particle, 3).tolist()} LS {np.round(profile.layer_sensitivity, 3).tolist()}"
        )
        print(f"  S {np.round(profile.alignment_score, 3).tolist()} stability {profile.probe_stability}")
        print(f"  stability {json.dumps(profile.stability)}")
    assert answered > 0.5, "it learned some of the tasks, so its answers are not noise"
    assert profile.js[0] > 0 and profile.js[-1] == 0
    assert all(abs(sum(shares) - 1) < 1e-9 for shares in profile.probe_stability.values())
    assert profile.measured_by == {"mean": {"equal_rows": 20}, "zero": {"query_rows": 60}}, "two of six check"
    assert {"top_k", "mask", "halves"} == set(profile.stability)


def test_nan_weights_are_named_through_the_pool(
    ray_local: None, trained_model: Path, config: TraceConfig, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(trained_model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 3] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(trained_model).save_pretrained(tmp_path / "broken")
    named = r"^Qwen3ForCausalLM: parameter model\.layers\.1\.mlp\.down_proj\.weight holds NaN or infinite values$"
    with pytest.raises(ModelError, match=named):
        trace_model(ModelRef(str(tmp_path / "broken")), config, out_dir=tmp_path)
    assert not (tmp_path / pool.PROFILE_NAME).exists()


def test_inputs_that_cannot_be_traced_are_refused_before_an_actor_starts(
    trained_model: Path, config: TraceConfig, tmp_path: Path
) -> None:
    probe = {"id": "long", "group": "g", "prompt": "Example:" + "a " * 70 + "; Query:a->", "answer": "b"}
    (tmp_path / "long.jsonl").write_text(json.dumps(probe), encoding="utf-8")
    long = config.model_copy(update={"probes": str(tmp_path / "long.jsonl")})
    with pytest.raises(ProbeError, match=r"probe long: has \d+ tokens, the model 64 positions"):
        trace_model(ModelRef(str(trained_model)), long, out_dir=tmp_path)
    one = tmp_path / "one"
    one.mkdir()
    values = json.loads((trained_model / "config.json").read_text())
    (one / "config.json").write_text(json.dumps(values | {"num_hidden_layers": 1}))
    (one / "model.safetensors").write_bytes((trained_model / "model.safetensors").read_bytes())
    with pytest.raises(ModelError, match="has 1 layer; tracing needs at least 2"):
        trace_model(ModelRef(str(one)), config, out_dir=tmp_path)
    (one / "config.json").write_text(json.dumps(values | {"model_type": "no_such_family", "num_hidden_layers": 4}))
    with pytest.raises(ModelError, match="no_such_family"):
        from layerplan.models.causal_lm import load_causal_lm

        load_causal_lm(str(one))
