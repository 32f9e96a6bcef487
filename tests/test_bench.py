"""The benches run, on shapes so small that their times mean nothing."""

import json
import time
from pathlib import Path

import pytest
import yaml
from commands import ROOT, command, succeeds, wait_until
from conftest import TINY
from PIL import Image

from bench import gpu, turn
from bench.gpu_page import page
from bench.study_tables import spread

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


def results_of(name: str, *arguments: object, **env: str) -> dict:
    """Run a bench in the workplace: the JSON that it wrote."""
    succeeds(command(f"-m bench.{name}", *arguments, env={"BENCH_RESULTS": "results", **env}))
    return json.loads(Path("results", f"{name}.json").read_text())


def test_time_to_loss(workplace):
    (workplace / "text.txt").write_bytes((ROOT / "README.md").read_bytes() * 8)
    result = results_of("time_to_loss", "train.steps=4", "--text", "text.txt", "--steps", "3",
                        "--seeds", "1", "--threads", "1")
    run = result["runs"][0]
    assert run["plain"]["tokens"] == 3 * 768 and run["ours"][0]["loss"] > 0


@pytest.fixture(scope="session")
def dry_run(made_once) -> Path:
    """The folder that `make gpu` writes on a machine without a GPU, on tiny shapes."""
    def run(folder: Path) -> None:
        (folder / "gpu").mkdir()
        (folder / "gpu" / "probe_overhead.json").write_text("{}")           # of an earlier run
        done = succeeds(command("-m bench.gpu", "--dry-run", "--out", folder / "gpu", cwd=folder,
                                env=NO_GPU))
        (folder / "stdout").write_text(done.stdout)

    return made_once("gpu", run) / "gpu"


@pytest.mark.long
def test_the_gpu_command(dry_run):
    """Every step has succeeded; the page has its tables and says that they mean nothing."""
    steps = {row["name"]: row["code"] for row in json.loads((dry_run / "steps.json").read_text())}
    assert steps == {"attention_tiles": 0, "attention": 0, "train": 0, "sampling": 0}
    page = (dry_run / "page.md").read_text()
    for heading in ("Steps", "Attention", "Tiles", "A training step", "Sampling"):
        table = page.partition(f"## {heading}\n")[2].partition("## ")[0]
        assert table.count("|") > 20, heading
    assert "What watching heads costs" not in page
    assert "no time here means anything" in page
    assert "exit code 0" in (dry_run.parent / "stdout").read_text()


def test_the_gpu_command_lists_its_steps_and_stops_slow_ones(tmp_path):
    """A step whose packages are missing is left out; one that takes too long is stopped, and the
    last line of its output is kept."""
    done = succeeds(command("-m bench.gpu", cwd=tmp_path, env=NO_GPU))
    assert "bench.attention --tune" in done.stdout and "nothing has been run" in done.stdout
    seconds = sum(step.seconds for step in gpu.IN_TURN)
    seconds += max(step.seconds for step in gpu.SIDE_BY_SIDE)
    assert seconds < gpu.SECONDS
    (tmp_path / "logs").mkdir()
    words = "-c \"print('so far', flush=True); import time; time.sleep(600)\""
    slow = gpu.Running(gpu.Step("slow", 10, ""), words, tmp_path, tmp_path, 100)
    wait_until(slow.has_ended)
    assert slow.row()["code"] == 124 and slow.row()["last_line"] == "so far"
    assert slow.process.poll() is not None
    assert not gpu.importable("no_such_module", tmp_path) and gpu.importable("torch", tmp_path)


