"""`python heads.py` on real runs: its numbers, its files, its verdict, its error messages."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ROOT, command, fails
from PIL import Image
from test_scores import dense_scores

from induction.ablation import Effect, losses_without
from induction.ablation import Path as AblatedPath
from induction.examine import HeadScores, probes_for
from induction.knockout import Knockout, KnockoutPair
from induction.mechanism import HeadRole, PreviousTokenHeads
from induction.phase import Transition
from induction.scores import SCORES
from model.taps import Head, heads_of, taps
from report.text import (
    describe_ablation,
    describe_knockout,
    describe_previous_token,
    describe_roles,
    head_table,
    heads_summary,
    strongest_paths,
)
from report.verdict_page import path_table
from training.loaded_run import load_run

HEADS = [f"L{layer}H{head}" for layer in range(2) for head in range(4)]


def heads(*arguments, cwd: Path | None = None):
    return command("heads.py", *arguments, cwd=cwd)


def test_the_readme_command(run):
    """A table, a page, figures, a movie."""
    done = heads("runs/tiny", "--movie", "--json", "scores.json", cwd=run.parent.parent)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    table = [line.split() for line in lines if line[:1] == "L"]
    assert [row[0] for row in table] == HEADS
    for word in ("prefix", "alone", "loss on random tokens: ", "aperiodic probe", "report.html",
                 "figures/formation.png", "heads.gif"):
        assert word in done.stdout, word
    for name in ("formation", "scores", "offsets"):
        picture = np.asarray(Image.open(run / "figures" / f"{name}.png").convert("L"))
        drawing = (run / "figures" / f"{name}.svg").read_text()
        assert picture.std() > 10 and drawing.startswith("<?xml")
    movie = Image.open(run / "heads.gif")
    assert movie.n_frames >= 2 and movie.width > 400
    scores = json.loads((run.parent.parent / "scores.json").read_text())["heads"]
    assert list(scores) == HEADS
    row = table[HEADS.index("L1H2")]
    assert float(row[1]) == pytest.approx(scores["L1H2"]["prefix_matching"], abs=1e-3)
    assert float(row[-1]) == pytest.approx(scores["L1H2"]["alone"], abs=0.001)
    page = (run / "report.html").read_text()
    assert "L1H3" in page and '"causal"' in page


def test_alone_is_the_loss_without_that_head(run):
    assert heads("runs/tiny", "--json", "s.json", cwd=run.parent.parent).returncode == 0
    scores = json.loads((run.parent.parent / "s.json").read_text())["heads"]
    opened = load_run(run)
    probe = probes_for(opened).scored
    intact = losses_without(opened.model, probe.batch, [])[probe.known].mean().item()
    for head in heads_of(opened.model.config):
        without = losses_without(opened.model, probe.batch, [head], "mean")
        rise = without[probe.known].mean().item() - intact
        assert scores[str(head)]["alone"] == pytest.approx(rise, abs=1e-5)


def test_sentences_say_what_was_measured():
    """Numbers that nobody has to compute."""
    two, one = [Head(1, 3), Head(1, 0)], [Head(0, 2)]
    effect = Effect(2.104, 0.25, 0.938)
    assert describe_ablation(effect) == (
        "raises the loss of known tokens by 2.10 nats and changes that of the first copy by +0.25: "
        "94% of the repeat gain")
    nothing = describe_ablation(effect._replace(known=-0.5, gain_removed=None))
    assert "lowers the loss of known tokens by 0.50 nats" in nothing and "%" not in nothing
    begun = Knockout(two, 6.0, 0.97, 0.02, 0.9, 6.5)
    bare = Knockout(two, 6.0, 0.8, -0.001, 0.7, 6.5)
    nothing = Knockout(two, 0.0, None, None, None, -0.001)
    assert describe_knockout(KnockoutPair(begun, bare)) == (
        "removing them removes 97% of the repeat gain behind the begin token, 80% of it without "
        "that token; as many random edges remove 2% of the repeat gain behind the begin token, 0% "
        "of it without that token; reading other tokens over them removes 90% of the repeat gain "
        "behind the begin token, 70% of it without that token")
    one_kind = describe_knockout(KnockoutPair(begun, nothing))
    assert "97% of the repeat gain behind the begin token; as many" in one_kind
    nowhere = describe_knockout(KnockoutPair(nothing, nothing))
    assert "%" not in nowhere and "+0.00 and +0.00 nats" in nowhere
    roles = [HeadRole(two[0], 0.94, 0.31, 0.8, 2.0), HeadRole(two[1], 0.5, -0.4, -0.9, -0.3),
             HeadRole(one[0], 0.2, 0.02, 0.5, 0.0), HeadRole(one[0], 0.2, 0.4, -0.5, 0.0)]
    assert describe_roles(roles) == (
        "L1H3 0.94 (copies), L1H0 0.50 (suppresses), L0H2 0.20 (copies or suppresses nothing), "
        "L0H2 0.20 (copies or suppresses nothing)")
    previous = PreviousTokenHeads(one, 6.0, -0.02, {"q": 0.25, "k": 6.2, "v": -0.125})
    sentence = describe_previous_token(previous)
    assert "L0H2" in sentence and "raises the loss of known tokens by 6.00 nats" in sentence
    assert "fixed: -0.02" in sentence and "keys: +6.20" in sentence and "queries: +0.25" in sentence
    paths = [AblatedPath(one[0], two[0], "k", 2.0), AblatedPath(one[0], two[1], "q", 3.0),
             AblatedPath(one[0], two[0], "v", 0.05), AblatedPath(one[0], two[1], "v", -1.0)]
    assert strongest_paths(paths) == "L0H2 → queries of L1H0 +3.00, L0H2 → keys of L1H3 +2.00"
    table = path_table(paths)
    assert table[2:5] == ["| from | into L1H3 | into L1H0 |", "|---|---|---|",
                          "| L0H2 | – / +2.00 / +0.05 | +3.00 / – / -1.00 |"]
    record = {"heads/prefix_matching/L0H0": 0.1, "heads/prefix_matching/L1H3": 0.95,
              "heads/previous_token/L0H0": 1.0, "aperiodic/accuracy": 0.914,
              "aperiodic/accuracy_without_begin": 0.332}
    line = heads_summary(record)
    assert line.startswith("L1H3 ") and "0.95" in line and "91%" in line and "33%" in line
    assert heads_summary({"val/loss": 2.0}) is None


def test_the_table_has_a_row_per_head_and_explains_its_columns():
    scores = {"prefix_matching": torch.tensor([[0.25, 0.5]]),
              "of_our_own": torch.tensor([[1.0, 2.0]])}
    table = HeadScores(scores, {}, {Head(0, 0): 0.125, Head(0, 1): -1.5})
    formed = {Head(0, 1): Transition(2e6, 3e6, 0.5, {}, 0.5, 3e6, None)}
    lines = head_table(table, "the given text", formed).split("\n")
    assert [line.split() for line in lines[:3]] == [
        ["head", "prefix", "of_our_own", "alone", "formed"], ["L0H0", "0.250", "1.000", "+0.125"],
        ["L0H1", "0.500", "2.000", "-1.500", "2.00", "M"]]
    assert len(lines[0]) == len(lines[2])                       # columns are aligned
    faded = {Head(0, 1): Transition(2e6, 3e6, 0.1, {}, 0.5, 3e6, faded=4e6)}
    row = head_table(table, "the given text", faded).split("\n")[2]
    assert row == lines[2] + ", faded at 4.00 M"
    explained = "\n".join(lines[3:])
    assert "loss on the given text" in explained and "copying" not in explained


def test_the_table_explains_every_score():
    scores = {name: torch.zeros(1, 1) for name in (*SCORES, "copying_eigenvalues")}
    table = HeadScores(scores, {}, {Head(0, 0): 0.0})
    table, legend = head_table(table, "the text", {}).split("\n\n")
    columns = table.split("\n")[0].split()[1:]
    explained = [line.split()[0] for line in legend.split("\n") if line[0] != " "]
    assert columns == explained and len(columns) == len(SCORES) + 2
    assert all(len(line) <= 100 for line in legend.split("\n"))


def test_given_tokens_are_taken_as_they_are(run):
    """Rows of different lengths, averaged over all their queries with an earlier key; checked on
    dense patterns, row by row."""
    draw = np.random.default_rng(0)
    rows = [draw.integers(0, 12, size=n).tolist() for n in (32, 7, 2, 20)]
    lines = [" ".join(map(str, rows[0])), ",".join(map(str, rows[1])), str(rows[2]), "",
             " ".join(map(str, rows[3]))]
    (run / "ids.txt").write_text("\n".join(lines))
    done = heads(run, "--tokens", run / "ids.txt", "--json", run / "s.json")
    assert done.returncode == 0, done.stderr
    scores, model = json.loads((run / "s.json").read_text())["heads"], load_run(run).model
    total, count = {}, 0
    seeing, uniform = 0, 0.0                # queries with an earlier copy, uniform attention there
    for row in rows:
        for i in range(1, len(row)):
            copies = row[:i].count(row[i])
            seeing, uniform = seeing + (copies > 0), uniform + copies / (i + 1)
        tokens = torch.tensor([row])
        queries = torch.ones(1, len(row), dtype=torch.bool)
        queries[:, 0] = False
        with taps(model, "L*.pattern") as cache, torch.no_grad():
            model.hidden(tokens)
        for layer in range(2):
            dense = dense_scores(cache[f"L{layer}.pattern"], tokens, queries, None)
            for name, values in dense.items():
                total[layer, name] = total.get((layer, name), 0) + values * (len(row) - 1)
        count += len(row) - 1
    for layer, head in heads_of(model.config):
        for name in ("prefix_matching", "current_token", "previous_token", "duplicate_token",
                     "first_token", "entropy", "distance"):
            expected = total[layer, name][head].item() / count
            assert scores[f"L{layer}H{head}"][name] == pytest.approx(expected, abs=1e-4), name
        visible = total[layer, "prefix_matching"][head].item() / seeing
        assert scores[f"L{layer}H{head}"]["prefix_matching_visible"] == pytest.approx(
            visible, abs=1e-4)
    said = " ".join(done.stdout.split())
    assert f"{seeing / count:.0%} of the queries see a token" in said
    assert f"uniform attention puts {uniform / seeing:.3f} on such tokens" in said


def test_text_and_files_are_shown_token_by_token(run):
    text = "def f(x):\n    return f(x) + '</script><script>alert(1)</script>'\n"
    assert heads(run, "--text", text).returncode == 0
    page = (run / "report-text.html").read_text()
    assert "the given text" in page and "<script>alert(1)" not in page
    (run / "f.py").write_text(text * 20)
    done = heads(run, "--file", run / "f.py", "--all-steps")
    assert done.returncode == 0 and "the given text" in done.stdout, done.stderr
    # Beside the run's own page and figures, not in their place.
    done = heads(run, "--step", "8")
    assert done.returncode == 0 and "figures-step-8/scores.png" in done.stdout, done.stderr
    assert (run / "report-step-8.html").exists() and not (run / "figures").exists()
    assert not (run / "report-all-steps.html").exists()


def test_a_run_that_was_never_looked_at_and_a_checkpoint_outside_a_run(trained, workplace):
    assert command("train.py", "tiny.yaml", "run=unseen", "heads.every=0").returncode == 0
    done = heads("runs/unseen")
    assert done.returncode == 0 and "formation" not in done.stdout, done.stderr
    assert Path("runs/unseen/report.html").exists()
    done = heads("runs/unseen", "--all-steps")              # measures the two kept checkpoints
    assert done.returncode == 0 and "formation" in done.stdout, done.stderr
    assert '"tokens": [2048.0, 3072.0]' in Path("runs/unseen/report-all-steps.html").read_text()
    shutil.copytree(trained / "checkpoints" / "000012", "mine")
    done = heads("mine")
    assert done.returncode == 0 and "at step 12" in done.stdout, done.stderr
    assert Path("mine/report.html").exists()
    done = heads("verdict", "mine")
    assert done.returncode == 0 and "## mine: no" in done.stdout, done.stderr
    early = heads("verdict", trained / "checkpoints" / "000008").stdout
    assert "## tiny (at step 8 of 12): no" in early


def test_tokens_beyond_the_tokenizer_are_looked_at(workplace):
    """A vocabulary larger than the tokenizer's, and a context too short for any probe."""
    done = command("train.py", "tiny.yaml", "model.vocab_size=320", "model.n_ctx=4",
                   "train.batch_tokens=64")
    assert done.returncode == 0, done.stderr
    Path("ids.txt").write_text("310 5 310 5")
    done = heads("runs/tiny", "--tokens", "ids.txt")
    assert done.returncode == 0, done.stderr
    page = Path("runs/tiny/report-text.html").read_text()
    assert "<310>" in page.replace("\\u003c", "<")
    fails(heads("runs/tiny"), "too short")


