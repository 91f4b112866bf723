"""Measures bits per byte on held-out text: windows of every text through one pool of a model's actors.

A document's tokens are cut into windows of the model's length; each token is predicted exactly once, the first of the
document from the beginning- or end-of-text token.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from eval.encoding import count_control_tokens, encode_prompts, find_first_id, require_tokens
from eval.held_out import HeldOutResult, load_held_out, read_held_out
from eval.logits import choose_dtype
from layerplan.actor_pool import ActorPool, map_over_actors
from layerplan.artifacts import compute_sha256, write_text
from layerplan.config.evaluation import EvaluationConfig
from layerplan.errors import EvaluationError
from layerplan.models.cores import find_threads, use_cores
from layerplan.models.footprint import estimate_actor_memory
from layerplan.models.ref import ModelRef
from layerplan.progress import ProgressLines
from layerplan.run_folder import HELD_OUT_NAME

logger = logging.getLogger(__name__)

MAX_WINDOW = 2048
"""Longest window, in tokens; bounds the logits held at once."""
WINDOWS_PER_BATCH = 4
"""Few, so that a slow machine says something from time to time."""


@dataclass
class _Text:
    """A text that is not scored yet."""

    name: str
    documents: list[str]
    origin: dict[str, Any]
    encoded: list[list[int]] = field(default_factory=list)
    nats: list[float] = field(default_factory=list)
    windows_left: int = 0


def iter_windows(num_tokens: int, window: int) -> Iterator[tuple[int, int]]:
    """Yields (start, stop) of the tokens each window predicts; every token lies in exactly one."""
    for start in range(0, num_tokens, window):
        yield start, min(start + window, num_tokens)


class HeldOutActor:
    """A model that gives the negative log-likelihood of windows."""

    def __init__(
        self,
        model: ModelRef,
        dtype: str,
        num_gpus: float,
        num_threads: int | None = None,
        num_engines: int = 1,
    ) -> None:
        use_cores(find_threads(num_threads, num_engines))
        self._device = torch.device("cuda" if num_gpus > 0 and torch.cuda.is_available() else "cpu")
        chosen = choose_dtype(dtype, self._device)
        self._model: Any = model.load(dtype=chosen).to(self._device)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Takes rows `text, document, ids`; `ids` starts with the token the first prediction looks back on."""
        return {
            "text": batch["text"],
            "document": batch["document"],
            "nats": [self.compute_nats([int(t) for t in ids]) for ids in batch["ids"]],
        }

    def compute_nats(self, ids: Sequence[int]) -> float:
        """Negative log-likelihood of `ids[1:]` given `ids[0]`, in float32 log-probabilities summed in float64."""
        with torch.inference_mode():
            tokens = torch.tensor([list(ids)], device=self._device)
            logits = self._model(input_ids=tokens[:, :-1], use_cache=False).logits[0].float()
            picked = logits.gather(1, tokens[0, 1:, None]).squeeze(1) - torch.logsumexp(logits, -1)
            return float(-picked.double().sum())


def score_held_out(
    model: ModelRef,
    config: EvaluationConfig,
    out_dir: Path,
    *,
    report: Callable[[str], None] = logger.info,
) -> dict[str, HeldOutResult]:
    """Scores a model on every held-out text; writes `held_out/<name>.json`. Ray must be initialised.

    What was scored before with the same weights on the same text is read back. The rest goes through one pool.

    Returns:
        Name of each text to its result.

    Raises:
        EvaluationError: When a text has no document or no token, or the tokenizer no end-of-text token.
        CorpusError: When a text cannot be read.
    """
    if not config.held_out:
        return {}
    texts = _describe_texts(model, config)
    found = load_held_out(out_dir, [text.name for text in texts])
    wanted = [text for text in texts if not _is_scored(text, found.get(text.name), config)]
    if wanted:
        documents = " and ".join(f"{len(text.documents):,} documents of {text.name}" for text in wanted)
        report(f"bits per byte of {documents}")
        for result in _measure(model, wanted, config, report):
            found[result.name] = result
            write_text(out_dir / HELD_OUT_NAME / f"{result.name}.json", json.dumps(result.model_dump()) + "\n")
    return {text.name: found[text.name] for text in texts}


