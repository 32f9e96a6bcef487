"""model/taps.py: taps read what was computed, pass on what replaces it, and leave no trace."""

import threading

import pytest
import torch
import torch.nn.functional as F

from kernels.reference import attention_pattern
from model.config import ModelConfig
from model.gpt import GPT
from model.kv_cache import KVCache
from model.taps import Head, activation_names, heads_of, taps

CONFIG = ModelConfig(n_layers=2, n_heads=4, n_kv_heads=2, d_model=32, n_ctx=32, vocab_size=50,
                     window=[None, 7], zero_init=False)
NAMES = activation_names(CONFIG)
TOKENS = torch.randint(0, 50, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> GPT:
    model = GPT(CONFIG, seed=3)
    torch.nn.init.normal_(model.lm_head.weight, generator=torch.Generator().manual_seed(1))
    return model


def of_layer(cache: dict[str, torch.Tensor], layer: int) -> dict[str, torch.Tensor]:
    """The activations of a layer by the part of their name after the dot."""
    prefix = f"L{layer}."
    return {name.removeprefix(prefix): activation for name, activation in cache.items()
            if name.startswith(prefix)}


def test_every_name_is_read_and_reading_changes_no_bit(model):
    untouched = model(TOKENS)
    with taps(model, "*") as cache:
        assert torch.equal(model(TOKENS), untouched)
    assert sorted(cache) == sorted(NAMES) and len(NAMES) == 2 * 10 + 3
    B, T, H, K, D, E = 2, 20, 4, 2, 8, 32
    shapes = {"resid_pre": (B, T, E), "q": (B, H, T, D), "k": (B, K, T, D), "v": (B, K, T, D),
              "lse": (B, H, T), "pattern": (B, H, T, T), "z": (B, H, T, D),
              "attn_out": (B, T, E), "mlp_out": (B, T, E), "resid_post": (B, T, E)}
    for layer in range(2):
        for part, shape in shapes.items():
            assert cache[f"L{layer}.{part}"].shape == shape, part
    assert cache["embed"].shape == cache["final"].shape == (B, T, E)
    assert cache["logits"].shape == (B, T, 50)


def test_activations_satisfy_the_equations_of_a_block(model):
    """Each is recomputed from the activations on the right-hand side of its equation."""
    with taps(model, "*") as cache, torch.no_grad():
        model(TOKENS)
    torch.testing.assert_close(cache["L0.resid_pre"], cache["embed"])
    for layer, window in enumerate(CONFIG.windows):
        at = of_layer(cache, layer)
        pattern, lse = attention_pattern(at["q"], at["k"], window=window)
        torch.testing.assert_close(at["pattern"], pattern)
        torch.testing.assert_close(at["lse"], lse)
        torch.testing.assert_close(at["z"], pattern @ at["v"].repeat_interleave(2, dim=1))
        joined = at["z"].transpose(1, 2).flatten(2)                     # (B, T, H · D)
        torch.testing.assert_close(at["attn_out"], model.blocks[layer].attn.w_o(joined))
        expected = at["resid_pre"] + at["attn_out"] + at["mlp_out"]
        torch.testing.assert_close(at["resid_post"], expected)
    torch.testing.assert_close(cache["final"], model.norm_final(cache["L1.resid_post"]))
    torch.testing.assert_close(cache["logits"], model.unembed(cache["final"]))


@torch.no_grad()
def test_parallel_parts_read_the_same_stream():
    config = CONFIG.model_copy(
        update={"parallel": True, "norm": "layernorm", "bias": "all", "rope_dims": 4})
    model = GPT(config)
    for p in model.parameters():
        generator = torch.Generator().manual_seed(p.numel())
        p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    with taps(model, "*") as cache:
        model(TOKENS)
    for layer, block in enumerate(model.blocks):
        at = of_layer(cache, layer)
        torch.testing.assert_close(at["mlp_out"], block.mlp(block.norm_mlp(at["resid_pre"])))
        joined = at["z"].transpose(1, 2).flatten(2)                     # (B, T, H · D)
        torch.testing.assert_close(at["attn_out"], block.attn.w_o(joined))
        expected = at["resid_pre"] + at["attn_out"] + at["mlp_out"]
        torch.testing.assert_close(at["resid_post"], expected)
        gain, bias = block.norm_attn.gain, block.norm_attn.bias
        normed = F.layer_norm(at["resid_pre"], (32,), gain, bias, config.norm_eps)
        values = normed @ block.attn.w_v.weight.T + block.attn.w_v.bias         # (B, T, K · D)
        torch.testing.assert_close(at["v"].transpose(1, 2).flatten(2), values)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("lse")])
def test_a_replacement_is_passed_on(name, model):
    """Replaced by itself it changes nothing beyond rounding; by something else, the logits."""
    untouched = model(TOKENS)
    with taps(model, {name: lambda x: x.clone()}):
        torch.testing.assert_close(model(TOKENS), untouched, atol=1e-5, rtol=1e-5)
    with taps(model, {name: lambda x: x.flip(1)}) as cache:
        changed = model(TOKENS)
        assert not torch.allclose(changed, untouched, atol=1e-2)
    with taps(model, {name: lambda x: None}):
        assert torch.equal(model(TOKENS), untouched)
    assert cache[name].shape and torch.equal(model(TOKENS), untouched)


