"""One side of a comparison, in a process of its own, as its user would start it."""

import multiprocessing
import os
from collections.abc import Callable
from typing import Any


class Side:
    """`answer = side(*request)`, answered by `serve(pipe, *arguments)` in the process.

    `serve` ends when it is sent None.
    """

    def __init__(self, serve: Callable, *arguments: object,
                 environment: dict[str, str] | None = None):
        ours, its = multiprocessing.Pipe()
        kept = dict(os.environ)
        os.environ.update(environment or {})            # a spawned process starts with it
        spawn = multiprocessing.get_context("spawn")
        self.process = spawn.Process(target=serve, args=(its, *arguments), daemon=True)
        self.process.start()
        os.environ.clear()
        os.environ.update(kept)
        self.pipe = ours
        its.close()                                     # or a side that dies would be waited for

    def __call__(self, *request: object) -> Any:
        self.ask(*request)
        return self.answer()

    def ask(self, *request: object) -> None:
        """Send a request whose `answer` is fetched later."""
        self.pipe.send(request)

    def answer(self) -> Any:
        return self.pipe.recv()

    def close(self) -> None:
        self.pipe.send(None)
        self.process.join()


def at_once(sides: dict[str, Side], *request: object) -> dict[str, Any]:
    """What each side answers to a first request, on which all work at the same time.

    Compiling then takes the time of the slowest.
    """
    for side in sides.values():
        side.ask(*request)
    return {name: side.answer() for name, side in sides.items()}
