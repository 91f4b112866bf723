"""How training workers find each other.

PyTorch's store listens on every interface of rank 0's machine and asks nobody for a token. On a cluster of one machine it is
given a socket that is bound to loopback instead.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import torch.distributed as dist
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend

from layerplan.ray_access import LOOPBACK, is_loopback_cluster

_served: list[dist.TCPStore] = []
"""Stores this process serves; one that is collected would hang up on the other workers."""


def choose_torch_config(backend: str) -> TorchConfig:
    """Ray Train's own rendezvous, or the one on loopback where every worker is on this machine."""
    return LoopbackTorchConfig(backend=backend) if is_loopback_cluster() else TorchConfig(backend=backend)


@dataclass
class LoopbackTorchConfig(TorchConfig):
    """A process group whose store can be reached from this machine only."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """What sets the group up."""
        return _LoopbackBackend


class _LoopbackBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        port = worker_group.execute_single(0, serve_store)
        worker_group.execute(_set_torch_distributed_env_vars)
        size, timeout = len(worker_group), timedelta(seconds=backend_config.timeout_s)
        joining = [
            worker_group.execute_single_async(rank, join_group, port, (rank, size), backend_config.backend, timeout)
            for rank in range(size)
        ]
        ray.get(joining)


def serve_store() -> int:
    """Serves a store on a free port of loopback for as long as this process lives; returns the port."""
    listener = socket.socket()
    listener.bind((LOOPBACK, 0))
    listener.listen()
    port = int(listener.getsockname()[1])
    _served[:] = [
        dist.TCPStore(LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    ]
    return port


def join_group(port: int, place: tuple[int, int], backend: str, timeout: timedelta) -> None:
    """Makes this process a member of the default process group; `place` is its rank and the number of members."""
    rank, world_size = place
    store = dist.TCPStore(LOOPBACK, port, world_size=world_size, is_master=False, timeout=timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
