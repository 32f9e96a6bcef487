"""sample.py as a user runs it, and how tokens are chosen."""

import json
import os
import subprocess
import sys

import pytest
import torch
from commands import ROOT, Done, command, fails, succeeds
from small_models import (
    GREEDY,
    SHAPES,
    continue_one,
    generated,
    next_token,
    perturbed_model,
    recomputed,
    tokens_by_row,
)

from data.byte_bpe import bytes_tokenizer
from model.generate import Sampling, choose, generate
from model.gpt import GPT
from model.kv_cache import KVCache
from training.continuation import Continuation


def sample(run, *arguments, **options) -> Done:
    return command("sample.py", str(run), *arguments, **options)


def sample_json(run, *arguments, **options) -> list[dict]:
    return json.loads(succeeds(sample(run, *arguments, "--json", **options)).stdout)


def test_json_has_prompt_text_and_tokens_and_the_seed_decides(trained):
    arguments = ("import ", "def ", "-n", "2", "--max-tokens", "9", "--json")
    first = sample(trained, *arguments)
    rows = json.loads(first.stdout)
    assert [row["prompt"] for row in rows] == ["import ", "import ", "def ", "def "]
    assert all(len(row["tokens"]) <= 9 for row in rows)
    assert rows[0]["tokens"] != rows[1]["tokens"]
    assert first.stdout == sample(trained, *arguments).stdout
    assert first.stdout != sample(trained, *arguments, "--seed", "1").stdout


def test_a_prompt_comes_from_argument_file_or_standard_input(trained, tmp_path):
    options = ("--max-tokens", "5", "--temperature", "0")
    text = sample(trained, "import os", *options).stdout
    assert text.startswith("import os")
    assert sample(trained, "-", *options, input="import os").stdout == text
    assert sample(trained, *options, "--interactive", input="import os\n").stdout == text
    (tmp_path / "prompts.txt").write_text("import os\nimport sys\n")
    rows = sample_json(trained, "--file", str(tmp_path / "prompts.txt"), *options)
    assert [row["prompt"] for row in rows] == ["import os", "import sys"]
    assert text == "import os" + rows[0]["text"] + "\n"
    streamed = sample(trained, "import os", "x", *options, "--stream").stdout
    assert "[0] " in streamed and "[1] " in streamed
    assert sample_json(trained, "--max-tokens", "3")[0]["prompt"] == ""


def test_a_full_context_ends_with_a_note_or_slides(trained):
    stopped = sample(trained, "import os", "--max-tokens", "100", "--json")
    assert "the context of 32 tokens is full; --slide goes on" in stopped.stderr
    assert len(json.loads(stopped.stdout)[0]["tokens"]) < 32
    slid = sample(trained, "import os", "--max-tokens", "100", "--json", "--slide",
                  "--temperature", "0")
    # A slow machine shows its progress on stderr.
    assert "the context of" not in slid.stderr
    assert len(json.loads(slid.stdout)[0]["tokens"]) == 100
    too_long = sample(trained, "word " * 60)
    fails(too_long, "longer than the model's context of 32", "--slide")
    assert not too_long.stdout
    succeeds(sample(trained, "word " * 60, "--slide", "--max-tokens", "3"))


@pytest.mark.parametrize(("arguments", "words"), [
    (["runs/nothing"], "no such run"), (["sample.py"], "is a file, not a run"),
    ([""], "'': holds no checkpoint"), (["RUN", "--top-k", "0"], "--top-k"),
    (["RUN", "--temperature", "-1"], "--temperature"), (["RUN", "--top-p", "0"], "--top-p"),
    (["RUN", "--min-p", "1.5"], "--min-p"), (["RUN", "--seed", str(2 ** 64)], "--seed"),
    (["RUN", "--max-tokens", "x"], "--max-tokens"), (["RUN", "--stop", ""], "--stop"),
    (["RUN", "x", "--stop", "a", "--stop", ""], "--stop"), (["RUN", "--file", ""], "--file ''"),
    (["RUN", "--temperature", "nan"], "--temperature"), (["RUN", "-n", "9" * 12], "-n"),
    (["RUN", "--topk", "5"], "did you mean --top-k?"), (["RUN", "--n", "2"], "did you mean -n?"),
    (["RUN", "--file", "nothing.txt"], "nothing.txt"),
    (["RUN", "--device", "cuda:7"], "cuda:7"), ([], "run"),
])
def test_mistakes(trained, arguments, words):
    arguments = [str(trained) if argument == "RUN" else argument for argument in arguments]
    fails(command("sample.py", *arguments), words)


