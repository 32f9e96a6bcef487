"""A config's data, opened: its tokenizer, its training batches and its validation windows."""

from pathlib import Path

from errors import UserError

import numpy as np

from data.batches import Batch, Batches, RepeatRows, TextWindows, as_batch
from data.config import DataConfig, MixtureEntry
from data.load_tokenizer import make_tokenizer
from data.prepare import prepare
from data.shards import Shards


class Dataset:
    """Opens the shards of `config`'s text corpus and prepares them where they are missing.

    `folder`: shards that a run began with, used as they are while they exist.
    """

    def __init__(self, config: DataConfig, seed: int, folder: str | None = None):
        self.config, self.seed = config, seed
        self.shards: Shards | None = None                       # of a text
        if config.text_corpus is not None:
            self.shards = Shards(folder if folder and (Path(folder) / "manifest.json").exists() else prepare(config))
        self.tokenizer = self.shards.tokenizer if self.shards else make_tokenizer(config.tokenizer, iter(()))
        self.begin = self.tokenizer.begin

    @property
    def identity(self) -> dict[str, str]:
        """What a checkpoint notes, so that a run cannot be continued on other data unawares."""
        if self.shards is None:
            return {"hash": self.tokenizer.hash}
        return {"hash": self.shards.hash, "folder": str(self.shards.folder.resolve())}

    def training(self, batch_tokens: int, n_ctx: int) -> Batches:
        """Batches by step, text and synthetic rows mixed as the config says."""
        sources: dict[str, TextWindows | RepeatRows] = {}
        if self.shards and self.config.text_corpus:
            sources[self.config.text_corpus] = TextWindows(self.shards.train, n_ctx, self.seed)
        if "repeats" in self.config.corpora:
            sources["repeats"] = self._repeats(n_ctx, "repeats")
        entries = self.config.mixture or [MixtureEntry(corpus=self.config.corpora[0], weight=1.0)]
        return Batches(sources, entries, batch_tokens, n_ctx, self._separator)

    def validation(self, tokens: int, n_ctx: int, windows_per_batch: int) -> list[Batch]:
        """About `tokens` tokens spread evenly over the held-out text, always the same; without text, rows never trained on."""
        count = max(1, tokens // n_ctx)
        if self.shards is None:
            rows = self._repeats(n_ctx, "validation").rows(np.arange(count))
        else:
            text = self.shards.val
            if len(text) < 2:
                raise UserError(f"the validation text has {len(text)} tokens (raise data.val_fraction={self.config.val_fraction})")
            length = min(n_ctx, len(text) - 1)
            last = len(text) - 1 - length                       # where the last window may begin
            count = min(count, last // length + 1)
            rows = np.stack([text.read(i * last // max(1, count - 1), length + 1) for i in range(count)])
        return list(as_batch(rows, self._separator).split(windows_per_batch))

    def _repeats(self, n_ctx: int, stream: str) -> RepeatRows:
        return RepeatRows(self.config.repeats, n_ctx, self.begin, self.tokenizer.ordinary, self.seed, stream)

    @property
    def _separator(self) -> int | None:
        return self.begin if self.config.mask_documents else None
