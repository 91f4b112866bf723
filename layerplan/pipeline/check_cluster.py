"""The check of a cluster as a command: connect, measure, print, save, and fail with the number of what did not pass."""

from __future__ import annotations

from pathlib import Path

from layerplan.cluster_check.check import check_cluster
from layerplan.cluster_check.findings import render_table
from layerplan.config.cluster import ClusterConfig
from layerplan.errors import ClusterError, ConfigError
from layerplan.ray_session import connect
from layerplan.storage.address import is_address


def check_and_print(address: str | None, storage: str | None, min_nodes: int, out: Path | None) -> None:
    """Checks the nodes of a cluster.

    Args:
        address: Of the cluster; None takes `RAY_ADDRESS`, else this machine alone.
        storage: Where runs will be stored; None does not ask for it.
        min_nodes: How many nodes are wanted.
        out: Where the measurements go as JSON.

    Raises:
        ConfigError: When fewer than one node is wanted, or the storage is no absolute path and no address.
        ClusterError: When the cluster cannot be reached, or a check failed.
    """
    if min_nodes < 1:
        raise ConfigError(f"--min-nodes {min_nodes}: at least 1 is expected")
    if storage is not None and not is_address(storage) and not Path(storage).expanduser().is_absolute():
        raise ConfigError(f"--storage {storage}: an absolute path, the same on every node, or an address is expected")
    connect(ClusterConfig(address=address), min_cpus=0)
    checked = check_cluster(storage=storage, min_nodes=min_nodes)
    print(render_table(checked.findings))
    if out is not None:
        checked.save(out)
    if checked.failed:
        raise ClusterError(
            f"cluster: {len(checked.failed)} of {len(checked.findings)} checks failed, the first is {checked.failed[0].check}"
        )
