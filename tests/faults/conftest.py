"""What the tests of faults share: a workplace with an undisturbed run, and a count of faults."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import make_workplace

from faults.lab import Lab
from faults.reliability import Outcome, write_page

outcomes: list[Outcome] = []                    # of every test that has ended, in any process


@pytest.fixture(scope="session")
def lab(tmp_path_factory) -> Lab:
    """A workplace with a finished run, runs/undisturbed. Tests begin runs of their own in it."""
    lab = Lab(tmp_path_factory.mktemp("lab"))
    make_workplace(lab.folder)
    lab.train("tiny.yaml", f"run={lab.undisturbed.name}")
    return lab


@pytest.fixture
def fault(request):
    """`with fault("kill -9", "a step"): …` counts an injected fault.

    It counts as survived if the block ends without an exception.
    """
    counts: dict[tuple[str, str], list[int]] = {}

    @contextmanager
    def counted(name: str, moment: str) -> Iterator[None]:
        count = counts.setdefault((name, moment), [0, 0])
        count[0] += 1
        yield
        count[1] += 1

    yield counted
    for key, count in counts.items():
        request.node.user_properties.append(("fault", [*key, *count]))


def pytest_addoption(parser) -> None:
    parser.addoption("--reliability", metavar="FILE",
                     help="write the page of what was broken and what survived to FILE")


def pytest_runtest_logreport(report) -> None:
    if report.when == "teardown":               # in this process, or sent by pytest-xdist
        outcomes.extend(Outcome(*value) for name, value in report.user_properties
                        if name == "fault")


def pytest_sessionfinish(session, exitstatus) -> None:
    target = session.config.getoption("--reliability", None)
    is_worker = hasattr(session.config, "workerinput")
    if target and outcomes and not is_worker:
        write_page(Path(target), outcomes)