def test_a_bench_that_has_compiled_waits_for_its_turn(tmp_path):
    """Its seconds count from then on."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "side_by_side").mkdir()
    go = turn.go_file(tmp_path, "late")
    for file in (go, turn.compiled_file(go)):               # of an earlier run
        file.touch()
    words = ("-c \"from bench.turn import wait_for_turn; print('compiled', flush=True); "
             "wait_for_turn(); print('measured')\"")
    late = gpu.Running(gpu.Step("late", 20, "", compiles=True), words, tmp_path, tmp_path, 300)
    assert not late.has_compiled()
    wait_until(late.has_compiled)
    time.sleep(0.3)
    assert late.row()["last_line"] == "compiled" and not late.has_ended()
    assert late.until == late.last
    late.take_turn()
    assert late.until < late.last
    wait_until(late.has_ended)
    assert late.row()["code"] == 0 and late.row()["last_line"] == "measured"


def test_running_some_steps_again_keeps_the_figures_of_the_others(tmp_path):
    rows = [{"name": "train", "code": 1}, {"name": "attention", "code": 0}]
    (tmp_path / "steps.json").write_text(json.dumps(rows))
    for name in ("train", "attention"):
        (tmp_path / f"{name}.json").write_text("{}")
    assert gpu.forget(tmp_path, ["train"]) == rows[1:]
    assert [path.stem for path in sorted(tmp_path.glob("*.json"))] == ["attention", "steps"]


def test_the_page_of_a_step_that_was_cut_short(dry_run, tmp_path):
    figures = json.loads((dry_run / "attention.json").read_text())
    cut = {name: figures[name] for name in figures
           if name not in ("windows", "decode", "statistics")}
    (tmp_path / "attention.json").write_text(json.dumps(cut | {"rows": cut["rows"][:1]}))
    assert "TFLOP/s" in page(tmp_path) and "Statistics" not in page(tmp_path)
    assert "nothing has been measured" in page(tmp_path / "empty")
    (tmp_path / "train.json").write_text("{")
    (tmp_path / "sampling.json").write_text('{"rows": [{}]}')
    text = page(tmp_path)
    assert "train.json could not be read" in text and "sampling.json has no" in text
    assert "TFLOP/s" in text


@pytest.mark.long
def test_train(dry_run):
    row = json.loads((dry_run / "train.json").read_text())["rows"][0]
    ours, matrices = row["arms"]["ours, AdamW"], 4 * 12 * 128 ** 2 + 257 * 128
    assert row["flops"] == pytest.approx(6 * 768 * matrices, rel=0.05)      # the rest is attention
    assert ours["in_a_row_ms"] == pytest.approx(ours["passes_ms"] + ours["update_ms"])      # a CPU
    assert row["products_ms"] > 0 and ours["passes_ms"] > 0 and ours["of_matrix_rate"] > 0


@pytest.mark.long
def test_sampling(dry_run):
    result = json.loads((dry_run / "sampling.json").read_text())
    assert [row["batch"] for row in result["rows"]] == [1, 3]
    assert result["rows"][1]["sides"]["static"]["prefill_ms"] > 0
    assert result["many"][0]["tokens"] > 5 * 8


def test_growth(workplace):
    result = results_of("growth", "--sweep", "context", "--most", "256", "--rounds", "1",
                        "--figure", "g.png")
    assert result["points"]["context"]["256"]["reference"]["ms"] > 0
    assert result["statistics"]["256"]["ms"] > 0
    assert Image.open("g.png").height > 300


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(),
                    reason="bench.prepare reads memory from Linux's /proc")
def test_prepare(workplace):
    result = results_of("prepare", "--copies", "1", "--rounds", "1", "--files", "9",
                        "--vocab-size", "300")
    row = result["rows"][0]
    assert row["ours"]["tokens"] == pytest.approx(row["datasets"]["tokens"], rel=0.02)
    assert row["ours"]["mb"] > 1


@pytest.mark.long
def test_attention(dry_run):
    result = json.loads((dry_run / "attention.json").read_text())
    assert {row["pass"] for row in result["rows"]} == {"forward", "backward", "both"}
    assert result["dry_run"]
    assert all(row["call_ms"]["flash"] > 0 for row in result["rows"])
    assert result["host_us"]["ours, backward"] > 0
    assert result["decode"][0]["ms"].keys() == {"ours", "flash", "ours, ragged"}
    assert len(json.loads((dry_run / "attention_tiles.json").read_text())["tiles"]) == 10


def test_probe_overhead(workplace):
    result = results_of("probe_overhead", "tiny.yaml", "heads.every=2", "--rounds", "2")
    assert result["share"] > 0 and len(result["milliseconds"]["look"]) == 2


def test_startup(workplace):
    """Every command is timed, and the imports of one are listed."""
    # The bench trains in a folder of its own, so the files need their full path.
    data = TINY["data"] | {"files": [f"{workplace}/texts/*.txt"]}
    (workplace / "absolute.yaml").write_text(yaml.safe_dump(TINY | {"data": data}))
    result = results_of("startup", "--config", "absolute.yaml", "--rounds", "1")
    assert len(result["seconds"]) == 11
    assert all(len(values) == 1 and values[0] > 0 for values in result["seconds"].values())
    done = succeeds(command("-m bench.startup", "--imports", "sample.py --help"))
    seconds = [float(line.split()[0]) for line in done.stdout.splitlines()]
    assert len(seconds) == 25 and seconds == sorted(seconds, reverse=True) and seconds[-1] > 0


def test_host_time(workplace):
    times = results_of("host_time", "--calls", "3", TRITON_INTERPRET="0")["us"]
    assert len(times) == 4 and all(0 < us < 1e5 for us in times.values())       # nothing compiles


def test_a_cell_of_a_study_is_the_median_and_the_range():
    assert spread(["0.02", "0.25", "0.02"]) == "0.02 (0.02 … 0.25)"
    assert spread(["+9.00", "-1.5", "10.5", None]) == "+9.00 (-1.5 … 10.5, 3 of 4)"
    assert spread(["101%", "101%"]) == "101%" and spread([None, None]) == ""


@pytest.mark.long
def test_a_study(workplace):
    """One seed of each condition for three steps; a second call trains nothing."""
    (workplace / "study.py").write_text("""
