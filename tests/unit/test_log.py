"""What is said on the way goes to standard error: as lines for people, or as JSON, and nothing that nobody can act on."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from layerplan.cli import build_parser, main
from layerplan.engine_noise import CalmStream
from layerplan.entry import run_guarded
from layerplan.errors import ConfigError
from layerplan.log import PACKAGES, configure, get_settings, kept, set_rank, set_up
from layerplan.progress_line import ProgressLine

ROOT = Path(__file__).resolve().parents[2]
RAYS_ADVICE = (
    "[2026-11-25 22:37:27,421 E 22023 22023] core_worker.cc:2465: Actor with class name: 'MapWorker(MapBatches(UnitTokenizer))'"
    " and ID: 'af542549742096b34c0e76cc01000000' has constructor arguments in the object store and max_restarts > 0."
)

RAY_DATAS_END = (
    "Task MapWorker(MapBatches(UnitTokenizer)).submit failed. There are 2 retries remaining, so the task will be retried."
    " Error: The actor is dead because it was killed by `ray.kill`."
)
CRASH = RAY_DATAS_END.replace("it was killed by `ray.kill`", "its worker process has died")


@pytest.fixture(autouse=True)
def no_trace() -> Iterator[None]:
    """Loggers as in a program that set nothing up, whatever tests before did; and afterwards as they were."""
    with kept():
        for name in PACKAGES:
            logger = logging.getLogger(name)
            logger.handlers, logger.propagate = [], True
            logger.setLevel(logging.NOTSET)
        yield


@pytest.mark.parametrize(
    ("logger", "level", "line"),
    [
        ("layerplan.train.worker", logging.INFO, "[train] 50% of it\n"),
        ("layerplan.train.watchdog", logging.INFO, "[watch] 50% of it\n"),
        ("layerplan.checkpoint.hf_export", logging.WARNING, "[checkpoint] warning: 50% of it\n"),
        ("eval.pool", logging.INFO, "[evaluate] 50% of it\n"),
        ("layerplan.entry", logging.ERROR, "error: 50% of it\n"),
        ("layerplan.corpus.build", logging.DEBUG, ""),
    ],
)
def test_a_line_says_which_part_of_a_run_speaks(
    capsys: pytest.CaptureFixture[str], logger: str, level: int, line: str
) -> None:
    set_up()
    logging.getLogger(logger).log(level, "50% of it")
    assert capsys.readouterr() == ("", line)


def test_a_line_is_said_once_to_what_standard_error_is_by_then(capsys: pytest.CaptureFixture[str]) -> None:
    """Set up twice, beside a handler of the root logger, as Ray Train gives each of its workers one."""
    roots, now = logging.StreamHandler(sys.stderr), io.StringIO()
    logging.getLogger().addHandler(roots)
    try:
        set_up()
        set_up()
        with redirect_stderr(now):
            logging.getLogger("layerplan.train.worker").info("begun")
    finally:
        logging.getLogger().removeHandler(roots)
    assert (now.getvalue(), capsys.readouterr().err) == ("[train] begun\n", "")


def test_a_command_leaves_the_loggers_of_a_program_as_they_were(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("layerplan.train")
    mine = logging.StreamHandler(capture := io.StringIO())
    logging.getLogger().addHandler(mine)
    try:
        assert run_guarded(lambda: logger.warning("of the command"), level="ERROR") == 0
        logger.warning("of the program")
    finally:
        logging.getLogger().removeHandler(mine)
    assert capture.getvalue() == "of the program\n" and capsys.readouterr().err == ""


def test_what_was_printed_before_stands_before_where_both_go_to_one_file(tmp_path: Path) -> None:
    code = "import logging, layerplan.log as log; log.set_up(); print('answer'); logging.getLogger('eval').info('then')"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    environment |= {"PYTHONPATH": str(ROOT)}
    with (tmp_path / "job.log").open("w") as file:
        subprocess.run([sys.executable, "-c", code], env=environment, stdout=file, stderr=file, check=True)
    assert (tmp_path / "job.log").read_text() == "answer\n[evaluate] then\n"


def test_a_line_of_json_holds_everything(capsys: pytest.CaptureFixture[str]) -> None:
    set_up(style="json")
    logging.getLogger("layerplan.pipeline.stages").info("%s", "二\n行", extra={"stage": "plan"})
    (line,) = capsys.readouterr().err.splitlines()
    values = json.loads(line)
    assert datetime.now().astimezone() - datetime.fromisoformat(values.pop("time")) < timedelta(minutes=1)
    assert values == {"level": "info", "stage": "plan", "message": "二\n行", "logger": "layerplan.pipeline.stages"}


@pytest.mark.parametrize(("ranks", "heard"), [("first", ["rank 1: late"]), ("all", ["rank 1: begun", "rank 1: late"])])
def test_only_the_first_rank_is_heard_unless_all_are_asked_for(
    capsys: pytest.CaptureFixture[str], ranks: str, heard: list[str]
) -> None:
    configure({"LAYERPLAN_LOG_RANKS": ranks})
    set_rank(1)
    logger = logging.getLogger("layerplan.train.worker")
    logger.info("begun")
    logger.warning("late")
    shown = [line.removeprefix("[train] ").replace("warning: ", "") for line in capsys.readouterr().err.splitlines()]
    assert shown == heard


def test_the_first_rank_is_not_named(capsys: pytest.CaptureFixture[str]) -> None:
    set_up()
    set_rank(0)
    logging.getLogger("layerplan.train.worker").info("begun")
    assert capsys.readouterr().err == "[train] begun\n"


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ([], ["on the way", "warning: hot"]),
        (["--quiet"], ["warning: hot"]),
        (["--verbose"], ["detail", "on the way", "warning: hot"]),
    ],
)
def test_a_command_takes_how_much_is_said(
    words: list[str], shown: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        logger = logging.getLogger("layerplan")
        logger.debug("detail")
        logger.info("on the way")
        logger.warning("hot")
        print("the answer")

    for command in (["report", "run"], ["plan", "show", "plan.json"], ["corpus", "verify", "store"]):
        args = build_parser(command[0]).parse_args([*command, *words])
        assert run_guarded(work, style=args.log, level=args.level) == 0
        assert capsys.readouterr() == ("the answer\n", "".join(f"{line}\n" for line in shown))


def test_an_error_is_one_line_of_either_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "none.yaml"
    assert main(["run", "--config", str(missing), "--quiet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --config {missing}: cannot be read (")
    assert main(["run", "--config", str(missing), "--log", "json"]) == 2
    values = json.loads(capsys.readouterr().err)
    assert values["level"] == "error" and f"error: {values['message']}" == line


def test_a_wrong_variable_is_an_error_that_names_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LAYERPLAN_LOG", "xml")
    assert run_guarded(lambda: None) == 2
    assert capsys.readouterr().err == "error: LAYERPLAN_LOG='xml': must be text or json\n"
    with pytest.raises(ConfigError):
        configure(os.environ)


def test_workers_are_told_what_the_command_was_told() -> None:
    """In a process of its own, as Ray's are: only the variables go there."""
    set_up(style="json", level="WARNING")
    code = (
        "import layerplan, logging; logger = logging.getLogger('layerplan.train.worker');"
        "logger.info('unheard'); logger.warning('heard')"
    )
    environment = os.environ | get_settings() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert [json.loads(line)["message"] for line in done.stderr.splitlines()] == ["heard"]


