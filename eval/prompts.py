"""Prompts byte for byte: the authors' own templates, or lm-evaluation-harness's for scores like the published ones.

`official` is what the benchmarks' authors print (Huang et al. 2023; Li et al. 2024): full-width colons, nothing stripped,
no chat template, the bare letter as the answer. `lm_eval` is the template of lm-evaluation-harness 0.4.13: it has
no "考试" and no "题目：", strips the question, and answers with a space before the letter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from eval.items import LETTERS, Benchmark, Question


@dataclass(frozen=True)
class Template:
    """How one benchmark's questions become text."""

    header: str
    question: str
    cue: str
    answer_prefix: str = ""
    """What stands between the cue and the letter."""
    strips_question: bool = False


TEMPLATES = {
    ("official", "ceval"): Template(
        header="以下是中国关于{subject}考试的单项选择题，请选出其中的正确答案。\n\n",
        question="{question}\n",
        cue="答案：",
    ),
    ("official", "cmmlu"): Template(
        header="以下是关于{subject}的单项选择题，请直接给出正确答案的选项。\n\n",
        question="题目：{question}\n",
        cue="答案是：",
    ),
    ("lm_eval", "ceval"): Template(
        header="以下是中国关于{subject}的单项选择题，请选出其中的正确答案。\n\n",
        question="{question}\n",
        cue="答案：",
        answer_prefix=" ",
        strips_question=True,
    ),
    ("lm_eval", "cmmlu"): Template(
        header="以下是关于{subject}的单项选择题，请直接给出正确答案的选项。\n\n",
        question="{question}\n",
        cue="答案：",
        answer_prefix=" ",
        strips_question=True,
    ),
}


def format_prompt(
    benchmark: str, question: Question, *, style: str = "official", examples: Sequence[Question] = ()
) -> str:
    """Returns the prompt; it ends right where the answer follows.

    Args:
        benchmark: `ceval` or `cmmlu`.
        question: What is asked.
        style: `official` or `lm_eval`.
        examples: Solved questions shown before it, each with its answer and a blank line.
    """
    template = TEMPLATES[style, benchmark]
    solved = "".join(
        _format_body(template, example) + template.answer_prefix + example.answer + "\n\n" for example in examples
    )
    return template.header.format(subject=question.subject_zh) + solved + _format_body(template, question)


def format_prompts(benchmark: Benchmark, *, style: str) -> list[str]:
    """All prompts of a benchmark in order, with the examples it was loaded with."""
    return [
        format_prompt(benchmark.name, question, style=style, examples=benchmark.examples.get(question.subject, ()))
        for question in benchmark.questions
    ]


def describe_template(benchmark: str, style: str) -> dict[str, object]:
    """The template itself, for the protocol id."""
    return asdict(TEMPLATES[style, benchmark])


def _format_body(template: Template, question: Question) -> str:
    text = question.question.strip() if template.strips_question else question.question
    choices = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, question.choices))
    return template.question.format(question=text) + choices + template.cue
