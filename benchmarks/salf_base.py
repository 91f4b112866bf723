"""A base for the race of fine-tuning methods: 8 layers in Qwen3's shape, a tokenizer with a token for every label, a little text.

    python benchmarks/salf_base.py --out runs/salf_base

Pre-trained from nothing on equal parts of English and Chinese. A label that the tokenizer would split becomes a token of its own.
So little text hardly has any of them, and training pushes the embeddings of what never occurs into one direction, in which no
layer can tell labels apart; and embeddings are frozen in the race. So those of all labels are drawn anew at the end, as long as
those of frequent tokens. `base.json` records steps, losses and the sha256 of the weights.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from eval.label_tasks import load_task
from layerplan.artifacts import hash_file, write_json
from layerplan.config.corpus import CorpusConfig, SourceConfig
from layerplan.config.finetune import AntSynNetTaskConfig, CevalFieldTaskConfig, CmmluCategoryTaskConfig
from layerplan.config.model import ScratchModelConfig
from layerplan.config.train import OptimizerConfig, ScheduleConfig
from layerplan.corpus.sources import iter_documents
from layerplan.measure.text import read_text
from layerplan.models.ref import ModelRef
from layerplan.models.scratch import build_scratch_model, train_tokenizer
from layerplan.train.optim import build_optimizer, compute_clip_scale, compute_grad_norm
from layerplan.train.schedule import compute_lr_scale

MODEL = ScratchModelConfig(vocab_size=4096, num_layers=8, hidden_size=128, intermediate_size=384)
SEQ_LEN, ROWS_PER_STEP, HELD_OUT = 128, 32, 64
RATE, SCHEDULE = 4e-3, ScheduleConfig(type="cosine", warmup_ratio=0.05)
SAMPLE_CHARS = 1_500_000
LABEL_LENGTH = 0.99
"""Quantile of the lengths of all embeddings."""
LANGUAGES = ("zh", "en")


def main() -> None:
    """Writes the base and what is known of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/salf_base"))
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = Path(os.environ["LAYERPLAN_DATA"])
    tokenizer = train_tokenizer(
        sample(data), vocab_size=MODEL.vocab_size, out_dir=args.out, max_length=MODEL.max_position_embeddings
    )
    build_scratch_model(MODEL, tokenizer, args.out, seed=0)
    labels = list_spellings(data)
    model = teach_labels(ModelRef(str(args.out)), labels, args.out)
    rows = [read_rows(data, language, args) for language in LANGUAGES]
    began = time.perf_counter()
    train(model, torch.stack([ids[HELD_OUT:] for ids in rows], dim=1).flatten(0, 1), args.steps)
    draw_labels(model, ModelRef(str(args.out)).tokenizer(), labels)
    losses = {language: score(model, ids[:HELD_OUT]) for language, ids in zip(LANGUAGES, rows, strict=True)}
    model.float().save_pretrained(args.out)
    facts = {
        "sha256": hash_file(args.out / "model.safetensors"),
        "parameters": sum(each.numel() for each in model.parameters()),
        "steps": args.steps,
        "tokens": args.steps * ROWS_PER_STEP * SEQ_LEN,
        "seconds": time.perf_counter() - began,
        "held_out_loss": losses,
        "labels": labels,
    }
    write_json(args.out / "base.json", facts)
    print(facts)


def describe_corpus(data: Path, language: str) -> CorpusConfig:
    """The first parts of a language's text."""
    return CorpusConfig(
        sources=[SourceConfig(path=str(data / language / f"part-0000{part}.parquet")) for part in (0, 1)]
    )


def sample(data: Path) -> Iterator[str]:
    """Text that the tokenizer is trained on, as much of each language."""
    for language in LANGUAGES:
        left = SAMPLE_CHARS
        for document in iter_documents(describe_corpus(data, language)):
            if left <= 0:
                break
            left -= len(document.text)
            yield document.text


def list_spellings(data: Path) -> list[str]:
    """The first spelling of every label of the three tasks."""
    tasks = (
        CmmluCategoryTaskConfig(path=str(data / "cmmlu")),
        CevalFieldTaskConfig(path=str(data / "ceval")),
        AntSynNetTaskConfig(path=str(data / "antsynnet")),
    )
    return list(dict.fromkeys(words[0] for task in tasks for words in load_task(task).spellings.values()))


@torch.no_grad()
def teach_labels(base: ModelRef, labels: list[str], out: Path) -> Any:
    """The model with a token for every label, its tokenizer saved."""
    model, tokenizer = base.load().float(), base.tokenizer()
    pieces = {label: tokenizer(label)["input_ids"] for label in labels}
    added = [label for label, ids in pieces.items() if len(ids) > 1]
    means = [model.get_input_embeddings().weight[pieces[label]].mean(0) for label in added]
    tokenizer.add_tokens(added)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.get_input_embeddings().weight[-len(added) :] = torch.stack(means)
    tokenizer.save_pretrained(out)
    model.save_pretrained(out)
    return model


@torch.no_grad()
def draw_labels(model: Any, tokenizer: Any, labels: list[str]) -> None:
    """Gives every label an embedding in a direction of its own, as long as those of frequent tokens."""
    weight = model.get_input_embeddings().weight
    drawn = torch.randn(len(labels), weight.shape[1], generator=torch.Generator().manual_seed(0))
    length = torch.quantile(weight.norm(dim=1), LABEL_LENGTH)
    weight[[tokenizer(label)["input_ids"][0] for label in labels]] = drawn / drawn.norm(dim=1, keepdim=True) * length


def read_rows(data: Path, language: str, args: argparse.Namespace) -> torch.Tensor:
    """Rows of a language, the first to be held out."""
    count = HELD_OUT + args.steps * ROWS_PER_STEP // len(LANGUAGES)
    rows = read_text(describe_corpus(data, language), ModelRef(str(args.out)), num_rows=count, seq_len=SEQ_LEN, seed=1)
    return torch.from_numpy(rows.ids.astype("int64"))


def train(model: Any, ids_BT: torch.Tensor, steps: int) -> None:
    """Trains everything, bfloat16 over float32 weights."""
    model.train()
    config = OptimizerConfig(learning_rate=RATE, weight_decay=0.1)
    optimizer = build_optimizer(model, config)
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss = compute_loss(model, ids_BT[step * ROWS_PER_STEP : (step + 1) * ROWS_PER_STEP])
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = RATE * compute_lr_scale(step, steps, SCHEDULE)
        optimizer.step(grad_scale=compute_clip_scale(compute_grad_norm(model.parameters()), config.max_grad_norm))
        if step % 20 == 0:
            print(f"step {step + 1} of {steps}, loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def score(model: Any, ids_BT: torch.Tensor) -> float:
    """Mean next-token loss, nats."""
    losses = [float(compute_loss(model, rows)) for rows in ids_BT.split(ROWS_PER_STEP)]
    return sum(losses) / len(losses)


def compute_loss(model: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    """Next-token loss of rows in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids_BT, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.float().flatten(0, 1), ids_BT[:, 1:].flatten())


if __name__ == "__main__":
    main()
