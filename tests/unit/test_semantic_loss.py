"""SALF's losses against the paper's formulas, written out over `torch.linalg.pinv` and differentiated by autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from layerplan.models.semantic_bases import SemanticBases
from layerplan.plan.memory import choose_chunk_rows
from layerplan.train.loss import IGNORED
from layerplan.train.semantic_loss import compute_cosine_loss_sum, compute_similarity_loss_sum
from tests.allocations import count_peak_bytes


def algorithm_1(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Logits are the cosines with every basis, all at once."""
    logits = F.cosine_similarity(hidden[:, None], torch.linalg.pinv(weight).T[None], dim=-1)
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")


def algorithm_2(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """One minus the cosine with the label's own basis."""
    asked = labels != IGNORED
    return (1 - F.cosine_similarity(hidden[asked], torch.linalg.pinv(weight).T[labels[asked]], dim=-1)).sum()


@pytest.mark.parametrize(
    ("ours", "paper"), [(compute_similarity_loss_sum, algorithm_1), (compute_cosine_loss_sum, algorithm_2)]
)
@pytest.mark.parametrize("num_labels", [300, 24])
def test_value_and_gradient_are_those_of_the_papers_algorithm(
    ours: Callable[..., Tensor], paper: Callable[..., Tensor], num_labels: int
) -> None:
    """The oracle is in float64, ours in float32."""
    generator = torch.Generator().manual_seed(num_labels)
    weight = torch.randn(num_labels, 16, generator=generator, dtype=torch.float64)
    labels = torch.randint(num_labels, (9,), generator=generator)
    labels[3] = IGNORED
    hidden = torch.randn(9, 16, generator=generator, dtype=torch.float64)
    asked, given = hidden.clone().requires_grad_(), hidden.float().requires_grad_()
    expected = paper(asked, weight, labels)
    expected.backward()
    found = ours(given, SemanticBases(weight).get_units(), labels)
    (0.5 * found).backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert asked.grad is not None and given.grad is not None
    assert torch.allclose(given.grad, 0.5 * asked.grad.float(), atol=2e-7)
    assert not given.grad[3].any(), "a position without a label pulls at nothing"


def test_neither_all_logits_nor_a_square_of_the_vocabulary_are_ever_held() -> None:
    """Of 6,000 labels and 4,096 positions all logits would be 98 MB and a V x V matrix 144 MB; a chunk is what is held."""
    weight, hidden = torch.randn(6000, 8), torch.randn(4096, 8, requires_grad=True)
    labels = torch.randint(6000, (4096,))
    units = SemanticBases(weight).get_units()
    chunk = 4 * 6000 * choose_chunk_rows("cpu", 6000)
    assert chunk < 4 * 6000 * 4096 / 4
    assert count_peak_bytes(lambda: SemanticBases(weight).get_units()) < 3 * 8 * weight.numel() + 2**20
    peak = count_peak_bytes(lambda: compute_similarity_loss_sum(hidden, units, labels).backward())
    assert peak < 2 * chunk + 6 * 4 * hidden.numel() + 2**20
