"""Somebody else's tokenizer.json gives the ids that its library gives, or is refused by name."""

import json
import random
from functools import cache
from pathlib import Path

from errors import UserError

import pytest
from theirs import CORPUS
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, processors, trainers
from tokenizers import normalizers as n
from tokenizers import pre_tokenizers as p

from data.byte_bpe import COMMON_SYNTAX, WORDS, ByteBPE, train_bpe
from data.companions import read_companions
from data.hf_tokenizer import HuggingFaceTokenizer
from data.load_tokenizer import load_tokenizer

END = "<|endoftext|>"
POOL = [*CORPUS, "the", " quick", "  ", "    ", "\n", "\t", "\r\n", " \n ", "don't", "DON'T",
        "12345", " 12", "naïve", "e\u0301", "東京", "🙂", "ﬁ", "\u00a0", "\u200b", "\x00", "<pad>",
        "[x]", " [x] ", "a[x]b", END, "Ω", "ſ", "_", "▁", "a,b", "...", "x" * 40]
DIGITS, LETTERS = Regex(r"\p{N}{1,3}"), Regex(r" ?\p{L}+|\s+|[^\s\p{L}\p{N}]+")
BYTES = p.ByteLevel(add_prefix_space=False, use_regex=False)
ONE_SPLIT = p.Sequence([p.Split(Regex(WORDS), "isolated"), BYTES])


@cache
def trained(pre_tokenizer: str, specials: tuple[str, ...] = ()) -> str:
    """A byte-level BPE whose pre-tokenizer is an expression, and `specials` its first ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = eval(pre_tokenizer), decoders.ByteLevel()
    tokenizer.train_from_iterator(CORPUS * 3, trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=p.ByteLevel.alphabet(), special_tokens=list(specials),
        show_progress=False))
    tokenizer.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    return tokenizer.to_str(pretty=True)


def made(change, pre_tokenizer="ONE_SPLIT") -> str:
    """The same, after `change` of the library's object, or of the dict that its file holds."""
    tokenizer = Tokenizer.from_str(trained(pre_tokenizer))
    contents = change(tokenizer)
    return json.dumps(contents) if isinstance(contents, dict) else tokenizer.to_str(pretty=True)


def with_model(**changes):
    def change(tokenizer: Tokenizer) -> dict:
        contents = json.loads(tokenizer.to_str())
        contents["model"] |= changes
        return contents
    return change


def swap_merges(tokenizer: Tokenizer) -> dict:
    contents = json.loads(tokenizer.to_str())
    merges = contents["model"]["merges"]
    merges[0], merges[5] = merges[5], merges[0]
    return contents


def merges_as_text(tokenizer: Tokenizer) -> dict:
    contents = json.loads(tokenizer.to_str())
    contents["model"]["merges"] = [" ".join(pair) for pair in contents["model"]["merges"]]
    return contents


def drop_a_merge(tokenizer: Tokenizer) -> dict:
    """A token that is in the vocabulary and that no merge makes: tiktoken takes whole words."""
    contents = json.loads(tokenizer.to_str())
    contents["model"]["merges"] = [pair for pair in contents["model"]["merges"]
                                   if "".join(pair) != "the"]
    return contents


def put(part: str, value):
    return lambda tokenizer: setattr(tokenizer, part, value)


def add(*tokens: AddedToken):
    return lambda tokenizer: tokenizer.add_tokens(list(tokens)) and None


def template(single: str):
    return lambda tokenizer: setattr(tokenizer, "post_processor", processors.TemplateProcessing(
        single=single, special_tokens=[(END, tokenizer.token_to_id(END))]))


