"""Probes and their spans: the project's lexicon, an AntSynNET folder, custom JSONL; three kinds of tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from layerplan.cli import build_parser
from layerplan.config.load import load_config
from layerplan.config.trace import TraceConfig
from layerplan.errors import ProbeError
from layerplan.tracer.encode import encode_probes, make_batches
from layerplan.tracer.lexicon import load_antsynnet, load_builtin_lexicon
from layerplan.tracer.pool import check_complete, describe_time
from layerplan.tracer.probes import GROUPS, Probe, collect_probes, load_probes, make_probes

KINDS = ["byte_level_bpe", "sentencepiece", "wordpiece"]
PROMPT = "Example:good->Bad, été-Hiver; Query:bad->"
PROBE = Probe("g/0", "g", PROMPT, "Good", PROMPT.index("Query:"))


def train(kind: str, texts: list[str]) -> Any:
    if kind == "byte_level_bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    elif kind == "sentencepiece":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        trainer = trainers.UnigramTrainer(
            vocab_size=400, special_tokens=["<unk>", "<s>"], unk_token="<unk>", show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(
            vocab_size=600, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False
        )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    if kind == "sentencepiece":
        bos = [("<s>", tokenizer.token_to_id("<s>"))]
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=bos)
    if kind == "wordpiece":
        marks = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module")
def probes() -> list[Probe]:
    return make_probes(load_builtin_lexicon(), per_group=20, style="mixed", seed=0)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def tokenizer(kind: str, probes: list[Probe]) -> Any:
    return train(kind, [probe.prompt + probe.answer for probe in probes] + [PROMPT])


def test_context_and_query_cover_their_characters_on_every_tokenizer(
    kind: str, tokenizer: Any, probes: list[Probe]
) -> None:
    for probe, encoded in zip([PROBE, *probes], encode_probes([PROBE, *probes], tokenizer)):
        offsets = tokenizer(probe.prompt, return_offsets_mapping=True)["offset_mapping"][: len(encoded.input_ids)]
        context = [span for span, inside in zip(offsets, encoded.is_context) if inside]
        query = [span for span, inside in zip(offsets, encoded.is_context) if not inside and span[0] < span[1]]
        covered = {index for start, end in context for index in range(start, end) if probe.prompt[index].strip()}
        asked = {index for start, end in query for index in range(start, end) if probe.prompt[index].strip()}
        whole = {index for index, character in enumerate(probe.prompt) if character.strip()}
        assert covered == {index for index in whole if index < probe.context_end}
        assert asked == {index for index in whole if index >= probe.context_end}
        assert not encoded.is_context[-1], "the last position belongs to the query"


def test_special_tokens_belong_to_no_span_and_none_follows_the_prompt(kind: str, tokenizer: Any) -> None:
    (encoded,) = encode_probes([PROBE], tokenizer)
    first = tokenizer.convert_ids_to_tokens(encoded.input_ids[0])
    assert encoded.is_context[0] == (first not in ("<s>", "[CLS]"))
    assert (first in ("<s>", "[CLS]")) == (kind != "byte_level_bpe")
    assert "[SEP]" not in tokenizer.convert_ids_to_tokens(encoded.input_ids)


def test_the_gold_token_is_the_one_that_would_follow(kind: str, tokenizer: Any) -> None:
    (encoded,) = encode_probes([PROBE], tokenizer)
    whole = tokenizer(PROMPT + "Good", return_offsets_mapping=True)
    following = next(
        token
        for token, (start, end) in zip(whole["input_ids"], whole["offset_mapping"])
        if end > len(PROMPT) and start >= len(PROMPT)
    )
    assert encoded.gold_id == following
    if kind == "sentencepiece":
        # alone, a word gets the mark of a beginning that it does not have behind an arrow
        assert encoded.gold_id != tokenizer("Good", add_special_tokens=False)["input_ids"][0]


@pytest.mark.parametrize(
    ("probe", "words"),
    [
        (Probe("g/7", "g", "   Query:a->", "b", 3), "probe g/7: no token lies in its context"),
        (Probe("g/8", "g", "Example:a->b; ", "b", 14), "probe g/8: no token lies in its query"),
        (Probe("g/9", "g", PROMPT, "", PROBE.context_end), "probe g/9: its answer '' has no token"),
    ],
)
def test_a_span_that_covers_no_token_is_an_error_with_the_probes_id(
    kind: str, tokenizer: Any, probe: Probe, words: str
) -> None:
    with pytest.raises(ProbeError, match=words):
        encode_probes([probe], tokenizer)


def test_a_prompt_longer_than_the_models_positions_is_named(kind: str, tokenizer: Any) -> None:
    (encoded,) = encode_probes([PROBE], tokenizer)
    length = len(encoded.input_ids)
    assert encode_probes([PROBE], tokenizer, length)
    with pytest.raises(ProbeError, match=f"probe g/0: has {length} tokens, the model {length - 1} positions"):
        encode_probes([PROBE], tokenizer, length - 1)


def test_batches_hold_one_length_each_and_every_probe_once(tokenizer: Any, probes: list[Probe]) -> None:
    encoded = encode_probes(probes, tokenizer)
    batches = make_batches(encoded, 7)
    assert sorted(probe.id for batch in batches for probe in batch) == sorted(probe.id for probe in probes)
    assert all(len({len(probe.input_ids) for probe in batch}) == 1 and len(batch) <= 7 for batch in batches)
    assert make_batches(encoded[::-1], 7) == batches


def test_every_fourth_probe_of_a_group_checks_the_other_mask(tokenizer: Any, probes: list[Probe]) -> None:
    encoded = encode_probes(probes, tokenizer, mask_check_every=4)
    for group in {probe.group for probe in probes}:
        flags = [probe.checks_mask for probe in encoded if probe.group == group]
        assert flags == [number % 4 == 0 for number in range(len(flags))]
    assert all(probe.checks_mask for probe in encode_probes(probes, tokenizer))


def test_the_lexicon_has_600_pairs_over_its_groups_and_every_group_can_fill_50() -> None:
    lexicon = load_builtin_lexicon()
    pairs = {(name, pair) for name, values in vars(lexicon).items() for pair in values}
    assert len(pairs) == sum(map(len, vars(lexicon).values())) >= 600
    assert all(len(values) >= 50 for values in vars(lexicon).values())
    assert all(first.strip() == first and second.strip() == second != first for _, (first, second) in pairs)
    assert len({probe.prompt for probe in make_probes(lexicon, per_group=50, style="mixed", seed=0)}) == 500


def test_queries_are_drawn_by_the_seed_and_answers_are_right() -> None:
    lexicon = load_builtin_lexicon()
    drawn = [
        {p.prompt[p.context_end :] for p in make_probes(lexicon, per_group=20, style="mixed", seed=s)} for s in (0, 1)
    ]
    assert len(drawn[0] & drawn[1]) < len(drawn[0]) * 0.7
    antonyms = {*lexicon.adjective_antonyms}
    for probe in make_probes(lexicon, per_group=50, style="mixed", seed=2):
        words = probe.prompt[probe.context_end + len("Query:") : -2].split()
        if probe.group == "adjective_antonym_capitalise":
            assert (words[0], probe.answer.lower()) in antonyms
        if probe.group == "choose_adjective_antonym":
            assert len(words) == 3 and probe.answer in words[1:] and (words[0], probe.answer) in antonyms
            (other,) = {*words[1:]} - {probe.answer}
            assert not {(words[0], other), (other, words[0])} & antonyms
        if probe.group == "choose_last_antonym":
            assert (words[2], probe.answer) in antonyms
        if probe.group == "choose_last_capitalise":
            assert probe.answer == words[2].capitalize()
        if probe.group == "choose_last_first_letter":
            assert probe.answer == words[2][0]
        if probe.group == "antonym_french":
            assert (words[0], probe.answer) in lexicon.antonyms_french


def test_an_antsynnet_folder_is_read_and_its_faults_are_named(tmp_path: Path, data_dir: Path) -> None:
    lexicon = load_antsynnet(data_dir / "antsynnet")
    assert ("good", "awful") in lexicon.adjective_antonyms and ("innocent", "harmless") in lexicon.adjective_synonyms
    assert len(lexicon.noun_antonyms) > 1000 and lexicon.antonyms_french == load_builtin_lexicon().antonyms_french
    probes = collect_probes(TraceConfig(probes=str(data_dir / "antsynnet"), probes_per_group=3))
    assert len(probes) == 3 * len(GROUPS)
    with pytest.raises(ProbeError, match=r"no adjective-pairs\.\* file"):
        load_antsynnet(tmp_path)
    for kind in ("adjective", "noun", "verb"):
        (tmp_path / f"{kind}-pairs.train").write_text("hot\tcold\t1\nhot\twarm\n", encoding="utf-8")
    with pytest.raises(ProbeError, match=r"adjective-pairs\.train:2: expected two words and 0 or 1, got 'hot\\twarm'"):
        load_antsynnet(tmp_path)


def test_the_probes_option_of_the_job_names_the_field() -> None:
    args = build_parser("trace").parse_args(
        ["trace", "--config", "x", "--set", "seed=5", "--probes", "/words/antsynnet"]
    )
    quickstart = Path(__file__).resolve().parents[2] / "jobs" / "configs" / "quickstart_scratch.yaml"
    config = load_config(str(quickstart), args.set)
    assert (config.seed, config.trace.probes) == (5, "/words/antsynnet")


def test_custom_probes_may_say_where_their_context_ends(tmp_path: Path) -> None:
    path = tmp_path / "probes.jsonl"
    line = {"id": "x", "group": "g", "prompt": "Paris: France. Rome:", "answer": " Italy", "context_end": 15}
    path.write_text(json.dumps(line), encoding="utf-8")
    assert load_probes(path) == [Probe("x", "g", "Paris: France. Rome:", " Italy", 15)]
    for end, words in ((99, "context_end=99 must be a number from 0 to 20"), (0, "has no context"), (20, "empty")):
        path.write_text(json.dumps(line | {"context_end": end}), encoding="utf-8")
        with pytest.raises(ProbeError, match=f"probe x: .*{words}"):
            load_probes(path)
    path.write_text("\n".join([json.dumps(line)] * 2), encoding="utf-8")
    with pytest.raises(ProbeError, match=r"probe x: .* holds 2 probes of this id"):
        load_probes(path)


def test_a_result_that_is_missing_or_counted_twice_is_an_error() -> None:
    check_complete(["a", "b"], ["b", "a"])
    with pytest.raises(ProbeError, match=r"1 results for 2 probes; missing \['b'\]"):
        check_complete(["a", "b"], ["a"])
    with pytest.raises(ProbeError, match=r"3 results for 2 probes; .* measured twice or unknown \['b'\]"):
        check_complete(["a", "b"], ["a", "b", "b"])


def test_the_line_on_time_adds_up_and_begins_with_the_largest_part() -> None:
    seconds = [{"JS": 1.0, "zero mask": 2.0}, {"JS": 1.0, "zero mask": 3.0, "mean mask": 3.0}, {"JS": None}]
    assert describe_time(seconds) == (
        "3 probes took 10.0 s of the tracing processes: zero mask 50%, mean mask 30%, JS 20%"
    )
