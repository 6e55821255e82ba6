"""Data, Recipe and Plan in Chromium: upload, map columns, check, choose a method, mend an error, plan."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("gradio")

from browser_of_tests import window

pytestmark = pytest.mark.web
HOSTILE = "<img src=x onerror=alert(1)>{{constructor}}"


def choose(opened, id: str, word: str) -> None:
    """Choose a word of a list, as somebody does who reads it."""
    opened.page.locator(f"#{id} input").first.click()
    opened.page.locator(f"#{id}").get_by_role("option", name=word, exact=True).click()


def test_from_an_upload_to_a_plan(bench, browser, tmp_path):
    file = tmp_path / "odd.jsonl"
    rows = [{"frage": f"what is {n} {HOSTILE}", "antwort": f"it is {n} {HOSTILE}"} for n in range(60)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with window(browser, bench) as opened:
        page = opened.page
        opened.open()
        wrong = tmp_path / "odd.xlsx"
        wrong.write_bytes(b"PK")
        zone = page.locator("#data-upload input[type=file]")
        zone.set_input_files(wrong)
        page.locator(".ts-refused", has_text="Only .csv").wait_for()
        assert "Error" not in page.locator("#data-upload").inner_text()
        zone.set_input_files(file)
        page.locator(".ts-refused").wait_for(state="detached")
        opened.says("data-state", "fit no known format")
        choose(opened, "data-question", "frage")
        choose(opened, "data-answer", "antwort")
        opened.says("data-state", "Read as")
        opened.click("data-check")
        opened.says("data-report", "60 rows = ")
        assert HOSTILE in opened.says("data-seen", "odd.jsonl")
        assert "60 rows = " in opened.says("data-ledger-box", "rows")
        page.locator("#data-lengths .js-plotly-plot").wait_for()

        opened.go("Recipe")
        opened.says("recipe-yaml", "input_text_key: frage")
        choose(opened, "recipe-method-kind", "dpo")
        opened.says("recipe-yaml", "kind: dpo")
        page.locator("#recipe-method-beta").wait_for()
        assert page.locator("#recipe-method-label_smoothing").count() == 0
        choose(opened, "recipe-method-kind", "sft")
        page.locator("#recipe-method-beta").wait_for(state="detached")
        choose(opened, "recipe-adapter-kind", "lora")
        page.locator("#recipe-adapter-rank").wait_for()
        opened.fill("recipe-training-max_steps", "-3")
        page.locator("#recipe-training-max_steps", has_text="has to be greater than 0").wait_for()
        opened.says("recipe-state", "does not fit yet")
        opened.fill("recipe-training-max_steps", "3")
        opened.says("recipe-state", "The recipe fits")
        opened.says("recipe-command", "--lora.* --max-steps 3")

        page.locator("#recipe-section-data > button").click()
        opened.fill("recipe-data-max_length", "256")
        opened.says("recipe-yaml", "max_length: 256")
        opened.click("recipe-plan")
        opened.says("plan-state", "It fits")
        opened.says("plan-batch", r"Micro-batch: \d")
        page.locator("#plan-memory .js-plotly-plot").wait_for()
        opened.says("plan-command", "tunesmith plan ")

        opened.click("plan-onward")
        command = "document.querySelector('#train-command textarea')?.value.startsWith('tunesmith train ')"
        page.wait_for_function(command)
        page.wait_for_timeout(1000)
        with page.expect_request(lambda asked: "/gradio_api/run/" in asked.url):
            pass  # a page to which a button led looks at its run as well

        page.reload()
        opened.says("data-state", "odd.jsonl: 60 rows")
        assert "Not checked yet" in opened.says("data-report", "checked")
        opened.go("Recipe")
        opened.says("recipe-yaml", "max_length: 256")
        opened.says("recipe-yaml", "input_text_key: frage")
        page.locator("#recipe-training-max_steps").wait_for()
        assert page.locator("#recipe-training-max_steps :is(input, textarea)").input_value() == "3"
        opened.check()


def test_a_phone_shows_all_of_the_form(bench, browser):
    with window(browser, bench, viewport={"width": 390, "height": 844}) as opened:
        opened.open()
        opened.go("Recipe")
        opened.page.locator("#recipe-training-learning_rate").wait_for()
        opened.page.get_by_label("Expert").check()
        opened.page.locator("#recipe-training-scheduler").wait_for()
        assert opened.width() <= 390
        opened.check()
