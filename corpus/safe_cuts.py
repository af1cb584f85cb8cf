"""Where a long document may be cut so that its parts have the tokens of the whole document.

A document is read in chunks that end with a line, or anywhere in a very long line. The tokens at
such an end are not always those of the whole document: a line end and the indent after it may be
one token, a word may be cut in two, an accent may be cut from its letter. So the beginning of a
chunk is encoded with the chunk before it, up to a place where cutting changes nothing.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np

from corpus.tokenizer import ChunkEncoder

# To see whether a cut changes the tokens, this many characters on each side of it are encoded.
CONTEXT = 256
SEARCHED = 768  # the cut is looked for in this many characters at the beginning of a chunk
TRIED = 64  # cuts that are tried at most
# With nearly every tokenizer, text may be cut between two words, in front of the space.
SPACE_BETWEEN_WORDS = re.compile(r"(?<=[^\W_]) (?=[^\W_])")
SPACE = re.compile(r"(?<=\S) ")


# A NamedTuple of a chunk. Its field `text` is what is encoded, `before` is the last character in
# front of the text in its document, and `last` says whether the document ends with the text.
Chunk = TypeVar("Chunk", bound=NamedTuple)


class SafeCuts:
    """Finds places where cutting a document does not change the tokens of one tokenizer.

    Version 1 of the rules of data does not look for them: each chunk is encoded as it was read.
    """

    def __init__(self, encode: ChunkEncoder):
        self.encode = encode

    def moved(self, before: str, text: str, following: str) -> int:
        """How many characters of the chunk `following` move to the end of the chunk `text`.

        `text` stands in front of `following`, and `before` is the last character in front of
        `text`, all in one document. At least one character of `following` stays where it is. The
        result is 0 where no safe cut is found, as in a long text without spaces, of which the
        tokenizer makes one long token.
        """
        if self.encode.rules == 1:
            return 0
        # Only the text around the cuts is encoded: both whole chunks would take much longer.
        tail = text[-CONTEXT:]
        if len(text) > CONTEXT:
            before = text[-CONTEXT - 1]
        window = tail + following[: SEARCHED + CONTEXT]
        try:
            uncut_ids = self._ids([window], [before])
            for moved in _candidates(following):
                cut = len(tail) + moved
                parts = [window[:cut], window[cut:]]
                cut_ids = self._ids(parts, [before, window[cut - 1]])
                if np.array_equal(cut_ids, uncut_ids):
                    return moved
        except Exception:  # tokenizers raises plain Exception
            pass  # tokenizing the chunk fails too, and says why
        return 0

    def recut(self, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        """Yields the chunks cut at safe places: the first characters of a chunk may move to the
        end of the chunk before it.

        The chunks of a document must follow one another, up to the one whose `last` is true.
        """
        previous: Any = None  # the chunk before, which is yielded once its text is complete
        chunk: Any
        for chunk in chunks:
            if previous is not None:
                moved = self.moved(previous.before, previous.text, chunk.text)
                previous = previous._replace(text=previous.text + chunk.text[:moved])
                yield previous
                chunk = chunk._replace(text=chunk.text[moved:], before=previous.text[-1])
            previous = chunk
            if chunk.last:
                yield chunk
                previous = None
        if previous is not None:
            yield previous

    def _ids(self, texts: list[str], before: list[str]) -> np.ndarray:
        """The tokens of parts of a document, one after the other, without end-of-text tokens."""
        return np.concatenate(self.encode(texts, before, [False] * len(texts)))


def _candidates(following: str) -> list[int]:
    """Where a chunk may be cut, in characters from its beginning: the most promising cuts first."""
    searched = following[:SEARCHED]
    cuts: list[int] = []
    for pattern in (SPACE_BETWEEN_WORDS, SPACE):
        cuts += [found.start() for found in pattern.finditer(searched)]
    cuts = cuts[: TRIED // 2]
    # Without spaces, tokens may end anywhere.
    cuts += range(min(len(searched), TRIED - len(cuts)))
    return cuts
