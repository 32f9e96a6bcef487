"""The attention patterns of all heads, and what the model predicts, kept step by step in
runs/NAME/heads/, so that looking back needs no checkpoint.

    passages.json   the texts that the heads were shown, token by token
    000050.npz      tokens: seen by this step; pattern_0, pattern_1 …: one for each passage,
                    (L, H, T (T + 1) / 2) uint8, the rows of the lower triangle, weight · 255;
                    loss_0 …: (T − 1) float32, nats of each token but the first; right_0 …:
                    (T − 1) bool, whether it was the likeliest (earlier versions: patterns only)
"""

import contextlib
import itertools
import json
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from errors import UserError, first_line

import numpy as np
import torch
from torch import Tensor

from data.batches import document_ids
from data.tokenizer import Tokenizer
from files import atomic_write
from induction.behaviour import predictions
from induction.probe_set import Probes
from induction.scores import Measured
from model.config import ModelConfig
from model.gpt import GPT
from model.taps import heads_of, taps
from report.pictures import mosaic, portrait
from report.viewer import Passage, PatternSnapshot, lower_triangles

MAX_TOKENS = 128        # of a passage that are kept while training: a pattern grows with its square
MAX_SNAPSHOTS = 64      # of a run
PAGE_BYTES = 40e6       # of patterns in a page; deflate halves them, then base64 adds a third
MAX_ENTRIES = 24 * 512 ** 2     # of all heads' patterns of one passage that a page can show at once
STRONGEST = 3           # heads that get a picture of their own

Table = tuple[list[str], list[list]]                # column names, rows


