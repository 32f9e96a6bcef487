"""What the tests of faults share: a workplace with a run that nobody disturbed, and a count of what was broken and what survived."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import make_workplace

from faults.lab import Lab
from faults.reliability import write_page

FOUND: list[tuple[str, str, int, int]] = []     # fault, moment, injected, survived: of every test that has ended, in any process


@pytest.fixture(scope="session")
def lab(tmp_path_factory) -> Lab:
    """A folder with texts, their shards and runs/whole, which was trained undisturbed. Tests begin runs of their own in it."""
    lab = Lab(tmp_path_factory.mktemp("lab"))
    make_workplace(lab.folder)
    lab.train("tiny.yaml", "run=whole")
    return lab


@pytest.fixture
def fault(request):
    """`with fault("kill -9", "a step"): …`: what is broken inside counts as injected and, if the block ends well, as survived."""
    counts: dict[tuple[str, str], list[int]] = {}

    @contextmanager
    def counted(kind: str, moment: str) -> Iterator[None]:
        count = counts.setdefault((kind, moment), [0, 0])
        count[0] += 1
        yield
        count[1] += 1

    yield counted
    request.node.user_properties.extend(("fault", [*key, *count]) for key, count in counts.items())


def pytest_addoption(parser) -> None:
    parser.addoption("--reliability", metavar="FILE", help="write there, as a page, what was broken and what survived")


def pytest_runtest_logreport(report) -> None:
    if report.when == "teardown":               # of this process, or sent by pytest-xdist's
        FOUND.extend(tuple(value) for name, value in report.user_properties if name == "fault")


def pytest_sessionfinish(session, exitstatus) -> None:
    target = session.config.getoption("--reliability", None)
    if target and FOUND and not hasattr(session.config, "workerinput"):
        write_page(Path(target), FOUND)
