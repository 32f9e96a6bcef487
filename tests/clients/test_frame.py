"""The frame of make test-clients, without any client: how results are judged and written down."""

import pytest
from client import refused
from run import BOUNDS, CLIENTS, HERE, PAGE, mistakes, snippets, table_row, with_rows
from shapes import SHAPES

NNSIGHT = CLIENTS["nnsight"]


def line(shape: str, **changes) -> dict:
    return {"client": "nnsight", "version": "1", "shape": shape, "model_type": shape,
            "checks": {"ids": "equal", "logits": 2e-6, "Trainer": "works"},
            "limit": None} | changes


def test_results_are_judged():
    assert mistakes(NNSIGHT, ["gpt2"], [line("gpt2")], "") == []
    refusal = line("own-gelu", checks={}, limit="It cannot.")
    assert mistakes(NNSIGHT, ["own-gelu"], [refusal], "") == []
    wandb = {"client": "wandb", "version": "1", "checks": {"trains": True}}
    assert mistakes(NNSIGHT._replace(shapes=()), [], [wandb], "") == []
    for wrong, named in ((line("gpt2", checks={"logits": 2 * BOUNDS["logits"]}), "logits differs"),
                         (line("gpt2", checks={"logits": float("nan")}), "logits differs"),
                         (line("gpt2", checks={"new": 0.5}), "new differs"),
                         (line("gpt2", checks={"ids": "different"}), "is not a result"),
                         (line("gpt2", checks={"trains": False}), "is not a result"),
                         (line("gpt2", checks={}), "nothing was checked"),
                         (line("gpt2", error="KeyError"), "KeyError")):
        found, = mistakes(NNSIGHT, ["gpt2"], [wrong], "")
        assert named in found
    assert "no result for qwen3" in mistakes(NNSIGHT, ["gpt2", "qwen3"], [line("gpt2")], "")[0]
    assert mistakes(NNSIGHT, ["gpt2"], [line("gpt2")], "Segmentation fault")


def test_a_limit_that_has_gone_is_an_error():
    def fails() -> None:
        raise KeyError("no induction_gpt")

    assert "induction_gpt" in refused(fails, "induction_gpt")
    with pytest.raises(AssertionError, match="expected an error that names"):
        refused(fails, "qwen2")
    with pytest.raises(AssertionError, match="has gone"):
        refused(lambda: None, "anything")


def test_a_row_says_what_equals_what_and_other_rows_stay():
    lines = [line("gpt2"), line("qwen3", checks={"ids": "equal", "logits": 5.1e-6}),
             line("own", checks={}, limit="Cannot. Use ours.")]
    row = table_row(NNSIGHT, lines)
    assert row == ("| nnsight | 1 | `gpt2`, `qwen3` | ids; logits within 6e-06; works: Trainer | "
                   "`own`: Cannot. Use ours. |\n")
    page = PAGE.read_text("utf-8")
    first = with_rows(page, {"nnsight": row})
    other = table_row(CLIENTS["bertviz"], lines[:1])
    second = with_rows(first, {"bertviz": other})
    assert row in second and other in second and second.count("| client |") == 1
    assert with_rows(second, {"nnsight": row, "bertviz": other}) == second
    assert second.split("<!--")[0] == page.split("<!--")[0]


def test_every_client_has_its_script_its_requirements_and_its_row():
    for name, client in CLIENTS.items():
        assert (HERE / client.script).exists() and (HERE / "requirements" / f"{name}.txt").exists()
        assert set(client.shapes) <= set(SHAPES)
        assert not client.shapes or f"\n| {client.title} | " in PAGE.read_text("utf-8")
    assert {path.stem for path in (HERE / "requirements").glob("*.txt")} == set(CLIENTS)
    documented = {name for name, client in CLIENTS.items() if snippets(client.package)}
    assert documented >= {"transformers5", "nnsight", "transformer_lens", "sae_lens", "bertviz"}
