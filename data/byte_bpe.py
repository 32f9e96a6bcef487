"""Byte-level BPEs that tiktoken runs: bytes, a BPE trained on the corpus, or a tiktoken encoding.

One file holds such a tokenizer: `tokenizer.json` in Hugging Face's format. tiktoken runs it about
six times faster than Hugging Face. The file is saved with the shards and in every checkpoint; its
SHA-256 is the tokenizer's identity.
"""

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from typing import Any

from errors import UserError, first_line

import numpy as np
import tiktoken
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from data.tokenizer import LARGEST_ID, Tokenizer, byte_letters, cannot_cut, library_errors

END_OF_TEXT = "<|endoftext|>"
DOWNLOAD_SECONDS = 60
LONG_TEXT = 2 ** 16             # characters; on shorter ones only a harmful pattern gives up
LONGEST_WORD = 1000             # characters; longer words are cut before a BPE is trained on them
# GPT-2's pattern that cuts text into words before merging (Radford et al. 2019).
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s"
# What a pattern may consist of for tiktoken's regex engine and Hugging Face's to read it in the
# same way: literals, classes, groups, (?!…), greedy quantifiers. Not: ^ $ . \b \h, flags, (?<…).
COMMON_SYNTAX = re.compile(
    r"(?:\\p\{[A-Z][a-z]?\}|\\[srntS]|\[\^?(?:\\p\{[A-Z][a-z]?\}|\\[srnt]|[^\\\[\]&^-])+\]"
    r"|\(\?(?:i?:|!)|\((?!\?)|[)|]|(?:[+*?]|\{\d+(?:,\d*)?\})(?![+*?{])|[^\\\[\](){}|+*?^$.])*")


class ByteBPE(Tokenizer):
    """A BPE over bytes: `ranks` (token → id), a `pattern` that cuts text into words, and special
    tokens."""

    def __init__(self, ranks: dict[bytes, int], pattern: str, special: dict[str, int],
                 name: str = "bpe"):
        self.encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks,
                                          special_tokens=special)
        self.ranks, self.pattern, self.special = ranks, pattern, special
        self.begin = special[END_OF_TEXT]                       # one token begins and ends texts
        self.ends: tuple[int, ...] = (self.begin,)
        self.byte_ids = [[ranks[bytes([byte])]] for byte in range(256)]
        self.n_vocab = max(*ranks.values(), *special.values()) + 1

    def _encode(self, text: str) -> np.ndarray:
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint32)
        except ValueError as error:     # tiktoken's regex engine gives up on a million spaces
            if len(text) < LONG_TEXT:
                raise cannot_cut(first_line(error)) from None
            return self._encode_by_words(text)

    def _encode_by_words(self, text: str) -> np.ndarray:
        """The same ids, from words that Hugging Face's regex engine cuts: slower, with a larger
        stack."""
        with library_errors(cannot_cut):
            words = _split(self.pattern).pre_tokenize_str(text)
        ids = [token for word, _ in words for token in self.encoding._encode_single_piece(word)]
        return np.array(ids, np.uint32)

    @cached_property
    def token_bytes(self) -> list[bytes]:
        table = [b""] * self.n_vocab
        for token, i in self.ranks.items():
            table[i] = token
        return table

    @property
    def ordinary_ids(self) -> np.ndarray:
        if self.begin < 256:                    # others may give the first ids to special tokens
            return np.array(sorted(self.ranks.values()))
        return np.arange(self.begin)

    @cached_property
    def merges(self) -> list[tuple[bytes, bytes]]:
        """The pair that each token was merged from, in order."""
        return list(_merges(self.ranks))

    @cached_property
    def json(self) -> str:
        letters = byte_letters()

        def spell(token: bytes) -> str:
            return "".join(letters[byte] for byte in token)

        # Special tokens are in the vocabulary too: otherwise Hugging Face would number them itself.
        vocab = {spell(token): i for token, i in self.ranks.items()} | self.special
        merges = [(spell(left), spell(right)) for left, right in self.merges]
        tokenizer = HFTokenizer(models.BPE(vocab=vocab, merges=merges))
        tokenizer.pre_tokenizer = _pre_tokenizer(self.pattern)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False)
                                      for text in self.special])
        return tokenizer.to_str()

    @cached_property
    def hash(self) -> str:
        return hashlib.sha256(self.json.encode()).hexdigest()


