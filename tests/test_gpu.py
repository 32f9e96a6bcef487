"""Training and sampling on a GPU: `python -m pytest -m gpu`."""

from statistics import mean

import pytest
import torch
from commands import command, succeeds
from conftest import metrics
from small_models import perturbed_model, tokens_by_row

from model.compiled import GRAIN, CompiledStep
from model.generate import Sampling, generate, start_reading
from model.kv_cache import KVCache

pytestmark = [pytest.mark.gpu,
              pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def test_training_with_our_kernels_and_with_pytorchs(workplace):
    """Over 200 steps in bf16, losses differ no more between kernels than between two seeds."""
    options = ["train.steps=200", "model.d_model=128", "model.d_head=64", "model.n_ctx=64",
               "train.batch_tokens=4096", "train.precision=bf16"]
    final_losses = {}
    for name, backend, seed in (("sdpa", "sdpa", 1), ("triton", "triton", 1), ("sdpa2", "sdpa", 2)):
        succeeds(command("train.py", "tiny.yaml", f"run={name}", f"seed={seed}",
                         f"train.attention={backend}", *options))
        records = metrics(workplace / "runs" / name).values()
        losses = [record["train/loss"] for record in records if "train/loss" in record]
        final_losses[name] = mean(losses[-50:])
        assert losses[-1] < losses[0] - 1
    between_backends = abs(final_losses["triton"] - final_losses["sdpa"])
    between_seeds = abs(final_losses["sdpa2"] - final_losses["sdpa"])
    assert between_backends <= between_seeds + 0.01, final_losses


def test_replayed_steps_compute_what_the_model_computes():
    """Two rows of different lengths. The longer one outgrows the slots of the first graph."""
    model = perturbed_model(n_layers=2, d_model=128, n_ctx=2 * GRAIN, vocab_size=257,
                            window=[64, None]).cuda().pack()
    step = CompiledStep(model)
    caches = [KVCache(model.config, 2, 2 * GRAIN + 1, device="cuda") for _ in range(2)]
    with torch.inference_mode():
        tokens = torch.randint(257, (2, GRAIN - 8), device="cuda")
        lengths = torch.tensor([GRAIN - 8, 20], device="cuda")
        for cache in caches:
            model(tokens, cache=cache, lengths=lengths)
        for n in range(16):
            replayed = step(tokens[:, n:n + 1], caches[0])
            expected = model(tokens[:, n:n + 1], cache=caches[1])
            assert expected.std() > 0.1                     # a new model's logits are all zero
            assert (replayed - expected).abs().max() < 1e-3 * expected.std()
    assert len(step.graphs) == 2


class WaitedFor:
    """A compiled step as `generate` sees it on a CPU: it starts when the tokens have been read."""

    on_gpu = False

    def __init__(self, step: CompiledStep):
        self.step, self.new_cache = step, step.new_cache

    def __call__(self, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
        return self.step(tokens, cache)


def test_a_step_that_starts_early_changes_no_token():
    """Rows end at different times, others take their places, and contexts overflow."""
    model = perturbed_model(n_layers=2, d_model=128, n_ctx=32, vocab_size=257).cuda().pack()
    prompts, step = [[1, 2, 3], [7], [4] * 9, [5, 6], [8, 3, 1]], CompiledStep(model)

    def texts(compiled_step: CompiledStep | WaitedFor) -> list[list[int]]:
        return tokens_by_row(generate(model, prompts, 40, Sampling(), seed=5, ends=range(8),
                                      slide=True, batch_size=2, compiled_step=compiled_step), 5)

    early = texts(step)
    assert texts(WaitedFor(step)) == early
    assert len({len(text) for text in early}) > 1


def test_reading_tokens_does_not_wait_for_later_work():
    tokens = torch.arange(5, device="cuda")
    cycles = int(1.5e9)                                     # about a second
    torch.cuda._sleep(1000)
    torch.cuda.synchronize()
    read = start_reading(tokens)
    torch.cuda._sleep(cycles)
    assert read() == [0, 1, 2, 3, 4]
    assert not torch.cuda.current_stream().query()          # the work still runs
