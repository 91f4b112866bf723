"""Rows made while training: each exactly once per epoch, whatever the workers and wherever a run was cut."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from layerplan.config.corpus import CorpusConfig, SourceConfig
from layerplan.corpus import lanes, on_the_fly
from layerplan.corpus.chunks import Chunks
from layerplan.corpus.lanes import ROW_BITS, LaneStream
from layerplan.corpus.on_the_fly import list_chunks, write_stream
from layerplan.errors import CorpusError
from tests.tiny_corpus import make_byte_tokenizer, make_text, write_jsonl

LANES = 4


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One token per byte."""
    return make_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def make_config(path: Path, **fields: Any) -> CorpusConfig:
    values = {"mode": "on_the_fly", "seq_len": 64, "deduplicate": False, "validation_rows": 0} | fields
    return CorpusConfig(sources=[SourceConfig(path=str(path))], **values)


@pytest.fixture
def store(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Some dozen chunks of 2 kB, one of them without a single document that is kept."""
    monkeypatch.setattr(on_the_fly, "MIN_CHUNK_BYTES", 2000)
    (tmp_path / "raw").mkdir()
    for part in range(3):
        write_jsonl(
            tmp_path / "raw" / f"{part}.jsonl",
            *({"id": f"{part}-{n}", "text": make_text(part * 100 + n, 160 + n * 40)} for n in range(15)),
        )
    write_jsonl(tmp_path / "raw" / "9.jsonl", *({"text": "短"} for _ in range(150)))
    write_stream(make_config(tmp_path / "raw"), tokenizer, tmp_path / "store", seed=3, report=lambda line: None)
    return tmp_path / "store"


def take(store: Path, steps: int, world_size: int, cursor: tuple[int, ...] = ()) -> tuple[list[Any], tuple[int, ...]]:
    """The global batches of some steps, and the cursor after them."""
    ranks = [
        LaneStream(store, num_lanes=LANES, rank=r, world_size=world_size, cursor=cursor) for r in range(world_size)
    ]
    batches = []
    for _ in range(steps):
        parts = [rank.take() for rank in ranks]
        by_lane = sorted(
            (lane, int(part.row_ids[i]), part.input_ids[i].tolist(), part.position_ids[i].tolist())
            for part, rank in zip(parts, ranks, strict=True)
            for i, lane in enumerate(rank.cursor)
        )
        batches.append(by_lane)
    lanes = {lane: row for rank in ranks for lane, row in rank.cursor.items()}
    return batches, tuple(lanes[lane] for lane in sorted(lanes))


def test_every_row_of_every_chunk_is_read_exactly_once_over_cuts_and_worker_counts(store: Path):
    chunks = Chunks(store)
    steps = 260
    whole, end = take(store, steps, world_size=1)
    cut: list[Any] = []
    cursor: tuple[int, ...] = ()
    for count, world_size in ((1, 2), (37, 4), (50, 1), (172, 2)):
        part, cursor = take(store, count, world_size, cursor)
        cut += part
    assert cut == whole and cursor == end
    assert len(json.dumps(cursor)) < 1024
    read = [row for batch in whole for _, row, _, _ in batch]
    assert len(set(read)) == len(read) == steps * LANES
    for lane, stop in enumerate(end):
        mine = [row for batch in whole for at, row, _, _ in batch if at == lane]
        positions = range(lane, (stop >> ROW_BITS) + 1, LANES)
        expected = [(at << ROW_BITS) + row for at in positions for row in range(len(chunks.read(at)))]
        assert mine == [row for row in expected if row < stop], "no row of a chunk is left out, and none comes again"
    assert max(stop >> ROW_BITS for stop in end) > 2 * len(chunks), "over two epochs"


def test_an_epoch_has_every_chunk_and_the_text_of_the_input(store: Path, tmp_path: Path):
    chunks = Chunks(store)
    first = [chunks.read(position) for position in range(len(chunks))]
    counts = {name: sum(chunk.counts.get(name, 0) for chunk in first) for name in ("in", "kept", "filtered/too_short")}
    assert counts == {"in": 195, "kept": 45, "filtered/too_short": 150}
    tokens = sum(int(chunk.used.sum()) for chunk in first)
    assert tokens == sum(len(make_text(p * 100 + n, 160 + n * 40).encode()) + 1 for p in range(3) for n in range(15))
    second = [chunks.read(len(chunks) + position) for position in range(len(chunks))]
    texts = [[chunk.input_ids.tolist() for chunk in epoch] for epoch in (first, second)]
    assert texts[0] != texts[1] and sorted(texts[0]) == sorted(texts[1]), "the same chunks in another order"


def test_what_cannot_feed_a_run_is_refused(
    store: Path,
    tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    with pytest.raises(CorpusError, match=r"chunks of text cannot feed train.global_batch_size=512 lanes"):
        LaneStream(store, num_lanes=512, rank=0, world_size=1)
    with pytest.raises(CorpusError, match="world size 5 is above"):
        LaneStream(store, num_lanes=LANES, rank=0, world_size=5)
    with pytest.raises(CorpusError, match=r"has 2 lanes, train.global_batch_size=4"):
        LaneStream(store, num_lanes=LANES, rank=0, world_size=1, cursor=(0, 1))
    config = make_config(tmp_path / "raw", filters={"min_chars": 100_000})
    write_stream(config, tokenizer, tmp_path / "nothing", report=lambda line: None)
    with pytest.raises(CorpusError, match="no document of the whole corpus is kept"):
        LaneStream(tmp_path / "nothing", num_lanes=LANES, rank=0, world_size=1).take()
    with pytest.raises(CorpusError, match="was built from another corpus config"):
        write_stream(config, tokenizer, store)
    write_jsonl(tmp_path / "raw" / "z.jsonl.gz", {"text": make_text(1, 9000)})
    monkeypatch.setattr(on_the_fly, "MAX_WHOLE_BYTES", 2100)
    with pytest.raises(CorpusError, match=r"z.jsonl.gz has .* bytes and can only be read as a whole"):
        list_chunks(make_config(tmp_path / "raw"))


def test_too_much_damage_stops_a_run(store: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lanes, "JUDGED_DOCUMENTS", 20)
    write_jsonl(tmp_path / "raw" / "bad.jsonl", *range(200))
    write_stream(make_config(tmp_path / "raw"), tokenizer, tmp_path / "bad", report=lambda line: None)
    stream = LaneStream(tmp_path / "bad", num_lanes=LANES, rank=0, world_size=1)
    with pytest.raises(
        CorpusError, match=r"max_bad_fraction=0.01: \d+ of the first \d+ inputs are malformed.*bad.jsonl"
    ):
        for _ in range(100):
            stream.take()
    assert np.sum([count for name, count in stream.counts.items() if name != "in"]) == stream.counts["in"]


@pytest.mark.parametrize(
    "fields",
    [
        {"deduplicate": True},
        {"validation_rows": 4},
        {"store": "x"},
        {"upload_to": "s3://x/y"},
        {"sources": [{"path": "x", "max_documents": 3}]},
    ],
)
def test_what_needs_a_store_does_not_go_with_the_mode(fields: dict[str, Any], tmp_path: Path):
    base = make_config(tmp_path).model_dump()
    with pytest.raises(ValueError, match="mode=on_the_fly does not go with"):
        CorpusConfig.model_validate(base | fields)


def test_a_training_worker_loads_neither_the_build_nor_a_tokenizer_library() -> None:
    """What a worker imports of its rows, in a process of its own; a task that reads chunks imports the rest."""
    code = (
        "import sys, layerplan.corpus.lanes, layerplan.corpus.stream;"
        " print([name for name in ('sqlite3', 'tokenizers', 'fastokens') if name in sys.modules],"
        " sorted(name for name in sys.modules if name.startswith('layerplan.corpus.') and name.split('.')[-1] in"
        " ('build', 'writer', 'journal', 'tokenize', 'encoders', 'upload', 'on_the_fly')))"
    )
    root = Path(__file__).resolve().parents[2]
    assert subprocess.check_output([sys.executable, "-c", code], cwd=root, text=True).strip() == "[] []"
