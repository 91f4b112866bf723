"""Models put together from donors: whose bytes they hold, what is refused, and copies of layers that change nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models

from layerplan.config.plan import StitchedPlanConfig
from layerplan.config.stitch import StitchedModelConfig
from layerplan.config.train import TrainConfig
from layerplan.errors import LayerplanError, ModelError, PlanError
from layerplan.models.freezing import apply_plan, check_gradient_coverage
from layerplan.models.ref import ModelRef
from layerplan.models.stitching.build import write_stitched
from layerplan.models.stitching.donor import Donor
from layerplan.models.stitching.recipe import read_donor, resolve_recipe
from layerplan.plan.decide import PlanContext, resolve_plan
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.stitch_report import StitchReport, list_layers
from tests.families import make_model
from tests.hybrids import NEMOTRON, load, resolve, save_donor
from tests.layer_profiles import make_profile

HALVES: dict[str, Any] = {
    "layers": [{"kind": "nemotron", "count": 2}, {"donor": "qwen", "layers": "2:4"}],
    "kind_sizes": {"nemotron": NEMOTRON},
}


def stitch(out: Path, folders: dict[str, Path], *, seed: int = 0, **spec: Any) -> StitchReport:
    out.mkdir(parents=True)
    return write_stitched(resolve(folders, **spec), out, seed=seed)


def plan_for(folder: Path, report: StitchReport, **options: Any) -> FreezePlan:
    ref = ModelRef(str(folder))
    context = PlanContext(ref.identity(), ref.shape(), TrainConfig(max_steps=2), 16, None, report.layers)
    return resolve_plan(StitchedPlanConfig(**options), context)


def save_family(folder: Path, model_type: str) -> Path:
    make_model(model_type).save_pretrained(folder)
    Tokenizer(models.BPE()).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return save_donor(tmp_path_factory.mktemp("donors") / "qwen")


@pytest.fixture(scope="module")
def halves(qwen, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stitched") / "halves"
    return folder, stitch(folder, {"qwen": qwen}, **HALVES)


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    return load(folder)(input_ids=torch.arange(30)[None], use_cache=False).logits


def test_every_tensor_of_a_donor_is_there_byte_for_byte_and_the_rest_is_named(qwen, halves):
    folder, report = halves
    made, given = load_file(folder / "model.safetensors"), load_file(qwen / "model.safetensors")
    assert {tensor.name for tensor in report.tensors} == set(made)
    copied = [tensor for tensor in report.tensors if tensor.donor is not None]
    assert {tensor.donor_tensor for tensor in copied} == {
        name for name in given if "layers.0." not in name and "layers.1." not in name
    }
    for tensor in copied:
        assert made[tensor.name].numpy().tobytes() == given[str(tensor.donor_tensor)].numpy().tobytes()
    initialised = {tensor.name: tensor.initialised for tensor in report.tensors if tensor.donor is None}
    assert all(name.startswith(("model.layers.0.", "model.layers.1.")) for name in initialised)
    assert initialised["model.layers.1.mixer_block.mixer.D"] == "all 1"
    assert StitchReport.load(folder / "stitch.json").tensors == report.tensors


def test_new_layers_start_as_mamba2_does_and_by_the_seed(qwen, halves, tmp_path):
    """A = 1..heads and time steps within [0.001, 0.1] (Dao and Gu, 2024)."""
    made = load_file(halves[0] / "model.safetensors")
    mixer = "model.layers.0.mixer_block.mixer."
    torch.testing.assert_close(made[mixer + "A_log"].exp(), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    steps = torch.nn.functional.softplus(made[mixer + "dt_bias"])
    assert float(steps.min()) > 0.00099 and float(steps.max()) < 0.1001
    stitch(tmp_path / "again", {"qwen": qwen}, **HALVES)
    stitch(tmp_path / "other", {"qwen": qwen}, **HALVES, seed=1)
    again, other = (load_file(tmp_path / name / "model.safetensors") for name in ("again", "other"))
    assert all(torch.equal(made[name], again[name]) for name in made)
    assert not torch.equal(made[mixer + "in_proj.weight"], other[mixer + "in_proj.weight"])


def test_a_seam_tells_the_size_of_the_residual_on_both_sides(qwen, halves):
    (seam,) = halves[1].seams
    assert (seam.layer, seam.below, seam.above) == (2, "a new nemotron layer", "layer 2 of qwen")
    seen = []
    donor = load(qwen)
    donor.model.layers[2].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        donor(input_ids=torch.randint(0, 40, (4, 64), generator=torch.Generator().manual_seed(0)))
    expected = float(seen[0].square().mean(-1).sqrt().median())
    assert seam.expected_rms == pytest.approx(expected, rel=1e-5) and seam.arriving_rms > 0


def test_a_stitched_folder_is_a_base_with_its_donors_tokenizer(qwen, halves):
    folder = halves[0]
    ModelRef(str(folder)).check()
    assert (folder / "tokenizer.json").read_bytes() == (qwen / "tokenizer.json").read_bytes()
    assert json.loads((folder / "config.json").read_text())["model_type"] == "layerplan_hybrid"


def test_donor_layers_alone_keep_the_donors_own_class_and_all_of_them_its_logits(qwen, tmp_path):
    stitch(tmp_path / "all", {"qwen": qwen}, layers=[{"donor": "qwen", "layers": ":"}])
    stitch(tmp_path / "some", {"qwen": qwen}, layers=[{"donor": "qwen", "layers": [0, 1, 3]}])
    assert json.loads((tmp_path / "some" / "config.json").read_text())["model_type"] == "qwen3"
    assert torch.equal(logits(tmp_path / "all"), logits(qwen))
    assert load(tmp_path / "some").config.num_hidden_layers == 3


def test_two_donors_of_one_type_share_a_model(qwen, tmp_path):
    other = save_donor(tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    report = stitch(
        tmp_path / "made", {"qwen": qwen, "other": other},
        layers=[{"donor": "other", "layers": "0:2"}, {"donor": "qwen", "layers": "2:4"}], final_norm="other",
    )  # fmt: skip
    assert set(report.donors) == {"qwen", "other"}
    assert torch.equal(
        load_file(tmp_path / "made" / "model.safetensors")["model.norm.weight"], weights["model.norm.weight"]
    )


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"layers": [{"donor": "qwen", "layers": "2:5"}]}, "layer 4 does not exist; qwen has layers 0 to 3"),
        ({"layers": [{"donor": "qwen", "layers": "3:3"}]}, "names no layer; qwen has layers 0 to 3"),
        ({"layers": [{"donor": "qwen", "layers": "deep"}]}, "is no half-open range such as 14:28"),
        ({"layers": [{"donor": "qwen", "layers": "0:2"}, {"donor": "qwen", "layers": [1]}]}, "layer 1 of qwen is used"),
        (
            {"layers": [{"kind": "nemotrom", "count": 1}, {"donor": "qwen", "layers": "0:2"}]},
            "layer kind 'nemotrom' is unknown; the nearest is 'nemotron'",
        ),
        (
            {"layers": [{"kind": "nemotron", "count": 1}], "kind_sizes": {"nemotron": {"heads": 2}}},
            "'heads' is no size of it",
        ),
        ({"expand": {"copies": 5}}, "model.expand.copies=5: must lie in 1..4"),
        ({"expand": {"after": [1, 1]}}, "names a layer twice"),
        ({"expand": {"after": [7]}}, "layer 7 does not exist"),
    ],
)
def test_a_spec_that_does_not_fit_its_donor_is_refused_in_one_line(qwen, spec, said):
    with pytest.raises(ModelError) as error:
        resolve({"qwen": qwen}, **spec)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 64}, "hidden_size=64, but qwen has 32; layers share one residual stream"),
        ({"intermediate_size": 64}, "intermediate_size=64, but qwen has 48"),
        ({"model_type": "llama"}, "other: its layers are those of a llama; a hybrid takes those of qwen3, nemotron_h"),
    ],
)
def test_donors_whose_layers_differ_are_refused(qwen, changes, said):
    plain = read_donor(ModelRef(str(qwen)))
    other = Donor(plain.ref, {**plain.config, **changes}, 4)
    layers = [{"donor": "qwen", "layers": "0:2"}, {"donor": "other", "layers": "2:4"}]
    spec = StitchedModelConfig(donors={"qwen": {"name": "a"}, "other": {"name": "b"}}, layers=layers)
    with pytest.raises(ModelError, match=said):
        resolve_recipe(spec, {"qwen": plain, "other": other})


def test_a_family_whose_layers_no_hybrid_takes_is_named(tmp_path):
    llama = save_family(tmp_path, "llama")
    with pytest.raises(ModelError, match=r"its layers are those of a llama; a hybrid takes those of qwen3"):
        resolve({"llama": llama}, layers=[{"kind": "nemotron", "count": 1}, {"donor": "llama", "layers": "0:2"}])


@pytest.mark.parametrize("model_type", ["qwen3", "llama", "gemma2", "mixtral", "olmo2"])
def test_copies_of_layers_leave_the_logits_bit_for_bit_what_they_were(model_type, tmp_path):
    donor = save_family(tmp_path / "donor", model_type)
    report = stitch(tmp_path / "made", {"base": donor}, expand={"copies": 2})
    assert report.keeps_logits is True and report.seams == ()
    assert list_layers(report.layers, "new") == (2, 5) and len(report.layers) == 6
    assert torch.equal(logits(tmp_path / "made"), logits(donor))


def test_only_the_ends_of_a_copys_branches_are_zero(qwen, tmp_path):
    report = stitch(tmp_path / "made", {"base": qwen}, expand={"after": [1]})
    zeros = [tensor.name for tensor in report.tensors if tensor.donor is None]
    assert sorted(zeros) == ["model.layers.2.mlp.down_proj.weight", "model.layers.2.self_attn.o_proj.weight"]
    made = load_file(tmp_path / "made" / "model.safetensors")
    assert not any(bool(made[name].any()) for name in zeros)
    query = "self_attn.q_proj.weight"
    assert torch.equal(made[f"model.layers.2.{query}"], made[f"model.layers.1.{query}"])


@pytest.mark.parametrize(("model_type", "name"), [("gpt2", "GPT2LMHeadModel"), ("openai-gpt", "OpenAIGPTLMHeadModel")])
def test_a_family_with_biases_or_norms_behind_the_sum_is_refused_by_name(model_type, name, tmp_path):
    donor = save_family(tmp_path / "donor", model_type)
    with pytest.raises(ModelError, match=f"{name}: with its output projections at zero a layer still changes"):
        stitch(tmp_path / "made", {"base": donor}, expand={"copies": 1})


def test_even_places_are_the_ends_of_equal_stretches():
    """LLaMA Pro: 8 copies in 32 layers, one behind each group of four."""
    config = {"model_type": "qwen3", "hidden_size": 32, "num_hidden_layers": 32}
    spec = StitchedModelConfig(donors={"base": {"name": "x"}}, expand={"copies": 8})
    layers = resolve_recipe(spec, {"base": Donor(ModelRef("x"), config, 32)}).layers
    assert [layers[index].donor_layer for index in list_layers(layers, "new")] == [3, 7, 11, 15, 19, 23, 27, 31]


def test_measured_places_are_the_most_sensitive_layers(qwen, tmp_path):
    path = tmp_path / "layer_profile.json"
    make_profile(ModelRef(str(qwen)).identity(), [0.0, 0.1, 0.2, 0.3], [0.1, 0.9, 0.5]).save(path)
    recipe = resolve({"base": qwen}, expand={"copies": 2, "after": "profile", "profile": str(path)})
    copies = [layer.donor_layer for layer in recipe.layers if layer.is_copy]
    assert copies == [1, 2]


@pytest.mark.parametrize(("train", "trained"), [("new", (0, 1)), ("donor", (2, 3))])
def test_the_matching_plan_trains_one_half_and_the_gradients_are_exactly_there(halves, train, trained):
    folder, report = halves
    plan = plan_for(folder, report, train=train)
    assert (plan.plan_type, plan.trainable_layers, plan.tied) == ("stitched", trained, "frozen")
    model = load(folder)
    applied = apply_plan(model, plan)
    model(input_ids=torch.arange(20)[None], labels=torch.arange(20)[None], use_cache=False).loss.backward()
    check_gradient_coverage(model, applied)
    moved = {int(name.split(".")[2]) for name in applied.trainable}
    assert moved == set(trained) and all(name.startswith("model.layers.") for name in applied.trainable)


def test_a_plan_by_origin_needs_a_model_that_has_one(qwen):
    ref = ModelRef(str(qwen))
    context = PlanContext(ref.identity(), ref.shape(), TrainConfig(max_steps=2), 16)
    with pytest.raises(PlanError, match=r"has no stitch\.json"):
        resolve_plan(StitchedPlanConfig(), context)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"layers": [{"donor": "b", "layers": "0:1"}]}, "is none of the donors"),
        ({}, "give exactly one of layers and expand"),
        ({"layers": [{"donor": "a", "count": 2}]}, "give donor and layers, or kind and count"),
        ({"expand": {}}, "needs copies"),
        ({"expand": {"copies": 1, "after": "profile"}}, "one belongs to the other"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(values, said):
    from layerplan.config.load import validate_config

    run = {
        "name": "r",
        "model": {"type": "stitched", "donors": {"a": {"name": "x"}}, **values},
        "corpus": {"seq_len": 64},
    }
    with pytest.raises(LayerplanError, match=said) as error:
        validate_config(run)
    assert error.value.exit_code == 2
