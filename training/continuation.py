"""Text from a model and its tokenizer: what sample.py and lab.sample do with a prompt."""

import codecs
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

from errors import UserError, first_line

from data.tokenizer import Tokenizer
from model.compiled import CompiledStep
from model.generate import Sampling, generate
from model.gpt import GPT

Show = Callable[[int, str], None]           # called with (number of the prompt, new text)
LARGEST = 2 ** 62
RANGES: dict[str, tuple[float, float]] = {          # of the options that are numbers
    "max_tokens": (1, LARGEST), "temperature": (0, LARGEST), "top_k": (1, LARGEST),
    "top_p": (1e-9, 1), "min_p": (0, 1), "repetition_penalty": (0.01, LARGEST),
    "seed": (0, LARGEST), "batch_size": (1, LARGEST)}


class Continuation:
    """The continuation of a prompt as it grows: its tokens, and its text up to a stop string. The
    text is never cut inside a character."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]):
        self.tokenizer, self.stops = tokenizer, stops
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.tokens: list[int] = []
        self.text = ""              # what is certain to stay
        self.held = ""              # what may be the beginning of a stop string
        self.ended = False

    def add(self, token: int) -> str:
        """Add a token. Returns the text that has become certain."""
        self.tokens.append(token)
        if token in self.tokenizer.ends:
            rest = self.finish()
            self.ended = True
            return rest
        return self._settle(self.decoder.decode(self.tokenizer.token_bytes[token]))

    def finish(self) -> str:
        """Returns the text that was still held back."""
        if self.ended:
            return ""
        rest = self._settle(self.decoder.decode(b"", final=True))
        held, self.held = self.held, ""
        self.text += held
        return rest + held

    def _settle(self, new: str) -> str:
        """Add text. Returns what no stop string can take back."""
        text = self.held + new
        stops = [text.find(stop) for stop in self.stops if stop in text]
        if stops:
            self.ended = True
            certain, self.held = text[:min(stops)], ""
        else:
            # The longest end of the text that is the beginning of a stop string.
            keep = 0
            for stop in self.stops:
                for n in range(1, min(len(stop), len(text) + 1)):
                    if text.endswith(stop[:n]):
                        keep = max(keep, n)
            certain, self.held = text[:len(text) - keep], text[len(text) - keep:]
        self.text += certain
        return certain


class Options(NamedTuple):
    """What sample.py's options of the same names say."""

    max_tokens: int = 200
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: Sequence[str] = ()
    slide: bool = False
    batch_size: int = 32
    compile: bool = False


class Sampler:
    """Continues prompts with a model, packed or not."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, options: Options):
        """Raises UserError for an option that is out of range."""
        for name, (low, high) in RANGES.items():
            value = getattr(options, name)
            if value is None:
                continue
            if not isinstance(value, int | float) or not low <= value <= high:
                bounds = f"at least {low:g}" if high == LARGEST else f"from {low:g} to {high:g}"
                raise UserError(f"{name}={value!r} must be {bounds}")
        if "" in options.stop:                      # every text begins with it
            raise UserError("stop: an empty text would end at once (leave it out)")
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.sampling = Sampling(options.repetition_penalty, options.temperature, options.top_k,
                                 options.top_p, options.min_p)
        self.step = CompiledStep(model) if options.compile else None

    def encode(self, prompt: str) -> list[int]:
        """The ids of a prompt. Raises UserError if they do not fit the context."""
        ids = self.tokenizer.encode_prompt(prompt.encode("utf-8", "surrogateescape"))
        n_ctx = self.model.config.n_ctx
        if len(ids) > n_ctx and not self.options.slide:
            raise UserError(
                f"a prompt of {len(ids)} tokens is longer than the model's context of {n_ctx}\n"
                "  shorten it, or use --slide (slide=True) to read only its end")
        return ids

    def generate(self, ids: list[list[int]], **options: Any) -> Iterator[dict[int, int]]:
        chosen = self.options
        return generate(self.model, ids, chosen.max_tokens, self.sampling, seed=chosen.seed,
                        ends=self.tokenizer.ends, slide=chosen.slide,
                        n_vocab=self.tokenizer.n_vocab, batch_size=chosen.batch_size,
                        compiled_step=self.step, **options)

    def compile(self, ids: list[list[int]]) -> None:
        """With --compile, decode as far as the first steps are compiled."""
        if self.step is None:
            return
        from torch._dynamo.exc import TorchDynamoException
        print("compiling a decoding step: 10 to 30 seconds on a CPU", file=sys.stderr)
        try:
            # Prefill, a choice, and the compiled step twice: a GPU captures it the first time.
            for _ in islice(self.generate(ids), 4):
                pass
        except TorchDynamoException as error:
            raise UserError(
                f"--compile: PyTorch's compiler does not work here ({first_line(error)})\n"
                "  it needs a C++ compiler such as g++ and Python's headers; or leave --compile out"
            ) from None

    def complete(self, ids: list[list[int]], show: Show | None = None,
                 finished: Callable[[int, Continuation], None] | None = None) -> list[Continuation]:
        """Continue prompts. `show` gets text as it comes, `finished` each continuation as it
        ends. Returns all of them."""
        rows = [Continuation(self.tokenizer, self.options.stop) for _ in ids]
        going: set[int] = set()

        def end(n: int) -> None:
            rest = rows[n].finish()
            if rest and show:
                show(n, rest)
            if finished:
                finished(n, rows[n])

        for tokens in self.generate(ids, wanted=lambda n: not rows[n].ended):
            for n in sorted(going - tokens.keys()):
                end(n)
            going = set(tokens)
            for n, token in tokens.items():
                text = rows[n].add(token)
                if text and show:
                    show(n, text)
        for n in sorted(going):
            end(n)
        cut = [row for row in rows if not row.ended and len(row.tokens) < self.options.max_tokens]
        if cut:
            newline = "\n" if show else ""
            print(f"{newline}note: the context of {self.model.config.n_ctx} tokens is full; "
                  "--slide goes on (in Python: slide=True)", file=sys.stderr)
        return rows
