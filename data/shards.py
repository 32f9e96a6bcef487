"""Tokens on disk: NumPy `.npy` files of uint16 or uint32, and a manifest that names, counts and fingerprints them.

    prepared/NAME/
      manifest.json       what was prepared; written last, so that a folder with one is whole
      tokenizer.json
      train-00000.npy …   one token after another; every document begins with the end-of-text token
      val-00000.npy …
"""

import bisect
import json
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path

from errors import UserError

import numpy as np

from data.load_tokenizer import load_tokenizer
from files import sha256

FORMAT = 1
VERIFY_BYTES = 2 ** 32          # shards are read through at opening up to this size (some seconds); larger ones on request
MAPPED = 256                    # shards mapped at once: each holds a file descriptor, and 1,024 is all that many systems give


class Shards:
    """A prepared corpus, opened: `train` and `val` streams, the tokenizer, and one hash of it all."""

    def __init__(self, folder: str | Path, verify: bool | None = None):
        """Raises UserError where the folder is not whole. `verify`: read every byte; None: where that takes seconds."""
        self.folder = Path(folder)
        try:
            self.manifest = json.loads((self.folder / "manifest.json").read_text("utf-8"))
            if self.manifest["format"] != FORMAT:
                raise UserError(f"{self.folder}: shards of format {self.manifest['format']}, this version reads {FORMAT}: prepare again")
            listed = {split: self.manifest["shards"][split] for split in ("train", "val")}
            self.hash = self.manifest["hash"]
            total = sum(shard["tokens"] for split in listed.values() for shard in split) * 4
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise UserError(f"{self.folder}: no prepared corpus ({type(error).__name__}: {error})") from None
        self.verify = verify if verify is not None else total <= VERIFY_BYTES
        self.tokenizer = load_tokenizer(self.folder / "tokenizer.json")
        if self.tokenizer.hash != self.manifest["tokenizer"]:
            raise UserError(f"{self.folder}/tokenizer.json is not the tokenizer these shards were made with: prepare again")
        self._map = lru_cache(MAPPED)(partial(np.load, mmap_mode="r", allow_pickle=False))
        self.train, self.val = (TokenStream([self._open(shard) for shard in listed[split]]) for split in ("train", "val"))

    def _open(self, shard: dict) -> "Shard":
        path = self.folder / "manifest.json"
        try:
            path = self.folder / Path(shard["file"]).name       # a name alone: a manifest cannot point elsewhere
            tokens = self._map(path)
            if tokens.shape != (shard["tokens"],) or tokens.dtype not in (np.uint16, np.uint32):
                raise ValueError(f"{tokens.shape} {tokens.dtype}, not {shard['tokens']} tokens")
            if self.verify and sha256(path) != shard["sha256"]:
                raise ValueError("its SHA-256 is not the manifest's")
        except (OSError, ValueError, EOFError, SyntaxError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error})\n  delete {self.folder} and run again to prepare it anew") from None
        return Shard(path, len(tokens), self._map)


class Shard:
    """The tokens of one file, mapped when they are read."""

    def __init__(self, path: Path, tokens: int, mapped: Callable[[Path], np.ndarray]):
        self.path, self.tokens, self.mapped = path, tokens, mapped

    def __len__(self) -> int:
        return self.tokens

    def __getitem__(self, part: slice) -> np.ndarray:
        return self.mapped(self.path)[part]


class TokenStream:
    """Several shards read as one long row of tokens."""

    def __init__(self, shards: Sequence[np.ndarray | Shard]):
        self.shards = [shard for shard in shards if len(shard)]
        self.ends = list(accumulate(len(shard) for shard in self.shards))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens start … start + length − 1: (length,) int64, across shard borders."""
        parts, n = [], bisect.bisect_right(self.ends, start)
        while length > 0 and n < len(self.shards):
            offset = start - (self.ends[n] - len(self.shards[n]))
            part = self.shards[n][offset:offset + length]
            parts.append(part.astype(np.int64))         # a copy: a view would keep the file open
            start, length, n = start + len(part), length - len(part), n + 1
        return np.concatenate(parts)
