"""Bits per byte on held-out text: a third metric, sensitive where small models still guess on multiple choice.

A document's tokens are cut into windows of the model's length; each token is predicted exactly once, the first of the
document from the end-of-text token. Bits per byte = sum of -log2 p(token) over the UTF-8 bytes of the text, so models
with different tokenizers can be compared. Two models are compared by a bootstrap over documents.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, ValidationError

from eval.artifacts import write_text
from eval.encoding import count_control_tokens, encode_prompts
from eval.logits import choose_dtype
from eval.progress import ProgressLines
from eval.resampling import BOOTSTRAP_SAMPLES
from eval.significance import ALPHA, correct_holm
from layerplan.config.base import StrictModel, describe_fault
from layerplan.config.corpus import CorpusConfig
from layerplan.config.evaluation import EvaluationConfig, HeldOutConfig
from layerplan.corpus.readers import Document
from layerplan.corpus.sources import iter_documents
from layerplan.errors import EvaluationError, find_layerplan_error
from layerplan.models.causal_lm import load_causal_lm, load_tokenizer
from layerplan.models.cores import find_threads, use_cores
from layerplan.models.files import identify_model
from layerplan.models.positions import find_max_positions
from layerplan.plan.hashing import compute_sha256

logger = logging.getLogger(__name__)

HELD_OUT_FOLDER = "held_out"
MAX_WINDOW = 2048
"""Longest window, in tokens; bounds the logits held at once."""
WINDOWS_PER_BATCH = 16
MIN_DOCUMENTS = 10
"""Fewer cannot be resampled: the bootstrap of one document has no spread at all."""


class HeldOutResult(StrictModel):
    """One model on one text."""

    name: str
    """Name of the text."""
    text_sha256: str
    """Hash of the documents; results of other texts cannot be compared."""
    model: str
    """Folder name or hub id."""
    weights_sha256: str | None
    """Hash of a folder's weight files."""
    dtype: str
    """Precision asked for."""
    window: int
    """Tokens a prediction can look back, at most."""
    bits_per_byte: float
    """Over all documents."""
    num_tokens: int = Field(ge=1)
    """Tokens predicted."""
    num_control_tokens: int = 0
    """Control tokens that the documents spell out; they are text."""
    document_nats: list[float]
    """Negative log-likelihood of each document, natural log."""
    document_bytes: list[int]
    """UTF-8 bytes of each document."""


class HeldOutVerdict(StrictModel):
    """One model's bits per byte against the base's."""

    name: str
    """Name of the text."""
    base: float
    """Bits per byte of the base."""
    trained: float
    """Bits per byte of the trained model."""
    difference_interval: tuple[float, float]
    """95 % bootstrap interval of trained minus base, over documents."""
    adjusted_p: float
    """Two-sided bootstrap p-value of no difference, Holm-corrected over the texts."""
    sentence: str
    """The verdict in words."""


def iter_windows(num_tokens: int, window: int) -> Iterator[tuple[int, int]]:
    """Yields (start, stop) of the tokens each window predicts; every token lies in exactly one."""
    for start in range(0, num_tokens, window):
        yield start, min(start + window, num_tokens)


