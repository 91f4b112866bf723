"""Bits per byte against a loop over single tokens, and the verdict between two models."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy.stats import ttest_rel

from eval.held_out import DOUBT, HeldOutResult, TextArms, judge_arms, judge_held_out, read_held_out
from eval.held_out_scoring import HeldOutActor, iter_windows
from layerplan.config.corpus import CorpusConfig, DecontaminationConfig, SourceConfig
from layerplan.config.evaluation import EvaluationConfig, HeldOutConfig
from layerplan.config.run import RunConfig
from layerplan.corpus.build import build_token_store, may_hold
from layerplan.corpus.cleaning import normalize_text
from layerplan.corpus.decontamination import BenchmarkText, Hit, QuestionIndex, hash_held_out
from layerplan.corpus.on_the_fly import write_stream
from layerplan.errors import CorpusError, EvaluationError
from layerplan.pipeline.compare_texts import list_doubts
from layerplan.pipeline.judging import judge_asked_texts
from layerplan.pipeline.summary import print_answers
from layerplan.pipeline.texts import list_benchmark_texts
from layerplan.report.answer_tables import describe_texts, tabulate_texts
from layerplan.report.answers import read_answers
from layerplan.report.card import add_results
from layerplan.report.headline import list_clauses, say_headline
from layerplan.run_folder import RunFolder
from tests.scored_runs import finish_run, leave_scored_run
from tests.tiny_corpus import make_byte_tokenizer, make_text, write_jsonl


class TinyLm(torch.nn.Module):
    """Logits that depend on the token and on all tokens before it."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(vocab_size, vocab_size, generator=generator)

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> object:
        logits = self.table[input_ids].cumsum(1) / torch.arange(1, input_ids.shape[1] + 1)[None, :, None]
        return type("Output", (), {"logits": logits})()


def make_actor(model: torch.nn.Module) -> HeldOutActor:
    actor = object.__new__(HeldOutActor)
    actor._model, actor._device = model, torch.device("cpu")
    return actor


def make_result(nats: list[float], sizes: list[int], *, name: str = "t", text: str = "h") -> HeldOutResult:
    return HeldOutResult(
        name=name,
        text_sha256=text,
        model="m",
        weights_sha256=None,
        dtype="float32",
        window=8,
        bits_per_byte=sum(nats) / math.log(2) / sum(sizes),
        num_tokens=len(nats),
        document_nats=nats,
        document_bytes=sizes,
    )


@pytest.mark.parametrize("num_tokens", [1, 4, 7, 8, 9])
def test_windows_predict_every_token_once(num_tokens: int) -> None:
    predicted = [token for start, stop in iter_windows(num_tokens, 4) for token in range(start, stop)]
    assert predicted == list(range(num_tokens))


def test_a_uniform_model_needs_the_logarithm_of_its_vocabulary() -> None:
    model = TinyLm(16)
    model.table.zero_()
    assert make_actor(model).compute_nats([0, 3, 5, 9]) == pytest.approx(3 * math.log(16))


def test_the_negative_log_likelihood_is_the_naive_one() -> None:
    """One token at a time, each from a pass of its own over what stands before it."""
    model, ids, window = TinyLm(11), [1, 4, 2, 2, 9, 0, 7, 3, 10], 4
    fast = sum(
        make_actor(model).compute_nats([0, *ids][start : stop + 1]) for start, stop in iter_windows(len(ids), window)
    )
    slow = 0.0
    for position, token in enumerate(ids):
        first = position // window * window
        before = [0, *ids][first : position + 1]
        row = model(torch.tensor([before])).logits[0, -1].double()
        slow -= float(row[token] - torch.log(torch.exp(row).sum()))
    assert fast == pytest.approx(slow, rel=1e-6)


