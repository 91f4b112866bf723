"""What SALF's two losses cost beside the ordinary one: seconds and peak bytes of forward and backward, and of the bases.

    python benchmarks/semantic_losses.py --vocab 49152 --hidden 576 --rows 16

All three run on the states of label positions only, as `layerplan finetune` does; the naive form holds every logit.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from layerplan.models.semantic_bases import SemanticBases
from layerplan.train.loss import compute_loss_sum
from layerplan.train.semantic_loss import compute_cosine_loss_sum, compute_similarity_loss_sum
from tests.allocations import count_peak_bytes

REPEATS = 5


def measure(name: str, work: Callable[[], object]) -> None:
    """Prints the median of some runs, and the peak of one."""
    work()
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    peak = count_peak_bytes(work) / 2**20
    print(f"| {name} | {1e3 * sorted(seconds)[REPEATS // 2]:.1f} | {peak:.1f} |")


def main() -> None:
    """Measures one shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default in (("--vocab", 49152), ("--hidden", 576), ("--rows", 16)):
        parser.add_argument(option, type=int, default=default)
    args = parser.parse_args()
    torch.manual_seed(0)
    weight = torch.randn(args.vocab, args.hidden) * 0.02
    hidden = torch.randn(args.rows, args.hidden, requires_grad=True)
    labels = torch.randint(args.vocab, (args.rows,))
    bases = SemanticBases(weight)
    started = time.perf_counter()
    units = bases.get_units()
    print(f"bases: {time.perf_counter() - started:.2f} s, {units.nbytes / 2**20:.0f} MiB kept, once a run\n")

    def naive() -> None:
        logits: Tensor = F.cosine_similarity(hidden[:, None], units[None], dim=-1)
        F.cross_entropy(logits, labels, reduction="sum").backward()

    print("| loss | ms | peak MiB |\n|---|---|---|")
    measure("vocabulary", lambda: compute_loss_sum(hidden, weight, labels).backward())
    measure("semantic_ce", lambda: compute_similarity_loss_sum(hidden, units, labels).backward())
    measure("semantic_cosine", lambda: compute_cosine_loss_sum(hidden, units, labels).backward())
    if args.rows <= 64:
        measure("semantic_ce, naive", naive)


if __name__ == "__main__":
    main()
