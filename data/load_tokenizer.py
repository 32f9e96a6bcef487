"""Load a tokenizer: one saved in a file, or the one that a config names."""

import json
from collections.abc import Iterator
from pathlib import Path

from errors import UserError

from data.byte_bpe import bytes_tokenizer, named_encoding, read_byte_bpe, train_bpe
from data.config import TokenizerConfig
from data.hf_tokenizer import HuggingFaceTokenizer
from data.tokenizer import Tokenizer
from files import pointed_at

LARGEST_FILE = 2 ** 28          # bytes of a tokenizer.json: o200k's has about 2 ** 24


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer.json: one of ours, or one that an import saved (data/hf_tokenizer.py).

    Raises UserError if it is neither.
    """
    path = Path(path)
    try:
        if (size := path.stat().st_size) > LARGEST_FILE:
            raise ValueError(f"{size:,} bytes are too large for a tokenizer")
        text = path.read_text("utf-8")
        config = path.with_name("tokenizer_config.json")
        if config.exists() and (roles := json.loads(config.read_text("utf-8")).get("gpt")):
            return HuggingFaceTokenizer(text, **roles)
        return read_byte_bpe(text, path.parent.name)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file "
                        "(a checkpoint and a data folder each hold their tokenizer)") from None
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError,
            RecursionError) as error:
        raise UserError(f"{path}: not a byte-level BPE in Hugging Face's format "
                        f"({type(error).__name__}: {error})") from None


def make_tokenizer(config: TokenizerConfig, texts: Iterator[str]) -> Tokenizer:
    """The tokenizer of a config; only `bpe` reads `texts`."""
    if config.kind == "bytes":
        return bytes_tokenizer()
    if config.kind == "bpe":
        assert config.vocab_size is not None            # TokenizerConfig requires it
        return train_bpe(texts, config.vocab_size)
    if config.is_path:
        path = Path(config.kind)
        path = pointed_at(path) or path                 # `latest` without symbolic links
        return load_tokenizer(path / "tokenizer.json" if path.is_dir() else path)
    return named_encoding(config.kind)
