"""From a start to a merged model in Chromium, with the server killed on the way and the browser closed."""

from __future__ import annotations

import json
import time

import pytest

pytest.importorskip("gradio")

from browser_of_tests import Workbench, window

from tunesmith.ui.jobs import Queue
from tunesmith.ui.workspace import Workspace

pytestmark = pytest.mark.web

RECIPE = """
task: instruct
model: {base: tiny}
data: {dataset: "example:support", max_rows: 60, max_length: 256}
adapter: {kind: lora, rank: 4}
training: {max_steps: 40, learning_rate: 3e-3, per_device_train_batch_size: 4, logging_steps: 1, eval_steps: 20,
  save_steps: 20}
evaluation: {max_items: 10, max_new_tokens: 16, resamples: 200}
"""


def test_a_training_outlives_server_and_browser_and_is_evaluated_asked_and_merged(browser, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    bench = Workbench(tmp_path / "w")
    try:
        with window(browser, bench) as opened:
            opened.open()
            opened.go("Recipe")
            with opened.page.expect_file_chooser() as chooser:
                opened.click("recipe-import")
            chooser.value.set_files(str(recipe))
            opened.says("recipe-yaml", "example:support")
            opened.go("Train")
            opened.fill("train-name", "first")
            opened.click("train-start")
            opened.says("train-told", "queued")
            opened.says("train-status", "of 40")
            opened.check()
        [job] = Queue(Workspace(bench.workspace).jobs).jobs()
        assert job.is_alive()
        bench.kill()
        time.sleep(0.5)
        assert job.is_alive(), "the job does not die with the server"
        port = bench.url.rstrip("/").rpartition(":")[2]
        bench.start(port)
        with window(browser, bench) as opened:
            opened.open()
            opened.go("Train")
            opened.says("train-status", "done")
            assert "40 of 40" in opened.says("train-status", "of 40")
            assert opened.page.locator(
                "#train-plot-loss .js-plotly-plot, #train-plot-loss .main-svg"
            ).first.is_visible()
            opened.go("Evaluate")
            opened.says("evaluate-verdict", r"n=\d+ questions")
            opened.says("evaluate-count", r"(\d+) of \1 answers")
            opened.go("Chat")
            opened.fill("chat-question", "My parcel is late <b>now</b>")
            opened.click("chat-send")
            opened.page.locator("#chat-talk [role=log]:not([aria-busy])").wait_for(timeout=120_000)
            assert "<b>now</b>" in opened.says("chat-talk", "parcel")
            opened.click("chat-prefer-tuned")
            opened.says("chat-told", "Kept")
            [pair] = (bench.workspace / "chats" / "preferences.jsonl").read_text().splitlines()
            assert json.loads(pair)["prompt"][-1]["content"] == "My parcel is late <b>now</b>"
            opened.page.get_by_role("button", name="What you preferred").click()
            opened.click("chat-use")
            opened.says("recipe-yaml", r"preferences\.jsonl[\s\S]*kind: dpo")
            opened.says("recipe-state", "The recipe fits")
            opened.go("Ship")
            opened.click("ship-merge")
            opened.says("ship-made", "first-merged: passed its check")
            opened.go("Runs")
            opened.says("runs-about", "1 run: ")
            opened.page.get_by_role("button", name="Delete and undo").click()
            opened.click("runs-delete")
            opened.says("runs-told", "in the trash")
            until = time.monotonic() + 30
            while (bench.workspace / "runs" / "first").exists() and time.monotonic() < until:
                time.sleep(0.1)
            opened.click("runs-undo")
            opened.says("runs-told", "back among the runs")
            assert (bench.workspace / "runs" / "first").is_dir()
            opened.check()
    finally:
        bench.end()
