"""One exception family, so that every fault a user can cause ends as one clear line.

Commands catch `LayerplanError`, print its message and exit: 2 for a `ConfigError`, 1 for the rest. Every class
here survives pickling, because Ray carries exceptions from workers to the driver.
"""

import re

_RETRY_NOTE = re.compile(r"\nFailed to .* after \d+/\d+ attempts .*", re.DOTALL)


class LayerplanError(Exception):
    """A fault with a message meant for the user: it names the field or file, the value, and what is allowed."""

    exit_code = 1


class ConfigError(LayerplanError):
    """The configuration is wrong; carries one line per fault."""

    exit_code = 2

    def __init__(self, *faults: str) -> None:
        super().__init__(*faults)

    @property
    def faults(self) -> tuple[str, ...]:
        """One line per fault."""
        return tuple(str(fault) for fault in self.args)

    def __str__(self) -> str:
        return "\n".join(self.faults)


class PlanError(LayerplanError):
    """A freeze plan is contradictory, matches nothing, was changed on disk, or belongs to another model."""


class ModelError(LayerplanError):
    """A model folder is incomplete, of an unknown structure, or fails its self-test."""


class ProbeError(LayerplanError):
    """A probe has no context, no query, or a span that covers no token; the message names the probe's id."""


class CorpusError(LayerplanError):
    """The raw documents or the token store cannot be used."""


class StorageError(LayerplanError):
    """The place where a run is stored cannot be read or written."""


class CheckpointError(LayerplanError):
    """A checkpoint is missing, incomplete, or of another run."""


class TrainingError(LayerplanError):
    """Training cannot start or had to stop."""


class EvaluationError(LayerplanError):
    """A benchmark, a protocol or an engine cannot give a trustworthy score."""


class RunBusyError(LayerplanError):
    """Another process runs this run: two would write one folder."""


class ClusterError(LayerplanError):
    """The Ray cluster is absent, too small, or cannot be started."""


class TrackingError(LayerplanError):
    """The tracking store cannot be reached or refuses the run."""


def find_layerplan_error(error: BaseException) -> LayerplanError | None:
    """The `LayerplanError` inside an engine's exception: Ray wraps what a worker raises, several layers deep.

    What Ray Data appends to its text, advice about retries, is taken off.
    """
    pending: list[BaseException | None] = [error]  # looked through in order, what is inside before what comes after
    seen: set[int] = set()
    while pending:
        current = pending.pop(0)
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        inner = getattr(current, "cause", None)  # Ray's copy is of our class too, with a traceback as its text
        if isinstance(current, LayerplanError) and not isinstance(inner, LayerplanError):
            current.args = tuple(_RETRY_NOTE.sub("", arg) if isinstance(arg, str) else arg for arg in current.args)
            return current
        failures = getattr(current, "worker_failures", None) or {}
        context = None if current.__suppress_context__ else current.__context__
        pending = [*failures.values(), inner, current.__cause__, context, *pending]
    return None


def first_line(error: BaseException) -> str:
    """The first line with text of what an exception says, or its class."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
