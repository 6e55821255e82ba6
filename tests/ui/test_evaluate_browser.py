"""Evaluate and Recipe in Chromium: compare, a judge and its cost before the start, the radar, files out and in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("gradio")

from browser_of_tests import Workbench, window

from tunesmith import api
from tunesmith.compose import compose

pytestmark = [pytest.mark.web, pytest.mark.thorough]


def judge(number, body):
    """An endpoint that finds the first answer better, and gives a 7 or an 8."""
    from judge_servers import openai

    is_pair = "[[A]]" in json.dumps(body)
    return openai("Because.\nVerdict: [[A]]" if is_pair else f"Because.\nRating: [[{7 + number % 2}]]")


def test_two_models_are_compared_and_a_judge_says_first_what_it_takes(browser, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "evaluation" / "judging"))
    from judge_servers import serving

    layer = {
        "task": "instruct", "model": {"base": "tiny"}, "data": {"dataset": "example:support", "max_rows": 60},
        "training": {"max_steps": 3, "per_device_train_batch_size": 4}, "name": "first", "adapter": {"kind": "lora"},
        "evaluation": {"max_items": 6, "max_new_tokens": 8, "resamples": 100}, "output_dir": str(tmp_path / "w/runs"),
    }  # fmt: skip
    api.train(compose(layer).recipe)
    asked = tmp_path / "questions.jsonl"
    asked.write_text(
        "".join(
            json.dumps({"question_id": n, "category": c, "turns": [f"What is {c}?", "And in short?"]}) + "\n"
            for n, c in enumerate(("writing", "math", "coding", "stem"))
        )
    )
    bench = Workbench(tmp_path / "w")
    try:
        with serving(judge) as (url, _), window(browser, bench) as opened:
            page = opened.page
            settings = tmp_path / "judge.yaml"
            settings.write_text(f"model: stub\nbase_url: {url}\nprice_input: 1\nprice_output: 2\n")
            opened.open()
            opened.go("Evaluate")
            opened.says("evaluate-verdict", r"n=\d+ questions")

            page.get_by_role("button", name="Compare two models").click()
            opened.click("evaluate-compare")
            opened.says("evaluate-told", "Compare tiny with first: queued")
            opened.says("evaluate-job", "Compare tiny with first: done")
            opened.pick("evaluate-place", "tiny against first")
            opened.says("evaluate-scores", "[Rr][Oo][Uu][Gg][Ee]")

            page.get_by_role("button", name="Let a judge decide").click()
            for file in (settings, asked):
                with page.expect_file_chooser() as chooser:
                    opened.click("evaluate-upload")
                chooser.value.set_files(str(file))
                opened.says("evaluate-told", f"{file.name} is in your workspace")
            assert page.locator("#evaluate-judge-start").is_disabled()
            opened.click("evaluate-cost")
            opened.says("evaluate-told", r"It would take[\s\S]*Nobody was asked yet")
            page.locator("#evaluate-judge-start:not([disabled])").click()
            opened.says("evaluate-job", "Judge first: done")

            assert page.locator("#evaluate-suite-start").is_disabled()
            opened.click("evaluate-suite-cost")
            opened.says("evaluate-told", r"at most[\s\S]*calls[\s\S]*Nobody was asked yet")
            page.locator("#evaluate-suite-start:not([disabled])").click()
            opened.says("evaluate-job", "mt-bench for first: done")
            opened.pick("evaluate-place", "its base against it")
            opened.says("evaluate-verdict", "Judged by stub")
            opened.pick("evaluate-plot-choice", "Radar")
            page.locator(
                "#evaluate-plot .js-plotly-plot .scatterpolar, #evaluate-plot .polarlayer"
            ).first.wait_for()
            opened.check()
    finally:
        bench.end()


def test_a_recipe_is_kept_exported_and_imported_and_expert_view_has_more(browser, bench, tmp_path):
    with window(browser, bench) as opened:
        page = opened.page
        opened.open()
        opened.go("Recipe")
        page.locator("#recipe-training-learning_rate").wait_for()
        assert not page.locator("#recipe-training-scheduler").count()
        page.get_by_label("Expert").check()
        page.locator("#recipe-training-scheduler").wait_for()
        opened.fill("recipe-training-max_steps", "7")
        opened.says("recipe-yaml", "max_steps: 7")
        opened.click("recipe-keep")
        opened.says("recipe-said", "is kept")
        with page.expect_download() as download:
            page.locator("#recipe-export").click()
        kept = tmp_path / "kept.yaml"
        download.value.save_as(kept)
        assert "max_steps: 7" in kept.read_text()
        opened.click("recipe-clear")
        opened.says("recipe-yaml", "Nothing is set")
        with page.expect_file_chooser() as chooser:
            opened.click("recipe-import")
        chooser.value.set_files(str(kept))
        opened.says("recipe-yaml", "max_steps: 7")
        opened.check()
