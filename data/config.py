"""What a model is trained on."""

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tiktoken
from pydantic import Field, PositiveInt, model_validator

from settings.validate import Conflicts, Settings, Size, Text

Corpus = Literal["stdlib", "files", "hub", "repeats"]
SHORTEST_PERIOD = 3         # of the repeated random tokens in a probe
Fraction = Annotated[float, Field(gt=0, lt=1)]


class TokenizerConfig(Settings):
    """`bpe` trained on the corpus, `bytes`, a tiktoken encoding by its name (gpt2, cl100k_base,
    o200k_base, …), or the path of a tokenizer.json or of a folder with one (a checkpoint, to
    continue training it on other text)."""

    kind: str
    vocab_size: PositiveInt | None = None       # bpe only: bytes, merges and the end-of-text token
                                                # together

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        """Accept `tokenizer: gpt2`."""
        return {"kind": value} if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any,
                                     handler: Callable[[Any], Any]) -> dict[str, Any]:
        return {"anyOf": [{"type": "string"}, handler(core_schema)]}

    def conflicts(self) -> Conflicts:
        if self.kind == "bpe" and not 258 <= (self.vocab_size or 0) <= 2 ** 20:
            yield ("vocab_size",), (
                f"data.tokenizer.vocab_size={self.vocab_size} must be 258 to 1048576 for a bpe: "
                "256 bytes, the merges, the end-of-text token (try 4096)")
        if self.kind != "bpe" and self.vocab_size is not None:
            yield ("vocab_size", "kind"), (
                f"data.tokenizer.vocab_size={self.vocab_size} is for kind: bpe; "
                f"{self.kind} has its own size (leave it out)")
        if self.kind not in ("bpe", "bytes") and not self.is_path:
            yield from self._name_conflicts()

    def _name_conflicts(self) -> Conflicts:
        known = ["bpe", "bytes", *tiktoken.list_encoding_names()]
        if self.kind not in known:
            close = difflib.get_close_matches(self.kind, known, 1)
            advice = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
            if Path(self.kind).exists():                    # a path has a slash
                advice = f"did you mean ./{self.kind}?"
            yield ("kind",), f"data.tokenizer.kind={self.kind!r} is not a known tokenizer; {advice}"

    @property
    def is_path(self) -> bool:
        """Whether `kind` is a path. It is checked only on loading: a run keeps its own copy."""
        return "/" in self.kind or "\\" in self.kind


class HubConfig(Settings):
    """A dataset on the Hugging Face hub, streamed."""

    dataset: Text
    config: Text | None = None
    split: Text = "train"
    column: Text = "text"
    max_tokens: PositiveInt | None = None       # stop after about this many; null: the whole split


class RepeatsConfig(Settings):
    """Synthetic rows for the induction study: a random block, repeated."""

    period: list[Size] = [8, 32]                # shortest and longest block; equal: a fixed period,
                                                # which a fixed look-back can solve
    held_out_periods: list[Size] = []           # never drawn in training, kept for the probe
    held_out_tokens: Annotated[float, Field(ge=0, lt=1)] = 0.0
                                                # fraction of the vocabulary never repeated in
                                                # training
    n_tokens: PositiveInt | None = None         # draw from the first n ids; null: from all of the
                                                # tokenizer's

    def conflicts(self) -> Conflicts:
        if len(self.period) != 2 or self.period[0] > self.period[1]:
            yield ("period",), f"data.repeats.period={self.period} must be [shortest, longest]"
            return
        shortest, longest = self.period
        if not set(range(shortest, longest + 1)) - set(self.held_out_periods):
            yield ("held_out_periods", "period"), (
                f"data.repeats.held_out_periods={self.held_out_periods} leaves no period "
                f"of {self.period} to train on")


class MixtureEntry(Settings):
    """A share of the rows, until a step: the first entry of a corpus that has not ended counts."""

    corpus: Corpus
    weight: Annotated[float, Field(gt=0)]       # relative to the other corpora's
    until: PositiveInt | None = None            # last step it applies to; null: to the end


class DataConfig(Settings):
    corpus: Corpus | None = None                # null with a mixture, else stdlib
    files: list[Text] = []                      # globs, for corpus: files
    column: Text = "text"                       # which field of .jsonl, .parquet and .csv files is
                                                # text
    hub: HubConfig | None = None
    repeats: RepeatsConfig = RepeatsConfig()
    mixture: list[MixtureEntry] | None = None
    begin_fraction: Annotated[float, Field(ge=0, le=1)] | None = None
                                                # fraction of the rows, of text and of repeats, put
                                                # behind the token that begins a text; null: of
                                                # repeats all, of text none, so in a mixture the
                                                # first token tells a row's kind
    tokenizer: TokenizerConfig = TokenizerConfig(kind="bytes")
    val_fraction: Fraction = 0.05
    mask_documents: bool = False                # no attention from one document to another in the
                                                # same window
    folder: Text | None = None                  # where the shards are; null: prepared/NAME-HASH,
                                                # with a hash of their content

    @property
    def corpora(self) -> list[Corpus]:
        """The names of all corpora in use, each once."""
        if self.mixture:
            return list(dict.fromkeys(entry.corpus for entry in self.mixture))
        return [self.corpus or "stdlib"]

    @property
    def text_corpus(self) -> Corpus | None:
        """The one corpus that is text, if there is one."""
        return next((name for name in self.corpora if name != "repeats"), None)

    @property
    def mixes_text_and_repeats(self) -> bool:
        """Whether some rows are text and others repeats."""
        return "repeats" in self.corpora and self.text_corpus is not None

    @property
    def begin_tells_kind(self) -> bool:
        """Whether repeats begin with the begin token and rows of text do not."""
        return self.mixes_text_and_repeats and self.begin_fraction is None

    def conflicts(self) -> Conflicts:
        if self.mixture is not None and self.corpus is not None:
            yield ("corpus", "mixture"), (f"data.corpus={self.corpus} and data.mixture exclude "
                                          "each other (leave one out)")
        if self.mixture == []:
            yield ("mixture",), "data.mixture=[] names no corpus"
            return
        if len(set(self.corpora) - {"repeats"}) > 1:
            yield ("mixture",), (f"data.mixture has two text corpora ({', '.join(self.corpora)}): "
                                 "one text can be mixed with repeats")
        if self.mixture and all(entry.until is not None for entry in self.mixture):
            yield ("mixture",), ("data.mixture may end before the run: leave `until` out of at "
                                 "least one entry")
        if self.files and "files" not in self.corpora:
            yield ("files", "corpus", "mixture"), (
                f"data.files={self.files} needs corpus: files, but the corpus is "
                f"{' and '.join(self.corpora)} "
                "(set data.corpus=files, or name files in the mixture)")
        if "files" in self.corpora and not self.files:
            yield ("files", "corpus"), ("data.files is empty: corpus: files needs globs, "
                                        "for example data.files=['texts/*.txt']")
        if "hub" in self.corpora and self.hub is None:
            yield ("hub", "corpus"), ("data.hub is missing: corpus: hub needs data.hub.dataset, "
                                      "for example roneneldan/TinyStories")
        if self.corpora == ["repeats"] and self.tokenizer.kind == "bpe":
            yield ("tokenizer", "corpus"), ("data.tokenizer.kind=bpe has no text to learn from in "
                                            "corpus: repeats (try bytes)")
