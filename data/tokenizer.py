"""Text to token ids and back, exactly: what every tokenizer here offers.

data/byte_bpe.py and data/hf_tokenizer.py implement it; data/load_tokenizer.py finds the one that is asked for.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property

import numpy as np


class Tokenizer(ABC):
    """A byte-level BPE. `n_vocab` counts every id, gaps included.

    begin       the id that every document and every probe begins with
    ends        the ids that end a text which is being generated; the first is the one to write
    prefixed    whether a prompt is to begin with `begin`: a family whose texts all do (Llama) knows nothing else
    special     the ids of special tokens, by their text
    byte_ids    the ids that spell each byte
    """

    prefixed = False
    begin: int
    ends: tuple[int, ...]
    n_vocab: int
    special: dict[str, int]
    byte_ids: list[list[int]]

    @abstractmethod
    def _encode(self, text: str) -> np.ndarray:
        """Token ids (n,) uint32 of text that is valid UTF-8."""

    @property
    @abstractmethod
    def token_bytes(self) -> list[bytes]:
        """The bytes of every id."""

    @property
    @abstractmethod
    def ordinary(self) -> np.ndarray:
        """The ids that stand for text of their own, in order: what random tokens are drawn from."""

    @property
    @abstractmethod
    def json(self) -> str:
        """The whole tokenizer as Hugging Face's tokenizer.json."""

    @property
    @abstractmethod
    def hash(self) -> str:
        """SHA-256 of all that decides which ids a text gets."""

    # --- text and ids ---

    def encode(self, text: str | bytes) -> np.ndarray:
        """Token ids (n,) uint32 of any string or bytes. Special tokens in the text are text."""
        raw = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
        try:
            return self._encode(raw.decode("utf-8"))
        except UnicodeDecodeError:              # not text: the valid stretches as text, every other byte as itself
            return np.concatenate([self._encode(part) if isinstance(part, str) else
                                   np.array(self.byte_ids[part[0]], np.uint32) for part in valid_stretches(raw)])

    def prompt(self, text: str | bytes) -> list[int]:
        """The ids that a model is given to continue `text`; an empty one begins a document."""
        ids = self.encode(text).tolist()
        return [self.begin, *ids] if self.prefixed or not ids else ids

    def spelled(self, token: int) -> str:
        """One token as text to look at: special ones by name, control characters and bytes that are no whole character as \\xNN."""
        if name := next((text for text, i in self.special.items() if i == token), None):
            return name
        if token >= self.n_vocab:                               # a model's vocabulary may be larger
            return f"<{token}>"
        text = self.token_bytes[token].decode("utf-8", "backslashreplace")
        return "".join(c if (c >= " " and c != "\x7f") or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that `ids` stand for; end-of-text and ids in a vocabulary's gaps stand for none."""
        table = self.token_bytes
        return b"".join(table[i] if 0 <= i < len(table) else b"" for i in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """`ids` as text; bytes that are not UTF-8 become �."""
        raw = self.decode_bytes(ids)
        try:
            return raw.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return raw.decode("utf-8", "replace")

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        """How many bytes of text each id stands for: (V,) int64. Loss per byte needs no other bookkeeping."""
        return np.array([len(token) for token in self.token_bytes], dtype=np.int64)

    @property
    def config(self) -> dict:
        """The contents of tokenizer_config.json, which lies beside it."""
        return {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": self.spelled(self.begin),
                "eos_token": self.spelled(self.ends[0]), "clean_up_tokenization_spaces": False}


def byte_letters() -> dict[int, str]:
    """The printable letter that stands for each byte in a byte-level BPE file (Radford et al. 2019)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}


def valid_stretches(raw: bytes) -> Iterator[str | bytes]:
    """`raw` cut into its longest valid UTF-8 stretches (str) and the single bytes between them."""
    while raw:
        try:
            yield raw.decode("utf-8")
            return
        except UnicodeDecodeError as error:
            if error.start:
                yield raw[:error.start].decode("utf-8")
            yield from (raw[n:n + 1] for n in range(error.start, error.end))
            raw = raw[error.end:]
