"""What README.md tells a reader to type is typed here, block by block, top to bottom, in one folder, on small runs."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from commands import ROOT, command

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = FENCE.findall((ROOT / "README.md").read_text("utf-8"))

NOT_RUN = {                     # how a block begins → why it is not run here
    "make quickstart": "installs packages from the network, trains for minutes and runs these tests",
    "python3 -m venv": "installs packages from the network",
    "wandb login": "needs an account and the network",
    "python train.py configs/tinystories.yaml": "needs a GPU and a download; tests/test_configs.py trains it on other text",
    "torchrun --standalone": "needs eight GPUs; tests/test_distributed.py runs torchrun",
}


@pytest.fixture
def checkout(tmp_path) -> Path:
    """The repository as `git clone` leaves it, with configs cut to three steps of four windows, and what a reader has of his own."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in {path.split("/")[0] for path in tracked} - {"configs"}:
        (tmp_path / name).symlink_to(ROOT / name)
    for path in ROOT.glob("configs/**/*.yaml"):
        tree = yaml.safe_load(path.read_text("utf-8"))
        tree["train"] |= {"steps": 3, "batch_tokens": 4 * tree["model"]["n_ctx"]}
        tree["eval"] = {"tokens": 1024}
        cut = tmp_path / path.relative_to(ROOT)
        cut.parent.mkdir(parents=True, exist_ok=True)
        cut.write_text(yaml.safe_dump(tree))
    (tmp_path / "my.txt").write_bytes(Path(os.__file__).read_bytes())
    (tmp_path / "prompts.txt").write_text("def \nimport \n")
    return tmp_path


@pytest.mark.long
def test_every_block_runs_as_it_stands(checkout):
    left_out = []
    for language, block in BLOCKS:
        if reason := [start for start in NOT_RUN if block.startswith(start)]:
            left_out += reason
            continue
        lines = block.splitlines()
        if language == "python":
            (checkout / "block.py").write_text(block)
            lines = ["python block.py"]
        for line in filter(None, lines):
            # A short way for a long one: the only thing that is changed in what is typed.
            python, *words = shlex.split(re.sub(r"train\.steps=\d+", "train.steps=5", line), comments=True)
            assert python == "python", f"neither run nor left out by name: {line}"
            module = words[0] == "-m"
            script = " ".join(words[:2]) if module else str(checkout / words[0])
            done = command(script, *words[1 + module:], cwd=checkout, input="class \n")
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    assert sorted(left_out) == sorted(NOT_RUN), "a block that is left out by name is not there, or twice"
    assert (checkout / "runs/quickstart/report.html").exists() and (checkout / "scores.json").exists()


def linked(page: Path) -> list[Path]:
    """The files of the repository that a page links to."""
    text = FENCE.sub("", page.read_text("utf-8"))
    return [(page.parent / link).resolve() for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]


def test_links_lead_somewhere_and_every_page_is_reached_from_the_readme():
    reached, ahead = set(), [ROOT / "README.md"]
    while ahead:
        page = ahead.pop()
        assert page.exists(), f"a link to {page.relative_to(ROOT)} leads nowhere"
        if page not in reached and page.suffix == ".md":
            reached.add(page)
            ahead += linked(page)
    assert set(ROOT.glob("docs/**/*.md")) <= reached


def test_metrics_have_the_names_that_the_docs_give_them(trained):
    logged = {"/".join(key.split("/")[:2]) for line in (trained / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)}
    named = set()
    for page, group in (("runs.md", ""), ("heads.md", "heads/")):
        rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / page).read_text("utf-8"), re.MULTILINE)       # the first column
        names = [name.removesuffix("/L1H3") for row in rows for name in re.findall(r"`([a-z_/]+(?:/L1H3)?)`", row)]
        named |= {name if "/" in name or not group else group + name for name in names}
    assert logged <= named, "measured and in no table of docs/runs.md and docs/heads.md"
    # a CPU's peak is not known, and in twelve steps no head forms
    assert named - logged <= {"train/mfu", "phase/onset_tokens"}, "in a table and not measured"


COMMANDS = ["train.py", "sample.py", "heads.py", "-m training.import_model", "-m training.plan", "-m data.prepare"]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_does_not_wait_for_torch(name):
    asks = ("import runpy, sys; name = sys.argv.pop(1); sys.argv[1:] = ['--help']\n"
            "try: runpy.run_module(name, run_name='__main__', alter_sys=True)\n"
            "except SystemExit as end: assert not end.code and 'torch' not in sys.modules")
    module = name.removeprefix("-m ").removesuffix(".py")
    done = subprocess.run([sys.executable, "-c", asks, module], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and f"usage: python {name}" in done.stdout, done.stderr
