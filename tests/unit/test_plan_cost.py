"""The cost model against what PyTorch counts: FLOPs of real forward and backward passes, tensors really saved."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from layerplan.config.plan import FreezeDeepPlanConfig, FreezeShallowPlanConfig, FullPlanConfig
from layerplan.config.train import TrainConfig
from layerplan.models.freezing import apply_plan
from layerplan.models.model_sizes import make_model_shape
from layerplan.plan.attention import CAUSAL, OWN, count_square_bytes
from layerplan.plan.communication import predict_communication
from layerplan.plan.cost import predict_cost
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.host_memory import PROCESS_BYTES, READING_BYTES, estimate_host_memory
from layerplan.plan.layer_profile import ModelIdentity
from layerplan.plan.memory import estimate_memory, layer_activation_bytes
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.placement import Placement, gradient_path
from layerplan.plan.policies import make_plan
from layerplan.train.attention import IMPLEMENTATIONS, set_attention
from layerplan.train.step import LossModel, TensorBatch
from tests.qwen3 import QWEN3_0P6B, QWEN3_8B, QWEN3_14B

LLAMA_1B = {
    "model_type": "llama",
    "num_hidden_layers": 16,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
HYBRID = {
    "model_type": "nemotron_h",
    "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp", "linear_attention", "mlp"],
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "mamba_num_heads": 32,
    "mamba_head_dim": 64,
    "ssm_state_size": 128,
    "n_groups": 8,
    "conv_kernel": 4,
    "chunk_size": 128,
    "vocab_size": 1000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
SMALL = {
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 2048,
}


@lru_cache
def _measured(values: str) -> ModelShape:
    return make_model_shape(json.loads(values))


def shape_of(values: dict[str, Any]) -> ModelShape:
    return _measured(json.dumps(values))


def plan_of(config: Any, values: dict[str, Any]) -> tuple[FreezePlan, ModelShape]:
    shape = shape_of(values)
    model = ModelIdentity(name="some", model_type=values["model_type"], num_layers=shape.num_layers)
    return make_plan(config, model=model, shape=shape), shape


def build(values: dict[str, Any], device: str) -> Any:
    sizes = {key: value for key, value in values.items() if key != "model_type"}
    config = AutoConfig.for_model(values["model_type"], **sizes)
    config._attn_implementation = "eager" if device == "meta" else "sdpa"
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config)


def count_depthwise(
    gradient: Sequence[int], _x: object, weight: Sequence[int], *args: Any, out_shape: object = None, **kwargs: Any
) -> int:
    """PyTorch's counter takes a depthwise convolution's backward pass for a dense one."""
    wanted = args[-1]
    return 2 * gradient[0] * gradient[1] * gradient[2] * weight[1] * weight[2] * (int(wanted[0]) + int(wanted[1]))


def count_flops(values: dict[str, Any], plan: FreezePlan, seq_len: int, *, input_needs_grad: bool = False) -> float:
    """FLOPs per token of one forward and backward pass on meta tensors."""
    model = build(values, "meta")
    apply_plan(model, plan)
    if input_needs_grad:
        model.enable_input_require_grads()
    ids = torch.zeros(1, seq_len, dtype=torch.long, device="meta")
    mask = torch.zeros(1, 1, seq_len, seq_len, device="meta")
    positions = torch.arange(seq_len, device="meta")[None]
    custom = {torch.ops.aten.convolution_backward: count_depthwise}
    with FlopCounterMode(display=False, custom_mapping=custom) as counter:
        model(input_ids=ids, labels=ids, attention_mask=mask, position_ids=positions, use_cache=False).loss.backward()
    return counter.get_total_flops() / seq_len


DEEP, SHALLOW = FreezeDeepPlanConfig, FreezeShallowPlanConfig
ROWS = [
    (FullPlanConfig(), 1.0, 1.0),
    (DEEP(boundary=14), 0.824, 0.882),
    (DEEP(boundary=14, tied="trained"), 0.897, 0.931),
    (SHALLOW(boundary=14), 0.667, 0.667),
    (SHALLOW(boundary=14, tied="trained"), 0.897, 0.931),
    (SHALLOW(boundary=14, tied="head_only"), 0.739, 0.715),
]


@pytest.mark.parametrize(("config", "short", "long"), ROWS)
def test_flops_of_qwen3_0p6b_equal_the_counted_ones(config: Any, short: float, long: float) -> None:
    plan, shape = plan_of(config, QWEN3_0P6B)
    full, _ = plan_of(FullPlanConfig(), QWEN3_0P6B)
    for seq_len, share in ((1024, short), (4096, long)):
        predicted = predict_cost(plan, shape, seq_len=seq_len, causal=False).total_flops
        assert predicted == pytest.approx(count_flops(QWEN3_0P6B, plan, seq_len), rel=1e-3)
        whole = predict_cost(full, shape, seq_len=seq_len, causal=False).total_flops
        assert predicted / whole == pytest.approx(share, abs=1e-3)


def test_one_helper_call_cancels_what_a_frozen_prefix_saves() -> None:
    """`enable_input_require_grads` pulls the gradient through every frozen layer; the plan itself asks for none of it."""
    plan, shape = plan_of(SHALLOW(boundary=14), QWEN3_0P6B)
    asked = predict_cost(plan, shape, seq_len=1024, causal=False, input_requires_grad=True)
    counted = count_flops(QWEN3_0P6B, plan, 1024, input_needs_grad=True)
    assert asked.total_flops == pytest.approx(counted, rel=1e-3)
    assert asked.total_flops > 1.2 * predict_cost(plan, shape, seq_len=1024, causal=False).total_flops


@pytest.mark.parametrize("values", [QWEN3_8B, QWEN3_14B, LLAMA_1B], ids=["qwen3-8b", "qwen3-14b", "llama-1b"])
@pytest.mark.parametrize("config", [DEEP(split_ratio=1 / 3), SHALLOW(split_ratio=2 / 3, train_lm_head=True)])
def test_flops_of_larger_shapes_equal_the_counted_ones(values: dict[str, Any], config: Any) -> None:
    plan, shape = plan_of(config, values)
    predicted = predict_cost(plan, shape, seq_len=512, causal=False).total_flops
    assert predicted == pytest.approx(count_flops(values, plan, 512), rel=1e-3)


@pytest.mark.parametrize("config", [FullPlanConfig(), DEEP(boundary=3), SHALLOW(boundary=3)])
def test_flops_of_a_mamba2_hybrid_are_close(config: Any) -> None:
    """The reference scan of transformers multiplies per head what a fused kernel multiplies per group: within 3 %."""
    plan, shape = plan_of(config, HYBRID)
    predicted = predict_cost(plan, shape, seq_len=1024, causal=False).total_flops
    assert predicted == pytest.approx(count_flops(HYBRID, plan, 1024), rel=0.03)


FAMILIES = {
    "gpt2": {"n_layer": 4, "n_embd": 256, "n_head": 4, "vocab_size": 1000, "n_positions": 512},
    "gemma2": SMALL | {"head_dim": 64, "tie_word_embeddings": True},
    "olmo2": SMALL | {"tie_word_embeddings": False},
    "qwen2": SMALL | {"tie_word_embeddings": False},
    "llama": SMALL | {"tie_word_embeddings": False, "attention_bias": True},
    "mamba2": {
        "num_hidden_layers": 4,
        "hidden_size": 256,
        "num_heads": 8,
        "head_dim": 64,
        "state_size": 32,
        "n_groups": 2,
        "vocab_size": 1000,
        "tie_word_embeddings": False,
    },
    "nemotron_h": HYBRID,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_counted_as_the_family_has_them(family: str) -> None:
    values = {**FAMILIES[family], "model_type": family}
    model = build(values, "meta")
    shape = shape_of(values)
    assert shape.is_exact
    assert shape.total_params == sum(parameter.numel() for parameter in model.parameters())
    if family in ("gpt2", "olmo2"):
        plan, _ = plan_of(SHALLOW(boundary=2), values)
        predicted = predict_cost(plan, shape, seq_len=128, causal=False).total_flops
        assert predicted == pytest.approx(count_flops(values, plan, 128), rel=1e-3)


def saved_bytes(
    values: dict[str, Any],
    plan: FreezePlan,
    dtype: torch.dtype,
    *,
    attention: str = "sdpa",
    compiled: bool = False,
    num_documents: int = 1,
    seq_len: int = 128,
) -> int:
    """Bytes autograd keeps for the backward pass of two rows of equal documents, parameters not counted."""
    model = build(values, "cpu").to(dtype)
    set_attention(model, IMPLEMENTATIONS[attention])
    apply_plan(model, plan)
    for layer in model.model.layers if compiled else ():
        layer.compile(dynamic=False)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes(), tensor  # held, so that no address is used twice
        return tensor

    ids = torch.arange(2 * seq_len).reshape(2, seq_len) % 256
    positions = (torch.arange(seq_len) % (seq_len // num_documents))[None].expand(2, seq_len)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        LossModel(model)(TensorBatch(ids, positions, ids, 2 * seq_len))
    return sum(size for size, _ in saved.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_activations_keep_their_ratios(dtype: torch.dtype) -> None:
    values = QWEN3_0P6B | {"num_hidden_layers": 6, "hidden_size": 128, "intermediate_size": 384, "vocab_size": 256}
    values |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    full, shape = plan_of(FullPlanConfig(), values)

    def predict(plan: FreezePlan) -> float:
        trained = set(plan.trainable_layers)
        name = str(dtype).removeprefix("torch.")
        return sum(layer_activation_bytes(shape, name, trained=layer in trained) for layer in gradient_path(plan))

    measured = saved_bytes(values, full, dtype)
    assert 256 * predict(full) == pytest.approx(measured, rel=0.05)
    for config in (DEEP(boundary=2), DEEP(boundary=3, tied="trained"), SHALLOW(boundary=4)):
        plan, _ = plan_of(config, values)
        ratio = saved_bytes(values, plan, dtype) / measured
        assert predict(plan) / predict(full) == pytest.approx(ratio, rel=0.05)


def test_compiled_layers_keep_less() -> None:
    """One trained and one frozen, in bfloat16."""
    values = QWEN3_0P6B | {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 384, "vocab_size": 256}
    values |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    plan, shape = plan_of(DEEP(boundary=1), values)
    each = [layer_activation_bytes(shape, "bfloat16", trained=trained, compiled=True) for trained in (True, False)]
    beside_layers = 3 * 128 * 2  # the states that enter the head
    measured = saved_bytes(values, plan, torch.bfloat16, compiled=True)
    assert 256 * (sum(each) + beside_layers) == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize(
    ("plan_config", "rows", "measured_gib"),
    [
        (FullPlanConfig(), 8, 48.5),
        (FullPlanConfig(), 4, 29.1),
        (DEEP(boundary=14), 8, 39.3),
        (SHALLOW(boundary=14), 8, 24.4),
    ],
)
def test_a_steps_memory_on_an_h200(plan_config: Any, rows: int, measured_gib: float) -> None:
    """Peaks that PyTorch's allocator counted of a Qwen3-0.6B, compiled, one text a row (benchmarks/results/training_gpu.md).

    Predicted is more by the gradients, which are not there yet when the loss is.
    """
    plan, shape = plan_of(plan_config, QWEN3_0P6B)
    config = TrainConfig(
        global_batch_size=rows, micro_batch_size=rows, use_gpu=True, compute_dtype="bfloat16", compile=True
    )
    placement = Placement("replicate", "replicate", CAUSAL)
    found = estimate_memory(plan, shape, config, placement, seq_len=4096, world_size=1, device_type="cuda")
    assert 1 <= (found.total - found.baseline) / 2**30 / measured_gib <= 1.05


@pytest.mark.parametrize("attention", ["sdpa", "eager", "blocks", OWN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_attention_keeps_grows_with_the_square_of_a_row(attention: str, dtype: torch.dtype) -> None:
    """Saved tensors of two layers, one of them frozen, at two lengths of rows: what is not in proportion to the tokens."""
    values = QWEN3_0P6B | {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 384, "vocab_size": 256}
    values |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 1024}
    plan, _ = plan_of(DEEP(boundary=1), values)
    if attention == OWN:
        values |= {"model_type": "gemma2", "query_pre_attn_scalar": 32}
    options = {"attention": "eager" if attention == OWN else attention, "num_documents": 2}
    once, twice = (saved_bytes(values, plan, dtype, seq_len=length, **options) for length in (256, 512))

    def predict(seq_len: int) -> float:
        name = str(dtype).removeprefix("torch.")
        each = count_square_bytes(attention, name, compiled=False, num_heads=4, seq_len=seq_len)
        return 2 * 2 * seq_len * each

    assert predict(512) - 2 * predict(256) == pytest.approx(twice - 2 * once, rel=0.06)
    assert count_square_bytes("varlen", "bfloat16", compiled=True, num_heads=4, seq_len=512) == 0


def test_a_run_counts_what_its_attention_keeps() -> None:
    """Two layers of three lie on the path: what `eager` adds is theirs, and less of it where they are recomputed."""
    values = QWEN3_0P6B | {"num_hidden_layers": 3}
    plan, shape = plan_of(SHALLOW(boundary=1), values)
    config = TrainConfig(compute_dtype="bfloat16", micro_batch_size=2)
    place = {"seq_len": 512, "world_size": 1, "device_type": "cpu"}

    def predict(attention: str, *recomputed: int) -> float:
        placement = Placement("replicate", "replicate", attention, recomputed)
        return estimate_memory(plan, shape, config, placement, **place).activations

    def more(attention: str) -> float:
        """Than a kernel without a mask, of one layer."""
        return predict(attention, 1, 2) - predict("causal", 1, 2)

    square, repeated_keys = 2 * 16 * 512 * 512, 2 * 512 * 2 * 8 * 128 * 2
    assert predict("eager") - predict("causal") == 2 * more("eager"), "one layer is recomputed at a time"
    assert more("eager") == pytest.approx(6 * square + repeated_keys, rel=0.05)
    assert more("sdpa") == 2 * 512 * 512 * 2 + repeated_keys, "a mask for all heads"
    assert more("blocks") == pytest.approx(6 * square * (1 + 128 / 512) / 2, rel=1e-6)


def test_communication_counts_rings_and_only_what_trains() -> None:
    plan, shape = plan_of(SHALLOW(boundary=14), QWEN3_0P6B)
    trained = 14 * shape.layer_params(0)
    config = TrainConfig(global_batch_size=64, micro_batch_size=8, num_workers=8, use_gpu=True)
    replicated = predict_communication(plan, shape, config, Placement("replicate", "replicate"), world_size=8)
    assert replicated.gathered == 0 and replicated.reduced == pytest.approx(2 * 7 / 8 * 4 * trained), "in float32"
    sharded = predict_communication(plan, shape, config, Placement("shard", "replicate"), world_size=8)
    assert sharded.gathered == pytest.approx(7 / 8 * 2 * 2 * trained)
    assert sharded.reduced == pytest.approx(7 / 8 * 4 * trained)
    everything = predict_communication(plan, shape, config, Placement("shard", "shard"), world_size=8)
    frozen = shape.total_params - trained  # below the trained layers: gathered for forward only
    assert everything.gathered == pytest.approx(7 / 8 * 2 * (2 * trained + frozen))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_keep_what_they_are_given_once_for_each_that_is_active(dtype: torch.dtype) -> None:
    values = QWEN3_0P6B | {"num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 384, "vocab_size": 256}
    values |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "model_type": "qwen3_moe"}
    values |= {"num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 96}
    name = str(dtype).removeprefix("torch.")
    for config in (FullPlanConfig(), DEEP(boundary=1)):
        plan, shape = plan_of(config, values)
        trained = set(plan.trainable_layers)
        predicted = sum(layer_activation_bytes(shape, name, trained=layer in trained) for layer in gradient_path(plan))
        assert 256 * predicted == pytest.approx(saved_bytes(values, plan, dtype), rel=0.06)


def test_a_worker_reads_what_it_keeps_and_the_driver_exports_a_layer_at_a_time() -> None:
    """Qwen3-8B's sizes over 64 workers, half trained: bytes worked out from its parameters by hand."""
    shape = ModelShape.from_hf_config(QWEN3_8B)
    layer, ends = 192_946_432, 2 * 151_936 * 4096 + 4096
    identity = ModelIdentity(name="8b", model_type="qwen3", num_layers=36)
    plan = make_plan(FreezeDeepPlanConfig(boundary=18, train_embeddings=False), model=identity, shape=shape)
    config = TrainConfig(max_steps=1, num_workers=64, global_batch_size=64, compute_dtype="bfloat16")
    run = {"world_size": 64, "device_type": "cuda"}
    host = estimate_host_memory(plan, shape, config, Placement("shard", "shard"), **run)
    assert host.shard == (18 * layer * 4 + (18 * layer + ends) * 2) / 64
    assert host.loading == PROCESS_BYTES + READING_BYTES
    assert host.export == PROCESS_BYTES + READING_BYTES + 4 * (ends + layer)
    whole = estimate_host_memory(
        plan, shape, config, Placement("replicate", "replicate"), **run | {"device_type": "cpu"}
    )
    assert whole.shard == 18 * layer * 6 + (18 * layer + ends) * 2
    assert whole.loading == PROCESS_BYTES + READING_BYTES + whole.shard + 18 * layer * 8
