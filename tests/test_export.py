"""What heads.py writes for other programs, read back by pandas, numpy and safetensors, and checked
against the model and against docs/exports.md."""

import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from commands import ROOT, fails
from safetensors import safe_open
from safetensors.numpy import load_file
from test_heads import HEADS, heads

from bench.fooling_models import GALLERY
from bench.hand_built import DATA, probes
from induction.ablation import ablate_each_head
from induction.behaviour import in_context_learning
from induction.examine import (
    Examination,
    HeadScores,
    KeyComposition,
    apart_if_unlike,
    probes_for,
)
from induction.phase import transition
from induction.scores import score_bounds
from induction.verdict import judge
from model.taps import Head, taps
from report.export import as_text, run_as_json, runs_as_json
from report.tidy import COLUMNS, as_csv, tidy_rows
from training.config import Config, TrainConfig
from training.loaded_run import load_run

pandas = pytest.importorskip("pandas")          # as datasets installs it
DOCUMENT = (ROOT / "docs" / "exports.md").read_text()


def strict(text: str) -> Any:
    """JSON as it is defined: without NaN."""
    def refuse(constant: str) -> None:
        raise ValueError(constant)
    return json.loads(text, parse_constant=refuse)


@pytest.fixture(scope="module")
def examined() -> list[Examination]:
    """Two seeds of a circuit that is set by hand, so that every part of the evidence is there."""
    entry = next(entry for entry in GALLERY if entry.name == "honest")
    rows = probes(rows=8)
    probe = rows.scored
    curve = transition(range(8), [0, 0, 0, 0.9, 1, 1, 1, 1])
    examinations = []
    for seed in (0, 1):
        model = entry.build()
        text = rows.periodic.bare.batch             # as good as any
        verdict = judge(f"honest-s{seed}", "honest", False, model, rows, curve, text)
        table = HeadScores(verdict.measured.scores, score_bounds(verdict.measured, probe),
                           ablate_each_head(model, probe.batch, probe.known, probe.resampling))
        config = Config(run=f"honest-s{seed}", seed=seed, model=model.config, data=DATA,
                        train=TrainConfig(batch_tokens=4080))
        examinations.append(Examination(config, 100, 2 ** 16, table, verdict, KeyComposition(
            Head(1, 0), Head(0, 0), 0.5, 2.0)))
    return examinations


# --- JSON -----------------------------------------------------------------------------------------

