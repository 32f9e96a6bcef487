"""induction/ablation.py against models whose weights were cut by hand."""

from functools import partial

import numpy as np
import pytest
import torch
from test_scores import make_model

from data.batches import Batch
from induction.ablation import (
    SMALLEST_GAIN,
    ablate_each_head,
    ablation_effect,
    gain_removed,
    losses_without,
    path_matrix,
    path_patch,
    same_period_donors,
)
from induction.intervals import Resampling
from induction.probes import aperiodic, repeats
from induction.token_rows import pad_rows
from model.taps import Head, heads_of, taps

PROBE = repeats([8, 11], 40, np.arange(59), 59, rows=6)
BATCH = PROBE.batch
TWO = [Head(0, 1), Head(1, 3)]


def test_no_heads_no_change():
    model = make_model()
    intact = model.losses(*BATCH)
    assert torch.equal(losses_without(model, BATCH, []), intact)
    assert ablation_effect(model, [], PROBE).known == 0


@torch.no_grad()
def test_zero_is_the_model_without_those_rows_of_w_o():
    model = make_model(mlp="swiglu")
    losses = losses_without(model, BATCH, TWO, "zero")
    for layer, head in TWO:
        model.blocks[layer].attn.w_o.weight[:, head * 8:(head + 1) * 8] = 0
    assert torch.allclose(losses, model.losses(*BATCH), atol=1e-5)


@torch.no_grad()
def test_mean_and_resample_put_in_what_the_intact_model_wrote():
    model = make_model()
    with taps(model, "L*.z") as cache:
        model.hidden(BATCH.tokens)
    z = {name: value.clone() for name, value in cache.items()}

    def losses_with(replacement) -> torch.Tensor:
        def replace_head(layer: int, head: int):
            def tap(x):
                x = x.clone()
                x[:, head] = replacement(z[f"L{layer}.z"][:, head])
                return x
            return tap
        with taps(model, {f"L{layer}.z": replace_head(layer, head) for layer, head in TWO}):
            return model.losses(*BATCH)

    mean = losses_without(model, BATCH, TWO, "mean")
    resampled = losses_without(model, BATCH, TWO, "resample")
    assert torch.allclose(mean, losses_with(lambda x: x.mean((0, 1))), atol=1e-6)
    expected = losses_with(lambda x: torch.cat([x[1:], x[:1]]))
    assert torch.allclose(resampled, expected, atol=1e-6)
    assert not torch.allclose(mean, resampled, atol=1e-3)


def test_patterns_kept_are_the_intact_models():
    """The same pattern in every layer, and so another loss than if later heads attend elsewhere."""
    model = make_model()
    with taps(model, "L*.pattern") as cache, torch.no_grad():
        model.hidden(BATCH.tokens)
    intact = dict(cache)
    with taps(model, "L*.pattern") as seen:
        kept = losses_without(model, BATCH, [Head(0, 1)], patterns_kept=True)
    assert all(torch.allclose(seen[name], intact[name], atol=1e-6) for name in intact)
    with taps(model, "L*.pattern") as seen:
        full = losses_without(model, BATCH, [Head(0, 1)])
    assert not torch.allclose(seen["L1.pattern"], intact["L1.pattern"], atol=1e-2)
    assert not torch.allclose(kept, full, atol=1e-2)
    last = [Head(1, 0)]                             # nothing attends after the last layer
    kept = losses_without(model, BATCH, last, patterns_kept=True)
    assert torch.allclose(kept, losses_without(model, BATCH, last), atol=1e-5)


def test_mean_ablation_is_the_default():
    model = make_model()
    mean = losses_without(model, BATCH, TWO, "mean")
    assert torch.equal(losses_without(model, BATCH, TWO), mean)
    assert ablation_effect(model, TWO, PROBE) == ablation_effect(model, TWO, PROBE, method="mean")
    patched = path_patch(model, BATCH, [Head(0, 2)], [Head(1, 1)], "k", "mean")
    assert torch.equal(path_patch(model, BATCH, [Head(0, 2)], [Head(1, 1)], "k"), patched)


