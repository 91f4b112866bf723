"""What lies where in the folder of a run: the one place that spells its files, folders, labels and steps.

The ground floor, so that whoever writes a name and whoever reads it use the same one. Names that others decide
(`config.json` of a model, `.metadata` of PyTorch, Ray Train's index) are not of this module.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Protocol

# Directly in the folder of a run
CONFIG_NAME = "resolved_config.json"
BASE_MODEL_NAME = "base_model"
UNTRAINED_NAME = "untrained"
STITCHED_NAME = "stitched"
STITCH_NAME = "stitch.json"
"""In a stitched model and what is exported of it: where every layer and tensor comes from."""
PROFILE_NAME = "layer_profile.json"
PROBES_NAME = "layer_probes.parquet"
MEASUREMENTS_NAME = "layer_measurements.json"
MEASUREMENTS_STEM = "layer_measurements"
"""Of their table and figure."""
MEASURED_NAME = "measured.jsonl"
"""What was measured so far, a line for each piece of work, so that an interrupted measurement goes on."""
SELF_TEST_NAME = "self_test.json"
BASE_FILES_NAME = "base_files.json"
"""Hashes of an existing base's weights, config and code, when something was first made with it."""
PLAN_NAME = "freeze_plan.json"
PLAN_TEXT_NAME = "freeze_plan.md"
COST_NAME = "predicted_cost.json"
"""Cost of the run's plan and of training everything, for the run's own rows; shaped as `FreezePlan.predicted_cost`."""
COMPUTE_DTYPE_NAME = "compute_dtype.json"
MICRO_BATCH_NAME = "micro_batch.json"
"""Rows of a micro-batch that `train.micro_batch_size: auto` came to."""
STORE_NAME = "token_store"
CHECKPOINTS_NAME = "checkpoints"
PREFIX_CACHE_NAME = "prefix_cache"
"""States of rows that `train.cache_prefix` keeps while a run trains."""
METRICS_NAME = "metrics.jsonl"
LEDGER_NAME = "ledger.jsonl"
RESULT_NAME = "training.json"
EXPORTS_NAME = "hf"
EXPORT_NAME = "export.json"
ADAPTERS_NAME = "adapters"
EVALUATION_NAME = "evaluation"
GUARDRAIL_NAME = "guardrail.json"
VERDICTS_NAME = "verdicts.json"
REPORT_NAME = "report.html"
FAILURE_NAME = "failure.json"
SAMPLES_NAME = "label_samples"
LABEL_SCORES_NAME = "label_scores.json"
LABEL_COST_NAME = "label_cost.json"
DEVIATIONS_NAME = "deviations.png"
FIGURES_NAME = "figures"
STALLS_NAME = "stalls"
STEP_TIMES_NAME = "profile"
SWEEP_NAME = "sweep"
TRACKING_NAME = "tracking"
MLFLOW_RUNS_NAME = "mlflow_runs.json"
STOP_REQUEST = "stop_requested"
"""Asks the workers for a last checkpoint."""
LEASE_PREFIX, LEASE_SUFFIX = "lease-", ".json"
"""Around the holder of the run."""

# In a token store
MANIFEST_NAME = "manifest.json"
STREAM_NAME = "stream.json"
VALIDATION_NAME = "validation.parquet"
QUARANTINE_NAME = "quarantine.jsonl"
CONTAMINATED_NAME = "contaminated.jsonl"
JOURNAL_NAME = "build.sqlite"
SHARD_PREFIX = "shard_"

# In `checkpoints`, and in a checkpoint
RUN_ID_NAME = "run_id"
SET_ASIDE_NAME = "set_aside"
REASON_NAME = "reason.txt"
STATE_NAME = "train_state.json"
SEAL_NAME = "seal.json"
AWAITS_NAME = "awaits_validation"
"""In a checkpoint that must not be removed before it was validated."""

# In an export
CARD_NAME = "README.md"
ADAPTER_BASE_NAME = "adapter_base.json"
SCORING_SUFFIX = ".scoring"
"""Marks an export that was made for a scoring only."""

