"""Attention in blocks against PyTorch's own under the same mask, and in the models of eight families."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from layerplan.config.train import TrainConfig
from layerplan.errors import TrainingError
from layerplan.models.ref import ModelRef
from layerplan.plan.attention import count_square_bytes
from layerplan.plan.loss_recipe import LossRecipe
from layerplan.plan.model_shape import ModelShape
from layerplan.train import block_attention
from layerplan.train.attention import choose_attention
from layerplan.train.block_attention import BLOCKS, attend_blocks
from layerplan.train.document_attention import UnservedAttentionError
from layerplan.train.loss_proof import find_blocks_fault
from tests.documents_alone import check_packed
from tests.families import make_model
from tests.qwen3 import TINY_QWEN3
from tests.small_families import WINDOWED, build_family

LENGTHS = [[200, 70, 30], [300], [1, 2, 297]]
TOKENS = 300


def make_seen(window: int | None) -> Tensor:
    """What a query may see, spelled out: its own document, no later token, no further back than the window."""
    documents = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in LENGTHS])
    distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)[None, :]
    seen = (documents[:, :, None] == documents[:, None, :]) & (distance >= 0)
    return (seen if window is None else seen & (distance < window))[:, None]


def draw(dtype: torch.dtype, num_heads: int = 4) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(3, count, TOKENS, 16).to(dtype).requires_grad_() for count in (num_heads, 2, 2)]


def add_up(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_blocks_give_what_a_mask_gives_forward_and_backward(
    window: int | None, dtype: torch.dtype, bound: float
) -> None:
    """Three blocks, the last of 44 queries; against float32 products under the mask."""
    inputs, seen = draw(dtype), make_seen(window)
    weight = torch.randn(3, 4, TOKENS, 16)
    wanted = scaled_dot_product_attention(
        *(each.float() for each in inputs), attn_mask=seen, scale=0.3, enable_gqa=True
    )
    expected = torch.autograd.grad((wanted * weight).sum(), inputs)
    found, _ = attend_blocks(nn.Module(), *inputs, add_up(seen, dtype), scaling=0.3)
    grads = torch.autograd.grad((found.transpose(1, 2).float() * weight).sum(), inputs)
    for ours, theirs in [(found.transpose(1, 2), wanted), *zip(grads, expected)]:
        assert (ours.float() - theirs.float()).norm() <= bound * theirs.float().norm()


def test_compiled_it_gives_the_same_and_keeps_what_is_predicted() -> None:
    """Laid out by token, as layers hand them over; kept are the weights of pairs that blocks see, and no keys anew."""
    inputs = [
        each.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for each in draw(torch.float32)
    ]
    mask = add_up(make_seen(None), torch.float32)
    expected = torch.autograd.grad(attend_blocks(nn.Module(), *inputs, mask)[0].square().sum(), inputs)
    compiled = torch.compile(attend_blocks, dynamic=False)
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = compiled(nn.Module(), *inputs, mask)[0]
    found = torch.autograd.grad(output.square().sum(), inputs)
    predicted = 3 * TOKENS * count_square_bytes("blocks", "float32", compiled=True, num_heads=4, seq_len=TOKENS)
    beside = sum(each.untyped_storage().nbytes() for each in kept.values()) - predicted
    given = sum(each.untyped_storage().nbytes() for each in inputs)
    assert -0.03 * predicted < beside < given, "beside them less than the inputs once more"
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("asked", [{"is_causal": False}, {"position_bias": torch.randn(1, 4, TOKENS, TOKENS)}])
def test_what_a_layer_asks_beyond_a_mask_is_left_to_pytorch(asked: dict[str, object]) -> None:
    """A mask that shows later tokens, and a bias beside the mask: no block may be left out, nothing ignored."""
    inputs = draw(torch.float32)
    seen = torch.ones(3, 1, TOKENS, TOKENS, dtype=torch.bool)
    bias = asked.get("position_bias", torch.zeros(1, 1, 1, 1))
    assert isinstance(bias, Tensor)
    module = nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    found, _ = attend_blocks(module, *inputs, add_up(seen, torch.float32), scaling=0.25, **asked)
    wanted = scaled_dot_product_attention(*inputs, attn_mask=bias, scale=0.25, enable_gqa=True)
    torch.testing.assert_close(found.transpose(1, 2), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", [*WINDOWED, "qwen3"])
def test_a_packed_row_gives_what_its_documents_give_alone(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and every gradient in blocks of 16, against the model's own logits of one document at a time."""
    monkeypatch.setattr(block_attention, "BLOCK_TOKENS", 16)
    model = build_family(family, **({"attn_logit_softcapping": None} if family == "gemma2" else {}))
    check_packed(model, BLOCKS, [20, 30, 14])


def test_the_skeleton_says_whether_its_layers_ask_for_more_than_a_mask(tmp_path: Path) -> None:
    """DeepSeek V3.2 hands its attention the keys that it chose, by the name of the implementation; no weight is read."""
    folder = tmp_path / "deepseek"
    make_model("deepseek_v32").save_pretrained(folder)
    skeleton = ModelRef(str(folder)).skeleton().model
    before = skeleton.config._attn_implementation
    assert find_blocks_fault(skeleton, LossRecipe()) == "DeepseekV32Attention asks for indices"
    assert skeleton.config._attn_implementation == before
    assert next(skeleton.parameters()).is_meta
    assert find_blocks_fault(build_family("qwen3"), LossRecipe()) is None
    with pytest.raises(UnservedAttentionError, match="asks for indices"):
        attend_blocks(nn.Module(), *draw(torch.float32), None, indices=torch.zeros(1))


def test_a_model_that_asks_for_more_gets_its_own_attention_or_an_error_where_blocks_were_wanted() -> None:
    shape = ModelShape.from_hf_config(TINY_QWEN3 | {"model_type": "qwen3"})
    config = TrainConfig(max_steps=1, global_batch_size=1, compute_dtype="bfloat16", compile=True)
    asked = {"recipe": LossRecipe(), "find_blocks_fault": lambda: "Some asks for indices"}
    assert choose_attention(config, shape, 64, torch.device("cpu"), **asked) == "eager"
    with pytest.raises(TrainingError, match=r"train.attention=blocks: Some asks for indices; train.attention=auto"):
        choose_attention(config.model_copy(update={"attention": "blocks"}), shape, 64, torch.device("cpu"), **asked)


@pytest.mark.parametrize(
    ("dtype", "compile_layers", "seq_len", "recipe", "expected"),
    [
        ("bfloat16", True, 1024, LossRecipe(), "blocks"),
        ("bfloat16", True, 1025, LossRecipe(), "sdpa"),
        ("bfloat16", False, 1024, LossRecipe(), "sdpa"),
        ("float32", True, 1024, LossRecipe(), "eager"),
        ("bfloat16", True, 1024, LossRecipe(attention="eager"), "eager"),
    ],
)
def test_a_cpu_takes_blocks_where_layers_are_compiled_in_bfloat16(
    dtype: str, compile_layers: bool, seq_len: int, recipe: LossRecipe, expected: str
) -> None:
    """Float32 keeps the sums it had; a model that needs its own attention gets it."""
    config = TrainConfig(max_steps=1, global_batch_size=1, compute_dtype=dtype, compile=compile_layers)
    shape = ModelShape.from_hf_config(TINY_QWEN3 | {"model_type": "qwen3"})
    assert choose_attention(config, shape, seq_len, torch.device("cpu"), recipe) == expected
