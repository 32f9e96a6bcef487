"""Tokenizers of other families, run by Hugging Face's `tokenizers`: exactly what their file says, at about a sixth of tiktoken's speed.

Byte-level BPEs (GPT-2, Pythia, Qwen, Llama 3), and BPEs over characters with a piece for every byte (Llama 2, Mistral). What a file alone
does not say, which tokens begin and end a text, is read from the files beside it once, and then kept in tokenizer_config.json under `gpt`.
"""

import hashlib
import json
from functools import cached_property
from pathlib import Path

from errors import UserError, first_line

import numpy as np
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from data.tokenizer import Tokenizer, byte_letters, valid_stretches

SPACE = "▁"                     # how a space is written in pieces over characters
NEVER_TEXT = {0xC0, 0xC1, *range(0xF5, 0x100)}              # bytes that UTF-8 never has: Pythia has no token for them


class HuggingFaceTokenizer(Tokenizer):
    """A BPE from a tokenizer.json of any of those forms; `prefixed`, `begin` and `ends` as in Tokenizer.

    Raises ValueError where it is of another form: bytes without a token, spaces that appear and stay, another kind of model.
    """

    def __init__(self, text: str, begin: int, ends: list[int], prefixed: bool):
        self.text, self.begin, self.ends, self.prefixed = text, begin, tuple(ends), prefixed
        try:
            self.library = HFTokenizer.from_str(text)
        except Exception as error:                              # the library raises Exception itself
            raise ValueError(f"tokenizers cannot read it: {first_line(error)}") from None
        self.library.encode_special_tokens = True               # special tokens in a text are text
        self.library.no_truncation()
        described = json.loads(text)
        if described["model"]["type"] != "BPE":
            raise ValueError(f"its model is {described['model']['type']}, only BPE is supported")
        self.vocabulary: dict[str, int] = described["model"]["vocab"]
        self.added = {token["content"]: token for token in described["added_tokens"]}
        self.special = {content: token["id"] for content, token in self.added.items() if token["special"]}
        self.n_vocab = max(*self.vocabulary.values(), *(token["id"] for token in self.added.values()), begin, *ends) + 1
        self.by_pieces = bool(described["model"].get("byte_fallback"))
        letters = {b: f"<0x{b:02X}>" if self.by_pieces else letter for b, letter in byte_letters().items()}
        missing = {b for b in range(256) if letters[b] not in self.vocabulary}
        if needed := missing - (set() if self.by_pieces else NEVER_TEXT):
            raise ValueError(f"it has no token for the byte {min(needed)}, so it cannot spell every text")
        self.byte_ids = [self._encode("\ufffd").tolist() if b in missing else [self.vocabulary[letters[b]]] for b in range(256)]
        first = self.library.encode("a", add_special_tokens=False).ids
        self.adds_space = self.decode_bytes(first) == b" a"     # in front of a text; decoding drops it again
        if self.library.decode(first) != "a" or self.decode_bytes(first) not in (b"a", b" a"):
            raise ValueError("it decodes 'a' to something else")

    def encode(self, text: str | bytes) -> np.ndarray:
        """Token ids (n,) uint32 of any string or bytes. Special tokens in the text are text; a byte that is never text and has no token
        becomes �."""
        if not self.adds_space:
            return super().encode(text)
        # Stretches between bytes that are not UTF-8 must not get a space each: a character that is in no text stands for such bytes.
        raw = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
        stretches = list(valid_stretches(raw))
        odd = [part for part in stretches if isinstance(part, bytes)]
        if not odd:
            return self._encode(raw.decode("utf-8"))
        stand_in = next(c for c in map(chr, range(0x10FFFF, 0, -1)) if c.encode() not in raw)
        ids, spelt = self._encode("".join(stand_in if isinstance(part, bytes) else part for part in stretches)), stand_in.encode()
        at = np.flatnonzero(np.all([ids[n:len(ids) - 3 + n] == self.byte_ids[b][0] for n, b in enumerate(spelt)], axis=0))
        ids[at] = [self.byte_ids[part[0]][0] for part in odd]
        return np.delete(ids, np.add.outer(at, [1, 2, 3]).ravel())

    def _encode(self, text: str) -> np.ndarray:
        return np.array(self.library.encode(text, add_special_tokens=False).ids, dtype=np.uint32)

    def decode(self, ids) -> str:
        text = super().decode(ids)
        return text.removeprefix(" ") if self.adds_space else text

    @cached_property
    def token_bytes(self) -> list[bytes]:
        table = [b""] * self.n_vocab
        byte_of = {letter: byte for byte, letter in byte_letters().items()}
        for token, i in self.vocabulary.items():
            if self.by_pieces:
                table[i] = token.replace(SPACE, " ").encode()
            else:
                table[i] = bytes(byte_of[c] for c in token) if all(c in byte_of for c in token) else token.encode()
        if self.by_pieces:
            for b, (i,) in enumerate(self.byte_ids):
                table[i] = bytes([b])
        for content, token in self.added.items():
            table[token["id"]] = b"" if token["special"] else content.encode()
        return table

    @cached_property
    def ordinary(self) -> np.ndarray:
        """Every id of the vocabulary that is neither added nor a piece for a byte."""
        left_out = {token["id"] for token in self.added.values()} | ({i for (i,) in self.byte_ids} if self.by_pieces else set())
        return np.array(sorted(set(self.vocabulary.values()) - left_out))

    @property
    def json(self) -> str:
        return self.text

    @property
    def roles(self) -> dict:
        return {"begin": self.begin, "ends": list(self.ends), "prefixed": self.prefixed}

    @property
    def config(self) -> dict:
        return super().config | {"gpt": self.roles}

    @cached_property
    def hash(self) -> str:
        return hashlib.sha256((self.json + json.dumps(self.roles)).encode()).hexdigest()


