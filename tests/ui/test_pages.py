"""Every page in Chromium: readable by everybody, on a phone, without anybody else's help."""

from __future__ import annotations

import json
import time

import pytest

pytest.importorskip("gradio")

from browser_of_tests import PAGES, Workbench, window

pytestmark = pytest.mark.web


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1920)])
def test_axe_finds_nothing_serious_on_any_page(browser, bench, scheme, width):
    with window(browser, bench, color_scheme=scheme, viewport={"width": width, "height": 900}) as opened:
        opened.open()
        found = opened.faults(*PAGES)
        assert not found, json.dumps(found, indent=1)
        opened.check()


@pytest.mark.parametrize("width", [390, *(pytest.param(w, marks=pytest.mark.thorough) for w in (1280, 1920))])
def test_no_page_is_wider_than_its_window(browser, bench, width):
    with window(browser, bench, viewport={"width": width, "height": 844}) as opened:
        opened.open()
        wide = {}
        for name in PAGES:
            opened.go(name)
            opened.page.wait_for_timeout(500)
            if opened.width() > width:
                wide[name] = opened.width()
        assert not wide
        opened.check()


def test_the_first_page_is_there_in_two_seconds(browser, bench):
    with window(browser, bench) as opened:
        opened.open()
    with window(browser, bench) as opened:
        opened.open()
        painted = opened.page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    assert painted < 2000


def test_every_control_has_a_name_and_the_keyboard_reaches_the_tabs(browser, bench):
    with window(browser, bench) as opened:
        opened.open()
        nameless = opened.page.evaluate(
            """() => [...document.querySelectorAll('button, input, select, textarea')]
            .filter(e => e.offsetParent && !e.hidden && e.type !== 'hidden' && e.tabIndex >= 0)
            .filter(e => !(e.getAttribute('aria-label') || e.labels?.length || e.textContent.trim()
              || e.title || e.getAttribute('aria-labelledby')))
            .map(e => e.outerHTML.slice(0, 200))"""
        )
        assert not nameless
        opened.page.locator("#page-data-button").focus()
        opened.page.keyboard.press("Tab")
        opened.page.keyboard.press("Enter")
        opened.page.locator("#page-recipe").wait_for(state="visible")
        outline = opened.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid"


def test_a_stranger_sees_no_page(browser, bench):
    with window(browser, bench) as opened:
        opened.page.goto(bench.url)
        assert "Open the address" in opened.page.locator("body").inner_text()
        opened.page.goto(bench.url + "?token=wrong")
        assert "another start" in opened.page.locator("body").inner_text()


def test_two_users_see_their_own_work(browser, tmp_path):
    from tunesmith.ui import accounts

    file = tmp_path / "users.json"
    for name in ("ann", "bob"):
        accounts.add(file, name, f"password of {name}")
    bench = Workbench(tmp_path / "w", "--users", str(file))
    try:
        with window(browser, bench) as ann, window(browser, bench) as bob:
            for name, opened in (("ann", ann), ("bob", bob)):
                opened.page.goto(bench.url)
                opened.page.get_by_label("Name").fill(name)
                opened.page.get_by_label("Password").fill(f"password of {name}")
                opened.page.get_by_role("button", name="Sign in").click()
                opened.page.get_by_role("tab", name="Data", exact=True).wait_for(timeout=60_000)
            folder = bench.workspace / "users"
            run = folder / "ann" / "runs" / "of-ann-only"
            run.mkdir(parents=True)
            for name in ("recipe.yaml", "environment.json"):
                (run / name).write_text("{}")
            assert "Sign out" in ann.page.locator("#header").inner_text()
            ann.go("Runs")
            ann.says("runs-table", "of-ann-only")
            bob.go("Runs")
            time.sleep(3)  # longer than a page takes to look again
            assert "of-ann-only" not in bob.page.content()
            ann.page.get_by_role("button", name="Sign out").click()
            ann.page.get_by_label("Password").wait_for()
            for opened in (ann, bob):
                assert not opened.dialogs
                assert not opened.elsewhere
    finally:
        bench.end()
