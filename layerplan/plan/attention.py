"""Which attention a run is expected to take, and what it keeps for backward that grows with the square of a row.

A measured layer tells what it keeps under each kind of attention. For others, and for what compiling changes, there are
numbers of transformers' Qwen3 layer, by saved-tensor hooks. Kernels that read documents alone, or whole rows under the causal
rule, keep no square; under a mask PyTorch's attention keeps a copy of it for every layer.
"""

from __future__ import annotations

from layerplan.config.train import TrainConfig
from layerplan.plan.loss_recipe import LossRecipe
from layerplan.plan.model_shape import AttentionKind, LayerShape, SavedBytes

CAUSAL = "causal"
"""PyTorch's attention where every row is one text: no mask is made."""
OWN = "own"
"""`eager` of a model that needs its own code, for a step between scores and weights that no other attention takes."""
CPU_EAGER_TOKENS = 1024
"""Longest rows for which the compiled plain attention is chosen on a CPU."""
BLOCK_TOKENS = 128
"""Queries of a block of `blocks`: fewer waste the matrix products, more compute what nobody sees."""

# bytes for each pair of a query and a key of one head, by (dtype, compiled): softmax in float32, and in the dtype
_SCORE_BYTES = {("bfloat16", False): 6, ("bfloat16", True): 4, ("float32", False): 4, ("float32", True): 4}
# Gemma 2's, which caps its scores
_OWN_SCORE_BYTES = {("bfloat16", False): 8, ("bfloat16", True): 4.25, ("float32", False): 8, ("float32", True): 8}
_MASK_BYTES = {"bfloat16": 2, "float32": 4}


def expect_attention(config: TrainConfig, *, seq_len: int, device_type: str, recipe: LossRecipe | None = None) -> str:
    """The attention as far as it is known before a model is asked what it can do, as `name_kept` names it.

    Args:
        config: Training section; `compile: auto` that is not settled counts as off.
        seq_len: Tokens per row.
        device_type: `cuda` or `cpu`.
        recipe: How the loss is computed; None while that is not known.
    """
    if recipe is not None and recipe.attention == "eager":
        return OWN
    if config.attention != "auto":
        return name_kept(config.attention, recipe)
    plain = name_kept("sdpa", recipe)
    if device_type == "cuda":
        return "varlen" if plain != CAUSAL and config.compute_dtype != "float32" else plain
    if not config.compiles or seq_len > CPU_EAGER_TOKENS:
        return plain
    return "eager" if config.compute_dtype == "float32" else "blocks"


def name_kept(attention: str, recipe: LossRecipe | None) -> str:
    """The name by what is kept: `CAUSAL` for `sdpa` over rows of one text each, `OWN` for `eager` that a model needs."""
    if attention == "eager" and recipe is not None and recipe.attention == "eager":
        return OWN
    is_whole = recipe is not None and recipe.rows in ("alone", "whole")
    return CAUSAL if attention == "sdpa" and is_whole else attention


def count_square_bytes(attention: str, dtype: str, *, compiled: bool, num_heads: int, seq_len: int) -> float:
    """Bytes per token that a layer which attends keeps beside what `layer_activation_bytes` counts."""
    if not seq_len:
        return 0.0
    pairs = num_heads * seq_len * (_OWN_SCORE_BYTES if attention == OWN else _SCORE_BYTES)[dtype, compiled]
    if attention in ("eager", OWN):
        return pairs
    if attention == "blocks":
        return pairs * min(1.0, (1 + BLOCK_TOKENS / seq_len) / 2)
    return _MASK_BYTES[dtype] * seq_len if attention == "sdpa" else 0


def find_saved(
    layer: LayerShape, dtype: str, attention: str, *, compiled: bool, seq_len: int, device_type: str
) -> SavedBytes | None:
    """What a layer was measured to keep under an attention; of the squares, what a compiler leaves. None if it was not measured.

    Args:
        layer: Sizes of it.
        dtype: It computes in.
        attention: As `expect_attention` names it.
        compiled: Whether layers are compiled.
        seq_len: Tokens per row.
        device_type: `cuda` or `cpu`, whose kernel refuses dropout, and values of another width than keys.
    """
    kinds = layer.saved_bytes.get(dtype)
    if kinds is None:
        return None
    kernel = kinds["kernel"]
    if attention == "blocks":
        whole = kinds.get("eager", kernel)
        share = min(1.0, (1 + BLOCK_TOKENS / seq_len) / 2) if seq_len else 1.0
        found = kernel.model_copy(update={"per_pair": whole.per_pair * share})
    else:
        names = _list_kinds(layer, attention, seq_len=seq_len, device_type=device_type)
        found = next((kinds[name] for name in names if name in kinds), kernel)
    if not compiled or attention not in ("eager", "blocks", OWN):
        return found
    scores = _OWN_SCORE_BYTES if attention == OWN else _SCORE_BYTES
    return found.model_copy(update={"per_pair": found.per_pair * scores[dtype, True] / scores[dtype, False]})


def _list_kinds(layer: LayerShape, attention: str, *, seq_len: int, device_type: str) -> list[AttentionKind]:
    """The kinds that an attention may be, the first that the layer knows being the one."""
    if attention in ("eager", OWN):
        return ["eager"]
    # a window that ends inside the row takes a mask
    if attention == "sdpa" or (attention == CAUSAL and layer.window is not None and layer.window < seq_len):
        return ["cpu_masked", "masked"] if device_type == "cpu" else ["masked"]
    if attention == CAUSAL:
        return ["cpu", "causal"] if device_type == "cpu" else ["causal"]
    return ["kernel"]
