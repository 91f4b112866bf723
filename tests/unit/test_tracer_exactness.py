"""Every fast path of the tracer against the oracle: one full forward pass per layer and probe, hooks only."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import lru_cache

import naive_tracer
import numpy as np
import pytest
import torch
import transformers
from tiny_families import VOCAB, make_config, make_model
from torch import nn

from layerplan.config.trace import TraceConfig
from layerplan.errors import ModelError
from layerplan.tracer import masking, measures
from layerplan.tracer.encode import EncodedProbe, make_batches
from layerplan.tracer.masking import WAYS, choose_way, has_time_convolution, trace_masked
from layerplan.tracer.meter import ProbeMeter
from layerplan.tracer.model_runner import LayerRunner
from layerplan.tracer.zero_context import attend_after_zeros

TOLERANCE = 1e-5
ATTENTION_ONLY = {"qwen3", "llama", "gpt2", "gemma2", "olmo2"}
FAMILIES = sorted({*ATTENTION_ONLY, "layerplan_hybrid", "mamba2", "nemotron_h", "qwen3_next"})


@pytest.fixture(autouse=True)
def _quiet_and_single_threaded():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@lru_cache(maxsize=8)
def runner_of(family: str) -> LayerRunner:
    return LayerRunner(make_model(family))


def make_probes(lengths: list[tuple[int, int]], *, bos: bool = False, seed: int = 0) -> list[EncodedProbe]:
    """Random probes of (tokens, context tokens); `bos` puts one token before the context that belongs to neither."""
    rng = np.random.default_rng(seed)
    return [
        EncodedProbe(
            id=f"p{number}",
            group="ab"[number % 2],
            input_ids=tuple(int(token) for token in rng.integers(0, VOCAB, length)),
            is_context=tuple(int(bos) <= position < int(bos) + context for position in range(length)),
            gold_id=int(rng.integers(0, VOCAB)),
        )
        for number, (length, context) in enumerate(lengths)
    ]


def as_tensors(probes: list[EncodedProbe]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([p.input_ids for p in probes]), torch.tensor([p.is_context for p in probes])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_diagnostic_equals_the_oracle(family: str) -> None:
    runner = runner_of(family)
    model, layers = runner.model, runner.parts.layers
    probes = make_probes([(11, 6), (11, 6), (11, 7), (14, 9)])
    config = TraceConfig(js_top_k=3, js_top_k_check=0)
    records = {r["id"]: r for batch in make_batches(probes, 4) for r in ProbeMeter(runner, config).measure(batch)}
    weight = model.get_output_embeddings().weight.double()
    for probe in probes:
        ids, context = as_tensors([probe])
        record = records[probe.id]
        intact, states = naive_tracer.run_intact(model, layers, ids)
        target = int(intact.argmax())
        assert record["target_id"] == target and record["is_right"] == (target == probe.gold_id)
        for column, mask, top_k in (
            ("js", "zero", 3),
            ("js_top_k_check", "zero", 0),
            ("js_mask_check", "mean", 3),
        ):
            expected = naive_tracer.trace_naively(model, layers, ids, context, mask, top_k)[0]
            assert np.abs(record[column][:-1] - expected).max() < TOLERANCE, (column, record)
            assert record[column][-1] == 0 and expected.max() > 1e-3
        # P(l) by the model's own head: replace the last layer's output by h_l and let it run on
        for index, state in enumerate(states):
            hook = layers[-1].register_forward_hook(lambda m, a, o, state=state: put(o, state))
            log_prob = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, -1].double(), -1)[target]
            hook.remove()
            assert abs(record["log_prob"][index] - float(log_prob)) < TOLERANCE
        # SALF by its section 2.1 and Algorithm 1: rows of the pseudo-inverse, one label at a time
        bases = torch.linalg.pinv(weight).T
        for index, state in enumerate(states):
            f = (runner.parts.final_norm(state) if index == len(layers) else state)[0].double()
            near = [float(torch.cosine_similarity(f, basis, dim=0)) for basis in bases]
            cosine = 1 - near[probe.gold_id]
            assert abs(record["deviation_cosine"][index] - cosine) < TOLERANCE
            ce = float(np.log(np.exp(near).sum())) - near[probe.gold_id]
            assert abs(record["deviation_ce"][index] - ce) < TOLERANCE
            rank = sum(value > near[probe.gold_id] + 1e-6 for value in near)
            assert abs(record["deviation_rank"][index] - rank) <= sum(
                abs(value - near[probe.gold_id]) < 1e-6 for value in near
            )


@pytest.mark.parametrize(("norms", "is_normed"), [("none", "....."), ("all", "yyyyy"), ("hf", "....y")])
def test_the_deviation_norm_names_the_states_that_pass_the_final_norm(norms: str, is_normed: str) -> None:
    runner = runner_of("llama")
    (probe,) = make_probes([(11, 6)])
    (record,) = ProbeMeter(runner, TraceConfig(deviation_norm=norms)).measure([probe])
    _, states = naive_tracer.run_intact(runner.model, runner.parts.layers, as_tensors([probe])[0])
    weight = runner.model.get_output_embeddings().weight.double()
    basis = torch.linalg.pinv(weight).T[probe.gold_id]
    for index, state in enumerate(states):
        f = (runner.parts.final_norm(state) if is_normed[index] == "y" else state)[0].double()
        cosine = 1 - float(torch.cosine_similarity(f, basis, dim=0))
        assert abs(record["deviation_cosine"][index] - cosine) < TOLERANCE, index


@pytest.mark.parametrize("norms", ["hf", "all", "none"])
def test_states_that_a_head_of_another_width_cannot_read_pass_what_leads_to_it(norms: str) -> None:
    """OPT-350m: the layers are 1,024 wide, its head reads 512."""
    config = make_config("opt")
    config.word_embed_proj_dim, config.do_layer_norm_before = 16, False
    runner = LayerRunner(transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())
    (probe,) = make_probes([(11, 6)])
    (record,) = ProbeMeter(runner, TraceConfig(deviation_norm=norms)).measure([probe])
    _, states = naive_tracer.run_intact(runner.model, runner.parts.layers, as_tensors([probe])[0])
    basis = torch.linalg.pinv(runner.model.get_output_embeddings().weight.double()).T[probe.gold_id]
    for index, state in enumerate(states):
        projected = runner.model.model.decoder.project_out(state)[0].double()
        cosine = 1 - float(torch.cosine_similarity(projected, basis, dim=0))
        assert abs(record["deviation_cosine"][index] - cosine) < TOLERANCE, index


@pytest.mark.parametrize("family", ["olmo", "opt", "llama4_text"])
def test_other_structures_equal_the_oracle_too(family: str) -> None:
    """A norm without weights, a trunk inside a trunk, a head whose base model is itself."""
    runner = LayerRunner(make_model(family))
    probes = make_probes([(11, 6), (11, 6)])
    ids, context = as_tensors(probes)
    records = ProbeMeter(runner, TraceConfig(js_top_k=3)).measure(probes)
    for column, mask in (("js", "zero"), ("js_mask_check", "mean")):
        expected = naive_tracer.trace_naively(runner.model, runner.parts.layers, ids, context, mask, 3)
        found = np.stack([record[column][:-1] for record in records])
        assert np.abs(found - expected).max() < TOLERANCE and expected.max() > 1e-3


def put(output, state):
    hidden = (output[0] if isinstance(output, tuple) else output).clone()
    hidden[:, -1] = state
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_that_is_chosen_or_always_holds_equals_the_oracle(family: str) -> None:
    runner = runner_of(family)
    ids, context = as_tensors(make_probes([(12, 7), (12, 7), (12, 8)], seed=5))
    states = runner.run(ids)
    chosen = {mask: choose_way(runner, ids, states, context, mask) for mask in WAYS}
    for mask, ways in WAYS.items():
        layers = runner.parts.layers
        expected = [naive_tracer.run_masked(runner.model, layers, ids, context, k, mask) for k in range(len(layers))]
        for way in {chosen[mask], "sweep", "layerwise"} & set(ways):
            found = runner.lens(trace_masked(runner, ids, states, context, mask, way))
            assert float((found - torch.stack(expected)).abs().max()) < TOLERANCE, (mask, way)
    # zero rows stay zero only without biases, equal rows stay equal only under attention
    without_bias = family in ATTENTION_ONLY - {"gpt2"}
    assert (chosen["zero"] == "query_rows") == without_bias, chosen
    assert (chosen["mean"] == "equal_rows") == (family in ATTENTION_ONLY), chosen
    assert has_time_convolution(runner.parts.layers) == (family not in ATTENTION_ONLY)


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "qwen3_next"])
def test_an_unmasked_first_token_breaks_the_shortcuts_and_the_sweep_takes_over(family: str) -> None:
    runner = runner_of(family)
    probes = make_probes([(12, 6), (12, 7)], bos=True)
    ids, context = as_tensors(probes)
    states = runner.run(ids)
    for mask in WAYS:
        assert choose_way(runner, ids, states, context, mask) == "sweep"
    config = TraceConfig(js_top_k=3)
    meter = ProbeMeter(runner, config)
    for probe, record in zip(probes, meter.measure(probes)):
        ids, context = as_tensors([probe])
        expected = naive_tracer.trace_naively(runner.model, runner.parts.layers, ids, context, "zero", 3)[0]
        assert np.abs(record["js"][:-1] - expected).max() < TOLERANCE
    # the next batch has no such token and may take the shortcut again
    assert meter.measure(make_probes([(12, 6)]))[0]["way_mean"] != "sweep" or family == "qwen3_next"


def test_a_window_shorter_than_the_probe_breaks_the_zero_shortcut(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = LayerRunner(make_model("gemma2"))
    ids, context = as_tensors(make_probes([(40, 34)]))
    assert runner.model.config.sliding_window < 40
    states = runner.run(ids)
    assert choose_way(runner, ids, states, context, "zero") == "equal_rows"
    expected = naive_tracer.trace_naively(runner.model, runner.parts.layers, ids, context, "zero", 5)[0]
    record = ProbeMeter(runner, TraceConfig(js_top_k=5)).measure(make_probes([(40, 34)]))[0]
    assert np.abs(record["js"][:-1] - expected).max() < TOLERANCE


class StubbornLayer(nn.Module):
    """A decoder layer that only takes the one row its trunk made."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states, *args, **kwargs):
        if len(hidden_states) != 1:
            raise ValueError("one row expected")
        return self.layer(hidden_states, *args, **kwargs)


