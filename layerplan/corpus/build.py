"""Raw text to a token store: read, clean, de-duplicate, decontaminate, tokenize, pack, write.

Reading, cleaning and tokenizing run in a Ray Data actor pool over the units; what must see every document in order
(de-duplication across the corpus, packing, writing) runs here, on the ordered stream the pool returns. The same
input, config and tokenizer give the same bytes, whatever the number of actors and however often the build was killed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from layerplan.actor_pool import ActorPool, map_over_actors
from layerplan.artifacts import compute_list_sha256, compute_sha256
from layerplan.aside import writing_aside
from layerplan.config.corpus import CorpusConfig
from layerplan.corpus.decontamination import BenchmarkText, fold_question, hash_held_out
from layerplan.corpus.encoders import explain_fallback
from layerplan.corpus.joining import Joining, check_joining, describe_unknown, read_joining
from layerplan.corpus.journal import BuildJournal, remove_journal
from layerplan.corpus.manifest import Manifest
from layerplan.corpus.outcome import KEPT, QUARANTINED
from layerplan.corpus.progress import BuildProgress
from layerplan.corpus.sources import UNIT_BYTES, list_units
from layerplan.corpus.tokenize import Record, UnitTokenizer
from layerplan.corpus.unit import Unit, UnitTable
from layerplan.corpus.upload import StoreUpload
from layerplan.corpus.writer import StoreWriter, check_shards, explain_disk_faults, move_shards
from layerplan.errors import CorpusError
from layerplan.run_folder import CONTAMINATED_NAME, MANIFEST_NAME, QUARANTINE_NAME, VALIDATION_NAME
from layerplan.storage.address import hide_keys, is_address

logger = logging.getLogger(__name__)

WORKERS_PER_INPUT_BYTES = 32 * 2**20
"""One actor per so much input at most; more would wait longer for their start than they work."""
ITEMS_PER_PIPELINE = 1024
"""Items of up to `UNIT_BYTES` each that one Ray Data pipeline takes; a build is a row of pipelines."""
UNITS_PER_ITEM = 8192
"""However small they are."""
NOT_CONTENT = {
    "store",
    "upload_to",
    "tokenizer_library",
    "document_mask",
    "num_workers",
    "num_cpus_per_worker",
    "num_writers",
    "max_bad_fraction",
}
"""Fields that do not change the rows."""
JOINING = {"end_of_text", "begin_token", "control_tokens"}
"""Fields that do, by what they mean for the tokenizer at hand; the manifest says that itself."""


def build_token_store(
    config: CorpusConfig,
    tokenizer: Path,
    store: Path,
    *,
    questions: Sequence[BenchmarkText] = (),
    seed: int = 0,
    report: Callable[[str], None] = logger.info,
) -> Manifest:
    """Builds the store, goes on with an unfinished one, or returns the manifest of a complete one.

    Uses Ray Data when Ray is initialised in this process, else reads in this process; both give the same bytes.

    Args:
        config: Sources, filters and row layout; with `upload_to`, shards move there as they are finished.
        tokenizer: `tokenizer.json`, or the folder that holds it.
        store: Folder to write.
        questions: Benchmark questions to keep out.
        seed: Seed of the choice of validation rows.
        report: Receives progress lines.

    Raises:
        CorpusError: When a source is missing, nothing is kept, too much is malformed, or the store cannot be written.
        ModelError: When the tokenizer cannot be read, or nothing says which token ends a text.
    """
    joining = read_joining(config, tokenizer)
    facts = joining.facts
    config_sha256 = hash_config(config, questions, seed)
    held_out_sha256 = hash_held_out(questions, config.decontamination)
    upload = StoreUpload(config.upload_to) if config.upload_to is not None else None
    is_here, is_uploaded = (store / MANIFEST_NAME).exists(), upload is not None and _is_uploaded(upload)
    if is_here or is_uploaded:
        found = store if is_here or upload is None else upload.address
        manifest = find_complete(found, joining, config_sha256, report)
        warn_of_held_out(manifest, found, held_out_sha256, report)
        warn_of_files(manifest, found, config, report)
        if upload is not None and not is_uploaded:
            _upload_complete(store, manifest, upload, report)
        elif not is_here:
            store.mkdir(parents=True, exist_ok=True)
            write_manifest(store, manifest)
        return manifest
    units = list_units(config, report=report)
    try:
        store.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CorpusError(f"{store}: cannot be written ({error})") from None
    files_sha256 = hash_units(units)
    identity = [facts.sha256, config_sha256, files_sha256, held_out_sha256, config.tokenizer_library]
    fallback = explain_fallback(facts.json_text, config.tokenizer_library)
    if fallback is not None:
        report(fallback)
    for note in facts.notes:
        report(note)
    journal = BuildJournal(store, " ".join(identity), str(joining))
    try:
        writer = StoreWriter(
            config,
            store,
            journal,
            end_of_text_id=joining.end_of_text_id,
            begin_ids=joining.begin_ids,
            num_ids=joining.num_ids,
            seed=seed,
            upload=upload,
        )
        with closing(writer):
            if writer.resumed:
                report(f"goes on after {len(writer.state.shards)} shards and {writer.counts['in']:,} documents")
            _consume(config, units, writer, lambda rest: iter_records(config, rest, facts.json_text, questions), report)
            hashes = {"config_sha256": config_sha256, "held_out_sha256": held_out_sha256, "files_sha256": files_sha256}
            manifest = _finish(config, store, writer, joining, hashes, questions)
        write_manifest(store, manifest, upload)
        journal.remove()
    except TooSmallError:
        journal.remove()  # there is nothing to go on with, so that more text begins anew
        raise
    finally:
        journal.close()
    return manifest


class TooSmallError(CorpusError):
    """All that there is to read makes no row."""


def hash_config(config: CorpusConfig, questions: Sequence[BenchmarkText], seed: int) -> str:
    """Hash of all that decides the rows beside the input, the tokenizer and held-out documents."""
    asked = [[question.id, question.text] for question in questions if not question.is_held_out]
    return compute_sha256([config.model_dump(mode="json", exclude=NOT_CONTENT | JOINING), asked, seed])


def hash_units(units: Iterable[Unit]) -> str:
    """Hash of the input's files and sizes: a build may only go on where it stopped while they are the same."""
    return compute_list_sha256(unit.list_fields() for unit in units)


