"""Which texts and questions a run reads: each is looked at before anything starts, by a run and by a dry run alike.

Benchmarks and held-out texts are also what the corpus must not contain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from eval.held_out import name_source, read_held_out
from eval.items import load_benchmark
from layerplan.config.corpus import CorpusConfig, SourceConfig
from layerplan.config.model import ScratchModelConfig
from layerplan.config.run import RunConfig
from layerplan.corpus.decontamination import BenchmarkText, hash_held_out
from layerplan.corpus.sources import SOURCE_FIELD, list_units
from layerplan.corpus.unit import UnitTable
from layerplan.errors import LayerplanError
from layerplan.pipeline.run_folder import locate_run_folder
from layerplan.run_folder import RESULT_NAME
from layerplan.storage.address import is_address
from layerplan.storage.mirror import fetch_file

PRETRAIN_FIELD = "model.pretrain_sources.{index}"


def iter_corpus_sources(config: RunConfig) -> Iterator[tuple[str, SourceConfig]]:
    """What the corpus is built of, and the base as long as it is to be trained, each with its name in a config."""
    if config.corpus.store is None:
        for index, source in enumerate(config.corpus.sources):
            yield SOURCE_FIELD.format(index=index), source
    if isinstance(config.model, ScratchModelConfig) and config.model.pretrain_sources is not None:
        result = locate_run_folder(config).base_model / RESULT_NAME
        fetch_file(result)
        if not result.exists():
            for index, source in enumerate(config.model.pretrain_sources):
                yield PRETRAIN_FIELD.format(index=index), source


def iter_held_out_sources(config: RunConfig) -> Iterator[tuple[str, SourceConfig]]:
    """The held-out texts, each with its name in a config."""
    for item in config.evaluation.held_out:
        yield name_source(item), item.source


def list_source(name: str, source: SourceConfig, report: Callable[[str], None] | None = None) -> UnitTable:
    """What a source names; raises `CorpusError` when it is missing or holds no readable file. Arguments as of `list_units`."""
    return list_units(CorpusConfig(sources=[source]), field=name, report=report)


def print_texts_here(config: RunConfig) -> list[LayerplanError]:
    """What there is of the corpus on this machine, and what a run would stop at; addresses and the hub are not asked."""
    faults: list[LayerplanError] = []
    for name, source in iter_corpus_sources(config):
        if not is_address(source.path):
            with _collecting(faults):
                print_source(name, source)
    for name, source in iter_held_out_sources(config):
        if not is_address(source.path):
            with _collecting(faults):
                list_source(name, source)
    for benchmark in config.evaluation.benchmarks:
        if benchmark.path != "hub":
            with _collecting(faults):
                load_benchmark(benchmark)
    return faults


def print_source(name: str, source: SourceConfig) -> None:
    """How many files and bytes a source has; raises `CorpusError` when it cannot be read."""
    units = list_source(name, source, report=lambda line: print(f"note   {line}"))
    files, size = units.count_files(), units.num_bytes
    stored = f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size:,} bytes"
    print(f"source {source.path}: {files:,} file{'s' * (files != 1)}, {stored} as stored")


def print_faults(faults: Sequence[LayerplanError]) -> None:
    """Tells them as notes: a dry run is also made where the texts of the run are not."""
    for fault in faults:
        print(f"note   {fault}; a run would stop here")


def list_benchmark_texts(config: RunConfig) -> list[BenchmarkText]:
    """The questions and held-out documents that the corpus must not contain."""
    questions = [
        BenchmarkText(f"{benchmark.name}/{question.id}", question.question)
        for benchmark in map(load_benchmark, config.evaluation.benchmarks)
        for question in benchmark.questions
    ]
    return questions + list_held_out_texts(config)


def list_held_out_texts(config: RunConfig) -> list[BenchmarkText]:
    """The held-out documents among them."""
    return [
        BenchmarkText(f"held_out/{item.name}/{document.id}", document.text, is_held_out=True)
        for item in config.evaluation.held_out
        for document in read_held_out(item)
    ]


def hash_texts(config: RunConfig) -> str:
    """Hash of the held-out documents that a build looks for; empty when there is none."""
    return hash_held_out(list_held_out_texts(config), config.corpus.decontamination)


@contextmanager
def _collecting(faults: list[LayerplanError]) -> Iterator[None]:
    try:
        yield
    except LayerplanError as error:
        faults.append(error)
