"""The work itself in Chromium, with real training of the tiny model, and what may happen while it goes on."""

from __future__ import annotations

import csv
import json
import os
import re
import time
from pathlib import Path

import pytest

pytest.importorskip("gradio")

from browser_of_tests import PAGES, WHILE_TRAINING, Workbench, window

from tunesmith import api
from tunesmith.compose import compose
from tunesmith.training.run import open_run

pytestmark = pytest.mark.web

SHORT = """
model: {base: tiny}
method: {kind: %s}
adapter: {kind: lora, rank: 4}
training: {num_epochs: 1, max_steps: %s, per_device_train_batch_size: 4, logging_steps: 1, save_steps: 1000,
  eval_steps: 1000}
data: {max_length: 128}
evaluation: {max_items: 6, max_new_tokens: 8, resamples: 100}
"""


@pytest.fixture
def work(tmp_path):
    """A workbench of one's own."""
    started = Workbench(tmp_path / "w")
    yield started
    started.end()
    from tunesmith.ui.jobs import Queue
    from tunesmith.ui.workspace import Workspace

    queue = Queue(Workspace(started.workspace).jobs)
    for job in queue.jobs():
        if job.is_open:
            queue.stop(job.id)
            if job.pid:
                os.kill(job.pid, 9)


def rows(place: Path, number: int = 40) -> Path:
    """A table whose columns say nothing to a machine."""
    file = place / "lampen.csv"
    with file.open("w", newline="", encoding="utf-8") as out:
        write = csv.writer(out)
        write.writerow(["nr", "frage", "erwiderung"])
        for n in range(number):
            write.writerow([n, f"How long does lamp number {n} burn?", f"Lamp {n} burns for {n * 10} hours."])
    return file


def pairs(place: Path, number: int = 40) -> Path:
    """Preferences."""
    file = place / "pairs.jsonl"
    file.write_text(
        "".join(
            json.dumps(
                {
                    "prompt": f"Is lamp {n} bright?",
                    "chosen": f"Yes, lamp {n} is bright.",
                    "rejected": "No idea.",
                }
            )
            + "\n"
            for n in range(number)
        )
    )
    return file


def set_up(opened, tmp_path, data: Path, method: str = "sft", steps: int = 6) -> None:
    """Import a recipe, upload the data."""
    opened.open()
    recipe = tmp_path / f"{method}.yaml"
    # The answers that PPO draws have to fit beside their prompts.
    recipe.write_text(SHORT % (f"{method}, max_new_tokens: 8" if method == "ppo" else method, steps))
    opened.go("Recipe")
    with opened.page.expect_file_chooser() as chooser:
        opened.click("recipe-import")
    chooser.value.set_files(str(recipe))
    opened.says("recipe-said", "imported")
    opened.go("Data")
    opened.page.locator("#data-upload input[type=file]").set_input_files(str(data))
    opened.says("data-state", "rows with")


def train(opened, name: str, *, wait: bool = True) -> None:
    """Start a run, and wait for its end."""
    opened.go("Train")
    opened.fill("train-name", name)
    opened.says("train-command", "")
    opened.page.wait_for_timeout(800)
    opened.click("train-start")
    opened.says("train-told", "queued")
    if wait:
        assert "done" in opened.says("train-status", "done|failed|died", within=240_000)


def proved_asked_and_merged(opened, run: str, question: str) -> None:
    """What follows a training: its scores and answers, a question to both models, whole weights."""
    opened.go("Evaluate")
    opened.says("evaluate-verdict", r"n=\d+")
    opened.says("evaluate-answers", "Lamp|lamp")
    opened.go("Chat")
    opened.fill("chat-question", question)
    opened.click("chat-send")
    opened.says("chat-talk", re.escape(question))
    opened.page.locator("#chat-talk [role=log]:not([aria-busy])").wait_for(timeout=WHILE_TRAINING)
    said = opened.page.locator("#chat-talk .ts-answer p")
    assert any(said.nth(side).inner_text().strip() for side in (0, 1))
    opened.go("Ship")
    opened.click("ship-merge")
    opened.says("ship-made", f"{run}-merged: passed its check")


