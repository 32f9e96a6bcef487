"""report.html: one page, without a network, on which to watch the attention heads of a run form.

The file is read from its front while the rest is still coming, so it is laid out in the order in which a reader needs it: the
page itself, all small numbers as JSON, the patterns of the last snapshot (what the page opens with), then the earlier ones.
Patterns are by far the most of it; each passage at each snapshot is a chunk of its own, inflated when someone looks.
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
from induction.scores import SCORES

TEMPLATE = Path(__file__).with_name("viewer.html")


class Passage(NamedTuple):
    """A sequence of tokens that the heads were shown."""
    title: str                  # "random tokens, period 18, held out of training"
    tokens: list[str]           # T of them, as text


class Snapshot(NamedTuple):
    """The patterns at one step."""
    step: int
    tokens: int                 # trained on so far
    patterns: list[np.ndarray]  # for each passage (L, H, T, T) uint8: A · 255, rounded


class View(NamedTuple):
    """All that the page shows."""
    title: str
    subtitle: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    passages: list[Passage]
    snapshots: Iterable[Snapshot]                           # oldest first, asked for one at a time
    scores: dict[str, tuple[np.ndarray, np.ndarray]]        # name → tokens seen (N,), values (N, L, H)
    curves: dict[str, tuple[np.ndarray, np.ndarray]]        # name → tokens seen (N,), values (N,)
    marks: dict[str, float]                                 # moments with a name, in tokens seen
    causal: dict[str, float]                                # "L1H3" → what ablating this head alone costs, in nats
    notes: list[str]


def write_viewer(path: Path, view: View) -> None:
    """Write the page; one snapshot is in memory at a time, and the file appears whole or not at all."""
    before, after = TEMPLATE.read_text(encoding="utf-8").split("VIEW_AS_JSON")
    moments, latest = [], b""
    with atomic_write(path) as page, tempfile.TemporaryFile(dir=path.parent) as earlier:
        for index, snapshot in enumerate(view.snapshots):
            earlier.write(latest)
            latest = b"".join(chunk(f"p{p}s{index}", triangles(patterns, view, passage))
                              for p, (passage, patterns) in enumerate(zip(view.passages, snapshot.patterns, strict=True)))
            moments.append({"step": snapshot.step, "tokens": snapshot.tokens})
        if not moments:
            raise ValueError("a viewer needs at least one snapshot")
        page.write(f"{before}{as_json(view, moments)}{after}".encode())
        page.write(latest)
        earlier.seek(0)
        shutil.copyfileobj(earlier, page)


def triangles(patterns: np.ndarray, view: View, passage: Passage) -> bytes:
    """The rows of every head up to their diagonal, end to end: the other half of a causal pattern is zeros."""
    T = len(passage.tokens)
    expected = (view.n_layers, view.n_heads, T, T)
    if patterns.shape != expected or patterns.dtype != np.uint8:
        raise ValueError(f"patterns of {passage.title!r} are {patterns.dtype} {patterns.shape}, not uint8 {expected}")
    return patterns[:, :, *np.tril_indices(T)].tobytes()    # (L, H, T(T+1)/2)


def chunk(name: str, content: bytes) -> bytes:
    """An inert script element: the alphabet of base64 has no `<` that could end it."""
    # Patterns are runs of zeros and noise. Matching runs alone comes within 3% of zlib's full search, in 1% of its time.
    deflate = zlib.compressobj(level=9, strategy=zlib.Z_RLE)
    packed = base64.b64encode(deflate.compress(content) + deflate.flush())
    return b'<script type="text/plain" id="%s">%s</script>\n' % (name.encode(), packed)


def as_json(view: View, moments: list[dict]) -> str:
    """Everything but the patterns. With `<` escaped no text can end the script element around it, nor open a comment."""
    content = view._asdict() | {
        "passages": [passage._asdict() for passage in view.passages],
        "snapshots": moments,
        "explanations": SCORES,
        "scores": {name: series(*score) for name, score in view.scores.items()},
        "curves": {name: series(*curve) for name, curve in view.curves.items()},
    }
    return json.dumps(content, allow_nan=False, default=float).replace("<", "\\u003c")


def series(tokens: np.ndarray, values: np.ndarray) -> dict[str, list]:
    """Numbers to four decimals, more than a screen can show. What is not finite becomes null: JSON has no NaN."""
    rounded = np.round(np.asarray(values, dtype=np.float64), 4)
    return {"tokens": np.asarray(tokens).tolist(), "values": np.where(np.isfinite(rounded), rounded, np.array(None)).tolist()}
