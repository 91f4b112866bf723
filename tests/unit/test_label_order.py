"""The order of prompts with a label: a function of (start layers, batch, seed, step), and the store that carries it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from layerplan.config.finetune import FinetuneConfig, JsonlTaskConfig
from layerplan.corpus.label_order import LabelOrder
from layerplan.corpus.label_store import iter_label_steps, make_label_order, write_label_store
from layerplan.corpus.manifest import LabelFacts, Manifest
from layerplan.corpus.store import load_validation_rows
from layerplan.errors import CorpusError
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.layer_profile import ModelIdentity
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.policies import make_plan
from layerplan.plan.row_starts import choose_plan_config, choose_start_layers, find_eof_layer
from tests.qwen3 import TINY_QWEN3

STARTS = (2, 0, 1, 1, 0, 2, 2, 1, 0, 0, 2)
ORDER = LabelOrder(STARTS, batch_size=4, seed=5)


def write(store: Path, starts: tuple[int, ...] = STARTS) -> Manifest:
    train = [[*range(7, 8 + row % 3), row] for row in range(len(STARTS))]
    facts = LabelFacts(task="t", task_sha256="0", label_ids={"a": 1, "b": 2}, start_layers=list(starts))
    return write_label_store(
        store, train, [[3, 4]], facts, vocab_size=40, padding_id=0, tokenizer_sha256="0", counts={}
    )


def test_every_epoch_reads_each_row_once_and_shallow_start_layers_first() -> None:
    assert ORDER.steps_per_epoch == 3
    for epoch in range(3):
        rows = np.concatenate([ORDER.rows_at(3 * epoch + step) for step in range(3)])
        assert sorted(rows.tolist()) == list(range(11))
        assert [STARTS[row] for row in rows] == sorted(STARTS)
    assert [len(ORDER.rows_at(step)) for step in range(3)] == [4, 4, 3]


def test_epochs_and_seeds_draw_the_rows_of_one_layer_anew() -> None:
    others = [ORDER.order_of(1), LabelOrder(STARTS, 4, seed=6).order_of(0)]
    assert all(ORDER.order_of(0).tolist() != other.tolist() for other in others)
    assert ORDER.rows_at(4).tolist() == LabelOrder(STARTS, 4, 5).rows_at(4).tolist()


def test_a_drawn_order_mixes_start_layers_and_reads_each_row_once() -> None:
    drawn = LabelOrder(STARTS, batch_size=4, seed=5, is_shallow_first=False)
    rows = np.concatenate([drawn.rows_at(step) for step in range(3)])
    assert sorted(rows.tolist()) == list(range(11))
    assert [STARTS[row] for row in rows] != sorted(STARTS)
    # sorted by start layer, and nothing else, it is the other
    assert sorted(rows.tolist(), key=lambda row: STARTS[row]) == ORDER.order_of(0).tolist()
    assert drawn.order_of(1).tolist() != drawn.order_of(0).tolist()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_share_a_step_with_as_many_rows_of_each_start_layer(world_size: int, tmp_path: Path) -> None:
    """However many workers: the same rows, and each rank the same start layers, filled up with padding."""
    write(tmp_path / "s")
    order = make_label_order(Manifest.load(tmp_path / "s"), batch_size=4, seed=5)
    for step in range(3):
        shares = [
            next(iter_label_steps(tmp_path / "s", order, range(step, step + 1), rank=rank, world_size=world_size))
            for rank in range(world_size)
        ]
        real = sorted(int(row) for share in shares for row in share.row_ids if row >= 0)
        assert real == sorted(ORDER.rows_at(step).tolist())
        assert all(share.start_layers.tolist() == shares[0].start_layers.tolist() for share in shares)
        for share in shares:
            for place, row in enumerate(share.row_ids):
                used = share.document_ids[place] >= 0
                assert used.any() == (row >= 0)
                assert row < 0 or (share.input_ids[place][used][-1], share.start_layers[place]) == (row, STARTS[row])


def test_start_layers_are_part_of_what_a_store_is(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a"), write(tmp_path / "b", (*STARTS[:-1], 0))
    assert first.content_sha256 == write(tmp_path / "c").content_sha256 != second.content_sha256
    held_out = load_validation_rows(tmp_path / "a")
    assert held_out is not None and held_out.start_layers is not None and len(held_out) == 1


def test_a_drawn_order_is_another_store_and_the_default_hashes_as_before_there_was_one(tmp_path: Path) -> None:
    manifest = write(tmp_path / "a")
    assert manifest.labels is not None and "order" not in manifest.labels.hashed()
    drawn = manifest.model_copy(update={"labels": manifest.labels.model_copy(update={"order": "drawn"})})
    assert drawn.content_sha256 != manifest.content_sha256
    assert make_label_order(drawn, batch_size=4, seed=5) == LabelOrder(STARTS, 4, 5, is_shallow_first=False)


def test_a_store_whose_start_layers_do_not_fit_its_rows_contradicts_itself(tmp_path: Path) -> None:
    manifest = write(tmp_path / "a")
    assert manifest.labels is not None
    shorter = manifest.model_copy(update={"labels": manifest.labels.model_copy(update={"start_layers": [0]})})
    (tmp_path / "a" / "manifest.json").write_text(shorter.render())
    with pytest.raises(CorpusError, match="num_rows=11, start layers are given for 1"):
        Manifest.load(tmp_path / "a")


@pytest.mark.parametrize(
    ("deviations", "layer"),
    [([1.0, 0.9, 0.2, 0.1], 1), ([1.0, 0.5, 0.0], 0), ([0.25, 0.5, 0.75], 0), ([3.0, 3.0, 3.0], 0)],
)
def test_the_eof_layer_is_the_first_of_the_largest_gain(deviations: list[float], layer: int) -> None:
    assert find_eof_layer(deviations) == layer


def plan_of(config: FinetuneConfig) -> FreezePlan:
    model = ModelIdentity(name="tiny", model_type="qwen3", num_layers=4)
    shape = ModelShape.from_hf_config(TINY_QWEN3 | {"num_hidden_layers": 4})
    return make_plan(choose_plan_config(config), model=model, shape=shape)


def test_methods_differ_in_which_rows_start_where_and_not_in_how_many() -> None:
    eof = [row % 4 for row in range(20)]
    found = {}
    for method in ("salf", "lift_star", "lift", "full", "freeze_deep", "freeze_shallow"):
        config = FinetuneConfig(task=JsonlTaskConfig(path="."), method=method)
        found[method] = choose_start_layers(config, plan_of(config), 20, eof, seed=1)
    assert all(sorted(found[method]) == sorted(list(range(4)) * 5) for method in ("salf", "lift_star", "lift"))
    assert found["lift"] == found["lift_star"] != found["salf"]
    # of five places at layer 0 the five rows whose eof layer is 0 take all
    assert [row for row, start in enumerate(found["salf"]) if start == 0] == [0, 4, 8, 12, 16]
    assert (found["full"], found["freeze_deep"], found["freeze_shallow"]) == ([0] * 20, [0] * 20, [2] * 20)
