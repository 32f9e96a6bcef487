"""Tokenizers of other model families, run by Hugging Face's `tokenizers`.

They give exactly the ids that their files define, at about a sixth of tiktoken's speed. Supported
are byte-level BPEs (GPT-2, Pythia, Qwen, Llama 3), and BPEs over characters with byte fallback
(Llama 2, Mistral). tokenizer.json does not say which tokens begin and end a text. That is read once
from the files beside it, and then kept in tokenizer_config.json under `gpt`. Padding and truncation
saved in tokenizer.json are for batches of other programs: here they are off.
"""

import hashlib
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from errors import UserError, first_line

import numpy as np
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from data.byte_bpe import END_OF_TEXT
from data.companions import read_companions, read_dict
from data.tokenizer import (
    LARGEST_ID,
    Tokenizer,
    byte_letters,
    cannot_cut,
    library_errors,
    utf8_parts,
)

# Spaces, line ends, accents, letters of 1 to 4 bytes: decoding them shows what a decoder changes.
PROBE = "The don't  12345\n\n\té e\u0301 東京 🙂 _ ▁ ## </w> [x] , . Ω"
SPACE = "▁"                     # how BPEs over characters write a space
# Bytes that never occur in UTF-8: Pythia has no token for them.
NEVER_TEXT = {0xC0, 0xC1, *range(0xF5, 0x100)}


class HuggingFaceTokenizer(Tokenizer):
    """A BPE from the `text` of a tokenizer.json; `begin`, `ends`, `prefixed` as in Tokenizer.

    n_vocab     the size of a model's vocabulary, if it is smaller than the tokenizer's: ids past
                it are of special tokens only
    Raises ValueError if it is of an unsupported form: bytes without a token, spaces that are added
    and not removed again, a model that is not BPE.
    """

    def __init__(self, text: str, begin: int, ends: list[int], prefixed: bool,
                 n_vocab: int | None = None):
        self.text, self.begin, self.ends, self.prefixed = text, begin, tuple(ends), prefixed
        self.limit = n_vocab
        self.library = _run_by_library(text)
        self.vocabulary: dict[str, int] = self.library.get_vocab(with_added_tokens=False)
        # The library's ids, not the file's: it numbers added tokens itself if the file skips ids.
        self.added = {token.content: (i, token.special)
                      for i, token in self.library.get_added_tokens_decoder().items()}
        self.special = {text: i for text, (i, special) in self.added.items() if special}
        added_ids = [i for i, _ in self.added.values()]
        self.full_size = max(*self.vocabulary.values(), *added_ids, begin, *ends) + 1
        if self.full_size > LARGEST_ID:
            raise ValueError(f"its largest id, {self.full_size - 1}, is no tokenizer's")
        self.n_vocab = n_vocab or self.full_size
        self.byte_fallback = bool(self.library.model.byte_fallback)
        self.byte_ids = self._find_byte_ids()
        self.adds_space = self._find_added_space()

    def _find_byte_ids(self) -> list[list[int]]:
        """The ids that spell each byte; those of � if it has no token because it is never text."""
        letters, byte_ids = byte_letters(), []
        for byte in range(256):
            letter = f"<0x{byte:02X}>" if self.byte_fallback else letters[byte]
            if letter in self.vocabulary:
                byte_ids.append([self.vocabulary[letter]])
            elif byte in NEVER_TEXT and not self.byte_fallback:
                byte_ids.append(self._encode("\ufffd").tolist())
            else:
                raise ValueError(f"it has no token for the byte {byte}, "
                                 "so it cannot spell every text")
        return byte_ids

    def _find_added_space(self) -> bool:
        """Whether encoding adds a space in front of a text, which decoding removes again."""
        ids = _ids(self.library, "a")
        decoded = self.library.decode(ids)
        if decoded != "a" or self.decode_bytes(ids) not in (b"a", b" a"):
            raise ValueError(f"it encodes 'a' and decodes {decoded!r}: its decoder does not undo "
                             "what its normalizer or pre_tokenizer does, such as add_prefix_space")
        return self.decode_bytes(ids) == b" a"

    def encode(self, text: str | bytes) -> np.ndarray:
        """Token ids (n,) uint32 of any string or bytes. Special tokens in the text are text.

        A byte that is never text and has no token becomes �.
        """
        if not self.adds_space:
            return super().encode(text)
        raw = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
        try:
            return self._encode(raw.decode("utf-8"))
        except UnicodeDecodeError:
            return self._encode_with_stand_in(raw)

    def _encode_with_stand_in(self, raw: bytes) -> np.ndarray:
        """Encode `raw`, which is not UTF-8, as one text.

        Encoding its valid parts one by one would add a space to each. So a character of 4 bytes
        that `raw` does not contain stands for every byte that is not UTF-8. Then its 4 ids are
        replaced by the id of that byte.
        """
        parts = list(utf8_parts(raw))
        lone_bytes = [part[0] for part in parts if isinstance(part, bytes)]
        stand_in = next(character for character in map(chr, range(0x10FFFF, 0, -1))
                        if character.encode() not in raw)
        text = "".join(stand_in if isinstance(part, bytes) else part for part in parts)
        ids = self._encode(text)
        pattern = [self.byte_ids[byte][0] for byte in stand_in.encode()]
        windows = np.lib.stride_tricks.sliding_window_view(ids, len(pattern))
        starts = np.flatnonzero((windows == pattern).all(axis=1))
        ids[starts] = [self.byte_ids[byte][0] for byte in lone_bytes]
        return np.delete(ids, np.add.outer(starts, [1, 2, 3]).ravel())

    def _encode(self, text: str) -> np.ndarray:
        return np.array(_ids(self.library, text), dtype=np.uint32)

    def restores(self, raw: bytes, ids: Iterable[int]) -> bool:
        decoded = self.decode_bytes(ids)
        return decoded == raw or (self.adds_space and decoded == b" " + raw)

    def decode(self, ids: Iterable[int]) -> str:
        text = super().decode(ids)
        return text.removeprefix(" ") if self.adds_space else text

    @cached_property
    def token_bytes(self) -> list[bytes]:
        table = [b""] * self.full_size
        byte_of = {letter: byte for byte, letter in byte_letters().items()}
        for token, i in self.vocabulary.items():
            if self.byte_fallback:
                table[i] = token.replace(SPACE, " ").encode()
            elif all(letter in byte_of for letter in token):
                table[i] = bytes(byte_of[letter] for letter in token)
            else:
                table[i] = token.encode()
        if self.byte_fallback:
            for byte, (i,) in enumerate(self.byte_ids):
                table[i] = bytes([byte])
        for text, (i, special) in self.added.items():
            table[i] = b"" if special else text.encode()
        return table[:self.n_vocab]         # ids past it are of special tokens, which have no bytes

    @cached_property
    def ordinary_ids(self) -> np.ndarray:
        """Every id of the vocabulary that is neither added nor stands for a byte by fallback."""
        excluded = {i for i, _ in self.added.values()}
        if self.byte_fallback:
            excluded.update(i for (i,) in self.byte_ids)
        return np.array(sorted(set(self.vocabulary.values()) - excluded))

    @property
    def json(self) -> str:
        return self.text

    @property
    def roles(self) -> dict[str, Any]:
        """What tokenizer.json does not say: the other arguments of __init__."""
        roles = {"begin": self.begin, "ends": list(self.ends), "prefixed": self.prefixed}
        return roles | ({"n_vocab": self.limit} if self.limit else {})

    @property
    def config(self) -> dict[str, Any]:
        return super().config | {"gpt": self.roles}

    @cached_property
    def hash(self) -> str:
        return hashlib.sha256((self.json + json.dumps(self.roles)).encode()).hexdigest()


