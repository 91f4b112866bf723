"""Where a long text may be cut, so that its pieces' token ids are those of the whole.

An encoder needs some 100 bytes per token, so a long text is encoded in pieces. A piece alone is not encoded as it is
within its text: SentencePiece puts a space before whatever it is given, a rule of splitting takes line ends together with
what follows them, accents join the letter before them. So a piece is encoded with the character before it, whose ids are
left out again, and a place to cut is one where both sides give the ids of the stretch around it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice, pairwise

from layerplan.corpus.encoders import Encoder

PIECE_CHARS = 500_000
WINDOW_CHARS = 128
"""Characters looked at on each side of a cut; no rule of splitting that we know looks further."""
_LINE_ENDS_TRIED, _PLACES_TRIED = 64, 256


@dataclass(frozen=True)
class Piece:
    """A piece of a text as an encoder gets it.

    Attributes:
        text: The piece, with the character before it unless it begins its text.
        before: Ids of that character, which are no part of the piece's.
    """

    text: str
    before: bytes = b""

    def take(self, ids: bytes) -> bytes:
        """The piece's own ids of those that its text was encoded to."""
        return ids.removeprefix(self.before)


def cut_text(text: str, encoder: Encoder, limit: int = PIECE_CHARS) -> list[Piece]:
    """Cuts a text into pieces of at most `limit` characters; no piece of an empty text.

    The last line end before the limit at which nothing changes is taken, else the last place of any kind, else the limit.
    """
    if len(text) <= limit:
        return [Piece(text)] if text else []
    cuts = [0]
    while len(text) - cuts[-1] > limit:
        cuts.append(_find_cut(text, cuts[-1], encoder, limit))
    pieces = [Piece(text[: cuts[1]])]
    for start, end in pairwise([*cuts[1:], len(text)]):
        (before,) = encoder.encode([text[start - 1]])
        pieces.append(Piece(text[start - 1 : end], before))
    return pieces


def _find_cut(text: str, start: int, encoder: Encoder, limit: int) -> int:
    lowest, highest = start + limit // 2, start + limit
    line_ends = islice(_list_line_ends(text, lowest, highest), _LINE_ENDS_TRIED)
    places = islice(range(highest, lowest, -1), _PLACES_TRIED)
    return next((cut for cut in chain(line_ends, places) if _is_clean(text, cut, encoder)), highest)


def _list_line_ends(text: str, lowest: int, highest: int) -> Iterator[int]:
    """Places after a line end, the last first."""
    place = highest
    while (place := text.rfind("\n", lowest, place)) >= 0:
        yield place + 1


def _is_clean(text: str, cut: int, encoder: Encoder) -> bool:
    left, right = text[max(0, cut - WINDOW_CHARS) : cut], text[cut : cut + WINDOW_CHARS]
    whole, of_left, before, of_right = encoder.encode([left + right, left, left[-1], left[-1] + right])
    return of_right.startswith(before) and whole == of_left + of_right.removeprefix(before)
