"""Damage to files: bits flipped, ends cut off, files emptied, swapped or gone, a disk that is full.

Every reader must give what was written or refuse in our own words, naming the file. Of two checkpoints the older is used when the
newer is damaged.
"""

from __future__ import annotations

import contextlib
import io
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from layerplan.corpus.manifest import Manifest
from layerplan.corpus.store import StoreReader, load_validation_rows
from layerplan.errors import LayerplanError, first_line
from layerplan.log import kept, set_up
from layerplan.train.resume import find_resume
from tests.chaos.outcomes import Outcome
from tests.small_disk import fill, small_disk
from tests.tiny_checkpoint import FRESH, RUN_ID, load, save
from tests.tiny_store import make_store

OLDER, NEWER = 10, 20
DISK_KIB = 64


def flip(content: bytes, draw: random.Random) -> bytes:
    """One bit."""
    flipped = bytearray(content)
    flipped[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(flipped)


def cut(content: bytes, draw: random.Random) -> bytes:
    """The end is missing, or all."""
    return content[: draw.randrange(len(content))]


def overwrite(content: bytes, draw: random.Random) -> bytes:
    """A block of zeros, as after a crash of the host."""
    start = draw.randrange(len(content))
    return content[:start] + bytes(min(64, len(content) - start)) + content[start + 64 :]


KINDS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "bit flipped": flip,
    "cut": cut,
    "64 bytes zeroed": overwrite,
}


def damage_files(folder: Path, draw: random.Random, times: int) -> list[Outcome]:
    """`times` damages each to a store and to the newer of two checkpoints, every one on what is whole otherwise."""
    (store := folder / "store").parent.mkdir(parents=True, exist_ok=True)
    make_store(store, num_shards=2)
    checkpoints = folder / "checkpoints"
    wanted = {f"step_{step:08d}": load(save(checkpoints, step)) for step in (OLDER, NEWER)}
    (checkpoints / "run_id").write_text(RUN_ID)
    rows = read_rows(store)
    outcomes = [try_store(store, rows, draw) for _ in range(times)]
    return outcomes + [try_checkpoint(checkpoints, wanted, draw) for _ in range(times)]


def read_rows(store: Path) -> list[np.ndarray]:
    """Everything that training and validation use."""
    reader = StoreReader(store)
    parts = [reader.read_rows(np.arange(reader.manifest.num_rows)), load_validation_rows(store)]
    return [value for part in parts if part is not None for value in vars(part).values()]


def try_store(store: Path, wanted: list[np.ndarray], draw: random.Random) -> Outcome:
    """Damages one file of a store and reads all of it."""
    file = draw.choice(sorted(store.iterdir()))
    with damaged(file, draw) as kind:
        try:
            rows, manifest = read_rows(store), Manifest.load(store)
        except LayerplanError as error:
            return Outcome(f"store: {kind}", str(error), "" if file.name in str(error) else "the name of the file")
        except Exception as error:
            return Outcome(f"store: {kind}", "", f"uncaught {type(error).__name__}: {first_line(error)}")
    same = all(np.array_equal(one, other) for one, other in zip(rows, wanted, strict=True))
    return Outcome(f"store: {kind}", "", "" if same and manifest.num_rows else "other tokens were used")


def try_checkpoint(folder: Path, wanted: dict[str, list[torch.Tensor]], draw: random.Random) -> Outcome:
    """Damages one file of the newer checkpoint, and resumes."""
    file = draw.choice(sorted(path for path in (folder / f"step_{NEWER:08d}").iterdir() if path.is_file()))
    spare = shutil.copytree(file.parent, Path(tempfile.mkdtemp(dir=folder.parent)) / "kept")
    said = io.StringIO()
    with damaged(file, draw) as kind:
        try:
            with kept(), contextlib.redirect_stderr(said):
                set_up(style="text", level="INFO")
                found = find_resume(folder, FRESH, rank=0).checkpoint
            assert found is not None, "began at step 0"
            same = all(torch.equal(one, other) for one, other in zip(load(found), wanted[found.name], strict=True))
            lost = "" if same else "other weights were used"
        except Exception as error:
            lost = f"{type(error).__name__}: {first_line(error)}"
    shutil.rmtree(folder / "set_aside", ignore_errors=True)
    shutil.rmtree(file.parent, ignore_errors=True)
    shutil.move(spare, file.parent)
    line = said.getvalue().strip()
    named = not line or file.name in line or "was never finished" in line
    return Outcome(f"checkpoint: {kind}", line, lost or ("" if named else "the name of the file"))


@contextmanager
def damaged(file: Path, draw: random.Random) -> Iterator[str]:
    """Damages a file, yields the kind of damage, and mends it when it is still there."""
    content = file.read_bytes()
    kind = draw.choice([*KINDS, "gone"])
    if kind == "gone":
        file.unlink()
    else:
        file.write_bytes(KINDS[kind](content, draw))
    try:
        yield kind
    finally:
        if file.parent.exists():
            file.write_bytes(content)


def fill_disk(folder: Path) -> Outcome:
    """A checkpoint is written to a disk that is full; what was there before must stay and be used."""
    kind = "checkpoint: disk full while it is written"
    with small_disk(folder, DISK_KIB) as fault:
        return Outcome(kind, f"skipped: {fault}", met=False) if fault else _write_to_full_disk(folder, kind)


def _write_to_full_disk(folder: Path, kind: str) -> Outcome:
    wanted = load(save(folder, OLDER))
    (folder / "run_id").write_text(RUN_ID)
    ballast = fill(folder)
    try:
        save(folder, NEWER)
        return Outcome(kind, "", "no error, although there was no room")
    except LayerplanError as error:
        said = str(error)
    ballast.unlink()
    found = find_resume(folder, FRESH, rank=0).checkpoint
    if "No space left" not in said or str(folder) not in said:
        return Outcome(kind, said, "the reason, or the name of the folder")
    whole = found is not None and all(torch.equal(one, other) for one, other in zip(load(found), wanted, strict=True))
    return Outcome(kind, said, "" if whole else "the checkpoint before")