def stopped_in_the_middle(opened) -> None:
    """What was written stays and nothing follows it; the next question is answered; a new talk is empty."""
    said = opened.page.locator("#chat-talk .ts-answer p")

    def ask_for_long_answers() -> None:
        opened.fill("chat-length", "2048")
        opened.fill("chat-temperature", "1")
        opened.fill("chat-question", "And all the other lamps?")
        opened.click("chat-send")
        said.filter(has_text=re.compile(r"\w+\s+\w+")).first.wait_for()

    opened.go("Chat")
    opened.click("chat-new")
    opened.says("chat-talk", "No question yet")
    opened.page.get_by_role("button", name="Parameters").click()
    ask_for_long_answers()
    opened.click("chat-stop")
    opened.says("chat-told", "Stopped: these answers are not whole")
    assert not opened.page.locator("#chat-talk [aria-busy]").count()
    left = said.all_inner_texts()
    assert any(left)
    opened.page.wait_for_timeout(1500)
    assert said.all_inner_texts() == left
    assert opened.page.locator("#chat-prefer-tuned").is_disabled()
    opened.fill("chat-length", "16")
    opened.fill("chat-question", "And lamp number 5?")
    opened.click("chat-send")
    opened.says("chat-talk", r"other lamps\?[\s\S]*number 5\?")
    opened.page.locator("#chat-talk [role=log]:not([aria-busy])").wait_for(timeout=WHILE_TRAINING)
    assert "Stopped" not in opened.page.locator("#chat-told").inner_text()
    ask_for_long_answers()
    opened.click("chat-new")
    opened.says("chat-talk", "No question yet")
    opened.page.wait_for_timeout(1500)
    assert "lamp" not in opened.says("chat-talk", "No question yet")