SAME = {        # tiktoken gives the same ids, and does
    "as trained": lambda t: None,
    "padding": lambda t: t.enable_padding(length=48, pad_id=0, pad_token=END),
    "truncation": lambda t: t.enable_truncation(5),
    "offsets": put("post_processor", processors.ByteLevel(trim_offsets=True)),
    "merges as text": merges_as_text,
    "no dropout": with_model(dropout=0.0),
    "an unknown token": with_model(unk_token=END, fuse_unk=True),
}
OTHER = {       # the library runs it
    "two splits": (None, "p.Sequence([p.Split(DIGITS, 'isolated'), p.Split(LETTERS, 'isolated'), "
                         "BYTES])"),
    "a regex in ByteLevel": (None, "p.ByteLevel(add_prefix_space=False)"),
    "a split, and that regex": (None, "p.Sequence([p.Split(DIGITS, 'isolated'), "
                                      "p.ByteLevel(add_prefix_space=False)])"),
    "digits": (None, "p.Sequence([p.Digits(individual_digits=True), "
                     "p.ByteLevel(add_prefix_space=False)])"),
    "merged with previous": (
        None, "p.Sequence([p.Split(DIGITS, 'merged_with_previous'), BYTES])"),
    "inverted": (None, "p.Sequence([p.Split(DIGITS, 'isolated', invert=True), BYTES])"),
    "without digits": (None, "p.Sequence([p.Split(DIGITS, 'removed'), BYTES])"),
    "a literal split": (None, "p.Sequence([p.Split(' ', 'isolated'), BYTES])"),
    "no split": (None, "p.Sequence([BYTES])"),
    "another regex": (None, r"p.Sequence([p.Split(Regex(r'\w+$|\h+|.'), 'isolated'), BYTES])"),
    "lower case": (put("normalizer", n.Lowercase()), "ONE_SPLIT"),
    "NFC": (put("normalizer", n.NFC()), "ONE_SPLIT"),
    "stripped": (put("normalizer", n.Strip()), "ONE_SPLIT"),
    "replaced": (put("normalizer", n.Replace(Regex(" +"), " ")), "ONE_SPLIT"),
    "added text": (add(AddedToken("[x]"), AddedToken("    ")), "ONE_SPLIT"),
    "added, stripping": (add(AddedToken("[x]", lstrip=True, rstrip=True)), "ONE_SPLIT"),
    "added, single word": (add(AddedToken("[x]", single_word=True)), "ONE_SPLIT"),
    "added, not normalized": (add(AddedToken("the", normalized=False)), "ONE_SPLIT"),
    "whole words": (with_model(ignore_merges=True), "ONE_SPLIT"),
    "no decoder": (put("decoder", None), "p.ByteLevel(add_prefix_space=False)"),
    "merges in another order": (swap_merges, "ONE_SPLIT"),
    "a token without its merge": (drop_a_merge, "ONE_SPLIT"),
    "padding": (lambda t: t.enable_padding(length=48), "p.ByteLevel(add_prefix_space=False)"),
    "truncation": (lambda t: t.enable_truncation(3), "p.ByteLevel(add_prefix_space=False)"),
    "a begin": (template(f"{END} $A"), "ONE_SPLIT"),
}


def check_ids(text: str, folder: Path) -> object:
    """Load a tokenizer.json and compare its ids with the library's. Returns the tokenizer."""
    (folder / "tokenizer.json").write_text(text)
    ours = load_tokenizer(folder / "tokenizer.json")
    theirs = Tokenizer.from_str(text)
    theirs.no_padding()
    theirs.no_truncation()
    theirs.encode_special_tokens = True
    generator = random.Random(0)
    texts = ["".join(generator.choices(POOL, k=generator.randint(0, 12))) for _ in range(200)]
    for sample in ["", " ", "a", *POOL, *texts]:
        ids = theirs.encode(sample, add_special_tokens=False).ids
        assert ours.encode(sample).tolist() == ids, sample
        prompt = theirs.encode(sample).ids or [ours.begin]
        assert ours.encode_prompt(sample) == prompt, sample
    assert ours.token_text(ours.begin) == END and ours.ends == (ours.begin,)
    return ours


@pytest.mark.parametrize("name", SAME)
def test_tiktoken_runs_what_it_reads_in_full(name, tmp_path):
    ours = check_ids(made(SAME[name]), tmp_path)
    assert isinstance(ours, ByteBPE)
    assert ours.json == (tmp_path / "tokenizer.json").read_text()


@pytest.mark.parametrize("name", OTHER)
def test_its_library_runs_every_other(name, tmp_path):
    change, pre_tokenizer = OTHER[name]
    ours = check_ids(made(change or (lambda t: None), pre_tokenizer), tmp_path)
    assert isinstance(ours, HuggingFaceTokenizer)


@pytest.mark.parametrize("config", [
    {"eos_token": "<|im_end|>"}, {"bos_token": {"content": "<|im_end|>"}}, {"add_bos_token": True}])
def test_other_begins_and_ends_are_read(config, tmp_path):
    text = made(lambda t: t.add_special_tokens(["<|im_end|>"]) and None)
    (tmp_path / "tokenizer.json").write_text(text)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": END} | config))
    ours = load_tokenizer(tmp_path / "tokenizer.json")
    begin, end, prefixed = ours.token_text(ours.begin), ours.token_text(ours.ends[0]), ours.prefixed
    expected = {"eos_token": ("<|im_end|>", "<|im_end|>", False),
                "bos_token": ("<|im_end|>", END, False), "add_bos_token": (END, END, True)}
    assert (begin, end, prefixed) == expected[next(iter(config))]


