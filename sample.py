"""Text from a run: `python sample.py runs/quickstart "def " -n 3`."""

import codecs
import json
import os
import sys
import time
from functools import partial
from io import TextIOWrapper
from pathlib import Path

from errors import ArgumentParser, UserError, first_line, run_command


def main() -> None:
    args = parse_arguments()
    for stream in (sys.stdin, sys.stdout):                      # bytes that are no UTF-8 pass through as they are
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="surrogateescape")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")      # large pages: on a CPU, weights are read a third faster
    from model.generate import Sampling, generate
    from training.checkpoint import find_checkpoint, load_model
    from training.device import choose_device
    device = choose_device(args.device, "--device ")
    model, tokenizer = load_model(find_checkpoint(args.run), device)
    model.pack()
    step = None
    if args.compile:
        from model.compiled import CompiledStep
        step = CompiledStep(model)
    sampling = Sampling(args.repetition_penalty, args.temperature, args.top_k, args.top_p, args.min_p)

    def encoded(prompts: list[str]) -> list[list[int]]:
        ids = [tokenizer.encode_prompt(prompt.encode("utf-8", "surrogateescape")) for prompt in prompts]
        longest = max(map(len, ids))
        if longest > model.config.n_ctx and not args.slide:
            raise UserError(f"a prompt of {longest} tokens is longer than the model's context of {model.config.n_ctx}\n"
                            "  shorten it, or use --slide to read its end alone")
        return ids

    def continued(ids: list[list[int]], **options):
        return generate(model, ids, args.max_tokens, sampling, seed=args.seed, ends=tokenizer.ends, slide=args.slide,
                        n_tokens=tokenizer.n_vocab, batch_size=args.batch_size, step=step, **options)

    def complete(ids: list[list[int]], show=None, finish=None) -> None:
        """Continue prompts; `show` is given (number of the prompt, text) as text comes, `finish` (number, continuation) as each ends."""
        rows = [Continuation(tokenizer, args.stop) for _ in ids]
        going: set[int] = set()

        def end(r: int) -> None:
            if (text := rows[r].finish()) and show:
                show(r, text)
            if finish:
                finish(r, rows[r])

        for tokens in continued(ids, wanted=lambda r: rows[r].ended is None):
            for r in sorted(going - tokens.keys()):
                end(r)
            going = set(tokens)
            for r, token in tokens.items():
                if (text := rows[r].add(token)) and show:
                    show(r, text)
        for r in sorted(going):
            end(r)
        if any(row.ended is None and len(row.tokens) < args.max_tokens for row in rows):
            print(f"{chr(10) if show else ''}note: the context of {model.config.n_ctx} tokens is full; --slide goes on", file=sys.stderr)

    prompts = [""] if args.interactive else [prompt for prompt in read_prompts(args) for _ in range(args.n)]
    ids = encoded(prompts)                      # refused before anything is printed
    if step:
        compile_ahead(continued(ids))
    if args.interactive:
        return interact(lambda prompt, show: complete(encoded([prompt]), show))
    if len(prompts) == 1 and not args.json:
        print(prompts[0], end="", flush=True)
        complete(ids, lambda _, text: print(text, end="", flush=True))
        print()
    elif args.stream and not args.json:
        complete(ids, lambda r, text: print(f"[{r}] {text!r}", flush=True))
    else:
        in_order(prompts, partial(complete, ids), args.json)


def compile_ahead(continued) -> None:
    """Decode as far as the first steps are compiled."""
    from torch._dynamo.exc import TorchDynamoException
    print("compiling a step of decoding: 10 to 30 seconds on a CPU", file=sys.stderr)
    try:
        for _ in zip(range(4), continued):      # read, chosen, and the compiled step twice: on a GPU it is captured the first time
            pass
    except TorchDynamoException as error:
        raise UserError(f"--compile: PyTorch's compiler does not work here ({first_line(error)})\n"
                        "  it needs a C++ compiler such as g++ and Python's headers; or leave --compile out") from None


def in_order(prompts: list[str], complete, as_json: bool) -> None:
    """Print continuations whole, in the order of their prompts, each as soon as it and all before it have ended."""
    from tqdm import tqdm
    first, between_two, last = ("[", ",\n ", "]\n") if as_json else ("", "\n---\n", "\n")
    ended: dict[int, Continuation] = {}
    printed = tokens = 0
    started = time.monotonic()

    def finish(r: int, row: Continuation) -> None:
        nonlocal printed, tokens
        ended[r], tokens = row, tokens + len(row.tokens)
        while printed in ended:
            done, prompt = ended.pop(printed), prompts[printed]
            text = json.dumps({"prompt": prompt, "text": done.text, "tokens": done.tokens}, ensure_ascii=False) if as_json \
                else prompt + done.text
            print(between_two if printed else first, text, sep="", end="", flush=True)
            printed += 1
        bar.set_postfix_str(f"{tokens / (time.monotonic() - started):.0f} tokens/s", refresh=False)
        bar.update()

    # On a terminal the continuations themselves show how far it is.
    with tqdm(total=len(prompts), unit=" prompts", delay=2, leave=False, disable=sys.stdout.isatty()) as bar:
        complete(finish=finish)
    print(last, end="")
    if not as_json:
        print(f"{tokens} tokens, {tokens / (time.monotonic() - started):.0f} tokens/s", file=sys.stderr)


