"""A PostgreSQL server made as its image makes one: a superuser with a password, then the scripts it is given."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("initdb", "pg_ctl", "postgres", "psql", "pg_isready")
START_S = 120


def why_not() -> str:
    """Why it cannot be started here, in a line; empty where it can."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"a PostgreSQL server needs {', '.join(missing)} on PATH"
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        return "root starts PostgreSQL as another user, which needs setpriv (Debian: util-linux)"
    return ""


@contextmanager
def running_postgres(environment: Mapping[str, str], script: Path) -> Iterator[int]:
    """Starts one on loopback with `POSTGRES_USER` and `POSTGRES_PASSWORD`, runs the script, and yields its port."""
    with tempfile.TemporaryDirectory(prefix="lppg", dir="/tmp", ignore_cleanup_errors=True) as name:
        folder, data = Path(name), Path(name) / "data"
        become = _become_user(folder)
        password = folder / "password"
        password.write_text(environment["POSTGRES_PASSWORD"])
        password.chmod(0o644)
        user = environment["POSTGRES_USER"]
        _run(
            *become,
            "initdb",
            "--auth=scram-sha-256",
            f"--username={user}",
            f"--pwfile={password}",
            "--pgdata",
            str(data),
        )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories={folder} -c fsync=off"
        control = [*become, "pg_ctl", "--pgdata", str(data), "--wait", f"--timeout={START_S}"]
        _run(*control, "--options", options, "--log", str(folder / "log"), "start")
        try:
            reached = {"PGHOST": "127.0.0.1", "PGPORT": str(port), "PGPASSWORD": environment["POSTGRES_PASSWORD"]}
            _run("bash", str(script), env={**os.environ, **environment, **reached})
            yield port
        finally:
            _run(*control, "--mode=immediate", "stop")


def _become_user(folder: Path) -> list[str]:
    """What starts a command as somebody who may run PostgreSQL, and owns the folder."""
    if os.geteuid() != 0:
        return []
    for name in ("postgres", "nobody"):
        with_name = [each for each in pwd.getpwall() if each.pw_name == name]
        if with_name:
            os.chown(folder, with_name[0].pw_uid, with_name[0].pw_gid)
            ids = [f"--reuid={with_name[0].pw_uid}", f"--regid={with_name[0].pw_gid}"]
            return ["setpriv", *ids, "--clear-groups"]
    raise AssertionError("no user to run PostgreSQL as")


def _run(*command: str, env: dict[str, str] | None = None) -> None:
    """Runs a command to a good end; its output goes to a file, since a server that it starts keeps it open."""
    with tempfile.TemporaryFile("w+") as said:
        done = subprocess.run(command, cwd="/", env=env, stdout=said, stderr=said, timeout=START_S)
        said.seek(0)
        assert done.returncode == 0, said.read()
