"""Corpora on a server that speaks S3: read, built into a store, and the store read back from a bucket."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.fs as pafs
import pytest

from layerplan.config.corpus import CorpusConfig, SourceConfig
from layerplan.corpus.build import build_token_store
from layerplan.corpus.manifest import Manifest
from layerplan.corpus.sources import list_units
from layerplan.corpus.store import StoreReader, load_validation_rows
from layerplan.corpus.stream import iter_rank_steps
from layerplan.errors import CorpusError
from tests.tiny_corpus import make_byte_tokenizer, make_text, write_jsonl


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Address of moto's S3 server, and credentials in the environment, which it does not check."""
    import ray
    from moto.server import ThreadedMotoServer

    ray.shutdown()  # workers of a Ray that runs already would not see the environment

    made = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    made.start()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_REGION", "us-east-1")
        host, port = made.get_host_and_port()
        yield f"{host}:{port}"
    made.stop()


def upload(options: str, folder: Path, bucket: str) -> None:
    filesystem, _ = pafs.FileSystem.from_uri(f"s3://{bucket}{options}&allow_bucket_creation=true")
    filesystem.create_dir(bucket)
    pafs.copy_files(str(folder), bucket, destination_filesystem=filesystem)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", *({"id": f"a{number}", "text": make_text(number)} for number in range(40)))
    write_jsonl(folder / "b.jsonl.gz", *({"id": f"b{number}", "text": make_text(100 + number)} for number in range(20)))
    (folder / "c.txt.gz").write_bytes(gzip.compress(make_text(200).encode()))
    return folder


def test_a_bucket_builds_the_store_that_its_files_build(
    server: str, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make_byte_tokenizer(tmp_path)

    def build(path: str, name: str) -> Manifest:
        config = CorpusConfig(sources=[SourceConfig(path=path)], seq_len=64, rows_per_group=4, validation_rows=3)
        return build_token_store(config, tokenizer, tmp_path / name, seed=1, report=lambda line: None)

    local = build(str(raw), "local")
    assert local.counts == {"in": 61, "kept": 61}
    options = f"?endpoint_override={server}&scheme=http"
    upload(options, raw, "by-options")
    upload(options, raw, "by-environment")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    by_options = build(f"s3://by-options{options}", "options")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{server}")
    by_environment = build("s3://by-environment", "environment")
    for remote in (by_options, by_environment):
        assert remote.counts == local.counts
        assert [shard.sha256 for shard in remote.shards] == [shard.sha256 for shard in local.shards]


def test_training_rows_come_from_a_store_in_a_bucket(server: str, raw: Path, tmp_path: Path, ray_local: None) -> None:
    config = CorpusConfig(sources=[SourceConfig(path=str(raw))], seq_len=64, rows_per_group=4, validation_rows=3)
    store, options = tmp_path / "store", f"?endpoint_override={server}&scheme=http"
    build_token_store(config, make_byte_tokenizer(tmp_path), store, seed=1, report=lambda line: None)
    upload(options, store, "tokens")
    address = f"s3://tokens{options}"
    order = {"num_lanes": 4, "seed": 0, "rank": 0, "world_size": 1, "start_step": 5, "stop_step": 9}
    pairs = zip(iter_rank_steps(address, **order), iter_rank_steps(store, **order), strict=True)  # type: ignore[arg-type]
    for remote, local in pairs:
        assert np.array_equal(remote.row_ids, local.row_ids) and np.array_equal(remote.input_ids, local.input_ids)
    remote_held, held = load_validation_rows(address), load_validation_rows(store)
    assert remote_held is not None and held is not None and np.array_equal(remote_held.input_ids, held.input_ids)

    filesystem, _ = pafs.FileSystem.from_uri(address)
    filesystem.delete_file(f"tokens/{StoreReader(address).manifest.shards[0].name}")
    with pytest.raises(CorpusError, match=r"s3://tokens/shard_000000.parquet.*cannot be read"):
        StoreReader(address).read_rows(np.arange(4))


def test_what_cannot_be_read_is_one_clear_error(server: str, raw: Path) -> None:
    options = f"?endpoint_override={server}&scheme=http"

    def refuse(path: str, words: str) -> None:
        with pytest.raises(CorpusError, match=rf"^corpus.sources.0.path={path.partition('?')[0]}.*{words}"):
            list_units(CorpusConfig(sources=[SourceConfig(path=path)]))

    refuse(f"s3://no-such-bucket/raw{options}", "no such file or folder")
    refuse(f"s3://KEY:SECRET@bucket/raw{options}", "keys in an address would end in logs")
    (raw / "what?.jsonl").write_text("{}\n")
    upload(options, raw, "unclear")
    refuse(f"s3://unclear{options}", "'unclear/what.*jsonl' cannot be told from an address with options")
    with pytest.raises(CorpusError, match=r"corpus.store=s3://no-such-bucket.*not a token store"):
        Manifest.load(f"s3://no-such-bucket{options}")
