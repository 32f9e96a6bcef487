"""The numbers on the pages and figures of `python heads.py` are those of the tokens and the step
that they name."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

from errors import UserError

import numpy as np
import pytest
import torch
from commands import fails
from conftest import read_records
from test_heads import HEADS, heads

from induction.scores import Measured
from model.config import ModelConfig
from model.taps import Head
from report.figures import score_grids
from train import report_heads
from training.loaded_run import LoadedRun, load_run


def page_runs(page: Path) -> list[dict]:
    """Everything that a page shows of each run but the patterns."""
    content = re.search('id="view"[^>]*>(.*?)</script>', page.read_text()).group(1)
    return json.loads(content)["runs"]


def page_data(page: Path) -> dict:
    """Of a page of one run."""
    [run] = page_runs(page)
    return run


def page_scores(data: dict, snapshot: int = -1) -> dict:
    """The scores beside the patterns of a snapshot, as --json writes them."""
    tokens = data["snapshots"][snapshot]["tokens"]
    at = {name: score["values"][score["tokens"].index(tokens)]
          for name, score in data["scores"].items() if tokens in score["tokens"]}
    return {str(head): {name: values[head.layer][head.index] for name, values in at.items()}
            for head in map(Head._make, np.ndindex(2, 4))}


def without_alone(path: Path) -> dict:
    heads = json.loads(path.read_text())["heads"]
    return {head: {name: pytest.approx(value, abs=1e-4) for name, value in values.items()
                   if name != "alone"} for head, values in heads.items()}


def test_the_page_of_a_text_shows_the_scores_of_that_text(run):
    """At every step, in place of the probe's and without curves of the probe."""
    given = ("--text", "the cat sat. the cat sat.", "--json", run / "text.json")
    assert heads(run, "--json", run / "probe.json").returncode == 0
    assert heads(run, *given, "--step", 8).returncode == 0
    early = without_alone(run / "text.json")
    assert page_scores(page_data(run / "report-text.html")) == early
    done = heads(run, *given, "--all-steps")
    assert done.returncode == 0, done.stderr
    data, final = page_data(run / "report-text.html"), without_alone(run / "text.json")
    assert [page_scores(data, 0), page_scores(data, 1)] == [early, final]
    assert early != final and not data["curves"] and not data["marks"]
    probe = json.loads((run / "probe.json").read_text())["heads"]
    assert abs(probe["L1H0"]["distance"] - page_scores(data)["L1H0"]["distance"]) > 0.1
    assert data["scored"] == "the given text" and data["causal_loss"] == "loss on the given text"
    assert data["causal_step"] == 12 == data["snapshots"][-1]["step"]
    text = json.loads((run / "text.json").read_text())["heads"]
    assert data["causal"] == {head: scores["alone"] for head, scores in text.items()}

    (run / "long.txt").write_text("the cat sat. " * 40)
    assert heads(run, "--file", run / "long.txt").returncode == 0
    data = page_data(run / "report-text.html")
    rows = re.fullmatch(r"all (\d+) rows of the given text", data["scored"]).group(1)
    assert data["passages"][0]["title"] == f"the given text, row 1 of {rows}"


def test_several_runs_share_a_page(run):
    """The whole way, by the command: two runs, one of them without snapshots of its training."""
    shutil.copytree(run, run.parent / "other")
    shutil.rmtree(run.parent / "other" / "heads")
    done = heads("report", "runs/tiny", "runs/other", "--out", "page.html", cwd=run.parent.parent)
    assert done.returncode == 0 and "page.html" in done.stdout, done.stderr
    data = page_runs(run.parent.parent / "page.html")
    assert [view["title"] for view in data] == ["tiny", "other"]
    assert [len(view["snapshots"]) for view in data] == [3, 1]
    answers = [view["evidence"]["answers"]["formed"] for view in data]
    assert answers == ["no", "no"] and data[0]["evidence"]["heads"] == data[1]["evidence"]["heads"]
    fails(heads("report", "runs/tiny", cwd=run.parent.parent), "--out")


