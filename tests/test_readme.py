"""The pages tell the truth: README.md, CONTRIBUTING.md and docs/.

Every command in a shell block is typed as it stands, page by page, top to bottom, in one folder, on
small runs; NOT_RUN lists those that cannot run here. Every option, config key, config file and make
target of every documented command exists.
"""

import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml
from commands import ROOT, command, succeeds
from conftest import read_records
from theirs import save_hf_model
from torch.distributed.run import get_args_parser

from settings.validate import key_paths
from training.config import Config

PAGES = {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")])}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HEREDOC = re.compile(r"^cat > (\S+) <<'?(\w+)'?\n(.*?)^\2$\n?", re.MULTILINE | re.DOTALL)
SHELL = ("sh", "bash")

NOT_RUN = {                     # how a command begins → why it is not run here
    "make quickstart": "installs packages from the network, trains for minutes",
    "make test": "runs these tests",
    "make venv": "installs packages from the network",
    "make lint": "installs packages from the network",
    ".venv/bin/python -m pytest": "runs some of these tests",
    "python -m pytest": "runs some of these tests",
    "python3 -m venv": "the tests run in an environment",
    "source .venv/bin/activate": "the tests run in an environment",
    "pip install": "installs packages from the network",
    "wandb login": "needs an account and the network",
    "wandb sync": "needs an account and the network; tests/test_wandb.py uploads to its own server",
    "wandb sweep": "needs an account and the network",
    "wandb agent": "needs an account and the network; tests/test_wandb.py runs it",
    "hf auth login": "needs an account and the network",
    "hf upload": "tests/test_hub.py runs it",
    "lm_eval": "make test-clients runs it",
    "python train.py configs/tinystories.yaml":
        "needs a download; tests/test_configs.py trains it on other text",
    "python -m bench.gpu": "takes minutes on a GPU; tests/test_bench.py runs its dry run",
    "torchrun": "needs several GPUs; tests/test_distributed.py runs torchrun",
    "srun torchrun": "needs a SLURM cluster",
    "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "a setting of torchrun, which is not run",
    "python -m data.prepare big.yaml": "needs parquet files of a large corpus",
    "k=$SLURM_ARRAY_TASK_ID": "needs a SLURM cluster",
    "first=$(scontrol": "needs a SLURM cluster",
}
REPLACED = [                    # small values for large ones; nothing else of a command is changed
    (r"train\.steps=\d+", "train.steps=5"),
    (r"--step \d+", "--step 3"),
]
RUNS = {                        # page → overrides of the quickstart runs that its reader has
    # A movie needs two snapshots.
    "docs/heads.md": [[f"run={name}", "heads.every=1"]
                      for name in ("quickstart", "a", "b", "control")],
    "docs/exports.md": [[f"run={name}"] for name in ("quickstart", "a-s0", "a-s1", "control-s0")],
    "docs/runs.md": [["run=quickstart"]],
    "docs/python.md": [["run=quickstart"]],
}
# Modules that import Gluon, which the fork server's Triton, an interpreter, cannot.
GLUON = ("-m bench.host_time", "-m kernels.ahead_of_time")


# --- what the pages say ----------------------------------------------------------------------

def commands_of(block: str) -> Iterator[list[str]]:
    """The words of each command of a shell block, without comments."""
    lines = ""
    for line in HEREDOC.sub("", block).splitlines():
        lines += line
        if line.endswith("\\"):
            lines = lines[:-1]
            continue
        try:
            words = shlex.split(lines, comments=True)
        except ValueError:                      # a quotation goes on in the next line
            lines += "\n"
            continue
        lines = ""
        if words:
            yield words
    assert not lines, f"a quotation that does not end: {lines}"


def documented_commands(text: str) -> Iterator[list[str]]:
    """The commands of a page: in shell blocks, indented, and in the middle of the text."""
    for language, block in FENCE.findall(text):
        if language in SHELL:
            yield from commands_of(block)
    rest = FENCE.sub("", text)
    for line in re.findall(r"^ {4}((?:python|make|torchrun) .*)$", rest, re.MULTILINE):
        yield from commands_of(line)
    for span in re.findall(r"`((?:[A-Z_]+=\S+ )*(?:python |make |torchrun |\w+\.py )[^`]*)`", rest):
        yield from commands_of(span.replace("\n", " "))


def reason_not_to_run(words: list[str]) -> str | None:
    """The entry of NOT_RUN that leaves a command out."""
    line = " ".join(words)
    matches = [start for start in NOT_RUN if line.startswith(start)]
    return max(matches, key=len, default=None)


def script_of(words: list[str]) -> tuple[str, list[str]]:
    """A python command's script, as tests/commands.py takes it, and its arguments."""
    if words[0] == "-m":
        return " ".join(words[:2]), words[2:]
    return words[0], words[1:]


# --- running the blocks ----------------------------------------------------------------------

@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """The repository as `git clone` leaves it, with a reader's own files.

    The configs are cut to three steps of four windows.
    """
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True,
                             check=True).stdout.splitlines()
    for name in {path.split("/")[0] for path in tracked} - {"configs"}:
        (tmp_path / name).symlink_to(ROOT / name)
    for path in ROOT.glob("configs/**/*.yaml"):
        tree = yaml.safe_load(path.read_text("utf-8"))
        tree["train"] |= {"steps": 3, "batch_tokens": 4 * tree["model"]["n_ctx"]}
        tree["eval"] = {"tokens": 1024}
        small = tmp_path / path.relative_to(ROOT)
        small.parent.mkdir(parents=True, exist_ok=True)
        small.write_text(yaml.safe_dump(tree))
    (tmp_path / "my.txt").write_bytes(Path(os.__file__).read_bytes())
    (tmp_path / "prompts.txt").write_text("def \nimport \n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_page(name: str, checkout: Path) -> None:
    """Type every shell and Python block of a page, except what NOT_RUN lists."""
    for language, block in FENCE.findall(PAGES[name]):
        if block.startswith("# needs"):         # other packages: make test-clients runs it
            continue
        if language == "python":
            (checkout / "block.py").write_text(block)
            succeeds(command(str(checkout / "block.py")))
        elif language in SHELL:
            for file, _, content in HEREDOC.findall(block):
                (checkout / file).write_text(content)
            for pattern, small in REPLACED:
                block = re.sub(pattern, small, block)
            for words in commands_of(block):
                if reason_not_to_run(words):
                    continue
                assert words[0] == "python", f"neither run nor in NOT_RUN: {' '.join(words)}"
                script, arguments = script_of(words[1:])
                if not script.startswith("-m "):
                    script = str(checkout / script)
                succeeds(command(script, *arguments, input="class \n"))


@pytest.mark.long
def test_readme_runs_as_it_stands(checkout):
    run_page("README.md", checkout)
    assert Path("runs/quickstart/report.html").exists() and Path("scores.json").exists()


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in PAGES if name != "README.md"])
def test_a_page_runs_as_it_stands(name, checkout):
    for overrides in RUNS.get(name, []):
        succeeds(command("train.py", "configs/quickstart.yaml", *overrides))
    if name == "docs/import.md":
        save_hf_model("gpt_neox", checkout / "path/to/pythia-160m")
    run_page(name, checkout)


