"""Two gloo workers that read their own rows of a base hold the bits they held when each read the whole of it.

The test starts this file twice as a program; each copy is one worker. What it compares with is the model that transformers
loads, placed whole.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.ray_script import run_two_workers

PLACEMENTS = (("replicate", "replicate", 1), ("shard", "replicate", 1), ("shard", "shard", 1), ("shard", "shard", 2))
"""Parallelism, frozen layers, and groups that each hold all shards (HSDP)."""
FAMILIES = (
    "qwen3",
    "gemma2",
    "llama4_text",
    "lfm2",
    "bloom",
    "qwen3_moe",
    "stacked",
    "hybrid",
    "own_code",
    "gguf",
)


def test_each_of_two_workers_holds_the_bits_of_the_model_loaded_whole(tmp_path: Path) -> None:
    """Ten models, a quarter of their parameters bfloat16 or float16 in the file, four placements, two compute dtypes."""
    save_models(tmp_path)
    outputs = run_two_workers(__file__, str(tmp_path))
    assert outputs[0].count("case ok") == len(FAMILIES) * len(PLACEMENTS) * 2


def save_models(folder: Path) -> None:
    import torch

    from tests.families import make_model
    from tests.hybrids import build_hybrid
    from tests.model_folders import edit_weights, save_base_with_code, save_tiny_base
    from tests.small_families import OTHERS, WINDOWED, build_family

    for name in FAMILIES:
        if name == "hybrid":
            build_hybrid().save_pretrained(folder / name)
        elif name == "own_code":
            save_base_with_code(folder / name)
        elif name == "gguf":
            save_gguf(folder)
        elif name == "stacked":  # odd sizes, several files, and both names of a tied matrix
            save_tiny_base(folder / name, vocab_size=97, tie_word_embeddings=True)
            edit_weights(folder / name, lambda tensors: tensors.update(
                {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
            ))  # fmt: skip
        else:
            model = build_family(name) if name in WINDOWED | OTHERS else make_model(name)
            model.save_pretrained(folder / name, max_shard_size="40KB")
        if name not in ("gguf", "qwen3", "stacked"):
            low = {0: torch.bfloat16, 1: torch.float16}
            for path in (folder / name).glob("*.safetensors"):
                narrow(path, low)


def narrow(path: Path, dtypes):  # type: ignore[no-untyped-def]
    """Stores every tensor whose number has a dtype in that dtype, as bases of mixed dtypes are."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    kept = {name: value.to(dtypes.get(at % 8, value.dtype)) for at, (name, value) in enumerate(tensors.items())}
    save_file(kept, path, metadata={"format": "pt"})


def save_gguf(folder: Path) -> None:
    from layerplan.models.gguf import convert_gguf
    from tests.tiny_gguf import make_original, write_gguf

    write_gguf(folder / "tiny.gguf", make_original("llama"), "llama")
    convert_gguf(folder / "tiny.gguf", folder / "gguf")


def place(folder: Path, placement, dtype: str, device, world_size: int, *, is_whole: bool):  # type: ignore[no-untyped-def]
    """A model under a plan that trains its last layers, loaded whole or by rows."""
    from layerplan.config.plan import FreezeShallowPlanConfig
    from layerplan.config.train import TrainConfig
    from layerplan.models.freezing import apply_plan
    from layerplan.models.ref import ModelRef
    from layerplan.plan.placement import Placement
    from layerplan.plan.policies import make_plan
    from layerplan.train.materialize import ParameterSource
    from layerplan.train.sharding import place_model

    parallelism, frozen, num_replicas = placement
    ref = ModelRef(str(folder), trust_remote_code=folder.name == "own_code")
    source = None
    if is_whole:
        model = ref.load()
    else:
        skeleton = ref.skeleton()
        model, source = skeleton.model, ParameterSource(skeleton.reader)
        assert all(parameter.is_meta for parameter in model.parameters())
    chosen = FreezeShallowPlanConfig(boundary=1)
    plan = make_plan(chosen, model=ref.identity(), shape=ref.shape())
    config = TrainConfig(max_steps=1, num_workers=world_size, num_replicas=num_replicas, compute_dtype=dtype)
    applied = apply_plan(model, plan)
    options = {"world_size": world_size, "device": device, "source": source}
    return place_model(model, plan, config, Placement(parallelism, frozen), **options), applied


def check(folder: Path, placement, dtype: str, device, world_size: int) -> None:  # type: ignore[no-untyped-def]
    import torch

    from layerplan.train.step import TensorBatch

    (wanted, applied), (found, found_applied) = (
        place(folder, placement, dtype, device, world_size, is_whole=whole) for whole in (True, False)
    )
    assert applied == found_applied
    for kind in ("named_parameters", "named_buffers"):
        left, right = dict(getattr(wanted.model, kind)()), dict(getattr(found.model, kind)())
        assert list(left) == list(right), kind
        for name, value in left.items():
            other = right[name]
            assert (value.requires_grad, value.dtype, value.shape) == (other.requires_grad, other.dtype, other.shape)
            assert type(value) is type(other), name
            local, read = (each.to_local() if hasattr(each, "to_local") else each for each in (value, other))
            assert torch.equal(local.reshape(-1).view(torch.uint8), read.reshape(-1).view(torch.uint8)), name
            master, copy = wanted.masters.get(id(value)), found.masters.get(id(other))
            assert (master is None) == (copy is None)
            assert master is None or (copy is not None and torch.equal(master, copy)), name
    ids = torch.arange(24).reshape(2, 12) % 64
    with torch.no_grad():
        losses = [each.model.eval()(TensorBatch(ids, None, ids, ids.numel())) for each in (wanted, found)]
    assert torch.equal(*losses)
    for each in (wanted, found):
        each.release()


def main() -> None:
    import os

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name in FAMILIES:
        for placement in PLACEMENTS:
            for dtype in ("float32", "bfloat16"):
                check(Path(sys.argv[1]) / name, placement, dtype, torch.device("cpu"), int(os.environ["WORLD_SIZE"]))
                print("case ok", name, placement, dtype, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