def test_a_head_without_output_is_a_head_without_its_rows_of_w_o(model):
    def without_head_2(z):
        z = z.clone()
        z[:, 2] = 0
        return z

    with taps(model, {"L1.z": without_head_2}):
        tapped = model(TOKENS)
    with torch.no_grad():
        model.blocks[1].attn.w_o.weight[:, 2 * 8:3 * 8] = 0
    torch.testing.assert_close(tapped, model(TOKENS))


@pytest.mark.parametrize("name", ["L0.pattern", "L0.z"])
def test_editing_in_place_replaces(model, name):
    def silence_in_place(x: torch.Tensor) -> None:
        x[:, 1] = 0

    def silenced(x: torch.Tensor) -> torch.Tensor:
        return x.index_fill(1, torch.tensor([1]), 0)

    with torch.no_grad(), taps(model, {name: silence_in_place}):
        edited = model(TOKENS)
    with torch.no_grad(), taps(model, {name: silenced}):
        assert torch.allclose(model(TOKENS), edited, atol=1e-6)
    assert not torch.allclose(model(TOKENS), edited, atol=1e-3)


def test_names_by_wildcard_list_and_function(model):
    for selection in ("L*.q", ["L0.q", "L1.q"], lambda name: name.endswith(".q"), {"L*.q": None}):
        with taps(model, selection) as cache:
            model(TOKENS)
        assert list(cache) == ["L0.q", "L1.q"]


@pytest.mark.parametrize(("unknown", "nearest"), [
    ("L1.patern", "L1.pattern"), ("L2.q", r"L\d\.q"), ("L*.zz", r"L\d\.z"), ("finale", "final")])
def test_an_unknown_name_raises_with_the_nearest(model, unknown, nearest):
    with pytest.raises(ValueError, match=f"did you mean {nearest}"):
        with taps(model, ["embed", unknown]):
            pass
    assert not model.tapped


def test_impossible_taps_are_refused(model):
    attention_only = GPT(CONFIG.model_copy(update={"mlp": "none"}))
    with pytest.raises(ValueError, match="mlp_out"):
        taps(attention_only, "L0.mlp_out").__enter__()
    with pytest.raises(ValueError, match="none of the activations"):
        taps(model, lambda name: False).__enter__()
    for replacements, message in (({"L0.lse": lambda lse: lse + 1}, "only be read"),
                                  ({"L0.q": lambda q: q[:, :2]}, "its replacement")):
        with taps(model, replacements), pytest.raises(ValueError, match=message):
            model(TOKENS)
    with taps(model, "logits"), pytest.raises(ValueError, match="logits"):
        model.loss(TOKENS, TOKENS)
    cache = KVCache(CONFIG, 2, 32, torch.float32, torch.device("cpu"))
    with taps(model, "L0.pattern"), pytest.raises(ValueError, match="cache"):
        model(TOKENS, cache=cache)
    assert not model.tapped


def test_blocks_nest_and_the_inner_sees_what_the_outer_replaced(model):
    with taps(model, {"embed": lambda x: x * 0}):
        with taps(model, "embed") as cache:
            logits = model(TOKENS)
        assert cache["embed"].abs().max() == 0
        assert torch.equal(model(TOKENS), logits)
    assert not torch.equal(model(TOKENS), logits) and not model.tapped


def test_an_exception_leaves_the_model_as_it_was(model):
    untouched = model(TOKENS)

    def breaks(x):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        with taps(model, {"embed": lambda x: x * 0}), taps(model, {"L1.z": breaks}):
            model(TOKENS)
    assert not model.tapped and torch.equal(model(TOKENS), untouched)


def test_taps_act_only_on_their_own_thread_and_model(model):
    other, untouched = GPT(CONFIG, seed=4), model(TOKENS)
    embeddings: dict[float, torch.Tensor] = {}
    tapped, finished = threading.Barrier(3), threading.Barrier(3)

    def run(scale: float) -> None:
        with taps(model, {"embed": lambda x: x * scale}) as cache:
            tapped.wait()
            model(TOKENS)
            embeddings[scale] = cache["embed"]
            finished.wait()

    threads = [threading.Thread(target=run, args=[scale]) for scale in (0.0, 2.0)]
    for thread in threads:
        thread.start()
    tapped.wait()
    with taps(other, "embed") as cache:
        assert torch.equal(model(TOKENS), untouched)    # tapped by two threads, but not by this one
        assert not cache
    finished.wait()
    for thread in threads:
        thread.join()
    assert embeddings[0.0].abs().max() == 0
    assert torch.equal(embeddings[2.0], 2 * model.embed(TOKENS)) and not model.tapped


@pytest.mark.filterwarnings("ignore")
def test_compiled_code_has_no_trace_of_taps_and_taps_work_on_it(model):
    """One graph without a break, not compiled again after taps.

    Taps on a compiled model are called, not skipped in silence.
    """
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model.loss, backend=backend, fullgraph=True, dynamic=False)
    untouched = compiled(TOKENS, TOKENS)
    assert len(graphs) == 1 and untouched == model.loss(TOKENS, TOKENS)
    with_breaks = torch.compile(model.loss, backend="eager", dynamic=False)
    with taps(model, {"L1.z": lambda z: z * 0}) as cache:
        assert with_breaks(TOKENS, TOKENS) != untouched and list(cache) == ["L1.z"]
    assert compiled(TOKENS, TOKENS) == untouched and len(graphs) == 1


def test_heads_know_their_key_head():
    assert [str(head) for head in heads_of(CONFIG)][3:6] == ["L0H3", "L1H0", "L1H1"]
    assert [Head(0, index).key_head(CONFIG) for index in range(4)] == [0, 0, 1, 1]
