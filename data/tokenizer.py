"""Text to token ids and back, exactly: tiktoken encodings by name, bytes, or a BPE trained on the corpus.

One file holds a tokenizer of ours: `tokenizer.json` in Hugging Face's format, whose byte-level BPE tiktoken runs about six
times faster. It lies with the shards and in every checkpoint, and its SHA-256 is the tokenizer's identity.
"""

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import tiktoken

from data.config import TokenizerConfig
from errors import UserError, first_line

END_OF_TEXT = "<|endoftext|>"
DOWNLOAD_SECONDS = 60
LARGEST_FILE = 2 ** 28          # bytes of a tokenizer.json: o200k's has some 2 ** 24
LARGEST_ID = 2 ** 22            # tables are as long as the largest id
# GPT-2's way of cutting text into words before merging (Radford et al. 2019).
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s"


class Tokenizer:
    """A byte-level BPE. `n_vocab` counts every id, gaps included.

    begin       the id that every document and every probe begins with
    ends        the ids that end a text which is being generated; the first is the one to write
    """

    prefixed = False            # whether a prompt is to begin with `begin`: a family whose texts all do (Llama) knows nothing else

    def __init__(self, ranks: dict[bytes, int], pattern: str, special: dict[str, int], name: str = "bpe"):
        self.encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        self.ranks, self.pattern, self.special, self.name = ranks, pattern, special, name
        self.begin = special[END_OF_TEXT]                       # here one token does both
        self.ends: tuple[int, ...] = (self.begin,)
        self.byte_ids = [[ranks[bytes([b])]] for b in range(256)]       # what spells each byte
        self.n_vocab = max(*ranks.values(), *special.values()) + 1

    # --- text and ids ---

    def encode(self, text: str | bytes) -> np.ndarray:
        """Token ids (n,) uint32 of any string or bytes. Special tokens in the text are text."""
        raw = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
        try:
            return self._encode(raw.decode("utf-8"))
        except UnicodeDecodeError:              # not text: the valid stretches as text, every other byte as itself
            return np.concatenate([self._encode(part) if isinstance(part, str) else
                                   np.array(self.byte_ids[part[0]], np.uint32) for part in valid_stretches(raw)])

    def _encode(self, text: str) -> np.ndarray:
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint32)
        except ValueError as error:             # a pattern that backtracks without end is given up
            raise UserError(f"the tokenizer's pattern cannot cut this text into words ({first_line(error)})") from None

    def prompt(self, text: str | bytes) -> list[int]:
        """The ids that a model is given to continue `text`; an empty one begins a document."""
        ids = self.encode(text).tolist()
        return [self.begin, *ids] if self.prefixed or not ids else ids

    def spelled(self, token: int) -> str:
        """One token as text to look at: special ones by name, control characters and bytes that are no whole character as \\xNN."""
        if name := next((text for text, i in self.special.items() if i == token), None):
            return name
        if token >= self.n_vocab:                               # a model's vocabulary may be larger
            return f"<{token}>"
        text = self.token_bytes[token].decode("utf-8", "backslashreplace")
        return "".join(c if (c >= " " and c != "\x7f") or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that `ids` stand for; end-of-text and ids in a vocabulary's gaps stand for none."""
        table = self.token_bytes
        return b"".join(table[i] if 0 <= i < len(table) else b"" for i in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """`ids` as text; bytes that are not UTF-8 become �."""
        raw = self.decode_bytes(ids)
        try:
            return raw.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return raw.decode("utf-8", "replace")

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of every id."""
        table = [b""] * self.n_vocab
        for token, i in self.ranks.items():
            table[i] = token
        return table

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        """How many bytes of text each id stands for: (V,) int64. Loss per byte needs no other bookkeeping."""
        return np.array([len(token) for token in self.token_bytes], dtype=np.int64)

    @property
    def ordinary(self) -> np.ndarray:
        """The ids that stand for text of their own, in order: what random tokens are drawn from."""
        return np.arange(self.begin)

    # --- files ---

    @cached_property
    def json(self) -> str:
        """The whole tokenizer as Hugging Face's tokenizer.json."""
        from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as HFTokenizer
        letters = byte_letters()

        def spell(token: bytes) -> str:
            return "".join(letters[b] for b in token)

        # Special tokens stand in the vocabulary too, or Hugging Face would number them by itself.
        vocab = {spell(token): i for token, i in self.ranks.items()} | self.special
        merges = [(spell(a), spell(b)) for a, b in _merges(self.ranks)]
        tokenizer = HFTokenizer(models.BPE(vocab=vocab, merges=merges))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(self.pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in self.special])
        return tokenizer.to_str()

    @property
    def config(self) -> dict:
        """The contents of tokenizer_config.json, which lies beside it."""
        return {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": self.spelled(self.begin),
                "eos_token": self.spelled(self.ends[0]), "clean_up_tokenization_spaces": False}

    @cached_property
    def hash(self) -> str:
        return hashlib.sha256(self.json.encode()).hexdigest()

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a tokenizer.json: one of ours, or one that an import left (data/other_tokenizers.py); a UserError where it is neither."""
        try:
            if (size := Path(path).stat().st_size) > LARGEST_FILE:
                raise ValueError(f"{size:,} bytes are no tokenizer")
            described = json.loads(Path(path).read_text("utf-8"))
            beside = Path(path).with_name("tokenizer_config.json")
            if beside.exists() and (roles := json.loads(beside.read_text("utf-8")).get("gpt")):
                from data.other_tokenizers import OtherTokenizer
                return OtherTokenizer(Path(path).read_text("utf-8"), **roles)
            if described.get("normalizer") is not None:
                raise ValueError("it changes text before encoding it: import its model instead")
            byte_of = {letter: byte for byte, letter in byte_letters().items()}
            special = {t["content"]: t["id"] for t in described["added_tokens"]}
            vocabulary = described["model"]["vocab"]
            ids = set(vocabulary.values())
            if len(ids) < len(vocabulary) or min(ids) < 0 or not vocabulary.keys() >= byte_of.keys():
                raise ValueError("its ids are not those of a vocabulary with every byte in it")
            if max(*ids, *special.values()) >= LARGEST_ID:
                raise ValueError("its ids are larger than those of any tokenizer")
            ranks = {bytes(byte_of[c] for c in token): i for token, i in vocabulary.items() if token not in special}
            pattern = described["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
            tokenizer = cls(ranks, pattern, special, Path(path).parent.name)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file (a checkpoint and a data folder each hold their tokenizer)") from None
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            raise UserError(f"{path}: not a byte-level BPE in Hugging Face's format ({type(error).__name__}: {error})") from None
        tokenizer.json = Path(path).read_text("utf-8")      # its identity is the file's, whoever wrote it
        return tokenizer


# --- where tokenizers come from --------------------------------------------------------------------------------------

def bytes_tokenizer() -> Tokenizer:
    """Every byte is a token, and 256 ends a text."""
    return Tokenizer({bytes([b]): b for b in range(256)}, WORDS, {END_OF_TEXT: 256}, "bytes")


def train_bpe(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Byte-pair encoding (Sennrich et al. 2016) of `texts`, with `vocab_size` ids in all."""
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as HFTokenizer
    trainee = HFTokenizer(models.BPE())
    trainee.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    letters = byte_letters()
    trainee.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=list(letters.values()), show_progress=False))
    byte_of = {letter: byte for byte, letter in letters.items()}
    in_order = sorted(trainee.get_vocab().items(), key=lambda item: item[1])
    ranks = {bytes(byte_of[c] for c in token): rank for rank, (token, _) in enumerate(in_order)}
    return Tokenizer(ranks, WORDS, {END_OF_TEXT: len(ranks)})


