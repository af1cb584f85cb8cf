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

# Characters before and behind a cut that are encoded to see whether it changes something.
CONTEXT = 256
SEARCHED = 768  # characters of a chunk in which a cut is looked for
TRIED = 64  # cuts that are tried at most
# Between two words nearly every tokenizer may be cut, in front of the space.
SPACE_BETWEEN_WORDS = re.compile(r"(?<=[^\W_]) (?=[^\W_])")
SPACE = re.compile(r"(?<=\S) ")


# A NamedTuple of a chunk, whose fields `text`, `before` and `last` are as ChunkEncoder takes them.
Chunk = TypeVar("Chunk", bound=NamedTuple)


class SafeCuts:
    """Finds such places for the chunks of one tokenizer.

    Version 1 of the rules of data encodes chunks as they are.
    """

    def __init__(self, encode: ChunkEncoder):
        self.encode = encode

    def moved(self, before: str, text: str, following: str) -> int:
        """How many characters of `following` are encoded with the chunk before it.

        `text` is that chunk as it is encoded, `before` the last character before it in its
        document. The result is less than the length of `following`. It is 0 when no better place
        is found, as in a long text without spaces, of which the tokenizer makes one long token.
        """
        if self.encode.rules == 1:
            return 0
        left = text[-CONTEXT:]
        if len(text) > CONTEXT:
            before = text[-CONTEXT - 1]
        window = left + following[: SEARCHED + CONTEXT]
        try:
            whole = self._ids([window], [before])
            for moved in _candidates(following):
                cut = len(left) + moved
                parts = [window[:cut], window[cut:]]
                if np.array_equal(self._ids(parts, [before, window[cut - 1]]), whole):
                    return moved
        except Exception:  # tokenizers raises plain Exception
            pass  # tokenizing the chunk fails too, and says why
        return 0

    def recut(self, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        """The same chunks of text, each with what is encoded with it in `text`.

        After a chunk that does not end its document, the next chunk of the document follows.
        """
        previous: Any = None
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
        return np.concatenate(self.encode(texts, before, [False] * len(texts)))


def _candidates(following: str) -> list[int]:
    """Numbers of characters at the beginning of a chunk, the most promising ones first."""
    searched = following[:SEARCHED]
    cuts: list[int] = []
    for pattern in (SPACE_BETWEEN_WORDS, SPACE):
        cuts += [found.start() for found in pattern.finditer(searched)]
    cuts = cuts[: TRIED // 2]
    # Without spaces, tokens may end anywhere.
    cuts += range(min(len(searched), TRIED - len(cuts)))
    return cuts
