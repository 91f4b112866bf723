"""What other tools' own freezing code trains under an exported plan, beside what the plan trains: must be equal.

    python benchmarks/plan_exports.py --axolotl CHECKOUT --llamafactory CHECKOUT --ms-swift CHECKOUT --peft SITE_PACKAGES

Each path is a checkout of that tool (for PEFT a folder that holds the package); one that is left out is not compared. Of a
checkout only the functions that freeze are read and run, so that none of its dependencies is needed.
"""

from __future__ import annotations

import argparse
import ast
import logging
import re
import subprocess
import sys
import typing
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import layerplan
from layerplan.config.plan import ExplicitPlanConfig, FreezeDeepPlanConfig, FreezeShallowPlanConfig
from layerplan.errors import PlanError
from layerplan.models.parameter_names import name_parameters
from layerplan.plan.exports import export_names
from layerplan.plan.layer_profile import ModelIdentity
from layerplan.plan.model_shape import ModelShape

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
FAMILIES = {"qwen3": False, "llama": False, "gemma3_text": True}
PLANS: dict[str, Any] = {
    "freeze_deep 3": FreezeDeepPlanConfig(boundary=3),
    "freeze_shallow 3": FreezeShallowPlanConfig(boundary=3),
    "layers 1, 10": ExplicitPlanConfig(trainable=[1, 10]),
    "first 3 and norm": FreezeDeepPlanConfig(boundary=3, train_final_norm=True),
    "last 2, embeddings, head": FreezeShallowPlanConfig(boundary=10, train_embeddings=True, train_lm_head=True),
    "modules of layers 1, 10": ExplicitPlanConfig(trainable=[1, 10], modules=["mlp.down_proj", "self_attn.?_proj"]),
}
Freezer = Callable[[nn.Module, dict[str, Any]], None]


def take(path: Path, names: set[str], **known: Any) -> dict[str, Any]:
    """Runs the named definitions of a file in a namespace of their own."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if getattr(node, "name", None) in names]
    space = {**vars(typing), "re": re, "torch": torch, "nn": nn, "np": np, "bisect_right": bisect_right, **known}
    exec(compile(ast.fix_missing_locations(tree), str(path), "exec"), space)
    return space


def open_axolotl(root: Path) -> Freezer:
    wanted = {
        "freeze_layers_except",
        "LayerNamePattern",
        "_merge_ranges",
        "_invert_ranges",
        "_create_freeze_parameters_hook",
    }
    known = {"is_main_process": lambda: False, "LOG": logging.getLogger("axolotl")}
    space = take(root / "src/axolotl/utils/freeze.py", wanted, **known)
    return lambda model, values: space["freeze_layers_except"](model, values["unfrozen_parameters"])


def open_llamafactory(root: Path) -> Freezer:
    logger = SimpleNamespace(info_rank0=lambda *_: None)
    known = {"logger": logger, "COMPOSITE_MODELS": {}, "get_forbidden_modules": lambda *_: set(), "annotations": None}
    source = (root / "src/llamafactory/model/adapter.py").read_text(encoding="utf-8")
    assert "def _setup_freeze_tuning(" in source
    known |= {"PreTrainedModel": Any, "FinetuningArguments": Any}
    space = take(root / "src/llamafactory/model/adapter.py", {"_setup_freeze_tuning"}, **known)

    def freeze(model: nn.Module, values: dict[str, Any]) -> None:
        def split(name: str) -> list[str]:
            return [part.strip() for part in str(values.get(name) or "").split(",") if part.strip()]

        arguments = SimpleNamespace(
            use_llama_pro=False,
            freeze_trainable_layers=values["freeze_trainable_layers"],
            freeze_trainable_modules=split("freeze_trainable_modules"),
            freeze_extra_modules=split("freeze_extra_modules") or None,
            freeze_multi_modal_projector=True,
        )
        space["_setup_freeze_tuning"](model, arguments, True, False)

    return freeze


def open_swift(root: Path) -> Freezer:
    wanted = {"freeze_parameters", "activate_parameters", "get_n_params_grads"}
    known = {"logger": logging.getLogger("swift"), "is_deepspeed_zero3_enabled": lambda: False}
    known["ContextManagers"] = None
    space = take(root / "swift/utils/transformers_utils.py", wanted, **known)
    space["get_n_params_grads"] = lambda model: ([p.numel() for p in model.parameters()], None)

    def freeze(model: nn.Module, values: dict[str, Any]) -> None:
        model.requires_grad_(True)
        space["freeze_parameters"](model, values["freeze_parameters_ratio"], [], None)
        space["activate_parameters"](model, values["trainable_parameters"], None)

    return freeze


def open_peft(root: Path) -> Freezer:
    sys.path.append(str(root))
    from peft import LoraConfig, get_peft_model

    def freeze(model: nn.Module, values: dict[str, Any]) -> None:
        options = {name: value for name, value in values.items() if name != "peft_type"}
        get_peft_model(model, LoraConfig(**options))

    return freeze


OPENERS = {"axolotl": open_axolotl, "llamafactory": open_llamafactory, "ms-swift": open_swift, "peft": open_peft}


def list_trained(model: nn.Module, tool: str) -> set[str]:
    """Names in the model's own spelling; of PEFT, the weights that an update or a saved copy stands for."""
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if tool != "peft":
        return names
    return {re.sub(r"\.(lora_[AB]|modules_to_save)\.default\b", "", name) for name in names}


