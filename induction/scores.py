"""What each head attends to, what it copies, and which earlier heads it composes with.

Attention weights show what was averaged, not what was used; for that see induction/ablation.py.
Scores of attention patterns are computed from q, k and lse in O(T) memory
(kernels/statistics.py). Scores of weights never hold a V × V matrix.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from induction.behaviour import ProbeLosses, probe_losses
from induction.intervals import FRACTION, NONNEGATIVE, Bounds, Resampling, RowSums, identity
from induction.probes import Probe
from kernels.planes import REACH
from kernels.statistics import HeadStatistics, head_statistics
from model.circuits import readers, token_embedding, unembedding_after_norm, writers
from model.gpt import GPT
from model.taps import TapFunction, taps

SCORES = {                              # name → explanation, for readers of tables and pages
    "prefix_matching": "attention on tokens that follow an earlier copy of the current token "
                       "(1: a perfect induction head)",
    "prefix_matching_visible": "the same, over the queries that can see such a token",
    "latest_match": "the part of prefix matching on the latest such token",
    "current_token": "attention on the current token itself",
    "previous_token": "attention on the previous token, in the first copy, where an induction "
                      "circuit needs it",
    "previous_token_later": "the same, in later copies",
    "duplicate_token": "attention on earlier copies of the current token",
    "first_token": "attention on the first token (an attention sink)",
    "entropy": "entropy of the attention rows, relative to uniform attention "
               "(0: one key, 1: uniform)",
    "distance": "mean look-back, in tokens",
    "copying": "whether the head's output raises the logit of the token it reads "
               "(1: only that token, 0: as by chance, −1: it lowers only that token)",
}


# --- from attention patterns ----------------------------------------------------------------------

class Visible(NamedTuple):
    """Of the counted queries of one layer, how many can see a key after an earlier copy of their
    token, and what uniform attention would score on those."""

    fraction: float
    uniform: float


class PatternScores(NamedTuple):
    """The result of one tapped forward pass."""

    rows: dict[str, RowSums]    # name → sums (L, H, B), counts (L, 1, B)
    offset_profile: Tensor      # (L, H, 2 · REACH + 1) float64 on the CPU
    visible: list[Visible]      # of each layer
    final: Tensor               # (B, T, E) the last hidden state

    @property
    def scores(self) -> dict[str, Tensor]:
        """name → (L, H) float64 on the CPU"""
        return means(self.rows)


def means(rows: dict[str, RowSums]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(score.mean) for name, score in rows.items()}


@torch.no_grad()
def attention_scores(model: GPT, tokens: Tensor, queries: Tensor,
                     first_copy: Tensor | None = None,
                     targets_of: Tensor | None = None) -> PatternScores:
    """The scores of every head's attention pattern on tokens (B, T), averaged over the rows of the
    pattern that `queries` (B, T) bool selects. With `first_copy` (B, T) bool, the previous-token
    score is averaged over that, and over `queries` under another name. With `targets_of` (B, T) the
    targets are those of other tokens, so that prefix matching is what a head scores by where it
    looks, whatever it reads there.

    Definitions: Olsson et al. 2022, "In-context Learning and Induction Heads", appendix. Entropy is
    divided by the log of the number of keys that its row sees. The offset profile is the attention
    on each position around the induction target. Prefix matching over the visible targets alone is
    left out if every counted query sees one.
    """
    layers: list[LayerSums] = []
    of = tokens if targets_of is None else targets_of
    counted = {window: counted_positions(of, queries, first_copy, window)
               for window in set(model.config.windows)}

    with taps(model, ["L*.q", "L*.k"]) as acts:
        # lse comes after q and k, so each layer is measured, and dropped, before the next.
        def measure_layer(layer: int, window: int | None) -> TapFunction:
            def on_lse(lse: Tensor) -> None:
                rows = head_statistics(acts.pop(f"L{layer}.q"), acts.pop(f"L{layer}.k"), lse,
                                       of, window=window)
                layers.append(layer_sums(rows, counted[window]))
            return on_lse

        lse_taps: dict[str, TapFunction | None] = {
            f"L{layer}.lse": measure_layer(layer, window)
            for layer, window in enumerate(model.config.windows)}
        with taps(model, lse_taps):
            final = model.hidden(tokens)
    by_layer = [counted[window] for window in model.config.windows]
    rows = {}
    for name in SCORES:
        if name in layers[0].sums:
            sums = torch.stack([layer.sums[name] for layer in layers]).cpu().double().numpy()
            counts = np.stack([positions.counts[name] for positions in by_layer])
            rows[name] = RowSums(sums, counts[:, None])
    profile = torch.stack([layer.profile for layer in layers]).cpu().double()
    visible = [positions.visible for positions in by_layer]
    if all(layer.fraction == 1 for layer in visible):
        del rows["prefix_matching_visible"]
    return PatternScores(rows, profile / queries.sum().clamp(min=1).cpu(), visible, final)


class CountedPositions(NamedTuple):
    """Which rows of a layer's patterns count. Layers with the same window share it."""

    log_keys: Tensor                # (T,) ln of the number of keys that a query sees
    queries: Tensor                 # (B, T) float, 1 where a query counts
    first_copy: Tensor | None       # (B, T) for the previous-token score
    seeing: Tensor                  # (B, T) the queries that can see a target
    counts: dict[str, np.ndarray]   # score → (B,) how many positions of each row count
    visible: Visible


