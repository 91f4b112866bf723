"""Raw text to a token store, without tracing or training anything."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from layerplan.config.run import RunConfig
from layerplan.corpus.manifest import Manifest
from layerplan.errors import ConfigError


def build_corpus(config: RunConfig) -> None:
    """Builds the store and prints its counts."""
    if config.corpus.mode == "on_the_fly":
        raise ConfigError("corpus.mode=on_the_fly: builds no store; start a run, or set corpus.mode=store")
    from layerplan.pipeline.file_checks import check_base_files, check_benchmarks, check_corpus

    for check in (check_base_files, check_corpus, check_benchmarks):
        check(config)
    from layerplan.pipeline.base_model import prepare_model
    from layerplan.pipeline.checks import check_model
    from layerplan.pipeline.demands import ask_for_building
    from layerplan.pipeline.session import open_run
    from layerplan.pipeline.stages import build_store

    check_model(config)
    with open_run(config, ask_for_building) as context:
        store = build_store(context, prepare_model(context))
    manifest = Manifest.load(store)
    Console(width=140).print(render_manifest(manifest))
    print(f"store     {store}")


def render_manifest(manifest: Manifest) -> Table:
    """What became of every document, per source; a column adds up to its `in`."""
    table = Table()
    table.add_column("documents")
    for source in manifest.sources:
        table.add_column(
            source.path if source.weight is None else f"{source.path} x {source.weight:g}", justify="right"
        )
    if len(manifest.sources) > 1:
        table.add_column("all", justify="right")
    columns = [
        *(source.counts for source in manifest.sources),
        *([manifest.counts] if len(manifest.sources) > 1 else []),
    ]
    for name in ["in", *(name for name in manifest.counts if name != "in")]:
        table.add_row(name, *(f"{counts.get(name, 0):,}" for counts in columns), end_section=name == "in")
    table.add_section()
    for name, field in (
        ("rows", "num_rows"),
        ("tokens", "num_tokens"),
        ("padding", "num_padding_tokens"),
        ("validation rows", "num_validation_rows"),
        ("with control tokens", "num_control_documents"),
        ("control tokens", "num_control_tokens"),
    ):
        values = [*(getattr(source, field) for source in manifest.sources), getattr(manifest, field)]
        table.add_row(name, *("not known" if value is None else f"{value:,}" for value in values[: len(columns)]))
    policy = {"text": "kept as text", "token": "made tokens", "unknown": "made tokens, uncounted"}
    table.caption = (
        f"{len(manifest.shards):,} shards of rows of {manifest.seq_len:,} tokens; control tokens spelled out"
        f" {policy[manifest.control_tokens]};"
        f" {manifest.num_questions:,} questions and held-out documents looked for,"
        f" {manifest.num_questions_too_short:,} too short for it"
    )
    return table
