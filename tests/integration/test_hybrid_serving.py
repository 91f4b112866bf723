"""A hybrid in vLLM against the same hybrid in transformers: letters and greedy tokens of prompts of 1 to 300 tokens."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from layerplan.config.stitch import StitchedModelConfig
from layerplan.models.ref import ModelRef
from layerplan.models.stitching.build import write_stitched
from layerplan.models.stitching.recipe import read_donor, resolve_recipe
from tests.hybrids import NEMOTRON
from tests.ray_script import script_environment

NUM_PROMPTS, NEW_TOKENS, LETTERS = 50, 16, (36, 37, 38, 39)
ASK = """
import json, sys
from eval.engine import EngineSpec
from eval.open_engine import open_engine
from layerplan.models.ref import ModelRef
folder, backend, prompts = sys.argv[1], sys.argv[2], json.loads(sys.stdin.read())
engine = open_engine(EngineSpec(ModelRef(folder), backend, "float32", 0, (36, 37, 38, 39), 512, num_threads=1))
batches = [prompts] if backend == "vllm" else [[prompt] for prompt in prompts]
answers = [answer for batch in batches for answer in engine.ask(batch, [16] * len(batch))]
print("ANSWERS" + json.dumps([[answer.letter_logprobs, answer.token_ids] for answer in answers]))
"""


def ask(folder: Path, backend: str, prompts: list[list[int]]) -> list[tuple[list[float], list[int]]]:
    """Answers of an engine in a process of its own, which joins no cluster."""
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(folder), backend], input=json.dumps(prompts), text=True, capture_output=True,
        env=script_environment(), cwd=Path(__file__).resolve().parents[2], timeout=400,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS")]
    assert lines, done.stderr[-4000:]
    return [(letters, tokens) for letters, tokens in json.loads(lines[0].removeprefix("ANSWERS"))]


@pytest.mark.long
def test_vllm_and_transformers_agree_on_letters_and_greedy_tokens(seed_model, tmp_path):
    folder = tmp_path / "hybrid"
    folder.mkdir()
    spec = StitchedModelConfig(
        donors={"base": {"name": seed_model}},
        layers=[{"kind": "nemotron", "count": 2}, {"donor": "base", "layers": "0:2"}],
        kind_sizes={"nemotron": NEMOTRON},
    )
    write_stitched(resolve_recipe(spec, {"base": read_donor(ModelRef(seed_model))}), folder, seed=0)
    rng = random.Random(0)
    lengths = [1, 2, 300, *(rng.randint(1, 300) for _ in range(NUM_PROMPTS - 3))]
    prompts = [[rng.randint(1, 500) for _ in range(length)] for length in lengths]
    ours, theirs = (ask(folder, backend, prompts) for backend in ("transformers", "vllm"))
    apart = max(abs(a - b) for one, other in zip(ours, theirs, strict=True) for a, b in zip(one[0], other[0]))
    pairs = [(a, b) for one, other in zip(ours, theirs, strict=True) for a, b in zip(one[1], other[1])]
    share = sum(a == b for a, b in pairs) / len(pairs)
    print(f"letters within {apart:.1e}, {share:.4f} of {len(pairs)} greedy tokens agree")
    assert apart < 1e-4 and share >= 0.99 and len(pairs) >= 700
