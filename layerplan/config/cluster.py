"""Which Ray cluster is used."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from layerplan.config.base import StrictModel


class ClusterConfig(StrictModel):
    """Ray connection. Under `ray job submit` the cluster is already known and nothing here is needed."""

    address: str | None = None
    """`ray://` or `host:port` of a running cluster; left out, `RAY_ADDRESS` is used, else a local cluster starts."""
    num_cpus: int | None = Field(default=None, ge=1)
    """CPUs of the local cluster; left out, every core."""
    priority: int = Field(default=0, ge=-1000, le=1000)
    """Place of the run among those that wait for this cluster: higher ones first, then those that came first. Nothing that
    runs is stopped for it."""
    queue: bool = True
    """Wait in line until all that the run holds at once is there. `false` asks Ray at once, which a cluster needs whose
    autoscaler adds nodes for what is asked for."""
    auth_mode: Literal["token", "disabled"] = "token"
    """Whether clients need Ray's token, on a local cluster too; what `RAY_AUTH_MODE` says in the environment wins."""
