"""Next-token classification: which task, which method, at what cost in backward passes (SALF)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from layerplan.config.base import StrictModel

Method = Literal["salf", "lift_star", "lift", "full", "freeze_deep", "freeze_shallow", "lora_full", "lora_half"]
LabelLoss = Literal["vocabulary", "semantic_ce", "semantic_cosine"]
RowOrder = Literal["shallow_first", "drawn"]


class TaskOptions(StrictModel):
    """What every task has."""

    max_train: int | None = Field(default=None, ge=2)
    """Most training prompts; which ones is fixed by their ids."""
    max_test: int | None = Field(default=None, ge=2)
    """Most test prompts; which ones is fixed by their ids."""
    max_tokens: int | None = Field(default=None, ge=2)
    """Prompts with more tokens, the label counted, are left out and counted; none is without."""


class CmmluCategoryTaskConfig(TaskOptions):
    """The category of a CMMLU question: STEM, social science, humanities or other."""

    type: Literal["cmmlu_category"] = "cmmlu_category"
    path: str
    """Folder of CMMLU's CSV files."""


class CevalFieldTaskConfig(TaskOptions):
    """The field of a C-Eval question, over its dev and val questions."""

    type: Literal["ceval_field"] = "ceval_field"
    path: str
    """Folder of C-Eval's CSV files."""


class AntSynNetTaskConfig(TaskOptions):
    """Whether two words mean the opposite or the same."""

    type: Literal["antsynnet"] = "antsynnet"
    path: str
    """Folder of `{adjective,noun,verb}-pairs.{train,val,test}`; val is left alone."""


class JsonlTaskConfig(TaskOptions):
    """A task of one's own: `train.jsonl` and `test.jsonl`, one object with `prompt` and `label` per line."""

    type: Literal["jsonl"] = "jsonl"
    path: str
    """Folder of the two files."""
    labels: dict[str, list[str]] = Field(default_factory=dict)
    """Spellings of labels, as they follow the prompt, by the label in the file; the first that is one token is taken. A
    label without any is spelled as in the file, after a space."""


class HubTaskConfig(TaskOptions):
    """A data set by its hub name, read by `datasets`."""

    type: Literal["hub"] = "hub"
    name: str = Field(min_length=1)
    """Id such as `dair-ai/emotion`, or a folder in the hub's layout."""
    subset: str | None = None
    """Configuration of the data set."""
    revision: str = "main"
    """Branch, tag or commit."""
    prompt: str = Field(min_length=1)
    """Text with a column's name in braces where its value goes, such as `{text}`."""
    label_column: str = "label"
    """Column of the label."""
    labels: dict[str, list[str]] = Field(min_length=1)
    """Spellings by the label's value in the column; the first that is one token is taken."""
    train_split: str = "train"
    """Split that is trained on."""
    test_split: str = "test"
    """Split that is scored."""


TaskConfig = Annotated[
    CmmluCategoryTaskConfig | CevalFieldTaskConfig | AntSynNetTaskConfig | JsonlTaskConfig | HubTaskConfig,
    Field(discriminator="type"),
]


class LoraOptions(StrictModel):
    """Adapters of PEFT beside every linear map of the layers that train; experts stacked in one tensor are none."""

    rank: int = Field(default=8, ge=1)
    """Width of an adapter."""
    alpha: int = Field(default=16, ge=1)
    """Its output is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of an adapter's inputs that are left out while training."""


class FinetuneConfig(StrictModel):
    """Fine-tuning on prompts whose next token is a label."""

    task: TaskConfig
    """Prompts and labels."""
    method: Method = "salf"
    """`salf`: each row trains from its own end-of-freezing layer on, matched with the budget (Algorithm 4); `lift_star`: the
    same budget, rows drawn at random; `lift`: so, and only the start layer itself trains. `full`, `freeze_deep` and
    `freeze_shallow` train every decoder layer, the shallow or the deep ones. `lora_full` and `lora_half` are `full` and
    `freeze_shallow` with `update: lora`. Embeddings, final norm and head are frozen under every method."""
    update: Literal["full", "lora"] = "full"
    """What a layer that trains moves: its weights, or adapters beside them, which need the package `peft`."""
    lora: LoraOptions = LoraOptions()
    """Adapters, with `update: lora`."""
    loss: LabelLoss = "vocabulary"
    """Cross-entropy of the label over the vocabulary; or over the cosines with every label's semantic basis
    (`semantic_ce`, Algorithm 1); or the cosine distance to the label's own basis (`semantic_cosine`, Algorithm 2)."""
    deviation: Literal["cosine", "ce", "rank"] = "cosine"
    """Which deviation decides a row's end-of-freezing layer."""
    budget: Literal["half", "geometric", "arithmetic"] = "half"
    """How the number of rows grows with the start layer, for `salf`, `lift_star` and `lift`."""
    filling: Literal["depth_first", "breadth_first"] = "depth_first"
    """The order rows are handed out in."""
    order: RowOrder = "shallow_first"
    """Rows of an epoch by their start layers, shallow first (Algorithm 4), or all of them drawn. Where start layers tell the
    label, as `salf`'s do of many a task, the first shows one class after another."""
    split_ratio: float = Field(default=0.5, gt=0, lt=1)
    """Shallow share of the layers, for `freeze_deep`, `freeze_shallow` and `lora_half`."""
    epochs: int = Field(default=1, ge=1)
    """Passes over the training rows; each reads every row once, as `order` says. `train.max_steps` follows."""

    @property
    def uses_lora(self) -> bool:
        """Whether adapters train in place of the layers' weights."""
        return self.update == "lora" or self.method in ("lora_full", "lora_half")

    @property
    def has_budget(self) -> bool:
        """Whether rows have start layers of their own."""
        return self.method in ("salf", "lift_star", "lift")