def test_a_verdict_that_cannot_be_given_ends_no_training(run, monkeypatch):
    """Training is over and saved when the text of the verdict turns out to be deleted."""
    def deleted(*_):
        raise UserError("prepared/x: is gone")

    monkeypatch.setattr(LoadedRun, "validation", deleted)
    opened, said, logged = load_run(run), [], []
    (run / "report.html").unlink()
    at_its_end = SimpleNamespace(
        step=12, config=opened.config, folder=run, checkpoints=run / "checkpoints", say=said.append,
        metrics=SimpleNamespace(read=opened.records), log_media=lambda make: logged.append(make()))
    assert report_heads(at_its_end, opened.model, opened.tokenizer) is None
    assert said == ["note       no verdict: prepared/x: is gone"]
    assert logged == [{"heads/report": run / "report.html"}]
    assert page_data(run / "report.html")["evidence"] is None


def test_a_page_shows_the_scores_of_its_own_steps(run):
    """Here step 8 was not measured, and step 4 was: the page must not show step 4's."""
    records = read_records(run)
    for record in records:
        for key in list(record):
            if key.startswith("heads/") and record["step"] == 8:
                del record[key]
            elif key.startswith("heads/prefix_matching/") and record["step"] == 4:
                record[key] = 0.75
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    for arguments in ((run, "--step", 8), (run / "checkpoints" / "000008",)):
        (run / "report-step-8.html").unlink(missing_ok=True)
        done = heads(*arguments, "--json", run / "s.json")
        assert done.returncode == 0 and "report-step-8.html" in done.stdout, done.stderr
        data = page_data(run / "report-step-8.html")
        assert page_scores(data) == without_alone(run / "s.json")
        assert data["subtitle"].endswith("8 steps") and data["causal_step"] == 8
    assert heads(run, "--all-steps").returncode == 0
    data = page_data(run / "report-all-steps.html")
    measured = json.loads((run / "s.json").read_text())["heads"]
    assert [moment["step"] for moment in data["snapshots"]] == [8, 12]
    for head, scores in page_scores(data, 0).items():
        assert {"prefix_matching", "copying"} <= set(scores) <= set(measured[head])
        assert scores["prefix_matching"] == pytest.approx(measured[head]["prefix_matching"],
                                                          abs=1e-4)
    final = {name: value for name, value in records[-1].items() if name.startswith("heads/copying")}
    assert {f"heads/copying/{head}": scores["copying"]
            for head, scores in page_scores(data).items()} == final


def test_the_report_of_a_run_shows_each_snapshot_with_its_own_scores(run):
    """The snapshots go on after the checkpoint if a run was killed, or still runs."""
    shutil.rmtree(run / "checkpoints" / "000012")
    done = heads(run)
    assert done.returncode == 0 and "at step 8" in done.stdout, done.stderr
    data = page_data(run / "report.html")
    records = {record["step"]: record for record in read_records(run)}
    assert [moment["step"] for moment in data["snapshots"]] == [4, 8, 12]
    for n, moment in enumerate(data["snapshots"]):
        shown = {head: scores["previous_token"] for head, scores in page_scores(data, n).items()}
        assert shown == {head: records[moment["step"]][f"heads/previous_token/{head}"]
                         for head in HEADS}
    assert data["causal_step"] == 8 and data["scored"] == "repeated random tokens"


def test_figures_draw_a_signed_score_around_zero():
    """Red below 0, white at 0, blue above; a fraction is never red; what was not measured has no
    number."""
    values = torch.tensor([[-0.8, 0.0, 0.8]], dtype=torch.float64)
    model = ModelConfig(n_layers=1, n_heads=3, n_kv_heads=3, d_model=24, n_ctx=16, vocab_size=50)
    measured = Measured({"prefix_matching": values.abs(), "copying": values,
                         "entropy": values * np.nan}, torch.zeros(1, 3, 17), {}, 0, 0,
                        {}, None)
    panels = score_grids(model, measured).axes
    titles = [panel.get_title(loc="left") for panel in panels]
    assert titles == ["prefix matching", "entropy", "copying (red: below 0)"]
    fraction, _, signed = ((picture := panel.images[0]).cmap(picture.norm(picture.get_array()))
                           for panel in panels)
    red, white, blue = signed[0, :, :3]
    assert red[0] > red[2] + 0.3 and white.min() > 0.95 and blue[2] > blue[0] + 0.3
    assert (fraction[0, :, 2] >= fraction[0, :, 0] - 1e-6).all()
    assert panels[2].images[0].get_clim() == (-1, 1) and panels[0].images[0].get_clim() == (0, 1)
    assert [text.get_text() for text in panels[2].texts] == ["-.80", ".00", ".80"]
