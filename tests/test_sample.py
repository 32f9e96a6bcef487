"""sample.py as a user runs it, and the choices behind it."""

import json
import os
import subprocess
import sys

import pytest
import torch
from commands import ROOT, command, fails
from test_model import make

from data.byte_bpe import bytes_tokenizer
from model.generate import Sampling, choose, generate
from sample import Continuation


def sample(run, *arguments, **options):
    return command("sample.py", str(run), *arguments, **options)


def test_json_has_prompt_text_and_tokens_and_a_seed_decides(trained):
    first = sample(trained, "import ", "def ", "-n", "2", "--max-tokens", "9", "--json")
    rows = json.loads(first.stdout)
    assert [row["prompt"] for row in rows] == ["import ", "import ", "def ", "def "] and all(len(r["tokens"]) <= 9 for r in rows)
    assert rows[0]["tokens"] != rows[1]["tokens"]
    assert first.stdout == sample(trained, "import ", "def ", "-n", "2", "--max-tokens", "9", "--json").stdout
    assert first.stdout != sample(trained, "import ", "def ", "-n", "2", "--max-tokens", "9", "--json", "--seed", "1").stdout


def test_a_prompt_comes_from_argument_file_or_standard_input(trained, tmp_path):
    options = ("--max-tokens", "5", "--temperature", "0")
    text = sample(trained, "import os", *options).stdout
    assert text.startswith("import os")
    assert sample(trained, "-", *options, input="import os").stdout == text
    assert sample(trained, *options, "--interactive", input="import os\n").stdout == text
    (tmp_path / "prompts.txt").write_text("import os\nimport sys\n")
    rows = json.loads(sample(trained, "--file", str(tmp_path / "prompts.txt"), *options, "--json").stdout)
    assert [row["prompt"] for row in rows] == ["import os", "import sys"] and text == "import os" + rows[0]["text"] + "\n"
    streamed = sample(trained, "import os", "x", *options, "--stream").stdout
    assert "[0] " in streamed and "[1] " in streamed
    assert json.loads(sample(trained, "--json", "--max-tokens", "3").stdout)[0]["prompt"] == ""


def test_the_context_ends_with_a_word_or_slides(trained):
    stopped = sample(trained, "import os", "--max-tokens", "100", "--json")
    assert "the context of 32 tokens is full; --slide goes on" in stopped.stderr
    assert len(json.loads(stopped.stdout)[0]["tokens"]) < 32
    slid = sample(trained, "import os", "--max-tokens", "100", "--json", "--slide", "--temperature", "0")
    assert not slid.stderr and len(json.loads(slid.stdout)[0]["tokens"]) == 100
    too_long = sample(trained, "word " * 60)
    fails(too_long, "longer than the model's context of 32", "--slide")
    assert not too_long.stdout
    assert sample(trained, "word " * 60, "--slide", "--max-tokens", "3").returncode == 0


@pytest.mark.parametrize(("arguments", "words"), [
    (["runs/nothing"], "no such run"), (["RUN", "--top-k", "0"], "--top-k"), (["RUN", "--temperature", "-1"], "--temperature"),
    (["RUN", "--top-p", "0"], "--top-p"), (["RUN", "--min-p", "1.5"], "--min-p"), (["RUN", "--seed", str(2 ** 64)], "--seed"),
    (["RUN", "--max-tokens", "x"], "--max-tokens"), (["RUN", "--file", "nothing.txt"], "nothing.txt"),
    (["RUN", "--device", "cuda:7"], "cuda:7"), ([], "run"),
])
def test_mistakes(trained, arguments, words):
    fails(command("sample.py", *[str(trained) if a == "RUN" else a for a in arguments]), words)


def test_a_closed_pipe_is_no_error(trained):
    done = subprocess.run(f"{sys.executable} sample.py {trained} -n 3 --max-tokens 20 | head -c 1",
                          shell=True, cwd=ROOT, capture_output=True, text=True)
    assert "Traceback" not in done.stderr


