"""A cluster of one machine is closed: it wants a token, and nothing of it listens beyond the loopback interface."""

from __future__ import annotations

import os
import secrets
import socket
import sys
from collections.abc import MutableMapping

LOOPBACK = "127.0.0.1"
AUTH_MODE, AUTH_TOKEN = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"
_REACHABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray replaces a loopback address by one that other machines can reach, except where it thinks there are no others."""


def ask_for_token(environ: MutableMapping[str, str], auth_mode: str, *, make: bool) -> None:
    """Sets how this process and the cluster it starts authenticate; what the environment sets stays.

    Args:
        environ: The process's environment, which all of a cluster that it starts inherits.
        auth_mode: Ray's mode, `token` or `disabled`.
        make: Whether to make a token when there is none. It is random and lies in no file.
    """
    environ.setdefault(AUTH_MODE, auth_mode)
    if make:
        environ.setdefault(AUTH_TOKEN, secrets.token_hex(32))
    raylet = sys.modules.get("ray._raylet")
    if raylet is not None:  # Ray was imported before and goes by the mode it saw then
        raylet.Config.initialize("")


def stay_on_loopback(environ: MutableMapping[str, str]) -> None:
    """Makes Ray take a loopback address for what it is, in this process and all it starts; call it before `ray.init`."""
    environ[_REACHABLE] = "0"
    constants = sys.modules.get("ray._private.ray_constants")
    if constants is not None:  # Ray was imported before and has read the variable already
        constants.ENABLE_RAY_CLUSTER = False  # type: ignore[attr-defined]


def is_loopback(address: str) -> bool:
    """Whether `host:port` is on this machine and nowhere else."""
    return address.rpartition(":")[0] in (LOOPBACK, "localhost", "[::1]")


def is_loopback_cluster() -> bool:
    """Whether every node of the connected cluster is known by a loopback address, so that none is another machine."""
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    return bool(alive) and all(str(node["NodeManagerAddress"]).startswith(("127.", "::1")) for node in alive)


def name_loopback_interface() -> str | None:
    """The system's name of the interface, `lo` or `lo0`."""
    return next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)


def list_loopback_variables() -> dict[str, str]:
    """Variables that keep what training workers say to each other on loopback; none on a cluster of several machines.

    What the environment sets wins.
    """
    name = name_loopback_interface() if is_loopback_cluster() else None
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    return {} if name is None else {key: os.environ.get(key, name) for key in names}
