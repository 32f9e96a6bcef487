"""Load a tokenizer: one saved in a file, or the one that a config names."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from errors import UserError

from data.byte_bpe import END_OF_TEXT, bytes_tokenizer, named_encoding, read_byte_bpe, train_bpe
from data.companions import read_companions, read_dict
from data.config import TokenizerConfig
from data.hf_tokenizer import HuggingFaceTokenizer, read_hf_tokenizer
from data.tokenizer import Tokenizer
from files import pointed_at

LARGEST_FILE = 2 ** 28          # bytes of a tokenizer.json: o200k's has about 2 ** 24


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer.json: one of ours, one that an import saved, or somebody else's.

    tiktoken runs it if that provably gives the ids that the file defines, else Hugging Face does.
    Raises UserError if neither can.
    """
    path = Path(path)
    try:
        if (size := path.stat().st_size) > LARGEST_FILE:
            raise ValueError(f"{size:,} bytes are too large for a tokenizer")
        text = path.read_text("utf-8")
        config = read_dict(path.with_name("tokenizer_config.json"))
        if roles := config.get("gpt"):
            tokenizer: Tokenizer | None = HuggingFaceTokenizer(text, **roles)
        elif _begins_with_end_of_text(config):
            tokenizer = read_byte_bpe(text, path.parent.name)
        else:
            tokenizer = None
        if tokenizer:
            tokenizer.kept = read_companions(path.parent, config)
            return tokenizer
    except FileNotFoundError:
        raise UserError(f"{path}: no such file "
                        "(a checkpoint and a data folder each hold their tokenizer)") from None
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError,
            RecursionError) as error:
        raise UserError(f"{path}: not a byte-level BPE in Hugging Face's format "
                        f"({type(error).__name__}: {error})") from None
    return read_hf_tokenizer(path.parent, read_dict(path.with_name("config.json")), path.name)


def _begins_with_end_of_text(config: dict[str, Any]) -> bool:
    """Whether texts begin and end as in our own tokenizers, as far as a tokenizer_config.json
    says."""
    named = [config.get(key) or END_OF_TEXT for key in ("bos_token", "eos_token")]
    texts = [token.get("content") if isinstance(token, dict) else token for token in named]
    return texts == [END_OF_TEXT, END_OF_TEXT] and not config.get("add_bos_token")


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