def test_resampling_stays_within_a_period():
    """Each row takes what the heads wrote on the next row of its own period."""
    donors = same_period_donors(PROBE)
    assert PROBE.periods.tolist() == [8, 11, 8, 11, 8, 11]
    assert donors.tolist() == [2, 3, 4, 5, 0, 1]
    model = make_model()
    effect = ablation_effect(model, TWO, PROBE, method="resample")
    losses = losses_without(model, BATCH, TWO, "resample", donors=donors)
    before = model.losses(*BATCH)
    rise = (losses - before)[PROBE.known].mean().item()
    assert effect.known == pytest.approx(rise, abs=1e-5)
    with pytest.raises(ValueError, match="period 11 has a single row"):
        same_period_donors(PROBE.rows(slice(3)))
    segmented = aperiodic(40, np.arange(59), 59, rows=3)
    assert same_period_donors(segmented).tolist() == [1, 2, 0]


def test_an_effect_is_what_is_left_of_the_gain():
    """1 − g′/g, with g the first copy's loss minus that of known tokens: what an ablation costs the
    first copy is no loss of gain."""
    model = make_model()
    effect = ablation_effect(model, TWO, PROBE)
    before, after = losses_without(model, BATCH, []), losses_without(model, BATCH, TWO)

    def means(losses: torch.Tensor) -> tuple[float, float]:
        return losses[PROBE.unknown].mean().item(), losses[PROBE.known].mean().item()

    (first, known), (first_after, known_after) = means(before), means(after)
    assert effect.known == pytest.approx(known_after - known, abs=1e-5)
    assert effect.first_copy == pytest.approx(first_after - first, abs=1e-5)
    assert effect.gain_removed is None and first - known < SMALLEST_GAIN


@pytest.mark.parametrize("first, known, expected", [
    (6.0, 6.0, 1.0),        # no gain left, nothing else changed
    (8.0, 2.0, 0.0),        # damage to both copies alike removes no gain
    (6.0, 3.0, 0.4), (6.0, 1.0, 0.0), (6.0, 8.5, 1.5)])
def test_gain_removed(first, known, expected):
    """From a gain of 5 nats (of 6 in the second row)."""
    g = 6.0 if (first, known) == (8.0, 2.0) else 5.0
    assert gain_removed(6.0, 6.0 - g, first, known) == pytest.approx(expected)


def test_each_head_is_replaced_by_its_mean():
    model = make_model(mlp="swiglu")
    counted = PROBE.known
    rises = ablate_each_head(model, BATCH, counted, PROBE.resampling)
    intact = model.losses(*BATCH)[counted].mean()
    assert list(rises) == heads_of(model.config)
    for head, rise in rises.items():
        without = losses_without(model, BATCH, [head], "mean")[counted].mean()
        assert rise == pytest.approx((without - intact).item(), abs=1e-5)


def test_padding_is_no_part_of_a_mean():
    """Short rows beside a long one change nothing for the long one, whatever they are padded with:
    the mean is over real positions only."""
    model = make_model()
    long = BATCH.tokens[0].tolist()
    rows = pad_rows([long, *[row[:2] for row in BATCH.tokens[1:].tolist()]])
    batch = Batch(rows.tokens[:, :-1], rows.tokens[:, 1:])
    real = rows.queries[:, 1:]
    each = Resampling.of_rows(len(batch.tokens))
    alone = ablate_each_head(model, batch, real, each, real=real)
    other = batch._replace(tokens=batch.tokens.masked_fill(~real, 7))
    for head, rise in ablate_each_head(model, other, real, each, real=real).items():
        assert rise == pytest.approx(alone[head], abs=1e-5)
    with taps(model, "L1.z") as cache, torch.no_grad():
        model.hidden(batch.tokens)
    mean = cache["L1.z"].transpose(1, 2)[real].mean(0)[3]
    intact = model.losses(*batch)

    def by_hand(z: torch.Tensor) -> torch.Tensor:
        z = z.clone()
        z[:, 3] = mean
        return z

    with taps(model, {"L1.z": by_hand}):
        expected = (model.losses(*batch) - intact)[real].mean().item()
    assert alone[Head(1, 3)] == pytest.approx(expected, abs=1e-5)
    assert alone[Head(1, 3)] != pytest.approx(
        ablate_each_head(model, batch, real, each)[Head(1, 3)], abs=1e-3)


