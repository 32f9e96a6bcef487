"""Pictures of attention patterns, and the files that keep the patterns."""

import io

import numpy as np
import pytest
import torch
from small_models import perturbed_model

from data.batches import document_ids
from model.gpt import GPT
from model.taps import taps
from report.pictures import FUTURE, RAMP, shade
from report.snapshots import PatternSnapshot, SnapshotFolder, read_passages

RANDOM = np.random.default_rng(0)


def causal_patterns(L: int, H: int, T: int) -> np.ndarray:
    """(L, H, T, T) uint8: softmax of normal numbers, as a trained model's rows look."""
    scores = np.exp(2 * RANDOM.standard_normal((L, H, T, T))) * np.tri(T)
    return (255 * scores / scores.sum(-1, keepdims=True)).round().astype(np.uint8)


def test_a_colour_is_that_of_the_square_root_of_the_weight():
    patterns = RANDOM.integers(0, 256, (2, 3, 9, 9), dtype=np.uint8)
    shaded = shade(patterns)
    for place in np.ndindex(patterns.shape):
        *_, query, key = place
        expected = FUTURE
        if key <= query:
            level = 4 * (patterns[place] / 255) ** 0.5          # RAMP has five colours
            below = min(int(level), 3)
            expected = RAMP[below] + (level - below) * (RAMP[below + 1] - RAMP[below])
        assert np.abs(shaded[place] - np.floor(expected)).max() <= 1, place
    assert tuple(shade(np.full((1, 1), 255, np.uint8))[0, 0]) == tuple(RAMP[-1])


@pytest.mark.parametrize("lengths", [(9, 9), (9, 6)])
def test_passages_of_one_length_share_a_pass(monkeypatch, lengths):
    model, document_start = perturbed_model(), 0
    passages = [torch.arange(length) % 4 for length in lengths]        # documents of 4 tokens
    passes, hidden = [], GPT.hidden
    monkeypatch.setattr(GPT, "hidden", lambda *arguments, **options: (
        passes.append(1) or hidden(*arguments, **options)))
    readings = read_passages(model, passages, document_start)
    assert len(passes) == len(set(lengths))
    for passage, pattern, losses, right in zip(passages, *readings):
        with taps(model, "L*.pattern") as acts, torch.no_grad():
            final = hidden(model, passage[None],
                           segments=document_ids(passage[None], document_start))
        dense = torch.stack([acts[f"L{n}.pattern"][0] for n in range(model.config.n_layers)])
        assert pattern.shape == dense.shape
        assert np.abs(pattern / 255 - dense.numpy()).max() <= 0.5 / 255 + 1e-6
        log_p = model.unembed(final)[0, :-1].detach().double().log_softmax(-1)
        assert np.allclose(losses, -log_p.gather(1, passage[1:, None])[:, 0], atol=1e-5)
        assert right.tolist() == (log_p.argmax(-1) == passage[1:]).tolist()
        assert (pattern[..., 4:, :4] == 0).all()


def test_a_snapshot_is_hardly_larger_than_numpys(tmp_path):
    patterns = causal_patterns(12, 12, 128)
    folder = SnapshotFolder(tmp_path)
    rows = patterns[..., *np.tril_indices(128)]
    folder.save(PatternSnapshot(50, 999, [patterns]))
    by_numpy = io.BytesIO()
    np.savez_compressed(by_numpy, pattern_0=rows)
    assert (tmp_path / "000050.npz").stat().st_size < 1.2 * len(by_numpy.getvalue())
    snapshot, = folder
    assert (snapshot.step, snapshot.tokens) == (50, 999)
    assert np.array_equal(snapshot.patterns[0], patterns)


@pytest.mark.parametrize("write", [np.savez_compressed, np.savez])
def test_snapshots_of_earlier_versions_are_read(tmp_path, write):
    """They wrote with numpy; and numpy reads what is written now."""
    patterns = [causal_patterns(2, 3, 5), causal_patterns(2, 3, 7)]
    folder = SnapshotFolder(tmp_path)
    folder.save(PatternSnapshot(7, 10 ** 10, patterns))
    with np.load(tmp_path / "000007.npz", allow_pickle=False) as saved:
        write(tmp_path / "000008.npz", **saved)
        assert saved["tokens"] == 10 ** 10
        assert saved["pattern_1"].shape == (2, 3, 28)
    new, earlier = folder
    assert earlier.tokens == new.tokens
    for n in range(2):
        assert np.array_equal(earlier.patterns[n], patterns[n])
        assert np.array_equal(new.patterns[n], patterns[n])