def check_held_out(model: ModelRef, config: EvaluationConfig) -> None:
    """Looks at the texts before anything is asked.

    Raises:
        EvaluationError: When a text has no document, or none that gives a token.
        CorpusError: When a text cannot be read.
    """
    tokenizer = model.tokenizer()
    for item in config.held_out:
        require_tokens(tokenizer, [document.text for document in read_held_out(item)], item.name)


def _describe_texts(model: ModelRef, config: EvaluationConfig) -> list[_Text]:
    """The texts, and what a result of each says about where it comes from."""
    identity = model.identity()
    tokenizer, config_sha256 = model.tokenizer(), model.hash_files()["config"]
    texts = []
    for item in config.held_out:
        documents = [document.text for document in read_held_out(item)]
        require_tokens(tokenizer, documents, item.name)
        origin = {
            "name": item.name,
            "text_sha256": compute_sha256(documents),
            "model": identity.name,
            "weights_sha256": identity.weights_sha256,
            "config_sha256": config_sha256,
            "dtype": config.computed_dtype,
            "num_control_tokens": count_control_tokens(tokenizer, documents),
        }
        texts.append(_Text(item.name, documents, origin))
    return texts


def _is_scored(text: _Text, before: HeldOutResult | None, config: EvaluationConfig) -> bool:
    if before is None:
        return False
    known = set(text.origin) - ({"config_sha256"} if before.config_sha256 is None else set())
    settled = before.model_copy(update={"dtype": config.read_dtype(before.dtype)})
    return settled.model_dump(include=known) == {name: text.origin[name] for name in known}


def _sum_up(text: _Text, window: int) -> HeldOutResult:
    sizes = [len(document.encode("utf-8")) for document in text.documents]
    measured = {
        "window": window,
        "bits_per_byte": sum(text.nats) / math.log(2) / sum(sizes),
        "num_tokens": sum(map(len, text.encoded)),
        "document_nats": text.nats,
        "document_bytes": sizes,
    }
    return HeldOutResult.model_validate(text.origin | measured)


def _measure(
    model: ModelRef,
    texts: Sequence[_Text],
    config: EvaluationConfig,
    report: Callable[[str], None],
) -> Iterator[HeldOutResult]:
    """Yields each text's result as soon as its last window is in."""
    tokenizer = model.tokenizer()
    first = find_first_id(tokenizer, str(model))
    window = min(model.max_positions() or MAX_WINDOW, MAX_WINDOW)
    for text in texts:
        text.encoded = encode_prompts(tokenizer, text.documents, add_special_tokens=False)
        text.nats = [0.0] * len(text.documents)
    rows: list[dict[str, Any]] = [
        {"text": place, "document": index, "ids": [first, *ids][start : stop + 1]}
        for place, text in enumerate(texts)
        for index, ids in enumerate(text.encoded)
        for start, stop in iter_windows(len(ids), window)
    ]
    for row in rows:
        texts[row["text"]].windows_left += 1
    pool = ActorPool(
        config.num_actors,
        config.num_cpus_per_actor,
        config.num_gpus_per_actor,
        what=f"{model}: held-out text: the scoring process",
        error=EvaluationError,
        memory_bytes=estimate_actor_memory(
            model, config.dtype, num_gpus=config.num_gpus_per_actor, num_logits=window * len(tokenizer)
        ),
        labels=config.labels,
    )
    options = (config.dtype, config.num_gpus_per_actor, config.num_threads_per_actor, config.num_actors)
    progress = ProgressLines("windows of held-out text", len(rows), report)
    answered = 0
    with closing(
        map_over_actors(pool, HeldOutActor, (model, *options), rows, batch_size=WINDOWS_PER_BATCH, progress=progress)
    ) as batches:
        for batch in batches:
            for place, document, value in zip(batch["text"], batch["document"], batch["nats"], strict=True):
                texts[int(place)].nats[int(document)] += float(value)
                texts[int(place)].windows_left -= 1
            answered += len(batch["nats"])
            for place in dict.fromkeys(int(place) for place in batch["text"]):
                if texts[place].windows_left == 0:
                    yield _sum_up(texts[place], window)
    if answered != len(rows):
        raise EvaluationError(f"{model}: {answered} windows came back of {len(rows)} of held-out text")
