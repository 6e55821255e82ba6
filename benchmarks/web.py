"""CPU of `tunesmith web` while twenty browsers watch one run that trains; how soon its pages are there.

The run's log is written by this program: first 100,000 steps, then one every half second. Chromium opens it on the
Train page, alone, twice, each time in a window without a cache and with a server that has read nothing: in a page that
stands the run is chosen from the list, beside one of ten steps, until its loss curve is drawn, which is what the log
takes; and in a page whose tabs have just appeared Train is clicked, which is that with all that Gradio and Plotly have
still to do. First paint is Chromium's own `first-contentful-paint`. Then the request with which that page looks at the
run is sent by twenty clients, each in a session of its own and every two seconds as the page does (twenty windows that
draw would keep a small machine from asking that often); what the server takes is its process's CPU time. The last line
is one JSON object; exit status 1 above half a core, or above 2 seconds for one of the others (but the short run). Needs
Chromium (apt-get install chromium).

    python benchmarks/web.py --windows 20 --seconds 30
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "ui"))

from browser_of_tests import FLAGS, Window, Workbench, chromium, window

CORES, SECONDS = 0.5, 2.0
LOOKING = "gradio_api/run"
"""In the address of what a page asks each time that it looks."""
EVERY = 2.0
"""Seconds between two looks of a page."""
REST = 6.0
"""Seconds after which a page that was opened has nothing more to do."""


def step(number: int) -> str:
    """A step's event as a run writes it."""
    event = {
        "kind": "step", "time": 1.7e9 + number, "step": number, "loss": 3.0 / (1 + number / 500) + number % 7 / 50,
        "learning_rate": 1e-4 * (1 - number / 200_000), "grad_norm": 1.0 + number % 5 / 10,
        "token_accuracy": min(0.9, number / 100_000), "tokens": number * 4096, "seconds": number * 0.4,
        "memory": 1_200_000_000, "epoch": number / 1000,
    }  # fmt: skip
    return json.dumps(event) + "\n"


def write_run(folder: Path, steps: int) -> Path:
    """A run that has taken so many steps of twice as many; gives its log."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("model: {base: tiny}\n", encoding="utf-8")
    (folder / "environment.json").write_text("{}", encoding="utf-8")
    log = folder / "events.jsonl"
    begun = {"kind": "state", "state": "training", "time": 1.7e9, "step": 0, "total_steps": 2 * steps}
    with log.open("w", encoding="utf-8") as file:
        file.write(json.dumps(begun) + "\n")
        file.writelines(step(number) for number in range(1, steps + 1))
    return log


def seconds_to_open(opened: Window) -> tuple[float, float]:
    """From the click on Train to its loss curve, and how much of that the server computes."""
    before, began = cpu_seconds(opened.bench), time.perf_counter()
    opened.go("Train")
    opened.page.locator("#train-plot-loss .js-plotly-plot .scatterlayer .trace").first.wait_for()
    return time.perf_counter() - began, cpu_seconds(opened.bench) - before


def seconds_to_choose(opened: Window, run: str) -> tuple[float, float]:
    """From the choice of a run on the Train page to its loss curve, and how long the page's main thread computes."""
    page, drawn = opened.page, "#train-plot-loss .scatterlayer .trace .lines path"
    one_before = page.locator(drawn).first.element_handle()
    asked = page.context.new_cdp_session(page)
    asked.send("Performance.enable", {"timeDomain": "threadTicks"})
    page.locator("#train-run input").first.click()
    choice = page.locator("#train-run").get_by_role("option", name=run, exact=True)
    choice.wait_for()
    before, began = thread_seconds(asked), time.perf_counter()
    choice.click()
    page.wait_for_function(
        "([old, at]) => { const now = document.querySelector(at); return now !== old && now?.getAttribute('d'); }",
        arg=[one_before, drawn],
    )
    took = time.perf_counter() - began
    return took, thread_seconds(asked) - before


def thread_seconds(asked: Any) -> float:
    """CPU time that a page's main thread has taken so far."""
    told = asked.send("Performance.getMetrics")["metrics"]
    return float(next(one["value"] for one in told if one["name"] == "TaskDuration"))


def cpu_seconds(bench: Workbench) -> float:
    """CPU time that the server has taken so far."""
    taken = psutil.Process(bench.process.pid).cpu_times()
    return float(taken.user + taken.system)


