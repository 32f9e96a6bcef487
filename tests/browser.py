"""Fixtures: pages in a real browser. A test module takes them by `pytest_plugins = ["browser"]`."""

import shutil

import pytest
from viewer_cases import settled

from report.viewer import View, write_viewer

CHROMIUM = shutil.which("chromium")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def browser():
    playwright_api = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("no chromium here (Debian: apt install chromium)")
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def show(browser, tmp_path):
    """Write a page of some views and open it. Whatever a test does, the page must request nothing
    but itself and log no error."""
    complaints, contexts = [], []

    def open_views(*views: View, **options):
        path = tmp_path / "report.html"
        write_viewer(path, list(views))
        size = {"viewport": {"width": 1280, "height": 800}}
        contexts.append(browser.new_context(**size | options))
        contexts[-1].set_default_timeout(0)                 # however busy the machine is
        page = contexts[-1].new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: complaints.append(request.url)
                if request.url != path.as_uri() else None)
        page.on("dialog", lambda dialog: complaints.append(f"dialog {dialog.message}"))
        page.goto(path.as_uri(), wait_until="commit")
        return settled(page)

    yield open_views
    for context in contexts:
        context.close()
    assert not complaints
