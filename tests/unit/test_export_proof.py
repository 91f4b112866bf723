"""The export proves which tensors moved; every way it could be wrong is caused here on purpose."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import make_config
from torch import nn
from transformers import AutoModelForCausalLM

from layerplan.checkpoint import hf_export
from layerplan.checkpoint.dcp import save_checkpoint
from layerplan.checkpoint.export_report import ExportReport, is_exported_as
from layerplan.checkpoint.hf_export import export_hf
from layerplan.checkpoint.model_card import render_model_card
from layerplan.checkpoint.trained_values import TrainedValues
from layerplan.config.plan import FreezeDeepPlanConfig
from layerplan.config.train import OptimizerConfig, TrainConfig
from layerplan.errors import CheckpointError, ModelError
from layerplan.models.base_check import check_base_model
from layerplan.models.causal_lm import load_causal_lm
from layerplan.models.files import identify_model
from layerplan.models.freezing import apply_plan
from layerplan.models.model_sizes import make_model_shape
from layerplan.models.ref import ModelRef
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.policies import make_full_plan, make_plan
from layerplan.train.optim import build_optimizer
from layerplan.train.request import TrainRequest, TrainResult
from layerplan.train.trainer import export_result, run_training
from tests.model_folders import edit_config, edit_weights, save_base_with_code, save_tiny_base
from tests.qwen3 import TINY_QWEN3

FROZEN, TRAINED = "model.layers.2.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"


@dataclass
class Run:
    base: Path
    checkpoint: Path
    plan: FreezePlan
    model: nn.Module

    def export(self, out: Path, **options: Any) -> ExportReport:
        base = ModelRef(str(self.base), trust_remote_code=options.pop("trust_remote_code", False))
        return export_hf(base=base, checkpoint=self.checkpoint, out_dir=out, plan=self.plan, **options)


def train_briefly(base: Path, out: Path, shape: dict[str, Any] = TINY_QWEN3, **options: Any) -> Run:
    """One optimizer step of a base under a plan that trains layer 0 alone, and its checkpoint."""
    plan = make_plan(FreezeDeepPlanConfig(boundary=1), model=identify_model(str(base)), shape=make_model_shape(shape))
    model = load_causal_lm(str(base), **options)
    apply_plan(model, plan)
    optimizer = build_optimizer(model, OptimizerConfig(learning_rate=0.1), masters={}, compiled=False)
    ids = torch.arange(24).reshape(2, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step(grad_scale=torch.ones(()))
    save_checkpoint(out, model, optimizer, None)
    return Run(base, out, plan, model)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return train_briefly(save_tiny_base(tmp_path / "base"), tmp_path / "checkpoint")


def store_as(folder: Path, choose: Callable[[str], torch.dtype]) -> Path:
    """Stores each tensor in the dtype chosen by its name, as a published base would be."""
    edit_weights(folder, lambda tensors: tensors.update({k: v.to(choose(k)) for k, v in tensors.items()}))
    return folder


def read_raw(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of every tensor, read by the format's own description rather than by our code."""
    found = {}
    for path in folder.glob("*.safetensors"):
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        for name, item in json.loads(content[8 : 8 + size]).items():
            if name != "__metadata__":
                start, stop = (8 + size + at for at in item["data_offsets"])
                found[name] = (item["dtype"], tuple(item["shape"]), content[start:stop])
    return found


def tamper(file: Path, name: str) -> None:
    tensors = load_file(file)
    tensors[name].view(torch.uint8)[0, 0] ^= 1  # one bit
    save_file(tensors, file, metadata={"format": "pt"})


