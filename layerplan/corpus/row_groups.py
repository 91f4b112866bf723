"""One row group: how it is hashed when it is written, decoded when it is read, and compared before anybody uses it.

The hash is taken over what training uses (token ids, document starts, tokens used) and not over the bytes of the file: a
flipped bit anywhere, in a page, its header or the footer, either changes none of these or is found.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from layerplan.corpus.pack import RawRow

COLUMNS = ["input_ids", "starts", "used"]
READ_FAULTS = (
    OSError,
    pa.ArrowException,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    MemoryError,
    RuntimeError,
)
"""What pyarrow and numpy raise over a damaged file, as the damage falls."""
HASH_CHARS = 32
TAIL_BYTES = 64 * 1024
"""The end of a file that is hashed: footers of some 600 columns in row groups."""


@dataclass(frozen=True)
class RawRows:
    """Rows as they lie on disk: (n, T) ids, document starts per row, (n,) tokens used; all int32."""

    input_ids: NDArray[np.int32]
    starts: list[NDArray[np.int32]]
    used: NDArray[np.int32]


def count_groups(num_rows: int, rows_per_group: int) -> int:
    """Row groups of a file."""
    return -(-num_rows // rows_per_group)


def hash_rows(
    input_ids: NDArray[np.int32], counts: NDArray[np.int32], positions: NDArray[np.int32], used: NDArray[np.int32]
) -> str:
    """The hash of n rows, xxh3_128.

    Args:
        input_ids: (n, T).
        counts: (n,) documents that start in each row.
        positions: Where they start, row after row.
        used: (n,) tokens that are not padding.
    """
    digest = xxhash.xxh3_128(np.array([*input_ids.shape, len(positions)], dtype="<i8").tobytes())
    for part in (input_ids, counts, positions, used):
        digest.update(np.ascontiguousarray(part, dtype="<i4").reshape(-1).data)
    return digest.hexdigest()


def hash_tail(file: IO[bytes] | pa.NativeFile, num_bytes: int) -> str:
    """The hash of a file's end, where its footer is."""
    file.seek(max(0, num_bytes - TAIL_BYTES))
    return xxhash.xxh3_128_hexdigest(file.read(TAIL_BYTES))


def hash_groups(rows: list[RawRow], rows_per_group: int) -> str:
    """The hashes of all row groups of a file, one after the other, from the rows that will be written."""
    return "".join(_hash_raw(rows[start : start + rows_per_group]) for start in range(0, len(rows), rows_per_group))


def _hash_raw(rows: list[RawRow]) -> str:
    return hash_rows(
        np.stack([row.input_ids for row in rows]),
        np.array([len(row.starts) for row in rows], dtype=np.int32),
        np.concatenate([row.starts for row in rows]),
        np.array([row.used for row in rows], dtype=np.int32),
    )


def read_group(
    file: pq.ParquetFile, group: int, *, num_rows: int, seq_len: int, noted: str | None, num_ids: int | None = None
) -> RawRows:
    """Reads a row group and compares it with its hash.

    Args:
        file: The shard.
        group: Its row group.
        num_rows: Rows that it must have.
        seq_len: Tokens per row.
        noted: Hash from the manifest; None in stores of earlier versions, whose rows are only looked at.
        num_ids: Of such a store, token ids that the model has embeddings for.

    Raises:
        ValueError: When the rows are not those that were written; pyarrow adds the rest of `READ_FAULTS`.
    """
    table = file.read_row_group(group, columns=COLUMNS)
    ids = _join(table["input_ids"]).flatten().to_numpy(zero_copy_only=False).astype(np.int32, copy=False)
    lists = _join(table["starts"])
    offsets = lists.offsets.to_numpy()
    positions = lists.values.to_numpy(zero_copy_only=False).astype(np.int32, copy=False)
    used = table["used"].to_numpy().astype(np.int32, copy=False)
    if len(ids) != num_rows * seq_len or len(used) != num_rows or len(offsets) != num_rows + 1:
        raise ValueError(f"has {len(used):,} rows and {len(ids):,} tokens, expected {num_rows:,} rows of {seq_len:,}")
    raw = RawRows(ids.reshape(num_rows, seq_len), [positions[start:stop] for start, stop in pairwise(offsets)], used)
    if noted is None:
        _check_range(raw, positions, num_ids)
        return raw
    found = hash_rows(raw.input_ids, np.diff(offsets), positions[offsets[0] : offsets[-1]], used)
    if found != noted:
        raise WrongRowsError(found, noted)
    return raw


class WrongRowsError(ValueError):
    """Rows can be decoded, but are not those that were written."""

    def __init__(self, found: str, noted: str) -> None:
        super().__init__(f"xxh3_128 of its rows is {found[:12]}, {noted[:12]} was written")
        self.found = found


def _join(column: pa.ChunkedArray) -> pa.Array:
    joined = column.combine_chunks()
    return joined.chunk(0) if isinstance(joined, pa.ChunkedArray) else joined


def _check_range(raw: RawRows, positions: NDArray[np.int32], num_ids: int | None) -> None:
    """What can be known without a hash: nothing lies outside a row, no token outside the vocabulary."""
    seq_len = raw.input_ids.shape[1]
    for name, values, limit in (
        ("token", raw.input_ids, None if num_ids is None else num_ids - 1),
        ("document start", positions, seq_len - 1),
        ("number of tokens", raw.used, seq_len),
    ):
        if values.size and (values.min() < 0 or (limit is not None and values.max() > limit)):
            wrong = values.min() if values.min() < 0 else values.max()
            raise ValueError(f"holds a {name} of {wrong}" + ("" if limit is None else f", at most {limit} is possible"))
