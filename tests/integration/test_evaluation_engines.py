"""Engines that die, agree, or cannot start: through the pool that jobs use, on a model built from a seed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eval.artifacts import load_answers
from eval.engine import EngineSpec
from eval.generation import may_keep_beginnings
from eval.held_out import load_held_out
from eval.pool import Ask, ask_all
from eval.runner import evaluate_model
from layerplan.config.evaluation import EvaluationConfig
from layerplan.errors import EvaluationError, ModelError
from layerplan.models.ref import ModelRef
from layerplan.run_folder import ANSWERS_LEDGER_NAME
from tests.families import class_name
from tests.families import make_config as make_family_config
from tests.model_folders import edit_config, give_code

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(seed_model: str) -> str:
    return seed_model


def make_config(**values: object) -> EvaluationConfig:
    defaults = {
        "benchmarks": [{"name": "ceval"}],
        "backend": "transformers",
        "batch_size": 2,
        "num_cpus_per_actor": 0.5,
    }
    return EvaluationConfig.model_validate(defaults | values)


def make_asks(count: int, *, max_new_tokens: int) -> tuple[list[Ask], EngineSpec]:
    asks = [Ask([5 + index % 40] * (20 + index % 3) + [index % 250 + 5], max_new_tokens) for index in range(count)]
    return asks, EngineSpec(ModelRef(""), "transformers", "float32", 0, (36, 37, 38, 39), 256)


def ledger_lines(folder: Path) -> list[dict[str, object]]:
    path = folder / ANSWERS_LEDGER_NAME
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[1:]] if path.exists() else []


def test_a_killed_engine_loses_and_repeats_nothing(ray_local: None, model: str, tmp_path: Path) -> None:
    """The actor's process is killed after some batches; what it had answered stays, the rest is asked once."""
    asks, spec = make_asks(40, max_new_tokens=24)
    spec = replace(spec, model=ModelRef(model))
    config = make_config()
    killed: list[int] = []

    def kill_after_some() -> None:
        while not killed:
            lines = ledger_lines(tmp_path / "killed")
            if len(lines) >= 8:
                killed.append(int(str(lines[0]["pid"])))
                os.kill(killed[0], signal.SIGKILL)
            time.sleep(0.01)

    thread = threading.Thread(target=kill_after_some)
    thread.start()
    answers = ask_all(asks, spec, config, tmp_path / "killed")
    thread.join()
    lines = ledger_lines(tmp_path / "killed")
    assert sorted(int(str(line["index"])) for line in lines) == list(range(40)), "each prompt is answered once"
    by_process = [line["pid"] for line in lines]
    assert 4 <= by_process.count(killed[0]) < 40, "it was killed midway, and what it had answered was not asked again"
    quiet = ask_all(asks, spec, config, tmp_path / "quiet")
    assert [answer.token_ids for answer in quiet] == [answer.token_ids for answer in answers]
    assert not [pid for pid in {*by_process} if Path(f"/proc/{pid}").exists()], "an engine's process is left"


def test_a_killed_job_asks_only_what_is_left(ray_local: None, model: str, tmp_path: Path) -> None:
    asks, spec = make_asks(8, max_new_tokens=2)
    spec = replace(spec, model=ModelRef(model))
    whole = ask_all(asks, spec, make_config(), tmp_path)
    path = tmp_path / ANSWERS_LEDGER_NAME
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:6]) + lines[6][:10], encoding="utf-8")  # the last line was cut off
    first_pids = {json.loads(line)["pid"] for line in lines[1:6]}
    resumed = ask_all(asks, spec, make_config(), tmp_path)
    assert [answer.token_ids for answer in resumed] == [answer.token_ids for answer in whole]
    again = [line["pid"] for line in ledger_lines(tmp_path)]
    assert len(again) == 8
    assert [pid in first_pids for pid in again] == [True] * 5 + [False] * 3


def test_an_engine_that_keeps_dying_fails_with_its_own_last_words(ray_local: None, model: str, tmp_path: Path) -> None:
    """Tokens beyond the vocabulary make the engine raise each time: two restarts, then its own words."""
    asks, spec = make_asks(4, max_new_tokens=1)
    spec = replace(spec, model=ModelRef(model))
    bad = [*asks, Ask([10**6], 1)]
    with pytest.raises(
        EvaluationError, match=r"(died 3|restarted 2) times; its last words: .*IndexError: index out of range"
    ):
        ask_all(bad, spec, make_config(batch_size=8), tmp_path)


