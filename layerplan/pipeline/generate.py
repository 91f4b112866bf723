"""A look at what models say: greedy continuations by transformers, one model at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from layerplan.errors import ConfigError, ModelError
from layerplan.models.ref import ModelRef
from layerplan.pipeline.model_options import find_model
from layerplan.run_folder import CONFIG_NAME, RESULT_NAME
from layerplan.train.request import load_result


def print_continuations(models: Sequence[ModelRef], text: str, *, tokens: int, is_chat: bool = False) -> None:
    """Prints what each model makes of a text.

    Args:
        models: Of a run's folder its trained model is taken.
        text: What is continued.
        tokens: Longest continuation.
        is_chat: Whether the text is a user's turn.

    Raises:
        LayerplanError: When a model cannot be loaded or has no chat template, or `tokens` is not positive.
    """
    if tokens < 1:
        raise ConfigError(f"--tokens {tokens}: must be at least 1")
    for model in models:
        found = find_trained(model)
        print(f"{found}\n    {continue_text(found, text, tokens, is_chat)!r}\n", flush=True)


def find_trained(model: ModelRef) -> ModelRef:
    """The trained model of a run's folder; the model of any other name.

    Raises:
        ConfigError: When the run has none.
    """
    folder = Path(model.name).expanduser()
    if (folder / CONFIG_NAME).exists() and not (folder / RESULT_NAME).exists():
        raise ConfigError(
            f"{model.name}: a run's folder without a trained model yet; `layerplan status` says how far it is"
        )
    result = load_result(folder) if folder.is_dir() and not (folder / "config.json").exists() else None
    return model.at(find_model(model.name) if result is None or result.hf_dir is None else result.hf_dir)


@torch.inference_mode()
def continue_text(model: ModelRef, text: str, tokens: int, is_chat: bool) -> str:
    """The greedy continuation, up to the model's own end of text.

    Raises:
        ModelError: When the model cannot be loaded or has no chat template.
    """
    tokenizer = model.tokenizer()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    loaded: Any = model.load(dtype=dtype).to(device)
    if is_chat and not getattr(tokenizer, "chat_template", None):
        raise ModelError(f"model.name={model}: its tokenizer has no chat template; leave --chat out")
    if is_chat:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=not is_chat).input_ids.to(device)
    made = loaded.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, num_beams=1
    )
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
