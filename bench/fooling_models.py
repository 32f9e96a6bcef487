"""Models that look as if they did induction and do not, and the gallery: all models that try to
fool the verdict, in both directions, each with the answers that are right by construction.

Each docstring says what a model is, and why an answer from patterns or losses would be wrong.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from bench.hand_built import (
    BEGIN,
    FLAG,
    HELD_OUT_PERIODS,
    LARGE,
    MATCH,
    ONE_BACK,
    OUT,
    POSITION,
    PREDICT,
    SHARP,
    SINK,
    TOKEN,
    TOKENS,
    TWO_BACK,
    Match,
    always,
    attend,
    blank,
    induction,
    look_back,
    looking_back,
    move,
    one_after,
    previous_token,
    read,
    read_one,
    same,
    to_position,
    unembed,
)
from bench.true_circuits import (
    begin_blocked,
    begin_gated,
    cool,
    expects_repeats,
    four_heads,
    half_vocabulary,
    honest,
    pointer,
    relayed,
    reversed_without_begin,
    shared_keys,
    sink,
    smeared,
    soft,
    tempered,
    token_before,
    twelve_heads,
    two_circuits,
    two_tokens,
    weak_suppressor,
    windowed,
    with_suppressor,
)
from induction.verdict import Answer, BehaviourAnswer, MechanismAnswer, TransferAnswer
from model.gpt import GPT
from model.taps import Head

# --- the answer is no -----------------------------------------------------------------------------

def look_back_17() -> GPT:
    """One layer that looks back by 17 tokens, whatever they are: the target of periods 9 and 18."""
    model = blank(n_layers=1)
    fixed_look_back(model, 0, 17)
    return model


def look_backs() -> GPT:
    """One layer, a head with a fixed look-back for each of the held-out periods."""
    model = blank(n_layers=1, n_heads=len(HELD_OUT_PERIODS))
    for index, period in enumerate(HELD_OUT_PERIODS):
        fixed_look_back(model, index, period - 1)
    return model


def fixed_look_back(model: GPT, index: int, distance: int) -> None:
    attend(model, Head(0, index), look_back(distance))
    move(model, Head(0, index), read(TOKEN), OUT, PREDICT)


def periods_only() -> GPT:
    """Attends to the target only if it is at one of the four distances that the periodic probe has.
    Anything else goes to a sink. So it needs the right token and the right distance."""
    model = blank(d_head=LARGE)
    previous_token(model)
    distances = torch.stack([looking_back(period - 1) for period in HELD_OUT_PERIODS]).sum(0)
    induction(model, 0, PREDICT, Match(distances, read(POSITION), MATCH),
              to_position(0, 1.5 * MATCH + SHARP))
    return model


def idle_attention() -> GPT:
    """The honest model with W_O × 0.05: perfect attention that moves nothing."""
    return scaled_output(0.05)


def nearly_idle_attention() -> GPT:
    """The honest model with W_O × 0.01: what repeating is worth is so small that any fraction of it
    is noise."""
    return scaled_output(0.01)


def anti_induction() -> GPT:
    """The honest model with W_O negated: it attends to the target and suppresses it."""
    return scaled_output(-1)


def scaled_output(factor: float) -> GPT:
    model = honest()
    with torch.no_grad():
        model.blocks[1].attn.w_o.weight *= factor
    return model


def outvoted() -> GPT:
    """A copying head, and one with the same attention that suppresses 1.3 times as strongly."""
    return with_suppressor(1.3)


def translated() -> GPT:
    """Attends to the target and predicts another token, always the same one for each: perfect
    attention, and always wrong."""
    model = honest()
    move(model, Head(1, 0), read(TOKEN).roll(1, 0), OUT, PREDICT)
    return model


def memoriser() -> GPT:
    """Each token predicts its successor in the blocks that were trained on, and layer 1 has the
    honest circuit's attention but writes next to nothing."""
    model = scaled_output(0.01)
    with torch.no_grad():
        unembed(model)[:TOKENS, :TOKENS] += PREDICT * torch.eye(TOKENS).roll(1, 0)
    return model


def unigram() -> GPT:
    """One layer that raises all tokens of the context alike: known tokens cost several nats less
    than the first copy, but which of them comes next it does not know."""
    model = blank(n_layers=1, prior=0)
    move(model, Head(0, 0), read(TOKEN), OUT, 4 * PREDICT)
    return model


def content_blind() -> GPT:
    """One head attends to the whole context but the begin token, another only to that token."""
    model = blank(n_layers=1, n_heads=2)
    attend(model, Head(0, 0), Match(always(), read_one(TOKEN, BEGIN), -SHARP))
    attend(model, Head(0, 1), Match(always(), read_one(TOKEN, BEGIN), SHARP))
    for index in (0, 1):
        move(model, Head(0, index), read(TOKEN), OUT, PREDICT)
    return model


def cold() -> GPT:
    """The honest model with W_U × 0.01: the likeliest token is still right, but the model hardly
    prefers it, so it is worse than guessing among the tokens that occur. Weak, by our definition:
    a model of next tokens predicts by probabilities, not by their order."""
    return tempered(0.01)