def faulty(function: str, damage: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the proof is for: a step of the export that does its work and then something else, to the folder."""
    real = getattr(hf_export, function)

    def wrapped(*arguments: Any) -> None:
        real(*arguments)
        damage(arguments[-1])

    monkeypatch.setattr(hf_export, function, wrapped)


def test_a_card_links_to_a_hub_id_and_to_no_folder_of_ours(run: Run, tmp_path: Path) -> None:
    """An export as a base is called `<run>/step_X`, which on the hub would be somebody else's model."""
    first = tmp_path / "first" / "hf" / "step_00000001"
    run.export(first)
    second = train_briefly(first, tmp_path / "again")
    assert second.plan.model.name == "first/step_00000001"
    second.export(tmp_path / "second")
    assert "base_model" not in (tmp_path / "second" / "README.md").read_text()
    hub = second.plan.model.model_copy(update={"name": "owner/model", "revision": "a" * 40})
    report = ExportReport(Path(), 1, 1, 1, ("float32",), 0.0)
    card = render_model_card(second.plan.model_copy(update={"model": hub}), step=1, state={}, report=report)
    assert 'base_model: "owner/model"' in card


def test_frozen_tensors_are_the_bases_and_trained_ones_the_checkpoints(run: Run, tmp_path: Path) -> None:
    report = run.export(tmp_path / "out")
    base, out = read_raw(run.base), read_raw(tmp_path / "out")
    trained = dict(run.model.named_parameters())
    assert list(out) == list(base)
    for name in base:
        if name.startswith("model.layers.0."):
            assert out[name][2] == trained[name].detach().numpy().tobytes() != base[name][2]
        else:
            assert out[name] == base[name]
    assert (report.num_frozen, report.num_trained, report.num_trained_changed) == (len(base) - 11, 11, 11)
    assert (report.trained_dtypes, report.logits_moved_by_rounding) == (("float32",), 0.0)


def test_a_base_of_bfloat16_is_exported_in_bfloat16_at_its_own_size(tmp_path: Path) -> None:
    base = store_as(save_tiny_base(tmp_path / "base"), lambda name: torch.bfloat16)
    run = train_briefly(base, tmp_path / "checkpoint")
    report = run.export(tmp_path / "out")
    before, after = read_raw(base), read_raw(tmp_path / "out")
    masters = dict(run.model.named_parameters())
    for name in before:
        if name.startswith("model.layers.0."):
            nearest = masters[name].detach().to(torch.bfloat16).view(torch.int16).numpy().tobytes()
            assert after[name] == ("BF16", before[name][1], nearest)
        else:
            assert after[name] == before[name]
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (base, tmp_path / "out")]
    assert sizes[0] == sizes[1]
    assert report.trained_dtypes == ("bfloat16",)
    assert 0 < report.logits_moved_by_rounding < 0.05
    assert (base / "config.json").read_bytes() == (tmp_path / "out" / "config.json").read_bytes()


def test_what_rounding_moved_is_computed_with_one_layer_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = store_as(save_tiny_base(tmp_path / "base"), lambda name: torch.bfloat16)
    run = train_briefly(base, tmp_path / "checkpoint")
    there: list[set[str]] = []
    plain = TrainedValues.read_any

    def read(self: TrainedValues, name: str) -> torch.Tensor:
        inside = (each for each, _ in self.base.model.named_parameters() if ".layers." in each)
        there.append({each.split(".")[2] for each in inside})
        return plain(self, name)

    monkeypatch.setattr(TrainedValues, "read_any", read)
    assert run.export(tmp_path / "out").logits_moved_by_rounding > 0
    assert max(map(len, there)) == 1


def test_float32_on_request_is_what_was_trained_and_the_config_says_so(tmp_path: Path) -> None:
    base = store_as(save_tiny_base(tmp_path / "base"), lambda name: torch.bfloat16)
    edit_config(base, dtype="bfloat16")
    run = train_briefly(base, tmp_path / "checkpoint")
    report = run.export(tmp_path / "out", export_dtype="float32")
    before, after = read_raw(base), read_raw(tmp_path / "out")
    masters = dict(run.model.named_parameters())
    for name in before:
        if name.startswith("model.layers.0."):
            assert after[name] == ("F32", before[name][1], masters[name].detach().numpy().tobytes())
        else:
            assert after[name] == before[name]
    assert (report.trained_dtypes, report.logits_moved_by_rounding) == (("float32",), 0.0)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")  # in the dtype of its config
    assert torch.equal(dict(loaded.named_parameters())[TRAINED], masters[TRAINED])


