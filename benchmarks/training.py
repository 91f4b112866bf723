"""Training speed: ours against transformers.Trainer and a plain Accelerate loop, same model, data, plan and machine.

    OMP_NUM_THREADS=1 python benchmarks/training.py --plans full freeze_deep freeze_shallow --vocab-size 32000
    OMP_NUM_THREADS=1 python benchmarks/training.py --model FOLDER --dtype float32
    python benchmarks/training.py --shape qwen3-0.6b --device cuda --batch 8 --seq-len 4096 --split-ratios 1/3 1/2 2/3

The model has a shape and random weights and trains on tokens drawn like words; a pre-trained one in a folder trains on
the texts of Python's language reference. On a CPU steps of the peers are interleaved (A B C A B C ...), each in a thread of
its own that runs only when it is its turn, and a step costs the process's CPU time, which a busy machine distorts less
than the wall clock. On a GPU, whose memory does not hold all peers, each runs its steps in one go, as users see it, and a
step lasts from one event in the stream to the next. Ratios are medians over the steps after warm-up, with quartiles. It
needs torch, transformers, pydantic and numpy; Trainer and Accelerate are left out, and said to be, when `accelerate` is
missing.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe_torch
from torch import nn

from layerplan.config.plan import FreezeDeepPlanConfig, FreezeShallowPlanConfig, FullPlanConfig
from layerplan.config.train import OptimizerConfig, ScheduleConfig, TrainConfig
from layerplan.corpus.rows import PackedRows
from layerplan.models.causal_lm import load_causal_lm, load_tokenizer
from layerplan.models.freezing import apply_plan
from layerplan.plan.cost import predict_cost
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.layer_profile import ModelIdentity
from layerplan.plan.loss_recipe import LossRecipe
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.placement import Placement
from layerplan.plan.policies import make_plan
from layerplan.train.attention import IMPLEMENTATIONS, choose_attention
from layerplan.train.loop import run_loop
from layerplan.train.loop_setup import LoopHooks, LoopSetup
from layerplan.train.optim import build_optimizer
from layerplan.train.place import LOGGING
from layerplan.train.sharding import place_model
from layerplan.train.state import TrainState
from layerplan.train.throughput import find_peak_flops, measure_matmul_flops, peak_memory_gib

SHAPES = {
    "small": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 8}
    | {"num_key_value_heads": 4, "head_dim": 64, "tie_word_embeddings": True},
    "qwen3-0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}
    | {"num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True, "vocab_size": 151936},
}
LEARNING_RATE = 3e-4
BETAS = (0.9, 0.999)


@dataclass
class Turn:
    """Lets one peer take one step at a time and notes what each cost."""

    device: torch.device
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    failure: BaseException | None = None
    finished: bool = False
    _go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    _done: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    _ready: threading.Event = field(default_factory=threading.Event)
    _started: float = 0.0
    takes_turns = True

    def wait(self) -> None:
        """Called by the peer before a step."""
        self._ready.set()
        self._go.acquire()
        self._started = self.now()

    def end(self) -> None:
        """Called by the peer after a step."""
        self.seconds.append(self.now() - self._started)
        self._done.release()

    def take(self) -> None:
        """Called by the benchmark: lets the peer run one step."""
        if not self.finished:
            self._go.release()
            self._done.acquire()
        if self.failure is not None:
            raise self.failure

    def start(self, peer: Callable[[Turn], None]) -> None:
        """Starts the peer's thread and waits until it is ready for its first step; libraries share global state."""

        def run() -> None:
            try:
                peer(self)
            except BaseException as error:
                self.failure = error
            self.finished = True
            self._ready.set()
            self._done.release()

        threading.Thread(target=run, daemon=True).start()
        self._ready.wait()

    def now(self) -> float:
        return time.process_time()