def bytes_tokenizer() -> ByteBPE:
    """Every byte is a token, and 256 ends a text."""
    return ByteBPE({bytes([byte]): byte for byte in range(256)}, WORDS, {END_OF_TEXT: 256}, "bytes")


def train_bpe(texts: Iterator[str], vocab_size: int) -> ByteBPE:
    """Byte-pair encoding (Sennrich et al. 2016) learned from `texts`, with `vocab_size` ids.

    Words longer than LONGEST_WORD are cut first: the time to learn from one grows with the square
    of its length.
    """
    learner = HFTokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence([
        _split(WORDS), pre_tokenizers.FixedLength(LONGEST_WORD), _byte_level()])
    letters = byte_letters()
    learner.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=list(letters.values()), show_progress=False))
    byte_of = {letter: byte for byte, letter in letters.items()}

    def spelled(token: str) -> bytes:
        return bytes(byte_of[letter] for letter in token)

    vocab = learner.get_vocab()
    ranks = {spelled(token): rank
             for rank, token in enumerate(sorted(vocab, key=lambda token: vocab[token]))}
    tokenizer = ByteBPE(ranks, WORDS, {END_OF_TEXT: len(ranks)})
    # Known here. Finding them again takes minutes if the text has long lines of dashes.
    tokenizer.merges = [(spelled(left), spelled(right)) for left, right
                        in json.loads(learner.to_str())["model"]["merges"]]
    return tokenizer


def named_encoding(name: str) -> ByteBPE:
    """A tiktoken encoding such as gpt2. Raises UserError if its file cannot be downloaded."""
    # In a process, which can be stopped: tiktoken waits for a silent server without end.
    download = "import sys, tiktoken; tiktoken.get_encoding(sys.argv[1])"
    try:
        done = subprocess.run([sys.executable, "-c", download, name], timeout=DOWNLOAD_SECONDS,
                              capture_output=True, encoding="utf-8", errors="replace")
        problem = done.stderr.strip().splitlines()[-1][:120] if done.returncode else None
    except subprocess.TimeoutExpired:
        problem = f"no answer within {DOWNLOAD_SECONDS} s"
    if problem:
        raise UserError(f"data.tokenizer.kind={name} needs one download, which failed ({problem})\n"
                        "  connect once, point TIKTOKEN_CACHE_DIR at a filled cache, "
                        "or use tokenizer: {kind: bpe, vocab_size: 4096}")
    encoding = tiktoken.get_encoding(name)
    return ByteBPE(encoding._mergeable_ranks, portable_pattern(encoding._pat_str),
                   dict(encoding._special_tokens), name)


def portable_pattern(pattern: str) -> str:
    """tiktoken's pattern, written so that Hugging Face's regex engine reads it in the same way.

    Possessive quantifiers become plain ones: in these patterns they only save time, and that engine
    reads some differently. `$` becomes `\\z`: there it means the end of a line.
    """
    return re.sub(r"([+*?]|\{\d+(?:,\d*)?\})\+", r"\1", pattern).replace("$", r"\z")