def read_hf_tokenizer(folder: Path, model_config: dict[str, Any],
                      name: str = "tokenizer.json") -> HuggingFaceTokenizer:
    """The tokenizer of a Hugging Face model directory with the config.json `model_config`.

    A text begins with the family's BOS if it has one, else with its EOS. It ends with any EOS, or
    with the token that begins the next text. Raises UserError if the tokenizer is not supported.
    """
    path = folder / name
    config, generation = (read_dict(folder / name)
                          for name in ("tokenizer_config.json", "generation_config.json"))
    try:
        if path.exists():
            text = path.read_text("utf-8")
        else:
            text = _from_merges(folder, model_config, config)
        library = _run_by_library(text)
        _check_model(library.model)
        added = {token.content: i for i, token in library.get_added_tokens_decoder().items()}
        ends = (_ids_by_number(generation, "eos_token_id", added)
                or _ids_by_name(config, "eos_token", added)
                or _ids_by_number(model_config, "eos_token_id", added))
        if not ends and not model_config and END_OF_TEXT in added:
            ends = [added[END_OF_TEXT]]         # a tokenizer without a model: as in our own
        begins = (_ids_by_name(config, "bos_token", added)
                  or _ids_by_number(generation, "bos_token_id", added)
                  or _ids_by_number(model_config, "bos_token_id", added) or ends)
        if not begins:
            raise UserError(f"{folder}: none of its files names the token that ends a text\n"
                            '  add it to tokenizer_config.json, for example "eos_token": "</s>"')
        begin, ends = begins[0], list(dict.fromkeys([*ends, begins[0]]))
        limit = _smaller_vocabulary(library, model_config.get("vocab_size"), ends)
        tokenizer = HuggingFaceTokenizer(text, begin, ends, False, limit)
        _check_decoder(tokenizer)
        tokenizer.prefixed = _adds_begin(tokenizer) or bool(config.get("add_bos_token"))
        tokenizer.kept = read_companions(folder, config)
        return tokenizer
    except (OSError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}: not supported ({first_line(error)})\n"
            "  supported: BPE over bytes, or over characters with a token for every byte") from None


