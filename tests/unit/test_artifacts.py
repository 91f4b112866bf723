"""What stays on disk is whole or not there, is hashed in one way, and is read line by line as it was written."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from layerplan import aside
from layerplan.artifacts import (
    compute_sha256,
    hash_bytes,
    hash_file,
    hash_files,
    parse_lines,
    read_every_line,
    read_lines,
    write_json,
    write_lines,
    write_text,
)
from layerplan.aside import making_folder, writing_aside, writing_folder_aside

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
"""Sha256 of "abc", from FIPS 180-2, appendix B.1."""


def names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


def test_a_file_keeps_what_it_had_until_all_of_the_new_is_written(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "scores.json"
    write_text(path, "old")
    with writing_aside(path) as aside:
        aside.write_text("half of the n")
        assert path.read_text() == "old"
        aside.write_text("new")
    assert path.read_text() == "new"
    assert names(path.parent) == ["scores.json"]


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    write_text(path, "old")
    with pytest.raises(OSError, match="disk full"), writing_aside(path) as aside:
        aside.write_text("half of the n")
        raise OSError("disk full")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["scores.json"]


def test_the_bytes_are_on_the_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a power cut could leave the name with half of the bytes."""
    flushed: list[tuple[int, list[str]]] = []
    real = os.fsync

    def fsync(handle: int) -> None:
        real(handle)
        flushed.append((os.fstat(handle).st_size, names(tmp_path)))

    monkeypatch.setattr(aside.os, "fsync", fsync)
    write_text(tmp_path / "plan.json", "four")
    assert flushed == [(4, ["plan.json.partial"])]


def test_of_two_that_make_the_same_folder_the_first_to_finish_gives_it(tmp_path: Path) -> None:
    with making_folder(tmp_path / "model") as slow:
        (slow / "weights").write_text("slow")
        with making_folder(tmp_path / "model") as fast:
            (fast / "weights").write_text("fast")
        assert (tmp_path / "model" / "weights").read_text() == "fast"
    assert (tmp_path / "model" / "weights").read_text() == "fast"
    assert names(tmp_path) == ["model"]


def test_a_folder_whose_making_fails_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk full"), making_folder(tmp_path / "model") as made:
        (made / "weights").write_text("half")
        raise OSError("disk full")
    assert names(tmp_path) == []


def test_a_folder_written_anew_takes_the_place_of_the_old_one_when_it_is_whole(tmp_path: Path) -> None:
    (tmp_path / "step_1.partial").mkdir()
    (tmp_path / "step_1.partial" / "of a killed writer").touch()
    for text in ("old", "new"):
        with writing_folder_aside(tmp_path / "step_1") as folder:
            (folder / text).write_text(text)
    assert names(tmp_path) == ["step_1"]
    assert names(tmp_path / "step_1") == ["new"]
    with pytest.raises(OSError, match="disk full"), writing_folder_aside(tmp_path / "step_1") as folder:
        (folder / "newest").write_text("half")
        raise OSError("disk full")
    assert names(tmp_path) == ["step_1"]
    assert names(tmp_path / "step_1") == ["new"]


def test_hashes_are_sha256_over_bytes_names_and_canonical_json(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    (tmp_path / "long").write_bytes(b"a" * 1_000_000)  # FIPS 180-2, appendix B.3
    assert hash_bytes(b"abc") == hash_file(tmp_path / "abc") == ABC
    assert hash_file(tmp_path / "long") == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"
    joined = hashlib.sha256(b"abc" + b"abc" + b"long" + b"a" * 1_000_000).hexdigest()
    assert hash_files([tmp_path / "abc", tmp_path / "long"]) == joined
    assert hash_files([tmp_path / "long", tmp_path / "abc"]) != joined
    assert compute_sha256({"b": "é", "a": [1, 0.5]}) == hashlib.sha256('{"a":[1,0.5],"b":"é"}'.encode()).hexdigest()


def test_a_line_ends_at_a_line_feed_and_nowhere_else(tmp_path: Path) -> None:
    lines = [{"text": "one\u2028two\x85three"}, {"text": "four\nfive"}]
    write_lines(tmp_path / "answers.jsonl", lines)
    assert (tmp_path / "answers.jsonl").read_bytes().count(b"\n") == 2
    assert read_every_line(tmp_path / "answers.jsonl") == read_lines(tmp_path / "answers.jsonl") == lines


def test_what_a_kill_cut_short_is_no_line_of_a_growing_file_and_a_fault_in_a_finished_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_lines(path) == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_lines(path) == parse_lines(path.read_bytes()) == [{"step": 1}, {"step": 2}]
    with pytest.raises(ValueError, match="Unterminated string"):
        read_every_line(path)


def test_json_is_written_for_people_too(tmp_path: Path) -> None:
    write_json(tmp_path / "verdict.json", {"text": "更好"})
    assert (tmp_path / "verdict.json").read_text(encoding="utf-8") == '{\n  "text": "更好"\n}\n'
