"""Text from a checkpoint: `python sample.py runs/quickstart "def " -n 3`."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path

import own_modules  # noqa: F401   first: it says what is in the way of the others
from errors import ArgumentParser, UserError, run_command

from tqdm import tqdm

from console import stdout_is_the_result
from data.text_encoding import decode_text
from training.checkpoint import find_checkpoint, load_model
from training.continuation import LARGEST, RANGES, Continuation, Options, Sampler
from training.device import choose_device


def main() -> None:
    args = parse_arguments()
    stdout_is_the_result()
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")     # as console.py does for stdout
    if args.json and isinstance(sys.stdout, TextIOWrapper):
        # JSON's encoding, whatever the console's is. A byte of a prompt that is not UTF-8 becomes
        # an escape (\udcff): written as it is, no parser would accept the file.
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    # Large pages, asked for before the first tensor: a CPU then reads weights a third faster.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    device = choose_device(args.device, "--device ")
    model, tokenizer = load_model(find_checkpoint(args.run), device)
    options = Options(**{name: getattr(args, name) for name in Options._fields})
    sampler = Sampler(model.pack(), tokenizer, options)
    if args.interactive:
        sampler.compile([sampler.encode("")])
        interact(sampler)
        return
    prompts = [prompt for prompt in read_prompts(args) for _ in range(args.n)]
    ids = [sampler.encode(prompt) for prompt in prompts]    # refused before anything is printed
    sampler.compile(ids)
    if len(prompts) == 1 and not args.json:
        print(prompts[0], end="", flush=True)
        sampler.complete(ids, show=lambda _, text: print(text, end="", flush=True))
        print()
    elif args.stream and not args.json:
        sampler.complete(ids, show=lambda n, text: print(f"[{n}] {text!r}", flush=True))
    else:
        print_in_order(prompts, ids, sampler, as_json=args.json)


def print_in_order(prompts: list[str], ids: list[list[int]], sampler: Sampler,
                   as_json: bool) -> None:
    """Print whole continuations in the order of their prompts, each as soon as it and all before it
    have ended."""
    opening, separator, closing = ("[", ",\n ", "]\n") if as_json else ("", "\n---\n", "\n")
    ended: dict[int, Continuation] = {}         # not printed yet
    printed = tokens = 0
    started = time.monotonic()

    def rate() -> str:
        return f"{tokens / (time.monotonic() - started):.0f} tokens/s"

    def finished(n: int, row: Continuation) -> None:
        nonlocal printed, tokens
        ended[n] = row
        tokens += len(row.tokens)
        while printed in ended:
            prompt, next_row = prompts[printed], ended.pop(printed)
            if as_json:
                entry = {"prompt": prompt, "text": next_row.text, "tokens": next_row.tokens}
                # Bytes of a prompt that are not UTF-8 (lone surrogates here) become \udcNN.
                text = json.dumps(entry, ensure_ascii=False).encode(
                    "utf-8", "backslashreplace").decode()
            else:
                text = prompt + next_row.text
            print(separator if printed else opening, text, sep="", end="", flush=True)
            printed += 1
        bar.set_postfix_str(rate(), refresh=False)
        bar.update()

    # On a terminal the continuations themselves show the progress.
    with tqdm(total=len(prompts), unit=" prompts", delay=2, leave=False,
              disable=sys.stdout.isatty()) as bar:
        sampler.complete(ids, finished=finished)
    print(closing, end="")
    if not as_json:
        print(f"{tokens} tokens, {rate()}", file=sys.stderr)


def interact(sampler: Sampler) -> None:
    """Read a prompt, continue it, and again, until the end of input."""
    terminal = sys.stdin.isatty()
    while True:
        try:
            prompt = input("> " if terminal else "").removeprefix("\ufeff")
        except EOFError:
            return
        if not prompt:
            continue
        print(prompt, end="", flush=True)
        try:
            sampler.complete([sampler.encode(prompt)],
                             show=lambda _, text: print(text, end="", flush=True))
        except UserError as error:
            print(f"\nerror: {error}", file=sys.stderr, end="")
        print(flush=True)


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts of the command line and of --file; the empty one if there are none."""
    prompts = [decode_text(sys.stdin.buffer.read(), "standard input") if prompt == "-" else prompt
               for prompt in args.prompt]
    if args.file is None:
        return prompts or [""]
    try:
        raw = Path(args.file).read_bytes()
    except OSError as error:
        raise UserError(f"--file {args.file!r}: cannot be read ({error.strerror})") from None
    lines = decode_text(raw, f"--file {args.file}").split("\n")
    if not any(lines):
        raise UserError(f"--file {args.file}: holds no prompt (one a line)")
    return prompts + [line for line in lines if line]


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser("python sample.py",
                            description="Continue prompts with a trained model.")
    add, default = parser.add_argument, Options()
    add("run", help="runs/NAME, or a checkpoint in it: runs/NAME/checkpoints/000500")
    add("prompt", nargs="*", default=[],
        help="text to continue, or several texts; - reads standard input; without one a new "
             "document begins")
    add("--file", help="a file of prompts, one a line, any number of them")
    add("-n", type=between(int, 1, MOST_CONTINUATIONS), default=1, metavar="N",
        help="continuations of each prompt (default 1)")
    add("--max-tokens", type=in_range(int, "max_tokens"), default=default.max_tokens,
        metavar="N", help="longest continuation (default 200)")
    add("--temperature", type=in_range(float, "temperature"), default=default.temperature,
        metavar="T", help="0 is greedy (default 0.8)")
    add("--top-k", type=in_range(int, "top_k"), metavar="K",
        help="choose among the K likeliest tokens")
    add("--top-p", type=in_range(float, "top_p"), metavar="P",
        help="choose among the likeliest tokens that together reach P")
    add("--min-p", type=in_range(float, "min_p"), metavar="P",
        help="leave out tokens below P times the likeliest")
    add("--repetition-penalty", type=in_range(float, "repetition_penalty"),
        default=default.repetition_penalty, metavar="R", help="above 1: repeat less (default 1)")
    add("--seed", type=in_range(int, "seed"), default=default.seed, metavar="S",
        help="same seed, same text (default 0)")
    add("--stop", type=stop_text, action="append", default=[], metavar="TEXT",
        help="end before TEXT; may be given several times")
    add("--batch-size", type=in_range(int, "batch_size"), default=default.batch_size, metavar="B",
        help="prompts continued at the same time; when one ends, the next begins (default 32)")
    add("--compile", action="store_true",
        help="compile a decoding step first, which takes 10 to 30 seconds on a CPU: worth it for "
             "100,000 tokens of a small model, or some thousands of a large one")
    add("--slide", action="store_true",
        help="when the context is full, forget its older half and go on")
    add("--stream", action="store_true",
        help="with several continuations: show pieces as they come (a single one always streams)")
    add("--interactive", action="store_true",
        help="read prompts line by line until the end of input")
    add("--json", action="store_true", help='print [{"prompt": …, "text": …, "tokens": […]}]')
    add("--device", default="auto", help="cuda, cpu, mps (default: the first there is)")
    args = parser.parse_intermixed_args()       # prompts may follow options
    if args.interactive and (args.prompt or args.file or args.json or args.n > 1):
        raise UserError("--interactive reads its prompts by itself, one at a time: leave out "
                        "prompt, --file, --json and -n")
    return args


MOST_CONTINUATIONS = 10 ** 6        # of a prompt: a list of them is built


def stop_text(text: str) -> str:
    if not text:                    # every text begins with it
        raise argparse.ArgumentTypeError("an empty text would end at once (leave it out)")
    return text


def between(number_type: type[int] | type[float], low: float,
            high: float) -> Callable[[str], float]:
    """A parser of numbers from `low` to `high`, for argparse. Its name makes the error readable."""
    def number(text: str) -> float:
        value = number_type(text)
        if not low <= value <= high:
            raise ValueError
        return value

    noun = "whole number" if number_type is int else "number"
    range_ = f"from {low:g} on" if high == LARGEST else f"from {low:g} to {high:g}"
    number.__name__ = f"{noun} {range_},"
    return number


def in_range(number_type: type[int] | type[float], option: str) -> Callable[[str], float]:
    return between(number_type, *RANGES[option])


if __name__ == "__main__":
    run_command(main)
