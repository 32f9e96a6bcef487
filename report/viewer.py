"""report.html: a single page, without network requests, that shows how the heads of runs form.

A browser shows the front of the file while the rest is still loading, so the file is laid out in
the order in which a reader needs it: the page, all small numbers as JSON, the last snapshot of each
run (which the page opens with), then the earlier snapshots. Patterns are most of the file. Each
passage at each snapshot is a chunk of its own, inflated when someone looks at it.
"""

import base64
import json
import shutil
import tempfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from files import atomic_write
from induction.history import Curve
from report.export import finite
from report.text import EXPLANATIONS

BROWSER = Path(__file__).with_name("browser")       # what runs there
# What the page shows of a run's evidence: its rows, token by token, would delay the first paint.
EVIDENCE = ("run", "condition", "step", "control", "answers", "summary", "heads", "intervals",
            "losses", "behaviour", "mechanism", "transfer", "transition")
SCRIPTS = ("state", "heads", "text", "time", "answers", "how", "begin")     # in this order


class Passage(NamedTuple):
    """A sequence of tokens that the heads were shown."""

    title: str                      # "random tokens, period 18, held out of training"
    tokens: list[str]               # T of them, as text
    key: str = ""                   # names its picture in the log; empty if it is not logged
    vocab_size: int | None = None   # guessing a token costs ln of this; None if unknown


class PatternSnapshot(NamedTuple):
    """The patterns of all heads at one step, and what the model predicts. For each passage:"""

    step: int
    tokens: int                             # seen by this step
    patterns: list[np.ndarray]              # (L, H, T, T) uint8: weight · 255, rounded
    losses: list[np.ndarray] | None = None  # (T − 1,) float32: nats of each token but the first
    right: list[np.ndarray] | None = None   # (T − 1,) bool: whether it was the likeliest
                                            # (both None in snapshots of earlier versions)


class View(NamedTuple):
    """Everything that the page shows of a run."""

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
    evidence: dict | None = None            # the run's object of `heads.py --json`: the answers of
                                            # the verdict, and what they rest on; None: not examined


def write_viewer(path: Path, views: list[View]) -> None:
    """Write a page of one or more runs; the first is selected when it opens. One snapshot of each
    run is in memory at a time; the file appears whole or not at all.

    Raises ValueError if a run has no snapshot, or a pattern of another shape or dtype.
    """
    before, after = template().split("VIEW_AS_JSON")
    moments: list[list[dict]] = []                          # of the snapshots, by run
    # The newest snapshots come first in the page, but are read last: the others wait in a file.
    with atomic_write(path) as page, tempfile.TemporaryFile(dir=path.parent) as earlier:
        newest = []
        for run, view in enumerate(views):
            seen, last = write_earlier(earlier, run, view)
            moments.append(seen)
            newest.append(last)
        page.write(f"{before}{as_json(views, moments)}{after}".encode())
        for last in newest:
            page.write(last)
        earlier.seek(0)
        shutil.copyfileobj(earlier, page)


def write_earlier(file: BinaryIO, run: int, view: View) -> tuple[list[dict], bytes]:
    """Write all snapshots of run number `run` but the last. Returns the moments of all, and the
    last."""
    moments, newest = [], b""
    for index, snapshot in enumerate(view.snapshots):
        file.write(newest)
        newest = snapshot_chunks(f"r{run}", index, snapshot, view)
        moments.append({"step": snapshot.step, "tokens": snapshot.tokens})
    if not moments:
        raise ValueError(f"{view.title}: a viewer needs at least one snapshot")
    return moments, newest


def template() -> str:
    """The page without its data: markup, style and script in one text."""
    def part(name: str) -> str:
        return (BROWSER / name).read_text(encoding="utf-8")

    scripts = "\n".join(part(f"{name}.js") for name in SCRIPTS)
    return part("page.html").replace("STYLE", part("style.css")).replace("SCRIPT", scripts)


# --- snapshots ------------------------------------------------------------------------------------

def snapshot_chunks(run: str, index: int, snapshot: PatternSnapshot, view: View) -> bytes:
    """One chunk for each passage: id r0p0s12 is passage 0 of run 0 at snapshot 12. It holds the
    lower triangles of all patterns; then, if the snapshot has them, the losses (float32, little
    endian) and whether the likeliest token was right (a byte each)."""
    chunks = []
    for p, (passage, patterns) in enumerate(zip(view.passages, snapshot.patterns, strict=True)):
        content = triangles(patterns, view, passage)
        if snapshot.losses is not None and snapshot.right is not None:
            content += predictions(snapshot.losses[p], snapshot.right[p], passage)
        chunks.append(chunk(f"{run}p{p}s{index}", content))
    return b"".join(chunks)


def triangles(patterns: np.ndarray, view: View, passage: Passage) -> bytes:
    """The bytes of every head's lower triangle. Raises ValueError for another shape or dtype."""
    T = len(passage.tokens)
    expected = (view.n_layers, view.n_heads, T, T)
    if patterns.shape != expected or patterns.dtype != np.uint8:
        raise ValueError(f"patterns of {passage.title!r} are {patterns.dtype} {patterns.shape}, "
                         f"not uint8 {expected}")
    return lower_triangles(patterns).tobytes()                          # (L, H, T (T + 1) / 2)


def predictions(losses: np.ndarray, right: np.ndarray, passage: Passage) -> bytes:
    """The bytes of a passage's losses and of which were right. Raises ValueError for another
    shape."""
    expected = (len(passage.tokens) - 1,)
    if losses.shape != expected or right.shape != expected:
        raise ValueError(f"losses of {passage.title!r} are {losses.shape}, {right.shape}, not "
                         f"{expected}")
    return losses.astype("<f4").tobytes() + right.astype(np.uint8).tobytes()


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


# --- everything else ------------------------------------------------------------------------------

def as_json(views: list[View], moments: list[list[dict]]) -> str:
    """Everything but the snapshots. `<` is escaped, so no text can end the script element around it
    or open a comment."""
    content = {"explanations": EXPLANATIONS,
               "runs": [of_run(view, seen) for view, seen in zip(views, moments, strict=True)]}
    return json.dumps(content, allow_nan=False, default=float).replace("<", "\\u003c")


def of_run(view: View, moments: list[dict]) -> dict:
    """A view with the moments of its snapshots in place of the snapshots."""
    return view._asdict() | {
        "passages": [{"title": passage.title, "tokens": passage.tokens,
                      "vocab_size": passage.vocab_size} for passage in view.passages],
        "snapshots": moments,
        "scores": {name: series(*score) for name, score in view.scores.items()},
        "curves": {name: series(*curve) for name, curve in view.curves.items()},
        "evidence": None if view.evidence is None else finite(
            {key: value for key, value in view.evidence.items() if key in EVIDENCE}),
    }


def series(tokens: np.ndarray, values: np.ndarray) -> dict[str, list]:
    """Numbers to four decimals, more than a screen can show. JSON has no NaN: what is not finite
    becomes null."""
    rounded = np.round(np.asarray(values, dtype=np.float64), 4)
    return {"tokens": np.asarray(tokens).tolist(),
            "values": np.where(np.isfinite(rounded), rounded, np.array(None)).tolist()}
