"""A verdict from printed accuracies alone: what a table in a paper is worth when nobody has its answers.

A printed category accuracy p over n questions has variance p (1 - p) / n; the average of the four categories has the
sum of theirs over 16. Against a fixed score (guessing, the best constant letter) that gives a one-sided z-test, between
two printed arms an unpaired two-sided one. Answers to the same questions are usually positively correlated, so the
unpaired test is on the careful side: with the answers at hand `eval/significance.py` does better.

    python -m eval.printed > docs/paper_verdict.md
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

from scipy.stats import norm

from eval.items import CATEGORIES, LETTERS
from eval.significance import ALPHA, correct_holm

CHANCE_PERCENT = 25.0
KEYS = {
    "C-Eval": ((91, 117, 108, 114), (72, 74, 71, 58), (63, 50, 69, 75), (84, 97, 96, 107)),
    "CMMLU": ((644, 624, 622, 641), (932, 910, 918, 892), (620, 626, 613, 630), (730, 723, 724, 733)),
}
"""How often each letter is the key, per category in the order of CATEGORIES: `val` of C-Eval, `test` of CMMLU."""

PAPER = {
    ("C-Eval", "generate"): {
        "full": (26.60, 27.19, 26.18, 26.53),
        "freeze_shallow": (24.86, 25.33, 25.51, 25.85),
        "freeze_deep": (27.76, 32.07, 28.94, 28.82),
    },
    ("C-Eval", "logit"): {
        "full": (26.55, 27.21, 25.83, 25.67),
        "freeze_shallow": (24.97, 25.60, 25.71, 25.92),
        "freeze_deep": (27.65, 32.17, 29.39, 28.99),
    },
    ("CMMLU", "generate"): {
        "full": (25.22, 24.10, 25.26, 25.85),
        "freeze_shallow": (24.28, 24.98, 25.14, 26.30),
        "freeze_deep": (26.69, 30.62, 27.93, 27.76),
    },
    ("CMMLU", "logit"): {
        "full": (24.99, 25.00, 25.53, 25.54),
        "freeze_shallow": (24.14, 26.01, 25.50, 26.80),
        "freeze_deep": (26.72, 30.65, 28.00, 28.32),
    },
}
"""The paper's Tables 1 and 2, category accuracies in percent; the arms by the names of our plan types."""


@dataclass(frozen=True)
class PrintedVerdict:
    """One printed arm against what needs no training at all."""

    benchmark: str
    protocol: str
    arm: str
    average: float
    """Mean of the four categories, percent."""
    half_width: float
    """Half of the 95 % interval, points."""
    chance_p: float
    """One-sided p-value against 25 %, Holm-corrected over all arms."""
    letter_p: float
    """One-sided p-value against always answering the best letter, Holm-corrected over all arms."""

    @property
    def sentence(self) -> str:
        """The verdict in words."""
        if self.chance_p >= ALPHA:
            return "not distinguishable from guessing"
        if self.letter_p >= ALPHA:
            return "better than guessing, not than always answering one letter"
        return "better than guessing and than any constant letter"


@dataclass(frozen=True)
class PrintedPair:
    """Two printed arms against each other."""

    benchmark: str
    protocol: str
    first: str
    second: str
    difference: float
    """First minus second, points."""
    half_width: float
    """Half of the unpaired 95 % interval, points."""
    p_value: float
    """Two-sided, unpaired, Holm-corrected over all pairs."""


def compute_average(benchmark: str, categories: tuple[float, ...]) -> tuple[float, float]:
    """Mean of four printed category accuracies and its standard error, both in percent."""
    sizes = [sum(counts) for counts in KEYS[benchmark]]
    variance = sum(p * (100 - p) / n for p, n in zip(categories, sizes, strict=True)) / len(sizes) ** 2
    return sum(categories) / len(categories), math.sqrt(variance)


def find_best_letter(benchmark: str) -> tuple[str, float]:
    """The letter whose constant answer has the highest mean over the categories, and that mean in percent."""
    means = {
        letter: sum(100 * counts[index] / sum(counts) for counts in KEYS[benchmark]) / len(CATEGORIES)
        for index, letter in enumerate(LETTERS)
    }
    best = max(means, key=lambda letter: means[letter])
    return best, means[best]


def judge_printed(
    table: Mapping[tuple[str, str], Mapping[str, tuple[float, ...]]],
) -> tuple[list[PrintedVerdict], list[PrintedPair]]:
    """Judges every printed arm and every pair of arms of a benchmark and protocol."""
    arms = [
        (key, arm, *compute_average(key[0], values)) for key, named in table.items() for arm, values in named.items()
    ]
    chance = correct_holm([float(norm.sf((mean - CHANCE_PERCENT) / error)) for _, _, mean, error in arms])
    letter = correct_holm(
        [float(norm.sf((mean - find_best_letter(key[0])[1]) / error)) for key, _, mean, error in arms]
    )
    verdicts = [
        PrintedVerdict(*key, arm, mean, norm.ppf(0.975) * error, chance_p, letter_p)
        for (key, arm, mean, error), chance_p, letter_p in zip(arms, chance, letter)
    ]
    pairs = [(a, b) for a, b in combinations(arms, 2) if a[0] == b[0]]
    differences = [(second[2] - first[2], math.hypot(first[3], second[3])) for first, second in pairs]
    adjusted = correct_holm([float(2 * norm.sf(abs(gap) / error)) for gap, error in differences])
    judged = [
        PrintedPair(*first[0], second[1], first[1], gap, norm.ppf(0.975) * error, p)
        for (first, second), (gap, error), p in zip(pairs, differences, adjusted)
    ]
    return verdicts, judged


def render_page() -> str:
    """The docs page on the paper's three arms."""
    verdicts, pairs = judge_printed(PAPER)
    guessing = sum(item.chance_p >= ALPHA for item in verdicts)
    letters = "; ".join(
        f"{name}: always {find_best_letter(name)[0]} scores {find_best_letter(name)[1]:.2f}" for name in KEYS
    )
    lines = [
        "# What the paper's tables say, judged by this tool",
        "",
        "Made by `python -m eval.printed` from the category accuracies printed in the paper's Tables 1 and 2 and from how many",
        "questions each category has; nobody but the authors has the answers. The method and its limits stand at the top of",
        "`eval/printed.py`. The paper prints neither the untouched base model nor any interval.",
        "",
        f"**{guessing} of {len(verdicts)} printed averages are not distinguishable from guessing** (25 %).",
        f"The best constant letter, by the same average of categories: {letters}.",
        "",
        "## Each arm",
        "",
        "| benchmark | read by | arm | average [95 %] | p against 25 % | p against the best letter | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {item.benchmark} | {item.protocol} | `{item.arm}` | {item.average:.2f} ± {item.half_width:.2f} |"
        f" {item.chance_p:.3g} | {item.letter_p:.3g} | {item.sentence} |"
        for item in verdicts
    ]
    lines += [
        "",
        "## Each pair",
        "",
        "| benchmark | read by | pair | difference [95 %], points | p | verdict |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {item.benchmark} | {item.protocol} | `{item.first}` against `{item.second}` |"
        f" {item.difference:+.2f} ± {item.half_width:.2f} | {item.p_value:.3g} |"
        f" {'different' if item.p_value < ALPHA else 'not distinguishable'} |"
        for item in pairs
    ]
    lines += [
        "",
        "P-values are Holm-corrected within each table. An arm that is no better than guessing says nothing about which layers",
        "to train: training may have moved the model away from the answer format as well as from the knowledge. One seed per",
        "arm was printed, so none of these intervals covers the variation between seeds.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(render_page(), end="")
