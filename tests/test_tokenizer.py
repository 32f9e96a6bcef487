"""Tokenizers: exact round trips, and the same ids in Hugging Face's own library."""

import random
import socket
import time
from pathlib import Path

from errors import UserError

import numpy as np
import pytest
import tiktoken
import tiktoken.registry
import tiktoken_ext
import tokenizers
from commands import ROOT
from hypothesis import given
from hypothesis import strategies as st

from data.byte_bpe import (
    END_OF_TEXT,
    LONGEST_WORD,
    _merges,
    bytes_tokenizer,
    named_encoding,
    train_bpe,
)
from data.config import TokenizerConfig
from data.load_tokenizer import load_tokenizer, make_tokenizer

TEXT = ["The cat sat on the mat.\n\n    def f(x):\n        return x + 1  # don't\n",
        "Ünïcödé 漢字 🙂\t\r\n 12345"] * 50
POOL = "ab c\n\t  'll \r\n don't 123 éü漢字🙂 \u00a0\u2003 <|endoftext|>x _=() \n\n   if   The cat"
POSSESSIVE = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
              r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s")
TEXT.append(Path(random.__file__).read_text())
TOKENIZERS = {"bpe": train_bpe(iter(TEXT), 400), "bytes": bytes_tokenizer()}


@pytest.fixture(params=TOKENIZERS.values(), ids=TOKENIZERS)
def tokenizer(request):
    return request.param


@given(st.text() | st.text(st.characters(categories=["Cs", "Zs", "Ll", "Cc"])))
def test_any_string_comes_back(text):
    for tokenizer in TOKENIZERS.values():
        assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.binary())
def test_any_bytes_come_back(raw):
    for tokenizer in TOKENIZERS.values():
        assert tokenizer.decode_bytes(tokenizer.encode(raw)) == raw


def random_text(generator: random.Random) -> str:
    characters = [generator.choice(POOL) for _ in range(generator.randint(0, 40))]
    return "".join(characters).replace(END_OF_TEXT, "")


def test_hugging_face_gives_the_same_ids(tokenizer, tmp_path):
    hf_tokenizer = tokenizers.Tokenizer.from_str(tokenizer.json)
    generator = random.Random(0)
    for _ in range(1000):
        text = random_text(generator)
        ids = tokenizer.encode(text).tolist()
        assert ids == hf_tokenizer.encode(text, add_special_tokens=False).ids
        assert hf_tokenizer.decode(ids) == text
    assert hf_tokenizer.token_to_id(END_OF_TEXT) == tokenizer.begin
    assert hf_tokenizer.encode(END_OF_TEXT).ids == [tokenizer.begin]


def test_a_file_holds_all_of_a_tokenizer(tokenizer, tmp_path):
    (tmp_path / "tokenizer.json").write_text(tokenizer.json)
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert (loaded.ranks, loaded.special) == (tokenizer.ranks, tokenizer.special)
    assert (loaded.pattern, loaded.hash) == (tokenizer.pattern, tokenizer.hash)
    assert make_tokenizer(TokenizerConfig(kind=str(tmp_path)), iter(())).hash == tokenizer.hash


def test_a_bpe_has_the_size_asked_for_and_shortens_text():
    bpe = TOKENIZERS["bpe"]
    assert bpe.n_vocab == 400 and bpe.begin == 399
    assert sorted(bpe.ranks.values()) == list(range(399))
    assert len(bpe.encode(TEXT[0])) < len(TEXT[0]) / 2
    assert train_bpe(iter(TEXT), 400).hash == bpe.hash
    assert bpe.byte_lengths[bpe.encode(TEXT[1])].sum() == len(TEXT[1].encode())


# --- text without words ---

@pytest.mark.parametrize("text", [" " * 1_100_000, "x" + "\n" * 1_100_000 + "y"],
                         ids=["spaces", "lines"])
def test_a_run_of_a_million_spaces_has_the_ids_of_hugging_face(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    hf_tokenizer = tokenizers.Tokenizer.from_str(tokenizer.json)
    assert ids.tolist() == hf_tokenizer.encode(text, add_special_tokens=False).ids


def test_the_time_to_learn_does_not_grow_with_the_square_of_a_words_length():
    generator, started = random.Random(0), time.process_time()
    letters = "".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=300_000))
    lines = "".join("-" * generator.randint(1, 3000) + "\n" for _ in range(300))
    bpe = train_bpe(iter([letters, lines]), 1000)
    assert bpe.json and bpe.n_vocab == 1000
    assert time.process_time() - started < 10           # 1 s; with uncut words 19 s
    assert max(map(len, bpe.ranks)) <= LONGEST_WORD


