"""How a distributed checkpoint meets the disk: hashed while it is written, read without running anything in it."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from layerplan.checkpoint.metadata import read_metadata
from layerplan.checkpoint.seal import FileMark, Marker
from layerplan.errors import CheckpointError
from layerplan.storage.paths import StoredPath

_MARKS = "layerplan marks"


class MarkingWriter(dcp.FileSystemWriter):
    """Writes one rank's files and marks them on the way; the marks of all ranks come together on rank 0."""

    def __init__(self, path: StoredPath) -> None:
        super().__init__(str(path), sync_files=isinstance(path, Path))
        self.fs = _MarkingFileSystem()
        self.path: Any = path
        self.marks: dict[str, FileMark] = {}
        """Of every rank's files and the metadata, by name; whole on rank 0 once the save is done."""

    @property
    def checkpoint_id(self) -> str:
        """The folder's name, which the metadata keeps and nobody reads."""
        return str(self.path)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Sends this rank's marks along with the results, which are gathered anyway."""
        results = super().write_data(plan, planner).wait()
        future: Future[list[WriteResult]] = Future()
        future.set_result([*results, WriteResult(MetadataIndex(_MARKS), 0, self.fs.marks)])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Takes the marks out again before the metadata is written."""
        for result in (result for of_rank in results for result in of_rank if result.index.fqn == _MARKS):
            self.marks.update(result.storage_data)
        results = [[result for result in of_rank if result.index.fqn != _MARKS] for of_rank in results]
        unmarked = {result.storage_data.relative_path for of_rank in results for result in of_rank} - set(self.marks)
        if unmarked:
            raise CheckpointError(f"{self.path}: written without a hash: {', '.join(sorted(unmarked))}")
        super().finish(metadata, results)
        self.marks.update(self.fs.marks)


class DataReader(dcp.FileSystemReader):
    """Reads tensors, and nothing that could be code."""

    def __init__(self, path: StoredPath, metadata: Metadata | None = None) -> None:
        """Reads from a folder, whose metadata may be at hand already."""
        super().__init__(str(path))
        self.fs = _PathFileSystem()
        self.path: Any = path
        self._metadata = metadata

    def _slice_file(self, file: Any, sinfo: Any) -> IO[bytes]:
        """One request for a tensor's bytes: its reader asks for a few at a time."""
        if isinstance(self.path, Path):
            return super()._slice_file(file, sinfo)
        file.seek(sinfo.offset)
        return io.BytesIO(file.read(sinfo.length))

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata by `layerplan.checkpoint.metadata`."""
        metadata = self._metadata or read_metadata(self.path)
        metadata.storage_meta = dataclasses.replace(metadata.storage_meta or StorageMeta(), load_id=self.load_id)
        return metadata


class _PathFileSystem(FileSystem):
    """PyTorch's, for files in a bucket too."""

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with path.open(mode) as stream:
            yield stream

    def concat_path(self, path: Any, suffix: str) -> Any:
        return path / suffix

    def rename(self, path: Any, new_path: Any) -> None:
        path.rename(new_path)

    def mkdir(self, path: Any) -> None:
        path.mkdir(parents=True, exist_ok=True)

    def exists(self, path: Any) -> bool:
        return bool(path.exists())

    def rm_file(self, path: Any) -> None:
        path.unlink()


class _MarkingFileSystem(_PathFileSystem):
    def __init__(self) -> None:
        super().__init__()
        self.marks: dict[str, FileMark] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:
            if mode != "wb":
                yield stream
                return
            marked = _MarkedStream(stream)
            yield marked
            self.marks[path.name] = marked.marker.finish()

    def rename(self, path: Any, new_path: Any) -> None:
        super().rename(path, new_path)
        self.marks[new_path.name] = self.marks.pop(path.name)


class _MarkedStream(io.IOBase):
    """A file that is written from its beginning to its end."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.marker = Marker()

    def write(self, piece: Any) -> int:
        self.marker.update(piece)
        return int(self._stream.write(piece))

    def tell(self) -> int:
        return int(self._stream.tell())

    def fileno(self) -> int:
        return int(self._stream.fileno())

    def flush(self) -> None:
        if not self._stream.closed:
            self._stream.flush()

    def close(self) -> None:
        self._stream.close()
        super().close()
