"""The interface of a tokenizer: text to token ids and back, exactly.

data/byte_bpe.py and data/hf_tokenizer.py implement it, data/load_tokenizer.py loads one.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from errors import UserError, first_line

import numpy as np

LARGEST_ID = 2 ** 22            # tables are as long as the largest id


@contextmanager
def library_errors(error_of: Callable[[str], Exception]) -> Iterator[None]:
    """Raises `error_of(message)` for whatever Hugging Face's `tokenizers` raises. It raises plain
    Exceptions; a panic of its Rust code is not even that."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise error_of(first_line(error)) from None


def cannot_cut(message: str) -> UserError:
    """The error of a pattern that backtracks for too long."""
    return UserError(f"the tokenizer's pattern cannot cut this text into words ({message})")


class Tokenizer(ABC):
    """A BPE that can spell every byte.

    begin       the id that every document and every probe begins with
    ends        the ids that end a generated text; the first is the one to write
    prefixed    whether a prompt must begin with `begin`, as in families whose texts all do (Llama)
    n_vocab     the number of ids, unused ones included
    special     the ids of special tokens, by their text
    byte_ids    the ids that spell each byte
    kept        what other programs need and we do not: more of tokenizer_config.json
                (data/companions.py)
    """

    prefixed = False
    kept: dict[str, Any] = {}       # never changed in place
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
    def ordinary_ids(self) -> np.ndarray:
        """The ids that stand for text of their own, in order: random tokens are drawn from them."""

    @property
    @abstractmethod
    def json(self) -> str:
        """The whole tokenizer as Hugging Face's tokenizer.json."""

    @property
    @abstractmethod
    def hash(self) -> str:
        """SHA-256 of everything that decides which ids a text gets."""

    # --- text and ids ---

    def encode(self, text: str | bytes) -> np.ndarray:
        """Token ids (n,) uint32 of any string or bytes. Special tokens in the text are text."""
        raw = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
        try:
            return self._encode(raw.decode("utf-8"))
        except UnicodeDecodeError:              # encode valid parts as text, other bytes one by one
            parts = []
            for part in utf8_parts(raw):
                if isinstance(part, str):
                    parts.append(self._encode(part))
                else:
                    parts.append(np.array(self.byte_ids[part[0]], np.uint32))
            return np.concatenate(parts)

    def encode_prompt(self, text: str | bytes) -> list[int]:
        """The ids that a model gets to continue `text`; an empty text begins a document."""
        ids = self.encode(text).tolist()
        return [self.begin, *ids] if self.prefixed or not ids else ids

    def token_text(self, token: int) -> str:
        r"""A token as people read it.

        Special tokens by name; control characters and incomplete characters as \xNN.
        """
        for name, special_id in self.special.items():
            if special_id == token:
                return name
        if token >= self.n_vocab:               # a model's vocabulary may be the larger one
            return f"<{token}>"
        text = self.token_bytes[token].decode("utf-8", "backslashreplace")
        return "".join(f"\\x{ord(c):02x}" if is_control(c) else c for c in text)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that `ids` stand for; special tokens and unused ids stand for none."""
        table = self.token_bytes
        return b"".join(table[i] if 0 <= i < len(table) else b"" for i in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """`ids` as text; bytes that are not UTF-8 become �."""
        raw = self.decode_bytes(ids)
        try:
            return raw.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return raw.decode("utf-8", "replace")

    def restores(self, raw: bytes, ids: Iterable[int]) -> bool:
        """Whether `ids`, which encode `raw`, decode to the same bytes."""
        return self.decode_bytes(ids) == raw

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        """How many bytes of text each id stands for, for the loss per byte: (V,) int64."""
        return np.array([len(token) for token in self.token_bytes], dtype=np.int64)

    @property
    def config(self) -> dict[str, Any]:
        """The contents of tokenizer_config.json, which is saved beside tokenizer.json.

        Our models need no padding, but other programs refuse a batch without a `pad_token`, and
        continue a padded prompt wrongly unless the padding is on its left. CTranslate2 wants an
        `unk_token`, which no text becomes. transformers 4 feeds `token_type_ids` to the model
        unless `model_input_names` leaves them out; GPT-2 then adds a wrong embedding to each token.
        """
        end = self.token_text(self.ends[0])
        return {"tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": self.token_text(self.begin), "eos_token": end, "pad_token": end,
                "unk_token": end, "padding_side": "left",
                "model_input_names": ["input_ids", "attention_mask"],
                "clean_up_tokenization_spaces": False} | self.kept


def byte_letters() -> dict[int, str]:
    """The printable letter for each byte in a byte-level BPE file (Radford et al. 2019)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1),
                 *range(ord("®"), ord("ÿ") + 1)]
    letters = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in letters]
    return letters | {byte: chr(256 + n) for n, byte in enumerate(others)}


def utf8_parts(raw: bytes) -> Iterator[str | bytes]:
    """`raw` cut into its longest valid UTF-8 parts (str) and the single bytes between them."""
    # A byte that is not UTF-8 becomes a lone surrogate, which no valid UTF-8 contains.
    for part in re.split("([\udc80-\udcff])", raw.decode("utf-8", "surrogateescape")):
        if "\udc80" <= part <= "\udcff":
            yield part.encode("utf-8", "surrogateescape")
        elif part:
            yield part


def is_control(character: str) -> bool:
    """Whether an ASCII character has no picture and is neither a line end nor a tab."""
    return (character < " " or character == "\x7f") and character not in "\n\t"