def counted_positions(tokens: Tensor, queries: Tensor, first_copy: Tensor | None,
                      window: int | None) -> CountedPositions:
    """The positions (B, T) over which attention_scores takes its means."""
    T = tokens.shape[1]
    position = torch.arange(T, device=tokens.device)
    keys = (position + 1).clamp(max=window or T)                                # (T,) visible ones
    matches = visible_matches(tokens, window)                                   # (B, T)
    seeing = queries & (matches > 0)
    per_row = [queries.sum(1), seeing.sum(1)]
    if first_copy is not None:
        first_copy = first_copy & (position > 0)                # the first token has no previous
        per_row.append(first_copy.sum(1))
    uniform = ((matches / keys) * seeing).sum().item()
    n_queries, n_seeing, *n_first = torch.stack(per_row).cpu().numpy()
    counts = dict.fromkeys(SCORES, n_queries) | {"prefix_matching_visible": n_seeing}
    if n_first:
        counts["previous_token"] = n_first[0]
    visible = Visible(float(n_seeing.sum() / max(1, n_queries.sum())),
                      uniform / max(1, int(n_seeing.sum())))
    return CountedPositions(keys.log(), queries.float(),
                            None if first_copy is None else first_copy.float(), seeing.float(),
                            counts, visible)


class LayerSums(NamedTuple):
    """On the model's device, so that no layer waits for it."""

    sums: dict[str, Tensor]     # score → (H, B), over the positions that count
    profile: Tensor             # (H, 2 · REACH + 1), over all rows


def layer_sums(statistics: HeadStatistics, counted: CountedPositions) -> LayerSums:
    """One layer's statistics, summed over the rows of its patterns that count."""
    log_keys = counted.log_keys
    entropy = torch.where(log_keys > 0, statistics.entropy / log_keys, 0)       # 0 with one key
    by_name = statistics._replace(entropy=entropy)._asdict()
    profile = by_name.pop("offset_profile")
    by_name["latest_match"] = profile[..., REACH]                               # offset 0
    # All in one product: a GPU is done with each long before Python has started the next.
    together = torch.einsum("nbht,bt->nhb", torch.stack([*by_name.values()]), counted.queries)
    sums = dict(zip(by_name, together))
    if counted.first_copy is not None:
        sums["previous_token_later"] = sums["previous_token"]
        sums["previous_token"] = row_sum(statistics.previous_token, counted.first_copy)
    sums["prefix_matching_visible"] = row_sum(statistics.prefix_matching, counted.seeing)
    return LayerSums(sums, torch.einsum("bhto,bt->ho", profile, counted.queries))


def row_sum(statistic: Tensor, weight: Tensor) -> Tensor:
    """A statistic (B, H, T) summed with `weight` (B, T) over each row: (H, B)."""
    return torch.einsum("bht,bt->hb", statistic, weight)


def visible_matches(tokens: Tensor, window: int | None) -> Tensor:
    """How many keys j with x_{j−1} = x_i each query i of (B, T) sees: (B, T). That is, how many
    earlier copies of its token it has, the last `window` tokens only."""
    T = tokens.shape[1]
    position = torch.arange(T, device=tokens.device)
    ordered = (tokens.long() * T + position).sort(dim=1).values     # by token, then by position
    nearest = (position - (window or T)).clamp(min=0)               # the earliest copy that counts
    until = torch.searchsorted(ordered, tokens.long() * T + position)
    return until - torch.searchsorted(ordered, tokens.long() * T + nearest)


