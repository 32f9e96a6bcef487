"""One side of a comparison, in a process of its own, as its user would start it."""

import multiprocessing
import os
from collections.abc import Callable


class Side:
    """`answer = side(*request)`, answered by `serve(pipe, *arguments)` in the process.

    `serve` ends when it is sent None.
    """

    def __init__(self, serve: Callable, *arguments, environment: dict[str, str] | None = None):
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
    """What each side answers to a first request, on which all work at the same time.

    Compiling then takes the time of the slowest.
    """
    for side in sides.values():
        side.ask(*request)
    return {name: side.answer() for name, side in sides.items()}
