"""What is said of a cluster that does not start."""

from __future__ import annotations

from layerplan.ray_session import find_reason


def test_where_ray_announces_lines_of_a_log_the_last_of_them_is_said_too() -> None:
    told = Exception(
        "\nThe last 20 lines of /tmp/dashboard.log (it contains the error message from the dashboard): \nfirst\n\nlast\n"
    )
    assert find_reason(told) == (
        "The last 20 lines of /tmp/dashboard.log (it contains the error message from the dashboard): last"
    )
    assert find_reason(ConnectionError("no cluster at 10.0.0.1\nmore")) == "no cluster at 10.0.0.1"
