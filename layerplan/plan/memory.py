"""Predicted memory of a worker, and the placement that fits: pure functions over plan, shape and config.

Activation bytes were measured on transformers' Qwen3 layer with saved-tensor hooks: per token and layer, so many bytes
for every element of the residual stream, of the queries, of keys and values, and of the feed-forward layer. A trained
layer also keeps the inputs of its matrices; a frozen one on the gradient path does not. A compiled layer keeps a third less,
since norms and activations are computed again; on an H100 its bytes are within 1.5 % of these (docs/log.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from layerplan.config.train import TrainConfig
from layerplan.plan.attention import CAUSAL, count_square_bytes, find_saved
from layerplan.plan.cost import GIB, count_trainable_params, trains_head
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.placement import Placement, choose_layers, gradient_path

HEADROOM = 0.9
"""Share of the free memory a prediction may fill."""
CPU_CHUNK_ROWS = 256
CUDA_CHUNK_LOGITS = 640 * 2**20
BASELINE_BYTES = {"cuda": 1.5 * GIB, "cpu": 0.5 * GIB}
"""Libraries, contexts, workspaces."""

# bytes per token for each element of (residual, queries, keys and values, feed-forward), by (dtype, trained)
_ACTIVATION = {
    ("bfloat16", True): (16.0, 10.25, 5.0, 8.0),
    ("bfloat16", False): (8.0, 8.25, 4.0, 6.0),
    ("float32", True): (24.0, 16.25, 8.0, 16.0),
    ("float32", False): (8.0, 12.25, 6.0, 12.0),
}
_COMPILED_ACTIVATION = {
    ("bfloat16", True): (8.0, 6.25, 3.0625, 6.0),
    ("bfloat16", False): (4.0, 6.25, 3.0625, 4.0),
    ("float32", True): (16.0, 12.25, 6.0625, 12.0),
    ("float32", False): (8.0, 12.25, 6.0625, 8.0),
}
# bytes of a gradient on its way into shards, beside the one that backward gives: in float32, and gloo sums in two more copies
_REDUCED = {"cuda": 4, "cpu": 12}
_WIDTH = {"bfloat16": 2, "float32": 4}
SCAN_FLOPS = 48
"""Per element of a hidden state: whatever mixes states by more is a scan, whose products a compiler keeps."""
# hidden states kept per expert that a token is sent to, of a trained layer and of a frozen one
_COPIES = {True: 2, False: 1}


@dataclass(frozen=True)
class MemoryEstimate:
    """Predicted bytes on one worker."""

    parameters: float
    """Weights, masters, gradients, moments."""
    activations: float
    """Stored for backward, at the peak of one micro-batch."""
    loss: float
    """Logits held at once, and hidden states."""
    baseline: float
    """What is there before the model."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.parameters + self.activations + self.loss + self.baseline