def test_a_base_of_several_dtypes_keeps_each(tmp_path: Path) -> None:
    def choose(name: str) -> torch.dtype:
        return torch.float32 if "norm" in name else torch.float16 if "mlp" in name else torch.bfloat16

    base = store_as(save_tiny_base(tmp_path / "base"), choose)
    report = train_briefly(base, tmp_path / "checkpoint").export(tmp_path / "out")
    before, after = read_raw(base), read_raw(tmp_path / "out")
    assert {name: item[0] for name, item in after.items()} == {name: item[0] for name, item in before.items()}
    assert all(after[name] == before[name] for name in before if ".layers.0." not in name)
    assert report.trained_dtypes == ("bfloat16", "float16", "float32")


def test_a_value_the_bases_dtype_cannot_hold_is_not_written_as_infinity(tmp_path: Path) -> None:
    base = store_as(save_tiny_base(tmp_path / "base"), lambda name: torch.float16)
    run = train_briefly(base, tmp_path / "checkpoint")
    with torch.no_grad():
        dict(run.model.named_parameters())[TRAINED][0, 0] = 70_000.0  # float16 ends at 65,504
    optimizer = build_optimizer(run.model, OptimizerConfig(), masters={}, compiled=False)
    save_checkpoint(tmp_path / "large", run.model, optimizer, None)
    run.checkpoint = tmp_path / "large"
    with pytest.raises(CheckpointError, match=rf"{TRAINED}: .*float16 cannot hold; set train\.export_dtype: float32"):
        run.export(tmp_path / "out")
    run.export(tmp_path / "out", export_dtype="float32")


def test_a_base_in_shards_is_exported_in_the_same_shards(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base")
    model = load_causal_lm(str(base))
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size="20KB")
    train_briefly(base, tmp_path / "checkpoint").export(tmp_path / "out")
    indices = [json.loads((each / "model.safetensors.index.json").read_text()) for each in (base, tmp_path / "out")]
    assert indices[0]["weight_map"] == indices[1]["weight_map"]
    assert indices[0]["metadata"]["total_size"] == indices[1]["metadata"]["total_size"]
    assert len(set(indices[1]["weight_map"].values())) > 2


@pytest.mark.parametrize("family", ["gpt2", "qwen3_next"])
def test_stored_names_that_are_not_the_models_are_exported_as_they_were(family: str, tmp_path: Path) -> None:
    """Names without prefix, as GPT-2 was published, and experts stored one by one which transformers merges."""
    AutoModelForCausalLM.from_config(make_config(family)).save_pretrained(tmp_path / "base")

    def publish(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name).to(torch.bfloat16)

    edit_weights(tmp_path / "base", publish)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    report = train_briefly(tmp_path / "base", tmp_path / "checkpoint", config).export(tmp_path / "out")
    before, after = read_raw(tmp_path / "base"), read_raw(tmp_path / "out")
    assert sorted(before) == sorted(after)
    moved = {name for name in before if after[name] != before[name]}
    layer = "h.0." if family == "gpt2" else "model.layers.0."
    assert moved and all(name.startswith(layer) for name in moved)
    assert {item[0] for item in after.values()} == {"BF16"}
    assert report.num_trained_changed == report.num_trained


def test_a_head_stored_beside_the_embeddings_it_is_tied_to_trains_with_them(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base")
    head, embeddings = "lm_head.weight", "model.embed_tokens.weight"
    edit_weights(base, lambda tensors: tensors.update({head: tensors[embeddings].clone()}))
    shape = ModelShape.from_hf_config(TINY_QWEN3)
    plan = make_full_plan(identify_model(str(base)), shape)
    model = load_causal_lm(str(base))
    apply_plan(model, plan)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2)
    optimizer = build_optimizer(model, OptimizerConfig(), masters={}, compiled=False)
    save_checkpoint(tmp_path / "checkpoint", model, optimizer, None)
    Run(base, tmp_path / "checkpoint", plan, model).export(tmp_path / "out")
    before, after = read_raw(base), read_raw(tmp_path / "out")
    assert after[head] == after[embeddings] != before[embeddings]


