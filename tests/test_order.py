"""The order of batches at 10¹² tokens: the bench in short, and its statistics on orders that are
not random."""

import json

import numpy as np
import pytest
from commands import command, fails

from bench import order
from data.batches import TextWindows


def test_batches_of_a_trillion_tokens_are_the_same_on_any_number_of_processes():
    for repeats in (False, True):
        batches = order.make_batches(10 ** 12, 3000, n_ctx=64, batch_tokens=64 * 48,
                                     repeats=repeats)
        compared = order.check_shares(batches, [0, 7, 3 * 10 ** 8], (1, 8, 25, 48))
        assert compared == 3 * (1 + 8 + 25 + 48)


def test_an_epoch_reads_every_window_of_many_shards_once():
    windows = TextWindows(order.corpus(10 ** 8, 500), 512, seed=1)
    assert order.check_epoch(windows) == windows.windows_per_epoch == (10 ** 8 - 512) // 512
    windows.starts = lambda n: TextWindows.starts(windows, n // 2 * 2)
    with pytest.raises(AssertionError, match="never read"):
        order.check_epoch(windows)


def test_the_order_of_a_trillion_looks_like_chance_and_a_plain_one_does_not(monkeypatch):
    figures = order.randomness(10 ** 12, 200_000, key=5)
    assert figures["duplicates"] == 0
    assert figures["p_uniform"] > 0.001 and figures["p_serial"] > 0.001
    monkeypatch.setattr(order, "permute", lambda index, size, key: index * 7919 % size)
    plain = order.randomness(10 ** 12, 200_000, key=5)
    assert plain["p_serial"] < 1e-6

    def lower_half(index: np.ndarray, size: int, key: int) -> np.ndarray:
        return np.sort(np.random.default_rng(0).integers(size // 2, size=len(index)))

    monkeypatch.setattr(order, "permute", lower_half)
    assert order.randomness(10 ** 12, 200_000, key=5)["p_uniform"] < 1e-6


def test_the_cost_of_an_index_does_not_grow_with_the_corpus():
    small, large = (order.cost(tokens, 64, 50_000) for tokens in (10 ** 8, 10 ** 12))
    assert large["peak_bytes_an_index"] < 2 * small["peak_bytes_an_index"] < 1000


def test_the_bench_runs(workplace):
    done = command("-m bench.order", "--tokens", "1e10", "--epoch", "1e6", "--n-ctx", "16",
                   "--batch-tokens", "16384", "--indices", "20000",
                   cwd=workplace, env={"BENCH_RESULTS": str(workplace / "results")})
    assert done.returncode == 0, done.stderr
    result = json.loads((workplace / "results" / "order.json").read_text())
    assert result["epoch_windows"] == 62499 and len(result["cost"]) == 7
    assert result["text"]["shares_compared"] == 2 * (1 + 8 + 1000 + 1024)
    fails(command("-m bench.order", "--batch-tokens", "64", cwd=workplace), "at least 1024 windows")