# In `evaluation`, and in the scores of a model
HELD_OUT_VERDICTS_NAME = "held_out_verdicts.json"
SCORES_STEM = "scores"
HELD_OUT_NAME = "held_out"
CONTINUATIONS_NAME = "continuations.jsonl"
ANSWERS_LEDGER_NAME = "answers.partial.jsonl"
ENGINE_LOGS_NAME = "engine_logs"

# In `sweep`
SEARCH_NAME = "search.json"
SWEEP_RESULTS_NAME = "results.json"
BOUNDARY_PREFIX = "boundary_"
TRIAL_NAME = "trial.json"
"""How a trial of the sweep ended."""
REPORTS_NAME = "reports.jsonl"
"""What a trial measured on the way to its last step."""
ROW_LOSSES_NAME = "row_losses.json"
"""Losses of a model on held-out rows, row by row."""
HELD_OUT_ROWS_NAME = "held_out_rows.npz"
SWEEP_CHOICE_NAME = "chosen.json"
TUNE_PREFIX = "tune_"
WORKERS_PREFIX = "workers_"
"""Of folders that Ray Tune and Ray Train keep their own files in while a sweep runs."""

# In `tracking`
LINEAGE_NAME = "lineage.jsonl"
ARTIFACTS_NAME = "artifacts.jsonl"
SENT_NAME = "sent.json"
REFUSED_NAME = "refused.jsonl"
SENDER_LOCK_NAME = "sender.lock"
UID_NAME = "uid"
MLFLOW_RUN_NAME = "mlflow_run.json"
EVENTS_PREFIX = "events_"

# Beside runs, in `storage_path`
MLFLOW_STORE_NAME = "mlflow.db"
MLFLOW_ARTIFACTS_NAME = "mlartifacts"

# Labels
BASE = "base"
"""Of the untouched base's scores; those of a checkpoint go by its step."""
TRAIN = "train"
"""Of the training in `metrics.jsonl` and in the lineage; a base model made by the job goes by its folder's name."""
STEP_PREFIX = "step_"


