"""Real documents with every kind of damage planted among them: each plant is counted where it belongs, nothing else is."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from eval.items import load_benchmark
from layerplan.config.corpus import CorpusConfig, SourceConfig
from layerplan.config.evaluation import BenchmarkConfig
from layerplan.corpus.build import build_token_store
from layerplan.corpus.cleaning import compute_duplicate_key, normalize_text
from layerplan.corpus.decontamination import BenchmarkText
from layerplan.corpus.sources import iter_documents
from layerplan.errors import CorpusError
from layerplan.models.scratch import train_tokenizer
from tests.tiny_corpus import make_disagreement

NUM_DOCUMENTS = 180
LARGE_BYTES = 50_000_000


@pytest.fixture(scope="module")
def documents(corpus_source: dict[str, object]) -> list[dict[str, str]]:
    """Real documents the default filters keep, no two of them alike."""
    source = SourceConfig.model_validate(corpus_source | {"max_documents": 600})
    found = {
        compute_duplicate_key(normalize_text(item.text)): {"id": item.id, "text": item.text}
        for item in iter_documents(CorpusConfig(sources=[source]))
        if 1000 < len(item.text) < 20_000
    }
    assert len(found) >= NUM_DOCUMENTS
    return list(found.values())[:NUM_DOCUMENTS]


@pytest.fixture(scope="module")
def questions(corpus_source: dict[str, object]) -> list[BenchmarkText]:
    """C-Eval and CMMLU where they are, else the project's own questions."""
    data = Path(str(corpus_source["path"])).parent
    names = [BenchmarkConfig(name=name, path=str(data / name)) for name in ("ceval", "cmmlu") if (data / name).is_dir()]
    return [
        BenchmarkText(f"{benchmark.name}/{question.id}", question.question)
        for benchmark in map(load_benchmark, names or [BenchmarkConfig(name="ceval", path="builtin")])
        for question in benchmark.questions
    ]


def test_tokenizer_libraries_that_disagree_end_a_build_on_ray(
    ray_local: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = make_disagreement(tmp_path)
    with pytest.raises(CorpusError) as failure:
        build_token_store(config, tmp_path / "tokenizer.json", tmp_path / "store", report=lambda line: None)
    assert type(failure.value) is CorpusError
    assert str(failure.value).startswith("corpus.tokenizer_library=auto: fastokens gives other ids than tokenizers")
    assert "\n" not in str(failure.value)
    assert "Traceback" not in "".join(capfd.readouterr())


def lines(*records: Any) -> bytes:
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


def plant(raw: Path, documents: list[dict[str, str]], asked: list[BenchmarkText]) -> None:
    """Documents over every format in turn, and the damage."""
    parts = [documents[start::6] for start in range(6)]
    table = pa.table({"id": [item["id"] for item in parts[0]], "text": [item["text"] for item in parts[0]]})
    pq.write_table(table, raw / "a.parquet", row_group_size=7)
    with pa.ipc.new_file(raw / "b.arrow", table.schema) as writer:
        writer.write_table(pa.Table.from_pylist(parts[1], schema=table.schema))
    (raw / "c.jsonl.zst").write_bytes(zstandard.compress(lines(*parts[2])))
    (raw / "d.jsonl.gz").write_bytes(gzip.compress(lines(*parts[3])))
    for number, item in enumerate(parts[4]):
        (raw / f"e{number:03d}.txt").write_text(item["text"])
    (raw / "f.jsonl").write_bytes(lines(*parts[5]))

    copies = [{"id": f"copy{n}", "text": f" {documents[n]['text'].upper()}\n"} for n in (3, 44, 100)]
    pages = [
        {"id": f"page{n}", "text": f"{documents[n]['text'][:300]}\n{question.text}\n{documents[n + 1]['text'][:300]}"}
        for n, question in enumerate(asked)
    ]
    (raw / "p.jsonl").write_bytes(lines(*copies, *pages, {"id": "brief", "text": "short"}, {"id": "no text"}))
    with (raw / "p.jsonl").open("ab") as handle:
        handle.write(b'{"id": "broken", "text": "half a li\n{"id": "bytes", "text": "\xff\xfe\xfa"}\nnot json\n')
    (raw / "q.jsonl").write_bytes(b"")
    (raw / "r.txt").write_bytes(b"")
    (raw / "s.parquet").write_bytes((raw / "a.parquet").read_bytes()[:-64])
    pq.write_table(table.rename_columns(["id", "body"]), raw / "t.parquet")
    whole = documents[0]["text"]
    (raw / "u.jsonl").write_bytes(lines({"id": "huge", "text": whole * (LARGE_BYTES // len(whole.encode()) + 1)}))
    (raw / "v.jsonl.gz").write_bytes(gzip.compress(lines({"id": "cut", "text": whole}))[:40])


def test_every_plant_is_counted_where_it_belongs(
    documents: list[dict[str, str]], questions: list[BenchmarkText], tmp_path: Path
) -> None:
    folder = tmp_path / "raw"
    folder.mkdir()
    long_enough = [question for question in questions if len(normalize_text(question.text)) >= 40][:5]
    assert len(long_enough) == 5
    plant(folder, documents, long_enough)
    assert (folder / "u.jsonl").stat().st_size > LARGE_BYTES
    train_tokenizer(
        [item["text"] for item in documents[:40]], vocab_size=2000, out_dir=tmp_path / "tokenizer", max_length=512
    )
    config = CorpusConfig(sources=[SourceConfig(path=str(folder))], seq_len=512, max_bad_fraction=0.2)
    store = tmp_path / "store"
    manifest = build_token_store(config, tmp_path / "tokenizer", store, questions=questions, report=lambda line: None)
    assert manifest.counts == {
        "in": NUM_DOCUMENTS + 3 + 5 + 1 + 1 + 4 + 1 + len(documents[0::6]) + 1,
        "kept": NUM_DOCUMENTS,
        "duplicate": 3,
        "contaminated": 5,
        "filtered/too_short": 1,
        "filtered/too_long": 1,
        "quarantined": 4 + 1 + len(documents[0::6]) + 1,
    }
    assert manifest.counts["in"] == sum(count for name, count in manifest.counts.items() if name != "in")
    hits = [json.loads(line) for line in (store / "contaminated.jsonl").read_text().splitlines()]
    assert [(hit["question"], hit["document"]) for hit in hits] == [
        (question.id, f"page{number}") for number, question in enumerate(long_enough)
    ]
    bad = [json.loads(line) for line in (store / "quarantine.jsonl").read_text().splitlines()]
    assert [Path(entry["where"]).name.partition(":")[0] for entry in bad] == [
        *["p.jsonl"] * 4,
        "s.parquet",
        "t.parquet",
        "v.jsonl.gz",
    ]
    with pytest.raises(CorpusError, match=r"corpus.max_bad_fraction=0.01: "):
        build_token_store(config.model_copy(update={"max_bad_fraction": 0.01}), tmp_path / "tokenizer", tmp_path / "no")