def test_a_decoder_that_takes_no_more_rows_is_measured_layer_by_layer() -> None:
    model = make_model("llama")
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = StubbornLayer(layer)
    probe = make_probes([(10, 6)])
    ids, context = as_tensors(probe)
    runner = LayerRunner(model)
    record = ProbeMeter(runner, TraceConfig(js_top_k=3)).measure(probe)[0]
    assert record["way_zero"] == record["way_mean"] == "layerwise"
    expected = naive_tracer.trace_naively(model, runner.parts.layers, ids, context, "zero", 3)[0]
    assert np.abs(record["js"][:-1] - expected).max() < TOLERANCE


def test_results_do_not_depend_on_batch_size_or_order_and_are_bitwise_equal_for_equal_shapes() -> None:
    probes = make_probes([(9, 5), (11, 6), (11, 6), (11, 7), (11, 7), (13, 7), (13, 8)])
    meter = ProbeMeter(runner_of("qwen3"), TraceConfig())

    def measure(order: list[EncodedProbe], batch_size: int) -> dict[str, dict]:
        return {r["id"]: r for batch in make_batches(order, batch_size) for r in meter.measure(batch)}

    started = time.perf_counter()
    first = measure(probes, 3)
    assert {"intact pass", "zero mask", "mean mask", "JS", "log P", "deviations"} < set(meter.seconds)
    assert 0 < sum(meter.seconds.values()) <= time.perf_counter() - started  # parts do not overlap
    for other, tolerance in ((measure(probes[::-1], 3), 0.0), (measure(probes, 1), TOLERANCE)):
        assert set(other) == set(first)
        for name, record in first.items():
            for column in ("log_prob", "js", "js_top_k_check", "js_mask_check", "deviation_cosine", "deviation_rank"):
                assert np.abs(record[column] - other[name][column]).max() <= tolerance, column


