"""Runs the benchmarks and rewrites the measured table of docs/benchmarks.md from the JSON lines that they end with.

A benchmark is a file of this folder whose last line is one JSON object; one that ends otherwise, or fails, is said and
keeps its row. `--only` names some; `--kept` takes the lines of an earlier run (benchmarks/results.jsonl) as they are.

    python benchmarks/run_all.py --only startup,memory
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs/benchmarks.md"
KEPT = HERE / "results.jsonl"
BEGIN, END = "<!-- measured: begin (make bench) -->", "<!-- measured: end -->"
NO_BENCHMARKS = {"run_all", "chat_rows", "training"}
"""Files of this folder that measure nothing themselves."""


def figures(found: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """Names and values of a result, one level within another."""
    for name, value in found.items():
        label = f"{above}{name}".replace("_", " ")
        if isinstance(value, Mapping):
            yield from figures(value, f"{label}: ")
        elif isinstance(value, int | float | str) and name not in (
            "benchmark",
            "command",
            "seconds_taken",
            "at",
        ):
            yield f"{label} {value:,.4g}" if isinstance(value, float) else f"{label} {value}"


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of the page."""
    lines = ["| benchmark | measured | took | result |", "| --- | --- | --- | --- |"]
    for name, found in sorted(results.items()):
        text = "; ".join(figures(found["result"])).replace("|", "\\|")
        lines.append(f"| `benchmarks/{name}.py` | {found['at']} | {found['took']:.0f} s | {text} |")
    return "\n".join(lines)


def rewritten(page: str, results: Mapping[str, Mapping[str, Any]]) -> str:
    """The page with its table made anew; at the end of the page where it has none yet."""
    block = f"{BEGIN}\n{table(results)}\n{END}"
    if BEGIN not in page:
        return f"{page.rstrip()}\n\n## Measured by `make bench`\n\n{block}\n"
    before, _, rest = page.partition(BEGIN)
    return before + block + rest.partition(END)[2]


def measured(file: Path) -> dict[str, Any] | None:
    """The result of one benchmark; None, with what was wrong said, where there is none."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    try:
        # One that misses a bar leaves with 1 behind its line, which is as true.
        found = json.loads(lines[-1]) if lines and done.returncode in (0, 1) else None
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        print(
            f"{file.name}: no result (exit code {done.returncode}; {' '.join(said)[:200]})", file=sys.stderr
        )
        return None
    if done.returncode:
        print(
            f"{file.name}: {'; '.join(line for line in done.stderr.splitlines() if 'MISSED' in line)}",
            file=sys.stderr,
        )
    at = f"{time.strftime('%Y-%m-%d')}, {platform.machine()}"
    return {"name": file.stem, "at": at, "took": time.perf_counter() - started, "result": found}


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