COMPANIONS = {
    "LICENSE": "Apache",
    "added_tokens.json": '{"<x>": 39}',
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tool_use.jinja": "{{ tools }}",
    "generation_config.json": '{"do_sample": false, "temperature": 0.9, "top_p": 0.6}',
    "tokenizer.model": "sentencepiece",
    "tokenizer_config.json": '{"tokenizer_class": "PreTrainedTokenizerFast"}',
    "vocab_of_any_name.txt": "a b",
    "modeling_extra.py": "X = 1",
}
LEFT_BEHIND = {
    ".cache/huggingface/download.lock": "",
    "README.md": "the card of the base",
    "freeze_plan.json": "{}",
    "pytorch_model.bin": "",
    "pytorch_model.bin.index.json": "{}",
    "original/consolidated.00.pth": "",
    "original/params.json": "{}",
    "onnx/model.onnx": "",
}


def test_everything_of_the_base_but_weights_travels_as_it_is(run: Run, tmp_path: Path) -> None:
    """The generation config is one that transformers refuses to save."""
    for name, text in (COMPANIONS | LEFT_BEHIND).items():
        (run.base / name).parent.mkdir(parents=True, exist_ok=True)
        (run.base / name).write_text(text)
    run.export(tmp_path / "out")
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    ours = {"README.md", "freeze_plan.json", "model.safetensors"}
    assert found == {*COMPANIONS, "config.json", "tokenizer.json", *ours}
    assert all((tmp_path / "out" / name).read_text() == text for name, text in COMPANIONS.items())
    assert "the card of the base" not in (tmp_path / "out" / "README.md").read_text()


def test_consent_to_the_bases_code_holds_for_the_check_of_its_export(tmp_path: Path) -> None:
    base = save_base_with_code(tmp_path / "base")
    run = train_briefly(base, tmp_path / "checkpoint", trust_remote_code=True)
    run.export(tmp_path / "out", trust_remote_code=True)
    again = load_causal_lm(str(tmp_path / "out"), trust_remote_code=True)
    assert type(again).__name__ == "TidalForCausalLM"
    assert torch.equal(dict(again.named_parameters())[TRAINED], dict(run.model.named_parameters())[TRAINED])


def test_a_hub_id_is_checked_and_exported_from_its_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's own cache, without a network: the layout its client writes, links into a folder of blobs."""
    import huggingface_hub

    stored = tmp_path / "cache" / "models--owner--tides"
    snapshot = stored / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text("a" * 40)
    for number, path in enumerate(sorted(save_tiny_base(stored / "blobs").iterdir())):
        path.rename(stored / "blobs" / str(number))
        (snapshot / path.name).symlink_to(stored / "blobs" / str(number))
    (snapshot / "LICENSE").write_text("Apache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    check_base_model("owner/tides")
    run = train_briefly(Path("owner/tides"), tmp_path / "checkpoint")
    run.export(tmp_path / "out")
    before, after = read_raw(snapshot), read_raw(tmp_path / "out")
    assert {name for name in before if after[name] != before[name]} == {k for k in before if ".layers.0." in k}
    assert (tmp_path / "out" / "LICENSE").read_text() == "Apache"
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"owner--tides.*: the folder has no \*\.safetensors weights"):
        check_base_model("owner/tides")