import sys
sys.argv = ["study", "toy", "--seeds", "1", "--at-once", "1"]
from bench import study, study_runs
changes = ("train.steps=3", "heads.every=1")
study_runs.STUDIES["toy"] = study_runs.Study(2, [
    study_runs.Condition(name, name, changes) for name in ("toy_2l", "toy_1l_smear")])
study.main()
""")
    for trained in (2, 0):
        done = succeeds(command(str(workplace / "study.py")))
        assert done.stdout.count(" left") == trained, done.stdout
        assert "| `toy_1l_smear` | no 1 of 1 |" in done.stdout, done.stdout


@pytest.mark.long
def test_precompiled_kernels_are_used_from_another_folder(tmp_path):
    """The folder is filled, moved, and used: nothing is compiled again."""
    script = tmp_path / "script.py"
    script.write_text("""
import os, sys
from pathlib import Path
folder = Path(sys.argv[1])
os.environ |= {"TRITON_CACHE_DIR": str(folder / "triton"), "TRITON_STORE_BINARY_ONLY": "1"}
from triton import knobs
from bench import gpu, gpu_prepare
gpu.unpack(folder)
compiled = []
knobs.compilation.listener = lambda cache_hit, **_: compiled.append(not cache_hit)
calls = gpu_prepare.compile_share(3, 60, "sm_90")
print(calls, len(compiled), sum(compiled))
""")
    here, there = tmp_path / "here", tmp_path / "there"
    counts = []
    for folder in (here, there):
        if folder == there:
            here.rename(there)
        done = succeeds(command(str(script), folder, env={"TRITON_INTERPRET": "0"}))
        counts.append([int(number) for number in done.stdout.split()])
    (calls, kernels, compiled), (_, kernels_again, compiled_again) = counts
    assert 0 < calls <= kernels and compiled > 3
    assert kernels_again == kernels and compiled_again == 0
