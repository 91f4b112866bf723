"""What `layerplan evaluate` prints beside its scores."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from layerplan.pipeline.evaluate import print_scores


def make_result(subjects: list[str]) -> Any:
    means = {"category_mean": 25.0, "subject_mean": 25.0, "question_mean": 25.0}
    counts = {"num_correct": 16, "num_asked": 64, "num_unparsed": 0}
    return SimpleNamespace(benchmark="ceval", subjects=dict.fromkeys(subjects), **means, **counts)


@pytest.mark.parametrize("subject, is_said", [("python_language", True), ("law", False)])
def test_our_own_questions_are_not_taken_for_the_benchmark_whose_format_they_have(
    capsys: pytest.CaptureFixture[str], subject: str, is_said: bool
) -> None:
    print_scores({f"ceval/{protocol}": make_result([subject]) for protocol in ("logit", "generate")})
    printed = capsys.readouterr().out
    assert printed.count("ceval: a small set of layerplan's own questions") == is_said