@dataclass
class Watch:
    """On a GPU a peer runs its steps in one go; events in the stream say when each of them ended."""

    losses: list[float] = field(default_factory=list)
    events: list[Any] = field(default_factory=list)
    takes_turns = False

    def wait(self) -> None:
        """The peer goes on."""

    def end(self) -> None:
        """Called by the peer when a step has been launched; waits for nothing."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.events.append(event)

    @property
    def seconds(self) -> list[float]:
        """Between the ends of steps."""
        torch.cuda.synchronize()
        return [first.elapsed_time(second) / 1e3 for first, second in zip(self.events, self.events[1:])]


@dataclass(frozen=True)
class Case:
    """One comparison: a model, a plan, and the token rows every peer trains on."""

    base: nn.Module
    plan: FreezePlan
    shape: ModelShape
    rows: np.ndarray
    batch: int
    steps: int
    device: torch.device
    dtype: str
    peak: float
    """FLOP/s, one number for all cases of a run."""

    @property
    def seq_len(self) -> int:
        return int(self.rows.shape[-1])

    def fresh_model(self) -> nn.Module:
        import copy

        model = copy.deepcopy(self.base)
        apply_plan(model, self.plan)
        return model.train()


def run_ours(case: Case, turn: Turn | Watch) -> nn.Module:
    """Our loop, with compiled layers, one worker."""
    config = TrainConfig(
        max_steps=case.steps,
        global_batch_size=case.batch,
        micro_batch_size=case.batch,
        compute_dtype=case.dtype,
        compile=True,
        log_every_steps=10**6,
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, betas=BETAS, weight_decay=0.0),
        schedule=ScheduleConfig(type="constant", warmup_ratio=0.0),
    )
    model = case.fresh_model()
    applied = apply_plan(model, case.plan)
    attention = choose_attention(config, case.shape, case.seq_len, case.device, LossRecipe())
    model.set_attn_implementation(IMPLEMENTATIONS[attention])
    placement = Placement("replicate", "replicate", attention)
    placed = place_model(model, case.plan, config, placement, world_size=1, device=case.device)
    optimizer = build_optimizer(placed.model, config.optimizer, masters=placed.masters, compiled=True)
    placed.masters.clear()
    setup = LoopSetup(placed, optimizer, applied, config, case.device, 0, 1)
    position_ids = np.tile(np.arange(case.seq_len, dtype=np.int32), (case.batch, 1))
    document_ids = np.zeros_like(position_ids)

    def iter_steps(start: int, stop: int) -> Iterator[PackedRows]:
        for step in range(start, stop):
            ids = np.arange(step * case.batch, (step + 1) * case.batch)
            yield PackedRows(ids, case.rows[step].astype(np.int32), document_ids, position_ids)

    def mark(part: str, step: int) -> None:
        if part == LOGGING:  # its update has been launched
            turn.end()

    hooks = LoopHooks(iter_steps, lambda state: None, lambda: False, None, None, mark=mark, say=lambda line: None)
    state = TrainState()
    for stop in range(1, case.steps + 1) if turn.takes_turns else [case.steps]:
        turn.wait()
        state = run_loop(setup, state, hooks, stop_step=stop)
        turn.losses.append(float(state.last_loss or 0.0))
    return model


def run_trainer(case: Case, turn: Turn | Watch, **flags: Any) -> nn.Module:
    """transformers.Trainer as people call it: bf16=True (or not), everything else as it comes, and flags beside."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Steps(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            turn.wait()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            turn.end()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                turn.losses.append(float(logs["loss"]))

    flat = torch.from_numpy(case.rows.reshape(-1, case.seq_len).astype(np.int64))
    arguments = TrainingArguments(
        output_dir="/tmp/layerplan-benchmark",
        per_device_train_batch_size=case.batch,
        max_steps=case.steps,
        learning_rate=LEARNING_RATE,
        adam_beta2=BETAS[1],
        lr_scheduler_type="constant",
        bf16=case.dtype == "bfloat16",
        use_cpu=case.device.type == "cpu",
        logging_steps=1 if turn.takes_turns else 10**6,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=case.device.type == "cuda",
        **flags,
    )

    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return torch.utils.data.SequentialSampler(flat)

    dataset = [{"input_ids": row, "labels": row} for row in flat]
    model = case.fresh_model().to(case.device)
    InOrder(model, arguments, train_dataset=dataset, callbacks=[Steps()]).train()
    return model


def run_accelerate(case: Case, turn: Turn | Watch) -> nn.Module:
    """A plain Accelerate loop with autocast and fused AdamW."""
    from accelerate import Accelerator

    precision = "bf16" if case.dtype == "bfloat16" else "no"
    accelerator = Accelerator(mixed_precision=precision, cpu=case.device.type == "cpu")
    model = case.fresh_model()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=BETAS, weight_decay=0.0, fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    for step in range(case.steps):
        turn.wait()
        ids = torch.from_numpy(case.rows[step].astype(np.int64)).to(accelerator.device)
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if turn.takes_turns:
            turn.losses.append(float(loss.detach()))
        turn.end()
    return accelerator.unwrap_model(model)