@pytest.mark.parametrize(("name", "side"), [(FROZEN, "frozen"), (TRAINED, "trained")])
def test_one_flipped_bit_in_the_export_is_found(
    name: str, side: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It leaves nothing behind."""
    faulty("write_weights", lambda folder: tamper(folder / "model.safetensors", name), monkeypatch)
    with pytest.raises(CheckpointError, match=f"1 {side} tensors are not what was expected; the first is {name}"):
        run.export(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_frozen_tensor_of_equal_values_in_another_dtype_is_found(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def widen(folder: Path) -> None:
        edit_weights(folder, lambda tensors: tensors.update({FROZEN: tensors[FROZEN].double()}))

    faulty("write_weights", widen, monkeypatch)
    with pytest.raises(CheckpointError, match=f"1 frozen tensors are not what was expected; the first is {FROZEN}"):
        run.export(tmp_path / "out")


def test_a_config_that_computes_something_else_fails_the_export(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All bytes of all tensors are right, and the model is still another one."""
    faulty("copy_companions", lambda folder: edit_config(folder, rms_norm_eps=0.5), monkeypatch)
    with pytest.raises(CheckpointError, match="logits differ by up to"):
        run.export(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_export_carries_its_plan_and_a_card_the_hub_can_read(run: Run, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    run.export(tmp_path / "out")
    assert FreezePlan.load(tmp_path / "out" / "freeze_plan.json").trainable_layers == (0,)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model is None and "Base: `base`" in card.text
    assert card.data.library_name == "transformers"
    assert "layer-freezing" in card.data.tags
    assert "frozen tensors, dtype and bytes those of the base's files | 24 |" in card.text
    assert FreezePlan.load(tmp_path / "out" / "freeze_plan.json").sha256 in card.text


def test_a_base_that_changed_since_the_plan_is_refused(run: Run, tmp_path: Path) -> None:
    tamper(run.base / "model.safetensors", FROZEN)
    with pytest.raises(CheckpointError, match="its weights changed since the freeze plan was made"):
        run.export(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_plan_is_refused(run: Run, tmp_path: Path) -> None:
    shape = ModelShape.from_hf_config(TINY_QWEN3)
    other = make_plan(FreezeDeepPlanConfig(boundary=2), model=run.plan.model, shape=shape)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        export_hf(base=ModelRef(str(run.base)), checkpoint=run.checkpoint, out_dir=tmp_path / "out", plan=other)


def test_a_finished_training_is_exported_anew_when_another_dtype_is_asked_for(tmp_path: Path) -> None:
    """The field may change under a run's name: the folder, the report and the config say the same."""
    base = store_as(save_tiny_base(tmp_path / "base"), lambda name: torch.bfloat16)
    folder = tmp_path / "run"
    run = train_briefly(base, folder / "checkpoints" / "step_00000001")
    TrainResult(1, run.checkpoint, 2.0, 1.0, None, 24, 1.0, 1.0, 1.0, 0.1, 0, 0, {}, False, None).save(folder)

    def go_on(dtype: str) -> tuple[set[str], dict[str, Any]]:
        config = TrainConfig(max_steps=1, export_dtype=dtype)
        request = TrainRequest(folder, ModelRef(str(base)), run.plan, folder / "store", config, seed=0)
        finished = export_result(request) if not (folder / "hf").exists() else run_training(request)
        assert finished.hf_dir == folder / "hf" / "step_00000001"
        return {item[0] for item in read_raw(finished.hf_dir).values()}, json.loads(
            (folder / "export.json").read_text()
        )

    assert go_on("base")[0] == {"BF16"}
    stamp = (folder / "hf" / "step_00000001").stat().st_ino
    go_on("base")
    assert (folder / "hf" / "step_00000001").stat().st_ino == stamp, "nothing changed, nothing is written"
    dtypes, report = go_on("float32")
    assert dtypes == {"BF16", "F32"} and (report["export_dtype"], report["trained_tensors_dtype"]) == (
        "float32",
        "float32",
    )
    dtypes, report = go_on("base")
    assert dtypes == {"BF16"} and report["export_dtype"] == "base"


def test_an_export_of_before_its_dtype_was_noted_counts_as_the_bases(tmp_path: Path) -> None:
    path = tmp_path / "export.json"
    assert is_exported_as(path, "float32"), "nothing says what it is"
    path.write_text('{"trained_tensors_dtype": "bfloat16"}')
    assert is_exported_as(path, "base") and not is_exported_as(path, "float32")
    path.write_text('{"trained_tensors_dtype": "float32"}')
    assert is_exported_as(path, "base") and is_exported_as(path, "float32")