class Measured(NamedTuple):
    """All measurements of a model on a probe."""

    scores: dict[str, Tensor]   # name → (L, H) float64 on the CPU
    offset_profile: Tensor      # (L, H, 2 · REACH + 1)
    by_period: dict[int, Tensor]        # period → (L, H) prefix matching; of a periodic probe
    loss_first: float           # nats per token in the first copy, where tokens are random
    loss_second: float          # where every token can be known; of a periodic probe, in the second
                                # copy
    rows: dict[str, RowSums]    # what the scores are made of, row by row
    losses: ProbeLosses         # likewise


def measure(model: GPT, probe: Probe, unrepeated: Tensor) -> Measured:
    """All scores of all heads on repeated random tokens, and the losses of both copies."""
    attention = attention_scores(model, probe.tokens, probe.queries, probe.first_copy)
    rows = attention.rows | {"copying": copying(model, unrepeated)}
    periods, prefix_matching = probe.periods.cpu().numpy(), attention.rows["prefix_matching"]
    by_period = {period: torch.from_numpy(prefix_matching.of(periods == period).mean)
                 for period in np.unique(periods).tolist() if period}
    losses = probe_losses(model, probe, attention.final)
    return Measured(means(rows), attention.offset_profile, by_period, losses.first.mean.item(),
                    losses.known.mean.item(), rows, losses)


def score_bounds(measured: Measured, probe: Probe) -> dict[str, Bounds]:
    """The intervals of all scores that were measured on `probe`: name → (L, H) each."""
    return {name: bounds_of(name, rows, Resampling.of_rows(rows.sums.shape[-1])
                            if name == "copying" else probe.resampling)     # it has its own rows
            for name, rows in measured.rows.items()}


def bounds_of(score: str, rows: RowSums, resampling: Resampling) -> Bounds:
    """The interval of one score of all heads: (L, H) each."""
    limits = {"copying": (-1.0, 1.0), "distance": NONNEGATIVE}.get(score, FRACTION)
    return resampling.bounds(identity, rows, limits=limits)


# --- from values and weights ----------------------------------------------------------------------

