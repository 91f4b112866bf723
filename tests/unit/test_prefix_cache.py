"""A frozen prefix whose output is kept: the same weights to the last bit, and whatever is missing or torn is computed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from layerplan.config.load import validate_config
from layerplan.config.model import ScratchModelConfig
from layerplan.config.plan import ExplicitPlanConfig, FreezeShallowPlanConfig, FullPlanConfig
from layerplan.config.train import OptimizerConfig, TrainConfig
from layerplan.corpus.rows import PackedRows
from layerplan.models.causal_lm import find_decoder_parts
from layerplan.models.freezing import compute_tensor_hashes
from layerplan.pipeline.base_model import _pretrain_config
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.layer_profile import ModelIdentity
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.policies import make_plan
from layerplan.plan.prefix_cache import find_cut, find_plan_fault, price_prefix
from layerplan.train.loop import run_loop
from layerplan.train.prefix_cache import PrefixCache
from layerplan.train.prefix_pass import Prefix, find_prefix_fault
from layerplan.train.row_states import RowStates
from layerplan.train.state import TrainState
from layerplan.train.step import LossModel
from tests.families import make_model
from tests.qwen3 import TINY_QWEN3, build_tiny_qwen3
from tests.small_disk import small_disk
from tests.tiny_loop import SEQ_LEN, make_loop, make_rows

VALUES = TINY_QWEN3 | {"tie_word_embeddings": False}
SHAPE = ModelShape.from_hf_config(VALUES)
ROWS, BATCH, EPOCHS = 12, 4, 3
CUT = 2


def plan_for(config: object) -> FreezePlan:
    identity = ModelIdentity(name="tiny", model_type="qwen3", num_layers=3)
    return make_plan(config, model=identity, shape=SHAPE)  # type: ignore[arg-type]


def read_rows(step: int) -> PackedRows:
    """Rows of an epoch in an order of its own; the last three are whole documents, the others hold two."""
    epoch, at = divmod(step, ROWS // BATCH)
    ids = np.random.default_rng(epoch).permutation(ROWS)[at * BATCH : (at + 1) * BATCH]
    packed, whole = (make_rows(1, batch=ROWS, vocab_size=40, start=start) for start in (5, None))
    parts = [(whole if row >= ROWS - 3 else packed).take(row, row + 1) for row in ids]
    fields = ("input_ids", "document_ids", "position_ids")
    return PackedRows(ids, *(np.concatenate([getattr(part, field) for part in parts]) for field in fields))


def open_states(folder: Path, dtype: str, circumstances: str = "these") -> RowStates:
    sizes = (SEQ_LEN, VALUES["hidden_size"])
    return RowStates(folder / "rows.bin", circumstances=circumstances, row_shape=sizes, dtype=getattr(torch, dtype))


def train(
    dtype: str, states: RowStates | None, *, steps: int = EPOCHS * ROWS // BATCH, micro: int = 2
) -> tuple[dict[str, str], PrefixCache | None]:
    """Hashes of the weights after some steps."""
    model = build_tiny_qwen3(**VALUES).train()
    config = TrainConfig(
        max_steps=steps,
        global_batch_size=BATCH,
        micro_batch_size=micro,
        compute_dtype=dtype,  # type: ignore[arg-type]
        log_every_steps=100,
        optimizer=OptimizerConfig(learning_rate=1e-2, eps=1e-5),
    )
    setup, hooks = make_loop(model, plan_for(FreezeShallowPlanConfig(boundary=CUT)), config, rows_of_step=read_rows)
    cache = None
    if states is not None:
        cache = PrefixCache(Prefix(model, CUT), states)
        place = {"rows": micro, "seq_len": SEQ_LEN, "device": setup.device}
        assert find_prefix_fault(setup.placed.model, cache.prefix, **place) == ""  # type: ignore[arg-type]
    run_loop(replace(setup, prefix=cache), TrainState(), hooks)
    return compute_tensor_hashes(dict(model.named_parameters())), cache


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_the_same_to_the_last_bit_with_rows_read_and_computed(tmp_path: Path, dtype: str) -> None:
    """Three epochs of twelve rows: what is prepared two steps ahead may be read before it is written, the rest is read."""
    expected, _ = train(dtype, None)
    states = open_states(tmp_path, dtype)
    found, cache = train(dtype, states)
    assert found == expected and cache is not None
    assert cache.num_read + cache.num_computed == EPOCHS * ROWS and cache.num_read > 0
    cache.close(is_done=False)
    resumed = open_states(tmp_path, dtype)
    _, cache = train(dtype, resumed, micro=1, steps=ROWS // BATCH)
    assert cache is not None and cache.num_read == 0, "kernels may differ by the rows of a micro-batch"
    cache.close(is_done=True)
    assert not resumed.path.exists()


def test_a_second_run_reads_every_row_and_a_torn_or_foreign_record_is_computed(tmp_path: Path) -> None:
    expected, _ = train("float32", None, micro=1)
    first = open_states(tmp_path, "float32")
    _, cache = train("float32", first, micro=1)
    assert cache is not None
    cache.close(is_done=False)
    record = 16 + SEQ_LEN * VALUES["hidden_size"] * 4
    assert first.path.stat().st_size == ROWS * record

    def counts(circumstances: str = "these") -> tuple[int, int]:
        states = open_states(tmp_path, "float32", circumstances)
        found, cache = train("float32", states, micro=1)
        assert found == expected and cache is not None
        cache.close(is_done=False)
        return cache.num_read, cache.num_computed

    assert counts() == (EPOCHS * ROWS, 0)
    with first.path.open("r+b") as file:
        file.seek(5 * record + 100)
        file.write(b"\0\0\0\0")
        file.truncate((ROWS - 1) * record + 40)
    read, computed = counts()
    assert 2 <= computed <= 2 * EPOCHS and read + computed == EPOCHS * ROWS
    assert counts() == (EPOCHS * ROWS, 0), "they were written again"
    assert counts("others")[1] >= ROWS


def test_a_full_disk_ends_the_writing_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected, _ = train("float32", None)
    with small_disk(tmp_path / "disk", 8) as fault:
        if fault:
            pytest.skip(fault)
        found, cache = train("float32", open_states(tmp_path / "disk", "float32"))
        assert cache is not None
        cache.close(is_done=True)
    assert found == expected and cache.num_computed > 0
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == 1 and said[0].startswith("prefix cache: nothing more is written")


def ask(model: nn.Module, cut: int = CUT, *, rows: int = 3) -> str:
    for layer in find_decoder_parts(model.requires_grad_(False)).layers[cut:]:
        layer.requires_grad_(True)
    return find_prefix_fault(
        LossModel(model.train()), Prefix(model, cut), rows=rows, seq_len=SEQ_LEN, device=torch.device("cpu")
    )


def test_the_model_is_asked_whether_its_prefix_can_be_passed_over() -> None:
    """Inputs for each layer and a stream of states are exact; four streams, dropout and experts in common are not."""
    for name in ("gemma2", "bloom", "gemma4_text", "recurrent_gemma", "jamba", "qwen3_moe"):
        assert ask(make_model(name), rows=1) == "", name
    assert ask(make_model("gemma3n_text")).startswith(
        "its layers cannot be passed over (TypeError: a layer gives 4 dim"
    )
    assert ask(make_model("gpt2")).endswith("by dropout or noise")
    assert "depend on the rows beside it" in ask(make_model("mixtral")) and ask(make_model("mixtral"), rows=1) == ""


class Reaching(nn.Module):
    """A layer that also wants what the lowest layer gave, beside what it is handed."""

    def __init__(self, layer: nn.Module, lowest: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        lowest.register_forward_hook(lambda module, args, output: setattr(self, "kept", output))

    def forward(self, states: torch.Tensor, **options: object) -> torch.Tensor:
        return self.layer(states + self.kept, **options)


def test_a_model_whose_upper_layers_reach_below_is_refused() -> None:
    model = build_tiny_qwen3(**VALUES)
    layers = model.model.layers
    layers[2] = Reaching(layers[2], layers[0])
    assert ask(model).startswith("its upper layers want more of the lower ones than states: the loss differs by")
    model = build_tiny_qwen3(**VALUES)
    model.requires_grad_(True)
    prefix = Prefix(model, CUT)
    fault = find_prefix_fault(LossModel(model), prefix, rows=2, seq_len=SEQ_LEN, device=torch.device("cpu"))
    assert fault == "what it is made of trains"


def test_what_it_saves_and_costs_is_priced() -> None:
    """A layer of 4 x 32 x 16 x ... weights; half of the rows come again twice."""
    plan = plan_for(FreezeShallowPlanConfig(boundary=2))
    config = TrainConfig(max_steps=30, global_batch_size=4, compute_dtype="bfloat16")
    options = {"seq_len": 100, "num_rows": 40, "world_size": 2, "flops_per_s": 1e6}
    price = price_prefix(plan, SHAPE, config, **options)  # type: ignore[arg-type]
    record = 100 * 32 * 2 + 16
    assert price.num_bytes == 40 * record
    assert price.disk_s == pytest.approx(120 * record / 200e6 / 2)
    weights = SHAPE.layers[0].matrix_params
    mixing = 2 * SHAPE.layers[0].attention_width * 101 / 2
    assert price.saved_s == pytest.approx(80 * 100 * 2 * (2 * weights + mixing) / 1e6 / 2, rel=1e-6)
    assert price.pays and not price_prefix(plan, SHAPE, config, **options | {"flops_per_s": 1e15}).pays  # type: ignore[arg-type]
    assert find_cut(plan, 3) == 2 and find_plan_fault(plan, 3) == ""
    assert "layer 0 trains" in find_plan_fault(plan_for(FullPlanConfig()), 3)
    embeds = plan_for(ExplicitPlanConfig(trainable=[2], train_embeddings=True))
    assert "the input embedding trains" in find_plan_fault(embeds, 3)


@pytest.mark.parametrize(("given", "kept"), [("auto", "auto"), (True, "on"), (False, "off"), ("on", "on")])
def test_yaml_reads_on_and_off_as_booleans(given: object, kept: str) -> None:
    values = {"name": "n", "model": {"type": "pretrained", "name": "m"}, "train": {"cache_prefix": given}}
    assert validate_config(values).train.cache_prefix == kept


def test_a_base_made_from_scratch_is_trained_without_the_cache_that_its_run_asks_for() -> None:
    """Everything of it trains: `on` would refuse it, attempt after attempt, before the run's own training began."""
    config = _pretrain_config(TrainConfig(cache_prefix="on"), ScratchModelConfig())
    assert config.cache_prefix == "off" and config.max_steps == ScratchModelConfig().pretrain_steps