def _is_uploaded(upload: StoreUpload) -> bool:
    try:
        return upload.is_complete()
    except (OSError, pa.ArrowException) as error:
        raise CorpusError(
            f"corpus.upload_to={hide_keys(upload.address)}: cannot be opened ({' '.join(str(error).split())[:200]})"
        ) from None


def _upload_complete(store: Path, manifest: Manifest, upload: StoreUpload, report: Callable[[str], None]) -> None:
    """Moves a store that was built here, or goes on where that was cut short."""
    report(f"uploading it to {upload.address}")
    names = [shard.name for shard in manifest.shards]
    check_shards(store, names, upload)
    move_shards(store, names, upload)
    write_manifest(store, manifest, upload)


def find_complete(store: Path | str, joining: Joining, config_sha256: str, report: Callable[[str], None]) -> Manifest:
    """The manifest of a complete store; refuses one of another config, tokenizer or joining of documents."""
    manifest = Manifest.load(store)
    if (manifest.tokenizer_sha256, manifest.config_sha256) != (joining.facts.sha256, config_sha256):
        raise CorpusError(
            f"{store}: was built from another corpus config or tokenizer, or other benchmark questions were kept out of it;"
            " remove it or choose another name (other questions alone are asked by `layerplan evaluate`)"
        )
    check_joining(manifest, joining, store)
    if isinstance(store, Path):
        remove_journal(store)
    unknown = describe_unknown(manifest, store)
    if unknown is not None:
        report(unknown)
    report(f"found {store}: {manifest.num_rows:,} rows of {manifest.seq_len:,} tokens")
    return manifest


