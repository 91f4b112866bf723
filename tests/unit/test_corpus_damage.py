"""A store trains on the tokens that were written, or says which file is not what it was."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from layerplan.cli import main
from layerplan.corpus import manifest as manifest_file
from layerplan.corpus.manifest import SEAL_KEY, Manifest
from layerplan.corpus.rows import PackedRows
from layerplan.corpus.start_check import check_files
from layerplan.corpus.store import StoreReader, load_validation_rows
from layerplan.corpus.stream import iter_rank_steps, make_schedule
from layerplan.errors import CorpusError
from layerplan.run_folder import MANIFEST_NAME, VALIDATION_NAME
from layerplan.train.feed import check_feed
from tests.tiny_store import make_store

SHARDS = ["shard_000000.parquet", "shard_000001.parquet"]
NUM_FLIPS = 40
NEW_FIELDS = ("num_bytes", "tail_xxh3_128", "max_id", "groups_xxh3_128")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("whole") / "store"
    make_store(store, num_shards=2)
    return store


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "store"))


def read_all(store: Path) -> list[PackedRows]:
    """Everything that training and validation use."""
    reader = StoreReader(store)
    rows = [reader.read_rows(np.arange(reader.manifest.num_rows)), load_validation_rows(store)]
    return [part for part in rows if part is not None]


def are_equal(first: list[PackedRows], second: list[PackedRows]) -> bool:
    return len(first) == len(second) and all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for one, other in zip(first, second, strict=True)
        for name in vars(one)
    )


def edit(store: Path, **fields: Any) -> None:
    """Changes the manifest as somebody who takes its seal away."""
    content = json.loads((store / MANIFEST_NAME).read_text(encoding="utf-8"))
    content.pop(SEAL_KEY, None)
    (store / MANIFEST_NAME).write_text(json.dumps(content | fields), encoding="utf-8")


def forget(store: Path) -> None:
    """Makes the manifest one of an earlier version."""
    content = json.loads((store / MANIFEST_NAME).read_text(encoding="utf-8"))
    shards = [{key: value for key, value in shard.items() if key not in NEW_FIELDS} for shard in content["shards"]]
    edit(store, shards=shards, validation=None)


@pytest.mark.parametrize("name", [*SHARDS, VALIDATION_NAME, MANIFEST_NAME])
def test_a_flipped_bit_changes_no_token_or_is_refused_by_the_files_name(whole: Path, store: Path, name: str) -> None:
    truth, manifest = read_all(whole), Manifest.load(whole)
    content = (whole / name).read_bytes()
    draw = random.Random(name)
    outcomes: Counter[str] = Counter()
    for _ in range(NUM_FLIPS):
        flipped = bytearray(content)
        flipped[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        (store / name).write_bytes(flipped)
        try:
            found = read_all(store)
        except CorpusError as error:
            assert name in str(error) and "\n" not in str(error)
            outcomes["refused"] += 1
        else:
            assert are_equal(found, truth) and Manifest.load(store) == manifest
            outcomes["harmless"] += 1
    assert outcomes["refused"] > NUM_FLIPS / 4, outcomes


def test_a_damaged_group_is_named_with_its_rows_its_source_and_a_remedy(store: Path) -> None:
    group = pq.ParquetFile(store / SHARDS[1]).metadata.row_group(3).column(1)
    with (store / SHARDS[1]).open("rb+") as handle:
        handle.seek(group.data_page_offset + group.total_compressed_size - 9)
        byte = handle.read(1)[0]
        handle.seek(-1, 1)
        handle.write(bytes([byte ^ 16]))
    reader = StoreReader(store)
    reader.read_rows(np.arange(64 + 24))
    with pytest.raises(CorpusError) as failure:
        reader.read_rows(np.array([64 + 31]))
    said = str(failure.value)
    assert said.startswith(f"{store / SHARDS[1]}: row group 3 of 8 (rows 88 to 95, source drawn) cannot be read (")
    assert f"remove {store} and build it again with `layerplan corpus build --config FILE`" in said


def test_rows_of_another_place_are_refused_by_the_name_of_theirs(store: Path) -> None:
    shutil.copyfile(store / SHARDS[0], store / SHARDS[1])
    reader = StoreReader(store)
    with pytest.raises(CorpusError, match=rf"{SHARDS[1]}: row group 2 of 8.*rows of group 2 of {SHARDS[0]}"):
        reader.read_rows(np.array([64 + 16]))
    (store / VALIDATION_NAME).write_bytes((store / SHARDS[0]).read_bytes())
    with pytest.raises(CorpusError, match=rf"{VALIDATION_NAME}: row group 0 of 1 \(held-out rows\) cannot be read"):
        load_validation_rows(store)


@pytest.mark.parametrize("name", [*SHARDS, VALIDATION_NAME])
def test_a_missing_or_cut_file_is_one_line(store: Path, name: str) -> None:
    content = (store / name).read_bytes()
    for size in (0, 3, len(content) // 2, len(content) - 1):
        (store / name).write_bytes(content[:size])
        with pytest.raises(CorpusError, match=rf"^{store / name}: .*cannot be read .*put a good copy"):
            read_all(store)
    (store / name).unlink()
    with pytest.raises(CorpusError, match=rf"^{store / name}: cannot be read \(is missing; "):
        read_all(store)


def test_a_manifest_that_was_edited_is_refused(store: Path) -> None:
    path = store / MANIFEST_NAME
    path.write_text(path.read_text(encoding="utf-8").replace('"num_rows": 128', '"num_rows": 120'), encoding="utf-8")
    with pytest.raises(CorpusError, match=rf"^{path}: was changed after it was written; "):
        Manifest.load(store)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_rows": 120}, "num_rows=120, its sources have 128"),
        ({"num_validation_rows": 0}, "num_validation_rows=0, its sources have 3"),
        ({"num_tokens": 4000}, "num_tokens=4,000, its sources have 4,096"),
        ({"shards": []}, "num_rows=128, its shards have 0"),
        ({"rows_per_group": 16}, "shard_000000.parquet has 8 hashes for 4 row groups"),
    ],
)
def test_a_manifest_without_its_seal_still_may_not_contradict_itself(
    store: Path, fields: dict[str, Any], said: str
) -> None:
    edit(store, **fields)
    with pytest.raises(CorpusError, match=rf"{MANIFEST_NAME}: contradicts itself: {said}; put a good copy"):
        Manifest.load(store)


def test_a_shard_listed_twice_or_outside_the_store_is_refused(store: Path) -> None:
    shards = [shard.model_dump() for shard in Manifest.load(store).shards]
    edit(store, shards=[shards[0], shards[0]])
    with pytest.raises(CorpusError, match=r"shard_000000\.parquet is listed twice"):
        Manifest.load(store)
    edit(store, shards=[shards[0], shards[1] | {"name": "../other/shard_000001.parquet"}])
    with pytest.raises(CorpusError, match=r"not a readable manifest \(shards\.1\.name"):
        Manifest.load(store)


def test_a_store_of_an_earlier_version_gives_the_same_rows_under_the_same_identity(whole: Path, store: Path) -> None:
    forget(store)
    assert are_equal(read_all(store), read_all(whole))
    assert Manifest.load(store).content_sha256 == Manifest.load(whole).content_sha256
    assert Manifest.load(whole).is_hashed and not Manifest.load(store).is_hashed


@pytest.mark.parametrize("name", [*SHARDS, VALIDATION_NAME])
def test_a_flipped_bit_in_a_store_of_an_earlier_version_never_ends_in_an_exception_of_others(
    whole: Path, store: Path, name: str
) -> None:
    forget(store)
    content, draw = (whole / name).read_bytes(), random.Random(name)
    for _ in range(NUM_FLIPS):
        flipped = bytearray(content)
        flipped[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        (store / name).write_bytes(flipped)
        try:
            read_all(store)
        except CorpusError as error:
            assert name in str(error)


def find_fault(store: Path) -> str:
    """What is said when a run starts."""
    with pytest.raises(CorpusError) as failure:
        check_files(store, Manifest.load(store))
    assert "\n" not in str(failure.value)
    return str(failure.value)


def test_files_are_compared_with_the_manifest_when_a_run_starts(store: Path) -> None:
    check_files(store, Manifest.load(store), report=pytest.fail)
    second = store / SHARDS[1]
    size = second.stat().st_size
    with second.open("ab") as handle:
        handle.write(b"PAR1")
    assert find_fault(store).startswith(f"{second}: has {size + 4:,} bytes, {size:,} were written; put a good copy")
    second.unlink()
    assert find_fault(store).startswith(f"{second}: is missing; put a good copy")
    shutil.copyfile(store / VALIDATION_NAME, second)
    assert "were written" in find_fault(store)


def test_a_swapped_shard_of_the_same_size_is_told_by_its_end_when_a_run_starts(store: Path) -> None:
    """Its rows would be refused as they are read; the start is earlier."""
    shutil.copyfile(store / SHARDS[0], store / SHARDS[1])
    shards = [shard.model_dump() for shard in Manifest.load(store).shards]
    edit(store, shards=[shards[0], shards[1] | {"num_bytes": shards[0]["num_bytes"]}])
    assert f"{SHARDS[1]}: its end is not the one that was written, it is that of {SHARDS[0]}; put" in find_fault(store)


def test_without_sizes_the_footers_tell(store: Path) -> None:
    forget(store)
    said: list[str] = []
    check_files(store, Manifest.load(store), report=said.append)
    assert len(said) == 1 and f"`layerplan corpus verify {store}` looks for it" in said[0]
    content = (store / SHARDS[1]).read_bytes()
    shutil.copyfile(store / VALIDATION_NAME, store / SHARDS[1])
    assert "has 3 rows in 1 row groups, the manifest says 64 in 8" in find_fault(store)
    (store / SHARDS[1]).write_bytes(content[:-1])
    assert f"{SHARDS[1]}: its footer cannot be read (" in find_fault(store)
    (store / SHARDS[1]).write_bytes(content)
    (store / VALIDATION_NAME).unlink()
    assert find_fault(store).startswith(f"{store / VALIDATION_NAME}: is missing")


def test_a_store_at_an_address_is_compared_in_the_same_way(store: Path) -> None:
    address = f"file://{store}"
    check_files(address, Manifest.load(address), report=pytest.fail)
    (store / SHARDS[0]).unlink()
    with pytest.raises(CorpusError, match=rf"^{address}/{SHARDS[0]}: is missing; put a good copy.*remove {address} "):
        check_files(address, Manifest.load(address))


@pytest.mark.parametrize("is_old", [False, True])
def test_tokens_beyond_the_model_are_refused(store: Path, is_old: bool) -> None:
    """By the manifest where it says the highest id, else as they are read; every id below 128 is drawn somewhere."""
    assert Manifest.load(store).max_id == 127
    edit(store, vocab_size=127)
    if not is_old:
        with pytest.raises(CorpusError, match=r"shard_000000\.parquet holds token 127, ids are below 127"):
            Manifest.load(store)
        return
    forget(store)
    steps = {"num_lanes": 8, "seed": 0, "rank": 0, "world_size": 1, "start_step": 0, "stop_step": 16}
    assert len(list(iter_rank_steps(store, num_ids=128, **steps))) == 16
    with pytest.raises(CorpusError, match=r"row group \d of 8 .*holds a token of 127, at most 126 is possible"):
        list(iter_rank_steps(store, num_ids=127, **steps))


def run_verify(store: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str], str]:
    code = main(["corpus", "verify", str(store)])
    captured = capsys.readouterr()
    return code, captured.out.splitlines(), captured.err


def test_verifying_reads_everything_and_lists_each_damaged_group(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_verify(store, capsys) == (0, [OK.format(store=store)], "3 of 3 files in 0 s, 0 faults\n")
    for name, groups in ((SHARDS[0], (2, 5)), (SHARDS[1], (7,))):
        footer = pq.ParquetFile(store / name).metadata
        content = bytearray((store / name).read_bytes())
        for group in groups:
            column = footer.row_group(group).column(1)
            content[column.data_page_offset + column.total_compressed_size - 9] ^= 4
        (store / name).write_bytes(content)
    (store / VALIDATION_NAME).unlink()
    code, lines, error = run_verify(store, capsys)
    assert code == 1 and error.splitlines()[-1].startswith(f"error: {store}: 4 faults; put a good copy")
    assert [line.partition(" (")[0] for line in lines] == [
        f"{store / SHARDS[0]}: row group 2 of 8",
        f"{store / SHARDS[0]}: row group 5 of 8",
        f"{store / SHARDS[1]}: row group 7 of 8",
        f"{store / VALIDATION_NAME}: is missing",
    ]


OK = "{store}: 3 files, 131 rows are those that were written"


def test_verifying_finds_a_bit_that_no_row_needs_and_swapped_files_of_an_earlier_version(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = (store / SHARDS[0]).read_bytes()
    (store / SHARDS[0]).write_bytes(content.replace(b"parquet-cpp-arrow", b"parquet-cpp-arrov"))
    code, lines, _ = run_verify(store, capsys)
    assert code == 1 and lines == [
        f"{store / SHARDS[0]}: is not the file that was written (by its sha256); no row that training uses differs"
    ]
    (store / SHARDS[0]).write_bytes((store / SHARDS[1]).read_bytes())
    (store / SHARDS[1]).write_bytes(content)
    forget(store)
    code, lines, _ = run_verify(store, capsys)
    assert code == 1 and [line.rpartition("; ")[2] for line in lines] == ["which rows differ cannot be told"] * 2


def test_a_store_is_opened_once_in_a_process_and_again_when_its_manifest_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By all that a training worker asks of it; the file is made old, as that of a store is when a run begins."""
    make_store(tmp_path / "store")
    path = tmp_path / "store" / "manifest.json"
    os.utime(path, (1_000_000_000, 1_000_000_000))
    opened: list[str] = []
    real = manifest_file.open_file
    monkeypatch.setattr(manifest_file, "open_file", lambda place: opened.append(place) or real(place))
    check_feed(tmp_path / "store", num_lanes=4, seed=0)
    make_schedule(tmp_path / "store", num_lanes=4, seed=0)
    load_validation_rows(tmp_path / "store")
    assert StoreReader(tmp_path / "store").manifest == Manifest.load(tmp_path / "store")
    assert opened == [str(path)]
    path.write_text(path.read_text().replace('"seq_len": 32', '"seq_len": 16'))
    with pytest.raises(CorpusError, match="was changed after it was written"):
        Manifest.load(tmp_path / "store")
