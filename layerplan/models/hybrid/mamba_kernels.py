"""Mamba2's two mixing operations by PyTorch or by kernels: the convolution over a few positions, and the scan over all.

`torch` is transformers' own arithmetic, whatever else is installed. `triton` is mamba-ssm's scan, which needs no CUDA
extension, takes the starts of a row's documents and keeps no products of pairs of positions; mamba-ssm has no convolution,
so that one is compiled. Letters: B rows, T tokens, C channels, K width of the convolution, H heads, P width of a head,
G groups of heads, N size of a state.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv1d, pad
from transformers.models.nemotron_h import modeling_nemotron_h

PACKAGE = "mamba_ssm"
_SCAN: Callable[..., Any] = inspect.unwrap(modeling_nemotron_h.mamba2_chunk_scan)
"""transformers' own function, below what exchanges it for mamba-ssm's where that is installed."""
INSTALLATION = (
    "MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE pip install --no-build-isolation --no-deps mamba-ssm einops"
)
"""Builds nothing for CUDA; its other dependencies serve Mamba3, and their pins contradict vLLM's."""


def find_kernel_fault(kernels: str, device_type: str) -> str | None:
    """Why kernels of a name (`torch` or `triton`) cannot run here on such a device; None when they can."""
    if kernels == "torch":
        return None
    if device_type != "cuda":
        return f"mamba-ssm's kernels run on GPUs, not on a {device_type}"
    try:
        _load_scan()
    except ImportError as error:
        return f"needs mamba-ssm, which cannot be imported here ({error}); {INSTALLATION}"
    return None


def convolve(
    kernels: str, inputs_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, documents_BT: Tensor | None
) -> Tensor:
    """Every channel over its last K positions, (B, T, C); only `triton` keeps the documents of a row apart."""
    if kernels == "triton":
        run = convolve_shifted if torch.compiler.is_compiling() else _compiled_convolution()
        return run(inputs_BTC, weight_CK, bias_C, documents_BT)
    tokens, width = inputs_BTC.shape[1], weight_CK.shape[1]
    inputs_BCT = inputs_BTC.transpose(1, 2).to(weight_CK.dtype)
    mixed_BCT = conv1d(inputs_BCT, weight_CK[:, None], bias_C, padding=width - 1, groups=len(weight_CK))
    return mixed_BCT[:, :, :tokens].transpose(1, 2)


def scan(
    kernels: str,
    inputs_BTHP: Tensor,
    steps_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    *,
    D_H: Tensor,
    step_bias_H: Tensor,
    chunk_size: int,
    state_BHPN: Tensor | None = None,
    documents_BT: Tensor | None = None,
    gives_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Mamba2's recurrence over a row: h = exp(A s) h + s B x, y = C h + D x, with s the softplus of steps and bias.

    Args:
        kernels: `torch` or `triton`.
        inputs_BTHP: x.
        steps_BTH: s before bias and softplus.
        A_H: Negative.
        B_BTGN: B.
        C_BTGN: C.
        D_H: D.
        step_bias_H: Added to the steps.
        chunk_size: Positions that are scanned together.
        state_BHPN: h before the first position; nothing when left out.
        documents_BT: Index of each token's document; h starts anew where it changes. For `triton` only.
        gives_state: Give h after the last position, in float32.

    Returns:
        y, (B, T, H, P), and h or None.
    """
    options: dict[str, Any] = {"chunk_size": chunk_size, "D": D_H, "dt_bias": step_bias_H, "dt_softplus": True}
    options |= {"initial_states": state_BHPN, "return_final_states": gives_state}
    if kernels == "triton":
        options["seq_idx"] = None if documents_BT is None else documents_BT.int()
    run = _run_triton if kernels == "triton" else _SCAN
    found = run(inputs_BTHP, steps_BTH, A_H, B_BTGN, C_BTGN, **options)
    return found if gives_state else (found, None)


def step(
    inputs_BHP: Tensor, steps_BH: Tensor, A_H: Tensor, B_BGN: Tensor, C_BGN: Tensor, D_H: Tensor, state_BHPN: Tensor
) -> tuple[Tensor, Tensor]:
    """One position of the recurrence in float32: y, (B, H, P), and h after it. The steps are those after the softplus."""
    heads = len(A_H) // B_BGN.shape[1]
    B_BHN, C_BHN = (each.float().repeat_interleave(heads, dim=1) for each in (B_BGN, C_BGN))
    inputs_BHP, steps_BH = inputs_BHP.float(), steps_BH.float()
    kept = state_BHPN.float() * torch.exp(steps_BH * A_H)[..., None, None]
    state_BHPN = kept + (steps_BH[..., None] * inputs_BHP)[..., None] * B_BHN[:, :, None]
    return torch.einsum("bhpn,bhn->bhp", state_BHPN, C_BHN) + D_H.float()[:, None] * inputs_BHP, state_BHPN


def convolve_shifted(
    inputs_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, documents_BT: Tensor | None
) -> Tensor:
    """The convolution as a sum of shifted rows in float32; what lies in another document counts as nothing."""
    tokens, width = inputs_BTC.shape[1], weight_CK.shape[1]
    mixed = inputs_BTC.float() * weight_CK[:, -1].float()
    for shift in range(1, width):
        shifted = pad(inputs_BTC, (0, 0, shift, 0))[:, :tokens].float() * weight_CK[:, -1 - shift].float()
        if documents_BT is not None:
            same = documents_BT == pad(documents_BT, (shift, 0), value=-1)[:, :tokens]
            shifted = shifted * same[..., None]
        mixed = mixed + shifted
    if bias_C is not None:
        mixed = mixed + bias_C.float()
    return mixed.to(inputs_BTC.dtype)


@cache
def _compiled_convolution() -> Callable[..., Tensor]:
    return torch.compile(convolve_shifted)


@cache
def _load_scan() -> Callable[..., Any]:
    """mamba-ssm's scan. Its package begins by importing the CUDA extension, which its Triton part does not need."""
    spec = find_spec(PACKAGE)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {PACKAGE!r}")
    try:
        import_module(PACKAGE)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith(PACKAGE):
            raise
        sys.modules[PACKAGE] = module_from_spec(spec)
        try:
            return _import_scan()
        finally:
            del sys.modules[PACKAGE]  # whoever imports the whole of it shall fail as before
    return _import_scan()


def _import_scan() -> Callable[..., Any]:
    found: Callable[..., Any] = import_module(f"{PACKAGE}.ops.triton.ssd_combined").mamba_chunk_scan_combined
    return found


@torch.compiler.disable
def _run_triton(*inputs: Tensor, **options: Any) -> Any:
    return _load_scan()(*inputs, **options)