def test_models_are_compared_document_by_document() -> None:
    rng = np.random.default_rng(1)
    sizes = [int(size) for size in rng.integers(50, 500, 40)]
    base = [0.9 * size + noise for size, noise in zip(sizes, rng.normal(0, 30, 40))]
    better = [value - 0.05 * size for value, size in zip(base, sizes)]
    same = [value + noise for value, noise in zip(base, rng.normal(0, 1, 40))]
    first, second = judge_held_out(
        [
            (make_result(base, sizes, name="a"), make_result(better, sizes, name="a")),
            (make_result(base, sizes, name="b"), make_result(same, sizes, name="b")),
        ]
    )
    # the documents differ much, their differences hardly: only a paired comparison sees 0.05 nats per byte
    assert first.sentence.startswith("better than the base: ")
    assert first.trained - first.base == pytest.approx(-0.05 / math.log(2))
    assert first.difference_interval[0] == pytest.approx(first.difference_interval[1])
    assert first.adjusted_p == pytest.approx(2 * 2 / 2**40)  # no document differs from another: a sign test, two texts
    assert second.sentence.startswith("not distinguishable from the base")
    assert second.difference_interval[0] < 0 < second.difference_interval[1]


def test_a_single_document_gives_no_verdict() -> None:
    (verdict,) = judge_held_out([(make_result([10.0], [10]), make_result([5.0], [10]))])
    assert verdict.sentence.startswith("not judged, as 1 documents are too few")


def test_texts_that_cannot_be_judged_use_up_no_correction() -> None:
    rng = np.random.default_rng(4)
    base = [100.0] * 12
    trained = [value + noise for value, noise in zip(base, rng.normal(-3, 3, 12))]
    judged = (make_result(base, [100] * 12), make_result(trained, [100] * 12))
    (alone,) = judge_held_out([judged])
    assert alone.adjusted_p == pytest.approx(ttest_rel(trained, base).pvalue)
    few = (make_result([10.0], [10]), make_result([5.0], [10]))
    broken = (make_result(base, [100] * 12), make_result([*base[:11], math.nan], [100] * 12))
    first, second, third = judge_held_out([judged, few, broken])
    assert first.adjusted_p == alone.adjusted_p and (second.adjusted_p, third.adjusted_p) == (1.0, 1.0)
    assert second.difference_interval is None and third.difference_interval is None
    assert third.sentence.startswith("not judged, as the trained model's loss is not finite on 1 of 12 documents: nan")


@pytest.mark.parametrize(("num_documents", "spread"), [(10, 0.0), (15, 0.0), (20, 1.2)])
def test_equal_models_are_seldom_told_apart_and_p_and_interval_agree(num_documents: int, spread: float) -> None:
    rng, draws, found = np.random.default_rng(num_documents), 200, []
    for _ in range(draws):
        sizes = (50 + rng.lognormal(7, spread, num_documents)).astype(int)
        base = 0.7 * sizes
        trained = base + rng.normal(0, 0.02, num_documents) * sizes
        pair = (make_result(base.tolist(), sizes.tolist()), make_result(trained.tolist(), sizes.tolist()))
        (verdict,) = judge_held_out([pair])
        assert verdict.difference_interval is not None
        low, high = verdict.difference_interval
        found.append(verdict.adjusted_p < 0.05)
        assert found[-1] == (not low <= 0 <= high)
    assert np.mean(found) <= 0.05 + 3 * (0.05 * 0.95 / draws) ** 0.5


def test_other_documents_are_not_compared() -> None:
    with pytest.raises(EvaluationError, match="held-out text t: base and trained model were scored on different"):
        judge_held_out([(make_result([1.0], [1]), make_result([1.0], [1], text="other"))])


