"""Snapshots on disk: the losses beside the patterns, files of earlier versions, and how many a page
of several runs gets."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from small_models import perturbed_model
from viewer_cases import random_patterns

from model.taps import taps
from report.page import run_view
from report.snapshots import (
    PAGE_BYTES,
    SnapshotFolder,
    max_snapshots,
    read_passages,
)
from report.viewer import Passage, PatternSnapshot, write_viewer
from training.config import Config

IDS = [torch.arange(20) * 7 % 50, torch.tensor([3, 1, 4, 1, 5, 0, 9, 2, 6]), torch.tensor([8])]


@torch.no_grad()
def test_losses_are_those_of_each_next_token_from_the_same_pass():
    """Against float64 logits, with documents apart and without; a single token predicts nothing."""
    for document_start, cut in ((None, None), (0, 5)):
        model = perturbed_model()
        readings = read_passages(model, IDS, document_start)
        assert [losses.shape for losses in readings.losses] == [(19,), (8,), (0,)]
        for ids, losses, right in zip(IDS[1:], readings.losses[1:], readings.right[1:]):
            parts = [ids] if cut is None else [ids[:cut], ids[cut:]]    # document 0 begins at 5
            log_p = torch.cat([model(part[None])[0].double().log_softmax(-1)
                               for part in parts if len(part)])[:-1]
            expected = -log_p[torch.arange(len(ids) - 1), ids[1:]]
            assert losses.dtype == np.float32 and right.dtype == bool
            assert losses == pytest.approx(expected.numpy(), abs=1e-5)
            assert (right == (log_p.argmax(-1) == ids[1:]).numpy()).all()
        with taps(model, "L0.pattern") as acts:                         # positions are relative
            model(IDS[1][None][:, :5])
        seen = acts["L0.pattern"][0].numpy()
        assert np.abs(readings.patterns[1][0, :, :5, :5] / 255 - seen).max() <= 0.5 / 255 + 1e-6


def folder_of(path: Path, steps: int, T: int = 20, losses: bool = True) -> SnapshotFolder:
    folder = SnapshotFolder(path)
    path.mkdir(parents=True)
    folder.begin([Passage("random", list("abcdefghijklmnopqrst")[:T], vocab_size=50)], [IDS[0]], 0)
    for step in range(1, steps + 1):
        nats = np.linspace(0, step, T - 1, dtype=np.float32)
        snapshot = PatternSnapshot(step, 100 * step, [random_patterns(T, step)])
        if losses:
            snapshot = snapshot._replace(losses=[nats], right=[nats < 1])
        folder.save(snapshot)
    return folder


def test_what_is_saved_is_read(tmp_path):
    folder = folder_of(tmp_path / "heads", 2)
    second = list(folder)[1]
    assert (second.step, second.tokens) == (2, 200)
    assert (second.patterns[0] == random_patterns(20, 2)).all()
    assert (second.losses[0] == np.linspace(0, 2, 19, dtype=np.float32)).all()
    assert (second.right[0] == (second.losses[0] < 1)).all()
    assert folder.passages[0].vocab_size == 50


def test_files_of_earlier_versions_open_without_losses(tmp_path):
    folder = folder_of(tmp_path / "heads", 2, losses=False)
    entries = json.loads((folder.folder / "passages.json").read_text())
    del entries[0]["vocab_size"]
    (folder.folder / "passages.json").write_text(json.dumps(entries))
    assert [snapshot.losses for snapshot in folder] == [None, None]
    assert folder.passages[0].vocab_size is None
    view = run_view(tmp_path, Config(**TINY), [])
    write_viewer(tmp_path / "page.html", [view])
    assert 'id="r0p0s1"' in (tmp_path / "page.html").read_text()


def test_losses_of_another_length_are_refused(tmp_path):
    folder = folder_of(tmp_path / "heads", 1)
    torn = next(iter(folder))
    torn = torn._replace(losses=[torn.losses[0][:-1]])
    view = run_view(tmp_path, Config(**TINY), [])
    with pytest.raises(ValueError, match=r"losses of 'random' are \(18,\), \(19,\), not \(19,\)"):
        write_viewer(tmp_path / "page.html", [view._replace(snapshots=[torn])])
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("most, steps", [(1, [9]), (2, [1, 9]), (3, [1, 5, 9]), (4, [1, 4, 6, 9]),
                                         (8, [1, 2, 3, 4, 6, 7, 8, 9]), (9, list(range(1, 10))),
                                         (99, list(range(1, 10))), (None, list(range(1, 10)))])
def test_few_of_many_snapshots_are_evenly_spaced_and_end_with_the_last(tmp_path, most, steps):
    folder_of(tmp_path / "heads", 9)
    folder = SnapshotFolder(tmp_path / "heads", most)
    assert [snapshot.step for snapshot in folder] == steps and len(folder) == len(steps)
    assert max(np.diff(steps), default=0) - min(np.diff(steps), default=0) <= 1


def test_runs_that_share_a_page_fit_into_it_together(tmp_path, monkeypatch):
    """Their patterns, before they are compressed, take at most two bytes for each of the page's."""
    for run in ("a", "b", "c"):
        folder_of(tmp_path / run / "heads", 9)
    config, snapshot_bytes = Config(**TINY), 8 * 20 * 21 / 2
    monkeypatch.setattr("report.page.PAGE_BYTES", 3 * 4.5 * snapshot_bytes / 2)
    views = [run_view(tmp_path / run, config, [], runs_in_page=3) for run in ("a", "b", "c")]
    assert [[snapshot.step for snapshot in view.snapshots] for view in views] == [[1, 4, 6, 9]] * 3
    assert len(run_view(tmp_path / "a", config, []).snapshots) == 9     # a page of its own has all
    passages = [Passage("", ["x"] * 128)] * 2
    for n_heads, runs in ((24, 1), (24, 5), (144, 20), (1536, 50)):
        most = max_snapshots(n_heads, passages, PAGE_BYTES / runs)
        assert most == 1 or runs * most * n_heads * 2 * 128 * 129 / 2 <= 2 * PAGE_BYTES
