"""A base for studies: 12 layers, a tokenizer of its own for both languages, pre-trained on English technical text alone.

    python benchmarks/study_base.py text --out runs/study_base
    python benchmarks/study_base.py train --out runs/study_base --device cuda
    export LAYERPLAN_STUDY_BASE=runs/study_base/model

`text` trains the tokenizer and cuts the rows, `train` needs nothing but what `text` left, torch and transformers. The last
eighth of the English text is left out: it is what forgetting is measured on. The weights are bfloat16 in the end.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn import functional as F

from layerplan.artifacts import write_json
from layerplan.config.corpus import CorpusConfig, SourceConfig
from layerplan.config.model import ScratchModelConfig
from layerplan.config.train import OptimizerConfig, ScheduleConfig
from layerplan.corpus.sources import iter_documents
from layerplan.measure.text import read_text
from layerplan.models.ref import ModelRef
from layerplan.models.scratch import build_scratch_model, train_tokenizer
from layerplan.train.optim import build_optimizer, compute_clip_scale, compute_grad_norm
from layerplan.train.schedule import compute_lr_scale

MODEL = ScratchModelConfig(vocab_size=8192, num_layers=12, hidden_size=256, intermediate_size=768)
SEQ_LEN, NUM_ROWS, ROWS_PER_STEP, EPOCHS = 256, 24_000, 64, 2
RATE, SCHEDULE = 3e-3, ScheduleConfig(type="cosine", warmup_ratio=0.05)
SAMPLE_CHARS = 4_000_000
HELD_OUT = 512
"""Rows that say how good the base is."""


def prepare(out: Path) -> None:
    """Writes the untrained model with its tokenizer, and the rows."""
    data = Path(os.environ["LAYERPLAN_DATA"])
    english = CorpusConfig(
        sources=[SourceConfig(path=str(data / "en" / f"part-0000{part}.parquet")) for part in range(7)]
    )
    chinese = CorpusConfig(sources=[SourceConfig(path=str(data / "zh"))])

    def sample() -> Iterator[str]:
        for corpus in (english, chinese):
            left = SAMPLE_CHARS
            for document in iter_documents(corpus):
                if left > 0:
                    left -= len(document.text)
                    yield document.text

    folder = out / "model"
    tokenizer = train_tokenizer(
        sample(), vocab_size=MODEL.vocab_size, out_dir=folder, max_length=MODEL.max_position_embeddings
    )
    build_scratch_model(MODEL, tokenizer, folder, seed=0)
    rows = read_text(english, ModelRef(str(folder)), num_rows=NUM_ROWS + HELD_OUT, seq_len=SEQ_LEN, seed=0)
    np.savez_compressed(out / "rows.npz", ids=rows.ids.astype(np.uint16))
    print(f"{len(rows.ids)} rows of {SEQ_LEN} tokens, vocabulary {tokenizer.get_vocab_size()}")


def train(out: Path, device: str) -> None:
    """Trains everything for two epochs in bfloat16 over float32 weights, and rounds them once."""
    torch.set_float32_matmul_precision("high")
    folder = out / "model"
    build_scratch_model(MODEL, Tokenizer.from_file(str(folder / "tokenizer.json")), folder, seed=0)
    model = ModelRef(str(folder)).load().to(device).train()
    with np.load(out / "rows.npz") as kept:
        ids = torch.from_numpy(kept["ids"].astype(np.int64))
    held_out, ids = ids[:HELD_OUT].to(device), ids[HELD_OUT:].to(device)
    config = OptimizerConfig(learning_rate=RATE, weight_decay=0.1)
    optimizer = build_optimizer(model, config)
    num_steps = EPOCHS * len(ids) // ROWS_PER_STEP
    order = torch.cat(
        [torch.randperm(len(ids), generator=torch.Generator().manual_seed(each)) for each in range(EPOCHS)]
    )
    for step in range(num_steps):
        batch = ids[order[step * ROWS_PER_STEP : (step + 1) * ROWS_PER_STEP].to(device)]
        optimizer.zero_grad(set_to_none=True)
        _loss(model, batch).backward()
        for group in optimizer.param_groups:
            group["lr"] = RATE * compute_lr_scale(step, num_steps, SCHEDULE)
        optimizer.step(grad_scale=compute_clip_scale(compute_grad_norm(model.parameters()), config.max_grad_norm))
        if step % 100 == 0 or step + 1 == num_steps:
            print(f"step {step + 1} of {num_steps}, held-out loss {_score(model, held_out):.4f}", flush=True)
    model = model.to(torch.bfloat16)
    loss = _score(model, held_out)
    model.cpu().save_pretrained(folder)
    write_json(
        out / "base.json", {"held_out_loss": loss, "steps": num_steps, "tokens": num_steps * ROWS_PER_STEP * SEQ_LEN}
    )


@torch.no_grad()
def _score(model: torch.nn.Module, ids_BT: torch.Tensor) -> float:
    losses = [float(_loss(model, rows)) for rows in ids_BT.split(ROWS_PER_STEP)]
    return sum(losses) / len(losses)


def _loss(model: torch.nn.Module, ids_BT: torch.Tensor) -> torch.Tensor:
    with torch.autocast(ids_BT.device.type, torch.bfloat16):
        logits = model(input_ids=ids_BT, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.float().flatten(0, 1), ids_BT[:, 1:].flatten())


def main() -> None:
    """Makes the text or the base."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("text", "train"))
    parser.add_argument("--out", type=Path, default=Path("runs/study_base"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    if args.action == "text":
        if "LAYERPLAN_DATA" not in os.environ:
            sys.exit("LAYERPLAN_DATA is not set: name the folder that has en/ and zh/")
        prepare(args.out)
    else:
        train(args.out, args.device)


if __name__ == "__main__":
    main()
