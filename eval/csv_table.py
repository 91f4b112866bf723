"""The CSV files of benchmarks as their authors, pandas and spreadsheets write them, as rows of known columns.

C-Eval's authors name their columns `id,question,A,B,C,D,answer` and their files `<subject>_val.csv`; CMMLU's archive has an
unnamed column of numbers and `Question`, `Answer`; Excel puts a byte-order mark before the header and, by the
machine's settings, semicolons or tabs between cells. Cells keep every character, line breaks included.
"""

from __future__ import annotations

import csv
import io
import unicodedata
from pathlib import Path

from layerplan.errors import EvaluationError

LETTERS = ("A", "B", "C", "D")
COLUMNS = ("id", "question", *LETTERS, "answer")
NUMBERED = ("", "unnamed: 0")
"""How pandas calls a column of row numbers."""
SEPARATORS = (",", ";", "\t")
UTF_16 = (b"\xff\xfe", b"\xfe\xff")


def read_table(path: Path) -> list[dict[str, str]]:
    """Reads a file's rows; a missing `id` is the number of the row, from 0. Empty rows are passed over.

    Raises:
        EvaluationError: When the file is missing, is no UTF-8, or lacks a column, showing the header found and wanted.
    """
    text = _read_text(path)
    try:
        header, rows = min((_split(text, separator) for separator in SEPARATORS), key=lambda item: len(_lacks(item[0])))
    except csv.Error as error:
        raise EvaluationError(f"{path}: cannot be read ({error})") from None
    if not rows:
        raise EvaluationError(f"{path}: holds no question")
    if missing := _lacks(header):
        raise EvaluationError(
            f"{path}: has no column {', '.join(missing)}; an unlabelled split cannot be scored. Its header is"
            f" {', '.join(map(repr, header))}; wanted are {', '.join(COLUMNS)} in any order and case (id may be left out)"
        )
    return [_make_row(path, header, number, cells) for number, cells in enumerate(rows)]


def read_letter(cell: str) -> str:
    """An answer's letter without its width, case and the space around it."""
    return unicodedata.normalize("NFKC", cell).strip().upper()


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
        return content.decode("utf-16" if content.startswith(UTF_16) else "utf-8-sig")
    except FileNotFoundError:
        raise EvaluationError(f"{path}: does not exist; every subject must have its file") from None
    except UnicodeDecodeError as error:
        raise EvaluationError(
            f"{path}: is not UTF-8 ({error.reason} at byte {error.start}); save it as `CSV UTF-8`,"
            " or convert it (`iconv -f GB18030 -t UTF-8` for files of a Chinese Excel)"
        ) from None
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be read ({error})") from None


def _split(text: str, separator: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows, as this separator gives them."""
    rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=separator) if any(map(str.strip, row))]
    return (rows[0], rows[1:]) if rows else ([], [])


def _lacks(header: list[str]) -> list[str]:
    return [column for column in COLUMNS[1:] if column.lower() not in map(_fold, header)]


def _fold(name: str) -> str:
    return unicodedata.normalize("NFKC", name).strip().lower()


def _make_row(path: Path, header: list[str], number: int, cells: list[str]) -> dict[str, str]:
    """One question's cells by their columns."""
    if len(cells) < len(header) or any(map(str.strip, cells[len(header) :])):
        raise EvaluationError(
            f"{path}: question {number} has {len(cells)} cells, the header {len(header)}; quote cells that hold separators"
        )
    found = dict(zip(map(_fold, header), cells))
    known = next((found[name] for name in ("id", *NUMBERED) if name in found), str(number))
    return {"id": known} | {column: found[column.lower()] for column in COLUMNS[1:]}