def test_a_closed_pipe_is_no_error(trained):
    line = f"{sys.executable} sample.py {trained} -n 3 --max-tokens 20 | head -c 1"
    done = subprocess.run(line, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert "Traceback" not in done.stderr


def test_prompts_may_follow_options_and_hold_any_bytes(trained, tmp_path):
    rows = sample_json(trained, "--max-tokens", "2", "def ")
    assert rows[0]["prompt"] == "def "
    (tmp_path / "odd.txt").write_bytes(b"a\x0cb\r\n\xff\n\n")
    done = subprocess.run(
        [sys.executable, ROOT / "sample.py", trained, "-", "--file", tmp_path / "odd.txt",
         "--json", "--max-tokens", "2"],
        input=b"ab\xff", capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"})
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.decode("utf-8"))
    prompts = [row["prompt"].encode("utf-8", "surrogateescape") for row in rows]
    assert prompts == [b"ab\xff", b"a\x0cb", b"\xff"]
    fails(sample(trained, "x", "--interactive"), "--interactive")


def test_a_vocabulary_larger_than_the_tokenizers(workplace):
    succeeds(command("train.py", "tiny.yaml", "model.vocab_size=1000", "train.steps=1"))
    rows = sample_json("runs/tiny", "a", "--max-tokens", "25", "--temperature", "50")
    assert max(rows[0]["tokens"]) < 300


# --- choosing --------------------------------------------------------------------------------

def frequencies(sampling: Sampling, logits: list[float], context=()) -> list[float]:
    """How often each token is chosen, over evenly spread draws, after the tokens `context`."""
    n = 2000
    draws = (torch.arange(n) + 0.5) / n
    chosen = choose(torch.tensor([logits]).expand(n, -1), sampling, draws, [list(context)] * n)
    return (torch.bincount(chosen, minlength=len(logits)) / n).tolist()


LOGITS = [1.0, 3.0, 2.0, -1.0]
P = torch.tensor(LOGITS).softmax(0).tolist()


def test_choices_follow_the_formulas():
    def assert_close(sampling: Sampling, expected: list[float], context=()) -> None:
        assert frequencies(sampling, LOGITS, context) == pytest.approx(expected, abs=2e-3)

    two_best = [0, P[1] / (P[1] + P[2]), P[2] / (P[1] + P[2]), 0]
    assert_close(Sampling(), P)
    assert_close(Sampling(temperature=0.5), (torch.tensor(LOGITS) / 0.5).softmax(0).tolist())
    assert frequencies(Sampling(temperature=0), LOGITS) == [0, 1, 0, 0]
    for temperature in (1e-30, 1e-40, 1e-46, 1e-310):          # the last two are 0 in float32
        assert frequencies(Sampling(temperature=temperature), LOGITS) == [0, 1, 0, 0]
    assert_close(Sampling(top_k=2), two_best)
    assert_close(Sampling(top_p=P[1] + 0.01), two_best)
    assert frequencies(Sampling(top_p=0.01), LOGITS) == [0, 1, 0, 0]
    assert_close(Sampling(min_p=0.3), two_best)
    penalised = torch.tensor([1.0, 1.5, 2.0, -2.0]).softmax(0).tolist()
    assert_close(Sampling(repetition_penalty=2.0), penalised, context=[1, 3, 1])


def test_penalty_and_top_p_are_those_of_transformers():
    from transformers import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )
    torch.manual_seed(0)
    logits, context = torch.randn(6, 50) * 3, torch.randint(50, (6, 9))
    processors = LogitsProcessorList([
        RepetitionPenaltyLogitsProcessor(1.3), TopKLogitsWarper(20), TopPLogitsWarper(0.8)])
    allowed = processors(context, logits.clone()).softmax(-1) > 0
    sampling = Sampling(repetition_penalty=1.3, top_k=20, top_p=0.8)
    for draw in torch.linspace(0, 0.9999, 200):
        tokens = choose(logits, sampling, draw.expand(6), context.tolist())
        assert allowed.gather(1, tokens[:, None]).all()


# --- generating ------------------------------------------------------------------------------

def test_a_row_does_not_depend_on_its_neighbours():
    model = perturbed_model()
    prompts = [[1, 2, 3], [7], [4] * 9]
    alone = continue_one(model, prompts[0], 12, Sampling(), seed=5)
    together = tokens_by_row(generate(model, prompts, 12, Sampling(), seed=5), len(prompts))
    assert alone == together[0]


def test_greedy_cached_text_is_that_of_recomputing_everything():
    model = perturbed_model()
    context = [5, 6]
    for _ in range(20):
        context.append(next_token(model, context))
    for prompts in ([[5, 6]], [[5, 6], [1, 2, 3, 4]]):
        rows = tokens_by_row(generate(model, prompts, 20, GREEDY), len(prompts))
        assert rows[0] == context[2:]


def test_sliding_forgets_all_but_the_newest_half():
    model = perturbed_model(n_ctx=8)
    context = [1, 2, 3]
    for token in continue_one(model, context, 30, slide=True):
        if len(context) > 8:
            context = context[-4:]
        assert token == next_token(model, context)
        context.append(token)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("slide", [False, True])
