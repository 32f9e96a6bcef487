"""The benches run, on shapes so small that nothing is measured."""

import json
from pathlib import Path

import pytest
from commands import ROOT, command
from PIL import Image

from bench.study import spread


def test_time_to_loss(workplace):
    (workplace / "text.txt").write_bytes((ROOT / "README.md").read_bytes() * 8)
    done = command("-m bench.time_to_loss", "train.steps=4", "--text", "text.txt", "--steps", "3", "--seeds", "1", "--threads", "1",
                   cwd=workplace, env={"BENCH_RESULTS": str(workplace / "results")})
    assert done.returncode == 0, done.stderr
    result = json.loads((workplace / "results" / "time_to_loss.json").read_text())
    assert result["runs"][0]["plain"]["tokens"] == 3 * 768 and result["runs"][0]["ours"][0]["loss"] > 0


@pytest.mark.long
def test_train(workplace):
    done = command("-m bench.train", "--eager", "--rounds", "1", "--shape", "0", cwd=workplace,
                   env={"BENCH_RESULTS": str(workplace / "results")})
    assert done.returncode == 0, done.stderr
    row = json.loads((workplace / "results" / "train.json").read_text())["rows"][0]
    ours, matrices = row["arms"]["ours, AdamW"], 4 * 12 * 128 ** 2 + 257 * 128
    assert row["flops"] == pytest.approx(6 * 768 * matrices, rel=0.05)      # attention besides
    assert row["products_ms"] > 0 and ours["passes_ms"] > 0 and ours["of_matrix_rate"] > 0      # how they compare, the machine decides


@pytest.mark.long
def test_sampling(workplace):
    done = command("-m bench.sampling", "--eager", "--shape", "small", "--tokens", "2", "--rounds", "1", "--contexts", "16",
                   "--batches", "1", "3", "--prompts", "5", cwd=workplace,
                   env={"BENCH_RESULTS": str(workplace / "results")})
    assert done.returncode == 0, done.stderr
    result = json.loads((workplace / "results" / "sampling.json").read_text())
    assert [row["batch"] for row in result["rows"]] == [1, 3] and result["rows"][1]["sides"]["static"]["prefill_ms"] > 0
    assert result["many"][0]["tokens"] > 5 * 8


def test_growth(workplace):
    done = command("-m bench.growth", "--sweep", "context", "--most", "256", "--rounds", "1", "--figure", "g.png", cwd=workplace,
                   env={"BENCH_RESULTS": str(workplace / "results")})
    assert done.returncode == 0, done.stderr
    result = json.loads((workplace / "results" / "growth.json").read_text())
    assert result["points"]["context"]["256"]["reference"]["ms"] > 0 and result["statistics"]["256"]["ms"] > 0
    assert Image.open(workplace / "g.png").height > 300


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="bench.prepare reads memory from Linux's /proc")
def test_prepare(workplace):
    done = command("-m bench.prepare", "--copies", "1", "--rounds", "1", "--files", "9", "--vocab-size", "300", cwd=workplace,
                   env={"BENCH_RESULTS": str(workplace / "results")})
    assert done.returncode == 0, done.stderr
    row = json.loads((workplace / "results" / "prepare.json").read_text())["rows"][0]
    assert row["ours"]["tokens"] == pytest.approx(row["datasets"]["tokens"], rel=0.02) and row["ours"]["mb"] > 1


def test_attention(workplace):
    done = command("-m bench.attention", "--rounds", "1", "--contexts", "16", cwd=workplace,
                   env={"BENCH_RESULTS": str(workplace / "results")})
    assert done.returncode == 0, done.stderr
    result = json.loads((workplace / "results" / "attention.json").read_text())
    assert {row["pass"] for row in result["rows"]} == {"forward", "backward", "both"} and result["dry_run"] and "dry run" in done.stdout


def test_attention_tiles(workplace):
    done = command("-m bench.attention", "--tune", cwd=workplace, env={"BENCH_RESULTS": str(workplace / "results")})
    assert done.returncode == 0, done.stderr
    assert len(json.loads((workplace / "results" / "attention_tiles.json").read_text())["tiles"]) == 8


def test_probe_overhead(workplace):
    done = command("-m bench.probe_overhead", "tiny.yaml", "heads.every=2", "--rounds", "2", cwd=workplace,
                   env={"BENCH_RESULTS": str(workplace / "results")})
    assert done.returncode == 0, done.stderr
    result = json.loads((workplace / "results" / "probe_overhead.json").read_text())
    assert result["share"] > 0 and len(result["milliseconds"]["look"]) == 2


def test_a_studys_cell_is_the_median_and_the_range():
    assert spread(["0.02", "0.25", "0.02"]) == "0.02 (0.02 … 0.25)"
    assert spread(["+9.00", "-1.5", "10.5", None]) == "+9.00 (-1.5 … 10.5, 3 of 4)"
    assert spread(["101%", "101%"]) == "101%" and spread([None, None]) == ""


@pytest.mark.long
def test_a_study(workplace):
    """One seed each of a study's arms, for three steps: trained, weighed, and a second call trains nothing again."""
    (workplace / "study.py").write_text("""
import sys
sys.argv = ["study", "toy", "--seeds", "1", "--at-once", "1"]
from bench import study
study.STUDIES["toy"] = (2, [study.Arm(name, name, ("train.steps=3", "heads.every=1")) for name in ("toy_2l", "toy_1l_smear")])
study.main()
""")
    for trained in (2, 0):
        done = command(str(workplace / "study.py"))
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(" left") == trained and "| `toy_1l_smear` | 0 of 1 |" in done.stdout, done.stdout
