"""Rival measurements against naive re-computation on small models, and what is made of their numbers."""

from __future__ import annotations

from pathlib import Path

import naive_measurements as naive
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import friedmanchisquare

from layerplan.config.measure import MeasureConfig
from layerplan.config.train import OptimizerConfig
from layerplan.measure.actor import measure_lens, run_states
from layerplan.measure.gradients import compute_fisher, compute_gradient_norms, draw_labels, run_logits
from layerplan.measure.influence import compute_block_influence
from layerplan.measure.pilot import count_pilot_steps, run_pilot
from layerplan.measure.spectrum import (
    collect_kinds,
    compute_snr,
    name_kind,
    rate_layers,
    read_snr,
)
from layerplan.measure.tuned_lens import compute_lens_gains, fit_translator
from layerplan.measure.weights import list_matrices
from layerplan.models.ref import ModelRef
from layerplan.plan.layer_evidence import compute_agreement, find_step, rank_shares, rate_top
from layerplan.tracer.model_runner import LayerRunner
from tests.model_folders import save_tiny_base
from tests.qwen3 import build_tiny_qwen3


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    """Two rows of ten tokens."""
    return torch.randint(0, 40, (2, 10), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base whose weights have a few large directions, as trained ones do."""
    folder = save_tiny_base(tmp_path_factory.mktemp("base") / "tiny")
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for name, weight in tensors.items():
        if weight.ndim == 2 and "layers" in name:
            left = torch.randn(len(weight), 2, generator=generator)
            weight += 0.05 * left @ torch.randn(2, weight.shape[1], generator=generator)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_signal_to_noise_of_every_matrix_is_that_of_the_published_code(folder: Path):
    matrices = list_matrices(ModelRef(str(folder)))
    stored = load_file(folder / "model.safetensors")
    assert len(matrices) == 3 * 7 and {matrix.layer for matrix in matrices} == {0, 1, 2}
    for matrix in matrices:
        wanted = naive.spectrum_snr(stored[matrix.name].numpy())
        assert read_snr(matrix) == pytest.approx(wanted, rel=1e-4)


def test_signal_to_noise_of_a_spectrum_worked_out_by_hand():
    """Of 1..9 the middle half spans 3..7; sigma is 4 / 1.349 and the edge of a square matrix 5.93: 6..9 are signal."""
    assert compute_snr(np.arange(1.0, 10.0), (9, 9)) == pytest.approx(30 / 15 / 9)
    assert compute_snr(np.zeros(4), (4, 4)) == 0.0
    assert compute_snr(np.full(4, 2.0), (4, 4)) == pytest.approx(8 / 1.0 / 2)  # nothing below the edge, which is 0


def test_kinds_of_matrices_are_found_in_any_list():
    assert name_kind("model.layers.11.mlp.up_proj.weight", "model.layers") == (11, "mlp.up_proj")
    assert name_kind("model.layers.2.experts.7.w1.weight", "model.layers") == (2, "experts.*.w1")
    assert name_kind("model.embed_tokens.weight", "model.layers") is None


def test_spectrum_ranks_layers_by_their_mean_rank_among_each_kind(folder: Path):
    matrices = list_matrices(ModelRef(str(folder)))
    kinds = collect_kinds(matrices, [matrix.layer if "mlp" in matrix.kind else 1.0 for matrix in matrices], 3)
    # three of seven kinds rank layers 0, 1, 2 with shares 1/6, 3/6, 5/6; four are all tied at 3/6
    assert rate_layers(kinds) == pytest.approx([(3 / 6 + 2) / 7, 0.5, (15 / 6 + 2) / 7])


def test_gradient_norms_are_those_of_a_naive_loop(ids: torch.Tensor):
    model = build_tiny_qwen3(hidden_size=16, intermediate_size=24, head_dim=8)
    assert compute_gradient_norms(model, ids) == pytest.approx(naive.gradient_norms(model, ids), rel=1e-5)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_the_drawn_fisher_information_averages_to_the_trace_over_all_labels(ids: torch.Tensor):
    model = build_tiny_qwen3(hidden_size=16, intermediate_size=24, head_dim=8, num_hidden_layers=2, vocab_size=12)
    short = ids[:1, :4] % 12
    drawn = np.array([compute_fisher(model, short, seed) for seed in range(200)])
    wanted = np.array(naive.fisher_trace(model, short))
    error = drawn.std(0) / np.sqrt(len(drawn))
    assert (np.abs(drawn.mean(0) - wanted) < 4 * error).all()
    assert (4 * error < wanted / 2).all()  # so twice the trace or half of it would be noticed


def test_the_fisher_information_of_drawn_labels_is_that_of_a_naive_loop(ids: torch.Tensor):
    """The squared norm of the gradient of the summed loss on them, per label."""
    model = build_tiny_qwen3(hidden_size=16, intermediate_size=24, head_dim=8)
    labels = draw_labels(run_logits(model, ids).detach(), 7)
    count = labels.numel()
    wanted = [(count * norm) ** 2 / count for norm in naive.gradient_norms(model, ids, labels)]
    assert compute_fisher(model, ids, 7) == pytest.approx(wanted, rel=1e-5)


def test_block_influence_is_that_of_hooks_around_the_layers(ids: torch.Tensor):
    model = build_tiny_qwen3()
    assert compute_block_influence(run_states(LayerRunner(model), ids)) == pytest.approx(
        naive.block_influence(model, ids), abs=1e-6
    )


def test_the_pilot_saves_what_plain_adamw_saves(ids: torch.Tensor):
    batches = [ids, ids.flip(1), ids.flip(0), ids]
    wanted = naive.saved_losses(build_tiny_qwen3().double(), batches, rate=1e-3)
    found = run_pilot(build_tiny_qwen3(), batches, OptimizerConfig(learning_rate=1e-3))
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


def test_the_first_step_of_the_pilot_saves_the_rate_times_the_sum_of_the_gradients(ids: torch.Tensor):
    """Adam's first step moves every weight against its gradient by the rate, to which the decay adds little."""
    model = build_tiny_qwen3()
    naive.loss_of(model, ids).backward()
    sums = [sum(float(p.grad.abs().sum()) for p in layer.parameters()) for layer in model.model.layers]
    (saved,) = run_pilot(build_tiny_qwen3(), [ids], OptimizerConfig(learning_rate=1e-3, weight_decay=0.0, eps=1e-12))
    assert saved == pytest.approx([1e-3 * total for total in sums], rel=1e-5)


def test_a_pilot_is_five_percent_of_the_steps_and_at_least_four():
    assert [count_pilot_steps(steps, 0.05) for steps in (1, 20, 80, 100, 1000)] == [4, 4, 4, 5, 50]


def test_a_translator_finds_an_affine_map_and_leaves_unseen_directions_alone():
    rng = torch.Generator().manual_seed(0)
    states = torch.randn(200, 6, generator=rng)
    matrix, shift = torch.randn(6, 6, generator=rng), torch.randn(6, generator=rng)
    fitted = fit_translator(states, states @ matrix + shift)
    other = torch.randn(5, 6, generator=rng)
    assert torch.allclose(fitted(other), other @ matrix + shift, atol=0.05)
    flat = torch.zeros(10, 6)
    assert torch.allclose(fit_translator(flat, flat)(other), other, atol=1e-5)


def test_lens_gains_add_up_to_what_the_layers_gain_together():
    rng = torch.Generator().manual_seed(1)
    fitted, asked = torch.randn(4, 60, 5, generator=rng), torch.randn(4, 8, 5, generator=rng)
    head, labels = torch.randn(5, 7, generator=rng), torch.arange(8) % 7
    gains = np.array(compute_lens_gains(fitted, asked, labels, lambda states: states @ head))
    first = torch.nn.functional.cross_entropy(fit_translator(fitted[0], fitted[3])(asked[0]) @ head, labels)
    last = torch.nn.functional.cross_entropy(asked[3] @ head, labels)
    assert gains.shape == (8, 3) and gains.mean(0).sum() == pytest.approx(float(first - last), abs=1e-5)


def test_the_lens_asks_every_row_with_translators_of_other_rows(ids: torch.Tensor):
    runner = LayerRunner(build_tiny_qwen3())
    rows = ids.repeat(2, 1)
    folds = [measure_lens(runner, rows, fold=fold, config=MeasureConfig(lens_positions=64)) for fold in (0, 1)]
    assert [np.array(fold).shape for fold in folds] == [(2, 3), (2, 3)]


def test_lens_gains_are_those_of_a_naive_least_squares_fit():
    """Four different rows; each half is asked with what the other half fits."""
    rows = torch.randint(0, 40, (4, 12), generator=torch.Generator().manual_seed(11))
    model = build_tiny_qwen3()
    for fold in (0, 1):
        found = measure_lens(LayerRunner(model), rows, fold=fold, config=MeasureConfig(lens_positions=64))
        wanted = naive.lens_gains(model, list(rows[1 - fold :: 2]), list(rows[fold::2]))
        for mine, theirs in zip(found, wanted, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-5)


def test_agreement_is_kendalls_w_and_friedmans_statistic():
    rng = np.random.default_rng(0)
    repeats = rng.normal(size=(6, 9)) + np.linspace(0, 2, 9)
    statistic = friedmanchisquare(*repeats.T).statistic
    assert compute_agreement(rank_shares(repeats)) == pytest.approx(statistic / (6 * 8))


def test_top_layers_are_told_from_noise():
    rng = np.random.default_rng(1)
    noise = [rate_top(rng.normal(size=(8, 12)).tolist(), 4).p_value for _ in range(60)]
    assert sum(p < 0.05 for p in noise if p is not None) <= 8  # 3 expected, more than 8 by a chance of 0.3 %
    planted = rng.normal(size=(8, 12)) + 2.0 * (np.arange(12) < 4)
    assert rate_top(planted.tolist(), 4).p_value == 0.001
    assert rate_top(planted[:1].tolist(), 4).p_value is None and rate_top(planted.tolist(), 12).p_value is None


def test_a_layer_without_a_kind_of_matrix_is_ranked_by_the_others():
    shares = rank_shares([[3.0, None, 1.0], [1.0, 2.0, 3.0]])
    assert np.isnan(shares[0, 1]) and shares[0, [0, 2]].tolist() == [0.75, 0.25]


@pytest.mark.parametrize(
    ("values", "freeze", "wanted"),
    [
        ([0.0] * 12 + [1.0] * 18, "either", (12, "shallow")),
        ([1.0] * 12 + [0.0] * 18, "either", (12, "deep")),
        ([0.0] * 12 + [1.0] * 18, "deep", None),
    ],
)
def test_a_step_is_found_with_the_side_that_trains(values: list[float], freeze: str, wanted: tuple[int, str] | None):
    rng = np.random.default_rng(2)
    step = find_step(np.array(values) + 0.1 * rng.normal(size=30), min_side=2, freeze=freeze)  # type: ignore[arg-type]
    assert step is not None
    if wanted is None:
        assert step.p_value > 0.5
    else:
        assert (step.boundary, step.freeze) == wanted and step.p_value <= 0.01


def test_noise_has_a_step_in_one_of_twenty():
    rng = np.random.default_rng(3)
    steps = [find_step(rng.normal(size=24), min_side=2, freeze="either") for _ in range(120)]
    assert sum(step.p_value < 0.05 for step in steps if step is not None) <= 13  # 6 expected, more than 13 by 0.4 %
    assert find_step([1.0, 2.0, 3.0], min_side=2, freeze="either") is None
