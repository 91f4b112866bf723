"""The base stage: an existing model by name, one put together, or a small one trained briefly with the `full` plan."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from layerplan.aside import writing_folder_aside
from layerplan.config.corpus import CorpusConfig
from layerplan.config.model import ScratchModelConfig
from layerplan.config.stitch import StitchedModelConfig
from layerplan.config.train import TrainConfig
from layerplan.corpus.build import build_token_store
from layerplan.corpus.sources import SOURCE_FIELD, iter_documents
from layerplan.errors import ModelError
from layerplan.models.ref import ModelRef
from layerplan.models.scratch import build_scratch_model, train_tokenizer
from layerplan.models.weight_files import WEIGHTS_NAME
from layerplan.pipeline.model_options import find_base
from layerplan.pipeline.same_base import check_same_base
from layerplan.pipeline.stages import RunContext, name_store, say, send_store, tracked
from layerplan.pipeline.stitched import make_stitched
from layerplan.pipeline.texts import PRETRAIN_FIELD, list_benchmark_texts
from layerplan.plan.policies import make_full_plan
from layerplan.run_folder import BASE_MODEL_NAME, UNTRAINED_NAME, RunFolder
from layerplan.storage.mirror import carry_folder
from layerplan.tracking.tracker import RunSinkFactory
from layerplan.train.trainer import TrainRequest, load_result, run_training

TOKENIZER_SAMPLE_CHARS = 8_000_000
"""Text the tokenizer is trained on; more changes the merges little."""


def prepare_model(context: RunContext) -> ModelRef:
    """Returns the base model, making it first when the config asks for that."""
    model = context.config.model
    if isinstance(model, StitchedModelConfig):
        return make_stitched(context, model)
    if not isinstance(model, ScratchModelConfig):
        found = _find_commit(find_base(context.config), model.revision)
        check_same_base(context.folder, found)
        carry_folder(Path(found.name))  # a conversion, for the workers of other nodes
        return found
    finished = load_result(context.folder.base_model)
    if finished is not None:
        say("base", f"found {finished.hf_dir}")
        return ModelRef(str(finished.hf_dir))
    with tracked(context, BASE_MODEL_NAME) as tracker:
        tracker.log_params(model.model_dump(mode="json"))
        untrained = _make_untrained(context, model)
        corpus = _pretrain_corpus(context, model)
        store = RunFolder(context.folder.base_model).token_store
        build_token_store(
            send_store(corpus, store),
            untrained,
            store,
            questions=list_benchmark_texts(context.config),
            seed=context.config.seed,
            report=lambda line: say("base", line),
        )
        start = ModelRef(str(untrained))
        plan = make_full_plan(start.identity(), start.shape())
        context.folder.carry()
        result = run_training(
            TrainRequest(
                run_dir=context.folder.base_model,
                model=start,
                plan=plan,
                store=name_store(store),
                config=_pretrain_config(context.config.train, model),
                seed=context.config.seed,
                sink_factory=RunSinkFactory(context.folder.metrics, BASE_MODEL_NAME, tracker),
                records=(context.folder.metrics,),
                document_mask=corpus.document_mask,
            )
        )
        say("base", f"loss {result.first_loss:.3f} -> {result.final_loss:.3f} in {result.final_step} steps")
    if result.stopped_early:
        raise SystemExit(143)
    return ModelRef(str(result.hf_dir))


def _find_commit(base: ModelRef, asked: str) -> ModelRef:
    """An existing base at the commit that the run has, else at the one where the revision that is `asked` for stands."""
    found = base.at_commit()
    if base.revision != asked:
        with suppress(ModelError):  # only to tell: the run has its commit
            moved = replace(base, revision=asked).at_commit().revision
            if moved != found.revision:
                say("base", f"{asked} of {base} is at {moved[:12]} now; this run goes on with {found.revision[:12]}")
    return found


def _make_untrained(context: RunContext, model: ScratchModelConfig) -> Path:
    """Tokenizer and random weights, in a folder of their own."""
    folder = context.folder.base_model / UNTRAINED_NAME
    if not (folder / WEIGHTS_NAME).exists():
        say("base", f"training a tokenizer of {model.vocab_size:,} entries")
        texts = _sample_texts(context, model)
        with writing_folder_aside(folder) as made:
            tokenizer = train_tokenizer(
                texts, vocab_size=model.vocab_size, out_dir=made, max_length=model.max_position_embeddings
            )
            build_scratch_model(model, tokenizer, made, seed=context.config.seed)
    return folder


def _sample_texts(context: RunContext, model: ScratchModelConfig) -> Iterator[str]:
    """Text of the pre-training and of the run itself, so that the tokenizer serves both."""
    corpora = {SOURCE_FIELD: context.config.corpus}
    if model.pretrain_sources is not None:
        corpora = {PRETRAIN_FIELD: _pretrain_corpus(context, model)} | corpora
    for field, corpus in corpora.items():
        left = TOKENIZER_SAMPLE_CHARS // len(corpora)
        for document in iter_documents(corpus, field=field):
            if left <= 0:
                break
            left -= len(document.text)
            yield document.text


def _pretrain_corpus(context: RunContext, model: ScratchModelConfig) -> CorpusConfig:
    corpus = context.config.corpus.model_copy(update={"store": None, "upload_to": None})
    return corpus if model.pretrain_sources is None else corpus.model_copy(update={"sources": model.pretrain_sources})


def _pretrain_config(train: TrainConfig, model: ScratchModelConfig) -> TrainConfig:
    return train.model_copy(
        update={
            "max_steps": model.pretrain_steps,
            "checkpoint_every_steps": model.pretrain_steps,
            "validate_every_steps": model.pretrain_steps,
            "keep_checkpoints": 1,
            "cache_prefix": "off",  # nothing is frozen
            "optimizer": train.optimizer.model_copy(update={"learning_rate": model.pretrain_learning_rate}),
        }
    )
