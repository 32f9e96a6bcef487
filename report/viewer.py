"""report.html: a single page, without network requests, that shows how a run's heads form.

A browser shows the front of the file while the rest is still loading, so the file is laid out in
the order in which a reader needs it: the page, all small numbers as JSON, the patterns of the last
snapshot (which the page opens with), then the earlier snapshots. Patterns are most of the file.
Each passage at each snapshot is a chunk of its own, inflated when someone looks at it.
"""

import base64
import json
import shutil
import tempfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from files import atomic_write
from induction.history import Curve
from report.text import EXPLANATIONS

TEMPLATE = Path(__file__).with_name("viewer.html")


class Passage(NamedTuple):
    """A sequence of tokens that the heads were shown."""

    title: str                  # "random tokens, period 18, held out of training"
    tokens: list[str]           # T of them, as text
    key: str = ""               # names its picture in the log; empty if it is not logged


class PatternSnapshot(NamedTuple):
    """The patterns of all heads at one step."""

    step: int
    tokens: int                 # seen by this step
    patterns: list[np.ndarray]  # for each passage (L, H, T, T) uint8: weight · 255, rounded


class View(NamedTuple):
    """Everything that the page shows."""

    title: str
    subtitle: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    passages: list[Passage]
    snapshots: Iterable[PatternSnapshot]    # oldest first; read one at a time
    scores: dict[str, Curve]                # name → values (N, L, H)
    scored: str                             # the tokens on which they were measured, in words
    curves: dict[str, Curve]                # name → values (N,)
    marks: dict[str, float]                 # named moments, in tokens seen
    causal: dict[str, float]                # "L1H3" → rise in loss when it is mean-ablated, in nats
    causal_loss: str                        # of what: "second copy"
    causal_step: int                        # the heads were ablated at this step
    notes: list[str]


def write_viewer(path: Path, view: View) -> None:
    """Write the page. One snapshot is in memory at a time; the file appears whole or not at all.

    Raises ValueError if there is no snapshot, or a pattern of another shape or dtype.
    """
    before, after = TEMPLATE.read_text(encoding="utf-8").split("VIEW_AS_JSON")
    moments, newest = [], b""
    # The newest snapshot comes first in the page, but is read last: the others wait in a file.
    with atomic_write(path) as page, tempfile.TemporaryFile(dir=path.parent) as earlier:
        for index, snapshot in enumerate(view.snapshots):
            earlier.write(newest)
            newest = snapshot_chunks(index, snapshot, view)
            moments.append({"step": snapshot.step, "tokens": snapshot.tokens})
        if not moments:
            raise ValueError("a viewer needs at least one snapshot")
        page.write(f"{before}{as_json(view, moments)}{after}".encode())
        page.write(newest)
        earlier.seek(0)
        shutil.copyfileobj(earlier, page)


def snapshot_chunks(index: int, snapshot: PatternSnapshot, view: View) -> bytes:
    """One chunk for each passage: id p0s12 is passage 0 at snapshot 12."""
    chunks = []
    for p, (passage, patterns) in enumerate(zip(view.passages, snapshot.patterns, strict=True)):
        chunks.append(chunk(f"p{p}s{index}", triangles(patterns, view, passage)))
    return b"".join(chunks)


def triangles(patterns: np.ndarray, view: View, passage: Passage) -> bytes:
    """The bytes of every head's lower triangle. Raises ValueError for another shape or dtype."""
    T = len(passage.tokens)
    expected = (view.n_layers, view.n_heads, T, T)
    if patterns.shape != expected or patterns.dtype != np.uint8:
        raise ValueError(f"patterns of {passage.title!r} are {patterns.dtype} {patterns.shape}, "
                         f"not uint8 {expected}")
    return lower_triangles(patterns).tobytes()                          # (L, H, T (T + 1) / 2)


def lower_triangles(patterns: np.ndarray) -> np.ndarray:
    """The rows of matrices (…, T, T) up to their diagonals, end to end: (…, T (T + 1) / 2). The
    other half of a causal pattern is zeros."""
    return patterns[..., *np.tril_indices(patterns.shape[-1])]


def chunk(name: str, content: bytes) -> bytes:
    """An inert script element. Base64 has no `<` that could end it."""
    # Patterns are runs of zeros and noise. Matching only runs comes within 3% of zlib's full
    # search, in 1% of its time.
    deflate = zlib.compressobj(level=9, strategy=zlib.Z_RLE)
    packed = base64.b64encode(deflate.compress(content) + deflate.flush())
    return b'<script type="text/plain" id="%s">%s</script>\n' % (name.encode(), packed)


def as_json(view: View, moments: list[dict]) -> str:
    """Everything but the patterns. `<` is escaped, so no text can end the script element around it
    or open a comment."""
    content = view._asdict() | {
        "passages": [{"title": passage.title, "tokens": passage.tokens}
                     for passage in view.passages],
        "snapshots": moments,
        "explanations": EXPLANATIONS,
        "scores": {name: series(*score) for name, score in view.scores.items()},
        "curves": {name: series(*curve) for name, curve in view.curves.items()},
    }
    return json.dumps(content, allow_nan=False, default=float).replace("<", "\\u003c")


def series(tokens: np.ndarray, values: np.ndarray) -> dict[str, list]:
    """Numbers to four decimals, more than a screen can show. JSON has no NaN: what is not finite
    becomes null."""
    rounded = np.round(np.asarray(values, dtype=np.float64), 4)
    finite = np.where(np.isfinite(rounded), rounded, np.array(None))
    return {"tokens": np.asarray(tokens).tolist(), "values": finite.tolist()}