def test_every_reason_not_to_run_a_command_is_used():
    used = {reason_not_to_run(words) for text in PAGES.values()
            for language, block in FENCE.findall(text) if language in SHELL
            for words in commands_of(block)}
    assert set(NOT_RUN) <= used, "no page has a command that begins like this"


# --- options, keys and files of all documented commands --------------------------------------

@cache
def options_of(script: str, *subcommand: str) -> set[str]:
    """The options that a script's --help names."""
    env = {"TRITON_INTERPRET": "0"} if script in GLUON else {}
    done = succeeds(command(script, *subcommand, "--help", cwd=ROOT, env=env))
    return set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", done.stdout))


@cache
def config_keys() -> set[str]:
    """Every key of a config, those of whole sections too."""
    keys = set()
    for path in key_paths(Config):
        parts = path.split(".")
        keys |= {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
    return keys


def check_words(words: list[str], options: set[str]) -> None:
    """Assert that the options, config keys and config files among `words` exist."""
    for word in words:
        name, equals, _ = word.partition("=")
        if word.startswith("-") and word != "-":
            assert name in options, f"{name} is not an option: {' '.join(words)}"
        elif equals and re.fullmatch(r"[a-z_.]+", name):
            assert name in config_keys(), f"{name} is not a config key: {' '.join(words)}"
        elif word.startswith("configs/"):
            assert (ROOT / word).exists(), f"{word} does not exist"


def check_python(words: list[str]) -> None:
    """Check a command from the word after `python`."""
    if words[0] == "-c":
        return
    script, arguments = script_of(words)
    if script == "-m venv":
        return
    if script == "-m pytest":
        check_pytest(arguments)
        return
    subcommand = ["verdict"] if script == "heads.py" and arguments[:1] == ["verdict"] else []
    check_words(arguments, options_of(script, *subcommand))


def check_pytest(arguments: list[str]) -> None:
    """Check that the test files exist, and that -k selects one of their tests."""
    files = [ROOT / word for word in arguments if word.startswith("tests/")]
    for file in files:
        assert file.exists(), file
        if "-k" in arguments:
            assert arguments[arguments.index("-k") + 1] in file.read_text("utf-8")


def check_make(targets: list[str]) -> None:
    """Check that the Makefile has the targets."""
    rules = re.findall(r"^([\w%-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    for target in targets:
        matches = [rule for rule in rules
                   if re.fullmatch(re.escape(rule).replace("%", r"[\w]+"), target)]
        assert matches, f"the Makefile has no target {target}"


def check_torchrun(words: list[str]) -> None:
    """Check a command from the word after `torchrun`: its options, then those of its script."""
    options = {option for action in get_args_parser()._actions for option in action.option_strings}
    scripts = [n for n, word in enumerate(words) if word.endswith(".py")]
    end = scripts[0] if scripts else len(words)
    for word in words[:end]:
        if word.startswith("-"):
            assert word.partition("=")[0] in options, f"torchrun has no option {word}"
    if scripts:
        check_python(words[end:])


def check_command(words: list[str]) -> None:
    """Check a documented command; those of other programs are not ours to check."""
    words = [word for word in words if word not in ("…", "...")]
    while "=" in words[0] and len(words) > 1:               # variables of the environment
        words = words[1:]
    for separator in ("|", ">", "&&", ";"):
        if separator in words:
            words = words[:words.index(separator)]
    program = words[0].removeprefix(".venv/bin/")
    checks: dict[str, Callable[[list[str]], None]] = {
        "python": check_python, "python3": check_python, "make": check_make,
        "torchrun": check_torchrun, "srun": lambda rest: check_command(rest)}
    if program in checks and len(words) > 1:
        checks[program](words[1:])
    elif program.endswith(".py"):
        check_python(words)


@pytest.mark.parametrize("name", PAGES)
def test_options_keys_and_files_of_documented_commands_exist(name):
    for words in documented_commands(PAGES[name]):
        check_command(words)


@pytest.mark.parametrize("wrong", [
    "python train.py configs/none.yaml", "python train.py runs/x train.stepz=3",
    "python sample.py runs/x --tempature 1", "python heads.py verdict runs/x --movie",
    "python -m bench.growth --no-such", "make no-such", "torchrun --no-such train.py",
    "torchrun --standalone train.py train.stepz=3",
    "python -m pytest tests/test_import.py -k no_such_test"])
def test_a_wrong_command_is_noticed(wrong):
    with pytest.raises(AssertionError):
        check_command(shlex.split(wrong))


# --- links, metrics, help --------------------------------------------------------------------

def linked_files(page: Path) -> list[Path]:
    """The files of the repository that a page links to."""
    text = FENCE.sub("", page.read_text("utf-8"))
    links = re.findall(r"\]\(([^)#]+)", text)
    return [(page.parent / link).resolve() for link in links if "://" not in link]


def test_links_lead_somewhere_and_every_page_is_reached_from_the_readme():
    reached, to_visit = set(), [ROOT / "README.md"]
    while to_visit:
        page = to_visit.pop()
        assert page.exists(), f"a link to {page.relative_to(ROOT)} leads nowhere"
        if page not in reached and page.suffix == ".md":
            reached.add(page)
            to_visit += linked_files(page)
    assert {ROOT / name for name in PAGES} <= reached


def names_in_tables(page: str) -> set[str]:
    """The metrics that the first columns of a page's tables name."""
    names = set()
    for cell in re.findall(r"^\| (`.*?) \|", PAGES[page], re.MULTILINE):
        names |= {name.removesuffix("/L1H3").removesuffix("/SCORE")
                  for name in re.findall(r"`([a-z_/]+(?:/L1H3|/SCORE)?)`", cell)}
    return names


def test_metrics_have_the_names_that_the_docs_give_them(trained):
    logged = {"/".join(key.split("/")[:2]) for record in read_records(trained) for key in record}
    named = names_in_tables("docs/runs.md")
    for name in names_in_tables("docs/heads.md"):
        named.add(name if "/" in name else f"heads/{name}")
    assert logged <= named, "logged, but in no table of docs/runs.md and docs/heads.md"
    # A CPU's peak is not known, no layer has a window, and in twelve steps no head forms.
    not_here = {"train/mfu", "heads/prefix_matching_visible", "phase/onset_tokens",
                "knockout/gain_removed", "knockout/gain_removed_random"}
    assert named - logged <= not_here, "in a table, but not logged"


@pytest.mark.parametrize("script", [
    "train.py", "sample.py", "heads.py", "-m training.import_model", "-m training.plan",
    "-m training.gguf", "-m data.prepare"])
def test_help_names_the_command(script):
    assert f"usage: python {script}" in succeeds(command(script, "--help", cwd=ROOT)).stdout