def test_a_process_that_keeps_crashing_fails_with_what_it_wrote_last(model: str, tmp_path: Path) -> None:
    """A limit on address space that the model cannot load under: the process is gone, its log is not."""
    script = f"""
import os, ray
os.environ["LAYERPLAN_CRASH"] = "1"
from pathlib import Path
from eval.engine import EngineSpec
from eval.generation import may_keep_beginnings
from eval import logits
from eval.pool import Ask, ask_all
from layerplan.config.evaluation import EvaluationConfig
from layerplan.errors import EvaluationError
from layerplan.models.ref import ModelRef
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False,
         runtime_env={{"worker_process_setup_hook": "crash_hook.install"}})
spec = EngineSpec(ModelRef({model!r}), "transformers", "float32", 0, (36, 37, 38, 39), 256)
config = EvaluationConfig(backend="transformers", batch_size=2, num_cpus_per_actor=0.5)
try:
    ask_all([Ask([5, 6, 7], 1)] * 4, spec, config, Path({str(tmp_path / "out")!r}))
except EvaluationError as error:
    print("FAULT", error)
"""
    hook = """
import faulthandler
def install():
    from eval import logits
    def die(self, prompts, limits):
        faulthandler._sigabrt()
    logits.TransformersEngine.ask = die
"""
    (tmp_path / "crash_hook.py").write_text(hook, encoding="utf-8")
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=200, check=False
    )
    assert "FAULT" in done.stdout, done.stdout[-2000:] + done.stderr[-3000:]
    assert (
        "the engine's process died and was restarted 2 times; its last words: Fatal Python error: Aborted"
        in done.stdout
    )


