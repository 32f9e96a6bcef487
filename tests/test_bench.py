"""The benches run, on shapes so small that nothing is measured."""

import json
from pathlib import Path

import pytest
from commands import ROOT, command, wait_until
from PIL import Image

from bench import gpu
from bench.gpu_page import page
from bench.study import spread

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


def test_time_to_loss(workplace):
    (workplace / "text.txt").write_bytes((ROOT / "README.md").read_bytes() * 8)
    done = command("-m bench.time_to_loss", "train.steps=4", "--text", "text.txt", "--steps", "3", "--seeds", "1", "--threads", "1",
                   cwd=workplace, env={"BENCH_RESULTS": str(workplace / "results")})
    assert done.returncode == 0, done.stderr
    result = json.loads((workplace / "results" / "time_to_loss.json").read_text())
    assert result["runs"][0]["plain"]["tokens"] == 3 * 768 and result["runs"][0]["ours"][0]["loss"] > 0


@pytest.fixture(scope="session")
def dry_run(made_once) -> Path:
    """What `make gpu` leaves where there is no GPU: each of its measurements has run on tiny shapes."""
    def run(folder: Path) -> None:
        (folder / "gpu").mkdir()
        (folder / "gpu" / "probe_overhead.json").write_text("{}")           # of an earlier run
        done = command("-m bench.gpu", "--dry-run", "--out", folder / "gpu", cwd=folder, env=NO_GPU)
        assert done.returncode == 0, done.stdout + done.stderr
        (folder / "said").write_text(done.stdout)

    return made_once("gpu", run) / "gpu"


@pytest.mark.long
def test_the_gpu_command(dry_run):
    """Every step has ended well, the page has its tables, and says that it is none."""
    steps = {row["name"]: row["code"] for row in json.loads((dry_run / "steps.json").read_text())}
    assert steps == {"attention_tiles": 0, "attention": 0, "train": 0, "sampling": 0}
    page = (dry_run / "page.md").read_text()
    for heading in ("Steps", "Attention", "Tiles", "A training step", "Sampling"):
        table = page.partition(f"## {heading}\n")[2].partition("## ")[0]
        assert table.count("|") > 20, heading
    assert "What watching heads costs" not in page
    assert "no time here means anything" in page and "exit code 0" in (dry_run.parent / "said").read_text()


def test_the_gpu_command_says_what_it_would_do(tmp_path):
    """And a step whose packages are missing is left out, one that takes too long is stopped, and what they said is there."""
    done = command("-m bench.gpu", cwd=tmp_path, env=NO_GPU)
    assert done.returncode == 0 and "bench.attention --tune" in done.stdout and "nothing has been run" in done.stdout
    steps = sum(step.seconds for step in gpu.ALONE) + max(step.seconds for step in gpu.TOGETHER)
    assert steps < gpu.SECONDS
    (tmp_path / "logs").mkdir()
    words = "-c \"print('so far', flush=True); import time; time.sleep(600)\""
    slow = gpu.Running(gpu.Step("slow", 10, ""), words, tmp_path, tmp_path, 100)
    wait_until(slow.has_ended)
    assert slow.row()["code"] == 124 and slow.row()["said"] == "so far" and slow.process.poll() is not None
    assert not gpu.importable("no_such_module", tmp_path) and gpu.importable("torch", tmp_path)


def test_the_page_of_a_step_that_was_cut_short(dry_run, tmp_path):
    figures = json.loads((dry_run / "attention.json").read_text())
    cut = {name: figures[name] for name in figures if name not in ("windows", "decode", "statistics")}
    (tmp_path / "attention.json").write_text(json.dumps(cut | {"rows": cut["rows"][:1]}))
    assert "TFLOP/s" in page(tmp_path) and "Statistics" not in page(tmp_path)
    assert "nothing has been measured" in page(tmp_path / "empty")
    (tmp_path / "train.json").write_text("{")
    (tmp_path / "sampling.json").write_text('{"rows": [{}]}')
    assert "train.json could not be read" in page(tmp_path) and "sampling.json has no" in page(tmp_path) and "TFLOP/s" in page(tmp_path)


