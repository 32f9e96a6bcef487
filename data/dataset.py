"""A config's data, opened: its tokenizer, its training batches and its validation batches."""

from pathlib import Path

from errors import UserError

import numpy as np

from data.batches import (
    Batch,
    Batches,
    BegunRows,
    RepeatRows,
    Source,
    SpreadWindows,
    TextWindows,
    as_batch,
)
from data.config import DataConfig, MixtureEntry
from data.load_tokenizer import make_tokenizer
from data.prepare import prepare
from data.shards import Shards, folders_of_shards


class Dataset:
    """Opens the shards of the text corpus in `config`, after preparing them if they are missing.

    `folder`: the shards that a run began with. They are used unchanged as long as they exist; after
    a move they are found by `data_hash`.
    """

    def __init__(self, config: DataConfig, seed: int, folder: str | None = None,
                 data_hash: str | None = None):
        self.config, self.seed = config, seed
        self.shards: Shards | None = None                       # None: the config has no text
        if config.text_corpus is not None:
            begun_with = shards_of_run(folder, data_hash, config) if folder else None
            self.shards = Shards(begun_with or prepare(config))
            self.tokenizer = self.shards.tokenizer
        else:
            self.tokenizer = make_tokenizer(config.tokenizer, iter(()))
        self.begin = self.tokenizer.begin

    @property
    def identity(self) -> dict[str, str]:
        """Saved in checkpoints, so that a run cannot be continued on other data by mistake."""
        if self.shards is None:
            return {"hash": self.tokenizer.hash}
        return {"hash": self.shards.hash, "folder": str(self.shards.folder.resolve())}

    def training(self, batch_tokens: int, n_ctx: int) -> Batches:
        """Batches by step; text and synthetic rows are mixed as configured."""
        sources: dict[str, Source] = {}
        if self.shards and self.config.text_corpus:
            text = TextWindows(self.shards.train, n_ctx, self.seed)
            sources[self.config.text_corpus] = self._begun(text, "text", otherwise=0.0)
        if "repeats" in self.config.corpora:
            sources["repeats"] = self._repeats(n_ctx, "repeats")
        entries = self.config.mixture or [MixtureEntry(corpus=self.config.corpora[0], weight=1.0)]
        return Batches(sources, entries, batch_tokens, n_ctx, self._document_start)

    def validation(self, tokens: int, n_ctx: int, windows_per_batch: int) -> list[Batch]:
        """About `tokens` tokens, always the same.

        The windows are spread evenly over the held-out text. Without text they are synthetic rows
        from a random stream of their own.
        """
        count = max(1, tokens // n_ctx)
        if self.shards is None:
            source: Source = self._repeats(n_ctx, "validation")
        else:
            if len(self.shards.val) < 2:
                raise UserError(f"the validation text has {len(self.shards.val)} tokens "
                                f"(raise data.val_fraction={self.config.val_fraction})")
            windows = SpreadWindows(self.shards.val, n_ctx, count)
            count, source = windows.count, self._begun(windows, "validation text", 0.0)
        rows = source.rows(np.arange(count))
        return list(as_batch(rows, self._document_start).split(windows_per_batch))

    def _repeats(self, n_ctx: int, stream: str) -> Source:
        return self._begun(RepeatRows(self.config.repeats, n_ctx, self.tokenizer.ordinary_ids,
                                      self.seed, stream), stream, otherwise=1.0)

    def _begun(self, source: Source, stream: str, otherwise: float) -> Source:
        """The rows of `source`, as many of them behind `begin` as the config says, or the fraction
        `otherwise`."""
        fraction = self.config.begin_fraction
        if fraction is None:
            fraction = otherwise
        return BegunRows(source, self.begin, fraction, self.seed, stream)

    @property
    def _document_start(self) -> int | None:
        return self.begin if self.config.mask_documents else None


def shards_of_run(folder: str, data_hash: str | None, config: DataConfig) -> Path | None:
    """Where the shards are that a run began with in `folder`; None if they no longer exist."""
    if (Path(folder) / "manifest.json").exists():
        return Path(folder)
    named = [Path(config.folder)] if config.folder else []      # the project may have been moved
    folders = folders_of_shards([*named, *Path("prepared").glob("*")],
                                lambda manifest: manifest["hash"] == data_hash)
    return folders[0] if folders else None