def endless_run(runs: Path, tokenizer) -> None:
    """A run whose base and tuned model write for as long as they may: no token that ends a turn can be drawn."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=4096, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 10.0  # every state points there, and the ends point away
        model.lm_head.weight[tokenizer.all_special_ids, 0] = -100.0
    run = runs / "talk"
    for folder in (runs.parent / "uploads" / "endless", run / "final_model"):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    (run / "recipe.yaml").write_text(f"model: {{base: {runs.parent / 'uploads' / 'endless'}}}\n")
    (run / "environment.json").write_text("{}")


@pytest.mark.thorough
def test_a_chat_is_stopped_in_the_middle(browser, work, tiny_tokenizer):
    endless_run(work.workspace / "runs", tiny_tokenizer)
    with window(browser, work) as opened:
        opened.open()
        stopped_in_the_middle(opened)
        opened.check()


@pytest.mark.thorough
def test_from_a_table_to_a_merged_model(browser, work, tmp_path):
    with window(browser, work) as opened:
        set_up(opened, tmp_path, rows(tmp_path))
        # The columns are in no language that is known.
        opened.says("data-state", "fit no known format")
        opened.pick("data-question", "frage")
        opened.says("data-command", "frage")
        opened.pick("data-answer", "erwiderung")
        assert "40 rows" in opened.says("data-state", "Read as")
        opened.click("data-check")
        opened.says("data-report", "40 rows")
        opened.says("data-ledger-box", "40 rows")
        assert opened.page.locator("#data-seen .ts-trained").count() > 0
        assert "lampen.csv" in opened.page.locator("#data-command").inner_text()
        opened.go("Plan")
        opened.page.get_by_role("button", name="Plan", exact=False).locator("visible=true").last.click()
        train(opened, "lamps")
        run = work.workspace / "runs" / "lamps"
        assert open_run(run).state() == "done"

        proved_asked_and_merged(opened, "lamps", "How long does lamp number 3 burn?")
        opened.click("ship-bundle")
        opened.says("ship-made", "lamps-deployment")

        opened.go("Runs")
        opened.says("runs-table", "lamps")
        opened.check()
    # With something on every page, at every width.
    for scheme in ("light", "dark"):
        with window(browser, work, color_scheme=scheme) as opened:
            opened.open()
            for width in (1920, 1280, 390):
                opened.page.set_viewport_size({"width": width, "height": 900})
                found = opened.faults(*PAGES)
                assert not found, f"{scheme}, {width}: {json.dumps(found, indent=1)}"
                assert opened.width() <= width


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["dpo", "ppo"])
def test_preferences_and_rewards(browser, work, tmp_path, method):
    with window(browser, work) as opened:
        set_up(opened, tmp_path, pairs(tmp_path) if method == "dpo" else rows(tmp_path), method, 3)
        if method == "ppo":
            opened.pick("data-question", "frage")
            opened.says("data-command", "frage")
            opened.pick("data-answer", "erwiderung")
        opened.says("data-state", "Read as")
        train(opened, f"lamps-{method}")
        proved_asked_and_merged(opened, f"lamps-{method}", "Is lamp 3 bright?")
        opened.check()
    assert open_run(work.workspace / "runs" / f"lamps-{method}").state() == "done"


@pytest.mark.thorough
def test_nothing_that_happens_to_page_or_server_reaches_the_training(browser, work, tmp_path):
    with window(browser, work) as opened:
        set_up(opened, tmp_path, rows(tmp_path, 200), steps=400)
        opened.pick("data-question", "frage")
        opened.says("data-command", "frage")
        opened.pick("data-answer", "erwiderung")
        opened.says("data-state", "Read as")
        train(opened, "long", wait=False)
        opened.says("train-status", "step")
        # Fifty clicks are one job, also where the name is free: there is none.
        opened.fill("train-name", "")
        opened.page.wait_for_timeout(800)
        opened.page.locator("button#train-start").evaluate(
            "button => { for (let n = 0; n < 50; n++) button.click() }"
        )
        opened.page.wait_for_timeout(1500)
        jobs = sorted((work.workspace / "jobs").glob("0*.json"))
        first = json.loads(jobs[0].read_text())
        assert first["state"] == "running"
        assert len(jobs) == 1
        opened.says("train-told", "in the queue already")
        before = step_of(opened)
        opened.page.reload()
        opened.page.get_by_role("tab", name="Data", exact=True).wait_for()
    # The browser is closed; the server is killed.
    work.kill()
    pid = first["pid"]
    assert os.path.exists(f"/proc/{pid}")
    time.sleep(2)
    assert os.path.exists(f"/proc/{pid}"), "it goes on without anybody"
    work.start()
    with window(browser, work) as opened, window(browser, work) as second:
        for each in (opened, second):
            each.open()
            each.go("Train")
            each.says("train-status", "step")
        assert step_of(opened) > before
        opened.click("train-stop")
        opened.says("train-told", "Asked to stop")
        opened.says("train-status", "interrupted|stopped|stopping")
        deadline = time.monotonic() + 60
        while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
            time.sleep(0.2)
        saved = list((work.workspace / "runs" / "long").rglob("*.safetensors"))
        assert saved, "stopping saves"
        opened.page.locator("button#train-resume:not([disabled])").wait_for()
        opened.click("train-resume")
        opened.says("train-told", "queued")
        opened.says("train-status", "running")
        opened.check()


def step_of(opened) -> int:
    """The step that the Train page shows."""
    said = opened.says("train-status", "step")
    return int(re.search(r"([\d,]+) of", said)[1].replace(",", ""))


PAYLOADS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(2)>",
    "<svg/onload=alert(3)>",
    "<iframe srcdoc='<script>alert(4)</script>'></iframe>",
    "[link](javascript:alert(5))",
    "![x](http://canary.invalid/p.png)",
    "<a href='javascript:alert(6)'>x</a>",
    "<img src='http://canary.invalid/i.png'>",
    "\"><script src='http://canary.invalid/x.js'></script>",
    "<style>@import 'http://canary.invalid/c.css'</style>",
    "<details open ontoggle=alert(7)>",
    "<math><mtext></p><img src onerror=alert(8)>",
    "{{7*7}}<b>${alert(9)}</b>",
    "<body onload=alert(10)>",
    "<form action=http://canary.invalid><button>x",
    "<base href='http://canary.invalid/'>",
    "<meta http-equiv=refresh content='0;url=http://canary.invalid/'>",
    "\x1b[31mred\x1b]0;title\x07",
    "\u202egnp.exe",
    "=cmd|' /C calc'!A0",
    "<object data='http://canary.invalid/'>",
    "<link rel=stylesheet href='http://canary.invalid/s.css'>",
    "<!--><script>alert(11)</script>-->",
    "<input autofocus onfocus=alert(12)>",
    "`<script>alert(13)</script>`",
    "$$\\href{javascript:alert(14)}{x}$$",
    "<video><source onerror=alert(15)>",
    "<marquee onstart=alert(16)>",
    "</textarea><script>alert(17)</script>",
    "</style><script>alert(18)</script>",
    "&lt;script&gt;alert(19)&lt;/script&gt;",
    "<a href='&#106;avascript:alert(22)'>x</a>",
    "<iframe src='javascript:alert(23)'></iframe>",
    "<embed src='http://canary.invalid/e'>",
    "<audio src=x onerror=alert(24)>",
    "<img srcset='http://canary.invalid/s.png 1x'>",
    "<svg><animate onbegin=alert(25) attributeName=x dur=1s>",
    "<svg><script>alert(26)</script></svg>",
    "<svg><use href='http://canary.invalid/u.svg#x'></use></svg>",
    "<template><script>alert(27)</script></template>",
    "<noscript><p title='</noscript><img src=x onerror=alert(28)>'></noscript>",
    "<img src=x:alert(alt) onerror=eval(src) alt=29>",
    "<div style='background:url(http://canary.invalid/b.png)'>",
    "<div style='width:expression(alert(30))'>",
    "<select autofocus onfocus=alert(31)>",
    "<isindex type=image src=1 onerror=alert(32)>",
    "<keygen autofocus onfocus=alert(33)>",
    "<script src='//canary.invalid/p.js'></script>",
    "<scr<script>ipt>alert(34)</scr</script>ipt>",
    "<SCRIPT>alert(35)</SCRIPT>",
    "<img\tsrc=x\nonerror=alert(36)>",
    "<img src='x' onerror='alert(37)'/>",
    "[x]: javascript:alert(38)\n[click][x]",
    "![a](x 'b\" onerror=\"alert(39)')",
    "<javascript:alert(40)>",
    "```html\n<script>alert(41)</script>\n```",
    "\\(\\href{javascript:alert(42)}{x}\\)",
    "<b onmouseover=alert(43)>hover</b>",
    "<dialog open onclose=alert(44)>",
    "<portal src='http://canary.invalid/'>",
    "<object type=text/html data='javascript:alert(45)'></object>",
    "<a href='http://canary.invalid/' ping='http://canary.invalid/ping'>x</a>",
    "<input type=image src='http://canary.invalid/i'>",
]


def test_nothing_in_data_is_carried_out(browser, bench, tmp_path):
    file = tmp_path / "<img src=x onerror=alert(0)>.jsonl"
    lines = [{"question": f"{bad} question", "answer": f"answer {bad}", bad: bad} for bad in PAYLOADS]
    file.write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + "{broken <script>alert(99)</script>\n"
    )
    whole = tmp_path / "whole.jsonl"
    whole.write_text(
        "".join(
            json.dumps({"question": f"{b} q {n}", "answer": f"a {n} {b}"}) + "\n"
            for n, b in enumerate(PAYLOADS * 3)
        )
    )
    with window(browser, bench) as opened:
        opened.open()
        for data in (file, whole):
            opened.page.locator("#data-upload input[type=file]").set_input_files(str(data))
            opened.page.wait_for_timeout(3000)
            opened.click("data-check")
            opened.page.wait_for_timeout(6000)
            remove = opened.page.locator(
                "#data-upload button[aria-label='Clear'], #data-upload button[aria-label='Remove']"
            )
            if remove.count():
                remove.first.click()
        opened.says("data-report", "rows")
        opened.go("Recipe")
        opened.fill("recipe-model-base", "<img src=x onerror=alert(20)>")
        opened.page.wait_for_timeout(2000)
        opened.go("Train")
        opened.fill("train-name", "<img src=x onerror=alert(21)>")
        opened.page.wait_for_timeout(500)
        opened.click("train-start")
        opened.page.wait_for_timeout(2000)
        opened.fill("train-name", "'; touch " + str(tmp_path / "touched") + "; '")
        opened.page.wait_for_timeout(500)
        opened.click("train-start")
        opened.page.wait_for_timeout(2000)
        assert not opened.dialogs
        assert not opened.elsewhere
        assert (
            opened.page.evaluate("document.querySelectorAll('img[onerror], svg[onload], iframe').length") == 0
        )
    assert not (tmp_path / "touched").exists()


@pytest.mark.thorough
def test_nothing_that_a_run_says_is_carried_out(browser, work, tmp_path):
    """In samples, log, answers, names and the chat."""
    data = work.workspace / "uploads" / "bad.jsonl"
    data.parent.mkdir(exist_ok=True)
    data.write_text(
        "".join(json.dumps({"question": f"{b} {n}", "answer": b}) + "\n" for n, b in enumerate(PAYLOADS * 2))
    )
    layer = {
        "model": {"base": "tiny"}, "adapter": {"kind": "lora"}, "name": "<img src=x onerror=alert(50)>",
        "data": {"dataset": str(data), "input_text_key": "question", "output_text_key": "answer"},
        "training": {"max_steps": 2, "per_device_train_batch_size": 4}, "output_dir": str(work.workspace / "runs"),
        "evaluation": {"max_items": 20, "max_new_tokens": 4, "resamples": 100},
    }  # fmt: skip
    run = open_run(api.train(compose(layer).recipe).run)
    with (run.path / "events.jsonl").open("a") as log:
        for bad in PAYLOADS:
            log.write(json.dumps({"kind": "sample", "step": 2, "prompt": bad, "completion": bad}) + "\n")
            log.write(json.dumps({"kind": "warning", "step": None, "message": bad}) + "\n")
    rows = run.path / "evaluation" / "rows.jsonl"
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    rows.write_text(
        "".join(json.dumps({**line, "output": PAYLOADS[n % 60]}) + "\n" for n, line in enumerate(lines))
    )
    with window(browser, work) as opened:
        opened.open()
        opened.go("Train")
        opened.says("train-samples", re.escape(PAYLOADS[-1]))
        opened.page.get_by_role("button", name="Log").click()
        opened.go("Evaluate")
        opened.says("evaluate-answers", "canary|alert")
        opened.page.locator("#evaluate-answers .table-wrap").click(position={"x": 200, "y": 90})
        opened.page.locator("#evaluate-left textarea:visible").wait_for()
        opened.go("Chat")
        opened.fill("chat-question", " ".join(PAYLOADS[:20]))
        opened.click("chat-send")
        opened.page.locator("#chat-talk [role=log]:not([aria-busy])").wait_for(timeout=WHILE_TRAINING)
        opened.go("Ship")
        opened.click("ship-merge")
        opened.says("ship-made", "merged")
        opened.go("Runs")
        opened.says("runs-table", "onerror")
        opened.page.wait_for_timeout(1000)
        opened.check()
        bad = "img[onerror], svg[onload], iframe:not([title]), embed, object, portal, dialog, [ping]"
        assert opened.page.evaluate("bad => document.querySelectorAll(bad).length", bad) == 0


@pytest.mark.thorough
def test_a_phone_is_enough(browser, work, tmp_path):
    with window(
        browser, work, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True
    ) as opened:
        set_up(opened, tmp_path, pairs(tmp_path), "dpo", 2)
        opened.says("data-state", "Read as")
        train(opened, "phone")
        assert opened.width() <= 390
        proved_asked_and_merged(opened, "phone", "Is lamp 3 bright?")
        assert opened.width() <= 390
        opened.check()
