"""Mamba2 by PyTorch on a CPU, by PyTorch and by mamba-ssm's kernels on a GPU, against the recurrence in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv1d
from transformers import DynamicCache

from layerplan.models.hybrid.config import HybridConfig
from layerplan.models.hybrid.mamba_kernels import convolve, convolve_shifted, find_kernel_fault
from layerplan.models.hybrid.mamba_mixer import set_mamba_kernels
from layerplan.models.hybrid.nemotron import Documents, NemotronLayer
from tests.oracles.mamba2 import mix_naively

SIZES = {
    "intermediate_size": 256,
    "mamba_num_heads": 4,
    "mamba_head_dim": 64,
    "ssm_state_size": 64,
    "n_groups": 2,
    "chunk_size": 64,
}
LENGTHS = [[70, 3, 127], [200], [1, 64, 135]]
"""Of documents; in the first row one ends inside a chunk, in the last one ends with a chunk but for one token."""
TOKENS = 200
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 1e-2}


def skip_missing(kernels: str, device: torch.device) -> None:
    fault = find_kernel_fault(kernels, device.type)
    if fault is not None:
        pytest.skip(fault)


def build_layer(device: torch.device, kernels: str = "torch") -> NemotronLayer:
    """A layer whose every parameter matters, of the dtype that the device computes in."""
    config = HybridConfig(hidden_size=128, layer_kinds=["nemotron"], kind_sizes={"nemotron": SIZES})
    torch.manual_seed(0)
    layer = NemotronLayer(config, 0)
    mixer = layer.mixer_block.mixer
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(
                torch.randn_like(parameter) * (0.5 if parameter.dim() < 2 else parameter[0].numel() ** -0.5)
            )
        mixer.A_log.copy_(torch.linspace(0.0, 1.5, len(mixer.A_log)))
        mixer.dt_bias.copy_(torch.linspace(-4.0, -1.0, len(mixer.dt_bias)))
    set_mamba_kernels(layer, kernels)
    return layer.to(device, torch.float32 if device.type == "cpu" else torch.bfloat16)


def make_documents(device: torch.device) -> Documents:
    rows = [torch.cat([torch.full((length,), at) for at, length in enumerate(row)]) for row in LENGTHS]
    return Documents(torch.stack(rows).to(device))


def draw_states(device: torch.device) -> Tensor:
    states = torch.randn(len(LENGTHS), TOKENS, 128, generator=torch.Generator().manual_seed(1))
    return states.to(device, torch.float32 if device.type == "cpu" else torch.bfloat16)


def mix_documents_naively(layer: NemotronLayer, states: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The mixer's part in float64, and the gradient of its weighted sum by the states and by every parameter."""
    mixer = layer.mixer_block.mixer
    values = {name: value.detach().double().cpu().requires_grad_() for name, value in mixer.named_parameters()}
    inputs = states.detach().double().cpu().requires_grad_()
    rows = []
    for row, lengths in zip(inputs, LENGTHS):
        rows.append(torch.cat([mix_naively(values, mixer.config, piece) for piece in row.split(lengths)]))
    mixed = torch.stack(rows)
    return mixed.detach(), list(torch.autograd.grad((mixed * weigh(mixed)).sum(), [inputs, *values.values()]))


def weigh(mixed: Tensor) -> Tensor:
    return torch.cos(torch.arange(mixed.numel(), dtype=torch.float64)).view(mixed.shape).to(mixed)


def mix(layer: NemotronLayer, states: Tensor, documents: Documents) -> tuple[Tensor, list[Tensor]]:
    """The same by the layer's own kernels; where they do not look at documents, each document goes in alone."""
    mixer = layer.mixer_block.mixer
    inputs = states.detach().requires_grad_()
    if mixer.kernels == "torch":
        pieces = [mixer(inputs[row : row + 1, start:stop]) for row, start, stop in documents.pieces]
        mixed = torch.cat(pieces, 1).view_as(inputs)
    else:
        mixed = mixer(inputs, documents_BT=documents.index_BT)
    return mixed.detach(), list(torch.autograd.grad((mixed * weigh(mixed)).sum(), [inputs, *mixer.parameters()]))


