"""A build that is killed by SIGKILL again and again, or runs out of disk, ends with the bytes of a quiet one.

The file is also the program the test starts: `python test_corpus_interrupted.py RAW TOKENIZER STORE`.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.small_disk import small_disk

ROOT = Path(__file__).resolve().parents[2]
KILLS = 3


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """6 MB of text in four files, every tenth document twice, and a tokenizer with a token per byte."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("inputs")
    rng = np.random.default_rng(0)
    (folder / "raw").mkdir()
    for part in range(4):
        with (folder / "raw" / f"{part}.jsonl").open("w") as handle:
            for number in range(120):
                text = "".join(map(chr, rng.integers(0x4E00, 0x9FA0, 4000).tolist()))
                for copy in range(1 + (number % 10 == 0)):
                    handle.write(json.dumps({"id": f"{part}-{number}-{copy}", "text": text}, ensure_ascii=False) + "\n")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: number for number, letter in enumerate(letters)} | {"<|endoftext|>": len(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "raw", folder / "tokenizer.json"


@pytest.fixture(scope="module")
def quiet(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes of a build nothing interrupted."""
    store = tmp_path_factory.mktemp("quiet") / "store"
    done = start(inputs, store).communicate(timeout=200)[0]
    assert (store / "manifest.json").exists(), done
    return read_store(store)


def test_a_build_killed_at_any_moment_goes_on_to_the_same_bytes(
    inputs: tuple[Path, Path], quiet: dict[str, bytes], tmp_path: Path
) -> None:
    """Killed at moments drawn anew each time, after one to four more shards than the time before."""
    store = tmp_path / "store"
    draw, moments = random.SystemRandom(), []
    for _ in range(KILLS):
        process = start(inputs, store)
        moments.append((len(list(store.glob("shard_*"))) + draw.randrange(1, 5), draw.uniform(0, 0.1)))
        while len(list(store.glob("shard_*"))) < moments[-1][0]:
            assert process.poll() is None, process.stdout
            time.sleep(0.002)
        time.sleep(moments[-1][1])
        process.send_signal(signal.SIGKILL)
        process.wait()
    output, _ = start(inputs, store).communicate(timeout=200)
    assert read_store(store) == quiet, moments
    assert "goes on after" in output, (moments, output)


def test_a_full_disk_is_one_clear_error_and_the_build_goes_on_when_there_is_room(
    inputs: tuple[Path, Path], quiet: dict[str, bytes], tmp_path: Path
) -> None:
    """A file system of 2 MB for a store of more; where none can be mounted, a limit on file size says no instead."""
    disk = tmp_path / "disk"
    with small_disk(disk, 2048) as fault:
        mounted = not fault
        process = start(inputs, disk / "store", max_file_bytes=None if mounted else 200_000)
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 1, output
        errors = [line for line in output.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "Traceback" not in output, output
        assert "cannot be written" in errors[0] and "make room and start the same build again" in errors[0]
        assert ("No space left" in errors[0] or "disk is full" in errors[0]) == mounted, errors
        assert not (disk / "store" / "manifest.json").exists()
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        output, _ = start(inputs, disk / "store").communicate(timeout=200)
        assert read_store(disk / "store") == quiet, output


def start(inputs: tuple[Path, Path], store: Path, max_file_bytes: int | None = None) -> subprocess.Popen[str]:
    def limit() -> None:
        if max_file_bytes is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))

    return subprocess.Popen(
        [sys.executable, __file__, *map(str, inputs), str(store)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=limit,
    )


def read_store(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(store.iterdir())}


def main() -> None:
    from layerplan.config.corpus import CorpusConfig, SourceConfig
    from layerplan.corpus.build import build_token_store

    raw, tokenizer, store = map(Path, sys.argv[1:])
    config = CorpusConfig(
        sources=[SourceConfig(path=str(raw))],
        seq_len=1024,
        rows_per_group=16,
        groups_per_shard=8,
        filters={"max_ngram_repetition": 1.0},  # type: ignore[arg-type]
    )
    build_token_store(config, tokenizer, store)


if __name__ == "__main__":
    from layerplan.entry import run_guarded

    sys.exit(run_guarded(main))