def test_a_learned_tokens_pair_is_what_the_earlier_merges_leave_of_its_bytes():
    generator = random.Random(0)
    for letters in ("ab", "-= ", "aé漢\n ", "aaaab"):
        texts = ["".join(generator.choices(letters, k=300)) for _ in range(20)]
        bpe = train_bpe(iter(texts), 600)
        assert bpe.merges == list(_merges(bpe.ranks)) and len(bpe.merges) > 200


def test_bytes_that_are_not_utf8_take_time_linear_in_their_number():
    started = time.process_time()
    ids = TOKENIZERS["bytes"].encode(b"\xe9 " * 400_000)
    assert time.process_time() - started < 6            # 1.5 s; copying the rest each time 13 s
    assert ids.tolist() == [0xE9, 0x20] * 400_000


def test_special_tokens_in_a_text_are_text(tokenizer):
    ids = tokenizer.encode(f"a{END_OF_TEXT}b")
    assert tokenizer.begin not in ids and tokenizer.decode(ids) == f"a{END_OF_TEXT}b"


def test_encodings_are_found_by_name(monkeypatch, tmp_path):
    """Through tiktoken's own registry.

    With a possessive pattern and unused ids between special tokens, as in cl100k_base.
    """
    package = tmp_path / "tiktoken_ext"
    package.mkdir()
    (package / "testing.py").write_text(
        "from data.byte_bpe import train_bpe\n"
        "def tiny():\n"
        f"    ranks = train_bpe(iter({TEXT!r}), 400).ranks\n"
        "    return dict(name='tiny', mergeable_ranks=ranks,\n"
        "                special_tokens={'<|endoftext|>': 401, '<|other|>': 410},\n"
        f"                pat_str={POSSESSIVE!r})\n"
        "ENCODING_CONSTRUCTORS = {'tiny': tiny}\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.setattr(tiktoken_ext, "__path__", [*tiktoken_ext.__path__, str(package)])
    monkeypatch.setattr(tiktoken.registry, "ENCODING_CONSTRUCTORS", None)
    tiktoken.registry._available_plugin_modules.cache_clear()
    tokenizer = named_encoding("tiny")
    assert (tokenizer.n_vocab, tokenizer.begin) == (411, 401)
    hf_tokenizer = tokenizers.Tokenizer.from_str(tokenizer.json)
    original, generator = tiktoken.get_encoding("tiny"), random.Random(0)
    for _ in range(500):
        text = random_text(generator)
        ids = original.encode_ordinary(text)
        assert tokenizer.encode(text).tolist() == ids
        assert hf_tokenizer.encode(text, add_special_tokens=False).ids == ids
    assert hf_tokenizer.token_to_id("<|other|>") == 410
    (tmp_path / "tokenizer.json").write_text(tokenizer.json)
    assert load_tokenizer(tmp_path / "tokenizer.json").special == tokenizer.special
    assert tokenizer.decode([400, 405]) == ""
    tiktoken.registry._available_plugin_modules.cache_clear()


def test_a_download_that_fails_says_what_to_do(monkeypatch, tmp_path):
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")             # nobody listens there
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"data\.tokenizer\.kind=gpt2 needs one download") as caught:
        named_encoding("gpt2")
    assert "TIKTOKEN_CACHE_DIR" in str(caught.value)


def test_a_server_that_is_silent_is_not_waited_for(monkeypatch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr("data.byte_bpe.DOWNLOAD_SECONDS", 2)
        with pytest.raises(UserError, match="no answer within 2 s"):
            named_encoding("gpt2")


@pytest.mark.parametrize("content", [
    "", "{}", "[]", '{"model": {"vocab": {"漢": 0}}, "added_tokens": []}',
    '{"model": {"vocab": [["a", 0]]}, "added_tokens": []}'])
def test_another_kind_of_file_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_ids_are_small_arrays(tokenizer):
    assert tokenizer.encode("x" * 100).dtype == np.uint32
