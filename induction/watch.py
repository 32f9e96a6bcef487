"""Watching the heads while a model trains: `train.py` calls it between two steps, on the weights as they are.

It draws no random number and leaves no trace in the model: training with it and without it is the same run, bit for bit.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from data.tokenizer import Tokenizer
from induction.phase import transition
from induction.probes import Probes
from induction.scores import Measured, measure
from model.gpt import GPT
from model.taps import heads_of
from report.pictures import mosaic, portrait
from report.snapshots import LONGEST, Snapshots, patterns, shown, snapshots_of, spelled
from report.viewer import Passage, Snapshot

STRONGEST = 3           # heads whose patterns are shown as pictures of their own


class HeadWatch:
    """Measures all heads of a model as it trains, and keeps small pictures of their patterns in the run's folder."""

    def __init__(self, model: GPT, probes: Probes, text: Tensor | None, tokenizer: Tokenizer, folder: Path, *, every: int, steps: int,
                 step: int = 0, history: Sequence[tuple[int, float]] = (), separator: int | None = None):
        """text      (T,) ids of a passage of held-out text, for the pictures; `separator`: begins documents that do not see each other
        every     steps between two looks at a run of `steps`, of which `step` are completed
        history   (tokens, prefix matching of the best head) of the looks before
        """
        self.probes, self.history, self.last, self.separator = probes, list(history), steps, separator
        example, title = probes.held_out.example(shown(model.config, LONGEST))
        self.ids = [example] + ([] if text is None else [text[:shown(model.config, LONGEST)]])
        self.passages = [Passage(name, spelled(ids, tokenizer)) for name, ids in zip((title, "held-out text"), self.ids)]
        self.snapshots = Snapshots(folder / "heads")
        self.snapshots.begin(self.passages, self.ids, step)
        most = snapshots_of(model.config, [len(ids) for ids in self.ids])
        self.between = every * -(-steps // (every * most))              # steps between two snapshots

    def __call__(self, model: GPT, step: int, tokens: int) -> dict[str, float | list[float]]:
        """Measurements for the run's record; now and then a snapshot of the patterns."""
        self.measured = measure(model, self.probes.held_out, self.probes.unrepeated)
        self.history.append((tokens, float(self.measured.scores["prefix_matching"].max())))
        if step % self.between == 0 or step == self.last:
            self.snapshots.save(Snapshot(step, tokens, patterns(model, self.ids, self.separator)))
        found = as_metrics(model, self.measured)
        at, best = zip(*self.history)
        if moved := transition(at, best):
            found["phase/onset_tokens"] = round(moved.onset)
        return found

    def pictures(self, model: GPT) -> dict[str, np.ndarray | tuple[list[str], list[list]]]:
        """What the heads look at: all of them in one picture, the strongest one by one, and the table of all scores."""
        found = patterns(model, self.ids, self.separator)
        score = self.measured.scores["prefix_matching"]
        strongest = sorted(heads_of(model.config), key=lambda head: -score[head])[:STRONGEST]
        return {f"heads/patterns/{passage.title.split(',')[0]}": mosaic(pattern) for passage, pattern in zip(self.passages, found)} | {
            f"heads/strongest/{n + 1}": portrait(found[0][head], f"{head}  prefix matching {score[head]:.2f}")
            for n, head in enumerate(strongest)} | {"heads/table": table(model, self.measured)}


def table(model: GPT, measured: Measured) -> tuple[list[str], list[list]]:
    """Columns and rows, a row a head."""
    rows = [[str(head), *(round(values[head].item(), 4) for values in measured.scores.values())] for head in heads_of(model.config)]
    return ["head", *measured.scores], rows


def as_metrics(model: GPT, measured: Measured) -> dict[str, float | list[float]]:
    """Flat names, as in metrics.jsonl: heads/prefix_matching/L1H3."""
    found: dict[str, float | list[float]] = {"repeat/loss_first": measured.loss_first, "repeat/loss_second": measured.loss_second}
    for name, values in measured.scores.items():
        found |= {f"heads/{name}/{head}": round(values[head].item(), 4) for head in heads_of(model.config)}
    return found | {f"heads/offset_profile/{head}": [round(value, 4) for value in measured.offset_profile[head].tolist()]
                    for head in heads_of(model.config)}
