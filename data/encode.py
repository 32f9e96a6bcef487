"""Pieces of text → token ids, in order, on every core: in processes, since tiktoken holds Python's lock while it encodes."""

import hashlib
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from threading import Thread
from typing import NamedTuple

import numpy as np

from data.corpus import Piece
from data.tokenizer import Tokenizer
from errors import UserError

BATCH_BYTES = 2 ** 18           # what a process is given at a time


class Encoded(NamedTuple):
    piece: Piece
    split: str                  # train or val
    ids: np.ndarray             # (n,) uint16, uint32 for a large vocabulary


def encode_in_order(pieces: Iterator[Piece], tokenizer: Tokenizer, path: Path, fraction: float, cores: int) -> Generator[Encoded]:
    """What `pieces` become, a bounded way ahead; `path` is the tokenizer's file. One core encodes in this process.

    Close it where it is left early. Raises UserError where a process is killed.
    """
    batches = iter(lambda: list(until_bytes(pieces, BATCH_BYTES)), [])
    if cores == 1:
        here = Encoder(tokenizer, fraction)
        for batch in batches:
            yield from _divided(batch, *here([piece.text for piece in batch]))
        return
    # Spawned, not forked: the process that prepares may have threads, torch's say.
    pool = ProcessPoolExecutor(cores, multiprocessing.get_context("spawn"), _start, (path, fraction))
    ahead: deque = deque()
    try:
        while True:
            while len(ahead) < 3 * cores and (batch := next(batches, [])):
                ahead.append((batch, pool.submit(_encode, [piece.text for piece in batch])))
            if not ahead:
                return
            batch, future = ahead.popleft()
            yield from _divided(batch, *future.result())
    except BrokenProcessPool:
        raise UserError("a process that encodes text was killed (out of memory?)\n"
                        "  run again: it continues here; with `taskset -c 0` in front it takes one core and less memory") from None
    finally:
        pool.shutdown(cancel_futures=True)


def usable_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_validation(text: bytes, fraction: float) -> bool:
    """Which side of the split a piece falls on: by its own hash, so that neither re-runs nor new documents move it."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") < fraction * 2 ** 64


def until_bytes(pieces: Iterator[Piece], limit: int) -> Iterator[Piece]:
    """Pieces up to about `limit` bytes together."""
    total = 0
    for piece in pieces:
        yield piece
        total += len(piece.text)
        if total >= limit:
            return


class Encoder:
    """A batch of texts → their ids, one after another, how many each has, and which are held out."""

    def __init__(self, tokenizer: Tokenizer, fraction: float):
        self.tokenizer, self.fraction = tokenizer, fraction
        self.dtype = np.uint16 if tokenizer.n_vocab <= 2 ** 16 else np.uint32

    def __call__(self, texts: list[bytes]) -> tuple[np.ndarray, list[int], list[bool]]:
        ids = [self.tokenizer.encode(text) for text in texts]
        return np.concatenate(ids).astype(self.dtype), [len(one) for one in ids], [is_validation(text, self.fraction) for text in texts]


def _divided(batch: list[Piece], ids: np.ndarray, lengths: list[int], held_out: list[bool]) -> Iterator[Encoded]:
    end = 0
    for piece, length, validation in zip(batch, lengths, held_out):
        yield Encoded(piece, "val" if validation else "train", ids[end:(end := end + length)])


# --- in each of the processes ----------------------------------------------------------------------------------------

_encoder: Encoder


def _start(path: Path, fraction: float) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)            # Ctrl-C is for the one that asked
    Thread(target=_die_with_parent, daemon=True).start()
    _encoder = Encoder(Tokenizer.load(path), fraction)


def _die_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()                                       # one that is killed says no goodbye
    os._exit(1)


def _encode(texts: list[bytes]) -> tuple[np.ndarray, list[int], list[bool]]:
    return _encoder(texts)
