"""Other people's tokenizers: the tokens are transformers', every byte comes back, and what cannot spell every text is refused."""

import json
import random

from errors import UserError

import pytest
from theirs import CORPUS, FORMS, make_tokenizer
from tokenizers import Tokenizer, models

from data.hf_tokenizer import read_tokenizer
from data.load_tokenizer import load_tokenizer

POOL = ["the", " quick", "  ", "    ", "\n", "\n\n", "\t", " \n ", "fox", "don't", "we'VE", "12345", "naïve", "é", "e\u0301", "ﬁ", "東京",
        "🙂", "Å", "\u200b", "\x00", "<", ">", "|", "▁", " ", "def f(x):", "—", "<0x41>", "\r\n", "Ω", "ß"]


@pytest.mark.parametrize("form", FORMS)
def test_tokens_are_theirs(form, tmp_path):
    from transformers import AutoTokenizer
    make_tokenizer(form, tmp_path)
    theirs, ours, draw = AutoTokenizer.from_pretrained(tmp_path), read_tokenizer(tmp_path, {}), random.Random(0)
    for text in ["", "a", " a", "  a", "\n", *CORPUS, *("".join(draw.choices(POOL, k=draw.randint(0, 30))) for _ in range(300))]:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text).tolist() == ours.encode(text.encode()).tolist() == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
        assert ours.prompt(text) == (theirs.encode(text) if ours.prefixed else ids or [ours.begin])
    begins, ends = {"gpt2": ("<|endoftext|>", ["<|endoftext|>"]), "pythia": ("<|endoftext|>", ["<|endoftext|>"]),
                    "qwen": ("<|endoftext|>", ["<|im_end|>", "<|endoftext|>"]),
                    "llama3": ("<|begin_of_text|>", ["<|end_of_text|>", "<|begin_of_text|>"])}.get(form, ("<s>", ["</s>", "<s>"]))
    assert (ours.spelled(ours.begin), [ours.spelled(i) for i in ours.ends]) == (begins, ends)
    assert ours.prefixed == (form in ("llama3", "llama2", "mistral"))
    assert not ours.byte_lengths[[ours.begin, *ours.ends]].any() and len(ours.byte_lengths) == ours.n_vocab == len(theirs)


@pytest.mark.parametrize("form", FORMS)
def test_every_byte_comes_back_and_special_tokens_in_a_text_are_text(form, tmp_path):
    make_tokenizer(form, tmp_path)
    ours, draw = read_tokenizer(tmp_path, {}), random.Random(1)
    for _ in range(200):                                    # bytes that are not UTF-8 between words; what NFC would change left out
        raw = b"".join(draw.choices([b"\xff", b"\xe6\x9d", b"\x80", b"the", b" fox", b"a", "東".encode(), b"\n"], k=draw.randint(1, 12)))
        front = b" " if ours.adds_space and not (form == "mistral" and raw.startswith(b" ")) else b""       # its space stands for both
        back = raw.replace(b"\xff", "\ufffd".encode()) if form == "pythia" else raw
        assert ours.decode_bytes(ours.encode(raw)) == front + back
    text = f"a{ours.spelled(ours.begin)}b{ours.spelled(ours.ends[0])}"
    ids = ours.encode(text)
    assert not {*ids.tolist()} & {ours.begin, *ours.ends} and ours.decode(ids) == text
    ordinary = ours.ordinary
    assert len(ordinary) > 100 and (ours.byte_lengths[ordinary] > 0).all() and not {*ordinary.tolist()} & {*ours.special.values()}
    if form in ("llama2", "mistral"):
        assert ordinary.min() >= 259


def test_a_tokenizer_is_the_same_wherever_it_lies(tmp_path):
    make_tokenizer("llama2", tmp_path)
    ours = read_tokenizer(tmp_path, {})
    there = tmp_path / "there"
    there.mkdir()
    (there / "tokenizer.json").write_text(ours.json)
    (there / "tokenizer_config.json").write_text(json.dumps(ours.config))
    again = load_tokenizer(there / "tokenizer.json")
    assert (again.hash, again.begin, again.ends, again.prefixed) == (ours.hash, ours.begin, ours.ends, True)
    (there / "tokenizer_config.json").write_text(json.dumps(ours.config | {"gpt": ours.roles | {"begin": 2}}))
    assert load_tokenizer(there / "tokenizer.json").hash != ours.hash          # the same pieces, another beginning: other data


def test_vocab_and_merges_alone_are_gpt2s(tmp_path):
    make_tokenizer("gpt2", tmp_path / "whole")
    Tokenizer.from_file(str(tmp_path / "whole/tokenizer.json")).model.save(str(tmp_path))
    whole = read_tokenizer(tmp_path / "whole", {})
    parts = read_tokenizer(tmp_path, {"model_type": "gpt2", "eos_token_id": whole.begin})
    assert all(whole.encode(text).tolist() == parts.encode(text).tolist() for text in CORPUS) and whole.ends == parts.ends
    with pytest.raises(UserError, match="save_pretrained"):
        read_tokenizer(tmp_path, {"model_type": "qwen2"})


def test_tokenizers_that_cannot_spell_every_text_are_refused(tmp_path):
    for model in (models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"), models.BPE({"a": 0, "b": 1}, [])):
        tokenizer = Tokenizer(model)
        tokenizer.add_special_tokens(["</s>"])
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
        with pytest.raises(UserError, match="BPE over bytes"):
            read_tokenizer(tmp_path, {})
    make_tokenizer("gpt2", tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="names the token that ends"):
        read_tokenizer(tmp_path, {"eos_token_id": 7})           # an ordinary token, as a config's default may be