def main() -> int:
    """Measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=30.0, help="how long they watch")
    parser.add_argument("--steps", type=int, default=100_000, help="of the log that is opened")
    parser.add_argument("--times", type=int, default=3, help="starts of the server for the seconds")
    args = parser.parse_args()
    if chromium() is None:
        sys.exit("There is no Chromium here (apt-get install chromium).")
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory(prefix="web-") as made, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        log = write_run(Path(made) / "w" / "runs" / "long", args.steps)
        write_run(Path(made) / "two" / "runs" / "long", args.steps)
        write_run(Path(made) / "two" / "runs" / "short", 10)
        opening, painted, chosen = [], [], {"short": [], "long": []}
        for turn in range(args.times):
            bench = Workbench(Path(made) / "w")  # afresh, so that the log is read anew
            try:
                with window(browser, bench) as opened:
                    opened.open()
                    painted.append(
                        opened.page.evaluate(
                            "performance.getEntriesByName('first-contentful-paint')[0].startTime / 1000"
                        )
                    )
                    opening.append(seconds_to_open(opened))
                    opened.check()
                if turn == args.times - 1:
                    cores, looks = watched(browser, bench, log, args.windows, args.seconds, args.steps)
            finally:
                bench.end()
            bench = Workbench(Path(made) / "two")
            try:
                with window(browser, bench) as opened:
                    opened.open()
                    opened.page.wait_for_timeout(1000 * REST)
                    seconds_to_open(opened)
                    first = opened.page.locator("#train-run input").first.input_value()
                    opened.page.wait_for_timeout(1000 * REST)
                    assert first == "short", "the newest run is the one that is shown at first"
                    for run in ("long", "short"):
                        chosen[run].append(seconds_to_choose(opened, run))
                        opened.page.wait_for_timeout(1000 * EVERY)
            finally:
                bench.end()
        browser.close()
    shown = (
        (
            f"seconds until a log of {args.steps} steps is drawn that is chosen in a page that stands",
            statistics.median(s for s, _ in chosen["long"]),
        ),
        ("the same from a click on Train as soon as it is there", statistics.median(s for s, _ in opening)),
        ("seconds until the first paint", statistics.median(painted)),
    )
    for name, value in shown:
        missed = ": MISSED" if value > SECONDS else ""
        print(f"{name}: {value:.2f}, at most {SECONDS:g} wanted{missed}", file=sys.stderr)
    for run, found in chosen.items():
        took, cpu = (statistics.median(one) for one in zip(*found, strict=True))
        print(
            f"the {run} run chosen: {took:.2f} s, {cpu:.2f} s of them CPU of the page, no bar",
            file=sys.stderr,
        )
    server = statistics.median(cpu for _, cpu in opening)
    print(f"CPU seconds of the server for that log: {server:.2f}, no bar", file=sys.stderr)
    print(f"looks of all windows in a second: {looks:.1f}, no bar", file=sys.stderr)
    result = {
        "name": "web",
        "ours": round(cores, 3),
        "peer": None,
        "ratio": None,
        "unit": "cores",
        "n": args.windows,
    }
    print(json.dumps(result))
    return int(cores > CORES or any(value > SECONDS for _, value in shown))


def watched(
    browser: object, bench: Workbench, log: Path, windows: int, seconds: float, steps: int
) -> tuple[float, float]:
    """The server's CPU seconds in a second, and how often in a second it was asked, while all look at the run."""
    over, asked, ready = threading.Event(), [], threading.Barrier(windows + 1, timeout=120)

    def train() -> None:
        number = steps
        while not over.wait(0.5):
            number += 1
            with log.open("a", encoding="utf-8") as file:
                file.write(step(number))

    with window(browser, bench, viewport={"width": 800, "height": 600}) as opened:
        sent: list[tuple[str, str]] = []
        opened.page.on(
            "request",
            lambda one: sent.append((one.url, one.post_data)) if LOOKING in one.url else None,
        )
        opened.open()
        opened.go("Train")
        opened.page.locator("#train-plot-loss .js-plotly-plot").first.wait_for()
        opened.page.wait_for_timeout(1000 * 4 * EVERY)
        # What is asked again and again, and not what the page asks once when it is opened.
        [(function, _)] = Counter(json.loads(body)["fn_index"] for _, body in sent).most_common(1)
        url, body = next(one for one in reversed(sent) if json.loads(one[1])["fn_index"] == function)
        kept = {cookie["name"]: cookie["value"] for cookie in opened.page.context.cookies()}

    def watch(number: int) -> None:
        look = {**json.loads(body), "session_hash": f"watcher{number}"}
        with httpx.Client(cookies=kept, headers={"origin": bench.url.rstrip("/")}, timeout=60) as client:
            for place, told in sent:  # a session knows the choices that it was sent, and takes no others
                client.post(place, json={**json.loads(told), "session_hash": look["session_hash"]})
            ready.wait()
            while not over.wait(EVERY - (time.monotonic() - EVERY * number / windows) % EVERY):
                found = client.post(url, json=look)
                assert found.status_code == 200, found.text
                asked.append(len(found.content))

    threads = [threading.Thread(target=watch, args=(number,)) for number in range(windows)]
    threads.append(threading.Thread(target=train))
    for thread in threads:
        thread.start()
    try:
        ready.wait()
        time.sleep(2 * EVERY)  # the first look of each has everything to fetch
        asked.clear()
        before, began = cpu_seconds(bench), time.perf_counter()
        time.sleep(seconds)
        used, took = cpu_seconds(bench) - before, time.perf_counter() - began
        number, size = len(asked), sum(asked)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert number, "nobody looked"
    print(f"a look is {size / number / 1000:.0f} kB, no bar", file=sys.stderr)
    return used / took, number / took


if __name__ == "__main__":
    sys.exit(main())
