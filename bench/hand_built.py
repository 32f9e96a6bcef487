"""Small attention-only transformers whose weights are set by hand, so that what each head does is
known exactly.

The residual stream has named parts that do not overlap: the token of a position, the tokens before
it, the position itself, the prediction, and two flags. A head matches one part of its query with
one part of its keys (`Match`), and moves one part of what it attends to into another (`move`).
Norms are the identity: norm_eps is so large that they divide by its root whatever they read, and
their gains are that root.
"""

from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from data.batches import repeat_vocabulary
from data.config import DataConfig, RepeatsConfig
from data.tokenizer import Tokenizer
from induction.probe_set import Probes, probes_of
from model.config import ModelConfig
from model.gpt import GPT
from model.taps import Head

TOKENS = 48                     # ordinary tokens, ids 0 … 47
BEGIN = TOKENS                  # the token that begins a text
V, C = TOKENS + 1, 48           # vocabulary and context length
SMALL = V + 3                   # head size: room to match tokens or positions, and three flags
LARGE = V + C + 3               # to match both
ROOT_EPS = 1e4                  # √norm_eps, and the gain of every norm

SHARP = 20.0                    # a score that leaves other keys no weight
MATCH = 8.0                     # an induction head's score for its targets: weight 0.98 among 64
PREDICT = 16.0                  # logits that an induction head adds to what it attends to
PRIOR = 1.5                     # standard deviation of the logits that each token predicts, random


HELD_OUT_PERIODS = (9, 11, 18, 22)      # two are multiples of others: one look-back meets two
DATA = DataConfig(corpus="repeats", repeats=RepeatsConfig(
    period=[8, 23], held_out_periods=list(HELD_OUT_PERIODS), held_out_tokens=0.25))
SEED = 0


class Part(NamedTuple):
    """Some numbers of the residual stream."""

    start: int
    size: int

    @property
    def end(self) -> int:
        return self.start + self.size


TOKEN = Part(0, V)                          # one-hot: the token of this position
ONE_BACK = Part(TOKEN.end, V)               # the token before, after a head has moved it here
TWO_BACK = Part(ONE_BACK.end, V)            # the token two before
POINTER = Part(TWO_BACK.end, C)             # a position that an earlier layer points to
POSITION = Part(POINTER.end, C)             # one-hot: this position
OUT = Part(POSITION.end, V)                 # the prediction: W_U reads this part
FLAG = Part(OUT.end, 1)
E = FLAG.end


# --- linear maps from the residual stream: (n, E) each -------------------------------------------

def read(part: Part) -> Tensor:
    """All numbers of a part: (size, E)."""
    rows = torch.zeros(part.size, E)
    rows[:, part.start:part.end] = torch.eye(part.size)
    return rows


def read_one(part: Part, index: int = 0) -> Tensor:
    """One number of a part: (1, E)."""
    return read(part)[index:index + 1]


def always() -> Tensor:
    """1 at every position: (1, E)."""
    return read(POSITION).sum(0, keepdim=True)


def looking_back(distance: int) -> Tensor:
    """The position `distance` tokens earlier, one-hot; nothing if there is none: (C, E)."""
    rows = torch.zeros(C, E)
    rows[:, POSITION.start:POSITION.end] = torch.eye(C).roll(distance, 1).triu(distance)
    return rows


def next_position() -> Tensor:
    """The position after a key's own, one-hot: (C, E)."""
    rows = torch.zeros(C, E)
    rows[1:, POSITION.start:POSITION.end] = torch.eye(C)[:-1]
    return rows


# --- attention scores -----------------------------------------------------------------------------

class Match(NamedTuple):
    """One term of an attention score: `strength` · query(x_i) · key(x_j)."""

    query: Tensor               # (n, E)
    key: Tensor                 # (n, E)
    strength: float


def look_back(distance: int, strength: float = SHARP) -> Match:
    """To the token a fixed distance back, whatever it is."""
    return Match(looking_back(distance), read(POSITION), strength)


def same(key: Part, strength: float = MATCH, query: Part = TOKEN) -> Match:
    """To keys at which a part holds what `query` holds here."""
    return Match(read(query), read(key), strength)


def to_position(index: int, strength: float, query: Tensor | None = None) -> Match:
    """To one position (a sink, or with a negative strength the opposite), if `query` is 1."""
    return Match(always() if query is None else query, read_one(POSITION, index), strength)


SINK = 2 * MATCH + SHARP                # more than a match, at a position that is no match
NO_BEGIN = always() - read(FLAG)        # a query that is 1 without the begin token
# Nothing precedes position 0, so there the head that looks one back reads the token itself.
NOT_FIRST = to_position(0, -SHARP)


# --- models ---------------------------------------------------------------------------------------

