"""What each head attends to, what it copies, and which heads it is built on.

Attention weights show what was averaged, not what was used: induction/ablation.py asks that. The scores that look at the pattern come
from q, k and lse in O(T) memory (kernels/statistics.py); those that look at weights never hold a V × V matrix.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from induction.probes import Repeats
from kernels.planes import REACH
from kernels.statistics import head_statistics
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
    share = queries.float() / queries.sum().clamp(min=1)
    seen = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    layers: list[dict[str, Tensor]] = []

    def look(layer: int, window: int | None):
        def at(lse: Tensor) -> None:                        # the last of the three: nothing of a layer is held once it is measured
            q, k = cache.pop(f"L{layer}.q"), cache.pop(f"L{layer}.k")
            rows = head_statistics(q, k, lse, tokens, window=window)                        # (B, H, T) each
            keys = seen.clamp(max=window or len(seen))
            entropy = torch.where(keys > 1, rows.entropy / keys.log(), 0)                   # a row that sees one key has none
            layers.append({name: torch.einsum("bht...,bt->h...", row, share).cpu().double()
                           for name, row in rows._replace(entropy=entropy)._asdict().items()})
        return at

    taken = {f"L{layer}.lse": look(layer, window) for layer, window in enumerate(model.config.windows)}
    with taps(model, {"L*.q": None, "L*.k": None} | taken) as cache:
        final = model.hidden(tokens)
    scores = {name: torch.stack([means[name] for means in layers]) for name in layers[0]}
    profile = scores.pop("offset_profile")
    scores["latest_match"] = profile[..., REACH]
    return Look({name: scores[name] for name in SCORES if name in scores}, profile, final)


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
def repeat_losses(model: GPT, probe: Repeats, final: Tensor) -> tuple[float, float]:
    """Mean loss inside the first and the second copy, in nats, from the last hidden state of a pass over the probe."""
    targets = probe.tokens[:, 1:]
    losses = cross_entropies(final[:, :-1].flatten(0, 1), model.unembedding, targets.flatten()).view(targets.shape)
    return mean_of(losses, probe.first_copy), mean_of(losses, probe.second_copy)


def mean_of(losses: Tensor, counted: Tensor) -> float:
    """The mean of those losses (B, T) that `counted` (B, T) bool names, summed in float64 (on the CPU: some devices have none)."""
    return losses[counted].cpu().double().mean().item()


def icl_score(losses: Tensor) -> float | None:
    """How much later tokens are easier than early ones: mean loss late minus mean loss early, in nats, of losses (N, T) on text.

    Around token 500 minus around token 50 (Olsson et al. 2022; 17 tokens each: single ones are noise) where there are so many; in a
    shorter context its last eighth minus its second sixteenth. The more in-context learning, the more negative. None below 16 tokens.
    """
    T, losses = losses.shape[1], losses.cpu().double()
    if T < 16:
        return None
    early, late = (losses[:, 41:58], losses[:, 491:508]) if T >= 512 else (losses[:, T // 16:T // 8], losses[:, -(T // 8):])
    return late.mean().item() - early.mean().item()


@torch.no_grad()
def copying(model: GPT, tokens: Tensor) -> Tensor:
    """Whether attending to a token raises its logit: (L, H) from −1 to 1, on tokens (B, 1 + n) of which none repeats.

    What a head would write if it attended to one token alone, v W_O, goes through W_U to the logits of the row's n tokens; their mean is
    subtracted and what is negative dropped; the score is the token's own share of what is raised, rescaled (Olsson et al. 2022,
    appendix). A head that ignores what it reads scores 2/n − 1. Where values have a bias it is part of v; that of W_O is no head's.
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
        scores.append(2 * share.cpu().double().mean((0, 2)) - 1)
    return torch.stack(scores)


# --- from the weights alone ---------------------------------------------------------------------------------------------

@torch.no_grad()
def copying_eigenvalues(model: GPT) -> Tensor:
    """Σ λ / Σ |λ| of each head's token-to-token circuit W_E W_V W_O W_U, (L, H): 1 where it raises what it reads (Elhage et al. 2021).

    Its at most D eigenvalues that are not 0 are those of W_O W_U W_E W_V, a D × D matrix.
    """
    through = exactly(unembedding(model)) @ exactly(embedding(model))                       # (E, E)
    values = [torch.linalg.eigvals(exactly(writers(model, layer)) @ through @ exactly(readers(model, layer)[2]))
              for layer in range(model.config.n_layers)]
    return torch.stack([v.real.sum(-1) / v.abs().sum(-1).clamp(min=1e-30) for v in values])


def exactly(weights: Tensor) -> Tensor:
    """In float64 on the CPU: no other device has all of its linear algebra, and some have no float64."""
    return weights.detach().cpu().double()


class Composition(NamedTuple):
    """How much a later head reads what an earlier one writes, by its queries, keys or values: (H later, H earlier) each, 0 as by chance."""

    q: Tensor
    k: Tensor
    v: Tensor


@torch.no_grad()
def composition(model: GPT, earlier: int, later: int, samples: int = 100) -> Composition:
    """‖W₁ W₂‖ / (‖W₁‖ ‖W₂‖) (Frobenius) of the earlier layer's OV and the later one's circuit, minus its mean over random matrices
    of the same shapes (Elhage et al. 2021, "Virtual weights and composition"). Under RoPE the QK circuit is the one at distance 0."""
    v1, o1 = exactly(readers(model, earlier)[2]), exactly(writers(model, earlier))
    q, k, v = map(exactly, readers(model, later))
    draw = torch.Generator().manual_seed(0)
    shapes = [v1.shape, o1.shape, q.shape, k.mT.shape]
    chance = torch.stack([_ratio(*(torch.randn(shape[1:], generator=draw, dtype=torch.float64)[None] for shape in shapes))
                          for _ in range(samples)]).mean().item()
    return Composition(*(_ratio(v1, o1, reads, writes) - chance for reads, writes in
                         ((q, k.mT), (k, q.mT), (v, exactly(writers(model, later))))))


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
    w_e, (q, k, _), (_, _, v) = exactly(embedding(model)), map(exactly, readers(model, later)), map(exactly, readers(model, earlier))
    gram, total, V = w_e.T @ w_e, w_e.sum(0), len(w_e)
    copied, found = v @ exactly(writers(model, earlier)), []                            # (H earlier, E, E)
    for q_head, k_head in zip(q, k):
        x = q_head @ (copied @ k_head).mT                                               # (H earlier, E, E)
        mean = total @ x.mT @ total / V ** 2
        variance = (x @ gram @ x.mT * gram).sum((-2, -1)) / V ** 2 - mean ** 2
        found.append(((x * gram).sum((-2, -1)) / V - mean) / variance.clamp(min=1e-30).sqrt())
    return torch.stack(found)
