"""Who trains in `training.py`, a step at a time or in one go: our loop, `transformers.Trainer`, a plain Accelerate loop."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import nn
from training_case import Case

from layerplan.config.train import OptimizerConfig, ScheduleConfig, TrainConfig
from layerplan.corpus.rows import PackedRows, make_rows
from layerplan.models.freezing import apply_plan
from layerplan.plan.loss_recipe import LossRecipe
from layerplan.plan.placement import Placement
from layerplan.train.allocator import use_memory_well
from layerplan.train.attention import IMPLEMENTATIONS, choose_attention
from layerplan.train.loop import run_loop
from layerplan.train.loop_setup import LoopHooks, LoopSetup
from layerplan.train.optim import build_optimizer
from layerplan.train.place import LOGGING
from layerplan.train.sharding import place_model
from layerplan.train.state import TrainState
from layerplan.train.throughput import peak_memory_gib

READY = "ready"
LEARNING_RATE = 3e-4
BETAS = (0.9, 0.999)


@dataclass
class Turn:
    """In a peer's own process: one step at a time, when the benchmark says so, and what each cost in CPU seconds."""

    connection: Connection
    losses: list[float] = field(default_factory=list)
    _started: float = 0.0
    takes_turns = True

    def wait(self) -> None:
        """Called by the peer before a step."""
        self.connection.send(READY)
        self.connection.recv()
        self._started = time.process_time()

    def end(self) -> None:
        """Called by the peer after a step."""
        self.connection.send(time.process_time() - self._started)


class Rival:
    """A peer in a process of its own, as people run it: nothing of the others is in its memory, allocator or compiler."""

    def __init__(self, name: str, make_case: Callable[[], Case]) -> None:
        context = multiprocessing.get_context("spawn")
        self.seconds: list[float] = []
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_compete, args=(name, make_case, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._receive()

    def take(self) -> None:
        """Lets the peer run one step."""
        self._connection.send(READY)
        self.seconds.append(self._receive())

    def expect_next(self) -> None:
        """Waits until the peer is ready for another step."""
        self._receive()

    def finish(self) -> tuple[list[float], float]:
        """The losses of its steps, and its process's peak memory in GiB."""
        losses, peak_memory = self._receive()
        self._process.join()
        return losses, peak_memory

    def _receive(self) -> Any:
        found = self._connection.recv()
        if isinstance(found, str) and found != READY:
            raise RuntimeError(found)
        return found


def _compete(name: str, make_case: Callable[[], Case], connection: Connection) -> None:
    torch.set_num_threads(1)
    turn = Turn(connection)
    try:
        case = make_case()
        PEERS[name](case, turn)
        connection.send((turn.losses, peak_memory_gib(case.device)))
    except BaseException:
        connection.send(f"{name}: {traceback.format_exc()}")


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
    if case.device.type == "cpu":
        use_memory_well(placed.model, is_sharded=False)
    setup = LoopSetup(placed, optimizer, applied, config, case.device, 0, 1)
    document_ids = case.document_ids
    starts = [np.flatnonzero(np.diff(row, prepend=-1)).astype(np.int32) for row in document_ids]
    used = np.full(case.batch, case.seq_len, dtype=np.int32)

    def iter_steps(start: int, stop: int) -> Iterator[PackedRows]:
        for step in range(start, stop):
            ids = np.arange(step * case.batch, (step + 1) * case.batch)
            yield make_rows(ids, case.rows[step].astype(np.int32), starts, used)

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
    trainer = InOrder(model, arguments, train_dataset=dataset, callbacks=[Steps()])
    for name in [name for name in os.environ if name.startswith("ACCELERATE_DYNAMO_")]:
        del os.environ[name]  # set by `torch_compile`; an Accelerate loop beside it would be compiled too
    trainer.train()
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


def run_torchtitan(case: Case, turn: Turn | Watch) -> nn.Module:
    """As torchtitan's trainer runs its Qwen3 on one device: autocast, compiled blocks and loss, fused AdamW, no recomputation."""
    from torchtitan.components.loss import cross_entropy_loss
    from torchtitan.models.qwen3.model.args import Qwen3ModelArgs
    from torchtitan.models.qwen3.model.model import Qwen3Model
    from torchtitan.models.qwen3.model.state_dict_adapter import Qwen3StateDictAdapter

    model = case.fresh_model()
    config = model.config
    sizes = Qwen3ModelArgs(
        vocab_size=config.vocab_size,
        max_seq_len=case.seq_len,
        head_dim=config.head_dim,
        dim=config.hidden_size,
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        qk_norm=True,
        hidden_dim=config.intermediate_size,
        norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_parameters["rope_theta"],
        enable_weight_tying=True,
    )
    adapter = Qwen3StateDictAdapter(sizes, None)
    titan = Qwen3Model(sizes).to(case.device)
    titan.load_state_dict(adapter.from_hf({n: p.detach() for n, p in model.named_parameters()}), strict=False)
    titan.output.weight = titan.tok_embeddings.weight
    trains = adapter.from_hf({name: torch.tensor(p.requires_grad) for name, p in model.named_parameters()})
    for name, parameter in titan.named_parameters():
        parameter.requires_grad_(bool(trains[name]))
    for name, block in titan.layers.named_children():
        titan.layers.register_module(name, torch.compile(block, fullgraph=True))
    compute_loss = torch.compile(cross_entropy_loss)
    trained = [parameter for parameter in titan.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=BETAS, weight_decay=0.0, fused=True)
    for step in range(case.steps):
        turn.wait()
        ids = torch.from_numpy(case.rows[step].astype(np.int64)).to(case.device)
        labels = nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
        with torch.autocast(case.device.type, torch.bfloat16, enabled=case.dtype == "bfloat16"):
            loss = compute_loss(titan(ids), labels) / (case.batch * (case.seq_len - 1))
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        if turn.takes_turns:
            turn.losses.append(float(loss.detach()))
        turn.end()
    state = {name.replace("._orig_mod", ""): value for name, value in titan.state_dict().items()}
    model.load_state_dict(adapter.to_hf(state), strict=False)
    return model.to(case.device)


PEERS: dict[str, Callable[[Case, Any], nn.Module]] = {
    "ours": run_ours,
    "trainer": run_trainer,
    "trainer_liger": partial(run_trainer, use_liger_kernel=True),
    "trainer_compile": partial(run_trainer, torch_compile=True),
    "trainer_recompute": partial(run_trainer, gradient_checkpointing=True),
    "accelerate": run_accelerate,
    "torchtitan": run_torchtitan,
}
"""`trainer_...` are the flags people turn on for speed or memory; a peer that lacks what it needs is left out, and said to be."""