def read_byte_bpe(text: str, name: str) -> ByteBPE | None:
    """The tokenizer of a tokenizer.json, from its `text`. None if tiktoken might give other ids.

    That is so unless each part of the file is one that ours have too, or changes no ids: padding
    and truncation, which are for batches; the decoder and what is cut off offsets; what happens to
    unknown letters, because every byte has one. Raises ValueError, LookupError, TypeError or
    AttributeError for a file that is no tokenizer at all.
    """
    contents: dict[str, Any] = json.loads(text)
    pattern, model = _pattern(contents.get("pre_tokenizer")), contents["model"]
    if pattern is None or not _is_plain(contents):
        return None
    byte_of = {letter: byte for byte, letter in byte_letters().items()}
    special = {token["content"]: token["id"] for token in contents["added_tokens"]}
    tokens = {token: i for token, i in model["vocab"].items() if token not in special}
    ids = [*tokens.values(), *special.values()]
    if (len({*ids}) < len(ids) or min(ids) < 0 or max(ids) >= LARGEST_ID
            or END_OF_TEXT not in special or not tokens.keys() >= byte_of.keys()
            or not byte_of.keys() >= {*"".join(tokens)}):
        return None
    ranks = {bytes(byte_of[letter] for letter in token): i for token, i in tokens.items()}
    tokenizer = ByteBPE(ranks, pattern, special, name)
    proven = (COMMON_SYNTAX.fullmatch(pattern)
              and _merges_are_ranks(text, tokens, special, model["merges"]))
    if not proven and not _is_ours(text, tokenizer):
        return None
    tokenizer.json = text                       # identified by its file, whoever wrote it
    return tokenizer


def _pattern(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """The pattern of a pre-tokenizer that does what `_pre_tokenizer` does."""
    match pre_tokenizer:
        case {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated",
                 "invert": False, **more},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False, **offsets}]}:
            return pattern if not more and offsets.keys() <= {"trim_offsets"} else None
    return None


def _is_plain(contents: dict[str, Any]) -> bool:
    """Whether all parts of a tokenizer.json but its pre-tokenizer, vocabulary and merges leave the
    ids as they are."""
    known = {"version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer",
             "post_processor", "decoder", "model"}
    known_of_model = {"type", "dropout", "unk_token", "continuing_subword_prefix",
                      "end_of_word_suffix", "fuse_unk", "byte_fallback", "ignore_merges", "vocab",
                      "merges"}
    model = contents["model"]
    changing = [contents.get("normalizer"), *map(model.get, (
        "dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"))]
    others = [contents.get(part) or {"type": "ByteLevel"} for part in ("decoder", "post_processor")]
    return (contents.keys() <= known and model.keys() <= known_of_model and not any(changing)
            and model.get("type", "BPE") == "BPE"
            and all(part["type"] == "ByteLevel" for part in others)
            and all(token["special"] for token in contents["added_tokens"]))


def _is_ours(text: str, tokenizer: ByteBPE) -> bool:
    """Whether we wrote this file. Then tiktoken defines its ids."""
    if text == tokenizer.json:
        return True
    last = tokenizer.begin == tokenizer.n_vocab - 1         # trainers put special tokens first
    return last and json.loads(text) == json.loads(tokenizer.json)


def _merges_are_ranks(text: str, tokens: dict[str, int], special: dict[str, int],
                      merges: list[Any]) -> bool:
    """Whether merging by the list `merges` and merging by ids, as tiktoken does, are the same.

    They are if every token is the result of one merge, in the order of the ids, and Hugging Face
    gets each token from its own letters. Then two neighbours that tiktoken may merge are the last
    two parts of a token, and those are unique.
    """
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    merged = ["".join(pair) for pair in pairs]
    by_id = sorted((token for token in tokens if len(token) > 1), key=lambda token: tokens[token])
    if merged != by_id:
        return False
    library = HFTokenizer.from_str(text)
    return (all(library.token_to_id(token) == i for token, i in special.items())
            and all(len(library.model.tokenize(token)) == 1 for token in by_id))


def _pre_tokenizer(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([_split(pattern), _byte_level()])


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


def _byte_level() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def _merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The pair that each token was merged from, in order.

    The earlier merges, applied to the token's bytes, leave that pair.
    """
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            pair_ranks = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
            lowest = min(pair_ranks)
            if lowest >= rank:
                break
            n = pair_ranks.index(lowest)
            parts[n:n + 2] = [parts[n] + parts[n + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]
