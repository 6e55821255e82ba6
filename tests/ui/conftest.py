"""One workbench for the tests that ask it over HTTP: Gradio keeps one folder of files in a process."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("gradio")

from web_of_tests import TOKEN, listening


@pytest.fixture(scope="session")
def walls(tmp_path_factory):
    """The application that `tunesmith web` serves."""
    from tunesmith.ui.app import create

    return create(tmp_path_factory.mktemp("web") / "workbench", TOKEN)


@pytest.fixture(scope="session")
def web(walls):
    """The application, answering."""
    with listening(walls) as running:
        yield running


@pytest.fixture
def around(walls, web):
    """Other walls around the same pages: other limits, or accounts. Lives as long as the test."""
    from contextlib import ExitStack

    from tunesmith.ui.accounts import Guesses, Sessions

    async def inner(scope, receive, send):
        if scope["type"] == "lifespan":  # the pages are running already
            while True:
                message = await receive()
                await send({"type": message["type"] + ".complete"})
                if message["type"] == "lifespan.shutdown":
                    return
        await walls.app(scope, receive, send)

    with ExitStack() as stack:

        def made(**changes):
            fresh = {"sessions": Sessions(), "guesses": Guesses(), "app": inner, **changes}
            return stack.enter_context(listening(replace(walls, **fresh)))

        yield made


@pytest.fixture(scope="session")
def browser():
    """The system's Chromium; the tests in it are skipped where there is none."""
    from browser_of_tests import FLAGS, chromium

    path = chromium()
    if path is None:
        pytest.skip("There is no Chromium here (apt-get install chromium).")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=path, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def bench(tmp_path_factory):
    """A workbench whose workspace several tests look at."""
    from browser_of_tests import Workbench

    started = Workbench(tmp_path_factory.mktemp("bench") / "w")
    yield started
    started.end()