PEERS: dict[str, Callable[[Case, Any], nn.Module]] = {
    "ours": run_ours,
    "trainer": run_trainer,
    "trainer_liger": partial(run_trainer, use_liger_kernel=True),
    "trainer_compile": partial(run_trainer, torch_compile=True),
    "trainer_recompute": partial(run_trainer, gradient_checkpointing=True),
    "accelerate": run_accelerate,
}
"""`trainer_...` are the flags people turn on for speed or memory; a peer that lacks what it needs is left out, and said to be."""


def compare_on_gpu(case: Case, peers: list[str], warmup: int) -> dict[str, Any]:
    """Runs peers one after another, from the same weights over the same rows; what they end with gives the same loss."""
    results: dict[str, Any] = {}
    flops = predict_cost(case.plan, case.shape, seq_len=case.seq_len).total_flops
    tokens = case.batch * case.seq_len
    for name in peers:
        gc.collect()
        torch._dynamo.reset()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        watch = Watch()
        try:
            model = PEERS[name](case, watch)
            seconds = watch.seconds[warmup:]
            peak_memory = peak_memory_gib(case.device)
            loss = measure_loss(model, case)
        except (torch.OutOfMemoryError, ImportError, RuntimeError, TypeError, AttributeError) as error:
            results[name] = {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
            print(f"  {name:<18}{results[name]['failed']}", flush=True)
            continue
        finally:
            model = None
        median = statistics.median(seconds)
        results[name] = {
            "step_s": median,
            "quartiles_s": statistics.quantiles(seconds, n=4)[::2],
            "tokens_per_s": tokens / median,
            "mfu": tokens / median * flops / case.peak,
            "peak_memory_gib": peak_memory,
            "loss_after": loss,
        }
        if name != peers[0] and "step_s" in results.get(peers[0], {}):
            results[name]["ours_is_faster_by"] = median / results[peers[0]]["step_s"]
            results[name]["loss_difference"] = loss - results[peers[0]]["loss_after"]
        print(f"  {name:<18}" + "  ".join(_shown(key, value) for key, value in results[name].items()), flush=True)
    return results


@torch.no_grad()
def measure_loss(model: nn.Module, case: Case) -> float:
    """Of the last step's rows, by what a peer ended with, in bfloat16 and by the model's own code."""
    model.eval()
    model.set_attn_implementation("sdpa")
    total = 0.0
    for row in case.rows[-1]:
        ids = torch.from_numpy(row.astype(np.int64)).to(case.device)[None]
        with torch.autocast(case.device.type, torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        total += float(nn.functional.cross_entropy(logits.float(), ids[0, 1:]))
    return total / len(case.rows[-1])


def compare(case: Case, peers: list[str], warmup: int) -> dict[str, Any]:
    """Interleaves the peers and returns medians, quartiles, ratios and the largest loss difference."""
    turns = {}
    for name in peers:
        turns[name] = Turn(case.device)
        turns[name].start(lambda turn, name=name: PEERS[name](case, turn))
    for step in range(case.steps):
        for turn in turns.values():
            turn.take()
        shown = "  ".join(f"{name} {turn.seconds[-1]:.2f} s" for name, turn in turns.items())
        print(f"    step {step + 1}/{case.steps}  {shown}", flush=True)
    for turn in turns.values():
        deadline = time.time() + 60
        while not turn.finished and time.time() < deadline:
            time.sleep(0.05)
    results: dict[str, Any] = {}
    flops = predict_cost(case.plan, case.shape, seq_len=case.seq_len).total_flops
    tokens = case.batch * case.seq_len
    for name, turn in turns.items():
        kept = turn.seconds[warmup:]
        median = statistics.median(kept)
        results[name] = {
            "step_s": median,
            "quartiles_s": statistics.quantiles(kept, n=4)[::2] if len(kept) > 1 else kept,
            "tokens_per_s": tokens / median,
            "mfu": tokens / median * flops / case.peak,
            "first_step_s": turn.seconds[0],
            "losses": turn.losses,
        }
    for name in peers[1:]:
        ratios = [theirs / ours for ours, theirs in zip(turns[peers[0]].seconds, turns[name].seconds)][warmup:]
        results[name]["ours_is_faster_by"] = statistics.median(ratios)
        results[name]["ratio_quartiles"] = statistics.quantiles(ratios, n=4)[::2] if len(ratios) > 1 else ratios
        pairs = list(zip(turns[peers[0]].losses, turns[name].losses))
        results[name]["largest_loss_difference"] = max((abs(a - b) for a, b in pairs), default=float("nan"))
    results["peak_memory_gib"] = peak_memory_gib(case.device)
    return results


def build_case(args: argparse.Namespace, plan_type: str, split_ratio: Fraction, peak: float) -> Case:
    base = load_causal_lm(str(args.model), dtype=torch.float32) if args.model else build_random_model(args)
    shape = ModelShape.from_hf_config(base.config.to_dict())
    identity = ModelIdentity(
        name=args.model.name if args.model else args.shape,
        model_type=base.config.model_type,
        num_layers=shape.num_layers,
    )
    ratio = float(split_ratio)
    plan_config = {
        "full": FullPlanConfig(),
        "freeze_deep": FreezeDeepPlanConfig(split_ratio=ratio),
        "freeze_shallow": FreezeShallowPlanConfig(split_ratio=ratio),
    }[plan_type]
    plan = make_plan(plan_config, model=identity, shape=shape, profile=None)
    size = (args.steps, args.batch, args.seq_len)
    rows = read_rows(args.model, size) if args.model else draw_rows(shape.vocab_size, size)
    return Case(base, plan, shape, rows, args.batch, args.steps, torch.device(args.device), args.dtype, peak)


def build_random_model(args: argparse.Namespace) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    values = {"vocab_size": args.vocab_size, "max_position_embeddings": max(1024, args.seq_len)} | SHAPES[args.shape]
    with torch.device(args.device):
        return Qwen3ForCausalLM(Qwen3Config(**values)).float()


def draw_rows(vocab_size: int, size: tuple[int, int, int]) -> np.ndarray:
    """Token ids in a Zipf-like draw, so that the loss falls as it does on text."""
    weights = 1 / np.arange(1, vocab_size + 1)
    return np.random.default_rng(0).choice(vocab_size, size=size, p=weights / weights.sum())


def read_rows(model: Path, size: tuple[int, int, int]) -> np.ndarray:
    """Token ids of Python's language reference, one topic after another."""
    from pydoc_data.topics import topics

    ids = load_tokenizer(str(model))("\n\n".join(topics[name] for name in sorted(topics)))["input_ids"]
    return np.array(ids[: int(np.prod(size))]).reshape(size)


def find_peak(device: torch.device, dtype: str) -> float:
    """Peak FLOP/s: of the data sheet on a known GPU, else the best measured in two seconds by the same clock as the steps."""
    if device.type == "cuda":
        return find_peak_flops(TrainConfig(), device)
    return max(measure_matmul_flops(device, getattr(torch, dtype), clock=time.process_time) for _ in range(10))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small")
    parser.add_argument("--model", type=Path, help="folder of a pre-trained model, for the shape with random weights")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--plans", nargs="+", default=["full", "freeze_deep", "freeze_shallow"])
    parser.add_argument("--split-ratios", nargs="+", type=Fraction, default=[Fraction(1, 2)])
    parser.add_argument("--peers", nargs="+", choices=sorted(PEERS), default=["ours", "trainer", "accelerate"])
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--json", type=Path, help="append the results to this file")
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    try:
        import accelerate  # noqa: F401
    except ImportError:
        print("accelerate is not installed: Trainer and Accelerate are left out", flush=True)
        args.peers = [peer for peer in args.peers if peer == "ours"]
    peak = find_peak(torch.device(args.device), args.dtype)
    machine = {**describe_torch(args.device), "dtype": args.dtype, "matmul_tflops": peak / 1e12}
    report: dict[str, Any] = {"machine": machine, "cases": {}}
    print(json.dumps(report["machine"], indent=2), flush=True)
    for plan_type in args.plans:
        for ratio in args.split_ratios if plan_type != "full" else args.split_ratios[:1]:
            case = build_case(args, plan_type, ratio, peak)
            name = f"{plan_type} {ratio} vocab {case.shape.vocab_size} seq {args.seq_len} batch {args.batch}"
            print(f"== {name}", flush=True)
            torch._dynamo.reset()
            result = (compare_on_gpu if args.device == "cuda" else compare)(case, args.peers, args.warmup)
            report["cases"][name] = result
            for peer, values in result.items():
                if isinstance(values, dict) and args.device == "cpu":
                    print(f"  {peer:<11}" + "  ".join(_shown(key, value) for key, value in values.items()), flush=True)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        with args.json.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(report) + "\n")


def _shown(key: str, value: Any) -> str:
    if key == "losses":
        return f"last loss {value[-1]:.4f}" if value else ""
    if isinstance(value, list):
        return f"{key} " + "..".join(f"{part:.3f}" for part in value)
    return f"{key} {value:.3f}"


if __name__ == "__main__":
    main()
