"""The workbench as a process of its own, and Chromium windows on it that notice what should not happen."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
OURS = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2] / "src")}
"""The environment of a process that runs this checkout, wherever it works."""
PAGES = ("Data", "Recipe", "Plan", "Train", "Evaluate", "Chat", "Ship", "Runs")
WHILE_TRAINING = 120_000
"""Milliseconds for what a process does on a busy machine."""


def chromium() -> str | None:
    """The system's browser."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Workbench:
    """`tunesmith web` on a workspace."""

    def __init__(self, workspace: Path, *arguments: str) -> None:
        self.workspace, self.arguments, self.process = workspace, arguments, None
        self.start()

    def start(self, port: str = "0") -> None:
        """Start it; `address` has the token, `url` has not."""
        command = [
            sys.executable,
            "-m",
            "tunesmith",
            "web",
            "--port",
            port,
            "--workspace",
            str(self.workspace),
        ]
        # Standard error goes to a file, as nobody reads a pipe while a test runs.
        self.log = self.workspace.with_name(self.workspace.name + ".log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, *self.arguments], stderr=log, stdout=log, cwd=self.workspace.parent, env=OURS
            )
        while not (found := re.search(r"(http://[\w.:]+/)(\S*)", self.log.read_text())):
            assert self.process.poll() is None, self.log.read_text()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.05)
        self.url, self.address = found[1], found[0]

    def kill(self) -> None:
        """As the system does when memory runs out: no word of goodbye."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def end(self) -> None:
        """As Ctrl-C."""
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGINT)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()


@dataclass
class Window:
    """A browser window, and what went wrong in it."""

    page: Any
    bench: Workbench
    dialogs: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    """What the page's policy kept it from."""
    broken: list[str] = field(default_factory=list)

    def listen(self) -> None:
        """Notice dialogs, requests to others, refusals of the policy, and scripts that fail."""
        page, own = self.page, self.bench.url
        page.on("dialog", lambda dialog: (self.dialogs.append(dialog.message), dialog.dismiss()))
        page.on(
            "request",
            lambda asked: (
                None if asked.url.startswith((own, "data:", "blob:")) else self.elsewhere.append(asked.url)
            ),
        )
        page.on(
            "console",
            lambda said: self.refused.append(said.text) if "Content Security Policy" in said.text else None,
        )
        page.on("pageerror", lambda error: self.broken.append(str(error)))

    def open(self, address: str | None = None) -> None:
        """Open the workbench and wait until its pages can be used."""
        self.page.goto(address or self.bench.address)
        self.page.get_by_role("tab", name="Data", exact=True).wait_for(timeout=60_000)

    def go(self, name: str) -> None:
        """Choose a page."""
        self.page.locator(f"#page-{name.lower()}-button").locator("visible=true").first.click()
        self.page.locator(f"#page-{name.lower()}").wait_for(state="visible", timeout=30_000)

    def fill(self, id: str, text: str) -> None:
        """Type into a field and leave it."""
        field = self.page.locator(f"#{id} :is(input, textarea):not([type=range])").first
        field.fill(text)
        field.press("Tab")

    def pick(self, id: str, text: str) -> None:
        """Choose a word of a list."""
        field = self.page.locator(f"#{id} input").first
        field.click()
        self.page.get_by_role("option", name=text, exact=True).or_(
            self.page.locator("ul[role=listbox] li").filter(has_text=text)
        ).first.click()
        field.press("Tab")

    def click(self, id: str) -> None:
        """Press a button once it can be."""
        self.page.locator(f"button#{id}, #{id} button").first.click()

    def says(self, id: str, words: str, *, within: int = WHILE_TRAINING) -> str:
        """What a part of the page says, once the words are in it."""
        self.page.locator(f"#{id}").filter(has_text=re.compile(words)).first.wait_for(timeout=within)
        return str(self.page.locator(f"#{id}").first.inner_text())

    def check(self) -> None:
        """Nothing happened that should not."""
        assert not self.dialogs
        assert not self.elsewhere
        assert not self.refused
        assert not self.broken

    def faults(self, *names: str) -> dict[str, list[str]]:
        """By page what axe finds that is serious for people who cannot see, hear or point."""
        from axe_playwright_python.sync_playwright import Axe

        found = {}
        for name in names:
            self.go(name)
            self.page.wait_for_timeout(1500)
            found[name] = [
                f"{v['impact']} {v['id']}: {node['html'][:140]} | {node['failureSummary'][:200]}"
                for v in Axe().run(self.page).response["violations"]
                if v["impact"] in ("serious", "critical")
                for node in v["nodes"][:3]
            ]
        return {name: said for name, said in found.items() if said}

    def width(self) -> int:
        """Pixels that the page is wide, which are more than the window's where something sticks out."""
        return int(self.page.evaluate("document.documentElement.scrollWidth"))


@contextlib.contextmanager
def window(browser: Any, bench: Workbench, **options: Any) -> Iterator[Window]:
    """A window with cookies of its own, which no window before it has left a recipe."""
    (bench.workspace / "draft.yaml").unlink(missing_ok=True)
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
    context.set_default_timeout(60_000)
    opened = Window(context.new_page(), bench)
    opened.listen()
    try:
        yield opened
    finally:
        context.close()
