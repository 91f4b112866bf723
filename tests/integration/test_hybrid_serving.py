"""A hybrid in vLLM against the same hybrid in transformers: letters and greedy tokens of prompts of 1 to 300 tokens."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from layerplan.config.stitch import StitchedModelConfig
from layerplan.models.ref import ModelRef
from layerplan.models.stitching.build import write_stitched
from layerplan.models.stitching.recipe import read_donor, resolve_recipe
from tests.hybrids import NEMOTRON
from tests.ray_script import script_environment

ROOT = Path(__file__).resolve().parents[2]
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
SERVE = """
import json, sys
from vllm import LLM, ModelRegistry, SamplingParams, TokensPrompt
before = "HybridForCausalLM" in ModelRegistry.get_supported_archs()
engine = LLM(sys.argv[1], dtype="float32", max_model_len=64, enforce_eager=True, enable_prefix_caching=False,
             mamba_ssm_cache_dtype="float32", skip_tokenizer_init=True)
prompt = TokensPrompt(prompt_token_ids=json.loads(sys.argv[2]))
(answer,) = engine.generate([prompt], SamplingParams(temperature=0, max_tokens=8, detokenize=False, ignore_eos=True))
import layerplan
print("SERVED" + json.dumps([before, layerplan.__file__, list(answer.outputs[0].token_ids)]))
"""


def stitch(donor: str, folder: Path) -> Path:
    """Two Nemotron layers below two of the donor."""
    folder.mkdir()
    spec = StitchedModelConfig(
        donors={"base": {"name": donor}},
        layers=[{"kind": "nemotron", "count": 2}, {"donor": "base", "layers": "0:2"}],
        kind_sizes={"nemotron": NEMOTRON},
    )
    write_stitched(resolve_recipe(spec, {"base": read_donor(ModelRef(donor))}), folder, seed=0)
    return folder


def install(folder: Path) -> Path:
    """The package built from a copy of this tree and installed into a folder of its own, as pip does it."""
    for name in ("layerplan", "eval"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--no-compile", "--target"]
    command = [sys.executable, "-m", "pip", "install", *options, str(folder / "site"), str(folder / "source")]
    subprocess.run(command, check=True, timeout=200)
    return folder / "site"


def ask(folder: Path, backend: str, prompts: list[list[int]]) -> list[tuple[list[float], list[int]]]:
    """Answers of an engine in a process of its own, which joins no cluster."""
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(folder), backend], input=json.dumps(prompts), text=True, capture_output=True,
        env=script_environment(), cwd=ROOT, timeout=400,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS")]
    assert lines, done.stderr[-4000:]
    return [(letters, tokens) for letters, tokens in json.loads(lines[0].removeprefix("ANSWERS"))]


@pytest.mark.long
def test_vllm_and_transformers_agree_on_letters_and_greedy_tokens(seed_model, tmp_path):
    folder = stitch(seed_model, tmp_path / "hybrid")
    rng = random.Random(0)
    lengths = [1, 2, 300, *(rng.randint(1, 300) for _ in range(NUM_PROMPTS - 3))]
    prompts = [[rng.randint(1, 500) for _ in range(length)] for length in lengths]
    ours, theirs = (ask(folder, backend, prompts) for backend in ("transformers", "vllm"))
    apart = max(abs(a - b) for one, other in zip(ours, theirs, strict=True) for a, b in zip(one[0], other[0]))
    pairs = [(a, b) for one, other in zip(ours, theirs, strict=True) for a, b in zip(one[1], other[1])]
    share = sum(a == b for a, b in pairs) / len(pairs)
    print(f"letters within {apart:.1e}, {share:.4f} of {len(pairs)} greedy tokens agree")
    assert apart < 1e-4 and share >= 0.99 and len(pairs) >= 700


@pytest.mark.long
def test_vllm_by_itself_serves_a_hybrid_where_the_package_is_installed(seed_model, tmp_path):
    """VLLM finds the model by the installed package's entry point, in its engine's process too; nothing else is imported."""
    folder, site = stitch(seed_model, tmp_path / "hybrid"), install(tmp_path)
    prompt = [5, 17, 300, 41, 8]
    environment = script_environment(VLLM_LOGGING_LEVEL="ERROR", VLLM_CPU_KVCACHE_SPACE="1", PYTHONPATH=str(site))
    done = subprocess.run(
        [sys.executable, "-c", SERVE, str(folder), json.dumps(prompt)],
        env=environment, cwd=tmp_path, text=True, capture_output=True, timeout=400,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("SERVED")]
    assert lines, done.stderr[-4000:]
    was_known, used, tokens = json.loads(lines[0].removeprefix("SERVED"))
    assert not was_known and Path(used).is_relative_to(site)
    model = ModelRef(str(folder)).load()
    ids = torch.tensor([prompt])
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, eos_token_id=None
    )
    assert tokens == expected[0, len(prompt) :].tolist()
