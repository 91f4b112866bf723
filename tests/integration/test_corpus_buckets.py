"""Corpora on servers that speak S3 and GCS: read, built into a store, and the store read back from a bucket."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs as pafs
import pytest

from layerplan.config.corpus import CorpusConfig, SourceConfig
from layerplan.corpus.build import build_token_store
from layerplan.corpus.manifest import Manifest
from layerplan.corpus.sources import list_units
from layerplan.corpus.store import StoreReader, load_validation_rows
from layerplan.corpus.stream import iter_rank_steps
from layerplan.corpus.upload import StoreUpload
from layerplan.errors import CorpusError
from tests.buckets import BucketServer, read_file
from tests.tiny_corpus import make_byte_tokenizer, make_text, write_jsonl


@pytest.fixture(scope="module", params=["s3_server", "gcs_server"], ids=["s3", "gcs"])
def server(request: pytest.FixtureRequest) -> Iterator[BucketServer]:
    import ray

    ray.shutdown()  # workers of a Ray that runs already would not see the environment
    made: BucketServer = request.getfixturevalue(request.param)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in made.keys.items():
            patch.setenv(name, value)
        yield made


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", *({"id": f"a{number}", "text": make_text(number)} for number in range(40)))
    write_jsonl(folder / "b.jsonl.gz", *({"id": f"b{number}", "text": make_text(100 + number)} for number in range(20)))
    (folder / "c.txt.gz").write_bytes(gzip.compress(make_text(200).encode()))
    return folder


def test_a_bucket_builds_the_store_that_its_files_build(
    server: BucketServer, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make_byte_tokenizer(tmp_path)

    def build(path: str, name: str) -> Manifest:
        config = CorpusConfig(sources=[SourceConfig(path=path)], seq_len=64, rows_per_group=4, validation_rows=3)
        return build_token_store(config, tokenizer, tmp_path / name, seed=1, report=lambda line: None)

    local = build(str(raw), "local")
    assert local.counts == {"in": 61, "kept": 61}
    remotes = [build(server.upload(raw, "by-options"), "options")]
    server.upload(raw, "by-environment")
    monkeypatch.setenv(*server.environment)
    remotes.append(build(f"{server.scheme}by-environment", "environment"))
    for remote in remotes:
        assert remote.counts == local.counts
        assert [shard.sha256 for shard in remote.shards] == [shard.sha256 for shard in local.shards]


def test_training_rows_come_from_a_store_in_a_bucket(
    server: BucketServer, raw: Path, tmp_path: Path, ray_local: None
) -> None:
    config = CorpusConfig(sources=[SourceConfig(path=str(raw))], seq_len=64, rows_per_group=4, validation_rows=3)
    store = tmp_path / "store"
    build_token_store(config, make_byte_tokenizer(tmp_path), store, seed=1, report=lambda line: None)
    address = server.upload(store, "tokens")
    order = {"num_lanes": 4, "seed": 0, "rank": 0, "world_size": 1, "start_step": 5, "stop_step": 9}
    pairs = zip(iter_rank_steps(address, **order), iter_rank_steps(store, **order), strict=True)  # type: ignore[arg-type]
    for remote, local in pairs:
        assert np.array_equal(remote.row_ids, local.row_ids) and np.array_equal(remote.input_ids, local.input_ids)
    remote_held, held = load_validation_rows(address), load_validation_rows(store)
    assert remote_held is not None and held is not None and np.array_equal(remote_held.input_ids, held.input_ids)

    filesystem, _ = pafs.FileSystem.from_uri(address)
    filesystem.delete_file(f"tokens/{StoreReader(address).manifest.shards[0].name}")
    with pytest.raises(CorpusError, match=rf"{server.scheme}tokens/shard_000000.parquet.*cannot be read"):
        StoreReader(address).read_rows(np.arange(4))


def test_a_store_built_at_a_bucket_is_the_store_built_here(
    server: BucketServer, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    ray.shutdown()  # the build reads in this process, so that a fault can be caused in its middle
    tokenizer = make_byte_tokenizer(tmp_path)
    (raw / "broken.jsonl").write_text("{\n")
    layout: dict[str, Any] = {"seq_len": 64, "rows_per_group": 2, "groups_per_shard": 8, "validation_rows": 3}
    layout |= {"sources": [SourceConfig(path=str(raw))], "max_bad_fraction": 0.5}

    def build(config: CorpusConfig, folder: Path) -> Manifest:
        return build_token_store(config, tokenizer, folder, seed=1, report=lambda line: None)

    local = build(CorpusConfig(**layout), tmp_path / "local")
    assert len(local.shards) > 5
    server.upload(raw, "built")
    address = server.locate("built", "deep/store")
    config, store = CorpusConfig(**layout, upload_to=address), tmp_path / "store"
    with monkeypatch.context() as patch:
        copy, copied = StoreUpload.copy, []

        def fail_from_the_third_on(self: StoreUpload, path: Path, name: str | None = None) -> None:
            copied.append(path.name)
            if len(copied) >= 3:
                raise OSError("connection lost")
            copy(self, path, name)

        patch.setattr(StoreUpload, "copy", fail_from_the_third_on)
        with pytest.raises(
            CorpusError, match=r"deep/store.*cannot be written \(connection lost\); every finished shard"
        ):
            build(config, store)
    with pytest.raises(CorpusError, match="not a token store, or its build did not finish"):
        Manifest.load(address)
    assert StoreUpload(address).list_names() == {"shard_000000.parquet", "shard_000001.parquet"}
    assert (store / "shard_000002.parquet").exists()

    assert build(config, store) == local == Manifest.load(address) == Manifest.load(store)
    assert sorted(path.name for path in store.iterdir()) == [
        *("contaminated.jsonl", "manifest.json", "quarantine.jsonl", "validation.parquet")
    ]
    remote, here = StoreReader(address), StoreReader(tmp_path / "local")
    rows = np.arange(local.num_rows)
    assert np.array_equal(remote.read_rows(rows).input_ids, here.read_rows(rows).input_ids)
    assert (
        read_file(f"{address.replace('store?', 'store/quarantine.jsonl?')}")
        == (store / "quarantine.jsonl").read_bytes()
    )

    assert build(config, tmp_path / "elsewhere") == local, "a store that is there is found from another machine"
    assert not list((tmp_path / "elsewhere").glob("shard_*"))
    later = server.locate("built", "later")
    StoreUpload(later).move(tmp_path / "local" / local.shards[0].name)  # as an upload that was killed leaves it
    assert build(CorpusConfig(**layout, upload_to=later), tmp_path / "local") == local == Manifest.load(later)
    assert np.array_equal(StoreReader(later).read_rows(rows).input_ids, remote.read_rows(rows).input_ids)
    with pytest.raises(CorpusError, match="another corpus config or tokenizer"):
        build(CorpusConfig(**layout | {"deduplicate": False}, upload_to=address), tmp_path / "other")


def test_what_cannot_be_read_is_one_clear_error(server: BucketServer, raw: Path) -> None:
    def refuse(path: str, words: str) -> None:
        with pytest.raises(CorpusError, match=rf"^corpus.sources.0.path={path.partition('?')[0]}.*{words}"):
            list_units(CorpusConfig(sources=[SourceConfig(path=path)]))

    refuse(server.locate("no-such-bucket", "raw"), "no such file or folder")
    secret = server.locate("bucket", "raw").replace("anonymous@", "").replace("://", "://KEY:SECRET@")
    for use in (
        lambda: list_units(CorpusConfig(sources=[SourceConfig(path=secret)])),
        lambda: Manifest.load(secret),
        lambda: build_token_store(CorpusConfig(upload_to=secret), make_byte_tokenizer(raw), raw / "store"),
    ):
        with pytest.raises(CorpusError, match=r"://\*\*\*@bucket/raw.*keys in an address would end in logs") as refused:
            use()
        assert "SECRET" not in str(refused.value)
    (raw / "what?.jsonl").write_text("{}\n")
    refuse(server.upload(raw, "unclear"), "'unclear/what.*jsonl' cannot be told from an address with options")
    with pytest.raises(CorpusError, match=rf"corpus.store={server.scheme}no-such-bucket.*not a token store"):
        Manifest.load(server.locate("no-such-bucket"))
