"""The ledger's proofs hold on what the schedule gives, and every way to break the order is found and named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from layerplan.corpus.manifest import Manifest, Shard, SourceRows
from layerplan.corpus.stream import make_schedule
from layerplan.errors import CorpusError
from layerplan.pipeline.check_ledger import check_ledgers
from layerplan.run_folder import MANIFEST_NAME
from layerplan.train.ledger import LedgerWriter, hash_row_ids
from layerplan.train.ledger_check import LedgerStep, check_epochs, check_equal, load_ledger


def make_manifest(*sources: tuple[int, float | None]) -> Manifest:
    rows = [
        SourceRows(
            path=f"source{index}",
            weight=weight,
            num_rows=num_rows,
            num_tokens=num_rows,
            num_padding_tokens=0,
            num_validation_rows=0,
            num_validation_tokens=0,
            counts={},
        )
        for index, (num_rows, weight) in enumerate(sources)
    ]
    return Manifest(
        seq_len=1,
        rows_per_group=4,
        num_rows=sum(source.num_rows for source in rows),
        num_validation_rows=0,
        num_tokens=sum(source.num_rows for source in rows),
        num_padding_tokens=0,
        vocab_size=1,
        end_of_text_id=0,
        tokenizer_sha256="",
        config_sha256="",
        counts={},
        sources=rows,
        shards=[
            Shard(name=source.path, num_rows=source.num_rows, num_tokens=source.num_rows, sha256="")
            for source in rows
            if source.num_rows
        ],
    )


def write_run(run: Path, manifest: Manifest, *, num_steps: int, num_lanes: int = 8) -> None:
    store = run / "token_store"
    store.mkdir(parents=True)
    (store / MANIFEST_NAME).write_text(manifest.model_dump_json())
    schedule = make_schedule(store, num_lanes=num_lanes, seed=5)
    with (run / "ledger.jsonl").open("w") as handle:
        for step in range(num_steps):
            ids = np.sort(schedule.rows_at(step))
            line = {"step": step + 1, "num_rows": len(ids), "sha256": hash_row_ids(ids), "row_ids": ids.tolist()}
            handle.write(json.dumps(line) + "\n")


@pytest.mark.parametrize("sources", [((61, None),), ((33, None), (30, None)), ((50, 1.0), (20, 3.0))])
def test_a_run_over_the_schedule_is_proved(sources: tuple[tuple[int, float | None], ...], tmp_path: Path):
    write_run(tmp_path / "run", make_manifest(*sources), num_steps=30)
    manifest = Manifest.load(tmp_path / "run" / "token_store")
    proofs = check_epochs(load_ledger(tmp_path / "run"), manifest)
    assert sum(proof.full_epochs * proof.num_rows + proof.rows_in_open_epoch for proof in proofs) == 240
    assert max(proof.full_epochs for proof in proofs) >= 3


def swap(steps: list[LedgerStep], at: int, ids: list[int]) -> list[LedgerStep]:
    return [LedgerStep(item.step, tuple(sorted(ids))) if item.step == at else item for item in steps]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda steps: swap(steps, 5, list(steps[3].row_ids)), r"step 5: row \d+ of all sources is read twice"),
        (lambda steps: steps[:5] + steps[6:], r"is read twice in an epoch|ended without row"),
        (lambda steps: swap(steps, 5, [*steps[4].row_ids[:-1], 700]), "not in the store|ended without|read twice"),
    ],
)
def test_a_repeated_a_lost_and_an_unknown_row_are_found(
    damage: Callable[[list[LedgerStep]], list[LedgerStep]], words: str, tmp_path: Path
):
    write_run(tmp_path / "run", make_manifest((61, None)), num_steps=30)
    manifest = Manifest.load(tmp_path / "run" / "token_store")
    with pytest.raises(CorpusError, match=words):
        check_epochs(damage(load_ledger(tmp_path / "run")), manifest)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ((0, 1, 1), r"step 3: row 1 of chunk 7 was trained on already"),
        ((0, 2), r"step 2: row 2 of chunk 7 comes before row 1"),
    ],
)
def test_rows_made_while_training_come_in_the_order_of_their_chunk(rows: tuple[int, ...], words: str):
    manifest = make_manifest((0, None)).model_copy(update={"mode": "on_the_fly"})
    steps = [LedgerStep(number, ((3 << 32) + number - 1, (7 << 32) + row)) for number, row in enumerate(rows, start=1)]
    with pytest.raises(CorpusError, match=words):
        check_epochs(steps, manifest)
    (proof,) = check_epochs(steps[:1], manifest)
    assert proof.rows_in_open_epoch == 2


def test_two_ledgers_are_compared_step_by_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name, steps in (("one", 12), ("two", 12), ("short", 9)):
        write_run(tmp_path / name, make_manifest((61, None)), num_steps=steps)
    one, short = load_ledger(tmp_path / "one"), load_ledger(tmp_path / "short")
    with pytest.raises(CorpusError, match="agree on 9 steps, then one of them ends"):
        check_equal(one, short)
    with pytest.raises(
        CorpusError, match=r"step 3: the ledgers differ; only the first has rows .*, only the second 99"
    ):
        check_equal(one, swap(one, 3, [*one[2].row_ids[1:], 99]))
    check_ledgers([str(tmp_path / "one"), str(tmp_path / "two")])
    said = capsys.readouterr().out
    assert "the same rows" in said and "each of 12 steps" in said and "each exactly once in each of 1 epochs" in said


def test_a_forged_torn_or_missing_ledger_is_refused(tmp_path: Path):
    write_run(tmp_path / "run", make_manifest((61, None)), num_steps=3)
    path = tmp_path / "run" / "ledger.jsonl"
    whole = path.read_text()
    first = json.loads(whole.splitlines()[0])
    forged = json.dumps(first | {"row_ids": [0] * 8}) + "\n" + whole.split("\n", 1)[1]
    for content, words in (
        (forged, "step 1 has row ids its sha256 does not fit"),
        (whole[:-30], "ledger.jsonl:3: not a ledger line"),
        (whole.split("\n", 1)[1], "is step 2, step 1 is expected"),
    ):
        path.write_text(content)
        with pytest.raises(CorpusError, match=words):
            load_ledger(tmp_path / "run")
    with pytest.raises(CorpusError, match=r"train\.write_ledger=true"):
        load_ledger(tmp_path / "nothing")


@pytest.mark.parametrize("cut", [0, 1, 25])
@pytest.mark.parametrize("start_step", [0, 1, 7, 11, 12, 40])
def test_steps_that_are_taken_again_and_a_torn_line_are_dropped(start_step: int, cut: int, tmp_path: Path):
    write_run(tmp_path / "run", make_manifest((61, None)), num_steps=12)
    path = tmp_path / "run" / "ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines)[: -cut or None])
    LedgerWriter(path, start_step=start_step, rank=0, world_size=1)
    whole = 12 if cut == 0 else 11  # a line without its end counts as torn
    assert path.read_bytes() == b"".join(lines[: min(start_step, whole)])


def test_a_ledger_without_lines_stays_empty(tmp_path: Path):
    path = tmp_path / "ledger.jsonl"
    for content in (b"", b"{", b"\n"):
        path.write_bytes(content)
        LedgerWriter(path, start_step=3, rank=0, world_size=1)
        assert path.read_bytes() == b""
