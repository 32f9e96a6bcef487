"""Batches are functions of the step: permutations, epochs, quotas, synthetic rows, validation."""

from collections import Counter
from math import floor

from errors import UserError

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_prepare import data_config

from data.batches import (
    Batches,
    BegunRows,
    Quotas,
    RepeatRows,
    TextWindows,
    permute,
    repeat_vocabulary,
)
from data.config import MixtureEntry, RepeatsConfig
from data.dataset import Dataset
from data.shards import TokenStream

BYTES = np.arange(256)


@given(st.integers(1, 3000), st.integers(0, 2 ** 128))
def test_a_permutation_hits_everything_once(size, key):
    assert sorted(permute(np.arange(size), size, key)) == list(range(size))


def test_a_permutation_is_uniform_and_differs_by_key():
    hits = Counter(int(permute(np.array([3]), 10, key)[0]) for key in range(5000))
    assert all(400 < hits[n] < 600 for n in range(10))      # 500 ± 4.7 standard deviations
    far = permute(np.arange(10 ** 9, 10 ** 9 + 1000), 3 * 10 ** 9, 1)
    assert len(set(far)) == 1000 and abs(far.mean() / 3e9 - 0.5) < 0.05


def test_an_epoch_reads_each_window_once_and_the_next_in_another_order():
    stream = TokenStream([np.arange(n, n + 100, dtype=np.uint16) for n in range(0, 1000, 100)])
    windows = TextWindows(stream, 7, seed=3)
    rows = windows.rows(np.arange(2 * windows.windows_per_epoch))
    assert (np.diff(rows, axis=1) == 1).all()               # tokens in a row, across shard borders
    for epoch in np.split(rows, 2):
        starts = np.sort(epoch[:, 0])
        assert (np.diff(starts) == 7).all() and len(starts) == (1000 - 7) // 7
    assert list(rows[:windows.windows_per_epoch, 0]) != list(rows[windows.windows_per_epoch:, 0])


def test_the_smallest_text_is_one_window():
    windows = TextWindows(TokenStream([np.arange(8, dtype=np.uint16)]), 7, seed=0)
    assert windows.rows(np.arange(3)).tolist() == [list(range(8))] * 3
    with pytest.raises(UserError, match="less than one window"):
        TextWindows(TokenStream([np.arange(7, dtype=np.uint16)]), 7, seed=0)


def test_shares_of_any_number_of_processes_make_the_same_batch():
    stream = TokenStream([np.arange(5000, dtype=np.uint16)])
    entries = [MixtureEntry(corpus="stdlib", weight=0.7),
               MixtureEntry(corpus="repeats", weight=0.3)]
    repeats = RepeatRows(RepeatsConfig(period=[2, 5]), 16, BYTES, 1)
    sources = {"stdlib": TextWindows(stream, 16, 1), "repeats": repeats}
    batches = Batches(sources, entries, 12 * 16, 16)
    for step in (0, 5, 10 ** 9):
        batch = batches[step]
        assert batch.tokens.shape == batch.targets.shape == (12, 16)
        assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
        for world_size in (1, 2, 3, 4):
            shares = [batches.share(step, rank, world_size).tokens for rank in range(world_size)]
            assert torch.equal(torch.cat(shares), batch.tokens)
    prefetched = list(batches.prefetch(3, 7, torch.device("cpu")))
    assert len(prefetched) == 4
    for step, batch in enumerate(prefetched, 3):
        assert torch.equal(batch.tokens, batches[step].tokens)


def test_quotas_are_exact_at_every_step():
    entries = [MixtureEntry(corpus="repeats", weight=0.3),
               MixtureEntry(corpus="stdlib", weight=0.7)]
    owners = [Quotas(entries, 4).locate(n) for n in range(1000)]
    for n in range(1000):
        indices = [index for owner, index in owners[:n + 1] if owner == "repeats"]
        assert len(indices) == floor((n + 1) * 3 / 10) and indices == list(range(len(indices)))


ENTRIES = st.tuples(st.sampled_from(["stdlib", "files", "repeats"]), st.floats(0.01, 5),
                    st.none() | st.integers(1, 9))


@given(st.lists(ENTRIES, min_size=1, max_size=5), st.integers(1, 5))
def test_every_window_has_one_owner_whatever_the_weights(entries, windows):
    entries = [MixtureEntry(corpus=c, weight=w, until=u) for c, w, u in entries]
    entries.append(MixtureEntry(corpus="stdlib", weight=1.0))
    quotas, counted = Quotas(entries, windows), Counter()
    for n in range(windows * 15):
        name, index = quotas.locate(n)
        assert index == counted[name]
        counted[name] += 1


