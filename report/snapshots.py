"""What every head looked at, step by step: small pictures of the patterns in runs/NAME/heads/, so that looking back needs no checkpoint.

    passages.json               the texts that the heads were shown, token by token
    000050.npz                  tokens: trained on so far; pattern_0, pattern_1 …: of each passage, (L, H, T (T + 1) / 2) uint8,
                                the rows of the lower triangle, 255 for an attention of 1
"""

import contextlib
import json
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.batches import document_ids
from data.tokenizer import Tokenizer
from errors import UserError, first_line
from files import atomic_write
from model.config import ModelConfig
from model.gpt import GPT
from model.taps import taps
from report.viewer import Passage, Snapshot

LONGEST = 128           # tokens of a passage that are kept while training: patterns grow with its square
MOST = 64               # snapshots a run
PAGE_BYTES = 40e6       # of patterns in a page; they are deflated to about a half, and written in base64


def shown(config: ModelConfig, length: int) -> int:
    """How many of `length` tokens a page can show at once: 512 for 24 heads, fewer for more."""
    return min(length, int((24 * 512 ** 2 / (config.n_layers * config.n_heads)) ** 0.5))


def snapshots_of(config: ModelConfig, lengths: list[int]) -> int:
    """How many snapshots of passages of those lengths a page holds, at most MOST."""
    a_snapshot = config.n_layers * config.n_heads * sum(T * (T + 1) / 2 for T in lengths)
    return max(2, min(MOST, int(2 * PAGE_BYTES / a_snapshot)))


@torch.no_grad()
def patterns(model: GPT, passages: list[Tensor], separator: int | None = None) -> list[np.ndarray]:
    """The patterns of all heads on passages (T,) of token ids: (L, H, T, T) uint8 each. `separator`: begins documents that must not see
    each other."""
    found = []
    for passage in passages:
        with taps(model, "L*.pattern") as cache:
            model.hidden(passage[None], segments=document_ids(passage[None], separator))
        stacked = torch.stack([cache[f"L{layer}.pattern"][0] for layer in range(model.config.n_layers)])
        found.append((stacked.float() * 255).round().byte().cpu().numpy())
    return found


def spelled(ids: Tensor, tokenizer: Tokenizer) -> list[str]:
    """Tokens as text, one by one; control characters and bytes that are no whole character as \\xNN."""
    return [tokenizer.token_text(token) for token in ids.tolist()]


class Snapshots:
    """The folder runs/NAME/heads, written while training and read afterwards."""

    def __init__(self, folder: Path):
        self.folder = folder

    def begin(self, passages: list[Passage], ids: list[Tensor], step: int) -> None:
        """Note the passages, and forget what lies after `step`: it will be made again."""
        self.folder.mkdir(exist_ok=True)
        for path in self._files():
            if int(path.stem) > step:
                path.unlink()
        with atomic_write(self.folder / "passages.json", "w") as file:
            json.dump([{"title": p.title, "tokens": p.tokens, "ids": i.tolist()} for p, i in zip(passages, ids)], file)

    def save(self, snapshot: Snapshot) -> None:
        rows: dict[str, Any] = {f"pattern_{n}": pattern[..., *np.tril_indices(pattern.shape[-1])]
                                for n, pattern in enumerate(snapshot.patterns)}
        with atomic_write(self.folder / f"{snapshot.step:06d}.npz") as file:
            np.savez_compressed(file, tokens=snapshot.tokens, **rows)

    @property
    def passages(self) -> list[Passage]:
        path = self.folder / "passages.json"
        with _damaged(path):
            return [Passage(p["title"], p["tokens"]) for p in json.loads(path.read_text("utf-8"))] if path.exists() else []

    def __iter__(self) -> Iterator[Snapshot]:
        """Oldest first, one in memory at a time."""
        for path in self._files():
            with _damaged(path), np.load(path, allow_pickle=False) as saved:
                if (size := sum(member.file_size for member in saved.zip.infolist())) > 2 * PAGE_BYTES:     # asked before it is inflated
                    raise ValueError(f"{size:,} bytes of patterns")
                snapshot = Snapshot(int(path.stem), int(saved["tokens"]),
                                    [_square(saved[f"pattern_{n}"]) for n in range(len(saved.files) - 1)])
            yield snapshot

    def __len__(self) -> int:
        return len(self._files())

    def _files(self) -> list[Path]:
        return sorted((p for p in self.folder.glob("*.npz") if p.stem.isdigit()), key=lambda p: int(p.stem))


@contextlib.contextmanager
def _damaged(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, MemoryError, RecursionError,
            zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is damaged ({first_line(error)})\n"
                        f"  delete {path.parent if path.suffix == '.json' else path}: the report then goes without it") from None


def _square(rows: np.ndarray) -> np.ndarray:
    """The rows of lower triangles (…, T (T + 1) / 2) as matrices (…, T, T)."""
    T = int((2 * rows.shape[-1]) ** 0.5)
    pattern = np.zeros((*rows.shape[:-1], T, T), rows.dtype)
    pattern[..., *np.tril_indices(T)] = rows
    return pattern
