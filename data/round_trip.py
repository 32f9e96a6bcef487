"""Whether the text that is prepared comes back from its tokens."""

from collections.abc import Iterator

import numpy as np

from data.encode import Encoded
from data.tokenizer import Tokenizer

FIRST_BYTES = 2 ** 20           # of text: all of it is decoded, and then a part
LATER_SHARE = 32                # one byte in so many, because decoding takes time


class RoundTrip:
    """Decodes a sample of the pieces that pass and counts what does not come back.

    Some tokenizers lose text by design: they lower its case, compose its accents or drop spaces.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.passed_bytes = self.checked_bytes = self.lost_bytes = 0
        self.checked = self.changed = 0         # pieces

    def watch(self, encoded: Iterator[Encoded]) -> Iterator[Encoded]:
        """The pieces of `encoded`, unchanged."""
        for item in encoded:
            if self.checked_bytes < max(FIRST_BYTES, self.passed_bytes / LATER_SHARE):
                self._check(item.piece.text, item.ids)
            self.passed_bytes += len(item.piece.text)
            yield item

    def _check(self, text: bytes, ids: np.ndarray) -> None:
        self.checked += 1
        self.checked_bytes += len(text)
        if not self.tokenizer.restores(text, ids.tolist()):
            self.changed += 1
            # Bytes of each value that are missing: a count that needs no alignment of the texts.
            before, after = (np.bincount(np.frombuffer(raw, np.uint8), minlength=256)
                             for raw in (text, self.tokenizer.decode_bytes(ids.tolist())))
            self.lost_bytes += int(np.maximum(before - after, 0).sum())

    @property
    def warning(self) -> str | None:
        """What to tell the user if text is lost."""
        if not self.changed:
            return None
        share = self.lost_bytes / self.checked_bytes
        return (f"warning    the tokenizer changes text: {self.changed:,} of {self.checked:,} "
                f"pieces checked do not decode to what they were, {share:.2%} of their bytes are "
                "lost (a normalizer or pre-tokenizer may do this by design)")
