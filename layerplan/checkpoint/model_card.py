"""`README.md` of an exported folder: what the model is, which layers trained, and how that was proved."""

from __future__ import annotations

import json
from typing import Any

from layerplan import __version__
from layerplan.checkpoint.export_report import ExportReport
from layerplan.plan.explain import summarize_plan
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.layer_profile import is_commit
from layerplan.plan.markdown import as_code, as_text


def render_model_card(plan: FreezePlan, *, step: int, state: dict[str, Any], report: ExportReport) -> str:
    """Markdown with the front matter the Hugging Face hub reads.

    Args:
        plan: The plan that was trained.
        step: Optimizer steps taken.
        state: The checkpoint's train state; losses and tokens are taken from it where they are known.
        report: What the export showed of its tensors.
    """
    front = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if is_commit(plan.model.revision):
        # of the hub; a folder's name, `<run>/step_X` for an export, would link to someone else's model
        front["base_model"] = plan.model.name
    short_name = plan.model.name.rstrip("/").rsplit("/", 1)[-1]
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in front.items()),
        "tags: [continued-pretraining, layer-freezing, layerplan]",
        "---",
        "",
        f"# {as_text(short_name)}, continued for {step:,} steps under a `{plan.plan_type}` freeze plan",
        "",
        f"Base: {as_code(plan.model.name)} at revision {as_code(plan.model.revision)}."
        " The base's licence and limits hold for this model too.",
        *(
            [f"Its weights were de-quantised from the GGUF file {as_code(str(plan.model.source))}."]
            if plan.model.source
            else []
        ),
        "",
        *summarize_plan(plan),
        "| | |",
        "|---|---|",
        *_numbers(state),
        f"| frozen tensors, dtype and bytes those of the base's files | {report.num_frozen} |",
        f"| trained tensors | {report.num_trained}, of which {report.num_trained_changed} changed;"
        f" written in {' and '.join(report.trained_dtypes)}, updated in float32 |",
        *(
            [
                "| tokenizer | split as `tokenizer.json` says, as in training; "
                f"the base's class, `{report.replaced_class}`, splits otherwise |"
            ]
            if report.replaced_class
            else []
        ),
        f"| freeze plan | `freeze_plan.json`, sha256 `{plan.sha256}` |",
        "",
        f"Made with layerplan {__version__}. What the model scores is in the run's report, beside its base.",
    ]
    return "\n".join(lines) + "\n"


def _numbers(state: dict[str, Any]) -> list[str]:
    labels = {
        "tokens_seen": ("tokens trained on", "{:,}"),
        "last_loss": ("training loss, nats per token", "{:.4f}"),
        "base_validation_loss": ("validation loss before the first step, nats per token", "{:.4f}"),
        "validation_loss": ("validation loss after the last, nats per token", "{:.4f}"),
        "corpus_sha256": ("corpus, sha256 of its rows", "`{}`"),
    }
    return [
        f"| {label} | {shape.format(state[name])} |"
        for name, (label, shape) in labels.items()
        if state.get(name) not in (None, "")
    ]
