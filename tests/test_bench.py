"""The benches run, on shapes so small that nothing is measured."""

import json

from conftest import ROOT, command


def test_time_to_loss(workplace):
    (workplace / "text.txt").write_bytes((ROOT / "README.md").read_bytes() * 8)
    done = command("-m bench.time_to_loss", "train.steps=4", "--text", "text.txt", "--steps", "3", "--seeds", "1", "--threads", "1",
                   cwd=workplace, env={"BENCH_RESULTS": str(workplace / "results")})
    assert done.returncode == 0, done.stderr
    result = json.loads((workplace / "results" / "time_to_loss.json").read_text())
    assert result["runs"][0]["plain"]["tokens"] == 3 * 768 and result["runs"][0]["ours"][0]["loss"] > 0


def test_sampling(workplace):
    done = command("-m bench.sampling", "--shape", "small", "--tokens", "2", "--rounds", "1", "--contexts", "16", cwd=workplace,
                   env={"BENCH_RESULTS": str(workplace / "results")})
    assert done.returncode == 0, done.stderr
    assert json.loads((workplace / "results" / "sampling.json").read_text())["rows"][0]["prefill_ms"] > 0


def test_attention(workplace):
    done = command("-m bench.attention", "--rounds", "1", "--contexts", "32", cwd=workplace,
                   env={"BENCH_RESULTS": str(workplace / "results")})
    assert done.returncode == 0, done.stderr
    result = json.loads((workplace / "results" / "attention.json").read_text())
    assert {row["pass"] for row in result["rows"]} == {"forward", "backward", "both"} and result["dry_run"] and "dry run" in done.stdout


def test_attention_tiles(workplace):
    done = command("-m bench.attention", "--tune", cwd=workplace, env={"BENCH_RESULTS": str(workplace / "results")})
    assert done.returncode == 0, done.stderr
    assert len(json.loads((workplace / "results" / "attention_tiles.json").read_text())["tiles"]) == 16


def test_probe_overhead(workplace):
    done = command("-m bench.probe_overhead", "tiny.yaml", "heads.every=2", "--rounds", "2", cwd=workplace,
                   env={"BENCH_RESULTS": str(workplace / "results")})
    assert done.returncode == 0, done.stderr
    result = json.loads((workplace / "results" / "probe_overhead.json").read_text())
    assert result["share"] > 0 and len(result["milliseconds"]["look"]) == 2