def test_seeds_of_both_sides_count_when_arms_are_compared() -> None:
    """Two seeds a side that differ by 0.02 bits and arms by 0.1: nothing is left of what single runs seem to tell."""
    rng, sizes = np.random.default_rng(3), [100] * 30
    hard = rng.normal(70, 10, 30)
    one, two = (
        [make_result((hard + shift + rng.normal(0, 0.1, 30)).tolist(), sizes) for shift in shifts]
        for shifts in ((0.0, 1.4), (7.0, 8.4))
    )
    (alone,) = judge_arms([TextArms(one[:1], two[:1], "one", "two")])
    (pooled,) = judge_arms([TextArms(one, two, "one", "two")])
    assert alone.sentence.startswith("worse than one: ") and pooled.sentence.startswith(
        "not distinguishable from one: "
    )
    assert pooled.trained - pooled.base == pytest.approx(7 / 100 / math.log(2), rel=0.01)
    assert alone.adjusted_p < 1e-20 < 0.05 < pooled.adjusted_p


def test_the_report_shows_scores_by_step(tmp_path: Path) -> None:
    from layerplan.report.scores import render_checkpoint_scores

    for label, share in (("base", 25.0), ("step_00000010", 30.0), ("step_00000020", 35.0)):
        folder = tmp_path / label
        (folder / "held_out").mkdir(parents=True)
        result = {"question_mean": share, "num_correct": int(share * 4), "num_asked": 400}
        (folder / "ceval.json").write_text(json.dumps({"ceval/logit": result}))
        (folder / "held_out" / "notes.json").write_text(json.dumps({"bits_per_byte": share / 10}))
    page = re.sub(r' data-label="[^"]*"', "", render_checkpoint_scores(tmp_path))
    assert "<th>ceval/logit</th><th>notes, bits per byte</th>" in page
    assert "<td>base</td><td>25.0 (100 of 400)</td><td>2.5000</td>" in page
    assert page.index("step_00000010") < page.index("step_00000020")


def test_compared_runs_get_a_sentence_per_text(tmp_path: Path) -> None:
    """The newest scores are not the run's own when it stopped on the way: its last step decides."""
    from layerplan.pipeline.compare_texts import judge_texts

    sizes = [100] * 20
    for run, factor in (("worse", 1.5), ("same", 1.0)):
        for label, share in (("base", 1.0), ("step_00000010", factor)):
            folder = tmp_path / run / "evaluation" / label
            (folder / "held_out").mkdir(parents=True)
            (folder / "ceval.json").write_text("{}")
            result = make_result([50 * share + index % 3 * (share - 1) for index in range(20)], sizes, name="notes")
            (folder / "held_out" / "notes.json").write_text(result.model_dump_json())
    with pytest.raises(EvaluationError, match=r"worse: has no training\.json; only finished runs can be compared"):
        judge_texts([tmp_path / "worse", tmp_path / "same"])
    for run in ("worse", "same"):
        finish_run(tmp_path / run, final_step=20)
    with pytest.raises(EvaluationError, match="step_00000020: has no scores; the run's last checkpoint was not scored"):
        judge_texts([tmp_path / "worse", tmp_path / "same"])
    for run in ("worse", "same"):
        finish_run(tmp_path / run, final_step=10)
    first, second, third = (each.line for each in judge_texts([tmp_path / "worse", tmp_path / "same"]))
    assert third.startswith("same against worse, notes: better than worse: 0.7213 against 1.")
    assert first.startswith("worse against its base, notes: worse than the base: 1.")
    assert second.startswith(
        "same against its base, notes: not distinguishable from the base: 0.7213 against 0.7213 bits per byte (+0.0000 [95 %: "
    )


def test_a_text_that_is_listed_no_more_is_judged_no_more(tmp_path: Path) -> None:
    """What was scored of it stays, and what was said of it goes; the other's p is its own, 2 / 2^20, again."""
    folder = RunFolder(leave_scored_run(tmp_path, right=4, bits={"old": 0.9, "notes": 1.1}))

    def judge(*names: str) -> list[tuple[str, float]]:
        held_out = [HeldOutConfig.model_validate({"name": name, "source": {"path": "x"}}) for name in names]
        judged = judge_asked_texts(folder, "step_00000010", EvaluationConfig(held_out=held_out))
        written = json.loads(folder.held_out_verdicts.read_text())
        assert written == [verdict.model_dump(mode="json") for verdict in judged]
        return [(verdict.name, verdict.adjusted_p) for verdict in judged]

    assert judge("old", "notes") == [("old", pytest.approx(4 / 2**20)), ("notes", pytest.approx(4 / 2**20))]
    assert judge("notes") == [("notes", pytest.approx(2 / 2**20))]
    assert [text.name for text in read_answers(tmp_path).held_out] == ["notes"]
    assert judge() == []
    assert read_answers(tmp_path).held_out == ()
    assert (folder.scores_of("step_00000010") / "held_out" / "old.json").exists()


