"""What files alone tell: whether base, texts, probes and questions are there, asked before the engines are imported.

Importing PyTorch takes longer than all of this, and who named a folder wrongly should not wait for it.
"""

from __future__ import annotations

from eval.items import load_benchmark
from layerplan.config.model import PretrainedModelConfig
from layerplan.config.run import RunConfig
from layerplan.pipeline.model_options import find_base, is_converted
from layerplan.pipeline.texts import iter_corpus_sources, iter_held_out_sources, list_source
from layerplan.plan import decide
from layerplan.tracer.probes import collect_probes


def check_files(config: RunConfig) -> None:
    """All that a run of the chain reads.

    Raises:
        LayerplanError: Naming what is missing, or cannot be read.
    """
    for check in (check_base_files, check_corpus, check_probes, check_benchmarks):
        check(config)


def check_base_files(config: RunConfig) -> None:
    """Raises `ModelError` when an existing base has no config that can be read; a GGUF file is looked at as it is converted."""
    if isinstance(config.model, PretrainedModelConfig) and not is_converted(config.model.name):
        find_base(config).config()


def check_corpus(config: RunConfig) -> None:
    """Raises `CorpusError` when a source is missing or holds no readable file, of the corpus, the base or a held-out text."""
    for name, source in (*iter_corpus_sources(config), *iter_held_out_sources(config)):
        list_source(name, source)


def check_probes(config: RunConfig) -> None:
    """Raises `ProbeError` when tracing is wanted and its probes cannot be made."""
    if decide.wants_profile(config.plan):
        collect_probes(config.trace)


def check_benchmarks(config: RunConfig) -> None:
    """Raises `EvaluationError` when a benchmark is missing, short or unlabelled."""
    for benchmark in config.evaluation.benchmarks:
        load_benchmark(benchmark)
