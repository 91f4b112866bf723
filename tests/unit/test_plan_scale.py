"""What a plan takes on many nodes, against arithmetic by hand and against what others measured at that scale."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from layerplan.cli import main
from layerplan.config.plan import FreezeShallowPlanConfig, FullPlanConfig
from layerplan.config.train import TrainConfig
from layerplan.errors import ConfigError
from layerplan.models.model_sizes import make_model_shape
from layerplan.models.published import list_published
from layerplan.plan.cluster_rates import ClusterRates, read_check, take_sheet
from layerplan.plan.cost import count_trainable_params, predict_cost
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.layer_profile import ModelIdentity
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.policies import make_plan
from layerplan.plan.scale import ScalePoint, choose_best, compute_efficiency, find_saturation, predict_scale
from tests.qwen3 import QWEN3_0P6B

SLOW = ClusterRates(
    workers_per_node=2, flops=1e12, memory=1e12, memory_rate=1e11, inside=8e9, between=1e9, copy=1e9, storage=1e8,
    hides=False,
)  # fmt: skip
LLAMA_8B = list_published()["meta-llama/Llama-3.1-8B"]


def plan_of(config: FullPlanConfig | FreezeShallowPlanConfig, values: dict) -> tuple[FreezePlan, ModelShape]:
    shape = make_model_shape(values)
    model = ModelIdentity(name="m", model_type=str(values["model_type"]), num_layers=shape.num_layers)
    return make_plan(config, model=model, shape=shape), shape


def predict(config: FullPlanConfig | FreezeShallowPlanConfig, nodes: int, **fields: object) -> dict[str, ScalePoint]:
    plan, shape = plan_of(config, QWEN3_0P6B)
    train = TrainConfig(global_batch_size=64, micro_batch_size=4, checkpoint_every_steps=10, **fields)
    points = predict_scale(plan, shape, train, SLOW, seq_len=1000, nodes=nodes)
    return {point.placement: point for point in points}


def test_a_step_adds_up_as_by_hand() -> None:
    plan, shape = plan_of(FullPlanConfig(), QWEN3_0P6B)
    trained, cost = count_trainable_params(plan, shape), predict_cost(plan, shape, seq_len=1000)
    point = predict(FullPlanConfig(), 4)["replicate"]
    # 64 rows over 8 workers; a ring of 8 sends 2 x 7/8 of every float32 gradient over each link, once over a node's
    sent = 2 * 7 / 8 * 4 * trained
    assert point.worker_bytes == point.node_bytes == point.gradient_bytes == pytest.approx(sent)
    assert point.communication_s == point.exposed_s == pytest.approx(sent / 1e9), "the slower link sets the pace"
    assert point.compute_s == pytest.approx(8 * 1000 * cost.total_flops / 1e12 + 28 * trained / 1e11)
    # a save copies 12 bytes a parameter at 1 GB/s; four nodes write them at 0.4 GB/s, which ten steps have to cover
    writing, steps = 12 * trained / 4e8, 10 * (point.compute_s + point.exposed_s)
    assert point.checkpoint_s == pytest.approx((12 * trained / 1e9 + max(0.0, writing - steps)) / 10)
    assert point.data_s == 0 and point.fits


def test_groups_of_a_node_gather_inside_and_only_sums_of_shards_cross() -> None:
    plan, shape = plan_of(FullPlanConfig(), QWEN3_0P6B)
    trained = count_trainable_params(plan, shape)
    point = predict(FullPlanConfig(), 4)["shard per node"]
    # pairs of workers: bfloat16 gathered for forward and backward of two micro-batches, float32 scattered once, by gloo
    assert point.worker_bytes == pytest.approx(1 / 2 * (2 * 2 * 2 * trained + 2 * 4 * trained))
    # each of the two shards is summed over four nodes
    assert point.node_bytes == pytest.approx(2 * (2 * 3 / 4 * 4 * trained / 2))
    assert point.communication_s == pytest.approx(point.worker_bytes / 8e9 + point.node_bytes / 1e9)
    one = predict(FullPlanConfig(), 1)
    assert set(one) == {"replicate", "shard over all"}
    assert all(each.node_bytes == 0 for each in one.values())


def test_frozen_layers_send_no_gradient() -> None:
    plan, shape = plan_of(FreezeShallowPlanConfig(boundary=14), QWEN3_0P6B)
    full = predict(FullPlanConfig(), 4)["replicate"]
    half = predict(FreezeShallowPlanConfig(boundary=14), 4)["replicate"]
    share = count_trainable_params(plan, shape) / shape.total_params
    assert share < 0.5
    assert half.gradient_bytes == pytest.approx(share * full.gradient_bytes)
    assert half.exposed_s == pytest.approx(share * full.exposed_s)


def test_what_a_gpu_computes_meanwhile_hides_communication_but_for_the_first_unit() -> None:
    plan, shape = plan_of(FullPlanConfig(), QWEN3_0P6B)
    train = TrainConfig(global_batch_size=4096, micro_batch_size=4)
    fast = replace(SLOW, hides=True)
    hidden, bare = (predict_scale(plan, shape, train, rates, seq_len=1000, nodes=4) for rates in (fast, SLOW))
    for one, other in zip(hidden, bare):
        assert one.exposed_s == pytest.approx(other.communication_s / shape.num_layers)
        assert one.compute_s == other.compute_s


def test_more_nodes_saturate_where_the_link_is_slow_and_not_where_it_is_fast() -> None:
    def best(between: float) -> list[ScalePoint]:
        plan, shape = plan_of(FullPlanConfig(), QWEN3_0P6B)
        train, rates = TrainConfig(global_batch_size=64, checkpoint_every_steps=1000), replace(SLOW, between=between)
        found = [choose_best(predict_scale(plan, shape, train, rates, seq_len=1000, nodes=n)) for n in (1, 2, 8, 32)]
        return [point for point in found if point is not None]

    # 4 bytes of each of 0.6 billion gradients, there and back, at 0.1 GB/s: 24 s over 2 nodes beside 63 s of compute, 42 s
    # over 8 beside 16 s
    saturated = find_saturation(best(1e8))
    assert saturated is not None and saturated.nodes == 8
    assert find_saturation(best(1e13)) is None
    first, *_, last = best(1e13)
    assert 0.85 < compute_efficiency(first, last) <= 1.01


def test_a_batch_that_cannot_be_dealt_has_no_point() -> None:
    plan, shape = plan_of(FullPlanConfig(), QWEN3_0P6B)
    assert predict_scale(plan, shape, TrainConfig(global_batch_size=64), SLOW, seq_len=1000, nodes=3) == []


def test_the_loss_of_speed_from_8_to_128_gpus_is_what_torchtitan_measured() -> None:
    """Llama 3.1 8B, 8,192 tokens, 2 rows a GPU, FSDP and compile: 6,667 and 6,514 tokens/s a GPU (torchtitan's
    benchmarks/llama3_h100_202412_torchtitan.md, tables 1 and 3; H100 of 500 W, 400 Gb/s each). They recompute single
    operations only, hence nothing here; the rate of one node is that of a faster card.
    """
    plan, shape = plan_of(FullPlanConfig(), LLAMA_8B)
    speeds = []
    for nodes, batch in ((1, 16), (16, 256)):
        batches = {"global_batch_size": batch, "micro_batch_size": 2, "activation_checkpointing": "none"}
        train = TrainConfig(**batches, use_gpu=True, checkpoint_every_steps=10**6)
        points = predict_scale(plan, shape, train, take_sheet("H100"), seq_len=8192, nodes=nodes)
        (sharded,) = (point for point in points if point.placement == "shard over all")
        speeds.append(2 * 8192 / sharded.step_s)
    assert speeds[1] / speeds[0] == pytest.approx(6514 / 6667, abs=0.03)
    assert speeds[0] == pytest.approx(6667, rel=0.2)


CHECKED = {
    "nodes": [{"devices": [], "memory": 64e9}, {"devices": [], "memory": 32e9}],
    "all_reduce_bytes_per_s": {"pairs": [], "over_all": 0.7e9},
    "core_flops_per_s": 3e10,
    "storage_bytes_per_s": 1.5e8,
}


def test_rates_of_a_checked_cluster_are_those_that_were_measured_and_say_so() -> None:
    rates = read_check(CHECKED, "checked.json", workers_per_node=2)
    assert (rates.flops, rates.between, rates.storage, rates.memory) == (3e10, 0.7e9, 1.5e8, 16e9)
    assert all("checked.json" in source for source in rates.sources.values())
    gpus = CHECKED | {"nodes": [{"devices": [["NVIDIA H200", 140e9]] * 8, "memory": 2e12}]}
    rates = read_check(gpus, "checked.json")
    assert (rates.workers_per_node, rates.memory, rates.storage) == (8, 140e9, 1.5e8)
    assert rates.between == take_sheet("H200").between, "gloo's rate is not NCCL's"
    with pytest.raises(ConfigError, match="its GPU is 'RTX 9'; known are H200, H100"):
        read_check(gpus | {"nodes": [{"devices": [["RTX 9", 1]], "memory": 1}]}, "checked.json")
    with pytest.raises(ConfigError, match=r"x.json: is not what `layerplan cluster check --out` writes"):
        read_check({"nodes": 3}, "x.json")


def run_scale(tmp_path: Path, *arguments: str) -> int:
    config = {
        "name": "scaled",
        "model": {"type": "pretrained", "name": "Qwen/Qwen3-0.6B-Base"},
        "plan": {"type": "full"},
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config | {"storage_path": str(tmp_path)}))
    return main(["plan", "scale", str(path), *arguments])


def test_the_command_says_what_it_stands_on_and_what_the_batch_allows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--set", "train.use_gpu=true", "--set", "train.usd_per_worker_hour=2", "--nodes", "1,8,64")
    assert run_scale(tmp_path, *options) == 0
    text = capsys.readouterr().out
    assert "989 TFLOP/s (H200 data sheet" in text and "8 x 400 Gb/s a node" in text
    assert "64 rows cannot be dealt evenly to 64 nodes of 8 workers, 8 at most" in text
    assert "frozen layers none: full" in text
    (tmp_path / "checked.json").write_text(json.dumps(CHECKED))
    assert run_scale(tmp_path, "--constants", str(tmp_path / "checked.json"), "--nodes", "1,2") == 0
    assert "0.700 GB/s a node, all nodes at once" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nodes", "1,x"], "--nodes 1,x: numbers from 1 to 100000"),
        (["--nodes", "0"], "--nodes 0: numbers from 1 to 100000"),
        (["--workers-per-node", "0"], "--workers-per-node 0: at least 1 is expected"),
        (["--constants", "nowhere.json"], "--constants nowhere.json: cannot be read"),
    ],
)
def test_what_means_nothing_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert run_scale(tmp_path, *arguments) == 2
    assert said in capsys.readouterr().err