class Continuation:
    """One as it grows: its tokens, and its text up to a stop string, never cut inside a character."""

    def __init__(self, tokenizer, stops: list[str]):
        self.tokenizer, self.stops = tokenizer, stops
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.tokens: list[int] = []
        self.text = ""              # what is certain to stay
        self.held = ""              # the beginning of a stop string, perhaps
        self.ended: str | None = None

    def add(self, token: int) -> str:
        """Take a token; the text that has become certain."""
        self.tokens.append(token)
        if token in self.tokenizer.ends:
            rest = self.finish()
            self.ended = "end of text"
            return rest
        return self._settle(self.decoder.decode(self.tokenizer.token_bytes[token]))

    def finish(self) -> str:
        """The text that was still held back."""
        if self.ended:
            return ""
        rest = self._settle(self.decoder.decode(b"", final=True))
        held, self.held = self.held, ""
        self.text += held
        return rest + held

    def _settle(self, new: str) -> str:
        text = self.held + new
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.ended, certain, self.held = "stop", text[:min(found)], ""
        else:
            keep = max((n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
            certain, self.held = text[:len(text) - keep], text[len(text) - keep:]
        self.text += certain
        return certain


def interact(complete) -> None:
    """Read a prompt, continue it, again, until the end of input."""
    terminal = sys.stdin.isatty()
    while True:
        try:
            prompt = input("> " if terminal else "")
        except EOFError:
            return
        if not prompt:
            continue
        print(prompt, end="", flush=True)
        try:
            complete(prompt, lambda _, text: print(text, end="", flush=True))
        except UserError as error:
            print(f"\nerror: {error}", file=sys.stderr, end="")
        print(flush=True)


def read_prompts(args) -> list[str]:
    given = [sys.stdin.read() if prompt == "-" else prompt for prompt in args.prompt]
    if args.file is None:
        return given or [""]
    try:
        lines = [line.rstrip("\r") for line in Path(args.file).read_text("utf-8", "surrogateescape").split("\n")]
    except OSError as error:
        raise UserError(f"--file {args.file}: cannot be read ({error.strerror})") from None
    if not any(lines):
        raise UserError(f"--file {args.file}: holds no prompt (one a line)")
    return given + [line for line in lines if line]


def parse_arguments():
    parser = ArgumentParser("python sample.py", description="Continue prompts with a trained model.")
    parser.add_argument("run", help="runs/NAME, or a checkpoint in it: runs/NAME/checkpoints/000500")
    parser.add_argument("prompt", nargs="*", default=[], help="text to continue, several at once if given; - reads standard input; "
                        "none begins a new document")
    parser.add_argument("--file", help="a file of prompts, one a line, as many as you like")
    parser.add_argument("-n", type=at_least(int, 1), default=1, metavar="N", help="continuations of each prompt (default 1)")
    parser.add_argument("--max-tokens", type=at_least(int, 1), default=200, metavar="N", help="longest continuation (default 200)")
    parser.add_argument("--temperature", type=at_least(float, 0), default=0.8, metavar="T", help="0 is greedy (default 0.8)")
    parser.add_argument("--top-k", type=at_least(int, 1), metavar="K", help="choose among the K likeliest tokens")
    parser.add_argument("--top-p", type=between(float, 1e-9, 1), metavar="P", help="choose among the likeliest that together reach P")
    parser.add_argument("--min-p", type=between(float, 0, 1), metavar="P", help="leave out tokens below P times the likeliest")
    parser.add_argument("--repetition-penalty", type=at_least(float, 0.01), default=1.0, metavar="R",
                        help="above 1: repeat less (default 1)")
    parser.add_argument("--seed", type=at_least(int, 0), default=0, metavar="S", help="same seed, same text (default 0)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; may be given again")
    parser.add_argument("--batch-size", type=at_least(int, 1), default=32, metavar="B",
                        help="prompts continued at the same time; as one ends, the next begins (default 32)")
    parser.add_argument("--compile", action="store_true", help="compile a step of decoding first, which takes 10 to 30 seconds on a CPU: "
                        "for 100,000 tokens of a small model, some thousands of a large one")
    parser.add_argument("--slide", action="store_true", help="past the model's context, forget the older half and go on")
    parser.add_argument("--stream", action="store_true", help="several continuations: show pieces as they come (one always streams)")
    parser.add_argument("--interactive", action="store_true", help="read prompts line by line until the end of input")
    parser.add_argument("--json", action="store_true", help='print [{"prompt": …, "text": …, "tokens": […]}]')
    parser.add_argument("--device", default="auto", help="cuda, cpu, mps (default: the first there is)")
    args = parser.parse_intermixed_args()       # prompts may stand behind options
    if args.interactive and (args.prompt or args.file or args.json or args.n > 1):
        raise UserError("--interactive reads its prompts by itself, one at a time: leave out prompt, --file, --json and -n")
    return args


LARGEST = 2 ** 62


def between(kind, low, high):
    """A number of `kind` in a range, as argparse takes it; its name makes the error readable."""
    def number(text: str):
        value = kind(text)
        if not low <= value <= high:
            raise ValueError
        return value
    number.__name__ = f"{'whole number' if kind is int else 'number'} from {low:g} {'on' if high == LARGEST else f'to {high:g}'},"
    return number


def at_least(kind, low):
    return between(kind, low, LARGEST)


if __name__ == "__main__":
    run_command(main)