def test_a_program_that_imports_the_package_decides_itself() -> None:
    code = (
        "import logging, layerplan, layerplan.log; logger = logging.getLogger('layerplan.train');"
        "logger.info('unheard'); logging.basicConfig(level='INFO', format='mine: %(message)s'); logger.info('heard')"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LAYERPLAN_LOG")}
    environment |= {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == "mine: heard\n"


def test_advice_that_nobody_can_follow_is_kept_back() -> None:
    out = io.StringIO()
    stream = CalmStream(out)
    mark = "\x1b[36m(TrainController pid=24335)\x1b[0m "
    for text in (
        "first",
        "\n",
        f"{RAYS_ADVICE}\n",
        f"{mark}{RAYS_ADVICE}\n",
        f"\x1b[33m(raylet)\x1b[0m {RAY_DATAS_END}\n",
        f"{CRASH}\n",
        "core_worker.cc:99: disk full\n",
        "\rbar",
    ):
        stream.write(text)
    assert out.getvalue() == f"first\n{CRASH}\ncore_worker.cc:99: disk full\n"
    stream.flush()
    assert out.getvalue().endswith("disk full\n\rbar")


def test_a_workers_line_of_json_stays_one() -> None:
    out = io.StringIO()
    stream = CalmStream(out)
    stream.write('\x1b[36m(RayTrainWorker pid=7, ip=10.0.0.2)\x1b[0m {"message": "begun"}\n(main pid=1) {no json}\n')
    first, second = out.getvalue().splitlines()
    assert json.loads(first) == {"message": "begun", "process": "RayTrainWorker pid=7, ip=10.0.0.2"}
    assert second == "(main pid=1) {no json}"


def test_what_is_written_past_python_is_kept_back_too_and_the_last_words_of_a_crash_arrive() -> None:
    code = f"""
import os, sys
from layerplan.entry import run_guarded
def work():
    os.write(2, {f"{RAYS_ADVICE}{chr(10)}".encode()!r})
    os.write(2, b"something else\\n")
    print("[train] ours", file=sys.stderr)
    if "crash" in sys.argv:
        os.write(2, b"last words\\n")
        os.abort()
sys.exit(run_guarded(work))
"""
    for argument, words in (("", []), ("crash", ["last words"])):
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", code, argument], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == (-6 if words else 0)
        assert sorted(done.stderr.splitlines()) == sorted(["[train] ours", "something else", *words])


def test_progress_is_a_line_a_minute_where_lines_stay() -> None:
    now, lines = [0.0], list[str]()
    line = ProgressLine(lines.append, clock=lambda: now[0], redraws=False)
    for now[0] in range(0, 301, 10):
        line.show(lambda: f"at {now[0]}")
    line.close()
    assert lines == ["at 60", "at 120", "at 180", "at 240", "at 300"]


def test_progress_is_redrawn_on_a_terminal() -> None:
    code = """
import logging, time
from layerplan.log import set_up
from layerplan.progress_line import ProgressLine
set_up()
line = ProgressLine(logging.getLogger("layerplan.corpus").info)
for part in range(3):
    time.sleep(0.51)
    line.show(lambda: f"part [{part}] of 3")
logging.getLogger("layerplan.corpus").info("built")
line.close()
"""
    screen, terminal = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=terminal)
    os.close(terminal)
    shown = b""
    try:
        while piece := os.read(screen, 4096):
            shown += piece
    except OSError:  # the other end was closed
        pass
    assert process.wait() == 0
    assert b"part [2] of 3" in shown and b"[corpus] built" in shown and b"\x1b[2K" in shown
    assert b"[corpus] part" not in shown


def test_what_a_terminal_has_no_character_for_is_shown_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii", write_through=True))
    assert run_guarded(lambda: print("的 ok")) == 0
    assert shown.getvalue() == b"\\u7684 ok\n"
