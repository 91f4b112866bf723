"""A base without memory is the base: the same names, buffers and refusals, and every row of a parameter on its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from layerplan.errors import ModelError
from layerplan.models import parameter_reader
from layerplan.models.causal_lm import find_decoder_parts, load_causal_lm
from layerplan.models.freezing import find_reached_parameters
from layerplan.models.meta import build_without_memory, hollow_values
from layerplan.models.safetensors_writer import promise_copy, promise_tensor, write_safetensors
from layerplan.models.skeleton import load_skeleton
from layerplan.models.streaming import run_streamed
from layerplan.models.weight_files import read_header
from tests.families import make_config, make_model
from tests.model_folders import edit_weights, save_tiny_base

ROWS = "model.layers.1.mlp.up_proj.weight"
EXPERTS = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    make_model("qwen3_moe").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float32])
def test_rows_are_rounded_as_loading_and_casting_rounds_them(
    tmp_path: Path, stored: torch.dtype, wanted: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parameter_reader, "CHUNK_BYTES", 1000)  # pieces that end inside rows
    base = save_tiny_base(tmp_path / "base")
    edit_weights(base, lambda tensors: tensors.update({ROWS: (tensors[ROWS].double() * (1 + 2**-30)).to(stored)}))
    whole = load_causal_lm(str(base)).get_parameter(ROWS).to(wanted)
    found = torch.full((5, whole.shape[1]), torch.nan, dtype=wanted)
    load_skeleton(str(base)).reader.read_into(ROWS, found, 3)
    assert torch.equal(found, whole[3:8])


def test_only_the_experts_asked_for_are_read(experts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_causal_lm(str(experts)).get_parameter(EXPERTS)
    reader = load_skeleton(str(experts)).reader
    loaded: list[str] = []
    real = reader._load
    monkeypatch.setattr(reader, "_load", lambda names: real([name for name in names if not loaded.append(name)]))
    found = torch.empty_like(whole[1:3])
    reader.read_into(EXPERTS, found, 1)
    assert torch.equal(found, whole[1:3])
    assert sorted(loaded) == [
        f"model.layers.1.mlp.experts.{expert}.{kind}_proj.weight" for expert in (1, 2) for kind in ("gate", "up")
    ]


def test_a_model_that_asks_for_values_is_run_on_numbers_that_mean_nothing(experts: Path) -> None:
    """Its experts' kernel does not run on the meta device; what of it a text reaches is what it is of the real model."""
    model, real = load_skeleton(str(experts)).model, load_causal_lm(str(experts))
    with pytest.raises(RuntimeError), torch.no_grad():
        model(input_ids=torch.zeros((1, 4), dtype=torch.long))
    reached = find_reached_parameters(model, find_decoder_parts(model))
    assert reached == find_reached_parameters(real, find_decoder_parts(real))
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_hollow_model_takes_the_memory_of_a_few_numbers() -> None:
    config = make_config("qwen3")
    config.update({"hidden_size": 4096, "intermediate_size": 16384, "vocab_size": 64_000})
    model = build_without_memory(config, name="wide")
    assert sum(each.numel() for each in model.parameters()) > 1e9
    with hollow_values(model):
        storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in model.parameters()}
        assert sum(storages.values()) < 32 * 2**20
        assert len({float(each.detach().std()) for each in model.parameters() if each.ndim == 2}) > 1
    assert all(each.is_meta for each in model.parameters())