def test_prompts_may_stand_behind_options_and_hold_any_bytes(trained, tmp_path):
    assert json.loads(sample(trained, "--json", "--max-tokens", "2", "def ").stdout)[0]["prompt"] == "def "
    (tmp_path / "odd.txt").write_bytes(b"a\x0cb\r\n\xff\n\n")
    done = subprocess.run([sys.executable, ROOT / "sample.py", trained, "-", "--file", tmp_path / "odd.txt", "--json", "--max-tokens", "2"],
                          input=b"ab\xff", capture_output=True, env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"})
    assert done.returncode == 0, done.stderr
    assert [row["prompt"].encode("utf-8", "surrogateescape") for row in json.loads(done.stdout.decode("utf-8", "surrogateescape"))] == [
        b"ab\xff", b"a\x0cb", b"\xff"]
    fails(sample(trained, "x", "--interactive"), "--interactive")


def test_a_vocabulary_larger_than_the_tokenizers(workplace):
    assert command("train.py", "tiny.yaml", "model.vocab_size=1000", "train.steps=1", cwd=workplace).returncode == 0
    rows = json.loads(sample("runs/tiny", "a", "--max-tokens", "25", "--temperature", "50", "--json", cwd=workplace).stdout)
    assert max(rows[0]["tokens"]) < 300


# --- choosing ---------------------------------------------------------------------------------------------------------

def shares(sampling: Sampling, logits: list[float], rows=None) -> list[float]:
    """How often each token is chosen, over evenly spread draws."""
    n = 2000
    draws = (torch.arange(n) + 0.5) / n
    chosen = choose(torch.tensor([logits]).expand(n, -1), sampling, draws, rows or [[]] * n)
    return (torch.bincount(chosen, minlength=len(logits)) / n).tolist()


LOGITS = [1.0, 3.0, 2.0, -1.0]
P = torch.tensor(LOGITS).softmax(0).tolist()


def test_choices_follow_the_formulas():
    close = lambda a, b: a == pytest.approx(b, abs=2e-3)        # noqa: E731
    assert close(shares(Sampling(), LOGITS), P)
    assert close(shares(Sampling(temperature=0.5), LOGITS), (torch.tensor(LOGITS) / 0.5).softmax(0).tolist())
    assert shares(Sampling(temperature=0), LOGITS) == shares(Sampling(temperature=1e-30), LOGITS) == [0, 1, 0, 0]
    assert close(shares(Sampling(top_k=2), LOGITS), [0, P[1] / (P[1] + P[2]), P[2] / (P[1] + P[2]), 0])
    assert close(shares(Sampling(top_p=P[1] + 0.01), LOGITS), [0, P[1] / (P[1] + P[2]), P[2] / (P[1] + P[2]), 0])
    assert shares(Sampling(top_p=0.01), LOGITS) == [0, 1, 0, 0]
    assert close(shares(Sampling(min_p=0.3), LOGITS), [0, P[1] / (P[1] + P[2]), P[2] / (P[1] + P[2]), 0])
    penalised = torch.tensor([1.0, 1.5, 2.0, -2.0]).softmax(0).tolist()
    assert close(shares(Sampling(repetition_penalty=2.0), LOGITS, [[1, 3, 1]] * 2000), penalised)


def test_penalty_and_top_p_are_those_of_transformers():
    from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper
    torch.manual_seed(0)
    logits, said = torch.randn(6, 50) * 3, torch.randint(50, (6, 9))
    theirs = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3), TopKLogitsWarper(20), TopPLogitsWarper(0.8)])(said, logits.clone())
    allowed = theirs.softmax(-1) > 0
    for draw in torch.linspace(0, 0.9999, 200):
        token = choose(logits, Sampling(repetition_penalty=1.3, top_k=20, top_p=0.8), draw.expand(6), said.tolist())
        assert allowed.gather(1, token[:, None]).all()


def test_a_row_says_the_same_whatever_its_neighbours():
    model = make()
    alone = [row[0] for row in generate(model, [[1, 2, 3]], 12, Sampling(), seed=5)]
    beside = [row[0] for row in generate(model, [[1, 2, 3], [7], [4] * 9], 12, Sampling(), seed=5)]
    assert alone == beside


def test_greedy_cached_text_is_that_of_recomputing_everything():
    model = make()
    tokens, expected = [5, 6], []
    with torch.no_grad():
        for _ in range(20):
            expected.append(int(model(torch.tensor([tokens + expected]))[0, -1].argmax()))
    for prompts in ([[5, 6]], [[5, 6], [1, 2, 3, 4]]):
        assert [row[0] for row in generate(model, prompts, 20, Sampling(temperature=0))] == expected


def test_sliding_forgets_all_but_the_newest_half():
    model = make(n_ctx=8)
    said = [1, 2, 3]
    got = [row[0] for row in generate(model, [said], 30, Sampling(temperature=0), slide=True)]
    context = list(said)
    for token in got:
        if len(context) > 8:
            context = context[-4:]
        with torch.no_grad():
            assert token == int(model(torch.tensor([context]))[0, -1].argmax())
        context.append(token)


def said_by_each(steps, prompts) -> list[list[int]]:
    """What each row said, put together from the steps of generate."""
    said = [[] for _ in prompts]
    for tokens in steps:
        for r, token in tokens.items():
            said[r].append(token)
    return said


