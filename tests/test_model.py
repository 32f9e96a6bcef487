"""The network: cached decoding against the full pass, positions, loss, initial weights."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from small_models import cache_tensors, perturbed_model, saved_for_backward

from model import cross_entropy
from model.attention import Context
from model.config import ModelConfig, RopeScaling
from model.gpt import GPT
from model.kv_cache import KVCache
from model.position import rope_table, rotate, sinusoidal_table
from model.taps import NO_TAPS

SHAPES = {
    "rope": {}, "learned": {"position": "learned"}, "sinusoidal": {"position": "sinusoidal"},
    "none": {"position": "none"}, "window": {"window": 5}, "windows": {"window": [None, 3, 7]},
    "mqa": {"n_kv_heads": 1}, "mha": {"n_kv_heads": 4}, "smear": {"smear": True},
    "smear window qk": {"smear": True, "window": 4, "qk_norm": True}, "wide head": {"d_head": 24},
    "attention only": {"mlp": "none", "tied_embeddings": True}, "gelu": {"mlp": "gelu"},
    "relu2": {"mlp": "relu2", "n_layers": 1}, "layernorm": {"norm": "layernorm", "bias": "qkv"},
    "biases": {"bias": "all"},
    "gpt2": {"norm": "layernorm", "bias": "all", "mlp": "gelu_tanh", "position": "learned",
             "n_kv_heads": 4},
    "pythia": {"norm": "layernorm", "bias": "all", "mlp": "gelu", "parallel": True, "rope_dims": 4,
               "n_kv_heads": 4},
    "scaled rope": {"rope_scaling": {"kind": "yarn", "factor": 4.0, "original_n_ctx": 8},
                    "bias": "mlp", "window": 6},
}


def random_tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(50, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_cached_logits_are_the_full_pass(shape):
    model, tokens = perturbed_model(**shape), random_tokens(3, 24)
    full = model(tokens)
    prefill, chunks, single_tokens = [0, 24], [0, 7, 8, 9, 16, 17, 24], list(range(25))
    for cuts in (prefill, chunks, single_tokens):
        cache = KVCache(model.config, 3, 24)
        parts = [model(tokens[:, a:b], cache=cache) for a, b in pairwise(cuts)]
        assert torch.allclose(torch.cat(parts, 1), full, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_ragged_rows_are_the_full_pass(shape):
    model, tokens = perturbed_model(**shape), random_tokens(4, 24)
    full = model(tokens)
    cache, start = KVCache(model.config, 4, 24), torch.zeros(4, dtype=torch.long)
    rows = torch.arange(4)
    # Prompts of different lengths, some single tokens, a ragged chunk on top, more tokens.
    for new in ([3, 9, 1, 6], 1, 1, 1, [2, 5, 1, 0], 1, 1, [4, 1, 3, 2], 1):
        if isinstance(new, int):
            count = torch.full((4,), new)
            logits = model(tokens[rows, start][:, None], cache=cache)
        else:
            count = torch.tensor(new)
            longest = int(count.max())
            padded = torch.zeros(4, longest, dtype=torch.long)
            for row in rows:
                padded[row, :count[row]] = tokens[row, start[row]:start[row] + count[row]]
            logits = model(padded, cache=cache, lengths=count)
        for row in rows:
            expected = full[row, start[row]:start[row] + count[row]]
            assert torch.allclose(logits[row, :count[row]], expected, atol=1e-4)
        start += count


@pytest.mark.parametrize("shape", [{}, {"smear": True, "window": [4, None]}], ids=str)
@torch.no_grad()
def test_a_cache_keeps_its_addresses(shape):
    """Whatever is done to it: a captured decoding step knows only the addresses."""
    model, tokens = perturbed_model(**shape), torch.randint(50, (3, 6))
    lengths = torch.tensor([6, 2, 4])
    cache, other = KVCache(model.config, 3, 24), KVCache(model.config, 1, 24)
    model(tokens[:1], cache=other)

    def addresses() -> list[int]:
        return [tensor.data_ptr() for tensor in cache_tensors(cache)]

    before = addresses()
    for change in (
            lambda: model(tokens, cache=cache, lengths=lengths),            # ragged rows
            lambda: model(tokens[:, :1], cache=cache),
            lambda: model(tokens, cache=cache, lengths=lengths),
            lambda: cache.replace_rows([1], other),
            lambda: cache.clear_rows([0]),
            lambda: model(tokens[:, :1], cache=cache),
            cache.reset,
            lambda: model(tokens, cache=cache),
            cache.make_ragged,
            lambda: model(tokens[:, :1], cache=cache),
            cache.reset,
            lambda: model(tokens[:, :1], cache=cache),
            lambda: cache.select_rows([0, 2])):
        change()
        assert addresses() == before
    assert cache.select_rows([2]) is not cache and cache.select_rows([2]).keys[0].shape[0] == 1


def test_a_windowed_cache_stays_at_the_window():
    config = perturbed_model(window=[4, None]).config
    cache = KVCache(config, 1, 32)
    assert [k.shape[2] for k in cache.keys] == [4, 32, 4]


def test_documents_do_not_see_each_other():
    # With rope too: shifting queries and keys together changes nothing.
    for shape in ({"position": "none"}, {"position": "none", "smear": True}, {}):
        model, tokens = perturbed_model(**shape), torch.randint(50, (1, 20))
        segments = (torch.arange(20) >= 12).long()[None]
        together = model(tokens, segments=segments)
        assert torch.allclose(together[:, :12], model(tokens[:, :12]), atol=1e-5)
        assert torch.allclose(together[:, 12:], model(tokens[:, 12:]), atol=1e-4)


def test_rope_is_the_rotation_of_the_paper_and_sees_only_distance():
    D, base = 8, 100.0
    table = rope_table(40, D, base)
    q, k = torch.randn(D, dtype=torch.float64), torch.randn(D, dtype=torch.float64)
    rotated = rotate(q.expand(40, D), table)
    for m in (0, 1, 39):
        for i in range(D // 2):
            angle = m * base ** (-2 * i / D)
            expected = complex(q[i], q[i + D // 2]) * complex(math.cos(angle), math.sin(angle))
            assert abs(complex(rotated[m, i], rotated[m, i + D // 2]) - expected) < 1e-6
    scores = rotate(q.expand(40, D), table) @ rotate(k.expand(40, D), table).T
    assert torch.allclose(scores[5:, 5:], scores[:-5, :-5], atol=1e-5)


def test_scaled_rope_keeps_the_fast_pairs_and_slows_the_slow_ones():
    plain = rope_table(100, 64, 10000.0)
    angle = torch.atan2(plain[1, 1, 32:], plain[0, 1, 32:])     # each pair's, from position 0 to 1
    for kind, size in (("linear", 1.0), ("llama3", 1.0), ("yarn", 0.1 * math.log(4) + 1)):
        scaling = RopeScaling(kind=kind, factor=4.0, original_n_ctx=64)
        table = rope_table(100, 64, 10000.0, scaling)
        length = table[:, 1, 32:].norm(dim=0)
        assert torch.allclose(length, torch.tensor(size), atol=1e-6)
        scaled = torch.atan2(table[1, 1, 32:], table[0, 1, 32:])
        assert torch.allclose(scaled[0], angle[0] / (4 if kind == "linear" else 1), atol=1e-6)
        assert torch.allclose(scaled[-1], angle[-1] / 4, atol=1e-9)
        assert (scaled[1:] < scaled[:-1]).all()


def test_rope_rotates_only_the_first_rope_dims_numbers():
    x, table = torch.randn(2, 10, 16), rope_table(10, 6, 100.0)
    rotated = rotate(x, table)
    assert torch.equal(rotated[..., 6:], x[..., 6:])
    assert torch.equal(rotated[..., :6], rotate(x[..., :6], table))
    assert not torch.allclose(rotated[:, 1:, :6], x[:, 1:, :6])


def test_sinusoids_are_those_of_the_paper():
    table = sinusoidal_table(10, 6)
    for position in range(10):
        for i in range(3):
            angle = position / 10000 ** (2 * i / 6)
            assert abs(table[position, i] - math.sin(angle)) < 1e-6
            assert abs(table[position, 3 + i] - math.cos(angle)) < 1e-6


def test_smeared_keys_are_those_of_the_paper():
    model = perturbed_model(smear=True, n_layers=1)
    attn, k = model.blocks[0].attn, torch.randn(1, 2, 5, 8)
    smeared = attn.smear(k, Context(NO_TAPS))
    gate = 1 / (1 + math.exp(-attn.smear_alpha[1].item()))
    expected = gate * k[0, 1, 3] + (1 - gate) * k[0, 1, 2]
    assert torch.allclose(smeared[0, 1, 3], expected, atol=1e-6)
    assert torch.allclose(smeared[0, 1, 0], gate * k[0, 1, 0], atol=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
def test_chunked_cross_entropy_is_the_plain_one(monkeypatch, compiled):
    """Compiled, its gradient is written in another way."""
    chunked = cross_entropy.summed_cross_entropy
    if compiled:
        chunked = torch.compile(chunked, backend="aot_eager", dynamic=False)
    x, w = torch.randn(50, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    targets = torch.randint(30, (50,))
    plain = F.cross_entropy(x.double() @ w.double().T, targets, reduction="sum")
    expected = torch.autograd.grad(plain, (x, w))
    for limit in (1, 100, 2 ** 24):
        torch.compiler.reset()
        monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", limit)
        loss = chunked(x, w, targets)
        assert abs(loss.item() - plain.item()) < 1e-3
        for got, want in zip(torch.autograd.grad(3 * loss, (x, w)), expected):
            assert torch.allclose(got, 3 * want, atol=1e-4)


def test_the_first_loss_of_a_new_model_is_that_of_guessing():
    model = GPT(ModelConfig(vocab_size=100, n_ctx=16))
    tokens = torch.randint(100, (2, 16))
    assert model.loss(tokens, tokens).item() / 32 == pytest.approx(math.log(100), abs=0.2)


def test_initial_weights_depend_on_seed_and_name_and_an_unknown_name_is_refused():
    model = perturbed_model()
    first, again = GPT(model.config, seed=3), GPT(model.config, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))
    assert not torch.equal(first.embed.weight, GPT(model.config, seed=4).embed.weight)
    biased = GPT(model.config.model_copy(update={"norm": "layernorm", "bias": "all"}), seed=3)
    assert all(not p.any() for name, p in biased.named_parameters() if name.endswith(".bias"))
    assert torch.equal(biased.blocks[2].mlp.w_up.weight, first.blocks[2].mlp.w_up.weight)
    model.register_parameter("surprise", torch.nn.Parameter(torch.ones(2)))
    with pytest.raises(ValueError, match="surprise"):
        model.init_weights(0)


@pytest.mark.parametrize(("options", "message"), [
    ({"rope_dims": 3}, "rope_dims=3 must be even"),
    ({"rope_dims": 34}, "at most the 32"),
    ({"rope_dims": 4, "position": "none"}, "leave it out"),
    ({"rope_scaling": {"kind": "linear", "factor": 2.0}, "position": "learned"},
     "rope_scaling is for position: rope"),
    ({"rope_scaling": {"kind": "yarn", "factor": 2.0}}, "original_n_ctx is missing"),
    ({"rope_scaling": {"kind": "llama3", "factor": 2.0, "original_n_ctx": 64, "slow": 9.0}},
     "fast=4.0 must be more than slow=9.0"),
    ({"mlp": "none", "parallel": True}, "parallel=true needs an MLP"),
    ({"mlp": "none", "bias": "all"}, "try bias=attention"),
])
def test_options_that_exclude_each_other_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**options)


def test_more_tokens_than_n_ctx_are_refused():
    model = perturbed_model(n_ctx=8)
    with pytest.raises(ValueError, match="n_ctx=8"):
        model(torch.zeros(1, 9, dtype=torch.long))
    cache = KVCache(model.config, 1, 8)
    model(torch.zeros(1, 8, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="capacity of 8"):
        model(torch.zeros(1, 1, dtype=torch.long), cache=cache)


def test_activations_computed_again_give_the_same_gradients_from_less_memory():
    """train.checkpoint_activations: bit for bit, because it is the same arithmetic."""
    saved_bytes, gradients = [], []
    tokens = torch.arange(24).view(2, 12) % 50
    for recompute in (False, True):
        model = perturbed_model(n_layers=4)
        model.recompute_activations = recompute
        with saved_for_backward() as saved:
            loss = model.loss(tokens, tokens)
        saved_bytes.append(sum(tensor.nbytes for tensor in saved))
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert saved_bytes[1] < saved_bytes[0] / 3


def test_weights_that_arrive_in_16_bits_are_not_copied_for_the_backward_pass():
    """As FSDP gathers them: multiplied one by one, with the same result, and saved as they are."""
    model = perturbed_model(n_layers=1, mlp="swiglu").bfloat16()
    model.compute_dtype = torch.bfloat16
    tokens = torch.arange(24).view(2, 12) % 50
    with saved_for_backward() as saved:
        logits = model(tokens)
    attn = model.blocks[0].attn
    weights = [matrix.weight for matrix in (attn.w_q, attn.w_k, attn.w_v)]
    assert storages(weights) <= storages(saved)
    model.float()
    model.compute_dtype = torch.float32
    assert torch.allclose(logits.float(), model(tokens), atol=0.3, rtol=0.1)


def storages(tensors: list[torch.Tensor]) -> set[int]:
    """The addresses of the memory behind tensors, which views share."""
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}
