"""Tokenizers of other families: the ids are those of transformers and every byte comes back.

A tokenizer that cannot spell every text is refused.
"""

import json
import random

from errors import UserError

import pytest
from theirs import CORPUS, FORMS, save_hf_tokenizer
from tokenizers import Tokenizer, models

from data.hf_tokenizer import read_hf_tokenizer
from data.load_tokenizer import load_tokenizer

POOL = ["the", " quick", "  ", "    ", "\n", "\n\n", "\t", " \n ", "fox", "don't", "we'VE", "12345",
        "naïve", "é", "e\u0301", "ﬁ", "東京", "🙂", "Å", "\u200b", "\x00", "<", ">", "|", "▁", " ",
        "def f(x):", "—", "<0x41>", "\r\n", "Ω", "ß"]
# Words and bytes that are not UTF-8; nothing that NFC would change.
BYTE_POOL = [b"\xff", b"\xe6\x9d", b"\x80", b"the", b" fox", b"a", "東".encode(), b"\n"]
BEGIN_AND_ENDS = {
    "gpt2": ("<|endoftext|>", ["<|endoftext|>"]), "pythia": ("<|endoftext|>", ["<|endoftext|>"]),
    "qwen": ("<|endoftext|>", ["<|im_end|>", "<|endoftext|>"]),
    "llama3": ("<|begin_of_text|>", ["<|end_of_text|>", "<|begin_of_text|>"]),
    "llama2": ("<s>", ["</s>", "<s>"]), "mistral": ("<s>", ["</s>", "<s>"])}


@pytest.mark.parametrize("form", FORMS)
def test_tokens_are_theirs(form, tmp_path):
    from transformers import AutoTokenizer
    save_hf_tokenizer(form, tmp_path)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), read_hf_tokenizer(tmp_path, {})
    generator = random.Random(0)
    texts = ["".join(generator.choices(POOL, k=generator.randint(0, 30))) for _ in range(300)]
    for text in ["", "a", " a", "  a", "\n", *CORPUS, *texts]:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text).tolist() == ours.encode(text.encode()).tolist() == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
        prompt = theirs.encode(text) if ours.prefixed else ids or [ours.begin]
        assert ours.encode_prompt(text) == prompt
    begin, ends = BEGIN_AND_ENDS[form]
    assert ours.token_text(ours.begin) == begin
    assert [ours.token_text(i) for i in ours.ends] == ends
    assert ours.prefixed == (form in ("llama3", "llama2", "mistral"))
    assert not ours.byte_lengths[[ours.begin, *ours.ends]].any()
    assert len(ours.byte_lengths) == ours.n_vocab == len(theirs)


@pytest.mark.parametrize("form", FORMS)
def test_every_byte_comes_back_and_special_tokens_in_a_text_are_text(form, tmp_path):
    save_hf_tokenizer(form, tmp_path)
    ours, generator = read_hf_tokenizer(tmp_path, {}), random.Random(1)
    for _ in range(200):
        raw = b"".join(generator.choices(BYTE_POOL, k=generator.randint(1, 12)))
        expected = raw.replace(b"\xff", "\ufffd".encode()) if form == "pythia" else raw
        # mistral's added space and a space at the start of the text are one token
        if ours.adds_space and not (form == "mistral" and raw.startswith(b" ")):
            expected = b" " + expected
        assert ours.decode_bytes(ours.encode(raw)) == expected
    text = f"a{ours.token_text(ours.begin)}b{ours.token_text(ours.ends[0])}"
    ids = ours.encode(text)
    assert not {*ids.tolist()} & {ours.begin, *ours.ends} and ours.decode(ids) == text
    ordinary = ours.ordinary_ids
    assert len(ordinary) > 100 and (ours.byte_lengths[ordinary] > 0).all()
    assert not {*ordinary.tolist()} & {*ours.special.values()}
    if form in ("llama2", "mistral"):
        assert ordinary.min() >= 259


def test_a_saved_tokenizer_loads_as_the_same(tmp_path):
    save_hf_tokenizer("llama2", tmp_path)
    ours = read_hf_tokenizer(tmp_path, {})
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "tokenizer.json").write_text(ours.json)
    (copy / "tokenizer_config.json").write_text(json.dumps(ours.config))
    loaded = load_tokenizer(copy / "tokenizer.json")
    assert (loaded.hash, loaded.begin) == (ours.hash, ours.begin)
    assert (loaded.ends, loaded.prefixed) == (ours.ends, True)
    changed = ours.config | {"gpt": ours.roles | {"begin": 2}}
    (copy / "tokenizer_config.json").write_text(json.dumps(changed))
    assert load_tokenizer(copy / "tokenizer.json").hash != ours.hash    # another begin, other data


def test_vocab_and_merges_without_a_tokenizer_json_are_gpt2s(tmp_path):
    save_hf_tokenizer("gpt2", tmp_path / "json")
    Tokenizer.from_file(str(tmp_path / "json/tokenizer.json")).model.save(str(tmp_path))
    expected = read_hf_tokenizer(tmp_path / "json", {})
    merged = read_hf_tokenizer(tmp_path, {"model_type": "gpt2", "eos_token_id": expected.begin})
    assert merged.ends == expected.ends
    for text in CORPUS:
        assert merged.encode(text).tolist() == expected.encode(text).tolist()
    with pytest.raises(UserError, match="save_pretrained"):
        read_hf_tokenizer(tmp_path, {"model_type": "qwen2"})


def test_tokenizers_that_cannot_spell_every_text_are_refused(tmp_path):
    for model in (models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"),
                  models.BPE({"a": 0, "b": 1}, [])):
        tokenizer = Tokenizer(model)
        tokenizer.add_special_tokens(["</s>"])
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
        with pytest.raises(UserError, match="BPE over bytes"):
            read_hf_tokenizer(tmp_path, {})
    save_hf_tokenizer("gpt2", tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="names the token that ends"):
        read_hf_tokenizer(tmp_path, {"eos_token_id": 7})        # an ordinary token, like a default