def read_tokenizer(folder: Path, described: dict) -> HuggingFaceTokenizer:
    """The tokenizer of a Hugging Face model directory whose config.json says `described`.

    A text begins with the family's BOS where it has one, else with its EOS; it ends with any EOS, or where the next would begin.
    """
    path = folder / "tokenizer.json"
    config, generation = (_settings(folder / name) for name in ("tokenizer_config.json", "generation_config.json"))
    try:
        text = path.read_text("utf-8") if path.exists() else _from_merges(folder, described, config)
        ids = {token["content"]: token["id"] for token in json.loads(text)["added_tokens"]}

        def named(key: str) -> list[int]:                       # as text in tokenizer_config.json, by number in the others
            token = config.get(key)
            content = token.get("content") if isinstance(token, dict) else token
            return [ids[content]] if isinstance(content, str) and content in ids else []

        def numbered(settings: dict, key: str) -> list[int]:    # a number that is no special token was never meant
            value = settings.get(key)
            return [i for i in (value if isinstance(value, list) else [value]) if i in ids.values() and type(i) is int]

        ends = numbered(generation, "eos_token_id") or named("eos_token") or numbered(described, "eos_token_id")
        begins = named("bos_token") or numbered(generation, "bos_token_id") or numbered(described, "bos_token_id") or ends
        if not begins:
            raise UserError(f"{folder}: none of its files names the token that ends a text\n"
                            '  add it to tokenizer_config.json, for example "eos_token": "</s>"')
        begin, ends = begins[0], list(dict.fromkeys([*ends, begins[0]]))
        tokenizer = HuggingFaceTokenizer(text, begin, ends, False)
        tokenizer.prefixed = bool(config.get("add_bos_token")) or tokenizer.library.encode("a").ids[:1] == [begin]
        return tokenizer
    except (OSError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not supported ({first_line(error)})\n"
                        "  supported: BPE over bytes, or over characters with a piece for every byte") from None


def _settings(path: Path) -> dict:
    try:
        found = json.loads(path.read_text("utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from None
    return found if isinstance(found, dict) else {}


def _from_merges(folder: Path, described: dict, config: dict) -> str:
    """GPT-2's older form, vocab.json and merges.txt, as a tokenizer.json."""
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    if described.get("model_type") != "gpt2" or not (vocabulary.exists() and merges.exists()):
        raise UserError(f"{folder}: holds no tokenizer.json\n  make one: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)")
    tokenizer = HFTokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    end = config.get("eos_token", "<|endoftext|>")
    tokenizer.add_special_tokens([AddedToken(end if isinstance(end, str) else end["content"], special=True, normalized=False)])
    return tokenizer.to_str()