def drop(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(name)


FAULTS: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "missing": drop(ROWS),
    "a missing head": lambda tensors: tensors.pop("model.norm.weight"),
    "unexpected": lambda tensors: tensors.update({"model.layers.1.mlp.extra.weight": torch.zeros(2)}),
    "misshaped": lambda tensors: tensors.update({ROWS: tensors[ROWS][:-1].clone()}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_files_that_do_not_fit_are_refused_in_the_words_of_loading(tmp_path: Path, fault: str) -> None:
    base = save_tiny_base(tmp_path / "base")
    edit_weights(base, FAULTS[fault])
    with pytest.raises(ModelError) as loading:
        load_causal_lm(str(base))
    with pytest.raises(ModelError) as here:
        load_skeleton(str(base))
    assert str(here.value) == str(loading.value)


def test_quantised_numbers_are_refused_by_name(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base")
    edit_weights(base, lambda tensors: tensors.update({ROWS: tensors[ROWS].to(torch.float8_e4m3fn)}))
    with pytest.raises(ModelError, match=f"{ROWS} is stored as F8_E4M3; quantised weights cannot be trained"):
        load_skeleton(str(base))


def test_a_file_cut_off_after_it_was_looked_at_is_named(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "base")
    reader = load_skeleton(str(base)).reader
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50_000])
    with pytest.raises(ModelError, match=r"model\.safetensors ends before its tensors do; copy it again"):
        for name in reader._parameters:
            reader.read(name)


def test_a_model_runs_with_one_of_its_layers_in_memory(experts: Path) -> None:
    skeleton, real = load_skeleton(str(experts)), load_causal_lm(str(experts))
    ids = torch.arange(12)[None]
    most = 0

    def read(name: str) -> Tensor:
        nonlocal most
        there = (name for name, _ in skeleton.model.named_parameters() if ".layers." in name)
        most = max(most, len({name.split(".")[2] for name in there}))
        return skeleton.reader.read(name)

    with torch.no_grad():
        found = run_streamed(skeleton.model, read, lambda: skeleton.model(input_ids=ids).logits)
        assert torch.equal(found, real(input_ids=ids).logits)
    assert most == 1
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())


def test_a_model_that_reaches_into_its_layers_gets_all_values_at_once(tmp_path: Path) -> None:
    skeleton = load_skeleton(str(save_tiny_base(tmp_path / "base")))
    inside = skeleton.model.get_submodule("model.layers.0.mlp.up_proj")
    names = [name for name, _ in skeleton.model.named_parameters()]
    ones = torch.ones(1, inside.in_features)
    with torch.no_grad():
        found = run_streamed(skeleton.model, skeleton.reader.read, lambda: nn.functional.linear(ones, inside.weight))
        wanted = nn.functional.linear(ones, skeleton.reader.read("model.layers.0.mlp.up_proj.weight"))
    assert torch.equal(found, wanted)
    assert [name for name, _ in skeleton.model.named_parameters()] == names


def test_a_value_that_cannot_be_read_is_no_reason_to_read_all(tmp_path: Path) -> None:
    skeleton = load_skeleton(str(save_tiny_base(tmp_path / "base")))
    asked: list[str] = []

    def read(name: str) -> Tensor:
        asked.append(name)
        if ".layers.1." in name:
            raise AttributeError(name)
        return skeleton.reader.read(name)

    with torch.no_grad(), pytest.raises(AttributeError, match="layers"):
        run_streamed(skeleton.model, read, lambda: skeleton.model(input_ids=torch.arange(12)[None]).logits)
    assert len(asked) == len(set(asked))
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())


def test_a_streamed_file_has_the_bytes_of_the_librarys(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        "b": torch.randn(3, 5).bfloat16(),
        "a.weight": torch.randn(7),
        "a.bias": torch.randn(7).half(),
        "ids": torch.arange(4),
        "mask": torch.tensor([True, False, True]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(2, 0),
        'n"ä\\me': torch.randn(2, 2).double(),
    }
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    stored = read_header(tmp_path / "theirs")
    promises = {
        name: promise_copy(stored[name], value.dtype)
        if at % 2
        else promise_tensor(value.dtype, tuple(value.shape), lambda value=value: value)
        for at, (name, value) in enumerate(tensors.items())
    }
    write_safetensors(tmp_path / "ours", promises, {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert list(load_file(tmp_path / "ours")) == list(load_file(tmp_path / "theirs"))
