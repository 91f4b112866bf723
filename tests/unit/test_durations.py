"""Times as people say them."""

from __future__ import annotations

from layerplan.durations import render_duration


def test_durations_are_said_as_people_say_them() -> None:
    told = [render_duration(seconds) for seconds in (-2, 40, 45, 119.6, 720, 12240, 12600)]
    assert told == ["0 s", "40 s", "45 s", "120 s", "12 min", "3.4 h", "3.5 h"]
