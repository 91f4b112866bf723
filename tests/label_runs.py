"""What a finished fine-tuning on labels leaves behind, written without a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from eval.label_scores import compare_labels, score_labels
from layerplan.config.plan import ExplicitPlanConfig
from layerplan.corpus.label_store import write_label_store
from layerplan.corpus.manifest import LabelFacts
from layerplan.plan.layer_profile import ModelIdentity
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.policies import make_plan
from layerplan.run_folder import RunFolder
from tests.qwen3 import TINY_QWEN3

CLASSES = {"odd": 11, "even": 12, "neither": 13}
"""Class to its token."""
TASK = "numbers"


def leave_run(
    root: Path,
    gold: Sequence[str],
    base: Sequence[str],
    trained: Sequence[str],
    *,
    seed: int = 0,
    task_sha256: str = "a" * 64,
    weights: str = "w" * 64,
) -> Path:
    """A run's folder; predictions are classes, or anything else for what is no label."""
    run = RunFolder(root)
    root.mkdir(parents=True)
    model = ModelIdentity(name="tiny", model_type="qwen3", num_layers=3, weights_sha256=weights)
    plan = make_plan(ExplicitPlanConfig(trainable=["0:"]), model=model, shape=ModelShape.from_hf_config(TINY_QWEN3))
    plan.save(run.plan)
    facts = LabelFacts(task=TASK, task_sha256=task_sha256, label_ids=CLASSES, start_layers=[0, 2])
    sizes = {"vocab_size": 20, "padding_id": 0, "tokenizer_sha256": "t" * 64, "counts": {"in": 2, "kept": 2}}
    write_label_store(run.token_store, [(5, 11), (6, 12)], [], facts, **sizes)
    places = list(CLASSES)
    truth = [places.index(name) for name in gold]
    models, guesses = {}, []
    for label, predicted in (("base", base), ("step_00000004", trained)):
        guess = [places.index(name) if name in CLASSES else -1 for name in predicted]
        records = [
            {"id": f"test/{row}", "label_id": CLASSES[name], "predicted_id": CLASSES.get(said, 3)}
            for row, (name, said) in enumerate(zip(gold, predicted, strict=True))
        ]
        run.samples_of(label, "test").parent.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(records), run.samples_of(label, "test"))
        scores = score_labels(truth, guess, places, task=TASK, task_sha256=task_sha256)
        models[label] = scores.model_dump(mode="json") | {"mean_deviation": [1.0, 0.75, 0.5, 0.25 + 0.1 * len(models)]}
        guesses.append(guess)
    verdicts = compare_labels(truth, *guesses, len(places))
    write(run.label_scores, {"models": models, "verdicts": {name: v.model_dump() for name, v in verdicts.items()}})
    saving = {"depth": 1 / 3, "flops": 0.25}
    write(run.label_cost, {"planned": saving, "counted": saving | {"flops": 0.2}, "propagated_rows": [1, 0, 1]})
    write(run.config, {"name": root.name, "seed": seed, "storage_path": str(root.parent)})
    write(run.training, finished(root))
    return root


def finished(root: Path) -> dict[str, object]:
    """What `training.json` says of a run of four steps."""
    numbers = dict.fromkeys(("first_loss", "final_loss", "train_s", "wall_s", "tokens_per_s", "mfu"), 1.0)
    counts = {"final_step": 4, "tokens_seen": 8, "skipped_steps": 0, "rollbacks": 0}
    ends = {"validation_loss": None, "proof": {}, "stopped_early": False, "hf_dir": None}
    return {**numbers, **counts, **ends, "final_checkpoint": "checkpoints/step_00000004"}


def write(path: Path, value: object) -> None:
    """A JSON file."""
    path.write_text(json.dumps(value), encoding="utf-8")