def test_mistakes_are_two_lines(run):
    (run / "ids.txt").write_text("1 2 3\n4 x 5\n")
    fails(heads(run, "--tokens", run / "ids.txt"), "line 2", "not a list of token ids")
    (run / "ids.txt").write_text("1 2 3000\n")
    fails(heads(run, "--tokens", run / "ids.txt"), "line 1", "no token 3000")
    (run / "ids.txt").write_text(" ".join(["1"] * 33))
    fails(heads(run, "--tokens", run / "ids.txt"), "33 tokens", "context of 32")
    fails(heads(run, "--step", "7"), "no checkpoint of step 7", "8, 12")
    fails(heads(run, "--text", "a", "--file", "b"), "exclude each other")
    fails(heads(run, "--text", "x"), "--text x: at most one token", "needs two")
    (run / "odd.bin").write_bytes(bytes(100))
    fails(heads(run, "--file", run / "odd.bin"), "odd.bin: is not a text file")
    late = heads(run, "--json", run / "no" / "such" / "folder.json")
    fails(late, "--json")
    assert not late.stdout                                       # said before the work
    fails(heads("verdict", run, "--out", run), "--out", "cannot be written")
    fails(heads(run.parent / "other"), "no such run")
    fails(heads("verdict", run.parent / "other"), "no such run")
    shutil.rmtree(run / "heads")
    late = heads(run, "--movie")
    fails(late, "no snapshots")
    assert not late.stdout