def leaves(value: Any, name: str = "") -> Iterator[str]:
    """The paths of all values: behaviour.begun.accuracy, mechanism.paths[].rise."""
    if isinstance(value, dict) and set(value) != {"value", "low", "high"}:
        for key, inner in value.items():
            yield from leaves(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for inner in value:
            yield from leaves(inner, f"{name}[]")
    else:
        yield name


def documented() -> dict[str, re.Pattern]:
    """The keys in the tables of docs/exports.md, as patterns of paths."""
    patterns = {}
    for keys, kind in re.findall(r"^\| (`.*?`) \| ([^|]*) \|", DOCUMENT, re.MULTILINE):
        for key in re.findall("`(.*?)`", keys):
            pattern = re.escape(key).replace(r"\*", r"[^.]+(\.\d+)?")
            if kind in ("object", "N", "text", "number"):   # what is null has no parts
                pattern += r"(\..*)?" if kind == "object" else ""
            patterns[key] = re.compile(pattern)
    return patterns


def test_every_key_is_documented_and_every_documented_key_is_there(examined, run):
    given = heads(run, "--text", "the cat sat. the cat sat.", "--json", run / "text.json")
    assert given.returncode == 0, given.stderr
    whole = strict(as_text(runs_as_json(examined)))
    there = {*leaves(whole["runs"][0]), *leaves({"conditions": whole["conditions"]}),
             *leaves(strict((run / "text.json").read_text()))}
    patterns = documented()
    missing = {path for path in there
               if not any(pattern.fullmatch(path) for pattern in patterns.values())}
    stale = {key for key, pattern in patterns.items()
             if key.split(".")[0] in {path.split(".")[0].split("[")[0] for path in there}
             and not any(pattern.fullmatch(path) for path in there)}
    assert not missing and not stale
    assert len(patterns) > 70


def test_a_runs_json_is_what_was_measured(run):
    done = heads(run, "--json", run / "r.json")
    assert done.returncode == 0, done.stderr
    data, opened = strict((run / "r.json").read_text()), load_run(run)
    assert (data["run"], data["seed"], data["step"]) == ("tiny", 1, 12)
    assert list(data["heads"]) == list(data["intervals"]) == HEADS
    table = pandas.DataFrame(data["heads"]).T
    assert table.shape[0] == 8 and table.loc["L1H2", "prefix_matching"] > 0
    for head, scores in data["intervals"].items():
        for name, (low, high) in scores.items():
            assert low - 1e-9 <= data["heads"][head][name] <= high + 1e-9
    # The probe's rows, and with them every number, can be made again from what the file says.
    probe = probes_for(opened).scored
    periodic = [row for row in data["rows"] if row["probe"] == "periodic"]
    assert [row["tokens"] for row in periodic] == probe.tokens.tolist()
    losses = opened.model.losses(*probe.batch).double()
    expected = [losses[n][known].mean().item() for n, known in enumerate(probe.known)]
    assert [row["loss_known"] for row in periodic] == pytest.approx(expected, abs=1e-5)
    second = np.average(expected, weights=probe.known.sum(1))
    assert data["losses"]["second"]["value"] == pytest.approx(second, abs=1e-5)
    bare = [row for row in data["rows"] if row["probe"] == "aperiodic" and not row["begin"]]
    assert len(bare) == data["probes"]["aperiodic"]["rows"] == 64
    text = opened.validation(1024 // 32)
    icl = in_context_learning(opened.model.losses(*text))
    logged = [json.loads(line) for line in (run / "metrics.jsonl").open()][-1]["icl/score"]
    assert logged == pytest.approx(icl.score, abs=1e-5)             # as training measured it
    assert data["transfer"]["icl"]["score"]["value"] == pytest.approx(icl.score, abs=1e-6)
    by_period = pandas.DataFrame(data["by_period"])
    weights = [sum(row["block"] == int(period) for row in periodic) for period in by_period]
    mean = np.average([by_period.loc["L1H2", period]["value"] for period in by_period],
                      weights=[weight * (32 - int(period) - 1)
                               for weight, period in zip(weights, by_period)])
    assert mean == pytest.approx(table.loc["L1H2", "prefix_matching"], abs=1e-6)


def test_conditions_are_over_seeds(examined):
    condition, = strict(as_text(runs_as_json(examined)))["conditions"]
    assert condition["runs"] == ["honest-s0", "honest-s1"] and condition["formed"] == ["yes"] * 2
    accuracy = condition["accuracy"]
    assert accuracy["low"] == accuracy["value"] == accuracy["high"]         # the same model twice
    alone = strict(as_text(runs_as_json(examined[:1])))["conditions"][0]["accuracy"]
    assert alone["value"] == accuracy["value"] and alone["low"] is None
    onset = strict(as_text(run_as_json(examined[0])))["transition"]["onset"]
    assert (onset["low"], onset["high"]) == (2, 3) and 2 < onset["value"] < 3


# --- CSV ------------------------------------------------------------------------------------------

def test_tidy_rows_hold_the_same_numbers(examined, tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text(as_csv(row for examination in examined for row in tidy_rows(examination)))
    table, data = pandas.read_csv(path), strict(as_text(run_as_json(examined[1])))
    assert tuple(table.columns) == COLUMNS and set(table.run) == {"honest-s0", "honest-s1"}
    mine = table[table.seed == 1]
    for head, scores in data["heads"].items():
        rows = mine[mine["head"] == head].set_index("score")
        assert rows.value.to_dict() == pytest.approx(scores)
        for name, interval in data["intervals"][head].items():
            assert rows.loc[name, ["low", "high"]].tolist() == pytest.approx(interval)
    whole = mine[mine["head"].isna()].set_index("score")
    behaviour = data["behaviour"]["bare"]["accuracy"]
    assert whole.loc["behaviour/bare/accuracy", ["value", "low", "high"]].tolist() == (
        pytest.approx(list(behaviour.values())))
    knockout = data["mechanism"]["knockout"]["begun"]["gain_removed"]
    assert whole.loc["knockout/begun/gain_removed"].value == pytest.approx(knockout["value"])
    paths = mine[mine.score == "paths/k"].set_index("head").value.to_dict()
    assert paths == pytest.approx({
        f"{path['sender']}>{path['receiver']}": path["rise"]["value"]
        for path in data["mechanism"]["paths"] if path["into"] == "k"})
    assert not mine.duplicated(["head", "score"]).any()


def test_a_history_has_every_measured_step(run):
    done = heads(run, "--all-steps", "--csv", run / "r.csv")
    assert done.returncode == 0, done.stderr
    table = pandas.read_csv(run / "r.csv")
    scores = table[table.score == "prefix_matching"]
    assert scores.groupby("step").size().to_dict() == {4: 8, 8: 8, 12: 8}
    assert scores[scores.step < 12].low.isna().all() and scores[scores.step == 12].low.notna().all()
    record = next(record for record in map(json.loads, (run / "metrics.jsonl").open())
                  if record["step"] == 8)
    early = scores[scores.step == 8].set_index("head").value.to_dict()
    assert early == {head: record[f"heads/prefix_matching/{head}"] for head in HEADS}


# --- activations ----------------------------------------------------------------------------------

def test_exported_activations_are_those_of_the_model(run):
    """Read by numpy: the pattern is the softmax of q and k, z is the pattern's mean of v, and the
    losses are the model's."""
    done = heads(run, "--export", run / "a.safetensors", "--heads", "L1H2,L0")
    assert done.returncode == 0 and "a.safetensors" in done.stdout, done.stderr
    acts, opened = load_file(run / "a.safetensors"), load_run(run)
    with safe_open(run / "a.safetensors", "np") as file:
        assert file.metadata()["run"] == "tiny" and file.metadata()["step"] == "12"
    chosen = ["L1H2", *(f"L0H{index}" for index in range(4))]
    parts = ("q", "k", "v", "z", "lse", "pattern")
    assert set(acts) == {"tokens", "real", "loss",
                         *(f"{head}.{part}" for head in chosen for part in parts)}
    tokens = probes_for(opened).scored.tokens
    assert np.array_equal(acts["tokens"], tokens) and acts["real"].all()
    assert np.allclose(acts["loss"], opened.model.losses(tokens[:, :-1], tokens[:, 1:]),
                       atol=1e-5)
    future = np.triu(np.ones((32, 32), bool), 1)
    for head in chosen:
        q, k, v, z, lse, pattern = (acts[f"{head}.{part}"].astype(np.float64) for part in parts)
        assert q.shape == (64, 32, 8) and pattern.shape == (64, 32, 32)
        scores = np.where(future, -np.inf, q @ k.transpose(0, 2, 1) / 8 ** 0.5)
        assert np.allclose(np.log(np.exp(scores).sum(-1)), lse, atol=1e-5)
        assert np.allclose(np.exp(scores - lse[..., None]), pattern, atol=1e-5)
        assert np.allclose(pattern @ v, z, atol=1e-5)
    with taps(opened.model, "L1.pattern") as expected, torch.no_grad():
        opened.model.hidden(tokens)
    assert np.allclose(acts["L1H2.pattern"], expected["L1.pattern"][:, 2], atol=1e-5)


def test_the_users_own_rows_are_exported_with_their_padding(run):
    (run / "ids.txt").write_text("1 2 3 1 2 3\n4 5 4\n")
    done = heads(run, "--tokens", run / "ids.txt", "--export", run / "a.safetensors", "--csv",
                 run / "t.csv")
    assert done.returncode == 0, done.stderr
    acts, table = load_file(run / "a.safetensors"), pandas.read_csv(run / "t.csv")
    assert acts["tokens"].tolist() == [[1, 2, 3, 1, 2, 3], [4, 5, 4, 0, 0, 0]]
    assert acts["real"].sum(1).tolist() == [6, 3] and "L1H3.q" in acts
    assert np.isnan(acts["loss"]).tolist() == [[False] * 5, [False] * 2 + [True] * 3]
    assert set(table["head"]) == set(HEADS) and "prefix_matching_visible" in set(table.score)


def test_mistakes_of_an_export_are_said_before_the_work(run):
    for wrong, named in ((("--export", run / "a", "--heads", "L2H0"), "--heads L2H0"),
                         (("--export", run / "a", "--heads", "L0,first"), "--heads first"),
                         (("--export", run / "a", "--heads", ""), "L0H0 to L1H3"),
                         (("--heads", "L0"), "--export"),
                         (("--csv", run / "no" / "such.csv"), "--csv"),
                         (("--csv", run / "a", "--json", run / "a"), "the same file")):
        done = heads(run, *wrong)
        fails(done, named)
        assert not done.stdout
    fails(heads("verdict", run, run / "checkpoints" / "000012"), "named twice", "once")
    missing = heads("verdict", run, run.parent / "no")
    fails(missing, "no such run")
    assert not missing.stdout


def test_runs_that_are_no_seeds_of_each_other_form_no_condition(examined):
    other = examined[1]._replace(config=examined[1].config.model_copy(update={
        "train": TrainConfig(batch_tokens=4080, steps=7)}))
    conditions = runs_as_json(apart_if_unlike([examined[0], other]))["conditions"]
    assert [condition["condition"] for condition in conditions] == ["honest-s0", "honest-s1"]
    early = examined[1]._replace(step=50)
    assert len(runs_as_json(apart_if_unlike([examined[0], early]))["conditions"]) == 2
    assert apart_if_unlike(examined) == examined