def named_encoding(name: str) -> Tokenizer:
    """A tiktoken encoding such as gpt2. Its first use downloads a file; without a network that ends in a UserError."""
    # tiktoken waits for a silent server without end, so the download runs where it can be stopped.
    try:
        fetched = subprocess.run([sys.executable, "-c", "import sys, tiktoken; tiktoken.get_encoding(sys.argv[1])", name],
                                 capture_output=True, text=True, timeout=DOWNLOAD_SECONDS)
        problem = fetched.stderr.strip().splitlines()[-1][:120] if fetched.returncode else None
    except subprocess.TimeoutExpired:
        problem = f"no answer within {DOWNLOAD_SECONDS} s"
    if problem:
        raise UserError(f"data.tokenizer.kind={name} needs one download, which failed ({problem})\n"
                        "  connect once, point TIKTOKEN_CACHE_DIR at a filled cache, or use tokenizer: {kind: bpe, vocab_size: 4096}")
    encoding = tiktoken.get_encoding(name)
    # Possessive quantifiers only save time in these patterns, and Hugging Face's regex engine reads some differently.
    pattern = re.sub(r"([+*?]|\{\d+(?:,\d*)?\})\+", r"\1", encoding._pat_str).replace("$", r"\z")        # $ means line end to it
    return Tokenizer(encoding._mergeable_ranks, pattern, dict(encoding._special_tokens), name)


def make_tokenizer(config: TokenizerConfig, texts: Iterator[str]) -> Tokenizer:
    """The tokenizer of a config; only `bpe` reads `texts`."""
    match config.kind:
        case "bytes":
            return bytes_tokenizer()
        case "bpe":
            assert config.vocab_size is not None            # TokenizerConfig has seen to it
            return train_bpe(texts, config.vocab_size)
        case path if "/" in path:
            return Tokenizer.load(Path(path) / "tokenizer.json" if Path(path).is_dir() else path)
        case name:
            return named_encoding(name)


# --- byte-level BPE in Hugging Face's spelling -----------------------------------------------------------------------

def byte_letters() -> dict[int, str]:
    """The printable letter that stands for each byte in a byte-level BPE file (Radford et al. 2019)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}


def _merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The pair that each token was merged from, in order: what remains of it under the merges before it."""
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            candidates = [(ranks.get(a + b, rank), n) for n, (a, b) in enumerate(pairwise(parts))]
            lowest, n = min(candidates)
            if lowest >= rank:
                break
            parts[n:n + 2] = [parts[n] + parts[n + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]


def valid_stretches(raw: bytes) -> Iterator[str | bytes]:
    """`raw` cut into its longest valid UTF-8 stretches (str) and the single bytes between them."""
    while raw:
        try:
            yield raw.decode("utf-8")
            return
        except UnicodeDecodeError as error:
            if error.start:
                yield raw[:error.start].decode("utf-8")
            yield from (raw[n:n + 1] for n in range(error.start, error.end))
            raw = raw[error.end:]
