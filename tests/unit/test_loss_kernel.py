"""The GPU's loss kernel, run by Triton's interpreter: cross-entropy of PyTorch in float64, its gradient by autograd."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

CODE = """
import json
import torch
import layerplan.train.loss_kernel as loss_kernel

loss_kernel.BLOCK = 64  # several blocks a row, the last one not full
torch.manual_seed(0)
found = []
for softcap, z_weight in ((None, 0.0), (None, 0.01), (5.0, 0.0), (5.0, 0.01)):
    logits, labels = torch.randn(6, 300) * 4, torch.randint(0, 300, (6,))
    labels[2] = -100
    exact = logits.double().requires_grad_()
    capped = exact if softcap is None else softcap * torch.tanh(exact / softcap)
    loss = torch.nn.functional.cross_entropy(capped, labels, ignore_index=-100, reduction="sum")
    loss = loss + z_weight * (capped.logsumexp(-1).square() * (labels != -100)).sum()
    (expected,) = torch.autograd.grad(0.3 * loss, exact)
    total, grad = loss_kernel.turn_into_gradient(logits, labels, 0.3, softcap, z_weight, ignored=-100)
    found.append({
        "is_in_place": grad.data_ptr() == logits.data_ptr(),
        "loss": abs(float(total) / float(loss.detach()) - 1),
        "grad": float((grad.double() - expected).norm() / expected.norm()),
        "ignored": float(grad[2].abs().max()),
    })
outside, _ = loss_kernel.turn_into_gradient(torch.randn(1, 300), torch.tensor([300]), 1.0, None, 0.0, ignored=-100)
print(json.dumps({"found": found, "outside": str(float(outside))}))
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_the_kernel_is_cross_entropy_and_its_gradient() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert len(told["found"]) == 4
    for each in told["found"]:
        assert each["is_in_place"]
        assert each["loss"] < 1e-5
        assert each["grad"] < 1e-6
        assert each["ignored"] == 0.0
    assert told["outside"] == "nan"  # never another row's logits