def differ(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference, as a share of theirs."""
    return float((ours.detach().double().cpu() - theirs.detach().double().cpu()).norm() / theirs.double().cpu().norm())


def compare(names: list[str], ours: list[Tensor], theirs: list[Tensor]) -> dict[str, float]:
    return {name: differ(one, other) for name, one, other in zip(names, ours, theirs, strict=True)}


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_packed_documents_are_mixed_as_the_recurrence_says_and_so_are_gradients(
    device: torch.device, kernels: str
) -> None:
    """On a GPU both round bfloat16: the kernels' error is at most 0.01 above that of PyTorch's own path."""
    skip_missing(kernels, device)
    layer, states = build_layer(device, kernels), draw_states(device)
    wanted, wanted_grads = mix_documents_naively(layer, states)
    found, grads = mix(layer, states, make_documents(device))
    names = ["mixed", "states", *(name for name, _ in layer.mixer_block.mixer.named_parameters())]
    errors = compare(names, [found, *grads], [wanted, *wanted_grads])
    allowed = dict.fromkeys(names, 2e-5 if device.type == "cpu" else 5e-2)
    if kernels == "triton":
        set_mamba_kernels(layer, "torch")
        plain, plain_grads = mix(layer, states, make_documents(device))
        plain_errors = compare(names, [plain, *plain_grads], [wanted, *wanted_grads])
        allowed = {name: error + 1e-2 for name, error in plain_errors.items()}
    print(kernels, device.type, {name: f"{error:.2e} of {allowed[name]:.2e}" for name, error in errors.items()})
    assert all(error <= allowed[name] for name, error in errors.items())


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@torch.no_grad()
def test_a_row_continued_from_its_state_is_the_row_mixed_at_once(device: torch.device, kernels: str) -> None:
    """Seventy tokens, then fifty at once, then one by one."""
    skip_missing(kernels, device)
    layer, states = build_layer(device, kernels), draw_states(device)[:, :130]
    mixer, cache = layer.mixer_block.mixer, DynamicCache(config=layer.mixer_block.config)
    cuts = [0, 70, 120, *range(121, 131)]
    pieces = [mixer(states[:, start:stop], cache_params=cache) for start, stop in pairwise(cuts)]
    error = differ(torch.cat(pieces, 1), mixer(states))
    print(kernels, device.type, f"{error:.2e}")
    assert error <= ROUNDING[states.dtype]


@pytest.mark.parametrize("is_compiled", [False, True])
def test_the_convolution_of_documents_is_that_of_each_alone(device: torch.device, is_compiled: bool) -> None:
    if is_compiled and device.type == "cpu":
        pytest.skip("C++ takes a minute to compile; what is compiled is what the other case runs")
    torch.manual_seed(0)
    inputs = torch.randn(len(LENGTHS), TOKENS, 24, device=device, requires_grad=True)
    weight = torch.randn(24, 4, device=device, requires_grad=True)
    bias = torch.randn(24, device=device, requires_grad=True)
    documents = make_documents(device)
    pieces = []
    for row, start, stop in documents.pieces:
        piece = inputs[row : row + 1, start:stop].transpose(1, 2)
        pieces.append(conv1d(piece, weight[:, None], bias, padding=3, groups=24)[..., : stop - start].transpose(1, 2))
    wanted = torch.cat(pieces, 1).view_as(inputs)
    given = (inputs, weight, bias, documents.index_BT)
    found = convolve("triton", *given) if is_compiled else convolve_shifted(*given)
    leaves = (inputs, weight, bias)
    both = [torch.autograd.grad((each * weigh(each)).sum(), leaves) for each in (found, wanted)]
    for ours, theirs in [(found, wanted), *zip(*both)]:
        assert differ(ours, theirs) <= 1e-5


def test_a_compiled_layer_with_kernels_gives_the_same_and_is_compiled_once(gpu: torch.device) -> None:
    skip_missing("triton", gpu)
    layer, states, documents = build_layer(gpu, "triton"), draw_states(gpu), make_documents(gpu)
    compiled = torch.compile(layer.forward, dynamic=False)
    wanted = layer(states, documents=documents)
    assert differ(compiled(states, documents=documents), wanted) <= ROUNDING[torch.bfloat16]
    with torch._dynamo.config.patch(error_on_recompile=True):
        other = Documents(documents.index_BT.flip(0))
        assert differ(compiled(states.flip(0), documents=other), wanted.flip(0)) <= ROUNDING[torch.bfloat16]
    torch._dynamo.reset()


def test_a_whole_row_without_documents_is_one_document(device: torch.device) -> None:
    kernels = "triton" if device.type == "cuda" else "torch"
    skip_missing(kernels, device)
    layer, states = build_layer(device, kernels), draw_states(device)
    one = Documents(torch.zeros(len(LENGTHS), TOKENS, dtype=torch.long, device=device))
    assert differ(layer(states, documents=one), layer(states)) <= 1e-6


def test_kernels_are_refused_where_they_cannot_run() -> None:
    assert find_kernel_fault("torch", "cpu") is None
    assert find_kernel_fault("triton", "cpu") == "mamba-ssm's kernels run on GPUs, not on a cpu"
    if not torch.cuda.is_available():
        return
    fault = find_kernel_fault("triton", "cuda")
    assert (
        fault is None
        or "MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE pip install --no-build-isolation --no-deps mamba-ssm einops"
        in fault
    )
