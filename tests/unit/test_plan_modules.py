"""Plans that train modules inside layers: what is chosen, what moves, what it costs, and what others are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import naive_measurements as naive
import pytest
import torch
import yaml
from pydantic import ValidationError
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from layerplan.cli import main
from layerplan.config.measure import MeasureConfig
from layerplan.config.plan import ExplicitPlanConfig, FreezeDeepPlanConfig, FreezeShallowPlanConfig, MeasuredPlanConfig
from layerplan.config.train import TrainConfig
from layerplan.errors import PlanError
from layerplan.measure.assemble import Measured, assemble
from layerplan.measure.spectrum import read_snr
from layerplan.measure.weights import list_matrices
from layerplan.measure.work import Piece
from layerplan.models.freezing import apply_plan, check_gradient_coverage, compute_tensor_hashes
from layerplan.models.meta import ValuesAreTrue
from layerplan.models.ref import ModelRef
from layerplan.plan.communication import predict_communication
from layerplan.plan.cost import predict_cost
from layerplan.plan.explain import explain_plan, render_layer_map
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.layer_measurement import LayerMeasurement, LayerMeasurements, MeasuringCost
from layerplan.plan.layer_profile import ModelIdentity
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.modules import choose_top_share
from layerplan.plan.placement import Placement
from layerplan.plan.policies import make_plan
from layerplan.train.fsdp_units import list_mixed, list_units
from tests.model_folders import save_tiny_base
from tests.qwen3 import QWEN3_0P6B, TINY_QWEN3, build_tiny_qwen3
from tests.unit.test_plan_cost import HYBRID, SMALL, build, count_flops, plan_of, shape_of

MODEL = ModelIdentity(name="tiny", model_type="qwen3", num_layers=3)
SHAPE = ModelShape.from_hf_config(TINY_QWEN3)
LAYERS = 6
WIDE = {**QWEN3_0P6B, "num_hidden_layers": 8}
"""Qwen3-0.6B's layers, fewer of them."""
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
EXPERTS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        **LATENT, "num_key_value_heads": 4, "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
    },
}  # fmt: skip
"""Routed families' own sizes."""


