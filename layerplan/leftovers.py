"""Gives back what Ray still reserves for jobs that have ended.

Ray removes a placement group when the job and the actor that made it are known to be gone. One that is asked for while its
job is being killed is registered after that moment, and stays for good. Ray Train makes placement groups as it starts
workers, so that a driver killed just then leaves their CPUs or GPUs taken; Ray's own cleaner of Ray Train knows a group only
once its workers run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """A placement group that the cluster has."""

    id: bytes
    job: str
    actor: str
    """The actor that made it; empty when a driver did."""
    is_detached: bool
    cpus: float
    gpus: float


class Leftovers:
    """Looks at the connected cluster from time to time."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def give_back(self) -> str:
        """Removes placement groups whose makers had ended at the look before too, as Ray does at once where it does.

        A group that was made to outlive its job stays, and so does one of an actor that lives on.

        Returns:
            A line about what was removed, or nothing.
        """
        import ray
        from ray.util.placement_group import PlacementGroup, remove_placement_group

        groups = list_groups()
        ended = {job["JobID"] for job in ray._private.state.jobs() if job["IsDead"]} if groups else set()
        found = find_leftovers(groups, ended, _lives)
        left = [group for group in found if group.id in self._seen]
        for group in left:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.id)))
        self._seen = {group.id for group in found} - {group.id for group in left}
        return describe(left)


def find_leftovers(groups: Iterable[Group], ended: Collection[str], lives: Callable[[str], bool]) -> list[Group]:
    """Groups that nobody can use or remove any more.

    Args:
        groups: Of the cluster.
        ended: Jobs whose driver is gone.
        lives: Whether an actor is there, or will be; asked only for groups of ended jobs.
    """
    return [
        group
        for group in groups
        if not group.is_detached and group.job in ended and not (group.actor and lives(group.actor))
    ]


def describe(left: Collection[Group]) -> str:
    """One line about groups that were removed; empty when there are none."""
    if not left:
        return ""
    held = Counter[str]()
    for group in left:
        held.update({"CPU": group.cpus, "GPU": group.gpus})
    amounts = " and ".join(f"{amount:g} {name}" for name, amount in held.items() if amount)
    jobs = sorted({group.job for group in left})
    return (
        f"gave back {amounts or 'a placement group'} that Ray still reserved for job {', '.join(jobs)}, which has ended"
    )


def list_groups() -> list[Group]:
    """Placement groups that are not removed, straight from the control store.

    The State API does not say which actor made a group, and needs a dashboard.
    """
    import ray
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData

    accessor = ray._private.state.state._connect_and_get_accessor()
    rows = map(PlacementGroupTableData.FromString, accessor.get_placement_group_table())
    return [
        Group(
            row.placement_group_id,
            row.creator_job_id.hex(),
            "" if ray.ActorID(row.creator_actor_id).is_nil() else row.creator_actor_id.hex(),
            row.is_detached,
            *(sum(bundle.unit_resources.get(name, 0.0) for bundle in row.bundles) for name in ("CPU", "GPU")),
        )
        for row in rows
        if row.state != PlacementGroupTableData.REMOVED
    ]


def _lives(actor: str) -> bool:
    import ray

    return bool(ray._private.state.actors(actor).get("State", "DEAD") != "DEAD")
