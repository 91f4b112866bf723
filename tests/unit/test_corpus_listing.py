"""Units as columns against the rule in plain Python: every file once, in the order of its path, cut where it may be."""

from __future__ import annotations

import hashlib
import json
import os
import random
import tracemalloc
from dataclasses import astuple
from pathlib import Path

import pyarrow as pa
import pytest

from layerplan.artifacts import compute_list_sha256
from layerplan.config.corpus import CorpusConfig, SourceConfig
from layerplan.corpus import build
from layerplan.corpus.sources import list_units
from layerplan.corpus.unit import Unit, UnitTable
from layerplan.errors import CorpusError

ENDINGS = {".txt": "text", ".md": "text", ".jsonl": "jsonl", ".parquet": "parquet", ".Arrow": "arrow", ".html": None}
STRETCH = 100


def make_tree(folder: Path, seed: int) -> None:
    """Names that sort before and after a slash, non-ASCII ones, hidden ones, files of every format, sizes about a stretch."""
    rng = random.Random(seed)
    for number in range(60):
        parts = [rng.choice(["a", "a!", "a.b", "é", "_not", ".git", "文", "b-", "b0"]) for _ in range(rng.randrange(3))]
        ending = rng.choice([*ENDINGS]) + rng.choice(["", "", ".gz", ".ZST"])
        path = folder.joinpath(
            *(part + "d" for part in parts), f"{rng.choice(['x', '_x', 'x y', 'ö'])}{number}{ending}"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * rng.choice([0, 1, STRETCH - 1, STRETCH, STRETCH + 1, 3 * STRETCH, 1234]))


def list_naively(folder: Path, source: int = 0) -> list[Unit]:
    units = []
    for path in sorted(str(path) for path in folder.rglob("*") if path.is_file()):
        if any(part.startswith((".", "_")) for part in Path(path).relative_to(folder).parts):
            continue
        name = Path(path.lower())
        is_packed = name.suffix in (".gz", ".zst")
        reader = {ending.lower(): reader for ending, reader in ENDINGS.items()}[
            Path(name.stem if is_packed else name).suffix
        ]
        if reader is None:
            continue
        size = Path(path).stat().st_size
        step = STRETCH if reader in ("jsonl", "parquet") and not is_packed else max(size, 1)
        units += [Unit(source, path, reader, at, min(at + step, size)) for at in range(0, max(size, 1), step)]
    return units


@pytest.mark.parametrize("seed", range(4))
def test_units_are_those_of_a_plain_walk(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerplan.corpus.file_table.BATCH", 7)
    monkeypatch.setattr("layerplan.corpus.unit.BATCH", 5)
    monkeypatch.setattr("layerplan.artifacts.HASHED_TOGETHER", 3)
    for name in ("one", "two"):
        make_tree(tmp_path / name, seed + len(name) * (name == "two"))
    config = CorpusConfig(sources=[SourceConfig(path=str(tmp_path / name)) for name in ("one", "two")])
    units = list_units(config, unit_bytes=STRETCH)
    first, second = list_naively(tmp_path / "one"), list_naively(tmp_path / "two", source=1)
    expected = first + second
    assert list(units) == expected == [units[place] for place in range(len(units))]
    assert units.num_bytes == sum(unit.num_bytes for unit in expected)
    assert units.sum_bytes().tolist() == [sum(u.num_bytes for u in expected[:n]) for n in range(len(expected) + 1)]
    parts = dict(units.split_by_source())
    assert [list(parts[index]) for index in (0, 1)] == [first, second]
    assert parts[1].count_files() == len({unit.path for unit in second})
    assert list(parts[1].number()) == list(enumerate(expected))[len(first) :]
    at = len(first) + 2
    rest = list(parts[1].resume(at, skip=3).number())
    assert [number for number, _ in rest] == list(range(at, len(expected)))
    assert [unit for _, unit in rest] == [Unit(*astuple(expected[at])[:5], skip=3), *expected[at + 1 :]]
    text = json.dumps([list(astuple(unit)) for unit in expected], separators=(",", ":"), ensure_ascii=False)
    assert build.hash_units(units) == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("start", [0, 1, 4, 9, 10])
@pytest.mark.parametrize("stop", [0, 3, 10, -1, None])
def test_a_cut_of_the_table_is_that_of_its_list(tmp_path: Path, start: int, stop: int | None) -> None:
    for source, count in (("one", 4), ("two", 6)):
        (tmp_path / source).mkdir()
        for number in range(count):
            (tmp_path / source / f"{number}.txt").write_text("x")
    units = list_units(CorpusConfig(sources=[SourceConfig(path=str(tmp_path / name)) for name in ("one", "two")]))
    cut = units[start:stop]
    assert list(cut) == list(units)[start:stop] and cut.first == start
    assert isinstance(cut, UnitTable) and len(cut) == len(range(10)[start:stop])
    with pytest.raises(IndexError):
        units[10]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 7])
def test_a_list_is_hashed_in_pieces_as_in_one(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerplan.artifacts.HASHED_TOGETHER", 3)
    values = [{"ö": number, "a": ["]", 1.5]} for number in range(count)]
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert compute_list_sha256(iter(values)) == hashlib.sha256(text.encode()).hexdigest()


def test_a_name_that_is_no_unicode_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/b\xff.txt")).write_text("x")
    with pytest.raises(CorpusError, match=r"b\\udcff\.txt': the file's name is not valid UTF-8; rename it"):
        list_units(CorpusConfig(sources=[SourceConfig(path=str(tmp_path))]))


def test_what_is_held_of_a_file_is_its_name_and_a_few_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns, not objects: by the allocators' own count, at the end and at most, until the last file is handed out."""
    monkeypatch.setattr("layerplan.corpus.file_table.BATCH", 1024)
    monkeypatch.setattr("layerplan.corpus.unit.BATCH", 1024)
    monkeypatch.setattr("layerplan.artifacts.HASHED_TOGETHER", 64)
    monkeypatch.setattr("layerplan.corpus.build.UNITS_PER_ITEM", 100)
    count = 20_000
    for number in range(count):
        (tmp_path / f"{number:06d}.txt").touch()
    config = CorpusConfig(sources=[SourceConfig(path=str(tmp_path))])
    list_units(config)  # what is imported and cached once
    pool = pa.default_memory_pool()
    before = pool.bytes_allocated()
    tracemalloc.start()
    try:
        units = list_units(config)
        held = tracemalloc.get_traced_memory()[0]
        build.hash_units(units)
        items = [len(json.loads(item)) for item in build.join_units(units, num_workers=2)]
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(items) == len(units) == count and max(items) == 100
    assert held + pool.bytes_allocated() - before < 80 * count
    assert most < 150 * count