def test_weights_change_at_the_named_step():
    entries = [MixtureEntry(corpus="repeats", weight=1.0, until=3),
               MixtureEntry(corpus="stdlib", weight=1.0)]
    owners = [Quotas(entries, 4).locate(n)[0] for n in range(24)]
    assert owners[:12].count("repeats") == 6 and owners[12:].count("repeats") == 0


def test_repeat_rows_repeat_distinct_tokens_of_periods_in_training():
    config = RepeatsConfig(period=[3, 9], held_out_periods=[4, 8], held_out_tokens=0.25)
    trained, held_out = repeat_vocabulary(config, BYTES, seed=5)
    assert len(held_out) == 64 and not set(trained) & set(held_out)
    rows = RepeatRows(config, 30, BYTES, seed=5).rows(np.arange(300))
    periods = set()
    for row in rows:
        assert len(row) == 31 and set(row) <= set(trained)
        period = next(p for p in range(1, 31) if (row[p:] == row[:-p]).all())
        assert len(set(row[:period])) == period
        periods.add(period)
    assert periods == {3, 5, 6, 7, 9}
    again = RepeatRows(config, 30, BYTES, seed=5).rows(np.array([7]))
    assert (again == rows[7]).all()
    other = RepeatRows(config, 30, BYTES, 5, "validation").rows(np.array([7]))
    assert not (other == rows[7]).all()


def test_a_fraction_of_the_rows_begins_with_the_begin_token():
    source = RepeatRows(RepeatsConfig(period=[3, 9]), 30, BYTES, seed=5)
    index = np.arange(2000)
    plain, begun = source.rows(index), BegunRows(source, 256, 0.3, 5, "repeats").rows(index)
    first = begun[:, 0] == 256
    assert (begun[~first] == plain[~first]).all() and (begun[first, 1:] == plain[first, :-1]).all()
    assert abs(first.mean() - 0.3) < 0.04                       # four standard deviations
    again = BegunRows(source, 256, 0.3, 5, "repeats").rows(index[7:9])
    assert (again == begun[7:9]).all()
    other = BegunRows(source, 256, 0.3, 5, "text").rows(index)[:, 0] == 256
    assert 0.05 < (first & other).mean() < 0.13                 # independent: 0.09
    for fraction, expected in ((0.0, 0), (1.0, 2000)):
        rows = BegunRows(source, 256, fraction, 5, "repeats").rows(index)
        assert (rows[:, 0] == 256).sum() == expected


def test_rows_of_earlier_versions_stay_as_they_were(workplace):
    """Without data.begin_fraction all repeats begin with the token, and no text is put behind
    it."""
    entries = [{"corpus": "files", "weight": 0.5}, {"corpus": "repeats", "weight": 0.5}]
    config = data_config(corpus=None, mixture=entries)
    batches = Dataset(config, seed=0).training(2048, 64)
    repeats = batches.sources["repeats"].rows(np.arange(50))
    assert (repeats[:, 0] == 256).all()
    text = batches.sources["files"].rows(np.arange(50))
    plain = TextWindows(Dataset(config, seed=0).shards.train, 64, 0).rows(np.arange(50))
    assert (text == plain).all()


def test_text_and_repeats_begin_alike(workplace):
    entries = [{"corpus": "files", "weight": 0.5}, {"corpus": "repeats", "weight": 0.5}]
    config = data_config(corpus=None, mixture=entries, begin_fraction=0.5)
    data = Dataset(config, seed=0)
    batches = data.training(2048, 64)
    for source in batches.sources.values():
        begun = (source.rows(np.arange(1000))[:, 0] == 256).mean()
        assert abs(begun - 0.5) < 0.07
    validation = data.validation(64 * 400, 64, 1000)[0].tokens
    assert abs((validation[:, 0] == 256).double().mean() - 0.5) < 0.12


def test_documents_are_numbered_for_the_mask(workplace):
    config = data_config(mask_documents=True)
    batch = Dataset(config, seed=0).training(256, 64)[0]
    assert torch.equal(batch.segments, (batch.tokens == 256).cumsum(1))
    assert Dataset(data_config(), seed=0).training(256, 64)[0].segments is None


def test_validation_windows_are_held_out_and_always_the_same(workplace):
    data = Dataset(data_config(), seed=0)
    batches = data.validation(2048, 64, windows_per_batch=10)
    assert sum(len(b.tokens) for b in batches) == 32 and all(len(b.tokens) <= 10 for b in batches)
    again = Dataset(data_config(), seed=9).validation(2048, 64, 10)
    assert all(torch.equal(a.targets, b.targets) for a, b in zip(batches, again))
    held_out = data.shards.val.read(0, len(data.shards.val)).astype(np.uint16).tobytes()
    for row in torch.cat([b.tokens for b in batches]):
        assert row.numpy().astype(np.uint16).tobytes() in held_out