def expect(names: Any, model: nn.Module, tool: str) -> set[str]:
    """What must train: PEFT updates the linear maps of a layer and leaves its norms alone."""
    if tool != "peft":
        return set(names.trainable)
    linear = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    inside = tuple(names.prefix_of(layer) for layer in range(names.num_layers))
    return {name for name in names.trainable if name in linear or not name.startswith(inside)}


def compare(tool: str, freeze: Freezer) -> list[str]:
    rows = []
    for family, is_tied in FAMILIES.items():
        config = AutoConfig.for_model(family, **SIZES, tie_word_embeddings=is_tied)
        values = config.to_dict() | {
            "model_type": "qwen3",
            "tie_word_embeddings": is_tied,
        }  # plans ask for depth and ties alone
        identity = ModelIdentity(name=family, model_type=family, num_layers=12)
        for title, wanted in PLANS.items():
            model = AutoModelForCausalLM.from_config(config)
            shape = ModelShape.from_hf_config(values)
            names = name_parameters(model, layerplan.make_plan(wanted, model=identity, shape=shape))
            model = AutoModelForCausalLM.from_config(config)
            expected = expect(names, model, tool)
            try:
                text = export_names(names, tool)
            except PlanError as error:
                rows.append(f"| {tool} | {family} | {title} | refused: {error} |")
                continue
            freeze(model, yaml.safe_load(text))
            found = list_trained(model, tool)
            same = (
                f"equal, {len(found)} parameters" if found == expected else f"DIFFERS: {sorted(found ^ expected)[:3]}"
            )
            rows.append(f"| {tool} | {family} | {title} | {same} |")
    return rows


def describe(root: Path) -> str:
    done = subprocess.run(["git", "-C", str(root), "describe", "--always"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "no checkout"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for tool in OPENERS:
        parser.add_argument(f"--{tool}", type=Path)
    args = vars(parser.parse_args())
    rows = []
    for tool, opener in OPENERS.items():
        root = args[tool.replace("-", "_")]
        if root is not None:
            print(f"{tool}: {describe(root)}")
            rows += compare(tool, opener(root))
    print("\n| tool | model | plan | parameters that train |\n|---|---|---|---|\n" + "\n".join(rows))
    return any("DIFFERS" in row for row in rows)


if __name__ == "__main__":
    sys.exit(main())
