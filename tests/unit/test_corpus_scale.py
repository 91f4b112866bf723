"""The order of 262 billion tokens costs no more than that of a few: a manifest of 64 million rows of 4,096."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from layerplan.corpus.manifest import Manifest, Shard, SourceRows
from layerplan.corpus.stream import make_schedule
from layerplan.run_folder import MANIFEST_NAME
from layerplan.train.state import TrainState

NUM_ROWS = 64_000_000
SEQ_LEN = 4096
SHARD_ROWS = 4096
LANES = 512
LIMIT_S = 5.0
LIMIT_MIB = 500


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    tokens = SHARD_ROWS * SEQ_LEN
    rows = NUM_ROWS // SHARD_ROWS * SHARD_ROWS
    shards = [
        Shard(name=f"shard_{number:06d}.parquet", num_rows=SHARD_ROWS, num_tokens=tokens, sha256=f"{number:064d}")
        for number in range(rows // SHARD_ROWS)
    ]
    sizes = {"num_rows": rows, "num_tokens": rows * SEQ_LEN, "num_padding_tokens": 0, "num_validation_rows": 0}
    source = SourceRows(path="hub://BAAI/CCI3-HQ", weight=None, num_validation_tokens=0, counts={}, **sizes)
    manifest = Manifest(
        **sizes,
        seq_len=SEQ_LEN,
        rows_per_group=64,
        vocab_size=151_936,
        end_of_text_id=151_643,
        tokenizer_sha256="0" * 64,
        config_sha256="0" * 64,
        counts={},
        sources=[source],
        shards=shards,
    )
    (folder / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=1))
    return folder


def test_the_manifest_loads_and_any_step_is_found_within_the_limits(store: Path):
    """In a process of its own, by its CPU time and the growth of its peak memory."""
    program = (
        "import resource, sys, time\n"
        "from layerplan.corpus.stream import make_schedule\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "before, started = peak(), time.process_time()\n"
        f"schedule = make_schedule(sys.argv[1], num_lanes={LANES}, seed=0)\n"
        "schedule.rows_at(0)\n"
        "loaded = time.process_time() - started\n"
        "seconds = []\n"
        "for step in (1, 12_345, 124_998, 124_999, 125_000, 300_000, 374_997):\n"
        "    started = time.process_time()\n"
        "    schedule.rows_at(step)\n"
        "    seconds.append(time.process_time() - started)\n"
        "print(loaded, max(seconds), peak() - before)\n"
    )
    output = subprocess.run([sys.executable, "-c", program, store], capture_output=True, text=True, check=True).stdout
    load_s, step_s, memory_mib = map(float, output.split())
    assert load_s < LIMIT_S and step_s < LIMIT_S and memory_mib < LIMIT_MIB, output


def test_an_epoch_of_it_is_a_permutation_wherever_one_looks(store: Path):
    """Sampled stretches of the epoch have no row in common, and the end of an epoch meets the beginning of the next."""
    schedule = make_schedule(store, num_lanes=LANES, seed=0)
    steps_per_epoch = schedule.num_rows // LANES
    assert steps_per_epoch * LANES == schedule.num_rows
    sampled = np.random.default_rng(0).choice(steps_per_epoch, 400, replace=False)
    started = time.process_time()
    rows = np.concatenate([schedule.rows_at(int(step)) for step in sampled])
    assert len(np.unique(rows)) == len(rows) and rows.min() >= 0 and rows.max() < schedule.num_rows
    assert (time.process_time() - started) / len(sampled) < LIMIT_S
    assert set(schedule.rows_at(0).tolist()) != set(schedule.rows_at(steps_per_epoch).tolist())


def test_what_a_checkpoint_keeps_of_the_data_is_under_a_kilobyte(store: Path):
    manifest = Manifest.load(store)
    state = TrainState(step=374_997, data_offset=12, corpus_sha256=manifest.content_sha256).model_dump(mode="json")
    kept = {name: state[name] for name in ("step", "data_offset", "data_cursor", "corpus_sha256")}
    assert len(json.dumps(kept)) < 1024