def test_contexts_with_and_without_a_hole_share_a_batch() -> None:
    """A token that is not masked, before the query of one probe alone, rules the shortcuts out for all of the batch."""
    runner = runner_of("qwen3")
    whole, holed = make_probes([(11, 7), (11, 7)])
    inside = list(holed.is_context)
    inside[2] = False
    holed = replace(holed, is_context=tuple(inside), checks_mask=False)
    for batch in ([whole, holed], [holed, whole]):
        records = ProbeMeter(runner, TraceConfig(js_top_k=3)).measure(batch)
        for record, probe in zip(records, batch):
            ids, context = as_tensors([probe])
            for column, mask in (("js", "zero"), ("js_mask_check", "mean")):
                if column == "js" or probe.checks_mask:
                    expected = naive_tracer.trace_naively(runner.model, runner.parts.layers, ids, context, mask, 3)[0]
                    assert np.abs(record[column][:-1] - expected).max() < TOLERANCE, (probe.id, column)
            assert record["way_zero"] == "sweep" and record["way_mean"] == ("equal_rows" if probe.checks_mask else "")


def test_a_probe_that_skips_the_other_mask_differs_in_nothing_else() -> None:
    probes = make_probes([(11, 6), (11, 6), (11, 7)])
    meter = ProbeMeter(runner_of("qwen3"), TraceConfig())
    some = meter.measure([replace(probe, checks_mask=number != 1) for number, probe in enumerate(probes)])
    none = meter.measure([replace(probe, checks_mask=False) for probe in probes])
    for number, (whole, part, bare) in enumerate(zip(meter.measure(probes), some, none, strict=True)):
        assert np.isnan(bare["js_mask_check"]).all() and bare["way_mean"] == "" != bare["way_zero"]
        assert np.array_equal(bare["js"], whole["js"]) and np.array_equal(part["js"], whole["js"])
        if number == 1:
            assert np.isnan(part["js_mask_check"]).all() and part["way_mean"] == ""
        else:
            assert np.abs(part["js_mask_check"] - whole["js_mask_check"]).max() < TOLERANCE
            assert part["way_mean"] == whole["way_mean"]


