"""Arms of the race in one process: the stages of `layerplan finetune`, whose actors and workers are called here, without Ray.

Everything that decides a number is the job's own: prompts, start layers, rows, worker, loop, export, scores. A base is
asked and measured once per task. Of a finished arm the small files stay; its rows, checkpoints and weights are removed.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import ray.train.torch  # noqa: F401  the worker reads it, which Ray Train has imported by then
import torch
import torch.distributed as dist
from ray.train.v2._internal.execution.train_fn_utils import LocalTrainFnUtils, set_train_fn_utils

from eval.label_encoding import EncodedPrompt
from layerplan.artifacts import write_json
from layerplan.config.run import RunConfig
from layerplan.models.ref import ModelRef
from layerplan.pipeline.finetune import require_finetune
from layerplan.pipeline.label_scoring import judge_labels, record_cost, score_model
from layerplan.pipeline.label_stages import (
    build_label_store,
    encode_prompts,
    find_start_layers,
    make_samples,
    settle_config,
    train_labels,
)
from layerplan.pipeline.run_folder import open_run_folder
from layerplan.pipeline.stages import RunContext, decide_plan
from layerplan.plan.loss_recipe import LossRecipe
from layerplan.run_folder import BASE, RunFolder, name_step
from layerplan.storage.paths import StoredPath
from layerplan.tracer.samples import measure_here, write_records
from layerplan.tracking.tracker import NoopTracker
from layerplan.train.loss_proof import ask_by_name
from layerplan.train.outlet import Background, Outlet
from layerplan.train.request import TrainRequest
from layerplan.train.worker import forget_phase, train_phases

REMOVED = ("checkpoints", "hf", "adapters")


class Bench:
    """A base, what it was asked, and what was measured of it; each once, in a folder that arms share."""

    def __init__(self, model: ModelRef, shared: Path) -> None:
        self.model, self._shared = model, shared
        self._recipe: LossRecipe | None = None
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            set_train_fn_utils(LocalTrainFnUtils("race"))

    def run(self, config: RunConfig, *, keeps_weights: bool = False) -> Path:
        """Makes an arm; the folder of a finished one is returned as it is."""
        began = time.perf_counter()
        section = require_finetune(config)
        context = RunContext(config, open_run_folder(config), NoopTracker())
        folder = context.folder
        if folder.label_cost.exists():
            return folder.root
        task = encode_prompts(context, self.model, section)
        context = settle_config(context, section, task)
        plan = decide_plan(context, self.model, None)
        self._give(config, folder, "test", task.test, task.sha256)
        if section.method == "salf":
            self._give(config, folder, "train", task.train, task.sha256)
        starts = find_start_layers(context, self.model, section, task, plan)
        store = build_label_store(context, self.model, task, starts, section.order)
        base = score_model(context, self.model, task, BASE)
        times = {"before": time.perf_counter() - began}
        recipe = self._ask(context.config.corpus.seq_len)
        result = train_labels(context, self.model, section, plan, store, recipe, fit=fit_here)
        assert result.hf_dir is not None
        times |= {"steps": result.train_s, "training": result.wall_s}
        label, trained = name_step(result.final_step), self.model.at(result.hf_dir)
        write_records(
            folder.samples_of(label, "test"), make_samples(task.test), self._measure(config, trained, task.test)
        )
        judge_labels(context, task, base, score_model(context, trained, task, label))
        write_json(folder.root / "seconds.json", times | {"all": time.perf_counter() - began})
        if not keeps_weights:
            drop_weights(folder)
        record_cost(context, self.model, section, plan, starts, result)
        return folder.root

    def _give(
        self, config: RunConfig, folder: RunFolder, split: str, prompts: tuple[EncodedPrompt, ...], sha256: str
    ) -> None:
        """Puts the measurement of the base where the stages look for it."""
        kept, wanted = self._shared / f"{sha256[:16]}_{split}.parquet", folder.samples_of(BASE, split)
        if not kept.exists():
            write_records(kept, make_samples(prompts), self._measure(config, self.model, prompts))
        wanted.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(kept, wanted)

    def _measure(self, config: RunConfig, model: ModelRef, prompts: tuple[EncodedPrompt, ...]) -> list[dict]:
        return measure_here(model, make_samples(prompts), config.trace)

    def _ask(self, seq_len: int) -> LossRecipe:
        if self._recipe is None:
            threads = torch.get_num_threads()
            report = ask_by_name(self.model, seq_len=seq_len)
            torch.set_num_threads(threads)
            assert report is not None
            self._recipe = report.recipe
        return self._recipe


def drop_weights(folder: RunFolder) -> None:
    """Removes what is large and can be made again."""
    for name in REMOVED:
        shutil.rmtree(folder.root / name, ignore_errors=True)
    for shard in folder.token_store.glob("*.parquet"):
        shard.unlink()


def fit_here(request: TrainRequest, checkpoints: StoredPath) -> None:
    """Trains in this process as the one worker would."""
    background = Background()
    train_phases(request, lambda part, step: None, Outlet(background))
    background.wait()
    forget_phase(torch.device("cpu"))
