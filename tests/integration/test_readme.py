"""Every command of the README is run by a test: here, or by the test named beside it."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUN_ELSEWHERE = {
    "make demo": "test_jobs_on_clusters.py::test_a_job_is_submitted_to_a_cluster_made_for_it",
    "make test": "it runs this test",
    "ray job submit": "test_jobs_on_clusters.py::test_a_job_is_submitted_to_a_cluster_made_for_it",
}
RunJob = Callable[..., Any]


def commands() -> list[str]:
    """The lines of the README's bash blocks, continued lines joined, comments off."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    text = "".join(blocks).replace("\\\n", " ")
    return [line for line in (line.partition("#")[0].strip() for line in text.splitlines()) if line]


def test_no_command_is_without_a_test() -> None:
    known = (*RUN_ELSEWHERE, "python jobs/")
    assert [line for line in commands() if not line.startswith(known)] == []
    for place in RUN_ELSEWHERE.values():
        if "::" in place:
            name, _, function = place.partition("::")
            assert f"def {function}(" in (ROOT / "tests/integration" / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("line", [line for line in commands() if line.startswith("python jobs/")])
def test_a_python_command_resolves_to_a_plan(
    line: str, finished_run: Path, converted_models: Path, tmp_path: Path, run_job: RunJob
) -> None:
    """As written, with the example's folders put where the test has some, and stopped before anything is loaded."""
    model = next((finished_run / "base_model" / "hf").iterdir())
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "one.txt").write_text("Some text.\n" * 50, encoding="utf-8")
    arguments = shlex.split(line)[1:]
    for example, real in (("/models/Qwen3-0.6B-Base", model), ("/data/text", tmp_path / "text")):
        arguments = [part.replace(example, str(real)) for part in arguments]
    if "--dry-run" not in arguments:
        arguments.append("--dry-run")
    job = run_job(*arguments, "--set", f"storage_path={converted_models}")
    assert job.returncode == 0, job.output[-3000:]
    for words in ("plan ", "layers ", "FLOPs ", "memory "):
        assert words in job.output


def test_make_ui_serves_the_lineage(finished_run: Path) -> None:
    """`make ui` on a free port; the page is there, and a taken port is one clear line."""
    port = free_port()
    command = ["make", "ui", f"VENV={sys.prefix}", f"RUNS={finished_run.parent}", f"UI_PORT={port}"]
    if not list(Path(sys.prefix).glob(".stamp-*")):
        pytest.skip("the environment was not made by `make env`: its stamp is missing")
    server = subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        page = fetch(f"http://127.0.0.1:{port}/", server)
        assert "MLflow" in page
        again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert again.returncode != 0
        assert f"error: UI_PORT={port}: the port is taken on 127.0.0.1; set UI_PORT to a free one" in again.stderr
    finally:
        os.killpg(server.pid, 15)
        server.communicate(timeout=60)


def test_ports_that_are_taken_are_named(tmp_path: Path) -> None:
    """The cluster scripts find no free port, or the one they are told to use is taken; nothing is started or written."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {"VENV": sys.prefix}

    def run(script: str, **settings: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", script], env=env | settings, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )

    with taken_port() as port:
        demo = run("cluster/local/demo.sh", PORTS=f"{port}-{port}", RUNS=str(tmp_path / "runs"))
        start = run("cluster/local/start.sh", RAY_PORT=str(port))
    wrong = run("cluster/local/demo.sh", PORTS="many", RUNS=str(tmp_path / "runs"))
    assert (demo.returncode, start.returncode, wrong.returncode) == (1, 1, 1)
    assert demo.stderr == f"error: no free port: 3 are needed on 127.0.0.1 in PORTS={port}-{port}, 0 are free\n"
    assert start.stderr == f"error: RAY_PORT={port}: the port is taken on 127.0.0.1; set RAY_PORT to a free one\n"
    assert wrong.stderr.startswith("error: PORTS=many: must be first-last, between 1024 and 65535")
    assert not (tmp_path / "runs").exists()


@contextmanager
def taken_port() -> Iterator[int]:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield holder.getsockname()[1]


def free_port() -> int:
    with taken_port() as port:
        return port


def fetch(url: str, server: subprocess.Popen[bytes]) -> str:
    for _ in range(600):
        assert server.poll() is None, server.communicate()[0].decode()[-2000:]
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return answer.read().decode()
        except OSError:
            time.sleep(0.25)
    raise AssertionError(f"{url} did not answer")