def test_documents_do_not_see_each_other_when_a_head_is_ablated():
    """With segments a document's losses are those it has on its own."""
    model = make_model()
    tokens, targets = (torch.cat([part[:1, :15], part[1:2, :15]], dim=1) for part in BATCH[:2])
    both = Batch(tokens, targets, torch.tensor([[0] * 15 + [1] * 15]))
    first = Batch(BATCH.tokens[:1, :15], BATCH.targets[:1, :15])
    masked = losses_without(model, both, TWO, "zero")
    assert torch.allclose(masked[:, :15], losses_without(model, first, TWO, "zero"), atol=1e-5)
    unmasked = losses_without(model, Batch(both.tokens, both.targets), TWO, "zero")
    assert not torch.allclose(unmasked[:, 15:], masked[:, 15:], atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("into", ["q", "k", "v"])
def test_path_patching_changes_one_input_of_one_head(into):
    """By the model's own modules: the receiver's input without what the sender wrote, everything
    else unchanged."""
    model, sender, receiver = make_model(), Head(0, 2), Head(1, 1)
    tokens = BATCH.tokens
    with taps(model, ["L1.resid_pre", "L0.z", "L1.q", "L1.k", "L1.v", "L1.z"]) as cache:
        model.hidden(tokens)
    intact = dict(cache)
    written = torch.zeros_like(intact["L0.z"])
    written[:, sender.index] = intact["L0.z"][:, sender.index]
    without = intact["L1.resid_pre"] - model.blocks[0].attn.w_o(written.transpose(1, 2).flatten(2))
    with taps(model, {"L1.resid_pre": lambda x: without, f"L1.{into}": None}) as cache:
        model.hidden(tokens)
    # The receiver alone, from its own queries and the keys and values of its group; the other head
    # of that group keeps what it writes in the intact model.
    inputs = {part: intact[f"L1.{part}"] for part in "qkv"} | {into: cache[f"L1.{into}"]}
    q, k, v = inputs["q"][:, 1], inputs["k"][:, 0], inputs["v"][:, 0]
    scores = (q @ k.mT / 8 ** 0.5).masked_fill(torch.ones(39, 39).triu(1).bool(), -torch.inf)
    z = intact["L1.z"].clone()
    z[:, receiver.index] = scores.softmax(-1) @ v
    with taps(model, {"L1.z": lambda x: z}):
        expected = model.losses(*BATCH)
    losses = path_patch(model, BATCH, [sender], [receiver], into, "zero")
    assert torch.allclose(losses, expected, atol=1e-5)
    assert not torch.allclose(losses, model.losses(*BATCH), atol=1e-4)
    with pytest.raises(ValueError, match="layers before it"):
        path_patch(model, BATCH, [receiver], [sender], into)


def test_a_path_matrix_is_every_single_path():
    model = make_model(n_layers=3)
    senders, receivers = [Head(0, 0), Head(1, 2)], [Head(1, 1), Head(2, 3)]
    paths = path_matrix(model, PROBE, senders, receivers)
    assert [(path.sender, path.receiver, path.into) for path in paths] == [
        (sender, receiver, into) for sender in senders for receiver in receivers
        if sender.layer < receiver.layer for into in "qkv"]
    intact = model.losses(*BATCH)
    for path in paths:
        patched = path_patch(model, BATCH, [path.sender], [path.receiver], path.into)
        rise = (patched - intact)[PROBE.known].mean().item()
        assert path.rise == pytest.approx(rise, abs=1e-5)


def test_path_patching_leaves_what_lies_between_as_it_was():
    """A layer between the two changes nothing: with its heads and MLP held, the result is the
    same."""
    model = make_model(n_layers=3, mlp="swiglu")
    losses = path_patch(model, BATCH, [Head(0, 0)], [Head(2, 3)], "k")
    with taps(model, ["L1.z", "L1.mlp_out", "L0.mlp_out"]) as cache, torch.no_grad():
        model.hidden(BATCH.tokens)
    held = {name: partial(lambda value, _: value, value) for name, value in cache.items()}
    with taps(model, held):
        again = path_patch(model, BATCH, [Head(0, 0)], [Head(2, 3)], "k")
    assert torch.allclose(losses, again, atol=1e-6)
