"""induction/ablation.py against models whose weights were cut by hand."""

from functools import partial

import numpy as np
import pytest
import torch
from test_scores import make_model

from data.batches import Batch
from induction.ablation import (
    ablate_each_head,
    ablation_effect,
    losses_without,
    matched_sets,
    path_patch,
)
from induction.probes import repeats
from model.config import ModelConfig
from model.taps import Head, heads_of, taps

PROBE = repeats([8, 11], 40, np.arange(59), 59, rows=6)
BATCH = PROBE.batch
TWO = [Head(0, 1), Head(1, 3)]


def test_no_heads_no_change():
    model = make_model()
    intact = model.losses(*BATCH)
    assert torch.equal(losses_without(model, BATCH, []), intact)
    assert ablation_effect(model, [], PROBE).second_copy == 0


@torch.no_grad()
def test_zero_is_the_model_without_those_rows_of_w_o():
    model = make_model(mlp="swiglu")
    losses = losses_without(model, BATCH, TWO)
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


def test_an_effect_is_the_change_in_the_second_copy():
    model = make_model()
    effect = ablation_effect(model, TWO, PROBE, text=BATCH)
    before, after = losses_without(model, BATCH, []), losses_without(model, BATCH, TWO)
    change = (after - before)[PROBE.second_copy].mean().item()
    gain = (before[PROBE.first_copy].mean() - before[PROBE.second_copy].mean()).item()
    assert effect.second_copy == pytest.approx(change, abs=1e-5)
    assert effect.gain_removed == pytest.approx(change / gain, rel=1e-4)
    assert effect.validation == pytest.approx((after - before).mean().item(), abs=1e-5)
    assert effect.icl is not None


def test_each_head_is_replaced_by_its_mean():
    model = make_model(mlp="swiglu")
    counted = PROBE.second_copy
    rises, intact = ablate_each_head(model, BATCH, counted), model.losses(*BATCH)[counted].mean()
    assert list(rises) == heads_of(model.config)
    for head, rise in rises.items():
        without = losses_without(model, BATCH, [head], "mean")[counted].mean()
        assert rise == pytest.approx((without - intact).item(), abs=1e-5)


def test_documents_do_not_see_each_other_when_a_head_is_ablated():
    """With segments a document's losses are those it has on its own."""
    model = make_model()
    tokens, targets = (torch.cat([part[:1, :15], part[1:2, :15]], dim=1) for part in BATCH[:2])
    both = Batch(tokens, targets, torch.tensor([[0] * 15 + [1] * 15]))
    first = Batch(BATCH.tokens[:1, :15], BATCH.targets[:1, :15])
    masked = losses_without(model, both, TWO)
    assert torch.allclose(masked[:, :15], losses_without(model, first, TWO), atol=1e-5)
    unmasked = losses_without(model, Batch(both.tokens, both.targets), TWO)
    assert not torch.allclose(unmasked[:, 15:], masked[:, 15:], atol=1e-3)


def test_matched_sets_are_others_of_the_same_layers():
    config = ModelConfig(n_layers=3, n_heads=6, d_model=48)
    heads = [Head(1, 0), Head(1, 1), Head(2, 5)]
    sets = matched_sets(config, heads, most=10)
    assert len(sets) == len(set(sets)) == 10
    for others in sets:
        assert [head.layer for head in others] == [1, 1, 2]
        assert not set(others) & set(heads) and set(others) <= set(heads_of(config))
    assert matched_sets(config, [Head(0, h) for h in range(6)]) == []
    too_few = matched_sets(config, [Head(0, h) for h in range(4)])
    assert [len(others) for others in too_few] == [2]           # all other heads of the layer
    assert matched_sets(config, heads) == sets
    wide = ModelConfig(n_layers=1, n_heads=17, d_model=34)
    many = matched_sets(wide, [Head(0, 0), Head(0, 1), Head(0, 2)])
    assert len(many) == len(set(many)) == 10


@torch.no_grad()
@pytest.mark.parametrize("into", ["q", "k", "v"])
def test_path_patching_changes_one_input_of_one_head(into):
    """By the model's own modules: the receiver's input without what the sender wrote, everything
    else unchanged."""
    model, sender, receiver = make_model(), Head(0, 2), Head(1, 1)
    tokens = BATCH.tokens
    with taps(model, ["L1.resid_pre", "L0.z", f"L1.{into}"]) as cache:
        model.hidden(tokens)
    intact = dict(cache)
    written = torch.zeros_like(intact["L0.z"])
    written[:, sender.index] = intact["L0.z"][:, sender.index]
    without = intact["L1.resid_pre"] - model.blocks[0].attn.w_o(written.transpose(1, 2).flatten(2))
    with taps(model, {"L1.resid_pre": lambda x: without, f"L1.{into}": None}) as cache:
        model.hidden(tokens)
    slot = receiver.index if into == "q" else receiver.index // 2
    patched = intact[f"L1.{into}"].clone()
    patched[:, slot] = cache[f"L1.{into}"][:, slot]
    with taps(model, {f"L1.{into}": lambda x: patched}):
        expected = model.losses(*BATCH)
    losses = path_patch(model, BATCH, [sender], [receiver], into)
    assert torch.allclose(losses, expected, atol=1e-5)
    assert not torch.allclose(losses, model.losses(*BATCH), atol=1e-4)
    with pytest.raises(ValueError, match="layers before it"):
        path_patch(model, BATCH, [receiver], [sender], into)


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