class HeldOutActor:
    """A model that gives the negative log-likelihood of windows."""

    def __init__(
        self,
        model: str,
        revision: str,
        dtype: str,
        num_gpus: float,
        trust_remote_code: bool = False,
        num_threads: int | None = None,
        num_engines: int = 1,
    ) -> None:
        use_cores(find_threads(num_threads, num_engines))
        self._device = torch.device("cuda" if num_gpus > 0 and torch.cuda.is_available() else "cpu")
        chosen = choose_dtype(dtype, self._device)
        loaded = load_causal_lm(model, revision=revision, dtype=chosen, trust_remote_code=trust_remote_code)
        self._model = loaded.to(self._device)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Takes rows `document, ids`; `ids` starts with the token the first prediction looks back on."""
        return {
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
    model: str,
    config: EvaluationConfig,
    out_dir: Path,
    *,
    revision: str = "main",
    trust_remote_code: bool = False,
    report: Callable[[str], None] = logger.info,
) -> dict[str, HeldOutResult]:
    """Scores a model on every held-out text; writes `held_out/<name>.json`. Ray must be initialised.

    What was scored before with the same weights on the same text is read back.

    Returns:
        Name of each text to its result.

    Raises:
        EvaluationError: When a text has no document, or the tokenizer no end-of-text token.
        CorpusError: When a text cannot be read.
    """
    if not config.held_out:
        return {}
    identity = identify_model(model, revision=revision)
    tokenizer = load_tokenizer(model, revision=revision)
    stored = load_held_out(out_dir)
    found: dict[str, HeldOutResult] = {}
    for item in config.held_out:
        documents = [document.text for document in read_held_out(item)]
        origin = {
            "name": item.name,
            "text_sha256": compute_sha256(documents),
            "model": identity.name,
            "weights_sha256": identity.weights_sha256,
            "dtype": config.dtype,
            "num_control_tokens": count_control_tokens(tokenizer, documents),
        }
        before = stored.get(item.name)
        if before is None or before.model_dump(include=set(origin)) != origin:
            report(f"bits per byte of {len(documents):,} documents of {item.name}")
            measured = _score_documents(model, revision, documents, config, trust_remote_code, report)
            before = HeldOutResult.model_validate(origin | measured)
            text = json.dumps(before.model_dump()) + "\n"
            write_text(out_dir / HELD_OUT_FOLDER / f"{item.name}.json", text)
        found[item.name] = before
    return found


def read_held_out(item: HeldOutConfig) -> list[Document]:
    """The documents of a held-out text, those without text left out.

    Raises:
        EvaluationError: When there is none.
        CorpusError: When the source cannot be read.
    """
    documents = [document for document in iter_documents(CorpusConfig(sources=[item.source])) if document.text]
    if not documents:
        raise EvaluationError(f"evaluation.held_out: {item.name}: {item.source.path} holds no document")
    return documents


def load_held_out(out_dir: Path) -> dict[str, HeldOutResult]:
    """Reads the held-out results of a scored model; empty when there is none."""
    found = {}
    for path in sorted((out_dir / HELD_OUT_FOLDER).glob("*.json")):
        try:
            found[path.stem] = HeldOutResult.model_validate_json(path.read_text(encoding="utf-8"))
        except ValidationError as error:
            raise EvaluationError(f"{path}: not a held-out result ({describe_fault(error)})") from None
        except (OSError, ValueError) as error:
            raise EvaluationError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]})") from None
    return found


def is_held_out_scored(config: EvaluationConfig, out_dir: Path) -> bool:
    """Whether every text, as it reads now, was scored in the dtype asked for."""
    stored = load_held_out(out_dir)
    for item in config.held_out:
        before = stored.get(item.name)
        wanted = (compute_sha256([document.text for document in read_held_out(item)]), config.dtype)
        if before is None or (before.text_sha256, before.dtype) != wanted:
            return False
    return True


def judge_held_out(pairs: Sequence[tuple[HeldOutResult, HeldOutResult]], *, seed: int = 0) -> list[HeldOutVerdict]:
    """Compares (base, trained) on each text by a paired bootstrap over its documents; Holm-corrected over the texts.

    Raises:
        EvaluationError: When the documents of a pair differ.
    """
    gaps = [_bootstrap_gaps(base, trained, seed) for base, trained in pairs]
    adjusted = correct_holm([_two_sided(found) for found in gaps])
    return [_judge_pair(base, trained, found, p) for (base, trained), found, p in zip(pairs, gaps, adjusted)]


def _bootstrap_gaps(base: HeldOutResult, trained: HeldOutResult, seed: int) -> np.ndarray:
    """Trained minus base in bits per byte, over resampled documents."""
    if base.text_sha256 != trained.text_sha256:
        raise EvaluationError(
            f"held-out text {trained.name}: base and trained model were scored on different documents"
        )
    bits = (np.array(trained.document_nats) - np.array(base.document_nats)) / math.log(2)
    sizes = np.array(base.document_bytes, dtype=float)
    rng = np.random.default_rng(seed)
    draws = (rng.integers(0, len(sizes), size=len(sizes)) for _ in range(BOOTSTRAP_SAMPLES))
    return np.array([bits[drawn].sum() / sizes[drawn].sum() for drawn in draws])


def _two_sided(gaps: np.ndarray) -> float:
    """Bootstrap p-value of no difference; the observed sample counts as one, so it is never 0."""
    sides = [(1 + (side <= 0).sum()) / (1 + len(gaps)) for side in (gaps, -gaps)]
    return float(min(1.0, 2 * min(sides)))


def _judge_pair(base: HeldOutResult, trained: HeldOutResult, gaps: np.ndarray, p: float) -> HeldOutVerdict:
    low, high = (float(value) for value in np.quantile(gaps, [0.025, 0.975]))
    gap, num_documents = trained.bits_per_byte - base.bits_per_byte, len(base.document_bytes)
    if num_documents < MIN_DOCUMENTS:
        word = f"not judged, as {num_documents} documents are too few to resample (at least {MIN_DOCUMENTS})"
    elif p < ALPHA:
        word = f"{'better' if gap < 0 else 'worse'} than the base"
    else:
        word = "not distinguishable from the base"
    return HeldOutVerdict(
        name=trained.name,
        base=base.bits_per_byte,
        trained=trained.bits_per_byte,
        difference_interval=(low, high),
        adjusted_p=p,
        sentence=f"{word}: {trained.bits_per_byte:.4f} against {base.bits_per_byte:.4f} bits per byte"
        f" ({gap:+.4f} ± {(high - low) / 2:.4f}, p = {p:.3g}, {num_documents} documents)",
    )


def _score_documents(
    model: str,
    revision: str,
    documents: Sequence[str],
    config: EvaluationConfig,
    trust_remote_code: bool,
    report: Callable[[str], None],
) -> dict[str, object]:
    """The measured part of a result."""
    import ray

    tokenizer = load_tokenizer(model, revision=revision, trust_remote_code=trust_remote_code)
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise EvaluationError(f"{model}: its tokenizer has neither a beginning nor an end-of-text token")
    window = min(find_max_positions(model, revision=revision) or MAX_WINDOW, MAX_WINDOW)
    encoded = encode_prompts(tokenizer, documents, add_special_tokens=False)
    rows = [
        {"document": index, "ids": [first, *ids][start : stop + 1]}
        for index, ids in enumerate(encoded)
        for start, stop in iter_windows(len(ids), window)
    ]
    scored = ray.data.from_items(rows, override_num_blocks=max(1, len(rows) // WINDOWS_PER_BATCH)).map_batches(
        HeldOutActor,
        fn_constructor_args=(
            model,
            revision,
            config.dtype,
            config.num_gpus_per_actor,
            trust_remote_code,
            config.num_threads_per_actor,
            config.num_actors,
        ),
        batch_size=WINDOWS_PER_BATCH,
        compute=ray.data.ActorPoolStrategy(size=config.num_actors),
        num_cpus=config.num_cpus_per_actor,
        num_gpus=config.num_gpus_per_actor,
    )
    nats = [0.0] * len(documents)
    answered = 0
    progress = ProgressLines("windows of held-out text", len(rows), report)
    try:
        for batch in scored.iter_batches(batch_size=None, prefetch_batches=0):
            for document, value in zip(batch["document"], batch["nats"], strict=True):
                nats[int(document)] += float(value)
            answered += len(batch["nats"])
            progress.add(len(batch["nats"]))
    except Exception as error:
        fault = find_layerplan_error(error)
        words = " ".join(str(error).split())[:300]
        raise (type(fault)(*fault.args) if fault else EvaluationError(f"{model}: held-out text: {words}")) from error
    finally:
        progress.close()
    if answered != len(rows):
        raise EvaluationError(f"{model}: {answered} windows came back of {len(rows)} of held-out text")
    sizes = [len(text.encode("utf-8")) for text in documents]
    return {
        "window": window,
        "bits_per_byte": sum(nats) / math.log(2) / sum(sizes),
        "num_tokens": sum(map(len, encoded)),
        "document_nats": nats,
        "document_bytes": sizes,
    }
