"""How the plan is trained. Defaults are the paper's values."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from layerplan.config.base import BRANCH, StrictModel
from layerplan.config.labels import NodeLabels


class OptimizerConfig(StrictModel):
    """AdamW, or the memory-lean Adafactor, over fp32 master weights."""

    type: Literal["adamw", "adafactor"] = "adamw"
    """`adafactor` keeps one row and one column of second moments per matrix; `betas` and `eps` belong to `adamw`."""
    learning_rate: float = Field(default=3e-5, gt=0, le=1)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the two moments."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator of the update."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay on matrices; norms, biases and the vectors of a state-space model have none."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradient clipping threshold (global L2 norm)."""


class ScheduleConfig(StrictModel):
    """Learning-rate schedule over optimizer steps."""

    type: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape after the warm-up; `wsd` holds, then decays over the last `decay_ratio`."""
    warmup_ratio: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps spent on the linear warm-up."""
    min_ratio: float = Field(default=0.0, ge=0, le=1)
    """Final learning rate as a share of the peak; the last step has it, so that at 0 that step moves nothing."""
    decay_ratio: float = Field(default=0.1, gt=0, le=1)
    """Share of the steps in the final decay of `wsd`."""


class StabilityConfig(StrictModel):
    """What happens when a step goes wrong; every event is logged and counted."""

    on_nonfinite: Literal["skip", "rollback", "stop"] = "skip"
    """Non-finite loss or gradient: leave the weights as they are and go on, return to the last checkpoint, or stop."""
    max_nonfinite: int = Field(default=5, ge=0)
    """Stop after so many steps that were left out as not finite."""
    on_spike: Literal["off", "log", "skip", "rollback", "stop"] = "log"
    """Loss far above its recent mean: only note it, leave out the update, return to the last checkpoint, or stop. After
    `spike_window` such steps in a row it is taken for the loss's level."""
    spike_sigmas: float = Field(default=6.0, gt=0)
    """A spike is a loss this many recent standard deviations above the recent mean."""
    spike_window: int = Field(default=50, ge=5)
    """Steps the recent mean and deviation look back; none is called a spike before it is full."""
    max_rollbacks: int = Field(default=3, ge=0)
    """Stop after so many returns to a checkpoint; each leaves out the batches up to the bad one."""


class WorkerRange(StrictModel):
    """As many workers as there is room for, between two numbers; the batch and the order of its tokens stay the same."""

    min: int = Field(ge=1)
    """Fewest workers to train with; with room for fewer the run waits."""
    max: int = Field(ge=1)
    """Most workers."""
    resize_every: float = Field(default=60, ge=0)
    """Seconds between looks for room for more; a change goes on from the newest checkpoint."""

    @model_validator(mode="after")
    def _is_ordered(self) -> WorkerRange:
        if self.min > self.max:
            raise ValueError(f"min={self.min} must not be above max={self.max}")
        return self


def _name_workers(value: Any) -> str:
    return BRANCH + ("range" if isinstance(value, dict | WorkerRange) else "number")


Workers = Annotated[
    Annotated[int, Field(ge=1), Tag(f"{BRANCH}number")] | Annotated[WorkerRange, Tag(f"{BRANCH}range")],
    Discriminator(_name_workers),
]


def _name_choice(value: Any) -> str:
    return BRANCH + ("auto" if value == "auto" else "given")


_Auto = Annotated[Literal["auto"], Tag(f"{BRANCH}auto")]
MicroBatch = Annotated[Annotated[int, Field(ge=1), Tag(f"{BRANCH}given")] | _Auto, Discriminator(_name_choice)]
Compile = Annotated[Annotated[bool, Tag(f"{BRANCH}given")] | _Auto, Discriminator(_name_choice)]