def warn_of_held_out(
    manifest: Manifest, store: Path | str, held_out_sha256: str, report: Callable[[str], None]
) -> None:
    """Says so when a store was built without looking for the held-out documents that are measured on."""
    if may_hold(manifest, held_out_sha256):
        report(f"{store}: was built without looking for these held-out documents; it may contain some of them")


def warn_of_files(manifest: Manifest, store: Path | str, config: CorpusConfig, report: Callable[[str], None]) -> None:
    """Says so when files of local sources have other names or sizes than those a store was built from.

    Sources that are gone, as after a move to another machine, and those at addresses are not looked at.
    """
    if not manifest.files_sha256 or any(is_address(source.path) for source in config.sources):
        return
    with suppress(CorpusError):
        if hash_units(list_units(config)) != manifest.files_sha256:
            report(
                f"{store}: its sources have other files now, or of other sizes, and it stays as it is; another name builds"
                " one from what is there"
            )


def may_hold(manifest: Manifest, held_out_sha256: str) -> bool:
    """Whether a store was built while others than these held-out documents were looked for, or none."""
    return held_out_sha256 not in ("", manifest.held_out_sha256)


def _consume(
    config: CorpusConfig,
    units: UnitTable,
    writer: StoreWriter,
    iter_rest: Callable[[UnitTable], Generator[Record]],
    report: Callable[[str], None],
) -> None:
    """Feeds the writer source by source, each up to its limit, from where the writer stopped."""
    with closing(BuildProgress(units, writer, report)) as progress:
        for source, mine in units.split_by_source():
            last = mine.first + len(mine) - 1
            if writer.state.unit > last:
                continue
            rest = mine.resume(writer.state.unit, writer.state.skip)
            limit = config.sources[source].max_documents
            taken = writer.state.sources[source]
            if limit is None or taken.num_documents < limit:
                with closing(iter_rest(rest)) as records:  # stops the actors at once, also when an error ends the build
                    for record in records:
                        writer.add(record)
                        _check_lost_bytes(config, writer, progress.total_bytes)
                        progress.update()
                        if limit is not None and taken.num_documents >= limit:
                            break
            writer.finish_source(source, next_unit=last + 1)
        progress.finish()


def iter_records(
    config: CorpusConfig, units: UnitTable, tokenizer_json: str, questions: Sequence[BenchmarkText]
) -> Generator[Record]:
    """Records of units, in order, with the units' numbers.

    Raises:
        CorpusError: When the tokenizer libraries disagree.
    """
    import ray

    arguments = (config, tokenizer_json, list(questions))
    if not ray.is_initialized():
        tokenizer = UnitTokenizer(*arguments)
        for number, unit in units.number():
            for records in tokenizer.read(number, unit):
                yield from records
        return
    num_workers = config.num_workers or choose_num_workers(units, ray.cluster_resources().get("CPU", 1))
    items = join_units(units, num_workers)
    pool = ActorPool(num_workers, config.num_cpus_per_worker, what="a tokenizing process", error=CorpusError)
    while part := [{"units": item} for item in islice(items, ITEMS_PER_PIPELINE)]:
        tables = map_over_actors(pool, UnitTokenizer, arguments, part, take="tables", is_ordered=True)
        with closing(tables):
            for table in tables:
                yield from (Record(**fields) for fields in table.to_pylist())


