"""What prompts share is computed once, and no number moves: against each prompt read alone and whole by `transformers`."""

from __future__ import annotations

from random import Random

import pytest
import torch

from eval.next_token import NextTokenReader
from eval.shared_prefix import PrefixGroup, group_by_prefix, split_members
from tests.families import make_model
from tests.small_families import OTHERS, WINDOWED, build_family

LETTERS = (30, 31, 32, 33)


def make_prompts(seed: int = 0) -> list[list[int]]:
    """Three subjects of five questions: 20 to 30 shared tokens, beyond every window of 8, then 3 to 40 of their own."""
    draw = Random(seed)
    prompts = []
    for subject in range(3):
        shared = [40 + subject, *(draw.randrange(3, 128) for _ in range(19 + 5 * subject))]
        prompts += [[*shared, *(draw.randrange(3, 128) for _ in range(3 + draw.randrange(38)))] for _ in range(5)]
    draw.shuffle(prompts)
    return prompts


def read_letters(reader: NextTokenReader, prompts: list[list[int]]) -> torch.Tensor:
    found = torch.full((len(prompts), len(LETTERS)), float("nan"))
    with torch.inference_mode():
        for batch, logits in reader.read(prompts):
            assert found[batch].isnan().all(), "each prompt is read once"
            found[batch] = torch.log_softmax(logits, -1)[:, list(LETTERS)]
    return found


def read_alone(model: torch.nn.Module, prompts: list[list[int]]) -> torch.Tensor:
    """The oracle: one prompt at a time, from its first token to its last, every position's logits."""
    with torch.inference_mode():
        logits = [model(torch.tensor([ids]), use_cache=False).logits[0, -1] for ids in prompts]
    return torch.log_softmax(torch.stack(logits), -1)[:, list(LETTERS)]


@pytest.mark.parametrize("family", [*WINDOWED, *OTHERS])
def test_letters_are_those_of_each_prompt_read_alone_and_a_beginning_is_computed_once(family: str) -> None:
    model, prompts = build_family(family), make_prompts()
    reader = NextTokenReader(model, LETTERS, torch.device("cpu"))
    found = read_letters(reader, prompts)
    assert (found - read_alone(model, prompts)).abs().max() < 1e-4
    wanted = sum(map(len, prompts))
    assert reader.tokens_computed < 0.9 * wanted, "comparing included"
    before = reader.tokens_computed
    assert (read_letters(reader, prompts) - found).abs().max() < 1e-5
    assert reader.tokens_computed - before < 0.75 * wanted, "what was compared once is not compared again"


@pytest.mark.parametrize(
    ("family", "said"),
    [("jamba", "e-02, 1e-04 is rounding"), ("mamba", "has no attribute 'past_key_values'")],
)
def test_a_model_that_cannot_go_on_after_a_beginning_is_read_whole_with_one_line(
    family: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Jamba's Mamba layers begin anew, whatever state they are given; Mamba hands none out."""
    model, prompts = make_model(family), make_prompts()
    reader = NextTokenReader(model, LETTERS, torch.device("cpu"))
    found = read_letters(reader, prompts)
    assert (found - read_alone(model, prompts)).abs().max() < 1e-4
    (line,) = [record.getMessage() for record in caplog.records if record.name == "eval.next_token"]
    assert line.startswith("prompts are read whole") and said in line


def test_a_longer_prompt_than_any_compared_is_compared_before_it_is_believed(caplog: pytest.LogCaptureFixture) -> None:
    """A model that forgets all but the last 40 tokens it kept: right for short prompts, wrong for long ones."""
    model = build_family("qwen3")
    forward = model.forward

    def forget(*args: object, past_key_values: object = None, **kwargs: object) -> object:
        if past_key_values is not None:
            for layer in past_key_values.layers:  # type: ignore[attr-defined]
                layer.keys[..., :-40, :] = 0
        return forward(*args, past_key_values=past_key_values, **kwargs)

    model.forward = forget  # type: ignore[method-assign, assignment]
    short = [ids[:35] for ids in make_prompts()]
    long = [[7, 8, 9] * 20 + ids for ids in short]
    reader = NextTokenReader(model, LETTERS, torch.device("cpu"))
    read_letters(reader, short)
    assert not caplog.records
    assert (read_letters(reader, long) - read_alone(model, long)).abs().max() < 1e-4
    assert ["read whole" in record.getMessage() for record in caplog.records] == [True]


def test_what_was_kept_serves_the_prompts_of_a_later_batch() -> None:
    """The pool hands out 64 prompts at a time; a subject of 170 reads its beginning once."""
    model, shared = build_family("qwen3"), list(range(10, 60))
    prompts = [[*shared, 60 + index, 90 + index] for index in range(12)]
    reader = NextTokenReader(model, LETTERS, torch.device("cpu"))
    read_letters(reader, prompts[:6])
    before = reader.tokens_computed
    found = read_letters(reader, prompts[6:])
    assert reader.tokens_computed - before == 6 * 2
    assert (found - read_alone(model, prompts[6:])).abs().max() < 1e-4


def test_groups_are_those_that_save_most_and_the_longest_prompt_comes_first() -> None:
    """By hand: four of a subject share 5 tokens, which saves 15; two of them share 7, which alone would save 7."""
    subject = [[1, 2, 3, 4, 5, *rest] for rest in ([6, 7, 8], [6, 7, 9, 9], [10], [11, 12])]
    other = [[1, 2, 20, 21, 22, 23], [1, 2, 20, 21, 22, 24, 25, 26, 27, 28]]
    alone = [[1, 30], [40, 41, 42]]
    prompts = [*subject, *other, *alone]
    assert group_by_prefix(prompts, min_saved=4) == [
        PrefixGroup(5, (5, 4)),
        PrefixGroup(5, (1, 0, 3, 2)),
        PrefixGroup(0, (7,)),
        PrefixGroup(0, (6,)),
    ]
    assert [group.num_shared for group in group_by_prefix(prompts, min_saved=6)] == [0, 5, 0, 0, 0]
    near = [[1, 2, 3, 4, 5, 6, 7, 8, 9, index] for index in range(4)] + [[1, 2, 50], [1, 2, 51]]
    assert [(group.num_shared, len(group.members)) for group in group_by_prefix(near, min_saved=1)] == [(9, 4), (2, 2)]
    assert group_by_prefix([[1, 2, 3]] * 2, min_saved=1) == [PrefixGroup(2, (0, 1))], "a token of each is left to read"
    assert group_by_prefix([], min_saved=1) == []


def test_a_batch_is_bounded_by_its_tokens_by_what_it_holds_and_by_padding() -> None:
    lengths = [30, 29, 28, 20, 19, 12]
    group = PrefixGroup(10, tuple(range(6)))
    free = {"max_rest_tokens": 1000, "max_held_tokens": 1000, "max_padding": 100}
    assert split_members(group, lengths, **free) == [[0, 1, 2, 3, 4, 5]]
    assert split_members(group, lengths, **free | {"max_padding": 2}) == [[0, 1, 2], [3, 4], [5]]
    assert split_members(group, lengths, **free | {"max_rest_tokens": 40}) == [[0, 1], [2, 3], [4, 5]]
    assert split_members(group, lengths, **free | {"max_held_tokens": 60}) == [[0, 1], [2, 3], [4, 5]]
    assert split_members(group, lengths, **free | {"max_rest_tokens": 1}) == [[0], [1], [2], [3], [4], [5]]
