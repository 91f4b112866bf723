"""Extraction of one answer, case by case; the options are those of one question unless a case brings its own."""

from __future__ import annotations

import pytest

from eval.extraction import extract_answer

OPTIONS = ("北京市", "上海市", "广州市", "深圳市")
ENGLISH = ("the heart", "the liver", "the lung", "the lung and the liver")

CASES = [
    # the letter comes first
    ("A", "A"),
    ("B", "B"),
    (" C", "C"),
    ("\nD", "D"),
    ("A.", "A"),
    ("B. 上海市", "B"),
    ("C、广州市", "C"),
    ("(D)", "D"),
    ("（A）", "A"),
    ("【B】", "B"),
    ("“C”", "C"),
    ("**D**", "D"),
    ("：A", "A"),
    ("A\n\n题目：下一题", "A"),
    ("B。因为它最大", "B"),
    ("Ｃ", "C"),  # full-width letter
    ("D是正确的", "D"),
    ("A选项", "A"),
    # a letter that starts a word or a list is not an answer
    ("Apple", None),
    ("Because", None),
    ("A and B", None),
    ("A、B", None),
    ("A, C", None),
    ("B或C", None),
    ("A和D都对", None),
    ("AB", None),
    ("DNA", None),
    ("A big city in the north", None),
    ("C4 植物", None),
    # cue and letter
    ("答案：B", "B"),
    ("答案是C", "C"),
    ("答案为 D", "D"),
    ("正确答案是：A", "A"),
    ("所以答案选B", "B"),
    ("故选C", "C"),
    ("故选：D。", "D"),
    ("应选A", "A"),
    ("我认为应该选择B", "B"),
    ("The answer is C.", "C"),
    ("the answer is: D", "D"),
    ("Answer: A", "A"),
    ("I choose (B)", "B"),
    ("正确选项为“C”", "C"),
    ("根据题意，答案是B，因为A不对", "B"),
    # negation
    ("不选A", None),
    ("答案不是B", None),
    ("the answer is not C", None),
    ("不是A，答案是B", "B"),
    # cues that disagree
    ("答案是A，或者答案是B", None),
    # one stand-alone letter somewhere
    ("经过分析，B 是对的", "B"),
    ("最合适的是（D）这一项", "D"),
    ("应当是C。C最大", "C"),
    ("A不对，B也不对", None),
    # option text
    ("上海市", "B"),
    ("上海市是最大的城市", "B"),
    ("这座城市是深圳市。", "D"),
    ("不是北京市就是上海市", None),
    # self-started next question is cut off
    ("C\n\n以下是中国关于语文考试的单项选择题", "C"),
    ("我不知道\n题目：哪一个？\nA. 甲\n答案：A", None),
    ("未知\n\n1. B", None),
    # nothing
    ("", None),
    ("   \n", None),
    ("不知道", None),
    ("E", None),
    ("1234", None),
    ("答案：", None),
]


@pytest.mark.parametrize(("output", "expected"), CASES)
def test_one_answer_or_none(output: str, expected: str | None) -> None:
    assert extract_answer(output, OPTIONS) == expected


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("A B C D", None),
        ("A\nB\nC\nD", None),
        ("A;B;C;D", None),
        ("A；B", None),
        ("A|B", None),
        ("A | B | C | D.", None),
        ("(A) (B)", "A"),  # what stands in brackets is no bare letter
        ("答案：A B", None),
        ("Answer: B\nC\n", None),
        ("A\nB\nC\nD\n答案：C", "C"),
        ("A\nB\n因为不确定", None),
        # a letter and words after it
        ("A because", "A"),
        ("A\nExplanation: B is wrong", "A"),
        ("Answer: A\n\nB) ...", "A"),
        ("Answer: A\nB) 上海市", "A"),
        ("B\nA. 北京市\nB. 上海市", "B"),
        ("B\nA man walked", "B"),
        ("B; A错", "B"),
        ("B\nA and C are wrong", "B"),
        ("C\nA B 不对", "C"),
        # a letter said again
        ("B\nB\nB", "B"),
        ("B B\n不是A", "B"),
        ("答案：C\nC", "C"),
        # what is denied is no member
        ("It is not A\nB", "B"),
    ],
)
def test_bare_letters_side_by_side_are_a_list(output: str, expected: str | None) -> None:
    assert extract_answer(output, OPTIONS) == expected


def test_there_are_at_least_sixty_cases() -> None:
    assert len({output for output, _ in CASES}) >= 60


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("the lung and the liver", "D"),
        ("the lung.", "C"),
        ("It is the liver", "B"),
        ("It is the lung and the liver together", "D"),
        ("the lungs", None),
    ],
)
def test_the_longest_option_that_fits_wins(output: str, expected: str | None) -> None:
    assert extract_answer(output, ENGLISH) == expected


def test_two_equal_options_decide_nothing() -> None:
    assert extract_answer("42", ("42", "42", "7", "8")) is None


def test_an_option_that_is_a_number_is_not_found_inside_a_longer_number() -> None:
    assert extract_answer("125", ("12", "25", "7", "8")) is None