def target_plus_one() -> GPT:
    """Predicts as induction heads do, but attends one token after the target. Layer 0 gives every
    position the tokens one and two back; layer 1 looks for its own token two back, and reads the
    token one back there. Training finds such circuits too, five tokens after the target for
    example."""
    model = blank(n_heads=2)
    previous_token(model)
    previous_token(model, 1, distance=2, target=TWO_BACK)
    one_after(model, 0)
    return model


def flag_only() -> GPT:
    """Layer 1 attends to targets, but reads only that there is one; layer 2 then predicts by the
    circuit of `target_plus_one`. Without the induction edges everything fails, yet they carry no
    token: no head both attends to the target and copies it."""
    model = blank(n_layers=3, n_heads=2)
    previous_token(model)
    previous_token(model, 1, distance=2, target=TWO_BACK)
    attend(model, Head(1, 0), same(ONE_BACK, 2 * MATCH), to_position(0, MATCH))
    move(model, Head(1, 0), always() - read_one(POSITION), FLAG)
    one_after(model, 0, 2, to_position(0, SINK, always() - read(FLAG)))
    return model


def redundant() -> GPT:
    """The honest circuit, and beside it that of `target_plus_one`; each is enough. Induction heads
    are there and predict, but nothing is lost without them."""
    model = blank(n_heads=2)
    previous_token(model)
    previous_token(model, 1, distance=2, target=TWO_BACK)
    induction(model, 0)
    one_after(model, 1)
    return model


def short_sighted() -> GPT:
    """An honest circuit whose induction head sees 12 tokens: most targets are further away."""
    model = blank(window=[2, 12])
    previous_token(model)
    induction(model)
    return model


# --- the gallery ----------------------------------------------------------------------------------

class Truth(NamedTuple):
    """The answers that are right for a model."""

    behaviour: BehaviourAnswer
    mechanism: MechanismAnswer
    periods: TransferAnswer
    tokens: TransferAnswer
    answer: Answer


class Entry(NamedTuple):
    build: Callable[[], GPT]
    truth: Truth

    @property
    def name(self) -> str:
        return self.build.__name__


GALLERY = [
    Entry(honest, Truth("yes", "yes", "yes", "yes", "yes")),
    Entry(soft, Truth("yes", "yes", "yes", "yes", "yes")),
    Entry(four_heads, Truth("yes", "yes", "yes", "yes", "yes")),
    Entry(twelve_heads, Truth("yes", "yes", "yes", "yes", "yes")),
    Entry(sink, Truth("yes", "yes", "yes", "yes", "yes")),
    Entry(shared_keys, Truth("yes", "yes", "yes", "yes", "yes")),
    Entry(smeared, Truth("yes", "yes", "yes", "yes", "yes")),
    Entry(windowed, Truth("yes", "yes", "yes", "yes", "yes")),
    Entry(cool, Truth("yes", "yes", "yes", "yes", "yes")),
    Entry(weak_suppressor, Truth("yes", "yes", "yes", "yes", "yes")),
    Entry(expects_repeats, Truth("yes", "yes", "yes", "yes", "yes")),
    Entry(pointer, Truth("yes", "yes", "yes", "yes", "yes")),
    Entry(relayed, Truth("yes", "yes", "yes", "yes", "yes")),
    Entry(two_tokens, Truth("yes", "yes", "yes", "yes", "yes")),
    Entry(token_before, Truth("yes", "yes", "yes", "yes", "yes")),
    Entry(half_vocabulary, Truth("yes", "yes", "yes", "no", "yes")),
    Entry(begin_gated, Truth("only with begin token", "yes", "yes", "yes", "partly")),
    Entry(begin_blocked, Truth("only without begin token", "yes", "yes", "yes", "partly")),
    Entry(reversed_without_begin, Truth("only with begin token", "yes", "yes", "yes", "partly")),
    Entry(two_circuits, Truth("yes", "only with begin token", "yes", "yes", "partly")),
    Entry(look_back_17, Truth("no", "no", "no", "no", "no")),
    Entry(look_backs, Truth("no", "no", "no", "no", "no")),
    Entry(periods_only, Truth("weak", "no", "no", "no", "no")),
    Entry(idle_attention, Truth("no", "attention only", "no", "no", "no")),
    Entry(nearly_idle_attention, Truth("no", "attention only", "no", "no", "no")),
    Entry(anti_induction, Truth("no", "attention only", "no", "no", "no")),
    Entry(outvoted, Truth("no", "attention only", "no", "no", "no")),
    Entry(translated, Truth("no", "attention only", "no", "no", "no")),
    Entry(memoriser, Truth("no", "attention only", "no", "no", "no")),
    Entry(unigram, Truth("no", "no", "no", "no", "no")),
    Entry(content_blind, Truth("no", "no", "no", "no", "no")),
    Entry(cold, Truth("weak", "attention only", "no", "no", "no")),
    Entry(target_plus_one, Truth("yes", "another", "yes", "yes", "no")),
    Entry(flag_only, Truth("yes", "another", "yes", "yes", "no")),
    Entry(redundant, Truth("yes", "another", "yes", "yes", "no")),
    Entry(short_sighted, Truth("weak", "yes", "no", "no", "no")),
]
