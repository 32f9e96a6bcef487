"""One of the two that are compared, in a process of its own, as its user would start it."""

import multiprocessing
import os
from collections.abc import Callable


class Side:
    """`answer = side(*request)`, answered by `serve(pipe, *arguments)`, which ends when it is sent None."""

    def __init__(self, serve: Callable, *arguments, environment: dict[str, str] | None = None):
        here, there = multiprocessing.Pipe()
        kept = dict(os.environ)
        os.environ.update(environment or {})                    # a spawned process starts with it
        self.process = multiprocessing.get_context("spawn").Process(target=serve, args=(there, *arguments), daemon=True)
        self.process.start()
        os.environ.clear()
        os.environ.update(kept)
        self.pipe = here
        there.close()                                           # so that a side that dies is noticed and not waited for

    def __call__(self, *request):
        self.ask(*request)
        return self.answer()

    def ask(self, *request) -> None:
        """Send a request whose `answer` is fetched later."""
        self.pipe.send(request)

    def answer(self):
        return self.pipe.recv()

    def close(self) -> None:
        self.pipe.send(None)
        self.process.join()


def at_once(sides: dict[str, Side], *request) -> dict:
    """What each of them answers to a first request, which they work on together: compiling takes the time of the slowest."""
    for side in sides.values():
        side.ask(*request)
    return {name: side.answer() for name, side in sides.items()}
