"""What is said of a cluster that does not start."""

from __future__ import annotations

import socket

import pytest

from layerplan import ray_session
from layerplan.errors import ClusterError
from layerplan.ray_session import OWN_CLUSTER, PORTS, find_free_port, find_reason
from layerplan.waiting import FAILURES_SAID, LOOK_EVERY_S, START_SAID_S


def test_where_ray_announces_lines_of_a_log_the_last_of_them_is_said_too() -> None:
    told = Exception(
        "\nThe last 20 lines of /tmp/dashboard.log (it contains the error message from the dashboard): \nfirst\n\nlast\n"
    )
    assert find_reason(told) == (
        "The last 20 lines of /tmp/dashboard.log (it contains the error message from the dashboard): last"
    )
    assert find_reason(ConnectionError("no cluster at 10.0.0.1\nmore")) == "no cluster at 10.0.0.1"


def test_a_lost_head_is_told_before_ray_ends_the_driver_for_it() -> None:
    """Ray does so in its C++ part, after which nothing can be said."""
    limit_s = float(OWN_CLUSTER["RAY_gcs_rpc_server_reconnect_timeout_s"])
    assert max(FAILURES_SAID * LOOK_EVERY_S, START_SAID_S) <= limit_s / 2


def test_a_port_is_drawn_and_none_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {find_free_port() for _ in range(50)}
    assert len(found) > 40 and found <= set(PORTS), "drawn, so that two runs that start at once do not meet"
    with socket.socket() as holder:
        port = found.pop()
        holder.bind(("127.0.0.1", port))
        holder.listen()
        monkeypatch.setattr(ray_session, "PORTS", range(port, port + 1))
        with pytest.raises(ClusterError, match=f"no free port among {port} to {port} of 127.0.0.1"):
            find_free_port()
