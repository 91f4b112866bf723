"""Prompts byte for byte, and benchmark folders that are not what they should be."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from eval.csv_table import read_table
from eval.encoding import find_answer_tokens
from eval.items import Benchmark, Question, load_benchmark
from eval.prompts import format_prompt
from layerplan.config.evaluation import BenchmarkConfig
from layerplan.errors import EvaluationError
from tests.hub_server import COMMIT, HubRepository, ask_hub_at, serving

QUESTION = Question(
    "law/1", "law", "法学", "Social Science", "下列说法{正确}的是____。 ", ("甲 ", "乙", "丙", "丁"), "C"
)


def write_benchmark(root: Path, rows: str, *, category: str = "Humanities", header: str | None = None) -> Path:
    (root / "val").mkdir(parents=True)
    (root / "subjects.json").write_text(json.dumps({"law": {"name_zh": "法学", "category": category}}))
    (root / "val" / "law.csv").write_text((header or "id,question,A,B,C,D,answer") + "\n" + rows, encoding="utf-8")
    return root


def load(root: Path, **options: object) -> Benchmark:
    return load_benchmark(BenchmarkConfig(name="ceval", path=str(root), **options))


def test_the_ceval_prompt_is_the_authors_byte_for_byte() -> None:
    assert format_prompt("ceval", QUESTION) == (
        "以下是中国关于法学考试的单项选择题，请选出其中的正确答案。\n\n下列说法{正确}的是____。 \n"
        "A. 甲 \nB. 乙\nC. 丙\nD. 丁\n答案："
    )


def test_the_cmmlu_prompt_is_the_authors_byte_for_byte() -> None:
    assert format_prompt("cmmlu", QUESTION) == (
        "以下是关于法学的单项选择题，请直接给出正确答案的选项。\n\n题目：下列说法{正确}的是____。 \n"
        "A. 甲 \nB. 乙\nC. 丙\nD. 丁\n答案是："
    )


def test_the_builtin_set_is_balanced_and_complete() -> None:
    benchmark = load_benchmark(BenchmarkConfig(name="ceval", path="builtin"))
    assert len(benchmark.questions) == 64
    assert len(benchmark.subjects) == 4
    for letter in "ABCD":
        assert 12 <= sum(question.answer == letter for question in benchmark.questions) <= 20
    assert len({question.question for question in benchmark.questions}) == 64


@pytest.mark.parametrize(("name", "questions", "subjects"), [("ceval", 1346, 52), ("cmmlu", 11582, 67)])
def test_the_real_benchmarks_are_whole(data_dir: Path, name: str, questions: int, subjects: int) -> None:
    benchmark = load_benchmark(BenchmarkConfig(name=name, path=str(data_dir / name)))
    assert (len(benchmark.questions), len(benchmark.subjects)) == (questions, subjects)


def test_a_real_benchmark_with_a_subject_missing_is_refused(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    subjects = json.loads((data_dir / "ceval" / "subjects.json").read_text())
    for subject in subjects:
        source = data_dir / "ceval" / "val" / f"{subject}.csv"
        (tmp_path / "val" / source.name).write_bytes(source.read_bytes())
    (tmp_path / "subjects.json").write_text(json.dumps(subjects))
    (tmp_path / "val" / "law.csv").unlink()
    with pytest.raises(EvaluationError, match=r"law\.csv: does not exist; every subject"):
        load(tmp_path)
    subjects.pop("law")
    (tmp_path / "subjects.json").write_text(json.dumps(subjects))
    with pytest.raises(EvaluationError, match="has 52 subjects and 1346 questions, this folder 51 and"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ("", {}, r"law\.csv: holds no question"),
        ("1,q,a,b,c,d,E\n", {}, "question 1: answer 'E' is not one of A, B, C, D"),
        ("1,q,a,b,c,d,\n", {}, "question 1: answer '' is not one of"),
        ("1,q,a,b,c,d\n", {"header": "id,question,A,B,C,D"}, "has no column answer; an unlabelled split"),
        ("1,q,a,b,c,d,A\n", {"category": "Magic"}, "needs name_zh and a category out of STEM"),
    ],
)
def test_a_malformed_folder_is_one_clear_error(tmp_path: Path, rows: str, options: dict[str, str], words: str) -> None:
    root = write_benchmark(tmp_path / "bench", rows, **options)
    with pytest.raises(EvaluationError, match=words):
        load(root, max_questions=1)


ROW = ("1", '甲乙，\n"丙"；丁', "a,b", "c;d", "e\tf", "g ", "B")
PLAIN = "id,question,A,B,C,D,answer"


def write_row(separator: str, row: tuple[str, ...], *, ends: str) -> str:
    made = io.StringIO(newline="")
    csv.writer(made, delimiter=separator, lineterminator=ends).writerow(row)
    return made.getvalue()


@pytest.mark.parametrize(
    ("header", "separator", "encoding", "ends", "key"),
    [
        (PLAIN, ",", "utf-8", "\n", "B"),
        (",Question,A,B,C,D,Answer", ",", "utf-8", "\n", "B"),  # CMMLU's own archive
        ("Unnamed: 0,Question,A,B,C,D,Answer", ",", "utf-8", "\n", "b"),
        (PLAIN, ",", "utf-8-sig", "\r\n", "B"),  # Excel
        (PLAIN, ";", "utf-8-sig", "\r\n", "Ｂ"),
        (PLAIN, "\t", "utf-16", "\r\n", " Ｂ\u3000"),
        ("answer,id,ＱUESTION, a ,b,c,d", ",", "utf-8", "\n", "ｂ"),
    ],
)
def test_a_file_is_read_as_its_authors_pandas_or_excel_wrote_it(
    tmp_path: Path, header: str, separator: str, encoding: str, ends: str, key: str
) -> None:
    row = (*ROW[:-1], key) if not header.startswith("answer") else (key, *ROW[:-1])
    root = write_benchmark(tmp_path, "")
    content = header.replace(",", separator) + ends + write_row(separator, row, ends=ends) + separator * 6 + ends
    (root / "val" / "law.csv").write_bytes(content.encode(encoding))
    [question] = load(root, max_questions=9).questions
    assert (question.id, question.answer) == ("law/1", "B")
    assert (question.question, *question.choices) == ROW[1:-1]


def test_ids_left_out_are_the_numbers_of_the_rows(tmp_path: Path) -> None:
    root = write_benchmark(tmp_path, "q,a,b,c,d,A\nr,a,b,c,d,B\n", header="question,A,B,C,D,answer")
    assert [item.id for item in load(root, max_questions=9).questions] == ["law/0", "law/1"]


@pytest.mark.parametrize(("folder", "name"), [("val", "law_val.csv"), ("val", "law.csv")])
def test_the_files_of_cevals_own_archive_are_found_by_their_names(tmp_path: Path, folder: str, name: str) -> None:
    root = write_benchmark(tmp_path, "1,q,a,b,c,d,A\n")
    (root / folder / "law.csv").rename(root / folder / name)
    assert len(load(root, max_questions=9).questions) == 1


def test_the_real_questions_saved_by_excel_are_the_same_questions(data_dir: Path, tmp_path: Path) -> None:
    """Byte-order mark, semicolons and carriage returns: the content hash of C-Eval stays its authors' own."""
    (tmp_path / "val").mkdir()
    shutil.copy(data_dir / "ceval" / "subjects.json", tmp_path)
    for source in (data_dir / "ceval" / "val").glob("*.csv"):
        with (
            source.open(encoding="utf-8", newline="") as handle,
            (tmp_path / "val" / source.name).open("w", encoding="utf-8-sig", newline="") as made,
        ):
            csv.writer(made, delimiter=";").writerows(csv.reader(handle))
    assert len(load(tmp_path).questions) == 1346


