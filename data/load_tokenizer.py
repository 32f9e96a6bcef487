"""Finds the tokenizer that is asked for: one saved in a file, or the one that a config names."""

import json
from collections.abc import Iterator
from pathlib import Path

from errors import UserError

from data.byte_bpe import bytes_tokenizer, named_encoding, read_byte_bpe, train_bpe
from data.config import TokenizerConfig
from data.hf_tokenizer import HuggingFaceTokenizer
from data.tokenizer import Tokenizer

LARGEST_FILE = 2 ** 28          # bytes of a tokenizer.json: o200k's has some 2 ** 24


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer.json: one of ours, or one that an import left (data/hf_tokenizer.py); a UserError where it is neither."""
    path = Path(path)
    try:
        if (size := path.stat().st_size) > LARGEST_FILE:
            raise ValueError(f"{size:,} bytes are no tokenizer")
        text = path.read_text("utf-8")
        described = json.loads(text)
        beside = path.with_name("tokenizer_config.json")
        if beside.exists() and (roles := json.loads(beside.read_text("utf-8")).get("gpt")):
            return HuggingFaceTokenizer(text, **roles)
        return read_byte_bpe(text, described, path.parent.name)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file (a checkpoint and a data folder each hold their tokenizer)") from None
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: not a byte-level BPE in Hugging Face's format ({type(error).__name__}: {error})") from None


def make_tokenizer(config: TokenizerConfig, texts: Iterator[str]) -> Tokenizer:
    """The tokenizer of a config; only `bpe` reads `texts`."""
    match config.kind:
        case "bytes":
            return bytes_tokenizer()
        case "bpe":
            assert config.vocab_size is not None            # TokenizerConfig has seen to it
            return train_bpe(texts, config.vocab_size)
        case path if "/" in path:
            return load_tokenizer(Path(path) / "tokenizer.json" if Path(path).is_dir() else path)
        case name:
            return named_encoding(name)
