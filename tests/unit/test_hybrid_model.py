"""The hybrid against transformers' own models: the same numbers, cached or not, padded or not, packed or not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3ForCausalLM
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHConfig, NemotronHForCausalLM

from layerplan.config.train import OptimizerConfig
from layerplan.errors import ModelError
from layerplan.models.causal_lm import find_decoder_parts, load_causal_lm
from layerplan.models.hybrid import HybridConfig
from layerplan.models.hybrid.layer_kinds import LAYER_KINDS
from layerplan.models.hybrid.nemotron import Documents
from layerplan.models.meta import build_without_memory
from layerplan.models.model_sizes import make_model_shape, measure_shape
from layerplan.models.ref import ModelRef
from layerplan.plan.memory import layer_activation_bytes
from layerplan.train.optim import build_optimizer
from layerplan.train.self_test import ask_model
from tests.hybrids import NEMOTRON, build_hybrid, load, make_config
from tests.model_folders import edit_config
from tests.qwen3 import QWEN3_0P6B, TINY_QWEN3, build_tiny_qwen3

ROUNDING = 2e-5
TINY = {**TINY_QWEN3, "model_type": "layerplan_hybrid", "layer_kinds": ["nemotron", "qwen3", "qwen3"]}


def draw_ids(rows: int, tokens: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 40, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def hybrid():
    return build_hybrid()


@torch.no_grad()
def logits(model, ids, **inputs):
    return model(input_ids=ids, use_cache=False, **inputs).logits


def test_a_hybrid_of_qwen3_layers_only_gives_the_donors_logits_bit_for_bit(tmp_path):
    donor = build_tiny_qwen3(initializer_range=0.15).eval()
    donor.save_pretrained(tmp_path)
    edit_config(tmp_path, model_type="layerplan_hybrid", architectures=["HybridForCausalLM"], layer_kinds=["qwen3"] * 3)
    ids = draw_ids(2, 40)
    assert torch.equal(logits(load_causal_lm(str(tmp_path)), ids), logits(donor, ids))


def test_nemotron_layers_compute_what_nemotron_h_does_where_its_time_steps_are_not_bounded():
    """The peer is transformers' NemotronH of the same weights; its embedding, norm and head are ours."""
    hybrid = build_hybrid(["nemotron", "nemotron"], tie_word_embeddings=False)
    sizes = {"head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "layer_norm_epsilon": 1e-5}
    config = NemotronHConfig(
        **NEMOTRON, **sizes, vocab_size=40, hidden_size=32, layers_block_type=["linear_attention", "mlp"] * 2,
    )  # fmt: skip
    peer = NemotronHForCausalLM(config).float().eval()
    renamed = {}
    for name, value in hybrid.state_dict().items():
        parts = name.replace("embed_tokens", "embeddings").replace("model.norm.", "model.norm_f.").split(".")
        if "layers" in parts:
            at = parts.index("layers") + 1
            parts[at] = str(2 * int(parts[at]) + (parts[at + 1] == "feed_forward_block"))
            del parts[at + 1]
        renamed[".".join(parts)] = value
    peer.load_state_dict(renamed)
    for block in peer.model.layers[::2]:
        block.mixer.time_step_limit = (0.0, float("inf"))
    peer.model.norm_f.variance_epsilon = 1e-6  # Qwen3's
    ids = draw_ids(2, 50)
    torch.testing.assert_close(logits(hybrid, ids), logits(peer, ids), rtol=0, atol=ROUNDING)


def test_cached_generation_is_the_greedy_choice_of_uncached_passes(hybrid):
    ids = draw_ids(2, 21)
    cached = hybrid.generate(ids, max_new_tokens=20, do_sample=False, use_cache=True, eos_token_id=None)
    slow = ids
    for _ in range(20):
        slow = torch.cat([slow, logits(hybrid, slow)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(cached, slow)


@torch.no_grad()
def test_a_cached_pass_agrees_with_a_full_one_at_small_time_steps(hybrid):
    """NemotronH's own bound on the time step would put 1e-3 to 6e-3 between the two."""
    model = build_hybrid()
    for layer in model.model.layers[:2]:
        layer.mixer_block.mixer.dt_bias.fill_(-9.0)  # softplus of it is 1.2e-4, below the bound of 1e-3
    ids = draw_ids(2, 37)
    state = model(input_ids=ids[:, :20], use_cache=True)
    steps = [state.logits]
    for at in range(20, 37):
        state = model(input_ids=ids[:, at : at + 1], past_key_values=state.past_key_values, use_cache=True)
        steps.append(state.logits)
    torch.testing.assert_close(torch.cat(steps, 1), logits(model, ids), rtol=0, atol=ROUNDING)


def test_left_padding_changes_no_logits_of_a_row(hybrid):
    ids, pad = draw_ids(1, 30), 7
    padded = torch.cat([torch.zeros(1, pad, dtype=torch.long), ids], dim=1)
    mask = torch.cat([torch.zeros(1, pad, dtype=torch.long), torch.ones_like(ids)], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = logits(hybrid, padded, attention_mask=mask, position_ids=positions)[:, pad:]
    torch.testing.assert_close(found, logits(hybrid, ids), rtol=0, atol=ROUNDING)


def test_a_left_padded_batch_generates_what_each_row_does_alone(hybrid):
    short, long = draw_ids(1, 9, seed=1), draw_ids(1, 23, seed=2)
    batch = torch.cat([torch.cat([torch.zeros(1, 14, dtype=torch.long), short], 1), long])
    mask = torch.ones_like(batch)
    mask[0, :14] = 0
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    together = hybrid.generate(batch, attention_mask=mask, **options)[:, -12:]
    alone = [hybrid.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, -12:] for ids in (short, long)]
    assert torch.equal(together, torch.cat(alone))


def test_documents_of_a_row_know_nothing_of_each_other_where_their_starts_are_given(hybrid):
    lengths = (19, 3, 28)
    ids = draw_ids(1, sum(lengths))
    pieces = ids.split(lengths, dim=1)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    index = torch.cat([torch.full((length,), at) for at, length in enumerate(lengths)])[None]
    packed = logits(hybrid, ids, position_ids=positions, seq_idx=index)
    torch.testing.assert_close(packed, torch.cat([logits(hybrid, piece) for piece in pieces], 1), rtol=0, atol=ROUNDING)
    changed = ids.clone()
    changed[:, :19] = 5
    moved = logits(hybrid, changed, position_ids=positions, seq_idx=index)
    assert torch.equal(moved[:, 19:], packed[:, 19:])


def test_the_self_test_packs_rows_with_starts_given(hybrid):
    report = ask_model(build_hybrid(), seq_len=64)
    assert report.recipe.rows == "reset", report.sentence


def test_the_self_test_falls_to_one_document_per_row_for_a_layer_that_cannot_start_anew(monkeypatch):
    monkeypatch.setitem(LAYER_KINDS, "nemotron", replace(LAYER_KINDS["nemotron"], takes_documents=False))
    assert ask_model(build_hybrid(), seq_len=64).recipe.rows == "alone"


@torch._dynamo.config.patch(error_on_recompile=True)
def test_a_compiled_layer_is_not_compiled_anew_for_every_row_of_documents():
    layer = build_hybrid().model.layers[0]
    compiled = torch.compile(layer.forward, backend="eager", dynamic=False)
    states = torch.randn(1, 40, 32)
    for cut in range(3, 37, 5):
        documents = Documents(torch.tensor([[0] * cut + [1] * (40 - cut)]))
        torch.testing.assert_close(compiled(states, documents=documents), layer(states, documents=documents))
    torch._dynamo.reset()


def test_gradient_checkpointing_changes_no_gradient():
    model, ids = build_hybrid(), draw_ids(2, 33)
    model.train()
    gradients = []
    for with_checkpoints in (False, True):
        if with_checkpoints:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_saving_and_loading_by_the_auto_classes_gives_the_same_tensors_and_logits(hybrid, tmp_path):
    hybrid.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded) is type(hybrid) and isinstance(AutoConfig.from_pretrained(tmp_path), HybridConfig)
    assert all(torch.equal(value, hybrid.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert torch.equal(logits(loaded, draw_ids(2, 20)), logits(hybrid, draw_ids(2, 20)))


def test_a_folder_is_a_base_that_can_be_checked_identified_and_sized(hybrid, tmp_path):
    hybrid.save_pretrained(tmp_path)
    ref = ModelRef(str(tmp_path))
    ref.check()
    assert (ref.identity().model_type, ref.identity().num_layers) == ("layerplan_hybrid", 4)
    shape = ref.shape()
    assert shape.is_exact
    assert [layer.kind for layer in shape.layers] == ["recurrent_decoder"] * 2 + ["decoder"] * 2
    assert shape.total_params == hybrid.num_parameters()


def test_what_mamba_keeps_in_vectors_does_not_decay():
    model = build_hybrid()
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.5))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay = {names[id(value)]: group["weight_decay"] for group in optimizer.param_groups for value in group["params"]}
    mixer = "model.layers.0.mixer_block.mixer."
    assert [decay[mixer + name] for name in ("A_log", "D", "dt_bias", "in_proj.weight")] == [0.0, 0.0, 0.0, 0.5]


def test_the_memory_predicted_for_a_layer_is_what_pytorch_keeps_of_it(hybrid, tmp_path):
    """The hooks on real tensors of the same length are the oracle of the count without values."""
    hybrid.save_pretrained(tmp_path)
    layer, tokens = build_hybrid().model.layers[0], 64
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept: dict[int, int] = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = layer(torch.randn(1, tokens, 32, requires_grad=True))
    predicted = layer_activation_bytes(ModelRef(str(tmp_path)).shape(), "float32", trained=True, layer=0)
    assert output.shape == (1, tokens, 32) and predicted * tokens == pytest.approx(sum(kept.values()), rel=0.02)


def test_hidden_states_are_those_after_each_layer(hybrid):
    outputs = hybrid(input_ids=draw_ids(1, 9), output_hidden_states=True)
    assert len(outputs.hidden_states) == 5


def test_parts_are_found_as_in_any_decoder(hybrid):
    parts = find_decoder_parts(hybrid)
    assert (parts.layers_path, parts.embeddings_path, parts.final_norm_path, parts.is_tied) == (
        "model.layers", "model.embed_tokens", "model.norm", True,
    )  # fmt: skip


def test_names_of_the_two_kinds_have_nothing_in_common(hybrid):
    """A Qwen3 checkpoint that is loaded over a hybrid must leave its Nemotron layers alone."""
    names = [{name for name, _ in hybrid.model.layers[index].named_parameters()} for index in (0, 2)]
    assert not names[0] & names[1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layer_kinds": ["qwen3", "nemotrom"]}, "layer kind 'nemotrom' is unknown; the nearest is 'nemotron'"),
        ({"kind_sizes": {"nemotron": {"mamba_heads": 4}}}, "'mamba_heads' is no size of it; the nearest is 'mamba_"),
        ({"kind_sizes": {"nemotron": {"n_groups": 3}}}, "n_groups=3 must divide mamba_num_heads=32"),
        ({"kind_sizes": {"nemotron": {"conv_kernel": 0}}}, "conv_kernel=0 must be a positive integer"),
        (
            {"kind_sizes": {"qwen3": {"head_dim": 4}}},
            "'head_dim' is given, but its sizes are those of the config itself",
        ),
        ({"layer_types": ["full_attention"] * 3}, "layer 0 is of kind 'nemotron' and cannot be of layer type"),
    ],
)
def test_a_config_that_names_what_there_is_not_is_refused_in_one_line(changes, said):
    values = {**TINY, **changes}
    with pytest.raises(ModelError) as error:
        make_model_shape(values)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_the_paper_like_halves_have_the_published_sizes():
    """Qwen3-0.6B counts 596,049,920 parameters, 15,730,944 a layer; the rest is arithmetic over NemotronH's own shapes."""
    values = {name: value for name, value in QWEN3_0P6B.items() if name not in ("model_type", "num_hidden_layers")}
    config = HybridConfig(
        **values, layer_kinds=["nemotron"] * 14 + ["qwen3"] * 14, kind_sizes={"nemotron": {"intermediate_size": 3968}}
    )
    shape = measure_shape(build_without_memory(config, name="hybrid"))
    assert shape.layers[14].params == 15_730_944
    mixer = 1024 * (2048 + 4096 + 32) + 4096 * 5 + 3 * 32 + 2048 + 2048 * 1024 + 1024
    assert shape.layers[0].params == mixer + 2 * 1024 * 3968 + 1024
    assert round(shape.total_params / 1e6, 1) == 607.8
    assert round(14 * shape.layers[0].params / 1e9, 2) == 0.23


def test_transformers_makes_the_class_of_the_config():
    assert type(AutoModelForCausalLM.from_config(make_config())).__name__ == "HybridForCausalLM"
    assert not isinstance(build_hybrid(), Qwen3ForCausalLM)