@pytest.mark.parametrize(("change", "words"), [
    (with_model(dropout=0.1), "dropout=0.1"),
    (with_model(continuing_subword_prefix="##", merges=[]), "continuing_subword_prefix='##'"),
    (with_model(continuing_subword_prefix="##"), "tokenizers cannot read it"),      # it panics
    (put("pre_tokenizer", p.Sequence([p.Split(DIGITS, "removed", invert=True), BYTES])),
     "it encodes 'a' and decodes ''"),
    (with_model(end_of_word_suffix="</w>"), "end_of_word_suffix='</w>'"),
    (put("pre_tokenizer", p.ByteLevel(add_prefix_space=True)), "add_prefix_space"),
    (put("decoder", decoders.Sequence([decoders.ByteLevel(), decoders.Replace("_", " ")])),
     "decoder"),
    (template(f"{END} $A {END}"), "post_processor"),
    (put("model", models.WordLevel({"a": 0}, unk_token="a")), "WordLevel"),
])
def test_what_would_come_out_wrong_is_refused_by_name(change, words, tmp_path):
    (tmp_path / "tokenizer.json").write_text(made(change))
    with pytest.raises(UserError) as caught:
        load_tokenizer(tmp_path / "tokenizer.json")
    message = str(caught.value)
    assert words in message and str(tmp_path / "tokenizer.json") in message
    assert len(message.splitlines()) == 2


def test_ids_are_the_librarys_even_if_the_file_skips_some(tmp_path):
    """The library numbers added tokens itself, one after another."""
    contents = json.loads(made(lambda t: t.add_special_tokens(["<a>"]) and None))
    for token, skipped in zip(contents["added_tokens"], (0, 1000)):
        token["id"] += skipped
    text = json.dumps(contents)
    ours = check_ids(text, tmp_path)
    assert isinstance(ours, HuggingFaceTokenizer)
    assert ours.special["<a>"] == Tokenizer.from_str(text).token_to_id("<a>") == ours.n_vocab - 1


def test_special_tokens_may_have_the_first_ids(tmp_path):
    (tmp_path / "tokenizer.json").write_text(trained("ONE_SPLIT", ("<pad>", END)))
    ours = load_tokenizer(tmp_path / "tokenizer.json")
    assert ours.begin == 1 and ours.ordinary_ids.tolist() == list(range(2, ours.n_vocab))


def test_patterns_that_engines_read_differently_are_not_common():
    assert COMMON_SYNTAX.fullmatch(WORDS)
    assert COMMON_SYNTAX.fullmatch(r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|\s*[\r\n/]+")
    for pattern in (r"a$", r"^a", r".", r"\p{L}++", r"\s+?", r"\h", r"\ba", r"(?m)a", r"(?<=a)b",
                    r"[a&&b]", r"[[:alpha:]]", r"a{2}+", r"\Z"):
        assert not COMMON_SYNTAX.fullmatch(pattern), pattern


def test_a_file_of_ours_is_run_by_tiktoken_whatever_its_pattern(tmp_path):
    """A tiktoken encoding may have words that its merges do not make, and look-aheads for ends."""
    ranks = train_bpe(iter(CORPUS), 300).ranks
    ours = ByteBPE(ranks | {b"qxqxq": 299}, WORDS + r"|\s+\z", {END: 300})
    (tmp_path / "tokenizer.json").write_text(ours.json)
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert isinstance(loaded, ByteBPE) and loaded.hash == ours.hash
    assert loaded.encode("qxqxq").tolist() == [299]


def test_a_pattern_that_backtracks_without_end_is_given_up(tmp_path):
    pre_tokenizer = "p.Sequence([p.Split(Regex(r'(?:(x+)\\2+)+y|(x+x+)+y'), 'isolated'), BYTES])"
    (tmp_path / "tokenizer.json").write_text(made(lambda t: None, pre_tokenizer))
    ours = load_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="cannot cut this text into words"):
        ours.encode("x" * 60)


def test_chat_templates_and_roles_are_found_wherever_they_are(tmp_path):
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(
        {"pad_token": "<pad>", "unk_token": {"content": "<unk>"}, "eos_token": END}))
    config = {"pad_token": "<other>", "additional_special_tokens": ["<a>"], "model_max_length": 8}
    kept = {"pad_token": "<other>", "unk_token": {"content": "<unk>"},
            "additional_special_tokens": ["<a>"]}
    assert read_companions(tmp_path, config) == kept
    (tmp_path / "chat_template.jinja").write_text("{{ 1 }}")
    assert read_companions(tmp_path, config) == kept | {"chat_template": "{{ 1 }}"}
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates/tools.jinja").write_text("{{ 2 }}")
    assert read_companions(tmp_path, {})["chat_template"] == [
        {"name": "default", "template": "{{ 1 }}"}, {"name": "tools", "template": "{{ 2 }}"}]
