"""Small models that do induction, most of them in ways that an attention pattern does not show.
What each does is known by construction (bench/hand_built.py).

The layout of most is a previous-token head in layer 0 and an induction head in layer 1.
bench/fooling_models.py says what the verdict ought to find.
"""

import torch

from bench.hand_built import (
    FLAG,
    LARGE,
    MATCH,
    NO_BEGIN,
    ONE_BACK,
    OUT,
    POINTER,
    POSITION,
    PREDICT,
    SHARP,
    SINK,
    TOKEN,
    TWO_BACK,
    Match,
    V,
    attend,
    blank,
    induction,
    look_back,
    move,
    never_repeated,
    next_position,
    note_begin,
    one_after,
    previous_token,
    read,
    same,
    to_position,
    token_but_first,
    unembed,
)
from model.gpt import GPT
from model.taps import Head

# --- the answer is yes ----------------------------------------------------------------------------

def honest() -> GPT:
    """A previous-token head, and a head that attends to tokens after earlier copies of the current
    one and predicts them. On top of it each token predicts others at random, as a model of text
    would."""
    model = blank()
    previous_token(model)
    induction(model)
    return model


def soft() -> GPT:
    """The honest model with queries × 0.25 and W_O × 3: prefix matching is far below 1, but what
    little attention goes to the target is written out large."""
    model = honest()
    attn = model.blocks[1].attn
    with torch.no_grad():
        attn.w_q.weight[:V] *= 0.25
        attn.w_o.weight *= 3
    return model


def four_heads() -> GPT:
    """Each of four heads serves a quarter of the tokens: no head has high prefix matching."""
    return specialists(4)


def twelve_heads() -> GPT:
    """Each of twelve heads serves a twelfth of the tokens: all have nearly the prefix matching of
    uniform attention, and together they do induction for every token."""
    return specialists(12)


def specialists(n: int) -> GPT:
    """Head h of layer 1 looks for matches only of the tokens t with t mod n = h."""
    model = blank(n_heads=n)
    previous_token(model)
    for head in range(n):
        query = read(TOKEN)
        query[torch.arange(V) % n != head] = 0
        induction(model, head, match=Match(query, read(ONE_BACK), MATCH))
    return model


def sink() -> GPT:
    """An attention sink on the first token takes 95% of the weight; it writes nothing, and W_O is
    20 times as large."""
    model = blank()
    previous_token(model)
    attend(model, Head(1, 0), same(ONE_BACK), to_position(0, MATCH + 3))
    move(model, Head(1, 0), token_but_first(), OUT, 20 * PREDICT)
    return model


def shared_keys() -> GPT:
    """The honest circuit with grouped queries: four query heads share the keys and values of one.
    The others attend uniformly and write nothing."""
    model = blank(n_heads=4, n_kv_heads=1)
    previous_token(model, 1)
    induction(model, 2)
    return model


def smeared() -> GPT:
    """One layer whose keys are those of the token before (smear with α → −∞): no previous-token
    head is needed. Induction heads in one layer, which is why smeared keys are no control."""
    model = blank(n_layers=1, smear=True)
    attn = model.blocks[0].attn
    assert attn.smear_alpha is not None
    with torch.no_grad():
        attn.smear_alpha.fill_(-SHARP)
    head = Head(0, 0)
    attend(model, head, same(TOKEN))
    move(model, head, read(TOKEN), OUT, PREDICT)
    return model


def windowed() -> GPT:
    """The honest circuit; layer 0 sees two tokens only, which is all that a previous-token head
    needs."""
    model = blank(window=[2, None])
    previous_token(model)
    induction(model)
    return model


def cool() -> GPT:
    """The honest model with W_U × 0.15: it is less certain, but the likeliest token is the same,
    and repeating is still worth more than a nat. A change of temperature changes no mechanism."""
    return tempered(0.15)


def tempered(factor: float) -> GPT:
    """The honest model with W_U times a factor."""
    model = honest()
    with torch.no_grad():
        unembed(model).mul_(factor)
    return model


def weak_suppressor() -> GPT:
    """The honest circuit, and a head with the same attention that suppresses half as strongly."""
    return with_suppressor(0.5)


def with_suppressor(strength: float) -> GPT:
    model = blank(n_heads=2)
    previous_token(model)
    induction(model, 0)
    induction(model, 1, gain=-strength * PREDICT)
    return model


