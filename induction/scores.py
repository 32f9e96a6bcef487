"""What each head attends to, what it copies, and which heads it is built on.

Attention weights show what was averaged, not what was used: induction/ablation.py asks that. The scores that look at the pattern come
from q, k and lse in O(T) memory (kernels/head_statistics.py); those that look at weights never hold a V × V or an E × E × H matrix.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from induction.probes import Repeats
from kernels.head_statistics import REACH, head_statistics
from model.circuits import embedding, readers, unembedding, writers
from model.cross_entropy import cross_entropies
from model.gpt import GPT
from model.taps import taps

SCORES = {                              # name → what it says of a head, for readers of tables and pages
    "prefix_matching": "attention on tokens that follow an earlier copy of the current one (a perfect induction head: 1)",
    "latest_match": "the part of it on the latest such token",
    "previous_token": "attention on the token before",
    "duplicate_token": "attention on earlier copies of the token itself",
    "first_token": "attention on the first token (a sink)",
    "entropy": "of the rows of the pattern, relative to uniform: 0 one key, 1 all alike",
    "distance": "mean look-back, in tokens",
    "copying": "whether what the head writes raises the token it read: 1 that one alone, −1 never",
}


class Look(NamedTuple):
    """One tapped pass: scores by name, (L, H) float64 on the CPU; the offset profile (L, H, 2 · REACH + 1); the last hidden state."""

    scores: dict[str, Tensor]
    offset_profile: Tensor
    final: Tensor


@torch.no_grad()
def attention_scores(model: GPT, tokens: Tensor, queries: Tensor) -> Look:
    """What every head attends to, averaged over the rows of its pattern that `queries` (B, T) bool names; tokens (B, T).

    Definitions: Olsson et al. 2022, "In-context Learning and Induction Heads", appendix. Entropy is divided by the log of the number of
    keys that its row sees. The offset profile is attention around the induction target, position by position.
    """
    with taps(model, ["L*.q", "L*.k", "L*.lse"]) as cache:
        final = model.hidden(tokens)
    share = queries.cpu().double()
    share = share / share.sum().clamp(min=1)
    seen = torch.arange(1, tokens.shape[1] + 1).double()
    layers, profiles = [], []
    for layer, window in enumerate(model.config.windows):
        of = head_statistics(cache[f"L{layer}.q"], cache[f"L{layer}.k"], cache[f"L{layer}.lse"], tokens, window=window)
        rows = {name: row.cpu().double() for name, row in of._asdict().items()}         # (B, H, T), the profile's (B, H, T, offsets)
        rows["entropy"] /= seen.clamp(max=window or len(seen)).log().clamp(min=1e-9)     # a row that sees one key has no entropy
        means = {name: torch.einsum("bht...,bt->h...", row, share) for name, row in rows.items()}
        profiles.append(means.pop("offset_profile"))
        layers.append(means | {"latest_match": profiles[-1][:, REACH]})
    scores = {name: torch.stack([means[name] for means in layers]) for name in SCORES if name in layers[0]}
    return Look(scores, torch.stack(profiles), final)


def score_text(model: GPT, tokens: Tensor) -> Look:
    """`attention_scores` of any text (B, T), over all queries with at least one earlier key."""
    queries = torch.ones_like(tokens, dtype=torch.bool)
    queries[:, 0] = False
    return attention_scores(model, tokens, queries)


class Measured(NamedTuple):
    """A model on a probe: scores (L, H), offset profile (L, H, 2 · REACH + 1), and losses in nats."""

    scores: dict[str, Tensor]
    offset_profile: Tensor
    loss_first: float           # in the first copy, where nothing can be known
    loss_second: float          # in the second, where everything can


def measure(model: GPT, probe: Repeats, unrepeated: Tensor) -> Measured:
    """All scores of all heads on repeated random tokens, and what repeating is worth."""
    look = attention_scores(model, probe.tokens, probe.queries)
    return Measured(look.scores | {"copying": copying(model, unrepeated)}, look.offset_profile, *repeat_losses(model, probe, look.final))


@torch.no_grad()
def repeat_losses(model: GPT, probe: Repeats, final: Tensor | None = None) -> tuple[float, float]:
    """Mean loss inside the first and the second copy, in nats; `final`: the last hidden state, where it is at hand."""
    final = model.hidden(probe.tokens) if final is None else final
    targets = probe.tokens[:, 1:]
    losses = cross_entropies(final[:, :-1].flatten(0, 1), model.unembedding, targets.flatten()).view(targets.shape).double()
    return losses[probe.first_copy].mean().item(), losses[probe.second_copy].mean().item()


def icl_score(losses: Tensor) -> float | None:
    """How much later tokens are easier than early ones: mean loss late minus mean loss early, in nats, of losses (N, T) on text.

    Token 500 minus token 50 (Olsson et al. 2022) where there are so many; in a shorter context its last eighth minus its second
    sixteenth, which average over several places. The more in-context learning, the more negative. None below 16 tokens.
    """
    T = losses.shape[1]
    if T < 16:
        return None
    early, late = (losses[:, 49:50], losses[:, 499:500]) if T >= 512 else (losses[:, T // 16:T // 8], losses[:, -(T // 8):])
    return late.double().mean().item() - early.double().mean().item()


@torch.no_grad()
def copying(model: GPT, tokens: Tensor) -> Tensor:
    """Whether attending to a token raises its logit: (L, H) from −1 to 1, on tokens (B, 1 + n) of which none repeats.

    What a head would write if it attended to one token alone, v W_O, goes through W_U to the logits of the row's n tokens; their mean is
    subtracted and what is negative dropped; the score is the token's own share of what is raised, rescaled (Olsson et al. 2022,
    appendix). A head that ignores what it reads scores 2/n − 1.
    """
    with taps(model, "L*.v") as cache:
        model.hidden(tokens)
    columns = unembedding(model).T[tokens[:, 1:]].float()                                   # (B, n, E)
    scores = []
    for layer in range(model.config.n_layers):
        v = cache[f"L{layer}.v"][:, :, 1:].float()                                          # (B, K, n, D)
        v = v.repeat_interleave(model.config.n_heads // v.shape[1], dim=1)
        logits = v @ writers(model, layer) @ columns[:, None].mT                            # (B, H, n, n): read, raised
        raised = (logits - logits.mean(-1, keepdim=True)).relu()
        share = raised.diagonal(dim1=-2, dim2=-1) / raised.sum(-1).clamp(min=1e-30)
        scores.append(2 * share.double().mean((0, 2)) - 1)
    return torch.stack(scores).cpu()


# --- from the weights alone ---------------------------------------------------------------------------------------------

@torch.no_grad()
def copying_eigenvalues(model: GPT) -> Tensor:
    """Σ λ / Σ |λ| of each head's token-to-token circuit W_E W_V W_O W_U, (L, H): 1 where it raises what it reads (Elhage et al. 2021).

    Its at most D eigenvalues that are not 0 are those of W_O W_U W_E W_V, a D × D matrix.
    """
    through = (unembedding(model).double() @ embedding(model).double())                     # (E, E)
    values = [torch.linalg.eigvals(writers(model, layer).double() @ through @ readers(model, layer)[2].double())
              for layer in range(model.config.n_layers)]
    return torch.stack([v.real.sum(-1) / v.abs().sum(-1).clamp(min=1e-30) for v in values]).cpu()


class Composition(NamedTuple):
    """How much a later head reads what an earlier one writes, by its queries, keys or values: (H later, H earlier) each, 0 as by chance."""

    q: Tensor
    k: Tensor
    v: Tensor


@torch.no_grad()
def composition(model: GPT, earlier: int, later: int, samples: int = 8) -> Composition:
    """‖W₁ W₂‖ / (‖W₁‖ ‖W₂‖) (Frobenius) of the earlier layer's OV and the later one's circuit, minus its mean over random matrices
    of the same shapes (Elhage et al. 2021, "Virtual weights and composition"). Under RoPE the QK circuit is the one at distance 0."""
    _, _, v1 = (w.double() for w in readers(model, earlier))
    o1 = writers(model, earlier).double()
    q, k, v = (w.double() for w in readers(model, later))
    draw = torch.Generator(device="cpu").manual_seed(0)
    shapes = [v1.shape, o1.shape, q.shape, k.mT.shape]
    chance = torch.stack([_ratio(*(torch.randn(shape[1:], generator=draw, dtype=torch.float64)[None] for shape in shapes))
                          for _ in range(samples)]).mean().item()
    return Composition(*(_ratio(v1, o1, reads, writes).cpu() - chance for reads, writes in
                         ((q, k.mT), (k, q.mT), (v, writers(model, later).double()))))


def _ratio(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """‖A B C D‖ / (‖A B‖ ‖C D‖) of a, c (H, E, D) and b, d (H, D, E), all pairs: (H of c and d, H of a and b).

    From D × D matrices: an orthogonal factor does not change a norm, so A and D are replaced by theirs that are not.
    """
    a, d = torch.linalg.qr(a).R, torch.linalg.qr(d.mT).R.mT
    product = a @ torch.einsum("ade,hef->hadf", b, c) @ d[:, None]
    return product.norm(dim=(-2, -1)) / ((a @ b).norm(dim=(-2, -1)) * (c @ d).norm(dim=(-2, -1))[:, None])


@torch.no_grad()
def qk_trace(model: GPT, earlier: int, later: int) -> Tensor:
    """Whether a later head looks for the token that an earlier head has copied, (H later, H earlier): the mean of the diagonal of
    W_E W_Q W_Kᵀ W_OVᵀ W_Eᵀ (V × V; query token by token copied to the key) above the mean of all its entries, in their standard
    deviations. Large for an induction head on a previous-token head. From E × E products, at distance 0 under RoPE."""
    w_e, (q, k, _), (_, _, v) = embedding(model).double(), readers(model, later), readers(model, earlier)
    gram, total, V = w_e.T @ w_e, w_e.sum(0), len(w_e)
    copied, found = v.double() @ writers(model, earlier).double(), []                   # (H earlier, E, E)
    for q_head, k_head in zip(q.double(), k.double()):
        x = q_head @ (copied @ k_head).mT                                               # (H earlier, E, E)
        mean = total @ x.mT @ total / V ** 2
        variance = (x @ gram @ x.mT * gram).sum((-2, -1)) / V ** 2 - mean ** 2
        found.append(((x * gram).sum((-2, -1)) / V - mean) / variance.clamp(min=1e-30).sqrt())
    return torch.stack(found).cpu()