PROMPTS = [[1, 2, 3], [7], [4] * 9, [5, 6], [8, 3, 1, 2, 2, 6], [9, 9], [2, 4, 6, 8], [1]]
MOST = [9, 3, 20, 1, 12, 20, 2, 7]              # tokens that somebody wants of each
SHAPES = [{}, {"window": 4}, {"smear": True}, {"position": "learned"}, {"position": "sinusoidal", "n_kv_heads": 1}]


def said_alone(model, slide: bool) -> list[list[int]]:
    """The greedy continuations of PROMPTS, each token by a pass over everything before it."""
    n_ctx, expected = model.config.n_ctx, []
    for prompt, n in zip(PROMPTS, MOST):
        context, said = list(prompt), []
        while len(said) < n and (slide or len(context) <= n_ctx):
            context = context[-n_ctx // 2:] if len(context) > n_ctx else context
            with torch.no_grad():
                said.append(int(model(torch.tensor([context]))[0, -1].argmax()))
            context.append(said[-1])
        expected.append(said)
    return expected


def said_together(model, slide: bool, batch_size: int, step=None) -> list[list[int]]:
    left = list(MOST)

    def wanted(r: int) -> bool:
        left[r] -= 1
        return left[r] > 0

    steps = list(generate(model, PROMPTS, 20, Sampling(temperature=0), slide=slide, batch_size=batch_size, wanted=wanted, step=step))
    assert all(0 < len(tokens) <= batch_size for tokens in steps)
    return said_by_each(steps, PROMPTS)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("slide", [False, True])
def test_prompts_that_take_the_places_of_others_are_continued_as_if_they_were_alone(shape, slide):
    """Rows end at different times, by n_ctx or because nobody wants more."""
    model = make(n_ctx=16, **shape)
    expected = said_alone(model, slide)
    for batch_size in (1, 3, 8):
        assert said_together(model, slide, batch_size) == expected, batch_size


def test_what_waiting_rows_draw_depends_on_nobody():
    model, prompts = make(), [[1, 2, 3], [7], [4] * 9, [5, 6], [8, 3, 1]]
    together = said_by_each(generate(model, prompts, 12, Sampling(), seed=5), prompts)
    assert together == said_by_each(generate(model, prompts, 12, Sampling(), seed=5, batch_size=2), prompts)
    assert len({tuple(row) for row in together}) == 5


def test_a_file_of_many_prompts(trained, tmp_path):
    prompts = [f"{word} {n}" for n in range(9) for word in ("import", "def a_longer_name", "x")]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    outputs = [sample(trained, "--file", str(tmp_path / "prompts.txt"), "--max-tokens", "9", "--stop", "e", "--batch-size", size, *kind)
               for kind in ([], ["--json"]) for size in ("4", "64")]
    assert [done.returncode for done in outputs] == [0] * 4 and "tokens/s" in outputs[0].stderr
    plain, _, as_json, _ = (done.stdout for done in outputs)
    assert [outputs[1].stdout, outputs[3].stdout] == [plain, as_json]
    rows = json.loads(as_json)
    assert [row["prompt"] for row in rows] == prompts and all("e" not in row["text"] for row in rows)
    assert plain == "\n---\n".join(row["prompt"] + row["text"] for row in rows) + "\n"


def test_rows_end_behind_the_end_token():
    model = make()
    free = [row[0] for row in generate(model, [[1]], 20, Sampling(temperature=0))]
    end = free[3]
    ended = list(generate(model, [[1], [2, 3]], 20, Sampling(temperature=0), ends=[end]))
    first = free.index(end)
    assert [row[0] for row in ended[:first + 1]] == free[:first + 1] and all(0 not in row for row in ended[first + 1:])


def test_streamed_text_is_never_cut_inside_a_character_and_ends_before_a_stop():
    row = Continuation(bytes_tokenizer(), [])
    pieces = [row.add(b) for b in "a漢🙂é".encode()] + [row.finish()]
    assert "".join(pieces) == row.text == "a漢🙂é" and "\ufffd" not in row.text
    row = Continuation(bytes_tokenizer(), ["STOP", "\n\n"])
    pieces = [row.add(b) for b in b"go STO on STOP here" if not row.ended]
    assert "".join(pieces) + row.finish() == row.text == "go STO on "
    cut = Continuation(bytes_tokenizer(), [])
    assert cut.add(0xE6) + cut.finish() == "\ufffd"
    stopped = Continuation(bytes_tokenizer(), ["lo"])
    assert stopped._settle("hel") + stopped._settle("lo") + stopped.add(0xE6) + stopped.finish() == "hel" == stopped.text