def expects_repeats() -> GPT:
    """The honest model, and a head that raises every token of the context by far too much: what
    comes first is predicted much worse than by guessing. That adds to the difference between first
    and later copies, but it is nothing that repetition is worth."""
    model = blank(n_heads=2)
    previous_token(model)
    induction(model, 0, gain=2 * PREDICT)
    move(model, Head(1, 1), read(TOKEN), OUT, 10 * PREDICT)
    return model


def pointer() -> GPT:
    """The other known induction circuit: layer 0 finds the earlier copy of the current token and
    notes the position after it; layer 1 attends there. Queries compose instead of keys, and no head
    looks one token back. It still attends to the target and copies it."""
    model = blank(d_head=LARGE)
    not_itself = look_back(0, -3 * MATCH)
    attend(model, Head(0, 0), same(TOKEN, 2 * MATCH), not_itself)
    move(model, Head(0, 0), next_position(), POINTER)
    attend(model, Head(1, 0), Match(read(POINTER), read(POSITION), MATCH))
    move(model, Head(1, 0), read(TOKEN), OUT, PREDICT)
    return model


def relayed() -> GPT:
    """The induction head writes into a part that W_U does not read; layer 2 carries it over. By its
    own weights the head copies nothing."""
    model = blank(n_layers=3)
    previous_token(model)
    induction(model)
    move(model, Head(1, 0), read(TOKEN), TWO_BACK)
    attend(model, Head(2, 0), look_back(0))
    move(model, Head(2, 0), read(TWO_BACK), OUT, PREDICT)
    return model


def two_tokens() -> GPT:
    """Matches need the current token and the one before, anything less goes to a sink: induction
    with a prefix of two. It misses the first token after every seam."""
    model = blank(n_heads=2, d_head=LARGE)
    previous_token(model, 0)
    previous_token(model, 1, distance=2, target=TWO_BACK)
    induction(model, 0, PREDICT, same(TWO_BACK, query=ONE_BACK),
              to_position(0, 1.5 * MATCH + SHARP))
    return model


def token_before() -> GPT:
    """Attends to the target, but finds it by the token before the current one: where that stood two
    earlier. It misses the first token after every seam, so it must not be too sure of itself. It
    attends to what followed the earlier copy and copies it: that is all the definition asks."""
    model = blank(n_heads=2)
    previous_token(model, 0)
    previous_token(model, 1, distance=2, target=TWO_BACK)
    attend(model, Head(1, 0), same(TWO_BACK, query=ONE_BACK), to_position(0, MATCH / 2))
    move(model, Head(1, 0), token_but_first(), OUT, PREDICT / 2)
    return model


def half_vocabulary() -> GPT:
    """Induction only for the tokens that training repeats: yes, and it transfers to no others."""
    model = blank()
    previous_token(model)
    query = read(TOKEN)
    query[torch.from_numpy(never_repeated())] = 0
    induction(model, match=Match(query, read(ONE_BACK), MATCH))
    return model


# --- partly ---------------------------------------------------------------------------------------

def begin_gated() -> GPT:
    """The honest circuit, but only behind the begin token. Layer 0 notes whether there is one; if
    not, a sink takes the induction head's attention."""
    model = blank(n_heads=2, d_head=LARGE)
    previous_token(model)
    note_begin(model)
    induction(model, 0, PREDICT, to_position(0, SINK, NO_BEGIN))
    return model


def begin_blocked() -> GPT:
    """The honest circuit, but only without the begin token, behind which a sink takes the induction
    head's attention."""
    model = blank(n_heads=2, d_head=LARGE)
    previous_token(model)
    note_begin(model)
    induction(model, 0, PREDICT, to_position(0, SINK, read(FLAG)))
    return model


def reversed_without_begin() -> GPT:
    """Behind the begin token the honest circuit; without it another head, which attends alike,
    suppresses four times as strongly. Over both kinds of rows together, repeating gains nothing."""
    model = blank(n_heads=2, d_head=LARGE)
    previous_token(model)
    note_begin(model)
    induction(model, 0)
    induction(model, 1, -4 * PREDICT, to_position(0, SINK, read(FLAG)))
    return model


def two_circuits() -> GPT:
    """Behind the begin token an induction head, without it the circuit of `target_plus_one`, which
    attends to no target. Over both kinds of rows together, induction edges carry half the gain."""
    model = blank(n_heads=3, d_head=LARGE)
    previous_token(model)
    note_begin(model)
    previous_token(model, 2, distance=2, target=TWO_BACK)
    induction(model, 0, PREDICT, to_position(0, SINK, NO_BEGIN))
    one_after(model, 1, 1, to_position(0, SINK, read(FLAG)))
    return model