def _run_by_library(text: str) -> HFTokenizer:
    """The library's tokenizer of a tokenizer.json, without padding and truncation."""
    with library_errors(lambda message: ValueError(f"tokenizers cannot read it: {message}")):
        library = HFTokenizer.from_str(text)
    if not isinstance(library.model, models.BPE):
        raise ValueError(f"its model is {type(library.model).__name__}, only BPE is supported")
    library.encode_special_tokens = True                # special tokens in a text are text
    library.no_truncation()
    library.no_padding()
    return library


def _ids(library: HFTokenizer, text: str, as_prompt: bool = False) -> list[int]:
    """The ids of a text; `as_prompt`: with those that a post_processor adds."""
    with library_errors(cannot_cut):
        return library.encode(text, add_special_tokens=as_prompt).ids


def _smaller_vocabulary(library: HFTokenizer, vocab_size: object, ends: list[int]) -> int | None:
    """The model's `vocab_size`, if only special tokens that no text becomes have larger ids."""
    if type(vocab_size) is not int or vocab_size < 1:
        return None                                     # a tokenizer without a model
    vocabulary, added = library.get_vocab(False), library.get_added_tokens_decoder()
    past = [i for i in (*added, *vocabulary.values(), *ends) if i >= vocab_size]
    never_text = {i for i, token in added.items()
                  if token.special and token.content not in vocabulary and i not in ends}
    return vocab_size if past and never_text.issuperset(past) else None


def _check_model(model: models.BPE) -> None:
    """Raise ValueError for a setting that the library knows and HuggingFaceTokenizer does not."""
    if model.dropout:
        raise ValueError(f"model.dropout={model.dropout:g} gives a text other ids every time: "
                         "set it to null in the file")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if value := getattr(model, key):
            raise ValueError(f"model.{key}={value!r} writes tokens in an unknown way")


def _check_decoder(tokenizer: HuggingFaceTokenizer) -> None:
    """Raise ValueError if its decoder makes other text of some ids than their tokens spell."""
    decoder = tokenizer.library.decoder
    ids = _ids(tokenizer.library, PROBE)
    expected, decoded = tokenizer.library.decode(ids), tokenizer.decode(ids)
    if decoder and decoded != expected:
        raise ValueError(f"its decoder ({type(decoder).__name__}) makes {expected[:60]!r} of "
                         f"tokens that spell {decoded[:60]!r}")


def _adds_begin(tokenizer: HuggingFaceTokenizer) -> bool:
    """Whether the tokenizer itself puts `begin` before a prompt. Raises ValueError if it adds
    anything else."""
    plain, full = (_ids(tokenizer.library, "a", as_prompt) for as_prompt in (False, True))
    if full not in (plain, [tokenizer.begin, *plain]):
        shown = " ".join("a" if i in plain else tokenizer.token_text(i) for i in full)
        raise ValueError(f"its post_processor turns a prompt 'a' into {shown!r}, only "
                         f"{tokenizer.token_text(tokenizer.begin)!r} before it is understood: "
                         "set post_processor to null in the file")
    return full != plain


def _ids_by_name(config: dict[str, Any], key: str, added: dict[str, int]) -> list[int]:
    """The id of the `added` token that a tokenizer_config.json names as text, if there is one."""
    token = config.get(key)
    name = token.get("content") if isinstance(token, dict) else token
    return [added[name]] if isinstance(name, str) and name in added else []


def _ids_by_number(config: dict[str, Any], key: str, added: dict[str, int]) -> list[int]:
    """The ids that a config.json gives, without defaults that name no `added` token."""
    value = config.get(key)
    ids = value if isinstance(value, list) else [value]
    return [i for i in ids if type(i) is int and i in added.values()]


def _from_merges(folder: Path, model_config: dict[str, Any], config: dict[str, Any]) -> str:
    """GPT-2's older form, vocab.json and merges.txt, as a tokenizer.json."""
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    if model_config.get("model_type") != "gpt2" or not (vocabulary.exists() and merges.exists()):
        raise UserError(f"{folder}: holds no tokenizer.json\n"
                        "  make one: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)")
    tokenizer = HFTokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = config.get("eos_token", "<|endoftext|>")
    name = end if isinstance(end, str) else end["content"]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False)])
    return tokenizer.to_str()
