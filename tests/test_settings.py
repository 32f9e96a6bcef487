"""Configs: YAML 1.2 values, overrides, and errors that come all at once with their fix."""

import pytest
import yaml
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from errors import UserError
from settings import override, read_yaml, validate
from training.config import Config, dump_config, load_config


@pytest.mark.parametrize(("text", "value"), [
    ("3e-4", 3e-4), ("1e6", 1_000_000), ("3e+4", 30_000), ("017", 17), ("0x10", 16), ("1_000", 1000), ("-2.5", -2.5), (".5", 0.5),
    ("no", "no"), ("on", "on"), ("1:30", "1:30"), ("true", True), ("null", None), ("~", None), ("'3'", "3"), ("2024-01-01", "2024-01-01"),
])
def test_values_are_yaml_1_2(text, value):
    read = read_yaml(text, "test")
    assert read == value and type(read) is type(value)


def errors_of(tree: dict, *assignments: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        validate(Config, tree, "x.yaml", override(tree, assignments))
    return str(caught.value).splitlines()


def test_all_mistakes_come_at_once_each_with_its_key_value_and_fix():
    lines = errors_of({"model": {"n_head": 4, "n_kv_heads": 3, "d_head": 7}, "train": {"batch_tokens": 1000, "steps": "many"}},
                      "optimizer.lr=fast", "modle.n_ctx=4")
    assert len(lines) == 7
    for words in (["x.yaml", "model.n_head", "did you mean model.n_heads"], ["n_kv_heads=3", "n_heads=4", "try 1, 2, 4"],
                  ["d_head=7", "odd"],                   ["batch_tokens=1000", "n_ctx=256", "try 1024"], ["train.steps='many'"],
                  ["command line", "optimizer.lr='fast'"], ["modle", "did you mean model"]):
        assert any(all(word in line for word in words) for line in lines), (words, lines)


@pytest.mark.parametrize(("assignment", "words"), [
    ("run=../elsewhere", "run="), ("run=7", "run=7"), ("seed=18446744073709551616", "seed="),
    ("train.steps=0", "greater than 0"), ("train.steps=1.5", "train.steps=1.5"), ("optimizer.lr=.nan", "optimizer.lr"),
    ("model.qk_norm=1", "model.qk_norm=1"), ("model.window=[8, 0]", "model.window.1=0"),
    ("data.tokenizer=gtp2", "did you mean gpt2"), ("data.tokenizer={kind: bytes, vocab_size: 9}", "vocab_size=9"),
    ("data.tokenizer={kind: bpe, vocab_size: 9}", "try 4096"), ("data.corpus=files", "data.files"),
    ("data.corpus=hub", "data.hub"), ("data.mixture=[{corpus: stdlib, weight: 1, until: 5}]", "until"),
    ("data={corpus: repeats, repeats: {period: [8, 200]}}", "longest: 128"),
    ("data.repeats={period: [8, 9], held_out_periods: [8, 9]}", "held_out_periods"), ("model=5", "keys are expected"),
    ("model={d_model: 100, n_heads: 3}", "try d_model=102"), ("data.files=a.txt", "try data.files='[a.txt]'"),
    ("data.files=[a.txt]", "set data.corpus=files"), ("lr=0.1", "did you mean optimizer.lr?"),
    ("modle.d_model=3", "command line: unknown key modle; did you mean model?"), ("train.micro_batch=5", "try 4"),
    ("model.n_heads=1152921504606846976", "less than or equal to 1048576"), ("seed=0x" + "f" * 200, "a number of 202 digits"),
    ("data.repeats={period: [8, 1000000000000]}", "less than or equal to 1048576"),
])
def test_one_mistake(assignment, words):
    lines = errors_of({}, assignment)
    assert len(lines) == 1 and words in lines[0], lines


def test_later_overrides_win_and_lists_and_mappings_can_be_given():
    tree = {"model": {"n_ctx": 64}}
    config = validate(Config, tree, "x", override(tree, ["seed=1", "seed=2", "model.window=[null, 8]", "data.tokenizer=bytes"]))
    assert (config.seed, config.model.n_ctx, config.model.window, config.data.tokenizer.kind) == (2, 64, [None, 8], "bytes")


@pytest.mark.parametrize(("text", "words"), [
    ("seed: 1\nseed: 2", "twice"), ("a: [", "line"), ("- 1", "mapping"), ("a: &x [*x]", ""),
    ("a: !!int x", ""), ("a: !!bool x", ""), ("a: !!timestamp x", ""),
    ("!!python/object/apply:os.system [ls]", ""),
])
def test_files_that_are_no_config(tmp_path, text, words):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=r"x\.yaml") as caught:
        load_config(tmp_path / "x.yaml")
    assert words in str(caught.value)


def test_merge_keys_work():
    assert read_yaml("a: &x {b: 1, c: 2}\nd: {<<: *x, c: 3}", "test")["d"] == {"b": 1, "c": 3}


def test_a_missing_file_names_its_neighbour():
    with pytest.raises(UserError, match=r"did you mean .*quickstart\.yaml"):
        load_config(ROOT / "configs" / "quickstrat.yaml")


KEYS = ["model", "data", "train", "n_ctx", "tokenizer", "mixture", "window", "kind", "repeats", "period"]


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)))
def test_any_tree_is_a_config_or_a_clear_error(tree):
    if isinstance(tree, dict):
        try:
            validate(Config, tree, "x.yaml")
        except UserError as error:
            assert all(line.startswith("x.yaml: ") for line in str(error).splitlines())


def test_a_dumped_config_reads_back_the_same():
    for path in ROOT.glob("configs/**/*.yaml"):
        config = load_config(path)
        assert validate(Config, yaml.safe_load(dump_config(config)), "dump") == config
