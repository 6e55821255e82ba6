"""One workbench for the tests that ask it over HTTP: Gradio keeps one folder of files in a process."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("gradio")

from web_of_tests import TOKEN, listening  # noqa: E402


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