def choose_num_workers(units: UnitTable, num_cpus: float) -> int:
    """One actor per CPU, but at most one per 32 MiB of input."""
    return max(1, min(int(num_cpus), -(-units.num_bytes // WORKERS_PER_INPUT_BYTES)))


def join_units(units: UnitTable, num_workers: int) -> Iterator[str]:
    """Joins consecutive small units into items, so that each is worth a task; few enough for all actors to have some."""
    target = min(UNIT_BYTES, units.num_bytes // (4 * num_workers))
    pending: list[Any] = []
    size = 0
    for number, unit in units.number():
        if pending and (size + unit.num_bytes > target or len(pending) == UNITS_PER_ITEM):
            yield json.dumps(pending)
            pending, size = [], 0
        pending.append((number, unit.list_fields()))
        size += unit.num_bytes
    yield json.dumps(pending)


def _check_lost_bytes(config: CorpusConfig, writer: StoreWriter, total_bytes: int) -> None:
    """Stops as soon as the files that cannot be read are known to be too large a share, and not hours later."""
    if writer.state.lost_bytes > config.max_bad_fraction * max(total_bytes, 1):
        raise CorpusError(
            f"corpus.max_bad_fraction={config.max_bad_fraction}: files of {writer.state.lost_bytes:,} of"
            f" {total_bytes:,} bytes cannot be read; the first is {writer.state.first_fault}"
        )


def _check_counts(config: CorpusConfig, store: Path, writer: StoreWriter) -> None:
    counts = writer.counts
    assert counts["in"] == sum(count for name, count in counts.items() if name != "in")
    bad = counts[QUARANTINED] / max(counts["in"], 1)
    has_rows = any(progress.num_full_rows for progress in writer.state.sources)
    if bad > config.max_bad_fraction:
        raise (CorpusError if has_rows else TooSmallError)(
            f"corpus.max_bad_fraction={config.max_bad_fraction}: {counts[QUARANTINED]} of {counts['in']} inputs are"
            f" malformed ({bad:.1%}); the first is {writer.state.first_fault}; all are in {store / QUARANTINE_NAME}"
        )
    if not has_rows:
        dropped = ", ".join(f"{counts[name]} {name}" for name in counts if name not in ("in", KEPT) and counts[name])
        raise TooSmallError(
            f"corpus.sources: {counts['in']} documents in, {counts[KEPT]} kept{dropped and f' ({dropped})'}, none fills"
            f" a row of seq_len={config.seq_len}; at least one full row of text is needed"
        )


def _finish(
    config: CorpusConfig,
    store: Path,
    writer: StoreWriter,
    joining: Joining,
    hashes: Mapping[str, Any],
    questions: Sequence[BenchmarkText],
) -> Manifest:
    _check_counts(config, store, writer)
    validation = writer.write_validation()
    sources = writer.list_sources()
    asked = list(questions) if config.decontamination.enabled else []
    return Manifest(
        seq_len=config.seq_len,
        rows_per_group=config.rows_per_group,
        num_rows=sum(source.num_rows for source in sources),
        num_validation_rows=len(writer.validation),
        num_tokens=sum(source.num_tokens for source in sources),
        num_padding_tokens=sum(source.num_padding_tokens for source in sources),
        **joining.describe(),
        num_control_documents=sum(source.num_control_documents or 0 for source in sources),
        num_control_tokens=sum(source.num_control_tokens or 0 for source in sources),
        **hashes,
        counts=dict(sorted(writer.counts.items())),
        num_questions=len(asked),
        num_questions_too_short=sum(
            len(fold_question(question.text)) < config.decontamination.ngram for question in asked
        ),
        sources=sources,
        shards=writer.shards,
        validation=validation,
    )


def write_manifest(store: Path, manifest: Manifest, upload: StoreUpload | None = None) -> None:
    """Writes the manifest aside and moves it into place: from then on the store is complete.

    Before that, what a store holds beside shards is copied to the address of `upload`, the manifest last.

    Raises:
        CorpusError: When the disk or the address refuses.
    """
    place = store if upload is None else upload.address
    with explain_disk_faults(place), writing_aside(store / MANIFEST_NAME) as partial:
        partial.write_text(manifest.render(), encoding="utf-8")
        if upload is not None:
            for path in (store / VALIDATION_NAME, store / QUARANTINE_NAME, store / CONTAMINATED_NAME):
                if path.exists():
                    upload.copy(path)
            upload.copy(partial, MANIFEST_NAME)