def test_vllm_and_transformers_agree_token_for_token(ray_local: None, model: str, tmp_path: Path) -> None:
    options = {"benchmarks": [{"name": "ceval"}], "protocols": ["logit", "generate"], "batch_size": 64}
    options |= {"continuation_prompts": ["计算机的"], "continuation_tokens": 8}
    found = {}
    for backend in ("vllm", "transformers"):
        evaluate_model(ModelRef(model), make_config(**options, backend=backend), tmp_path / backend)
        found[backend] = [load_answers(tmp_path / backend, "ceval", protocol) for protocol in ("logit", "generate")]
        assert (tmp_path / backend / "continuations.jsonl").is_file()
        assert not (tmp_path / backend / ANSWERS_LEDGER_NAME).exists()
    letters, texts = zip(found["vllm"], found["transformers"])
    assert len(letters[0]) == 64
    for mine, theirs in zip(*letters):
        assert mine.letter_logprobs == pytest.approx(theirs.letter_logprobs, abs=1e-4)
        assert mine.predicted == theirs.predicted
    assert [item.output for item in texts[0]] == [item.output for item in texts[1]]
    left = (tmp_path / "vllm" / "continuations.jsonl").read_text(encoding="utf-8")
    assert left == (tmp_path / "transformers" / "continuations.jsonl").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tides(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """A held-out text of two documents."""
    path = tmp_path_factory.mktemp("tides") / "text.txt"
    path.write_text("The tide turns twice a day.\n\nAnd once more.", encoding="utf-8")
    return [{"name": "tides", "source": {"path": str(path)}}]


@pytest.fixture
def plain_scores(
    ray_local: None, model: str, tides: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What transformers answers with the model as it is; made once."""
    folder = tmp_path_factory.getbasetemp() / "plain_scores"
    if not folder.exists():
        config = make_config(protocols=["logit"], held_out=tides, batch_size=64)
        evaluate_model(ModelRef(model), config, folder)
    return folder


@pytest.mark.parametrize("backend", ["vllm", "transformers"])
def test_a_model_of_its_own_code_is_scored_once_that_is_allowed(
    backend: str, model: str, tides: list[dict[str, Any]], plain_scores: Path, tmp_path: Path
) -> None:
    """The same weights without the code are the oracle."""
    coded = give_code(Path(shutil.copytree(model, tmp_path / "coded")))
    config = make_config(backend=backend, protocols=["logit"], held_out=tides, batch_size=64)
    with pytest.raises(ModelError, match=r"modeling_tidal\.TidalForCausalLM.*model\.trust_remote_code: true"):
        evaluate_model(ModelRef(str(coded)), config, tmp_path / "refused")
    evaluate_model(ModelRef(str(coded), trust_remote_code=True), config, tmp_path / "allowed")
    mine, theirs = (load_answers(folder, "ceval", "logit") for folder in (tmp_path / "allowed", plain_scores))
    assert len(mine) == 64
    for one, other in zip(mine, theirs, strict=True):
        assert one.letter_logprobs == pytest.approx(other.letter_logprobs, abs=1e-4)
    texts = [load_held_out(folder)["tides"] for folder in (tmp_path / "allowed", plain_scores)]
    assert texts[0].bits_per_byte == pytest.approx(texts[1].bits_per_byte, abs=1e-6)


def test_what_cannot_be_scored_is_one_clear_error(ray_local: None, model: str, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(model, half)
    weights = half / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"model\.safetensors has .* bytes, its header promises .*half-written"):
        evaluate_model(ModelRef(str(half)), make_config(), tmp_path / "out")
    short = tmp_path / "short"
    shutil.copytree(model, short)
    values = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(values | {"max_position_embeddings": 60}))
    with pytest.raises(
        EvaluationError, match=r"question [a-z_]+/\d+ needs \d+ tokens with its answer, the model has 60"
    ):
        evaluate_model(ModelRef(str(short)), make_config(), tmp_path / "out")


def test_scores_of_a_config_that_was_edited_since_are_not_read_back(
    ray_local: None, model: str, tmp_path: Path
) -> None:
    """Scores of a version that did not look at the config are, so that nobody scores everything anew."""
    base, out, held = tmp_path / "base", tmp_path / "out", tmp_path / "held.jsonl"
    shutil.copytree(model, base)
    held.write_text('{"id": "a", "text": "计算机科学"}\n', encoding="utf-8")
    text = {"name": "h", "source": {"path": str(held)}}
    benchmarks = [{"name": "ceval", "max_questions": 1}]
    config = make_config(benchmarks=benchmarks, protocols=["logit"], continuation_prompts=[], held_out=[text])

    def score() -> tuple[list[str], list[tuple[float, ...]], float]:
        said: list[str] = []
        evaluate_model(ModelRef(str(base)), config, out, report=said.append)
        asked = [line.partition(" ")[0] for line in said if line.startswith(("asking", "bits"))]
        answers = [answer.letter_logprobs for answer in load_answers(out, "ceval", "logit")]
        return asked, answers, load_held_out(out)["h"].bits_per_byte

    first = score()
    assert score() == ([], *first[1:])
    edit_config(base, rms_norm_eps=0.5)
    edited = score()
    assert edited[0] == first[0] == ["asking", "bits"] and edited[1] != first[1] and edited[2] != first[2]
    for path in (out / "ceval.json", out / "held_out" / "h.json"):
        path.write_text(re.sub(r',?\s*"config_sha256": "[0-9a-f]{64}"', "", path.read_text()))
        assert "config_sha256" not in path.read_text()
    edit_config(base, rms_norm_eps=1e-6)
    assert score() == ([], *edited[1:])


def test_vllm_keeps_beginnings_for_models_without_a_state_only(model: str, tmp_path: Path) -> None:
    """VLLM's own configs of an attention model, of Mamba, and of a hybrid, for which vLLM calls it an experiment."""
    from vllm import EngineArgs

    folders = {"attention": Path(model)}
    for name in ("mamba", "jamba"):
        config = make_family_config(name)
        config.architectures = [class_name(name)]
        config.save_pretrained(tmp_path / name)
        folders[name] = tmp_path / name
    options = {"dtype": "float32", "max_model_len": 64, "skip_tokenizer_init": True}
    configs = {name: EngineArgs(model=str(path), **options).create_model_config() for name, path in folders.items()}
    found = {name: may_keep_beginnings(config) for name, config in configs.items()}
    assert found == {"attention": True, "mamba": False, "jamba": False}