@torch.no_grad()
def copying(model: GPT, tokens: Tensor) -> RowSums:
    """Whether attending to a token raises its logit: means (L, H) from −1 to 1, sums (L, H, B), on
    tokens (B, 1 + n) that are distinct within a row.

    What a head would write if it attended to a single token, v W_O, goes through W_U to the logits
    of the row's n tokens; their mean is subtracted. The score is the share of all raising that goes
    to the token read (Olsson et al. 2022, appendix, who rescale it to −1 … 1 with chance at
    2/n − 1) minus the share of all lowering that goes to it. So a head that ignores what it reads
    scores 0, one that raises only the token read 1, and one that lowers only it −1. A bias of the
    values is part of v; the bias of W_O belongs to no head.
    """
    with taps(model, "L*.v") as acts:
        model.hidden(tokens)
    unembed = unembedding_after_norm(model).T[tokens[:, 1:]].float()            # (B, n, E)
    scores = []
    for layer in range(model.config.n_layers):
        v = acts[f"L{layer}.v"][:, :, 1:].float()                              # (B, K, n, D)
        v = v.repeat_interleave(model.config.n_heads // v.shape[1], dim=1)      # (B, H, n, D)
        logits = v @ writers(model, layer) @ unembed[:, None].mT                # (B, H, n read, n)
        change = logits - logits.mean(-1, keepdim=True)
        score = share_on_read(change.relu()) - share_on_read((-change).relu())  # (B, H, n)
        scores.append(score.sum(2).T)                                           # (H, B)
    rows = torch.stack(scores).cpu().double().numpy()
    return RowSums(rows, np.full(rows.shape[-1], tokens.shape[1] - 1))


def share_on_read(weights: Tensor) -> Tensor:
    """The share of each row's weights (…, n read, n) that is on the token read: (…, n)."""
    return weights.diagonal(dim1=-2, dim2=-1) / weights.sum(-1).clamp(min=1e-30)


@torch.no_grad()
def copying_eigenvalues(model: GPT) -> Tensor:
    """Σ Re λ / Σ |λ| over the eigenvalues λ of each head's full OV circuit W_E W_V W_O W_U: (L, H).
    1 if the head raises the tokens it reads (Elhage et al. 2021, "A Mathematical Framework").

    The V × V circuit has at most D nonzero eigenvalues, those of the D × D matrix W_O W_U W_E W_V.
    """
    w_u, w_e = float64(unembedding_after_norm(model)), float64(token_embedding(model))
    w_ue = w_u @ w_e                                                            # (E, E)
    scores = []
    for layer in range(model.config.n_layers):
        w_v, w_o = float64(readers(model, layer).v), float64(writers(model, layer))
        eigenvalues = torch.linalg.eigvals(w_o @ w_ue @ w_v)                    # (H, D)
        scores.append(eigenvalues.real.sum(-1) / eigenvalues.abs().sum(-1).clamp(min=1e-30))
    return torch.stack(scores)


def float64(weights: Tensor) -> Tensor:
    """In float64 on the CPU: other devices lack some linear algebra, and some lack float64."""
    return weights.detach().cpu().double()


class Composition(NamedTuple):
    """How much the queries, keys and values of a later head read the output of an earlier head:
    (H later, H earlier) each, 0 at chance."""

    q: Tensor
    k: Tensor
    v: Tensor


@torch.no_grad()
def composition(model: GPT, earlier: int, later: int, samples: int = 100) -> Composition:
    """Q-, K- and V-composition of two layers' heads: ‖A B‖ / (‖A‖ ‖B‖) in Frobenius norms, of the
    earlier head's OV circuit and the later head's QK or OV circuit, minus the mean over `samples`
    random matrices of the same shapes.

    Elhage et al. 2021, "Virtual weights and composition". Under RoPE the QK circuit is the one at
    distance 0.
    """
    v_earlier, o_earlier = float64(readers(model, earlier).v), float64(writers(model, earlier))
    q, k, v = map(float64, readers(model, later))                               # (H, E, D) each
    o_later = float64(writers(model, later))                                    # (H, D, E)
    draw = torch.Generator().manual_seed(0)

    def random_like(matrix: Tensor) -> Tensor:
        return torch.randn(matrix.shape[1:], generator=draw, dtype=torch.float64)[None]

    chance = torch.stack([norm_ratio(*map(random_like, (v_earlier, o_earlier, q, k.mT)))
                          for _ in range(samples)]).mean().item()
    return Composition(norm_ratio(v_earlier, o_earlier, q, k.mT) - chance,
                       norm_ratio(v_earlier, o_earlier, k, q.mT) - chance,
                       norm_ratio(v_earlier, o_earlier, v, o_later) - chance)


def norm_ratio(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """‖A B C D‖ / (‖A B‖ ‖C D‖) for all pairs of A B and C D: a, c (H, E, D), b, d (H, D, E) →
    (H of c and d, H of a and b).

    Computed on D × D matrices: A = Q R with orthogonal Q, which changes no norm, so R replaces A;
    likewise for D.
    """
    a, d = torch.linalg.qr(a).R, torch.linalg.qr(d.mT).R.mT                     # (H, D, D)
    product = a @ torch.einsum("ade,hef->hadf", b, c) @ d[:, None]              # (H, H, D, D)
    norms = (a @ b).norm(dim=(-2, -1)) * (c @ d).norm(dim=(-2, -1))[:, None]
    return product.norm(dim=(-2, -1)) / norms


@torch.no_grad()
def qk_trace(model: GPT, earlier: int, later: int) -> Tensor:
    """Whether a later head looks for the token that an earlier head copies: (H later, H earlier).

    M = W_E W_Q W_Kᵀ W_OVᵀ W_Eᵀ is V × V. M[a, b] is the attention score of a query with token a for
    a key at which the earlier head wrote token b. The result is the mean of M's diagonal minus
    the mean of all entries, in standard deviations of the entries: large for an induction head
    above a previous-token head. Computed from E × E products; at distance 0 under RoPE.
    """
    w_e = float64(token_embedding(model))                                       # (V, E)
    q, k, _ = map(float64, readers(model, later))                               # (H later, E, D)
    ov = float64(readers(model, earlier).v) @ float64(writers(model, earlier))  # (H earlier, E, E)
    gram, total, V = w_e.T @ w_e, w_e.sum(0), len(w_e)
    scores = []
    for w_q, w_k in zip(q, k):
        x = w_q @ (ov @ w_k).mT                         # (H earlier, E, E), M = W_E x W_Eᵀ
        mean = total @ x @ total / V ** 2
        variance = (x @ gram @ x.mT * gram).sum((-2, -1)) / V ** 2 - mean ** 2
        diagonal = (x * gram).sum((-2, -1)) / V
        scores.append((diagonal - mean) / variance.clamp(min=1e-30).sqrt())
    return torch.stack(scores)