def test_texts_that_the_corpus_may_contain_are_said_so_wherever_they_are_judged(tmp_path: Path) -> None:
    folder = RunFolder(leave_scored_run(tmp_path / "run", right=4, bits={"notes": 0.9}))
    held_out = [HeldOutConfig.model_validate({"name": "notes", "source": {"path": "x"}})]
    judge_asked_texts(folder, "step_00000010", EvaluationConfig(held_out=held_out))
    sure = read_answers(folder.root)
    assert say_headline(list_clauses(sure, [])) == "Better than its base on the text notes."
    assert (
        tabulate_texts(sure)[0][0] == "text not trained on" and tabulate_texts(sure)[1][0][0] == "notes (20 documents)"
    )
    judge_asked_texts(folder, "step_00000010", EvaluationConfig(held_out=held_out), in_doubt=True)
    answers = read_answers(folder.root)
    assert say_headline(list_clauses(answers, [])) == (
        "Better than its base on the text notes (which may be trained on)."
    )
    headings, rows = tabulate_texts(answers)
    assert headings[0] == "text" and rows[0][0] == "notes (20 documents, may be trained on)"
    assert describe_texts(answers)[0].endswith("20 documents); " + DOUBT + ".")
    assert DOUBT in add_results("# Card\n", answers, []) and "not trained on" not in add_results(
        "# Card\n", answers, []
    )
    out = StringIO()
    print_answers(answers, Console(file=out, width=400))
    assert DOUBT in out.getvalue() and "Text, before and after" in out.getvalue()
    assert list_doubts([folder.root], {folder.root: "run"}) == [f"run, notes: {DOUBT}"]


def test_the_corpus_is_kept_free_of_held_out_documents(tmp_path: Path):
    held = [make_text(number, 3000) for number in range(12)]
    write_jsonl(tmp_path / "held.jsonl", *({"id": f"h{number}", "text": text} for number, text in enumerate(held)))
    documents = {
        "other": make_text(100, 3000),
        "same": " " + held[3].replace(held[3][50], held[3][50] + "\n"),
        "inside": make_text(101, 3000) + held[7] + make_text(102, 3000),
        "most": held[9][:600],
        "a quotation": make_text(103, 3000) + held[10][:400],
    }
    write_jsonl(tmp_path / "raw.jsonl", *({"id": name, "text": text} for name, text in documents.items()))
    evaluation = {
        "benchmarks": [{"name": "ceval", "path": "builtin"}],
        "held_out": [{"name": "notes", "source": {"path": str(tmp_path / "held.jsonl")}}],
    }
    values = {"name": "free", "model": {"type": "scratch"}, "corpus": {"seq_len": 64}, "evaluation": evaluation}
    config = RunConfig.model_validate(values)
    texts = list_benchmark_texts(config)
    assert [text.id for text in texts][-12:] == [f"held_out/notes/h{number}" for number in range(12)]
    corpus = CorpusConfig(sources=[SourceConfig(path=str(tmp_path / "raw.jsonl"))], seq_len=64, validation_rows=0)
    tokenizer = make_byte_tokenizer(tmp_path)
    manifest = build_token_store(corpus, tokenizer, tmp_path / "store", questions=texts, report=lambda line: None)
    assert manifest.counts == {"in": 5, "kept": 2, "contaminated": 3}
    lines = [json.loads(line) for line in (tmp_path / "store" / "contaminated.jsonl").read_text().splitlines()]
    assert {line["document"]: line["question"] for line in lines} == {
        "same": "held_out/notes/h3",
        "inside": "held_out/notes/h7",
        "most": "held_out/notes/h9",
    }


