"""Zero-shot prompts, byte for byte as the benchmarks' authors write them: full-width colons, nothing stripped."""

from __future__ import annotations

from eval.items import LETTERS, Question

_HEADERS = {
    "ceval": "以下是中国关于{subject}考试的单项选择题，请选出其中的正确答案。\n\n{question}\n",
    "cmmlu": "以下是关于{subject}的单项选择题，请直接给出正确答案的选项。\n\n题目：{question}\n",
}
_CUES = {"ceval": "答案：", "cmmlu": "答案是："}
PROMPT_VERSION = 1


def format_prompt(benchmark: str, question: Question) -> str:
    """Returns the prompt; it ends right where the answer letter follows."""
    header = _HEADERS[benchmark].format(subject=question.subject_zh, question=question.question)
    choices = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, question.choices))
    return header + choices + _CUES[benchmark]


def describe_template(benchmark: str) -> str:
    """The template itself, for the protocol id."""
    return _HEADERS[benchmark] + "".join(f"{letter}. {{{letter}}}\n" for letter in LETTERS) + _CUES[benchmark]
