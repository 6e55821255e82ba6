"""Runs the benchmarks and rewrites the measured table of docs/benchmarks.md from the JSON lines that they end with.

A benchmark is a file of this folder whose last line is one JSON object of the form `FORM`; `peer` and `ratio` are null
where there is no peer. An exit status of 1 beside such a line says that a bar was missed, and so does the table. One
that ends otherwise, or fails, is said and keeps its row. `--only` names some; `--kept` takes the lines of an earlier
run (benchmarks/results.jsonl) as they are. LLAMAFACTORY_PYTHON names the Python of an environment with LLaMA-Factory.

    python benchmarks/run_all.py --only startup,memory
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs/benchmarks.md"
KEPT = HERE / "results.jsonl"
BEGIN, END = "<!-- measured: begin (make bench) -->", "<!-- measured: end -->"
NO_BENCHMARKS = {"run_all", "chat_rows", "training"}
"""Files of this folder that measure nothing themselves."""
FORM = ("name", "ours", "peer", "ratio", "unit", "n")
"""What the last line of a benchmark has: of the same unit ours and the best peer's, how many times better ours is (or,
where nothing is to be better, how many times as large), and on how many measurements or items that rests."""


def figure(value: object) -> str:
    """A cell of the table."""
    text = "none" if value is None else f"{value:,.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|")


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of the page."""
    lines = [
        "| benchmark | ours | peer | ratio | unit | n | bar | measured | took |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in sorted(results.items()):
        cells = [figure(found["result"][key]) for key in FORM[1:]]
        bar = "missed" if found["missed"] else "held"
        cells += [bar, found["at"], f"{found['took']:.0f} s"]
        lines.append(f"| `benchmarks/{name}.py` | {' | '.join(cells)} |")
    return "\n".join(lines)


def rewritten(page: str, results: Mapping[str, Mapping[str, Any]]) -> str:
    """The page with its table made anew; at the end of the page where it has none yet."""
    block = f"{BEGIN}\n{table(results)}\n{END}"
    if BEGIN not in page:
        return f"{page.rstrip()}\n\n## Measured by `make bench`\n\n{block}\n"
    before, _, rest = page.partition(BEGIN)
    return before + block + rest.partition(END)[2]


def result_of(output: str) -> dict[str, Any] | None:
    """The last line of what a benchmark printed, where that has the form; what it has more is left out."""
    lines = output.strip().splitlines()
    try:
        found = json.loads(lines[-1]) if lines else None
    except json.JSONDecodeError:
        return None
    if not isinstance(found, dict) or not found.keys() >= set(FORM):
        return None
    return {key: found[key] for key in FORM}


def measured(file: Path) -> dict[str, Any] | None:
    """The result of one benchmark; None, with what was wrong said, where there is none."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, str(file)], stdout=subprocess.PIPE, text=True, check=False)
    found = result_of(done.stdout)
    if found is None or done.returncode not in (0, 1):
        said = " ".join(done.stdout.strip().splitlines()[-1:])[:200]
        print(f"{file.name}: no result (exit code {done.returncode}; {said})", file=sys.stderr)
        return None
    at, took = f"{time.strftime('%Y-%m-%d')}, {platform.machine()}", time.perf_counter() - started
    return {"name": file.stem, "at": at, "took": took, "missed": bool(done.returncode), "result": found}


def main() -> None:
    """Run, keep the lines, write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="names with commas between them")
    parser.add_argument(
        "--kept", action="store_true", help="run nothing, write the table from the kept lines"
    )
    args = parser.parse_args()
    known = {file.stem: file for file in sorted(HERE.glob("*.py")) if file.stem not in NO_BENCHMARKS}
    wanted = args.only.split(",") if args.only else list(known)
    if unknown := [name for name in wanted if name not in known]:
        sys.exit(f"no benchmark {', '.join(unknown)}; known: {', '.join(known)}")
    lines = KEPT.read_text(encoding="utf-8").splitlines() if KEPT.exists() else []
    results = {found["name"]: found for found in map(json.loads, lines)}
    for name in () if args.kept else wanted:
        print(name, file=sys.stderr, flush=True)
        if found := measured(known[name]):
            results[name] = found
            kept = "".join(json.dumps(results[key]) + "\n" for key in sorted(results))
            KEPT.write_text(kept, encoding="utf-8")
    if results:
        PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main()