@pytest.fixture(scope="module")
def studied(tmp_path_factory) -> Path:
    """Short real runs: two layers, whose heads just form; their one-layer control, as long; smeared
    keys; the trap. With fewer distinct tokens than in configs/, all behind the begin token, heads
    form in a third of the time."""
    folder = tmp_path_factory.mktemp("studied")
    for name, steps in (("toy_2l", 800), ("toy_1l", 800), ("toy_1l_smear", 300),
                        ("toy_fixed_period", 300)):
        done = command("train.py", ROOT / f"configs/induction/{name}.yaml", f"train.steps={steps}",
                       "train.batch_tokens=1024", "data.repeats.n_tokens=64",
                       "data.begin_fraction=null", "eval.tokens=1024", "log.wandb=disabled",
                       cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.long
def test_the_verdict(studied):
    """Yes if heads formed and the model needs them; no for the trap, though it looks perfect on its
    own period; no for one layer."""
    names = ("toy_2l", "toy_1l_smear", "toy_fixed_period", "toy_1l")
    done = heads("verdict", *(f"runs/{name}" for name in names), "--out", "verdict.md",
                 cwd=studied)
    assert done.returncode == 0, done.stderr
    page = (studied / "verdict.md").read_text()
    assert page.strip() == done.stdout.strip()
    assert "## toy_2l: yes" in page and "## toy_1l_smear: yes" in page
    assert "## toy_fixed_period: no" in page and "## toy_1l: no" in page
    trap = page[page.index("## toy_fixed_period"):page.index("## toy_1l: no")]
    trained = trap.split("on trained periods: ")[1].split("%")[0]
    assert float(trained) > 80                          # looks like induction on its own period
    assert "One-layer control: at most" in page and "as expected" in page
    assert "One-layer runs that are not controls" in page
    assert "meet a probe): toy_1l_smear, toy_fixed_period." in page
    first = sorted((studied / "runs/toy_1l/checkpoints").glob("0*"))[0]
    early = heads("verdict", first, cwd=studied).stdout
    assert "of 800): no" in early and "No one-layer control" in early
    assert "(unfinished, or" in early
    smear = page[page.index("## toy_1l_smear"):page.index("## toy_fixed_period")]
    assert "Prefix matching rose between" in smear