def test_long_probes_are_measured_in_smaller_parts_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    from layerplan.tracer import meter as module

    probes = make_probes([(11, 6)] * 5)
    meter = ProbeMeter(runner_of("llama"), TraceConfig())
    whole = meter.measure(probes)
    monkeypatch.setattr(module, "MAX_COPIED_TOKENS", 2 * 4 * 11)
    calls = []
    monkeypatch.setattr(meter, "_measure", lambda part, run=meter._measure: calls.append(len(part)) or run(part))
    parts = meter.measure(probes)
    assert calls == [2, 2, 1]
    for first, second in zip(whole, parts):
        assert first["id"] == second["id"] and np.abs(first["js"] - second["js"]).max() < TOLERANCE


def test_attention_after_zeros_is_attention_over_zero_padded_keys() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8), torch.randn(2, 2, 3, 8)
    padded = [nn.functional.pad(x, (0, 0, 5, 0)).repeat_interleave(2, 1) for x in (k, v)]
    mask = torch.ones(3, 8, dtype=torch.bool).tril(5)
    expected = nn.functional.scaled_dot_product_attention(q, *padded, attn_mask=mask).transpose(1, 2)
    assert float((attend_after_zeros(q, k, v, 5, scaling=None, softcap=None) - expected).abs().max()) < 1e-6


def test_the_model_is_left_as_it_was() -> None:
    runner = LayerRunner(make_model("qwen3"))
    ids = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    before, attention = runner.model(input_ids=ids).logits, runner.model.config._attn_implementation
    ProbeMeter(runner, TraceConfig()).measure(make_probes([(9, 5), (9, 6)]))
    assert torch.equal(before, runner.model(input_ids=ids).logits)
    assert runner.model.config._attn_implementation == attention
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in runner.model.modules())


class DoubledHead(nn.Module):
    """A head whose input the family changes outside of the norm."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.weight = head.weight
        self.scale = 1.0

    def forward(self, hidden):
        self.scale += 0.5
        return hidden @ self.weight.T * self.scale


def test_a_model_whose_lens_does_not_give_its_logits_is_refused_by_name() -> None:
    model = make_model("llama")
    model.lm_head = DoubledHead(model.lm_head)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM: what follows model\.layers does not reproduce its logits"):
        ProbeMeter(LayerRunner(model), TraceConfig()).measure(make_probes([(9, 5)]))


def test_nan_weights_are_named() -> None:
    model = make_model("llama")
    model.model.layers[2].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"parameter model\.layers\.2\.mlp\.up_proj\.weight holds NaN"):
        LayerRunner(model)


def test_one_layer_cannot_be_traced() -> None:
    from tiny_families import make_config
    from transformers import AutoModelForCausalLM

    config = make_config("llama")
    config.num_hidden_layers = 1
    with pytest.raises(ModelError, match="LlamaForCausalLM: has 1 layer; tracing needs at least 2"):
        LayerRunner(AutoModelForCausalLM.from_config(config))


def test_the_log_probability_of_an_unlikely_label_keeps_its_digits() -> None:
    logits = torch.tensor([[30.0, 0.0, -30.0]])
    found = measures.compute_log_prob(logits, torch.tensor([2]))
    assert float(found) == pytest.approx(-60 - np.log1p(np.exp(-30) + np.exp(-60)), abs=1e-12)


def test_only_runs_from_the_first_position_on_count_as_masked_up_to_the_query() -> None:
    rows = [[1, 1, 0], [1, 0, 0]], [[0, 1, 0]], [[1, 0, 1]]
    assert [masking.is_masked_up_to_query(torch.tensor(row, dtype=torch.bool)) for row in rows] == [True, False, False]
