"""Tokens on disk: NumPy `.npy` files of uint16 or uint32, and a manifest of their sizes and hashes.

    prepared/NAME/
      manifest.json       what was prepared; written last, so a folder that has one is complete
      tokenizer.json
      train-00000.npy …   one token after another; every document begins with the end-of-text token
      val-00000.npy …
"""

import bisect
import json
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from errors import UserError

import numpy as np

from data.load_tokenizer import load_tokenizer
from files import sha256

FORMAT = 1
VERIFY_BYTES = 2 ** 32          # up to this size shards are verified on opening, within seconds
MAPPED = 256                    # shards mapped at once: each takes a file descriptor, of which many
                                # systems allow 1,024


class Shards:
    """A prepared corpus, opened: `train` and `val` streams, the tokenizer, one hash of it all."""

    def __init__(self, folder: str | Path, verify: bool | None = None):
        """Raises UserError if the folder is not complete.

        `verify`: compare every shard with its SHA-256; None: if they have at most VERIFY_BYTES.
        """
        self.folder = Path(folder)
        try:
            self.manifest = json.loads((self.folder / "manifest.json").read_text("utf-8"))
            if self.manifest["format"] != FORMAT:
                raise UserError(f"{self.folder}: shards of format {self.manifest['format']}, "
                                f"this version reads {FORMAT}: prepare again")
            entries = {split: self.manifest["shards"][split] for split in ("train", "val")}
            self.hash = self.manifest["hash"]
            most_bytes = 4 * sum(entry["tokens"] for split in entries.values() for entry in split)
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise UserError(f"{self.folder}: no prepared corpus "
                            f"({type(error).__name__}: {error})") from None
        self.verify = verify if verify is not None else most_bytes <= VERIFY_BYTES
        self.tokenizer = load_tokenizer(self.folder / "tokenizer.json")
        if self.tokenizer.hash != self.manifest["tokenizer"]:
            raise UserError(f"{self.folder}/tokenizer.json is not the tokenizer these shards were "
                            "made with: prepare again")
        self._map = lru_cache(MAPPED)(partial(np.load, mmap_mode="r", allow_pickle=False))
        self.train = TokenStream([self._open(entry) for entry in entries["train"]])
        self.val = TokenStream([self._open(entry) for entry in entries["val"]])

    def _open(self, entry: dict[str, Any]) -> "Shard":
        """Check a shard against its manifest entry."""
        path = self.folder / "manifest.json"                    # to blame, if it has no file name
        try:
            path = self.folder / Path(entry["file"]).name       # only a name: inside this folder
            tokens = self._map(path)
            if tokens.shape != (entry["tokens"],) or tokens.dtype not in (np.uint16, np.uint32):
                raise ValueError(f"{tokens.shape} {tokens.dtype}, not {entry['tokens']} tokens")
            if self.verify and sha256(path) != entry["sha256"]:
                raise ValueError("its SHA-256 is not the manifest's")
        except (OSError, ValueError, EOFError, SyntaxError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error})\n"
                            f"  delete {self.folder} and run again to prepare it again") from None
        return Shard(path, len(tokens), self._map)


def folders_of_shards(folders: Iterable[Path], wanted: Callable[[dict[str, Any]], bool],
                      ) -> list[Path]:
    """Those of `folders` with finished shards whose manifest is wanted, sorted."""
    matches = []
    for folder in sorted(folders):
        try:
            if wanted(json.loads((folder / "manifest.json").read_text("utf-8"))):
                matches.append(folder)
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            continue                            # not a folder of shards, or damaged
    return matches


class Shard:
    """The tokens of one file, mapped into memory when they are read."""

    def __init__(self, path: Path, tokens: int, map_file: Callable[[Path], np.ndarray]):
        self.path, self.tokens, self.map_file = path, tokens, map_file

    def __len__(self) -> int:
        return self.tokens

    def __getitem__(self, part: slice) -> np.ndarray:
        return self.map_file(self.path)[part]


class Tokens(Protocol):
    """What a stream needs of a shard."""

    def __len__(self) -> int: ...
    def __getitem__(self, part: slice, /) -> np.ndarray: ...


class TokenStream:
    """Several shards, read as one long sequence of tokens."""

    def __init__(self, shards: Sequence[Tokens]):
        self.shards = [shard for shard in shards if len(shard)]
        self.ends = list(accumulate(len(shard) for shard in self.shards))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens start … start + length − 1, across shard borders: (length,) int64."""
        parts = []
        n = bisect.bisect_right(self.ends, start)       # the shard that holds token `start`
        while length > 0 and n < len(self.shards):
            offset = start - (self.ends[n] - len(self.shards[n]))
            part = self.shards[n][offset:offset + length]
            parts.append(part.astype(np.int64))         # a copy: a view would keep the file open
            start, length, n = start + len(part), length - len(part), n + 1
        return np.concatenate(parts)