@torch.no_grad()
def blank(n_layers: int = 2, n_heads: int = 1, prior: float = PRIOR, seed: int = 0,
          **shape: object) -> GPT:
    """A model without heads: it predicts from the current token alone, by random logits."""
    config = {"n_layers": n_layers, "n_heads": n_heads, "d_model": E, "d_head": SMALL, "n_ctx": C,
              "vocab_size": V, "mlp": "none", "position": "learned", "norm_eps": ROOT_EPS ** 2}
    model = GPT(ModelConfig.model_validate(config | shape))
    for name, p in model.named_parameters():
        p.fill_(ROOT_EPS if name.endswith("gain") else 0.0)
    assert model.embed_position is not None
    model.embed.weight.copy_(read(TOKEN))
    model.embed_position.weight.copy_(read(POSITION))
    draw = torch.Generator().manual_seed(seed)
    unembed(model).copy_(read(OUT))
    unembed(model)[:, TOKEN.start:TOKEN.end] = prior * torch.randn(V, V, generator=draw)
    return model


def unembed(model: GPT) -> Tensor:
    """W_U (V, E)."""
    assert model.lm_head is not None
    return model.lm_head.weight


@torch.no_grad()
def attend(model: GPT, head: Head, *matches: Match) -> None:
    """Set where a head attends: the sum of `matches` is its score before the softmax."""
    root = model.config.head_size ** 0.5            # attention divides scores by it
    query = torch.cat([match.strength * root * match.query for match in matches])
    key = torch.cat([match.key for match in matches])
    attn, size = model.blocks[head.layer].attn, model.config.head_size
    put(attn.w_q.weight, head.index, size, query)
    put(attn.w_k.weight, head.key_head(model.config), size, key)


@torch.no_grad()
def move(model: GPT, head: Head, source: Tensor, target: Part, gain: float = 1.0) -> None:
    """Set what a head does with what it attends to: `source` (n, E) of it goes to a part of n
    numbers, times `gain`."""
    attn, size = model.blocks[head.layer].attn, model.config.head_size
    put(attn.w_v.weight, head.key_head(model.config), size, source)
    columns = attn.w_o.weight[:, head.index * size:(head.index + 1) * size]         # (E, D)
    columns.zero_()
    columns[target.start:target.end, :target.size] = gain * torch.eye(target.size)


def put(weight: Tensor, head: int, size: int, rows: Tensor) -> None:
    """Write the rows (n, E) of one head into a matrix (heads · size, E); its other rows are 0."""
    if len(rows) > size:
        raise ValueError(f"{len(rows)} numbers do not fit into a head of {size}")
    weight[head * size:(head + 1) * size] = 0
    weight[head * size:head * size + len(rows)] = rows


# --- heads ----------------------------------------------------------------------------------------

def token_but_first() -> Tensor:
    """The token of a key, minus the one before it. At position 0, where the head that looks one
    back reads the token itself, that is nothing, so position 0 can be a sink: (V, E)."""
    return read(TOKEN) - read(ONE_BACK)


def previous_token(model: GPT, index: int = 0, distance: int = 1,
                   target: Part = ONE_BACK) -> None:
    """A head of layer 0 that moves the token `distance` back."""
    head = Head(0, index)
    attend(model, head, look_back(distance))
    move(model, head, read(TOKEN), target)


def note_begin(model: GPT, index: int = 1) -> None:
    """A head of layer 0 that raises the flag behind the begin token."""
    head = Head(0, index)
    attend(model, head, Match(always(), read_one(TOKEN, BEGIN), SHARP))
    move(model, head, read_one(TOKEN, BEGIN), FLAG)


def induction(model: GPT, index: int = 0, gain: float = PREDICT, *gates: Match,
              match: Match | None = None) -> None:
    """A head of layer 1 that attends to tokens after earlier copies of its own and predicts them;
    `gates` are further terms of its score, and position 0 is its sink."""
    head = Head(1, index)
    attend(model, head, same(ONE_BACK) if match is None else match, NOT_FIRST, *gates)
    move(model, head, token_but_first() if gates else read(TOKEN), OUT, gain)


def one_after(model: GPT, index: int, layer: int = 1, *gates: Match) -> None:
    """A head that predicts the same by another route: it attends one token after the target, where
    the token two back is its own, and reads the token one back there. It needs both in layer 0."""
    head = Head(layer, index)
    attend(model, head, same(TWO_BACK), NOT_FIRST, to_position(1, -SHARP), *gates)
    move(model, head, read(ONE_BACK) - read(TOKEN), OUT, PREDICT)


# --- what they are measured on --------------------------------------------------------------------

class Alphabet:
    """As much of a tokenizer as probes need."""

    begin = BEGIN
    ordinary_ids = np.arange(TOKENS)


def probes(rows: int = 8) -> Probes:
    """The probes of a run that repeats blocks of 8 to 23 tokens, without four periods and a quarter
    of the tokens."""
    made = probes_of(DATA, C, cast("Tokenizer", Alphabet()), SEED, rows)
    assert made is not None
    return made


def never_repeated() -> np.ndarray:
    """The ids of the tokens that this training never repeats."""
    return repeat_vocabulary(DATA.repeats, Alphabet.ordinary_ids, SEED)[1]
