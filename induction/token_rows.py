"""The user's own input to a run's heads: text or token ids, as rows of tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from errors import UserError

import torch
from torch import Tensor

from data.text_encoding import decode_text
from data.tokenizer import Tokenizer
from training.loaded_run import LoadedRun


class TokenRows(NamedTuple):
    """Token sequences of different lengths, padded on the right."""

    tokens: Tensor          # (B, T)
    queries: Tensor         # (B, T) bool: real tokens with an earlier key

    @property
    def real(self) -> Tensor:
        """(B, T) bool: what is no padding."""
        return torch.cat([torch.ones_like(self.queries[:, :1]), self.queries[:, 1:]], dim=1)

    @property
    def first(self) -> Tensor:
        """The first sequence without padding: (its length,)."""
        return self.tokens[0][:self.queries[0].sum() + 1]


def given_rows(run: LoadedRun, *, text: str | None = None, file: str | None = None,
               tokens: str | None = None) -> TokenRows | None:
    """Rows for a run's model from the options --text, --file or --tokens (a file of ids); None if
    none is given. Raises UserError for input that the model cannot read."""
    n_ctx, n_vocab = run.model.config.n_ctx, len(run.model.embed.weight)
    if tokens is not None:
        given = f"--tokens {tokens}"
        rows = rows_of_ids(read(tokens, "--tokens"), given, n_vocab, n_ctx)
    elif file is not None:
        given = f"--file {file}"
        rows = rows_of_text(read(file, "--file"), run.tokenizer, n_ctx)
    elif text is not None:
        given = f"--text {text}"
        rows = rows_of_text(text, run.tokenizer, n_ctx)
    else:
        return None
    padded = pad_rows(rows)
    if padded is None:
        raise UserError(f"{given[:50]}: at most one token, and attention needs two\n  give more")
    return padded


def read(path: str, option: str) -> str:
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{option} {path!r}: cannot be read ({error.strerror})") from None
    text = decode_text(raw, f"{option} {path}")
    if "\0" in text:
        raise UserError(f"{option} {path}: is not a text file (it contains zero bytes)")
    return text


def rows_of_text(text: str, tokenizer: Tokenizer, n_ctx: int) -> list[list[int]]:
    """The text's tokens, cut into rows of at most `n_ctx`."""
    ids = tokenizer.encode(text).tolist()
    return [ids[n:n + n_ctx] for n in range(0, len(ids), n_ctx)]


def rows_of_ids(text: str, where: str, n_vocab: int, n_ctx: int) -> list[list[int]]:
    """The sequences of token ids in `text`, one per line; a UserError for a line that is no such
    sequence, naming `where`."""
    return [ids_of_line(line, f"{where}, line {n}", n_vocab, n_ctx)
            for n, line in enumerate(text.splitlines(), 1) if line.strip()]


def ids_of_line(line: str, where: str, n_vocab: int, n_ctx: int) -> list[int]:
    try:
        ids = [int(word) for word in line.replace(",", " ").strip(" []\t\r").split()]
    except ValueError:
        raise UserError(f"{where}: {line.strip()[:40]!r} is not a list of token ids") from None
    if wrong := [token for token in ids if not 0 <= token < n_vocab]:
        raise UserError(f"{where}: there is no token {wrong[0]} (the vocabulary has {n_vocab})")
    if len(ids) > n_ctx:
        raise UserError(f"{where}: {len(ids)} tokens are more than the model's context of {n_ctx}")
    return ids


def pad_rows(rows: Sequence[list[int]]) -> TokenRows | None:
    """Rows of two tokens or more as one tensor; None if there are none: attention needs two."""
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        return None
    T = max(len(row) for row in rows)
    # Padding on the right changes no score: attention is causal.
    tokens = torch.tensor([row + [0] * (T - len(row)) for row in rows])
    queries = torch.tensor([[0 < t < len(row) for t in range(T)] for row in rows])
    return TokenRows(tokens, queries)
