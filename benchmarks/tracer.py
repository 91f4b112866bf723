"""Tracing speed: ours against one naive forward pass per layer, same model, probes, mask and machine, in one run.

    OMP_NUM_THREADS=1 python benchmarks/tracer.py
    OMP_NUM_THREADS=1 python benchmarks/tracer.py --model FOLDER
    python benchmarks/tracer.py --device cuda --rounds 5 --all-probes
    python benchmarks/tracer.py --device cuda --shape qwen3-8b --rounds 1 --naive-layers 2 --some-batches 8

The model has a shape of Qwen3, 0.6B unless told otherwise, and random weights, float32, or is a pre-trained one in a
folder. Probes are the project's own, cut by the model's tokenizer, or by a byte-level BPE trained on them, so that their
lengths are those of a tokenizer that knows the words. The peers, interleaved (ours, naive 1, naive 8, ours, ...), give
P(l) and JS(l) of every layer:

    ours      one batch of equal length through `trace_masked`, the way its self-test chose
    naive 1   the oracle of the tests, one full forward pass per layer and probe
    naive 8   the same on batches of 8 probes of equal length, so without padding

The cost of a peer is CPU time of the process per probe on a CPU (a busy machine distorts it less than the wall clock),
and wall time between synchronisations on a GPU. `--naive-layers` masks fewer layers naively and scales up. Equality of
the results is checked (of JS absolutely, of log P relative to it where it is above 1: of a trained model it is a
difference of logits of some tens). Peak memory is that of the process (or the GPU) after ours has run and
before the peers have. `flops_ratio` counts the matrix products of both, a ratio that holds on any machine; what is won
beyond it comes from larger matrix products.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import describe_torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "oracles"))

import naive_tracer

from layerplan.config.trace import TraceConfig
from layerplan.models.causal_lm import load_causal_lm, load_tokenizer
from layerplan.tracer.encode import EncodedProbe, encode_probes, make_batches
from layerplan.tracer.lexicon import load_builtin_lexicon
from layerplan.tracer.masking import Mask, trace_masked
from layerplan.tracer.meter import ProbeMeter
from layerplan.tracer.model_runner import LayerRunner
from layerplan.tracer.probes import Probe, make_probes
from layerplan.train.throughput import measure_matmul_flops

SHAPES = {
    "qwen3-0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}
    | {"num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True, "vocab_size": 151936},
    "qwen3-8b": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False, "vocab_size": 151936},
    "small": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": True, "vocab_size": 8192},
}
TOP_K = 10
TOLERANCE = 1e-5


def make_encoded_probes(model: Path | None) -> list[EncodedProbe]:
    probes = make_probes(load_builtin_lexicon(), per_group=50, style="mixed", seed=0)
    tokenizer = load_tokenizer(str(model)) if model else train_tokenizer(probes)
    return encode_probes(probes, tokenizer, mask_check_every=TraceConfig().mask_check_every)


def train_tokenizer(probes: list[Probe]) -> Any:
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=4000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([probe.prompt + probe.answer for probe in probes], trainer=trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def build_model(args: argparse.Namespace) -> torch.nn.Module:
    if args.model:
        return load_causal_lm(str(args.model), dtype=torch.float32)
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    with torch.device(args.device):
        return Qwen3ForCausalLM(Qwen3Config(**SHAPES[args.shape], max_position_embeddings=1024)).float()


def trace_ours(meter: ProbeMeter, ids: torch.Tensor, context: torch.Tensor, mask: Mask) -> tuple[Any, Any]:
    """(log P(l), JS(l)) of a batch, (L + 1, B) each."""
    states = meter.runner.run(ids)
    last = states[:, :, -1]
    intact = meter.runner.lens(last[-1])
    log_prob = meter.compute_log_prob(last, intact.argmax(-1))
    final = trace_masked(meter.runner, ids, states, context, mask, meter.find_way(mask, ids, context, states))
    return log_prob, meter.compute_js(final, intact, (TOP_K,))[0]


def trace_naively(
    runner: LayerRunner, ids: torch.Tensor, context: torch.Tensor, mask: Mask, layers: list[int]
) -> tuple[Any, Any]:
    model, blocks, parts = runner.model, runner.parts.layers, runner.parts
    intact, states = naive_tracer.run_intact(model, blocks, ids)
    target = intact.argmax(-1)
    lens = [torch.log_softmax(parts.lm_head(parts.final_norm(state)).double(), -1) for state in states]
    log_prob = torch.stack([values.gather(-1, target[:, None])[:, 0] for values in lens])
    rows = []
    for layer in layers:
        perturbed = naive_tracer.run_masked(model, blocks, ids, context, layer, mask)
        pairs = zip(intact.cpu().numpy(), perturbed.cpu().numpy())
        rows.append([naive_tracer.jensen_shannon(p, q, TOP_K) for p, q in pairs])
    return log_prob, torch.tensor(rows)


def time_call(device: torch.device, work: Callable[[], Any]) -> tuple[float, Any]:
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start, result


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def count_flops(work: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def count_both(meter: ProbeMeter, ids: torch.Tensor, context: torch.Tensor, mask: Mask) -> tuple[float, float]:
    """GFLOP per probe of ours and of the naive way; its layers cost the same each, so two of them tell."""
    runner = meter.runner
    ours = count_flops(lambda: trace_ours(meter, ids, context, mask)) / len(ids)
    one, two = (
        count_flops(lambda layers=layers: trace_naively(runner, ids[:1], context[:1], mask, layers))
        for layers in ([0], [0, 1])
    )
    return ours / 1e9, (one + (two - one) * (runner.num_layers - 1)) / 1e9


def compare(meter: ProbeMeter, batch: list[EncodedProbe], mask: Mask, args: argparse.Namespace) -> dict[str, Any]:
    """Times the peers in turn and returns seconds per probe, ratios and the largest difference."""
    runner, device = meter.runner, meter.runner.device
    ids = torch.tensor([probe.input_ids for probe in batch], device=device)
    context = torch.tensor([probe.is_context for probe in batch], device=device)
    way = meter.find_way(mask, ids, context, runner.run(ids))
    trace_ours(meter, ids, context, mask)
    peak = peak_bytes(device)
    ours_gflop, naive_gflop = count_both(meter, ids, context, mask)
    some = sorted({round(i * (runner.num_layers - 1) / (args.naive_layers - 1)) for i in range(args.naive_layers)})
    scale = (runner.num_layers + 1) / (len(some) + 1)
    seconds: dict[str, list[float]] = {"ours": [], "naive 1": [], "naive 8": []}
    difference = 0.0
    for number in range(args.rounds):
        taken, (log_prob, js) = time_call(device, lambda: trace_ours(meter, ids, context, mask))
        seconds["ours"].append(taken / len(batch))
        for name, size in (("naive 1", 1), ("naive 8", 8)):
            chosen = slice(number % (len(batch) - size + 1), number % (len(batch) - size + 1) + size)
            taken, (naive_log_prob, naive_js) = time_call(
                device, lambda chosen=chosen: trace_naively(runner, ids[chosen], context[chosen], mask, some)
            )
            seconds[name].append(taken * scale / size)
            difference = max(
                difference,
                float((naive_js - js[some][:, chosen].cpu()).abs().max()),
                float(((naive_log_prob - log_prob[:, chosen]).abs() / naive_log_prob.abs().clamp_min(1)).max()),
            )
        print(
            f"    round {number + 1}: " + ", ".join(f"{k} {v[-1]:.3f} s/probe" for k, v in seconds.items()), flush=True
        )
    result: dict[str, Any] = {
        "way": way,
        "probe_tokens": ids.shape[1],
        "query_tokens": int((~context).sum(-1).max()),
        "batch": len(batch),
        "largest_difference": difference,
        "ours_gflop_per_probe": ours_gflop,
        "naive_gflop_per_probe": naive_gflop,
        "flops_ratio": naive_gflop / ours_gflop,
        "peak_over_model": peak / model_bytes(runner.model),
        **{f"{name}_s_per_probe": statistics.median(values) for name, values in seconds.items()},
    }
    for name in ("naive 1", "naive 8"):
        ratios = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds[name])]
        result[f"ratio_over_{name}"] = statistics.median(ratios)
        result[f"ratios_over_{name}"] = [round(ratio, 2) for ratio in ratios]
    if difference > TOLERANCE:
        raise SystemExit(f"error: results differ by {difference:.2g}, more than {TOLERANCE:g}")
    return result


def measure_all(meter: ProbeMeter, encoded: list[EncodedProbe], limit: int | None) -> dict[str, Any]:
    """Time of every diagnostic on the whole probe set as a job measures it: masks, supports and SALF.

    Beside it, what the counted matrix products take at the rate of a large one, measured by the same clock before and
    after.
    """
    device = meter.runner.device
    batches = make_batches(encoded, 16)
    chosen = batches if limit is None else batches[:: max(1, len(batches) // limit)]
    flops = sum(count_flops(lambda batch=batch: meter.measure(batch)) for batch in chosen)
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    rates = [measure_matmul_flops(device, torch.float32, clock=clock)]
    meter.seconds.clear()
    start = time.perf_counter()
    taken, records = time_call(device, lambda: [r for batch in chosen for r in meter.measure(batch)])
    wall = time.perf_counter() - start
    rates.append(measure_matmul_flops(device, torch.float32, clock=clock))
    return {
        "gflop_per_probe": flops / len(records) / 1e9,
        "matmul_gflops": [rate / 1e9 for rate in rates],
        "over_arithmetic": [taken / (flops / rate) for rate in rates],
        "shares": {part: each / sum(meter.seconds.values()) for part, each in meter.seconds.items()},
        "probes": len(records),
        "batches": len(chosen),
        "clock_s_per_500": taken / len(records) * 500,
        "wall_s_per_500": wall / len(records) * 500,
    }


def model_bytes(model: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-0.6b")
    parser.add_argument("--model", type=Path, help="folder of a pre-trained model, for the shape with random weights")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--masks", nargs="+", choices=["zero", "mean"], default=["zero", "mean"])
    parser.add_argument("--batch", type=int, default=16, help="probes of one length in our batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="threads on a CPU")
    parser.add_argument(
        "--naive-layers", type=int, default=28, help="layers the naive peers mask; their time is scaled"
    )
    parser.add_argument("--all-probes", action="store_true", help="time every diagnostic on all 500 probes too")
    parser.add_argument("--some-batches", type=int, help="time every diagnostic on about this many batches of them")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    if args.device == "cpu":
        torch.set_num_threads(args.threads)
    encoded = make_encoded_probes(args.model)
    lengths = Counter(len(probe.input_ids) for probe in encoded)
    print(json.dumps(describe_torch(args.device), indent=2), flush=True)
    mean = sum(length * count for length, count in lengths.items()) / len(encoded)
    print(f"probes: {len(encoded)}, {mean:.1f} tokens on average, {min(lengths)} to {max(lengths)}", flush=True)
    runner = LayerRunner(build_model(args).to(args.device))
    args.naive_layers = min(args.naive_layers, runner.num_layers)
    meter = ProbeMeter(runner, TraceConfig())
    batch = max(make_batches(encoded, args.batch), key=lambda members: (len(members), -len(members[0].input_ids)))
    results: dict[str, Any] = {}
    for mask in args.masks:
        print(f"== mask {mask}", flush=True)
        results[mask] = compare(meter, batch, mask, args)
        print(json.dumps(results[mask], indent=2), flush=True)
    if args.all_probes or args.some_batches:
        print("== every diagnostic", flush=True)
        print(json.dumps(measure_all(meter, encoded, None if args.all_probes else args.some_batches), indent=2))


if __name__ == "__main__":
    main()
