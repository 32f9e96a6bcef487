"""Pieces of text → token ids, in order, on every core: in processes, since tiktoken holds Python's lock while it encodes."""

import hashlib
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import cycle
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from errors import UserError

import numpy as np

from data.corpus import Piece
from data.load_tokenizer import load_tokenizer
from data.tokenizer import Tokenizer

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
    processes = [EncodingProcess(path, fraction) for _ in range(cores)]
    ahead: deque[tuple[list[Piece], Future]] = deque()
    try:
        for process in cycle(processes):
            while len(ahead) >= 3 * cores:
                batch, future = ahead.popleft()
                yield from _divided(batch, *future.result())
            if not (batch := next(batches, [])):
                break
            ahead.append((batch, process.submit([piece.text for piece in batch])))
        for batch, future in ahead:
            yield from _divided(batch, *future.result())
    finally:
        for process in processes:
            process.close()


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


# --- the processes ---------------------------------------------------------------------------------------------------

class EncodingProcess:
    """An Encoder in a process of its own, over a pipe of its own.

    The processes of a ProcessPoolExecutor send results through one queue. If one is killed in the middle of a result, the others and the
    reader wait for the rest of it forever. A pipe that has one writer ends with it.
    """

    def __init__(self, path: Path, fraction: float):
        spawned = multiprocessing.get_context("spawn")          # not forked: the process that prepares may have threads, torch's say
        self.pipe, its_end = spawned.Pipe()
        self.process = spawned.Process(target=_serve, args=(its_end, path, fraction), daemon=True)
        self.process.start()
        its_end.close()                                         # or the pipe would not end with the process
        self.thread = ThreadPoolExecutor(1)

    def submit(self, texts: list[bytes]) -> Future:
        """What Encoder returns for `texts`, one call after another. The result raises UserError if the process was killed."""
        return self.thread.submit(self._ask, texts)

    def _ask(self, texts: list[bytes]) -> tuple[np.ndarray, list[int], list[bool]]:
        try:
            self.pipe.send(texts)
            answer = self.pipe.recv()
        except (EOFError, OSError):
            raise UserError("a process that encodes text was killed (out of memory?)\n"
                            "  run again: it continues here; with `taskset -c 0` in front it takes one core and less memory") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        self.process.kill()                                     # which ends what the thread waits for
        self.thread.shutdown(cancel_futures=True)
        self.process.join()
        self.pipe.close()


def _serve(pipe: Connection, path: Path, fraction: float) -> None:
    """In the process: answer until the one that asks has closed its end, or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)                # Ctrl-C is for the one that asks
    encoder = Encoder(load_tokenizer(path), fraction)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            texts = pipe.recv()
            try:
                answer: object = encoder(texts)
            except Exception as error:
                answer = error
            pipe.send(answer)