def choose_chunk_rows(device_type: str, vocab_size: int, *, rows_of_sum: int = 0) -> int:
    """Positions whose logits the loss holds at once.

    On a CPU a matrix product of so many rows is as fast as any larger one, and their logits are the largest tensor of
    a small model; a GPU needs larger products. Adding up the head's gradient over chunks is dear on a CPU: as many rows
    as take the memory of that sum (`count_rows_of_sum`) make one chunk.
    """
    return max(1, CUDA_CHUNK_LOGITS // vocab_size) if device_type == "cuda" else max(CPU_CHUNK_ROWS, rows_of_sum)


def count_rows_of_sum(hidden_size: int, dtype_bytes: int, *, trains_head: bool, fused: bool) -> int:
    """Positions whose logits, of so many bytes each, take no more than a float32 sum of the head's gradient.

    0 where there is no such sum, since float32 gradients add up where they are, or where a chunk is held more than once.
    """
    return 4 * hidden_size // dtype_bytes if trains_head and fused and dtype_bytes < 4 else 0


def layer_activation_bytes(
    shape: ModelShape,
    dtype: str,
    *,
    trained: bool,
    layer: int = 0,
    compiled: bool = False,
    attention: str = CAUSAL,
    seq_len: int = 0,
    device_type: str = "cuda",
) -> float:
    """Bytes per token that a layer on the gradient path stores.

    As the layer was measured, less what compiling saves of a layer of its widths; by its widths where it was not: one with
    experts then keeps what they were given and what they gave back, once for each that a token is sent to.

    Args:
        shape: Sizes of the model.
        dtype: `float32` or `bfloat16`.
        trained: Whether the layer trains.
        layer: Its place.
        compiled: Whether layers are compiled.
        attention: As `expect_attention` names it.
        seq_len: Tokens per row; 0 leaves out what grows with the square of a row.
        device_type: `cuda` or `cpu`.
    """
    sizes = shape.layers[layer]
    by_widths = _count_by_widths(shape, dtype, trained=trained, layer=layer, compiled=compiled)
    saved = find_saved(sizes, dtype, attention, compiled=compiled, seq_len=seq_len, device_type=device_type)
    if saved is None:
        if not sizes.attention_width:
            return by_widths
        heads = shape.num_attention_heads
        return by_widths + count_square_bytes(attention, dtype, compiled=compiled, num_heads=heads, seq_len=seq_len)
    per_token = saved.trained if trained else saved.frozen
    if compiled:
        uncompiled = _count_by_widths(shape, dtype, trained=trained, layer=layer, compiled=False)
        per_token = _compile(
            per_token, by_widths, uncompiled, has_scan=sizes.scan_flops > SCAN_FLOPS * shape.hidden_size
        )
    return per_token + saved.per_pair * seq_len


def _compile(measured: float, compiled: float, uncompiled: float, *, has_scan: bool) -> float:
    """What is left of measured bytes: the share that is left of a layer of such widths; of a scan's products all is kept."""
    share = measured * compiled / uncompiled
    return max(share, measured - (uncompiled - compiled)) if has_scan else share


def _count_by_widths(shape: ModelShape, dtype: str, *, trained: bool, layer: int, compiled: bool) -> float:
    per_element = _COMPILED_ACTIVATION if compiled else _ACTIVATION
    residual, queries, keys_values, feed_forward = per_element[dtype, trained]
    sizes = shape.layers[layer]
    has_both = sizes.kind in ("decoder", "recurrent_decoder")
    routed = _COPIES[trained] * sizes.routed_copies + (1 if trained and sizes.routed_copies else 0)
    return (
        routed * _WIDTH[dtype] * shape.hidden_size
        + (residual if has_both else residual / 2) * shape.hidden_size
        + queries * sizes.query_width
        + keys_values * sizes.key_value_width
        + feed_forward * sizes.feed_forward_width
    )


def estimate_memory(
    plan: FreezePlan,
    shape: ModelShape,
    config: TrainConfig,
    placement: Placement,
    *,
    seq_len: int,
    world_size: int,
    device_type: str,
    adapter_params: int = 0,
    adds_up: bool = False,
) -> MemoryEstimate:
    """Predicts one worker's memory under a placement.

    Args:
        plan: What trains.
        shape: Sizes of the model.
        config: Training section.
        placement: Where parameters live, and which layers are recomputed.
        seq_len: Tokens per row.
        world_size: Workers.
        device_type: `cuda` or `cpu`.
        adapter_params: Parameters of adapters that train in place of the plan's layers, which are then all frozen; what
            the layers store for backward stays, as adapters need the same inputs.
        adds_up: Whether a step is several micro-batches even where its rows would be one.
    """
    width = _WIDTH[config.compute_dtype]
    trained = adapter_params or count_trainable_params(plan, shape)
    reduced = 0 if adapter_params or placement.parallelism == "replicate" else _largest_trained_unit(plan, shape)
    frozen = shape.total_params - (0 if adapter_params else trained)
    adds_up = adds_up or _adds_up(config, world_size)
    tokens = config.micro_rows * seq_len
    checkpointed = set(placement.checkpointed_layers)
    whole = _path_bytes(plan, shape, config, placement.attention, seq_len, device_type)
    kept = {layer: float(width * shape.hidden_size) if layer in checkpointed else whole[layer] for layer in whole}
    stored = tokens * (sum(kept.values()) + max((whole[layer] for layer in checkpointed), default=0.0))
    loss = _chunk_bytes(plan, shape, config, tokens, device_type) + 3 * tokens * shape.hidden_size * width
    return MemoryEstimate(
        parameters=_parameter_bytes(trained, frozen, width, shape, config, placement, world_size, device_type, adds_up)
        + reduced * (width + _REDUCED[device_type]),
        activations=stored,
        loss=loss,
        baseline=BASELINE_BYTES.get(device_type, 0.0),
    )


def _chunk_bytes(plan: FreezePlan, shape: ModelShape, config: TrainConfig, tokens: int, device_type: str) -> float:
    """Bytes of the logits held at once, and of the sum of the head's gradient over chunks of them."""
    width, trains = _WIDTH[config.compute_dtype], trains_head(plan)
    summed = count_rows_of_sum(shape.hidden_size, width, trains_head=trains, fused=config.compiles)
    rows = min(choose_chunk_rows(device_type, shape.vocab_size, rows_of_sum=summed), tokens)
    if device_type == "cpu" and summed:  # the compiler reads logits and writes their gradients in one place
        return rows * shape.vocab_size * width + shape.head_matrix_params * (4 if rows < tokens else width)
    per_logit = width if device_type == "cuda" else width + 8  # turned into gradients in place, or in float32 besides
    return rows * shape.vocab_size * per_logit + (shape.head_matrix_params * 4 if trains else 0)


def estimate_inference_memory(num_params: int, dtype: str, *, num_logits: int, cache_bytes: float = 0.0) -> float:
    """Predicts the bytes of a process that runs a model on a CPU, trains nothing and keeps no activations.

    Args:
        num_params: Of the model.
        dtype: `float32`, `bfloat16` or `auto`, which is float32.
        num_logits: Held at once, as the model gives them and once more in float32.
        cache_bytes: Of keys and values.
    """
    width = _WIDTH["float32" if dtype == "auto" else dtype]
    return num_params * width + num_logits * (width + 4) + cache_bytes + BASELINE_BYTES["cpu"]


def choose_placement(
    plan: FreezePlan,
    shape: ModelShape,
    config: TrainConfig,
    *,
    seq_len: int,
    world_size: int,
    device_type: str,
    available_bytes: float,
    attention: str = "sdpa",
    adapter_params: int = 0,
    adds_up: bool = False,
) -> tuple[Placement, MemoryEstimate]:
    """Settles every `auto`: the placement that communicates and recomputes least and still fits.

    Adapters are trained whole on every worker: with any, `auto` never shards. Arguments as for `estimate_memory`, and the
    attention, as `expect_attention` names it.

    Returns:
        The placement and its estimate. When nothing fits, the leanest one: the caller compares and refuses.
    """
    parallelisms = ["replicate", "shard"] if config.parallelism == "auto" else [config.parallelism]
    if config.parallelism == "auto" and (world_size == 1 or adapter_params):
        parallelisms = ["replicate"]
    frozen = ["replicate", "shard"] if config.frozen_sharding == "auto" else [config.frozen_sharding]
    limit = HEADROOM * available_bytes
    best: tuple[Placement, MemoryEstimate] | None = None
    for parallelism in parallelisms:
        for frozen_sharding in frozen if parallelism == "shard" else frozen[:1]:
            bare = Placement(parallelism, frozen_sharding, attention)

            def estimate(placement: Placement) -> MemoryEstimate:
                limits = {"seq_len": seq_len, "world_size": world_size, "adapter_params": adapter_params}
                return estimate_memory(
                    plan, shape, config, placement, device_type=device_type, adds_up=adds_up, **limits
                )

            excess = estimate(bare).total - limit
            if excess > 0 and parallelism == "shard" and (adds_up or _adds_up(config, world_size)):
                bare = replace(bare, reduces_each=True)
                excess = estimate(bare).total - limit
            mode = config.activation_checkpointing
            tokens = config.micro_rows * seq_len
            # a recomputed layer still keeps its input
            kept = _WIDTH[config.compute_dtype] * shape.hidden_size
            whole = _path_bytes(plan, shape, config, attention, seq_len, device_type)
            layers = choose_layers(
                plan,
                mode if mode != "auto" or excess > 0 else "none",
                bytes_to_save=excess + tokens * max(whole.values(), default=0.0),
                layer_bytes={layer: tokens * (stored - kept) for layer, stored in whole.items()},
            )
            placement = replace(bare, checkpointed_layers=layers)
            best = placement, estimate(placement)
            if best[1].total <= limit:
                return best
    if best is None:
        raise AssertionError("at least one placement is tried")
    return best


def choose_placements(plan: FreezePlan, shape: ModelShape, config: TrainConfig, **limits: Any) -> PhasePlacements:
    """Settles the placement of every phase; arguments as for `choose_placement`.

    Returns:
        The phase that needs most memory, with what every worker holds of phases not at hand.
    """
    phases = plan.list_distinct_phases()
    choices = [(start, *choose_placement(phase, shape, config, **limits)) for start, phase in phases]
    start, placement, estimate = max(choices, key=lambda choice: choice[2].total)
    everything = count_trainable_params(plan, shape)
    parked = max(everything - count_trainable_params(phase, shape) for _, phase in phases)
    return PhasePlacements(start, placement, estimate, parked * (12 if plan.optimizer_state == "keep" else 4))


@dataclass(frozen=True)
class PhasePlacements:
    """The phase of a plan that needs most memory; of a plan that does not change, the plan."""

    start_step: int
    placement: Placement
    estimate: MemoryEstimate
    parked_bytes: int
    """CPU memory of every worker for what trains in other phases: float32 weights, and moments where they are kept."""


def explain_shortage(estimate: MemoryEstimate, available_bytes: float, config: TrainConfig) -> str:
    """Predicted beside available bytes, and the settings that would help."""
    return (
        f"Predicted {estimate.total:,.0f} bytes ({estimate.total / GIB:.2f} GiB: parameters"
        f" {estimate.parameters / GIB:.2f}, activations {estimate.activations / GIB:.2f}, loss"
        f" {estimate.loss / GIB:.2f}, baseline {estimate.baseline / GIB:.2f}), available {available_bytes:,.0f} bytes"
        f" ({available_bytes / GIB:.2f} GiB) per worker. What helps: train.micro_batch_size below"
        f" {config.micro_rows}, train.activation_checkpointing=full, or train.parallelism=shard with"
        f" train.frozen_sharding=shard over more than num_workers={config.num_workers}"
    )


def _path_bytes(
    plan: FreezePlan, shape: ModelShape, config: TrainConfig, attention: str, seq_len: int, device_type: str
) -> dict[int, float]:
    """Bytes per token that each layer on the gradient path stores when it is not recomputed."""
    trained = set(plan.trainable_layers)
    return {
        layer: layer_activation_bytes(
            shape,
            config.compute_dtype,
            trained=layer in trained,
            layer=layer,
            compiled=config.compiles,
            attention=attention,
            seq_len=seq_len,
            device_type=device_type,
        )
        for layer in gradient_path(plan)
    }


def _adds_up(config: TrainConfig, world_size: int) -> bool:
    """Whether a worker's rows of a step are several micro-batches."""
    return config.global_batch_size > world_size * config.micro_rows


def _largest_trained_unit(plan: FreezePlan, shape: ModelShape) -> int:
    """Parameters of the largest FSDP unit that has gradients: a decoder layer, or the root with its embeddings and head."""
    root = _count_root(shape) if plan.train_embeddings or trains_head(plan) else 0
    return max([root, *map(shape.layer_params, plan.trainable_layers)])


def _count_root(shape: ModelShape) -> int:
    """Parameters of the FSDP unit that is no decoder layer."""
    return shape.embedding_params + shape.head_params + shape.other_params


def _parameter_bytes(
    trained: int,
    frozen: int,
    width: int,
    shape: ModelShape,
    config: TrainConfig,
    placement: Placement,
    world_size: int,
    device_type: str,
    adds_up: bool,
) -> float:
    moments = 8 if config.optimizer.type == "adamw" else 0.1
    if placement.parallelism == "replicate":
        gradient = 4 if width == 4 or adds_up else width
        master = 4 if width != 4 else 0
        return trained * (width + gradient + master + moments) + frozen * width
    shards = world_size // config.num_replicas
    frozen_shards = shards if placement.frozen_sharding == "shard" else 1
    # two layers and the root are gathered at a time
    root = _count_root(shape)
    # gloo gathers into a copy of its own, and FSDP takes the pieces out of another
    copies = 2 * max(root, shape.largest_layer_params) if device_type == "cpu" else 0
    gathered = width * (2 * shape.largest_layer_params + root + copies)
    # until a step's last micro-batch FSDP holds gradients that add up whole, in float32
    gradients = 4 * trained if adds_up and not placement.reduces_each else 4 * trained / shards
    return trained * (4 + moments) / shards + gradients + frozen * width / frozen_shards + gathered
