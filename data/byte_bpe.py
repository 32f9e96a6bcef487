"""Byte-level BPEs that tiktoken runs: bytes, a BPE trained on the corpus, or one of tiktoken's encodings by name.

One file holds such a tokenizer: `tokenizer.json` in Hugging Face's format, whose byte-level BPE tiktoken runs about six
times faster. It lies with the shards and in every checkpoint, and its SHA-256 is the tokenizer's identity.
"""

import hashlib
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise

from errors import UserError, first_line

import numpy as np
import tiktoken
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from data.tokenizer import Tokenizer, byte_letters

END_OF_TEXT = "<|endoftext|>"
DOWNLOAD_SECONDS = 60
LARGEST_ID = 2 ** 22            # tables are as long as the largest id
# GPT-2's way of cutting text into words before merging (Radford et al. 2019).
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s"


class ByteBPE(Tokenizer):
    """A BPE over bytes: `ranks` (token → id), the `pattern` that cuts text into words, and special tokens."""

    def __init__(self, ranks: dict[bytes, int], pattern: str, special: dict[str, int], name: str = "bpe"):
        self.encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        self.ranks, self.pattern, self.special, self.name = ranks, pattern, special, name
        self.begin = special[END_OF_TEXT]                       # here one token does both
        self.ends: tuple[int, ...] = (self.begin,)
        self.byte_ids = [[ranks[bytes([b])]] for b in range(256)]       # what spells each byte
        self.n_vocab = max(*ranks.values(), *special.values()) + 1

    def _encode(self, text: str) -> np.ndarray:
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint32)
        except ValueError as error:             # a pattern that backtracks without end is given up
            raise UserError(f"the tokenizer's pattern cannot cut this text into words ({first_line(error)})") from None

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of every id."""
        table = [b""] * self.n_vocab
        for token, i in self.ranks.items():
            table[i] = token
        return table

    @property
    def ordinary(self) -> np.ndarray:
        """The ids that stand for text of their own, in order: what random tokens are drawn from."""
        return np.arange(self.begin)

    @cached_property
    def json(self) -> str:
        """The whole tokenizer as Hugging Face's tokenizer.json."""
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

    @cached_property
    def hash(self) -> str:
        return hashlib.sha256(self.json.encode()).hexdigest()


def bytes_tokenizer() -> ByteBPE:
    """Every byte is a token, and 256 ends a text."""
    return ByteBPE({bytes([b]): b for b in range(256)}, WORDS, {END_OF_TEXT: 256}, "bytes")


def train_bpe(texts: Iterator[str], vocab_size: int) -> ByteBPE:
    """Byte-pair encoding (Sennrich et al. 2016) of `texts`, with `vocab_size` ids in all."""
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
    return ByteBPE(ranks, WORDS, {END_OF_TEXT: len(ranks)})


def named_encoding(name: str) -> ByteBPE:
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
    return ByteBPE(encoding._mergeable_ranks, pattern, dict(encoding._special_tokens), name)


def read_byte_bpe(text: str, described: dict, name: str) -> ByteBPE:
    """A tokenizer.json of ours; `described` is what its `text` says. Raises ValueError, LookupError and the like where it is not one."""
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
    tokenizer = ByteBPE(ranks, pattern, special, name)
    tokenizer.json = text                       # its identity is the file's, whoever wrote it
    return tokenizer


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