def test_prompts_that_take_the_places_of_others_are_continued_as_if_alone(shape, slide):
    """Rows end at different times, at n_ctx or because no more tokens are wanted."""
    assert_continued_as_if_alone(perturbed_model(n_ctx=16, **shape), slide)


def assert_continued_as_if_alone(model: GPT, slide: bool, *step) -> None:
    expected = recomputed(model, slide)
    for batch_size in (1, 3, 8):
        assert generated(model, slide, batch_size, *step) == expected, batch_size


class StepOfGPU:
    """A CompiledStep as `generate` sees it on a GPU: it starts steps before it reads tokens."""

    on_gpu = True

    def __init__(self, model: GPT):
        self.model, self.order = model, []

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        return KVCache(self.model.config, batch, capacity)

    def __call__(self, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
        self.order.append("step")
        return self.model(tokens, cache=cache)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("slide", [False, True])
def test_a_step_that_starts_early_changes_no_token(shape, slide):
    model = perturbed_model(n_ctx=16, **shape)
    assert_continued_as_if_alone(model, slide, StepOfGPU(model))


def test_nor_do_ends_and_draws():
    model, prompts = perturbed_model(), [[1, 2, 3], [7], [4] * 9, [5, 6], [8, 3, 1]]

    def texts(batch_size: int, step: StepOfGPU | None) -> list[list[int]]:
        return tokens_by_row(generate(model, prompts, 12, Sampling(), seed=5, ends=[2, 9, 11],
                                      batch_size=batch_size, compiled_step=step), 5)

    for batch_size in (1, 2, 5):
        expected = texts(batch_size, None)
        assert len({len(text) for text in expected}) > 1            # they end at different times
        assert texts(batch_size, StepOfGPU(model)) == expected


def test_a_step_starts_before_tokens_are_read_but_not_after_the_last(monkeypatch):
    model = perturbed_model()
    step = StepOfGPU(model)
    monkeypatch.setattr("model.generate.start_reading",
                        lambda tokens: lambda: step.order.append("read") or tokens.tolist())
    assert len(continue_one(model, [1, 2], 3, compiled_step=step)) == 3
    assert step.order == ["step", "read", "step", "read", "read"]


def test_a_waiting_rows_draws_depend_only_on_its_number():
    model, prompts = perturbed_model(), [[1, 2, 3], [7], [4] * 9, [5, 6], [8, 3, 1]]
    together = tokens_by_row(generate(model, prompts, 12, Sampling(), seed=5), 5)
    two_at_a_time = generate(model, prompts, 12, Sampling(), seed=5, batch_size=2)
    assert together == tokens_by_row(two_at_a_time, 5)
    assert len({tuple(row) for row in together}) == 5


def test_a_file_of_many_prompts(trained, tmp_path):
    prompts = [f"{word} {n}" for n in range(9) for word in ("import", "def a_longer_name", "x")]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    arguments = ["--file", str(tmp_path / "prompts.txt"), "--max-tokens", "9", "--stop", "e"]
    plain = succeeds(sample(trained, *arguments, "--batch-size", "4"))
    assert "tokens/s" in plain.stderr
    assert plain.stdout == succeeds(sample(trained, *arguments, "--batch-size", "64")).stdout
    rows = sample_json(trained, *arguments, "--batch-size", "4")
    assert rows == sample_json(trained, *arguments, "--batch-size", "64")
    assert [row["prompt"] for row in rows] == prompts
    assert all("e" not in row["text"] for row in rows)
    assert plain.stdout == "\n---\n".join(row["prompt"] + row["text"] for row in rows) + "\n"


def test_rows_end_after_the_end_token():
    model = perturbed_model()
    endless = continue_one(model, [1], 20)
    end = endless[3]
    steps = list(generate(model, [[1], [2, 3]], 20, GREEDY, ends=[end]))
    first = endless.index(end)
    assert [tokens[0] for tokens in steps[:first + 1]] == endless[:first + 1]
    assert all(0 not in tokens for tokens in steps[first + 1:])


def test_streamed_text_is_never_cut_inside_a_character_and_ends_before_a_stop():
    row = Continuation(bytes_tokenizer(), [])
    pieces = [row.add(byte) for byte in "a漢🙂é".encode()] + [row.finish()]
    assert "".join(pieces) == row.text == "a漢🙂é" and "\ufffd" not in row.text
    row = Continuation(bytes_tokenizer(), ["STOP", "\n\n"])
    pieces = [row.add(byte) for byte in b"go STO on STOP here" if not row.ended]
    assert "".join(pieces) + row.finish() == row.text == "go STO on "
    cut = Continuation(bytes_tokenizer(), [])
    assert cut.add(0xE6) + cut.finish() == "\ufffd"
    stopped = Continuation(bytes_tokenizer(), ["lo"])
    text = stopped._settle("hel") + stopped._settle("lo") + stopped.add(0xE6) + stopped.finish()
    assert text == "hel" == stopped.text
