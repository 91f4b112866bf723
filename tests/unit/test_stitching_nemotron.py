"""NemotronH as a donor: which of its blocks become layers of a hybrid, whose bytes they keep, and what is refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from layerplan.config.plan import StitchedPlanConfig
from layerplan.config.train import TrainConfig
from layerplan.errors import ModelError
from layerplan.models.ref import ModelRef
from layerplan.models.stitching.build import write_stitched
from layerplan.plan.decide import PlanContext, resolve_plan
from layerplan.plan.stitch_report import StitchReport
from tests.hybrids import NEMOTRON, load, resolve, save_donor, save_nemotron_h

BOTH = [{"donor": "nemo", "layers": "0:4"}, {"donor": "qwen", "layers": "2:4"}]


@pytest.fixture(scope="module")
def donors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("donors")
    return {"qwen": save_donor(folder / "qwen"), "nemo": save_nemotron_h(folder / "nemo")}


@pytest.fixture(scope="module")
def made(donors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stitched") / "made"
    folder.mkdir()
    return folder, write_stitched(resolve(donors, layers=BOTH), folder, seed=0)


def test_every_tensor_is_a_donors_byte_for_byte_and_pairs_of_blocks_are_layers(donors, made):
    """Blocks 0 to 3 of M-M-*-M are two pairs: Mamba2 blocks 0 and 2, feed-forward blocks 1 and 3."""
    folder, report = made
    tensors = load_file(folder / "model.safetensors")
    given = {name: load_file(path / "model.safetensors") for name, path in donors.items()}
    assert {tensor.name for tensor in report.tensors} == set(tensors)
    for tensor in report.tensors:
        assert tensor.initialised is None
        source = given[str(tensor.donor)][str(tensor.donor_tensor)]
        assert tensors[tensor.name].numpy().tobytes() == source.numpy().tobytes()
    origin = {tensor.name: tensor.donor_tensor for tensor in report.tensors}
    assert origin["model.layers.1.mixer_block.mixer.A_log"] == "backbone.layers.2.mixer.A_log"
    assert origin["model.layers.1.feed_forward_block.norm.weight"] == "backbone.layers.3.norm.weight"
    assert origin["model.layers.2.mlp.up_proj.weight"] == "model.layers.2.mlp.up_proj.weight"
    assert [(layer.kind, layer.donor, layer.donor_layer, layer.donor_span) for layer in report.layers] == [
        ("nemotron", "nemo", 0, 2), ("nemotron", "nemo", 2, 2), ("qwen3", "qwen", 2, 1), ("qwen3", "qwen", 3, 1),
    ]  # fmt: skip
    assert StitchReport.load(folder / "stitch.json").layers == report.layers


@torch.no_grad()
def test_its_layers_compute_what_the_donors_blocks_do(donors, made):
    """The donor's bound on the time step is taken off, as a hybrid has none."""
    hybrid, nemo = load(made[0]), load(donors["nemo"])
    states = torch.randn(2, 50, 32, generator=torch.Generator().manual_seed(0))
    wanted, found = states, states
    for block in nemo.model.layers[:4]:
        block.mixer.time_step_limit = (0.0, float("inf"))
        wanted = block(wanted)
    for layer in hybrid.model.layers[:2]:
        found = layer(found)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)


def test_donors_and_the_made_folder_are_bases_that_can_be_checked(donors, made):
    for folder in (*donors.values(), made[0]):
        ModelRef(str(folder)).check()


def test_its_sizes_are_the_donors_and_the_seam_lies_between_the_donors(made):
    folder, report = made
    sizes = load(folder).config.kind_sizes["nemotron"]
    assert {name: sizes[name] for name in NEMOTRON} == NEMOTRON
    (seam,) = report.seams
    assert (seam.layer, seam.below, seam.above) == (2, "layers 2 to 3 of nemo", "layer 2 of qwen")


def test_what_a_seam_expects_above_it_is_what_the_donors_block_is_given(donors, tmp_path):
    report = write_stitched(
        resolve(donors, layers=[{"donor": "qwen", "layers": "0:2"}, {"donor": "nemo", "layers": "2:4"}]),
        tmp_path, seed=0,
    )  # fmt: skip
    (seam,) = report.seams
    assert (seam.below, seam.above) == ("layer 1 of qwen", "layers 2 to 3 of nemo")
    seen: list[torch.Tensor] = []
    nemo = load(donors["nemo"])
    nemo.model.layers[2].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        nemo(input_ids=torch.randint(0, 30, (4, 64), generator=torch.Generator().manual_seed(0)))
    assert seam.expected_rms == pytest.approx(float(seen[0].square().mean(-1).sqrt().median()), rel=1e-5)