class PatternRecorder:
    """Keeps the patterns of a model's heads while it trains, and draws them for wandb."""

    def __init__(self, config: ModelConfig, probes: Probes, text: Tensor | None,
                 tokenizer: Tokenizer, folder: Path, *, every: int, steps: int, step: int = 0,
                 document_start: int | None = None):
        """text            (T,) token ids of held-out text, the second passage; None without text
        folder          of the run; snapshots later than `step` are deleted, they will be made again
        every           steps between two measurements of the heads, of `steps` in all
        document_start  the token that begins a document, if documents must not see each other
        """
        self.config, self.last_step, self.document_start = config, steps, document_start
        n_tokens = tokens_shown(config, MAX_TOKENS)
        example, title = probes.scored.example(n_tokens)
        self.ids = [example]
        self.passages = [Passage(title, spell(example, tokenizer), "random tokens",
                                 config.vocab_size)]
        if text is not None:
            ids = text[:n_tokens]
            self.ids.append(ids)
            self.passages.append(Passage("held-out text", spell(ids, tokenizer), "held-out text",
                                         config.vocab_size))
        self.snapshots = SnapshotFolder(folder / "heads")
        self.snapshots.begin(self.passages, self.ids, step)
        n_heads = config.n_layers * config.n_heads
        most = max(2, max_snapshots(n_heads, self.passages))
        self.every = every * -(-steps // (every * most))        # a multiple of `every`, rounded up

    def due(self, step: int) -> bool:
        """Whether a snapshot is taken after this step."""
        return step % self.every == 0 or step == self.last_step

    def save(self, model: GPT, step: int, tokens_seen: int) -> None:
        """Take a snapshot of the model's patterns and predictions."""
        readings = read_passages(model, self.ids, self.document_start)
        self.snapshots.save(PatternSnapshot(step, tokens_seen, *readings))

    def pictures(self, model: GPT, measured: Measured) -> dict[str, np.ndarray | Table]:
        """What wandb shows: all patterns in one picture for each passage, the strongest heads one
        by one, and the table of all scores."""
        patterns = read_passages(model, self.ids, self.document_start).patterns
        pictures: dict[str, np.ndarray | Table] = {}
        for passage, pattern in zip(self.passages, patterns):
            pictures[f"heads/patterns/{passage.key}"] = mosaic(pattern)
        score = measured.scores["prefix_matching"]
        strongest = sorted(heads_of(self.config), key=lambda head: -score[head])[:STRONGEST]
        for rank, head in enumerate(strongest, 1):
            title = f"{head}  prefix matching {score[head]:.2f}"
            pictures[f"heads/strongest/{rank}"] = portrait(patterns[0][head], title)
        pictures["heads/table"] = score_table(self.config, measured)
        return pictures


def score_table(config: ModelConfig, measured: Measured) -> Table:
    """All scores as a table, one row per head."""
    columns = [values.flatten().tolist() for values in measured.scores.values()]
    rows = [[str(head), *(round(value, 4) for value in row)]
            for head, *row in zip(heads_of(config), *columns)]
    return ["head", *measured.scores], rows


# --- patterns -------------------------------------------------------------------------------------

def tokens_shown(config: ModelConfig, length: int) -> int:
    """How many of `length` tokens a page can show at once: 512 for 24 heads, fewer for more."""
    return min(length, int((MAX_ENTRIES / (config.n_layers * config.n_heads)) ** 0.5))


def max_snapshots(n_heads: int, passages: list[Passage], page_bytes: float = PAGE_BYTES) -> int:
    """How many snapshots of `n_heads` heads fit into so many bytes of a page: 1 … MAX_SNAPSHOTS."""
    triangles = [len(passage.tokens) * (len(passage.tokens) + 1) / 2 for passage in passages]
    snapshot_bytes = max(1, n_heads * sum(triangles))
    return max(1, min(MAX_SNAPSHOTS, int(2 * page_bytes / snapshot_bytes)))


class Readings(NamedTuple):
    """What a model does with some passages of T tokens each, as a PatternSnapshot holds it."""

    patterns: list[np.ndarray]      # (L, H, T, T) uint8
    losses: list[np.ndarray]        # (T − 1,) float32
    right: list[np.ndarray]         # (T − 1,) bool


@torch.no_grad()
def read_passages(model: GPT, passages: list[Tensor],
                  document_start: int | None = None) -> Readings:
    """The patterns of all heads on passages (T,) of token ids, and the model's predictions, from
    one forward pass each.

    `document_start`: the token that begins a document, if documents must not see each other.
    """
    if len({len(passage) for passage in passages}) > 1:
        alone = [read_passages(model, [passage], document_start) for passage in passages]
        return Readings(*([part for parts in same for part in parts] for same in zip(*alone)))
    tokens = torch.stack(passages)                                              # (B, T)
    with taps(model, "L*.pattern") as acts:
        final = model.hidden(tokens, segments=document_ids(tokens, document_start))
    patterns = torch.stack([acts[f"L{layer}.pattern"] for layer in range(model.config.n_layers)], 1)
    losses, right = (values.view(len(tokens), -1).cpu().numpy() for values in predictions(
        model, final[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))
    return Readings(list((patterns.float() * 255).round().byte().cpu().numpy()), list(losses),
                    list(right))


def spell(ids: Tensor, tokenizer: Tokenizer) -> list[str]:
    """Each token as text; control characters and bytes that are no whole character as \\xNN."""
    return [tokenizer.token_text(token) for token in ids.tolist()]


# --- on disk --------------------------------------------------------------------------------------

class SnapshotFolder:
    """The folder runs/NAME/heads, written during training and read afterwards."""

    def __init__(self, folder: Path, most: int | None = None):
        """most    read only so many snapshots, evenly spaced, the last among them"""
        self.folder, self.most = folder, most

    def begin(self, passages: list[Passage], ids: list[Tensor], step: int) -> None:
        """Write the passages, and delete snapshots later than `step`: they will be made again."""
        self.folder.mkdir(exist_ok=True)
        for path in self._files():
            if int(path.stem) > step:
                path.unlink()
        entries = [{"title": passage.title, "tokens": passage.tokens, "ids": row.tolist(),
                    "vocab_size": passage.vocab_size} for passage, row in zip(passages, ids)]
        with atomic_write(self.folder / "passages.json", "w") as file:
            json.dump(entries, file)

    def save(self, snapshot: PatternSnapshot) -> None:
        arrays = {"tokens": np.array(snapshot.tokens)}
        arrays |= {f"pattern_{n}": lower_triangles(pattern)
                   for n, pattern in enumerate(snapshot.patterns)}
        arrays |= {f"loss_{n}": losses for n, losses in enumerate(snapshot.losses or [])}
        arrays |= {f"right_{n}": right for n, right in enumerate(snapshot.right or [])}
        # Not `np.savez_compressed`: its level takes six times as long for 3 to 14% fewer bytes.
        with (atomic_write(self.folder / f"{snapshot.step:06d}.npz") as file,
              zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive):
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)

    @property
    def passages(self) -> list[Passage]:
        path = self.folder / "passages.json"
        with report_damage(path):
            if not path.exists():
                return []
            entries = json.loads(path.read_text("utf-8"))
            return [Passage(entry["title"], entry["tokens"], vocab_size=entry.get("vocab_size"))
                    for entry in entries]

    def __iter__(self) -> Iterator[PatternSnapshot]:
        """Oldest first, one in memory at a time."""
        for path in self._read_files():
            with report_damage(path), np.load(path, allow_pickle=False) as saved:
                size = sum(member.file_size for member in saved.zip.infolist())
                if size > 2 * PAGE_BYTES:                       # checked before it is inflated
                    raise ValueError(f"{size:,} bytes of patterns")
                patterns = [squares(rows) for rows in numbered(saved, "pattern")]
                losses, right = numbered(saved, "loss"), numbered(saved, "right")
                snapshot = PatternSnapshot(int(path.stem), int(saved["tokens"]), patterns)
                if len(losses) == len(right) == len(patterns):  # earlier versions have none
                    snapshot = snapshot._replace(losses=losses, right=right)
            yield snapshot

    def __len__(self) -> int:
        return len(self._read_files())

    def _read_files(self) -> list[Path]:
        files = self._files()
        if self.most is None or len(files) <= self.most:
            return files
        last = len(files) - 1
        return [files[round(last - n * last / max(1, self.most - 1))]
                for n in reversed(range(self.most))]

    def _files(self) -> list[Path]:
        files = [path for path in self.folder.glob("*.npz") if path.stem.isdigit()]
        return sorted(files, key=lambda path: int(path.stem))


def numbered(saved: np.lib.npyio.NpzFile, name: str) -> list[np.ndarray]:
    """The arrays name_0, name_1 … of a file."""
    keys = itertools.takewhile(lambda key: key in saved, (f"{name}_{n}" for n in itertools.count()))
    return [saved[key] for key in keys]


@contextlib.contextmanager
def report_damage(path: Path) -> Iterator[None]:
    """A UserError for whatever a damaged or hostile file makes its reader raise."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, MemoryError,
            RecursionError, zipfile.BadZipFile, zlib.error) as error:
        damaged = path.parent if path.suffix == ".json" else path
        raise UserError(f"{path} is damaged ({first_line(error)})\n"
                        f"  delete {damaged}: the report is then written without it") from None


def squares(rows: np.ndarray) -> np.ndarray:
    """The inverse of `lower_triangles`: (…, T (T + 1) / 2) → (…, T, T)."""
    T = int((2 * rows.shape[-1]) ** 0.5)
    patterns = np.zeros((*rows.shape[:-1], T, T), rows.dtype)
    patterns[..., *np.tril_indices(T)] = rows
    return patterns