def test_held_out_documents_are_found_in_whatever_form(tmp_path: Path):
    """Decomposed letters, and one of a hundred thousand characters that is known by a sample of its n-grams."""
    decomposed = unicodedata.normalize("NFD", "Tiếng Việt có dấu thanh và nguyên âm đôi, ví dụ như ở đây. " * 3)
    long = make_text(1, 300_000)
    held = [BenchmarkText(name, text, is_held_out=True) for name, text in (("nfd", decomposed), ("long", long))]
    index = QuestionIndex(held, DecontaminationConfig())
    assert index.find(normalize_text(decomposed)) == Hit("nfd", 1.0)
    assert index.find(make_text(2, 3000) + long[:90_000]).question == "long"  # type: ignore[union-attr]
    three_quarters = index.find(long[:75_000])
    assert three_quarters is not None
    assert three_quarters.share == pytest.approx(0.75, abs=0.1)
    assert index.find(long[:25_000]) is None


@pytest.mark.parametrize("mode", ["store", "on_the_fly"])
def test_a_held_out_text_may_be_named_later(mode: str, tmp_path: Path):
    """A store built before that is used as it is, and the user is told."""
    write_jsonl(tmp_path / "raw.jsonl", *({"id": str(number), "text": make_text(number, 900)} for number in range(40)))
    fields = {"seq_len": 64, "validation_rows": 0, "mode": mode, "deduplicate": mode == "store"}
    config = CorpusConfig.model_validate({"sources": [{"path": str(tmp_path / "raw.jsonl")}], **fields})
    tokenizer = make_byte_tokenizer(tmp_path)
    build = build_token_store if mode == "store" else write_stream
    question = BenchmarkText("ceval/1", make_text(99))
    held = BenchmarkText("held_out/notes/3", make_text(3, 900), is_held_out=True)
    said: list[str] = []
    first = build(config, tokenizer, tmp_path / "store", questions=[question], report=lambda line: None)
    assert build(config, tokenizer, tmp_path / "store", questions=[question, held], report=said.append) == first
    assert any("was built without looking for these held-out documents" in line for line in said)
    assert may_hold(first, hash_held_out([question, held], config.decontamination))
    assert not may_hold(first, hash_held_out([question], config.decontamination))
    said.clear()
    fresh = build(config, tokenizer, tmp_path / "other", questions=[question, held], report=said.append)
    build(config, tokenizer, tmp_path / "other", questions=[question, held], report=said.append)
    assert not any("held-out" in line for line in said)
    assert fresh.counts.get("contaminated", 0) == (mode == "store")
    with pytest.raises(CorpusError, match="another corpus config"):
        build(config, tokenizer, tmp_path / "store", questions=[held], report=said.append)


def test_a_held_out_text_without_documents_is_refused(tmp_path: Path):
    write_jsonl(tmp_path / "held.jsonl", {"id": "a", "text": ""})
    item = HeldOutConfig.model_validate({"name": "notes", "source": {"path": str(tmp_path / "held.jsonl")}})
    with pytest.raises(EvaluationError, match=r"evaluation\.held_out: notes: .* holds no document"):
        read_held_out(item)


def test_long_documents_can_be_cut(tmp_path: Path):
    write_jsonl(tmp_path / "held.jsonl", {"id": "a", "text": "北京 is the capital"}, {"id": "b", "text": "one"})
    source = {"path": str(tmp_path / "held.jsonl")}
    item = HeldOutConfig.model_validate({"name": "notes", "source": source, "max_chars": 5})
    assert [document.text for document in read_held_out(item)] == ["北京 is", "one"]