def test_a_header_that_is_not_wanted_is_shown_with_the_one_that_is(tmp_path: Path) -> None:
    root = write_benchmark(tmp_path, "1,q,a,b,c,d,A\n", header="no,text,A,B,C,D,key")
    with pytest.raises(EvaluationError) as caught:
        load(root)
    words = str(caught.value)
    assert "has no column question, answer" in words
    assert "'no', 'text', 'A', 'B', 'C', 'D', 'key'" in words and "id, question, A, B, C, D, answer" in words


def test_rows_that_do_not_fit_and_other_encodings_are_named(tmp_path: Path) -> None:
    root = write_benchmark(tmp_path, "1,q,a,b,c,d,A\n2,q, with a comma,a,b,c,d,A\n")
    with pytest.raises(EvaluationError, match=r"law\.csv: question 1 has 8 cells, the header 7; quote cells"):
        load(root)
    (root / "val" / "law.csv").write_text(f"{PLAIN}\n1,q,a,b\n")
    with pytest.raises(EvaluationError, match="question 0 has 4 cells, the header 7"):
        load(root)
    (root / "val" / "law.csv").write_text(f"{PLAIN}\n1,题目,a,b,c,d,A\n", encoding="gb18030")
    with pytest.raises(EvaluationError, match=r"is not UTF-8 .* at byte 29\); save it as `CSV UTF-8`.*GB18030"):
        load(root)


def test_a_folder_without_subjects_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"nowhere does not exist; a folder of CSV files is expected"):
        load(tmp_path / "nowhere")
    with pytest.raises(EvaluationError, match=r"val/accountant\.csv: does not exist; every subject must have its file"):
        load(tmp_path)


def test_a_changed_question_is_refused_unless_it_is_allowed(data_dir: Path, tmp_path: Path) -> None:
    """One digit of one choice: subjects, counts and categories are right, the content is not."""
    shutil.copytree(data_dir / "ceval" / "val", tmp_path / "val")
    shutil.copy(data_dir / "ceval" / "subjects.json", tmp_path)
    path = tmp_path / "val" / "law.csv"
    text = path.read_text(encoding="utf-8")
    path.write_text(text[:-3].replace("。", "！", 1) + text[-3:], encoding="utf-8")
    with pytest.raises(EvaluationError, match=r"the content hash is [0-9a-f]{64}, expected 6e3184a0") as caught:
        load(tmp_path)
    found = re.search("hash is ([0-9a-f]{64})", str(caught.value))
    assert found is not None
    for allowed in ("any", found.group(1)):
        assert load(tmp_path, content_sha256=allowed).content_sha256 == found.group(1)