class TrainConfig(StrictModel):
    """The training run."""

    max_steps: int = Field(default=1000, ge=1)
    """Optimizer steps."""
    global_batch_size: int = Field(default=64, ge=1)
    """Sequences per optimizer step over all workers: the number of lanes."""
    micro_batch_size: MicroBatch = 1
    """Sequences per worker per forward pass. `auto` takes the largest that is predicted to fit without more recomputation or
    sharding than one sequence needs, up to 32,768 tokens on a GPU and 2,048 on a CPU; it tries a step of it, halves it where
    memory runs out, and keeps what fitted in the run's folder. The batch and the order of tokens are the same with any, sums are
    rounded in another order."""
    num_workers: Workers = 1
    """Training workers (data-parallel ranks). A range, `{min: 2, max: 8}`, takes as many as the cluster has room for: nodes may
    leave and join while the run goes on. The batch stays `global_batch_size`, dealt unevenly where it does not divide."""
    num_cpus_per_worker: float = Field(default=0.5, ge=0)
    """CPU share each worker reserves on Ray."""
    use_gpu: bool = False
    """Give each worker one GPU."""
    labels: NodeLabels = {}
    """Nodes that workers may be on, by Ray's labels: `{ray.io/accelerator-type: H100}`, `{market: "!spot"}`,
    `{zone: "in(a,b)"}`. All must hold."""
    placement: Literal["auto", "pack", "strict_pack", "spread"] = "auto"
    """Where workers lie: `pack` on few nodes, `spread` on many, as far as there is room; `strict_pack` waits for one node that
    holds all, or each of `num_replicas` whole; `auto` is `pack`, with each replica on one node where the nodes could hold it."""
    compute_dtype: Literal["float32", "bfloat16", "auto"] = "bfloat16"
    """Dtype of the matrix products; masters of what trains are always float32. `auto` is bfloat16 on GPUs; on CPUs the run
    measures both at its start, takes bfloat16 where it is at least 1.2 times as fast, and keeps what it took."""
    parallelism: Literal["auto", "replicate", "shard"] = "auto"
    """Whole model on every worker, or FSDP2 shards; `auto` replicates when the model fits into a worker's memory."""
    num_replicas: int = Field(default=1, ge=1)
    """With `shard`: groups of workers that each hold a full set of shards (HSDP); 1 shards over all workers."""
    frozen_sharding: Literal["auto", "replicate", "shard"] = "auto"
    """Whether frozen layers are replicated on every worker or sharded; `auto` decides by memory."""
    activation_checkpointing: Literal["auto", "none", "full"] = "auto"
    """Recompute activations along the gradient path; `auto` only as much as memory asks for."""
    compile: Compile = "auto"
    """Compile each decoder layer, the loss and the optimizer pass with torch.compile. `auto` does on a GPU, and on a CPU in
    bfloat16 where the steps are predicted to save more than compiling takes; never in float32 on a CPU, whose sums it would
    round otherwise, nor where the lengths of rows vary."""
    cache_prefix: Literal["off", "auto", "on"] = "off"
    """Keep the output of the frozen layers below what trains on disk from the first epoch on, and read it in later ones, bit for
    bit the same weights. `auto` does where it is predicted to take less than half of the time it saves and half of the free
    disk holds it; `on` refuses by name what cannot be kept. Its size is in a dry run; it is removed after the last step."""
    attention: Literal["auto", "sdpa", "flex", "eager", "blocks", "varlen", "segmented"] = "auto"
    """Attention over packed documents. `varlen` (GPU, bfloat16), `flex` (GPU) and `segmented` (CPU) read each document alone, at
    a cost of the sum of their squared lengths, where the model hands down where documents start; it is asked. `auto` measures
    the candidates at start on a GPU and takes the fastest that serves the model; on a CPU it is `sdpa`, and for rows of up to
    1,024 under `compile` `eager`, or in bfloat16 `blocks`, which is `eager` without the products nobody sees. A model whose own
    attention does more than those kernels, as capping its scores, is given its own whatever this says; the self-test tells."""
    mamba_kernels: Literal["torch", "triton"] = "torch"
    """What scans the Mamba2 layers of a hybrid. `triton` takes mamba-ssm's kernels (GPU only, installed apart: docs/hybrids.md),
    which mix the documents of a packed row at once; `torch` mixes them one by one. `compile` compiles what is around both."""
    frozen_fp8: bool = False
    """Keep frozen layers' matrices in FP8 (torchao, GPU only)."""
    z_loss: float = Field(default=0.0, ge=0)
    """Weight of the squared log-partition added to the loss; 0 turns it off."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning-rate schedule."""
    stability: StabilityConfig = StabilityConfig()
    """Policies for steps that go wrong."""
    log_every_steps: int = Field(default=10, ge=1)
    """Steps between logged metrics."""
    checkpoint_every_steps: int = Field(default=500, ge=1)
    """Steps between checkpoints; the last step always has one."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest checkpoints kept."""
    validate_every_steps: int = Field(default=500, ge=1)
    """Steps between validation losses on the held-out rows."""
    max_failures: int = Field(default=3, ge=0)
    """Worker failures after which the run gives up."""
    stall_timeout: float | None = Field(default=None, ge=0)
    """Seconds without progress after which the slowest worker is ended and training starts again from the newest checkpoint,
    as after any failure; left out, five times the slowest recent step and at least 120; 0 turns the watchdog off. Holds in
    steps: loading, compiling, validating and saving take as long as they take, unless the process itself is stopped."""
    profile_step: int | None = Field(default=None, ge=1)
    """Step whose trace the profiler writes to `<run>/profile/`; none when left out."""
    peak_tflops: float | None = Field(default=None, gt=0)
    """Rate one worker's device reaches at best, the denominator of MFU; known or measured when left out."""
    usd_per_worker_hour: float | None = Field(default=None, ge=0)
    """Price of one worker, for the cost shown while training."""
    export_dtype: Literal["base", "float32"] = "base"
    """Dtype the export has for what trained: the one the base keeps each tensor in, rounded from the float32 masters, or
    float32 unrounded. Frozen tensors keep the base's dtype and bytes."""
    check_frozen: bool = True
    """Prove before every checkpoint, by checksums, that frozen tensors still have their bytes."""
    write_ledger: bool = False
    """Write a hash of the row ids of every step (`ledger.jsonl`)."""

    @property
    def fewest_workers(self) -> int:
        """Workers without which training does not begin."""
        return self.num_workers.min if isinstance(self.num_workers, WorkerRange) else self.num_workers

    @property
    def most_workers(self) -> int:
        """Workers that training takes where there is room."""
        return self.num_workers.max if isinstance(self.num_workers, WorkerRange) else self.num_workers

    @property
    def micro_rows(self) -> int:
        """Sequences per forward pass; one while `auto` is not settled, since it comes down to that where it has to."""
        return 1 if self.micro_batch_size == "auto" else self.micro_batch_size

    @property
    def compiles(self) -> bool:
        """Whether it was settled that layers are compiled."""
        return self.compile is True

    def assume_compile(self) -> TrainConfig:
        """The same with compiling as `auto` settles it where a run is long enough: everywhere but in float32 on CPUs."""
        if self.compile != "auto":
            return self
        return self.model_copy(update={"compile": self.use_gpu or self.compute_dtype != "float32"})

    def assume_dtype(self) -> TrainConfig:
        """The same with the dtype that can be told without measuring: bfloat16 on GPUs, float32, the larger, on CPUs."""
        if self.compute_dtype != "auto":
            return self
        return self.model_copy(update={"compute_dtype": "bfloat16" if self.use_gpu else "float32"})

    @field_validator("cache_prefix", mode="before")
    @classmethod
    def _read_yaml_words(cls, value: Any) -> Any:
        """YAML takes `on` and `off` for true and false."""
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _batch_divides(self) -> TrainConfig:
        if isinstance(self.num_workers, WorkerRange):
            return self._check_range(self.num_workers)
        per_step = self.num_workers * self.micro_rows
        if self.global_batch_size % per_step:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} must be a multiple of num_workers * micro_batch_size"
                f" = {self.num_workers} * {self.micro_rows} = {per_step}"
            )
        if self.num_workers % self.num_replicas:
            raise ValueError(f"num_replicas={self.num_replicas} must divide num_workers={self.num_workers}")
        if self.num_replicas > 1 and self.parallelism == "replicate":
            raise ValueError("num_replicas belongs to parallelism=shard; parallelism=replicate needs no groups")
        return self

    def _check_range(self, workers: WorkerRange) -> TrainConfig:
        if self.placement == "strict_pack":
            raise ValueError(
                "placement=strict_pack needs one num_workers: Ray counts the room for a range over all nodes"
            )
        if workers.max > self.global_batch_size:
            raise ValueError(
                f"num_workers.max={workers.max} must not be above global_batch_size={self.global_batch_size}:"
                " each worker needs a row of a step"
            )
        if self.num_replicas > 1:
            raise ValueError(f"num_replicas={self.num_replicas} needs one num_workers that it divides, not a range")
        return self

    @model_validator(mode="after")
    def _has_devices(self) -> TrainConfig:
        if self.mamba_kernels == "triton" and not self.use_gpu:
            raise ValueError("mamba_kernels=triton needs use_gpu=true: mamba-ssm's kernels run on GPUs only")
        if self.frozen_fp8 and not self.use_gpu:
            raise ValueError("frozen_fp8=true needs use_gpu=true: FP8 matrix products exist on GPUs only")
        return self