def test_a_plan_by_origin_has_nothing_new_and_both_donors_to_train(donors, made):
    ref = ModelRef(str(made[0]))
    context = PlanContext(ref.identity(), ref.shape(), TrainConfig(max_steps=2), 16, None, made[1].layers)
    assert resolve_plan(StitchedPlanConfig(train="donor"), context).trainable_layers == (0, 1, 2, 3)


def test_new_layers_beside_it_take_its_sizes(donors):
    recipe = resolve(donors, layers=[{"kind": "nemotron", "count": 1}, *BOTH])
    assert recipe.config["kind_sizes"]["nemotron"]["n_groups"] == NEMOTRON["n_groups"]
    assert [layer.kind for layer in recipe.layers] == ["nemotron"] * 3 + ["qwen3"] * 2


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ("0:5", "block 4 is a block of type full_attention, where a Nemotron layer has linear_attention"),
        ("1:3", "block 1 is a block of type mlp, where a Nemotron layer has linear_attention"),
        ([6], "block 7 is no block, where a Nemotron layer has mlp"),
        ([0, 3], "layer 0 stands without 1; the two are one nemotron layer and stand together"),
        ("0:1", "layer 0 stands without 1"),
        ([0, 1, 0, 1], "layer 0 of nemo is used by model.layers.0 already"),
        ("6:8", "layer 7 does not exist; nemo has layers 0 to 6"),
    ],
)
def test_blocks_that_are_no_layer_together_are_refused_by_name(donors, layers, said):
    with pytest.raises(ModelError) as error:
        resolve(donors, layers=[{"donor": "nemo", "layers": layers}, {"donor": "qwen", "layers": "0:1"}])
    assert said in str(error.value) and "\n" not in str(error.value)


def test_blocks_of_experts_are_refused_by_name(donors, tmp_path):
    nemo = save_nemotron_h(tmp_path, "MEM-")
    with pytest.raises(ModelError, match="block 1 is a block of type moe, where a Nemotron layer has mlp"):
        resolve({**donors, "nemo": nemo}, layers=BOTH)


@pytest.mark.parametrize(
    ("changes", "spec", "said"),
    [
        (
            {"hidden_size": 64},
            {},
            "model.donors.nemo: hidden_size=64, but qwen has 32; layers share one residual stream",
        ),
        (
            {},
            {"embeddings": "nemo"},
            "model.embeddings=nemo: is a nemotron_h; embedding, final norm and head of a hybrid",
        ),
        ({}, {"final_norm": "nemo"}, "model.final_norm=nemo: model_type=nemotron_h, but qwen has qwen3"),
        (
            {},
            {"kind_sizes": {"nemotron": {"n_groups": 4}}},
            "nemo: n_groups=2, but model.kind_sizes has 4; all nemotron",
        ),
    ],
)
def test_a_donor_that_does_not_fit_is_refused_in_one_line(donors, tmp_path, changes, spec, said):
    nemo = save_nemotron_h(tmp_path, **changes) if changes else donors["nemo"]
    with pytest.raises(ModelError) as error:
        resolve({**donors, "nemo": nemo}, layers=BOTH, **spec)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_two_donors_of_other_sizes_are_refused_and_of_the_same_are_taken(donors, tmp_path):
    other, same = save_nemotron_h(tmp_path / "other", ssm_state_size=16), save_nemotron_h(tmp_path / "same", "*M-")
    layers = [*BOTH, {"donor": "more", "layers": "1:3"}]
    assert len(resolve({**donors, "more": same}, layers=layers).layers) == 5
    layers[-1] = {"donor": "more", "layers": "0:2"}
    with pytest.raises(ModelError, match=r"model\.donors\.more: ssm_state_size=16, but nemo has 8; all"):
        resolve({**donors, "more": other}, layers=layers)


def test_a_nemotron_h_by_itself_keeps_its_class(donors, tmp_path):
    """Blocks one by one, attention among them."""
    write_stitched(
        resolve({"nemo": donors["nemo"]}, layers=[{"donor": "nemo", "layers": [0, 1, 4, 5]}]), tmp_path, seed=0
    )
    model: nn.Module = load(tmp_path)
    assert type(model).__name__ == "NemotronHForCausalLM" and len(model.model.layers) == 4
