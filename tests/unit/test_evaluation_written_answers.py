"""Answers as models write them, read by hand: which letter a person would mark, or that none is given."""

from __future__ import annotations

import pytest

from eval.extraction import extract_answer

CITIES = ("北京市", "上海市", "广州市", "深圳市")

ANSWERED = [
    # lower case, where a phrase makes it an answer
    ("answer: b", "B"),
    ("Answer: c.", "C"),
    ("The answer is d", "D"),
    ("the answer is (a)", "A"),
    ("The correct answer is a.", "A"),
    ("The answer is a because it is the largest", "A"),
    ("Answer: a) the largest one", "A"),
    ("答案：b", "B"),
    ("答案是c。", "C"),
    ("答案是d选项", "D"),
    ("我选b", "B"),
    ("I would choose c", "C"),
    # an article is no answer, and what follows may be one
    ("The answer is a tie between the first two, so B", "B"),
    ("The answer is a city in the south: D", "D"),
    ("A closer look at the map shows that C is right", "C"),
    # emphasis
    ("答案：**B**，因为A错", "B"),
    ("**答案：C**", "C"),
    ("**答案：**\n\nD", "D"),
    ("__B__", "B"),
    ("The answer is **C**.", "C"),
    ("**Answer:** `D`", "D"),
    ("### 答案\nB", "B"),
    # brackets of all widths
    ("【答案】B【解析】A错", "B"),
    ("[答案] C [解析] 略", "C"),
    ("答案：「D」", "D"),
    ("答案：〔A〕", "A"),
    ("正确答案是（Ｃ）", "C"),
    ("答案［B］", "B"),
    ("<answer>D</answer>", "D"),
    ("故答案为：《C》", "C"),
    # LaTeX
    (r"答案是\boxed{C}，A不对", "C"),
    (r"$\boxed{B}$", "B"),
    (r"\boxed{\text{D}}", "D"),
    (r"The final answer is $\boxed{\textbf{(A)}}$.", "A"),
    (r"Therefore \boxed{c}", "C"),
    # words between the phrase and the letter
    ("正确答案是选项B。选项A错误", "B"),
    ("答案应该是选项 C", "C"),
    ("答案：选B", "B"),
    ("答案：应选（D）", "D"),
    ("答案显然是A，其他都不合适", "A"),
    ("答案就是D。", "D"),
    ("答案为：选项“C”", "C"),
    ("正确选项应该是B", "B"),
    ("The correct answer would be option C.", "C"),
    ("The answer to this question is B.", "B"),
    ("My final answer is choice D", "D"),
    ("The best option is (C).", "C"),
    ("The answer is most likely A", "A"),
    # others are named as wrong
    ("A错误，B正确", "B"),
    ("选项A不正确，选项C正确", "C"),
    ("A、B、C都不对，D才对", "D"),
    ("A and C are wrong, so it must be D.", "D"),
    ("A is wrong. B is right.", "B"),
    ("答案不是A，而是C", "C"),
    ("答案是B不是A", "B"),
    ("答案：B，A错", "B"),
    ("除了A，都是C的特点", "C"),
    ("The answer is not C, it is D", "D"),
    ("不选A，应选D", "D"),
    ("A选项有误，因此选B选项", "B"),
    ("选C不选D", "C"),
    ("I'd say A (not B)", "A"),
    ("以下说法不正确的是C", "C"),
    # which one counts: what is named as the answer stands above what is named as a choice, and that above a bare letter
    ("有人选A，但正确答案是B", "B"),
    ("Option A looks good, but the answer is D", "D"),
    ("比较B和C之后，选择C", "C"),
    ("A is the correct answer", "A"),
    # the options written out again before the answer
    ("A. 北京 B. 上海 C. 广州 D. 深圳，答案：C", "C"),
    # an option's text
    ("答案是上海市，北京市是首都", "B"),
    ("答案：广州市（不是深圳市）", "C"),
    # a thought that is over
    ("<think>\n\n</think>\n\nB", "B"),
    ("<think>A不对</think>答案：D", "D"),
]
UNANSWERED = [
    # articles and words
    "a",
    "The answer is a big city in the north",
    "Answer: a place by the sea",
    "Answer: A place by the sea",
    "answer a question first",
    "I choose a different city",
    "b 是拉丁字母",
    "答案是d轨道电子",
    "ABCD",
    "Cannot decide",
    # several
    "答案是A，或者答案是B",
    "答案是A还是B？",
    "答案：A、C",
    "The answer is A or B",
    r"\boxed{A} 或 \boxed{B}",
    "answer: b or c",
    "A or C",
    "A对，B也对",
    "可能是B，也可能是D",
    "A. 北京\nB. 上海\nC. 广州\nD. 深圳",
    # denied, asked, or not believed
    "答案不是B",
    "答案并非C",
    "我不认为答案是A",
    "I don't think the answer is A",
    "I am not sure that the answer is B",
    "不确定答案是C",
    "答案是A吗",
    "答案A是错的",
    "选项D错误",
    "A不对，B也不对",
    "Option C is incorrect",
    "排除A",
    "不是上海市",
    "除了B",
    "The answer isn't B",
    # cut off, or of something else
    "答案：",
    "【答案】【解析】略",
    r"\boxed{}",
    "解：设x为所求",
    "The answer is",
    "答案是E",
    "我无法回答这个问题",
]


@pytest.mark.parametrize(("output", "letter"), ANSWERED)
def test_the_letter_a_person_would_mark_is_read(output: str, letter: str) -> None:
    assert extract_answer(output, CITIES) == letter


@pytest.mark.parametrize("output", UNANSWERED)
def test_no_letter_is_read_where_a_person_would_mark_none(output: str) -> None:
    assert extract_answer(output, CITIES) is None