@pytest.mark.long
def test_train(dry_run):
    row = json.loads((dry_run / "train.json").read_text())["rows"][0]
    ours, matrices = row["arms"]["ours, AdamW"], 4 * 12 * 128 ** 2 + 257 * 128
    assert row["flops"] == pytest.approx(6 * 768 * matrices, rel=0.05)      # attention besides
    assert row["products_ms"] > 0 and ours["passes_ms"] > 0 and ours["of_matrix_rate"] > 0      # how they compare, the machine decides


@pytest.mark.long
def test_sampling(dry_run):
    result = json.loads((dry_run / "sampling.json").read_text())
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


@pytest.mark.long
def test_attention(dry_run):
    result = json.loads((dry_run / "attention.json").read_text())
    assert {row["pass"] for row in result["rows"]} == {"forward", "backward", "both"} and result["dry_run"]
    assert all(row["call_ms"]["flash"] > 0 for row in result["rows"]) and result["host_us"]["ours, backward"] > 0
    assert result["decode"][0]["ms"].keys() == {"ours", "flash", "ours, ragged"}
    assert len(json.loads((dry_run / "attention_tiles.json").read_text())["tiles"]) == 8


def test_probe_overhead(workplace):
    done = command("-m bench.probe_overhead", "tiny.yaml", "heads.every=2", "--rounds", "2", cwd=workplace,
                   env={"BENCH_RESULTS": str(workplace / "results")})
    assert done.returncode == 0, done.stderr
    result = json.loads((workplace / "results" / "probe_overhead.json").read_text())
    assert result["share"] > 0 and len(result["milliseconds"]["look"]) == 2


def test_host_time(workplace):
    done = command("-m bench.host_time", "--calls", "3", cwd=workplace,
                   env={"BENCH_RESULTS": str(workplace / "results"), "TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr
    found = json.loads((workplace / "results" / "host_time.json").read_text())["us"]
    assert len(found) == 4 and all(0 < us < 1e5 for us in found.values())       # no compiling is among it


def test_a_studys_cell_is_the_median_and_the_range():
    assert spread(["0.02", "0.25", "0.02"]) == "0.02 (0.02 … 0.25)"
    assert spread(["+9.00", "-1.5", "10.5", None]) == "+9.00 (-1.5 … 10.5, 3 of 4)"
    assert spread(["101%", "101%"]) == "101%" and spread([None, None]) == ""


@pytest.mark.long
def test_a_study(workplace):
    """One seed each of a study's conditions, for three steps: trained, judged, and a second call
    trains nothing again."""
    (workplace / "study.py").write_text("""
import sys
sys.argv = ["study", "toy", "--seeds", "1", "--at-once", "1"]
from bench import study
changes = ("train.steps=3", "heads.every=1")
study.STUDIES["toy"] = study.Study(2, [study.Condition(name, name, changes)
                                       for name in ("toy_2l", "toy_1l_smear")])
study.main()
""")
    for trained in (2, 0):
        done = command(str(workplace / "study.py"))
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(" left") == trained and "| `toy_1l_smear` | 0 of 1 |" in done.stdout, done.stdout


@pytest.mark.long
def test_kernels_compiled_beforehand_are_found_elsewhere(tmp_path):
    """The folder is filled, moved, and used: nothing is compiled again."""
    script = tmp_path / "script.py"
    script.write_text("""
import os, sys
from pathlib import Path
folder = Path(sys.argv[1])
os.environ |= {"TRITON_CACHE_DIR": str(folder / "triton"), "TRITON_STORE_BINARY_ONLY": "1"}
from triton import knobs
from bench import gpu
gpu.unpack(folder)
compiled = []
knobs.compilation.listener = lambda cache_hit, **_: compiled.append(not cache_hit)
calls = gpu.compile_share(3, 60, "sm_90")
print(calls, len(compiled), sum(compiled))
""")
    told = []
    for folder in (tmp_path / "here", tmp_path / "there"):
        done = command(str(script), folder, env={"TRITON_INTERPRET": "0"})
        assert done.returncode == 0, done.stderr
        told.append([int(number) for number in done.stdout.split()])
        if folder.name == "here":
            folder.rename(tmp_path / "there")
    (calls, kernels, compiled), (_, again, missing) = told
    assert 0 < calls <= kernels and compiled > 3 and again == kernels and missing == 0
