"""Pieces of text → token ids, in order, on every core.

In processes, not threads: tiktoken holds Python's lock while it encodes.
"""

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

BATCH_BYTES = 2 ** 18           # text that a process gets at a time


class Encoded(NamedTuple):
    piece: Piece
    split: str                  # train or val
    ids: np.ndarray             # (n,) uint16, uint32 for a large vocabulary


class EncodedBatch(NamedTuple):
    ids: np.ndarray             # (n,) of all texts, one after another
    lengths: list[int]          # of each text, in ids
    held_out: list[bool]        # whether each text is for validation


def encode_in_order(pieces: Iterator[Piece], tokenizer: Tokenizer, path: Path, val_fraction: float,
                    cores: int) -> Generator[Encoded]:
    """Encode `pieces` in order, a bounded number of them ahead. One core encodes in this process.

    `path` is the tokenizer's file. Close the generator if you stop early. Raises UserError if a
    process is killed.
    """
    if cores == 1:
        encoder = Encoder(tokenizer, val_fraction)
        for batch in batches_of_pieces(pieces):
            yield from split_by_piece(batch, encoder([piece.text for piece in batch]))
        return
    processes = [EncodingProcess(path, val_fraction) for _ in range(cores)]
    ahead: deque[tuple[list[Piece], Future[EncodedBatch]]] = deque()
    try:
        for batch, process in zip(batches_of_pieces(pieces), cycle(processes)):
            ahead.append((batch, process.submit([piece.text for piece in batch])))
            if len(ahead) >= 3 * cores:
                oldest, future = ahead.popleft()
                yield from split_by_piece(oldest, future.result())
        for oldest, future in ahead:
            yield from split_by_piece(oldest, future.result())
    finally:
        for process in processes:
            process.close()


def batches_of_pieces(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """`pieces` in lists of about BATCH_BYTES."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def split_by_piece(batch: list[Piece], encoded: EncodedBatch) -> Iterator[Encoded]:
    """The ids of each piece."""
    start = 0
    for piece, length, held_out in zip(batch, encoded.lengths, encoded.held_out):
        ids = encoded.ids[start:start + length]
        yield Encoded(piece, "val" if held_out else "train", ids)
        start += length


def usable_cores() -> int:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_validation(text: bytes, val_fraction: float) -> bool:
    """Which side of the split a piece is on: by its own hash.

    So neither another run nor new documents move it.
    """
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest, "big") < val_fraction * 2 ** 64


class Encoder:
    """Encodes a batch of texts and decides for each whether it is held out."""

    def __init__(self, tokenizer: Tokenizer, val_fraction: float):
        self.tokenizer, self.val_fraction = tokenizer, val_fraction
        self.dtype = np.uint16 if tokenizer.n_vocab <= 2 ** 16 else np.uint32

    def __call__(self, texts: list[bytes]) -> EncodedBatch:
        ids = [self.tokenizer.encode(text) for text in texts]
        return EncodedBatch(np.concatenate(ids).astype(self.dtype),
                            [len(text_ids) for text_ids in ids],
                            [is_validation(text, self.val_fraction) for text in texts])


# --- the processes --------------------------------------------------------------------------------

class EncodingProcess:
    """An Encoder in a process of its own, over a pipe of its own.

    The processes of a ProcessPoolExecutor send results through one queue. If one is killed in the
    middle of a result, the others and the reader wait for the rest of it forever. A pipe with one
    writer ends with its writer.
    """

    def __init__(self, path: Path, val_fraction: float):
        # Spawned, not forked: the parent may have threads, for example PyTorch's.
        context = multiprocessing.get_context("spawn")
        self.pipe, child_pipe = context.Pipe()
        self.process = context.Process(target=_serve, args=(child_pipe, path, val_fraction),
                                       daemon=True)
        self.process.start()
        child_pipe.close()                      # so that the pipe ends with the process
        self.thread = ThreadPoolExecutor(1)

    def submit(self, texts: list[bytes]) -> Future[EncodedBatch]:
        """Encode `texts` after those submitted before.

        The future raises UserError if the process is killed.
        """
        return self.thread.submit(self._request, texts)

    def _request(self, texts: list[bytes]) -> EncodedBatch:
        try:
            self.pipe.send(texts)
            answer = self.pipe.recv()
        except (EOFError, OSError):
            raise UserError("a process that encodes text was killed (out of memory?)\n"
                            "  run again: it continues here; with `taskset -c 0` in front it "
                            "takes one core and less memory") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        self.process.kill()                     # which also ends the thread's wait
        self.thread.shutdown(cancel_futures=True)
        self.process.join()
        self.pipe.close()


def _serve(pipe: Connection, path: Path, val_fraction: float) -> None:
    """The child's loop: answer requests until the parent closes its end or ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # Ctrl-C is handled by the parent
    encoder = Encoder(load_tokenizer(path), val_fraction)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            texts = pipe.recv()
            answer: EncodedBatch | Exception
            try:
                answer = encoder(texts)
            except Exception as error:
                answer = error
            pipe.send(answer)