def plan_for(config: Any) -> FreezePlan:
    return make_plan(config, model=MODEL, shape=SHAPE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 of six layers with random matrices."""
    path = tmp_path_factory.mktemp("model")
    model = build_tiny_qwen3(num_hidden_layers=LAYERS)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
                parameter.add_(
                    torch.outer(*(torch.randn(size, generator=generator) for size in parameter.shape)) * 0.01
                )
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def measured(folder: Path) -> LayerMeasurements:
    """Spectrum of it, put together as a run does."""
    matrices = list_matrices(ModelRef(str(folder)))
    pieces = [Piece("spectrum", number, matrix=matrix) for number, matrix in enumerate(matrices)]
    done = {piece.key: {"values": [[read_snr(piece.matrix)]], "seconds": 0.0} for piece in pieces if piece.matrix}
    found = assemble(
        ["spectrum"],
        Measured(pieces, done),
        model=ModelRef(str(folder)),
        config=MeasureConfig(),
        train=TrainConfig(),
        text=None,
        matrices=matrices,
    )
    return LayerMeasurements(model=ModelRef(str(folder)).identity(), measurements=found).sealed()


def spectrum_plan(folder: Path, measured: LayerMeasurements, **options: Any) -> FreezePlan:
    ref = ModelRef(str(folder))
    config = MeasuredPlanConfig(type="spectrum", unit="module", **options)
    return make_plan(config, model=ref.identity(), shape=ref.shape(), measurements=measured)


def list_trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("percent", [20, 34, 50, 100])
def test_spectrum_trains_what_its_published_code_lists(folder: Path, measured: LayerMeasurements, percent: int) -> None:
    """Numbers by full decompositions and the choice by the published rule, from the model itself."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    numbers = {
        name: naive.spectrum_snr(module.weight.detach().numpy())
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    wanted = naive.spectrum_unfrozen(numbers, percent)
    assert len(wanted) == 7 * int(LAYERS * percent / 100)
    plan = spectrum_plan(folder, measured, top_share=percent / 100)
    apply_plan(model, plan)
    assert list_trained(model) == {f"{name}.weight" for name in wanted}
    assert all(len(names) < 11 for names in plan.trainable_modules.values())  # norms stay frozen


def test_a_share_of_the_flops_buys_the_largest_share_of_matrices_it_pays_for(
    folder: Path, measured: LayerMeasurements
) -> None:
    shape = ModelRef(str(folder)).shape()
    plan = spectrum_plan(folder, measured, max_flops_share=0.9)
    more = spectrum_plan(folder, measured, top_share=plan.evidence["measurement"]["top_share"] + 1 / LAYERS)
    assert plan.predicted_cost is not None and more.predicted_cost is not None
    assert plan.predicted_cost.flops_share <= 0.9 < more.predicted_cost.flops_share
    assert predict_cost(plan, shape, seq_len=4096) == plan.predicted_cost.plan
    with pytest.raises(PlanError, match=r"plan.max_flops_share=0.1: one layer of each kind of matrix costs 0\.\d+"):
        spectrum_plan(folder, measured, max_flops_share=0.1)
    with pytest.raises(PlanError, match=r"plan.top_share=0.1: is less than one layer of 6"):
        spectrum_plan(folder, measured, top_share=0.1)


def test_shares_are_rounded_down_and_equal_numbers_go_to_the_lower_layer() -> None:
    kinds = {"up": [1.0, 3.0, None, 3.0, 2.0], "down": [1.0] * 100}
    assert choose_top_share(kinds, 0.5)["up"] == [1, 3] and choose_top_share(kinds, 0.25)["up"] == [1]
    assert choose_top_share(kinds, 0.5, from_worst=True)["up"] == [0, 4]
    assert choose_top_share(kinds, 0.29)["down"] == list(range(29))  # 100 * 0.29 is 28.999999999999996


@pytest.mark.parametrize(
    ("patterns", "inside"),
    [
        (["mlp"], {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}),
        (["self_attn.?_proj"], {f"self_attn.{each}_proj" for each in "qkvo"}),
        (["*norm"], {"input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"}),
        (["mlp.down_proj", "self_attn.v_proj"], {"mlp.down_proj", "self_attn.v_proj"}),
    ],
)
def test_exactly_the_named_modules_of_the_chosen_layers_move(patterns: list[str], inside: set[str]) -> None:
    plan = plan_for(FreezeShallowPlanConfig(boundary=1, modules=patterns))
    model = build_tiny_qwen3()
    before = compute_tensor_hashes(dict(model.named_parameters()))
    applied = apply_plan(model, plan)
    ids = torch.arange(24).reshape(2, 12) % 40
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    check_gradient_coverage(model, applied)
    after = compute_tensor_hashes(dict(model.named_parameters()))
    moved = {name for name in before if before[name] != after[name]}
    assert moved == {f"model.layers.{layer}.{name}.weight" for layer in (1, 2) for name in inside}
    assert plan.predicted_cost is not None
    assert plan.predicted_cost.plan.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("modules", [["mlp"], ["mlp.down_proj"], ["self_attn.o_proj", "mlp.gate_proj"], ["*norm"]])
def test_flops_of_modules_equal_the_counted_ones(modules: list[str]) -> None:
    """Weight gradients of what trains alone, input gradients down to the first module of the lowest layer."""
    for config in (
        FreezeShallowPlanConfig(boundary=5, modules=modules),
        FreezeDeepPlanConfig(boundary=2, modules=modules),
    ):
        plan, shape = plan_of(config, WIDE)
        predicted = predict_cost(plan, shape, seq_len=512, causal=False).total_flops
        assert predicted == pytest.approx(count_flops(WIDE, plan, 512), rel=1e-6)


def test_one_projection_into_attention_costs_all_its_gradients() -> None:
    """Attention's kernels give the gradients of queries, keys and values together; the eager one, counted here, only one."""
    plan, shape = plan_of(FreezeShallowPlanConfig(boundary=5, modules=["self_attn.q_proj"]), WIDE)
    predicted = predict_cost(plan, shape, seq_len=512, causal=False).total_flops
    counted = count_flops(WIDE, plan, 512)
    mixing = 2.0 * 2 * 16 * 128 * 512
    assert counted < predicted <= counted + mixing * 1.01


@pytest.mark.parametrize("modules", [["mixer.out_proj"], ["mixer.in_proj"], ["mixer"]])
def test_flops_of_modules_of_a_hybrid_equal_the_counted_ones(modules: list[str]) -> None:
    plan, shape = plan_of(ExplicitPlanConfig(trainable=["2:"], modules=modules), HYBRID)
    predicted = predict_cost(plan, shape, seq_len=512, causal=False).total_flops
    assert predicted == pytest.approx(count_flops(HYBRID, plan, 512), rel=1e-2)
    if modules == ["mixer.out_proj"]:
        assert plan.trainable_layers == (4,)  # 2 attends by another name, 3 and 5 are feed-forward layers


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("modules", [["mlp.experts.down_proj"], ["mlp.experts"], ["mlp"], ["self_attn"]])
def test_of_experts_the_active_ones_count(family: str, modules: list[str]) -> None:
    """DeepSeek hands its experts a view of the state its router reads; its shared experts count as if after the others."""
    values = {"model_type": family, **SMALL, **EXPERTS[family]}
    plan, shape = plan_of(ExplicitPlanConfig(trainable=["1:"], modules=modules), values)
    model = build(values, "meta")
    model.set_experts_implementation("batched_mm")
    apply_plan(model, plan)
    ids = torch.zeros(1, 256, dtype=torch.long, device="meta")
    with ValuesAreTrue(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    cost = predict_cost(plan, shape, seq_len=256, causal=False)
    assert cost.total_flops == pytest.approx(counter.get_total_flops() / 256, rel=1e-3 if family == "mixtral" else 5e-3)
    assert cost.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("values", [QWEN3_0P6B, HYBRID], ids=["qwen3", "hybrid"])
def test_modules_add_up_to_their_layer(values: dict[str, Any]) -> None:
    for layer in shape_of(values).layers:
        assert sum(module.params for module in layer.modules.values()) == layer.params
        assert sum(module.matrix_params for module in layer.modules.values()) == layer.matrix_params


def test_no_fsdp_unit_mixes_both_sides() -> None:
    model = build_tiny_qwen3()
    apply_plan(model, plan_for(FreezeShallowPlanConfig(boundary=1, modules=["mlp", "self_attn.q_proj"])))
    layer = model.model.layers[1]
    units = list_units(layer, set())
    mlp = layer.mlp
    assert units == [layer.self_attn.q_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj] and not list_mixed(layer)
    claimed: set[int] = set()
    for unit in [*units, layer]:
        own = [parameter for parameter in unit.parameters() if id(parameter) not in claimed]
        claimed |= {id(parameter) for parameter in own}
        assert len({parameter.requires_grad for parameter in own}) == 1
    whole = model.model.layers[0]
    assert list_units(whole, set()) == []


def test_a_frozen_parameter_beside_a_trained_one_in_a_module_stays_whole() -> None:
    experts = nn.Module()
    experts.up, experts.down = (nn.Parameter(torch.zeros(2, 3, 3), requires_grad=trains) for trains in (True, False))
    layer = nn.Module()
    layer.experts, layer.norm = experts, nn.LayerNorm(3).requires_grad_(False)
    ignored = list_mixed(layer)
    assert ignored == {experts.down} and list_units(layer, ignored) == [experts]


def test_what_a_layer_leaves_frozen_is_gathered_and_not_reduced() -> None:
    config = TrainConfig(global_batch_size=2, micro_batch_size=1, num_workers=2, compute_dtype="float32")
    plan = plan_for(FreezeShallowPlanConfig(boundary=1, modules=["mlp"]))
    sent = predict_communication(plan, SHAPE, config, Placement("shard", "shard"), world_size=2)
    trained = 2 * 3 * 32 * 48
    layer, ends = SHAPE.layer_params(0), SHAPE.embedding_params + SHAPE.final_norm_params
    assert sent.reduced == 4 * trained  # as an all-reduce, since that is what gloo makes of a scatter
    assert sent.gathered == 4 / 2 * (2 * trained + layer + 2 * (2 * layer - trained) + ends)


def test_plans_of_whole_layers_keep_their_bytes() -> None:
    """The field came later: it is written only where it says something."""
    plan = plan_for(FreezeDeepPlanConfig(boundary=2))
    assert "trainable_modules" not in plan.model_dump_json()
    every = ["mlp", "self_attn", "*layernorm"]
    assert plan_for(FreezeDeepPlanConfig(boundary=2, modules=every)).trainable_modules == {}


def test_a_plan_of_modules_is_read_shown_compared_and_priced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny_base(tmp_path / "model")
    first, second = tmp_path / "one.json", tmp_path / "two.json"
    plan = plan_for(FreezeShallowPlanConfig(boundary=1, modules=["mlp"]))
    plan.save(first)
    plan_for(ExplicitPlanConfig(trainable=[1, 2], modules=["mlp.down_proj"])).save(second)
    assert FreezePlan.load(first) == plan
    assert json.loads(first.read_text())["trainable_modules"]["2"] == ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"]
    assert render_layer_map(plan).startswith("embed □  layers □◧◧  norm □") and "2 of them in part" in render_layer_map(
        plan
    )
    assert "| `mlp.up_proj` | 2 | 1-2 |" in explain_plan(plan) and "| 1 | in part: mlp.down_proj," in explain_plan(plan)
    assert main(["plan", "diff", str(first), str(second)]) == 0
    assert f"only {first} trains mlp.gate_proj, mlp.up_proj in layer 1" in capsys.readouterr().out
    assert main(["plan", "price", str(model), "--plan", str(first)]) == 0
    assert "backward stops in layer 1" in capsys.readouterr().out


def test_spectrums_own_file_becomes_a_plan_and_comes_back(
    folder: Path, measured: LayerMeasurements, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its lists name modules without an anchor, which axolotl's rule takes for a beginning."""
    plan = spectrum_plan(folder, measured, top_share=0.5)
    listed = [f"model.layers.{layer}.{name}" for layer, names in plan.trainable_modules.items() for name in names]
    (tmp_path / "spectrum.yaml").write_text(yaml.safe_dump({"unfrozen_parameters": listed}))
    out = tmp_path / "plan.json"
    command = ["plan", "import", str(tmp_path / "spectrum.yaml"), "--from", "axolotl", "--model", str(folder)]
    assert main([*command, "--out", str(out)]) == 0
    assert FreezePlan.load(out).trainable_modules == plan.trainable_modules
    for tool, is_said in (
        ("axolotl", True),
        ("ms-swift", True),
        ("python", True),
        ("llamafactory", False),
        ("peft", False),
    ):
        capsys.readouterr()
        assert main(["plan", "export", str(out), "--to", tool, "--model", str(folder)]) == (0 if is_said else 1)
        if not is_said:
            assert tool in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: plan_for(ExplicitPlanConfig(trainable=[0], modules=["mlp.up_prj"])), "nearest is mlp.up_proj"),
        (lambda: plan_for(ExplicitPlanConfig(trainable=[0], modules=["experts"])), "'experts' matches no module"),
    ],
)
def test_a_module_that_is_not_there_is_named(make: Any, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        make()


def test_layers_without_the_modules_are_named_and_cost_a_measurement_nothing() -> None:
    with pytest.raises(PlanError, match=r"none of layers 1, 3 has a module that mixer.in_proj names"):
        plan_of(ExplicitPlanConfig(trainable=[1, 3], modules=["mixer.in_proj"]), HYBRID)
    shape = shape_of(HYBRID)
    identity = ModelIdentity(name="hybrid", model_type="nemotron_h", num_layers=6)
    found = LayerMeasurement(name="fisher", values=[1, 6, 2, 5, 3, 4], cost=MeasuringCost(seconds=0, flops=0, tokens=0))
    measured = LayerMeasurements(model=identity, measurements=[found]).sealed()
    config = MeasuredPlanConfig(type="fisher", max_flops_share=0.6, modules=["mixer.in_proj"])
    plan = make_plan(config, model=identity, shape=shape, measurements=measured)
    assert plan.trainable_modules == {4: ("mixer.in_proj",)}  # layer 1 is first in order and has none, 0 costs too much


def test_a_plan_for_modules_of_another_model_is_refused_by_name() -> None:
    plan = plan_for(ExplicitPlanConfig(trainable=[1], modules=["mlp"]))
    other = plan.model_copy(update={"trainable_modules": {1: ("mlp.experts",)}})
    with pytest.raises(PlanError, match=r"layer 1 has no module 'mlp.experts'; they are input_layernorm, "):
        apply_plan(build_tiny_qwen3(), other)
    with pytest.raises(PlanError, match=r"layer 1 has no module 'mlp.experts'"):
        predict_cost(other, SHAPE, seq_len=16)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"type": "fisher", "top_share": 0.5}, "only spectrum measures single matrices"),
        ({"type": "spectrum", "k": 3}, "exactly one of top_share and max_flops_share"),
        ({"type": "spectrum", "top_share": 0.5, "without_evidence": "error"}, "no repeats to test it by"),
        ({"type": "spectrum", "top_share": 0.5, "modules": ["mlp"]}, "chooses modules itself"),
        ({"type": "spectrum", "select": "boundary"}, "select=boundary does not go with unit=module"),
    ],
)
def test_options_that_do_not_go_together_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        MeasuredPlanConfig(**values, unit="module")