class Carrier(Protocol):
    """What brings a working folder to where the run is kept."""

    def carry(self) -> None:
        """Brings what is complete."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run below `<storage_path>/<run_name>`, or below its working folder when that is an address."""

    root: Path
    mirror: Carrier | None = None
    """The bucket that a working folder stands for."""

    def carry(self) -> None:
        """Brings what is complete to the bucket; a stage counts as done after that."""
        if self.mirror is not None:
            self.mirror.carry()

    @property
    def failure(self) -> Path:
        """What the run last ended with, while nobody has taken it up again."""
        return self.root / FAILURE_NAME

    @property
    def config(self) -> Path:
        """Every value the run used."""
        return self.root / CONFIG_NAME

    @property
    def base_model(self) -> Path:
        """Folder of a base model made by the job itself."""
        return self.root / BASE_MODEL_NAME

    @property
    def profile(self) -> Path:
        """Tracer measurements."""
        return self.root / PROFILE_NAME

    @property
    def probes(self) -> Path:
        """Per-probe measurements, from which any aggregate can be computed again."""
        return self.root / PROBES_NAME

    @property
    def measurements(self) -> Path:
        """What the tracer's rivals measured."""
        return self.root / MEASUREMENTS_NAME

    @property
    def self_test(self) -> Path:
        """How the model's loss is computed, as it answered."""
        return self.root / SELF_TEST_NAME

    @property
    def measured(self) -> Path:
        """What was measured so far."""
        return self.root / MEASURED_NAME

    @property
    def base_files(self) -> Path:
        """Which existing base the run was made with."""
        return self.root / BASE_FILES_NAME

    @property
    def plan(self) -> Path:
        """The freeze plan."""
        return self.root / PLAN_NAME

    @property
    def plan_text(self) -> Path:
        """The freeze plan, explained."""
        return self.root / PLAN_TEXT_NAME

    @property
    def predicted_cost(self) -> Path:
        """What the plan costs for the run's own rows, beside training everything."""
        return self.root / COST_NAME

    @property
    def compute_dtype(self) -> Path:
        """Rates by which `train.compute_dtype: auto` was decided."""
        return self.root / COMPUTE_DTYPE_NAME

    @property
    def token_store(self) -> Path:
        """Packed rows of the corpus."""
        return self.root / STORE_NAME

    @property
    def manifest(self) -> Path:
        """What the store holds; there once it is complete."""
        return self.token_store / MANIFEST_NAME

    @property
    def checkpoints(self) -> Path:
        """Checkpoints by step."""
        return self.root / CHECKPOINTS_NAME

    @property
    def metrics(self) -> Path:
        """One line per logged step."""
        return self.root / METRICS_NAME

    @property
    def ledger(self) -> Path:
        """Rows of each step, with `train.write_ledger`."""
        return self.root / LEDGER_NAME

    @property
    def stop_request(self) -> Path:
        """Asks the workers for a last checkpoint, while it is there."""
        return self.root / STOP_REQUEST

    @property
    def stalls(self) -> Path:
        """Stacks of trainings that stood still."""
        return self.root / STALLS_NAME

    @property
    def step_times(self) -> Path:
        """PyTorch's profiles of single steps."""
        return self.root / STEP_TIMES_NAME

    @property
    def training(self) -> Path:
        """Result of the finished training."""
        return self.root / RESULT_NAME

    @property
    def export(self) -> Path:
        """What the export proved about frozen and trained tensors."""
        return self.root / EXPORT_NAME

    def export_of(self, label: str) -> Path:
        """The model of a step as a Hugging Face folder."""
        return self.root / EXPORTS_NAME / label

    @property
    def evaluation(self) -> Path:
        """Scores, one folder per model."""
        return self.root / EVALUATION_NAME

    def scores_of(self, label: str) -> Path:
        """Scores of the base or of a step."""
        return self.evaluation / label

    @property
    def held_out_verdicts(self) -> Path:
        """Bits per byte of held-out texts, compared with the base's."""
        return self.evaluation / HELD_OUT_VERDICTS_NAME

    @property
    def guardrail(self) -> Path:
        """The scores that stopped the training."""
        return self.root / GUARDRAIL_NAME

    @property
    def verdicts(self) -> Path:
        """Statistical comparison with the base."""
        return self.root / VERDICTS_NAME

    @property
    def report(self) -> Path:
        """The page."""
        return self.root / REPORT_NAME

    @property
    def label_scores(self) -> Path:
        """Scores of a fine-tuning, before and after, and the test of their difference."""
        return self.root / LABEL_SCORES_NAME

    @property
    def label_cost(self) -> Path:
        """What a fine-tuning saved in backward passes, as planned and as counted."""
        return self.root / LABEL_COST_NAME

    @property
    def deviations(self) -> Path:
        """Figure of the deviations before and after a fine-tuning."""
        return self.root / DEVIATIONS_NAME

    @property
    def samples(self) -> Path:
        """Deviations and predictions of prompts with a label."""
        return self.root / SAMPLES_NAME

    def samples_of(self, label: str, split: str) -> Path:
        """Deviations and predictions of a model, `base` or a step, on a split of a fine-tuning's task."""
        return self.samples / f"{label}_{split}.parquet"

    @property
    def figures(self) -> Path:
        """The report's figures as PNG."""
        return self.root / FIGURES_NAME

    @property
    def sweep(self) -> Path:
        """Trials of a boundary sweep."""
        return self.root / SWEEP_NAME

    @property
    def tracking(self) -> Path:
        """The journals of what is sent to MLflow."""
        return self.root / TRACKING_NAME


def name_step(step: int) -> str:
    """Label of a step, the name of its checkpoint, export and scores: `step_00001000`."""
    return f"{STEP_PREFIX}{step:08d}"


def parse_step(label: str) -> int | None:
    """The step of a label, or None when it is none of a step."""
    digits = label.removeprefix(STEP_PREFIX)
    is_step = label.startswith(STEP_PREFIX) and digits.isascii() and digits.isdecimal() and len(digits) <= 18
    return int(digits) if is_step else None


def list_scored_steps(evaluation: Path) -> list[str]:
    """Labels of the steps that have scores of a benchmark, in order."""
    return sorted(path.name for path in evaluation.glob(STEP_PREFIX + "*") if any(path.glob("*.json")))


def is_export(folder: PurePath) -> bool:
    """Whether a path is that of a run's export, `<run>/hf/step_X`."""
    return folder.parent.name == EXPORTS_NAME and folder.name.startswith(STEP_PREFIX)
