"""TransformerLens, which shares no code with us, opens our checkpoints and sees the same heads
(make test-lens)."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_models import checkpoint_of, perturbed_model

from data.batches import Batch
from induction.ablation import losses_without
from induction.probes import repeats
from induction.scores import attention_scores
from model.taps import Head, heads_of, taps

pytestmark = pytest.mark.lens

FAMILIES = {                                # swiglu and 4 query heads on 2 key heads, unless said
    "llama attention only": {"mlp": "none", "n_kv_heads": 4}, "llama": {},
    "qwen3": {"qk_norm": True}, "mistral": {"window": 7},
}
PROBE = repeats([5, 8, 13], 48, np.arange(256), begin=256, rows=3)          # three to nine copies
# Few tokens: matches everywhere, and the same token twice in a row.
FEW = torch.randint(4, (3, 48), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=FAMILIES.values(), ids=FAMILIES)
def pair(request, tmp_path_factory):
    """A model with heads that differ, and its checkpoint as TransformerLens opens it."""
    # Imported here: at the top, every run without these tests would wait for it or report them as
    # skipped.
    bridge = pytest.importorskip("transformer_lens.model_bridge").TransformerBridge
    model = perturbed_model(vocab_size=257, n_ctx=48, **request.param)
    with torch.no_grad():
        for block in model.blocks:
            if block.attn.norm_q is not None:
                # Normed queries of random weights attend to everything a little.
                block.attn.norm_q.gain.mul_(3)
    path = checkpoint_of(model, tmp_path_factory.mktemp("checkpoint"))
    return model, bridge.boot_transformers(str(path), device="cpu", dtype=torch.float32)


def close(ours: torch.Tensor, theirs: torch.Tensor, within: float) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=within, check_dtype=False)


@torch.no_grad()
def test_patterns_and_logits_are_theirs(pair):
    model, bridge = pair
    logits, cache = bridge.run_with_cache(PROBE.tokens)
    with taps(model, "L*.pattern") as ours:
        close(model(PROBE.tokens), logits, 1e-4)
    for layer in range(model.config.n_layers):
        theirs = cache[f"blocks.{layer}.attn.hook_pattern"]                 # (B, H, T, T)
        assert theirs.amax(-1).mean() > 0.3                 # flat patterns (0.1) could not differ
        close(ours[f"L{layer}.pattern"], theirs, 1e-5)


@torch.no_grad()
def test_scores_are_masses_of_their_patterns(pair):
    model, bridge = pair
    assert torch.equal(PROBE.queries, seen_before(PROBE.tokens).any(-1))
    not_first = torch.arange(48).expand(3, 48) > 0
    for tokens, queries in ((PROBE.tokens, PROBE.queries), (FEW, not_first)):
        ours = attention_scores(model, tokens, queries).scores
        _, cache = bridge.run_with_cache(tokens)
        patterns = torch.stack([cache[f"blocks.{layer}.attn.hook_pattern"]
                                for layer in range(model.config.n_layers)])  # (L, B, H, T, T)
        for name, keys in keys_meant(tokens).items():
            masses = (patterns * keys[:, None]).sum(-1).mT                          # (L, B, T, H)
            theirs = masses[:, queries].mean(1)                                     # (L, H)
            assert theirs.max() - theirs.min() > 0.02           # else heads could be confused
            close(ours[name], theirs, 1e-5)


def seen_before(tokens: torch.Tensor) -> torch.Tensor:
    """Which keys j before each query i hold its token: (B, T, T)."""
    return (tokens[:, :, None] == tokens[:, None]).tril(-1)


def keys_meant(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """For each score the keys j ≤ i that count for query i, from its definition: (B, T, T), or
    (1, T, T) for every text."""
    before = seen_before(tokens)
    return {"prefix_matching": F.pad(before, (1, -1)),                      # x_{j−1} = x_i
            "duplicate_token": before,
            "previous_token": torch.ones(tokens.shape[1] - 1).diag(-1)[None]}


def silencing(head: Head):
    """A hook on their z (B, T, H, D) that zeroes a head."""
    index = torch.tensor(head.index)
    return f"blocks.{head.layer}.attn.hook_z", lambda z, hook: z.index_fill(2, index, 0)


@torch.no_grad()
def test_each_head_matters_as_much_to_them(pair):
    model, bridge = pair
    rows, options = PROBE.tokens, {"return_type": "loss", "loss_per_token": True}
    batch = Batch(rows[:, :-1], rows[:, 1:])
    intact, theirs_intact = losses_without(model, batch, ()), bridge(rows, **options)
    for head in heads_of(model.config):
        theirs = bridge.run_with_hooks(rows, fwd_hooks=[silencing(head)], **options)    # (B, T)
        theirs = theirs - theirs_intact
        assert theirs.abs().mean() > 0.05
        close(losses_without(model, batch, [head]) - intact, theirs, 1e-4)