def make_tokenizer(
    model: tokenizers.models.Model, normalizer: tokenizers.normalizers.Normalizer | None = None
) -> object:
    tokenizer = tokenizers.Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")


def test_letters_that_are_not_single_tokens_of_their_own_are_refused() -> None:
    known = make_tokenizer(tokenizers.models.WordLevel({"?": 0, "A": 1, "B": 2, "C": 3, "D": 4}, unk_token="?"))
    assert find_answer_tokens(known, "m", cue="", prefix="").letters == (1, 2, 3, 4)
    unknown = make_tokenizer(tokenizers.models.WordLevel({"?": 0, "A": 1, "B": 2}, unk_token="?"))
    with pytest.raises(EvaluationError, match="m: its tokenizer has no single token of its own for the answer 'C'"):
        find_answer_tokens(unknown, "m", cue="", prefix="")
    vocab = {"?": 0, "_": 1, "A": 2, "B": 3, "C": 4, "D": 5}
    split = make_tokenizer(tokenizers.models.BPE(vocab, [], unk_token="?"), tokenizers.normalizers.Prepend("_"))
    with pytest.raises(EvaluationError, match="no single token of its own for the answer 'A'"):
        find_answer_tokens(split, "m", cue="", prefix="")


def test_a_benchmark_from_the_hub_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set folder in the hub's layout, with CMMLU's column names; the second call reads the cache alone."""
    from eval import hub

    source = tmp_path / "repository"
    rows = "Question,A,B,C,D,Answer\n问,甲,乙,丙,丁,B\n"
    names = ("agronomy", "anatomy")
    for name in names:
        (source / name).mkdir(parents=True)
        (source / name / "test.csv").write_text(rows, encoding="utf-8")
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: test\n    path: {name}/test.csv\n" for name in names
    )
    (source / "README.md").write_text(f"---\nconfigs:\n{configs}---\n", encoding="utf-8")
    monkeypatch.setenv("LAYERPLAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    official = hub.load_official_subjects("cmmlu")
    monkeypatch.setattr(hub, "load_official_subjects", lambda name: {key: official[key] for key in names})
    folder = hub.fetch_benchmark("cmmlu", splits=["test"], repository=str(source))
    assert (folder / "test" / "anatomy.csv").read_text(encoding="utf-8") == (
        "id,question,A,B,C,D,answer\n0,问,甲,乙,丙,丁,B\n"
    )
    shutil.rmtree(source)
    assert hub.fetch_benchmark("cmmlu", splits=["test"], repository=str(source)) == folder
    with pytest.raises(EvaluationError, match="subject agronomy, split dev cannot be fetched from the hub"):
        hub.fetch_benchmark("cmmlu", splits=["dev"], repository=str(source))


@pytest.mark.parametrize("layout", ["{split}/{subject}.csv", "{split}/{subject}_{split}.csv"])
def test_a_benchmark_whose_script_is_not_run_any_more_is_read_out_of_its_archive(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CMMLU as it lies on the hub: a card, a loading script and an archive, read by the real client."""
    from eval import hub

    names = ("agronomy", "anatomy")
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as opened:
        for name in names:
            for split in ("dev", "test"):
                row = f',Question,A,B,C,D,Answer\r\n0,"{split}, 问",甲,乙,丙,丁,B\r\n'
                opened.writestr(layout.format(split=split, subject=name), row)
    files = {"README.md": b"# CMMLU", "cmmlu.py": b"raise SystemExit", "cmmlu_v1_0_1.zip": archive.getvalue()}
    official = hub.load_official_subjects("cmmlu")
    monkeypatch.setattr(hub, "load_official_subjects", lambda name: {key: official[key] for key in names})
    monkeypatch.setenv("LAYERPLAN_CACHE", str(tmp_path / "cache"))
    with serving(HubRepository("datasets", "haonan-li/cmmlu", {COMMIT: files})) as repository:
        ask_hub_at(repository.endpoint, tmp_path / "hf", monkeypatch)
        folder = hub.fetch_benchmark("cmmlu", splits=["test", "dev"])
        (row,) = read_table(folder / "dev" / "anatomy.csv")
        assert (row["id"], row["question"], row["answer"]) == ("0", "dev, 问", "B")
        repository.requests.clear()
        assert hub.fetch_benchmark("cmmlu", splits=["test", "dev"]) == folder and repository.requests == []
        with pytest.raises(EvaluationError, match=r"cmmlu_v1_0_1.zip: holds no val/agronomy.csv"):
            hub.fetch_benchmark("cmmlu", splits=["val"])
