"""Runs the benchmarks and rewrites the measured table of docs/benchmarks.md from the JSON lines that they end with.

A benchmark is a file of this folder whose last line is one JSON object of the form `FORM`; `peer` and `ratio` are null
where there is no peer. It is run once for each list of arguments in its constant `VARIANTS`, or once without any. Lines
on stderr of the form `EXTRA` are kept beside its result. An exit status of 1 beside such a result says that a bar was
missed, and so does the table. One that ends otherwise, or fails, is said and keeps its row.

`--only` names files or single variants (a variant's arguments follow its name); `--resume` leaves out what was measured
today with the same source; `--kept` runs nothing. Results are kept in benchmarks/results.jsonl, which is part of the
repository, as the table comes from it.
LLAMAFACTORY_PYTHON names the Python of an environment with LLaMA-Factory.

    python benchmarks/run_all.py --only startup,memory
    python benchmarks/run_all.py --only "sft_short_chat --lora" --resume
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import platform
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
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
EXTRA = re.compile(
    r"(?P<name>.+): (?P<value>-?[\d.,]+( to -?[\d.,]+)?), "
    r"((?P<word>at least|at most) (?P<bar>[\d.,]+) wanted(?P<missed>: MISSED)?|no bar)"
)
"""What else a benchmark measured: on stderr `NAME: VALUE, at least BAR wanted`, or `NAME: VALUE, no bar`."""
SHARED = ("chat_rows", "training", "sft_short_chat")
"""Files of this folder that others are made of."""


def figure(value: object) -> str:
    """A cell of the table."""
    text = "none" if value is None else f"{value:,.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|")


def title(name: str, arguments: Sequence[str]) -> str:
    """What one row of the table is called."""
    return " ".join([name, *arguments])


def also(line: str) -> str | None:
    """An extra in the words of the table; None where a line is none."""
    found = EXTRA.fullmatch(line.strip())
    if not found:
        return None
    bar = f" ({found['word']} {found['bar']}{', missed' if found['missed'] else ''})" if found["bar"] else ""
    return f"{found['name']} {found['value']}{bar}"


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of the page."""
    lines = [
        "| benchmark | ours | peer | ratio | unit | n | bar | measured | of code | took | also |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for _, found in sorted(results.items()):
        cells = [figure(found["result"][key]) for key in FORM[1:]]
        bar = "missed" if found["missed"] else "held"
        extras = [told for line in found["extras"] if (told := also(line))]
        cells += [
            bar,
            found["at"],
            figure(found.get("code")),
            f"{found['took']:.0f} s",
            figure("; ".join(extras)),
        ]
        named = title(f"benchmarks/{found['name']}.py", found["arguments"])
        lines.append(f"| `{named}` | {' | '.join(cells)} |")
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


def variants(file: Path) -> list[list[str]]:
    """The lists of arguments that a benchmark is run with: its constant `VARIANTS`, else none."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["VARIANTS"]:
            found: list[list[str]] = ast.literal_eval(node.value)
            return found
    return [[]]


def source(file: Path) -> str:
    """The version of tunesmith, and a digest of its source, the benchmark's and that of what several share."""
    return (
        f"{version('tunesmith')} {_digest([*_code(), *(HERE / f'{name}.py' for name in SHARED), file])[:12]}"
    )


def _code() -> list[Path]:
    return sorted((HERE.parent / "src").rglob("*.py"))


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for each in files:
        digest.update(each.name.encode() + b"\0" + each.read_bytes())
    return digest.hexdigest()


def measured(file: Path, arguments: Sequence[str] = ()) -> dict[str, Any] | None:
    """The result of one benchmark; None, with what was wrong said, where there is none."""
    started, version_then, day = time.perf_counter(), source(file), today()
    code = _digest(_code())[:6]
    extras: list[str] = []
    with subprocess.Popen(
        [sys.executable, str(file), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        said, told = process.stdout, process.stderr
        assert said
        assert told

        def listen() -> None:
            for line in told:
                sys.stderr.write(line)
                sys.stderr.flush()
                if EXTRA.fullmatch(line.strip()):
                    extras.append(line.strip())

        listener = threading.Thread(target=listen)
        listener.start()
        output = said.read()
        listener.join()
    found = result_of(output)
    if found is None or process.returncode not in (0, 1):
        last = " ".join(output.strip().splitlines()[-1:])[:200]
        called = title(file.name, arguments)
        print(f"{called}: no result (exit code {process.returncode}; {last})", file=sys.stderr)
        return None
    return {
        "name": file.stem, "arguments": list(arguments), "at": f"{day}, {platform.machine()}",
        "source": version_then, "code": code, "took": time.perf_counter() - started, "missed": bool(process.returncode),
        "result": found, "extras": extras,
    }  # fmt: skip


def today() -> str:
    """The day of a measurement."""
    return time.strftime("%Y-%m-%d")


def is_current(found: Mapping[str, Any] | None, file: Path) -> bool:
    """Whether a kept result is of today, of this machine's kind and of the same source."""
    at = f"{today()}, {platform.machine()}"
    return found is not None and (found["at"], found["source"]) == (at, source(file))


def chosen(only: str | None, known: Mapping[str, tuple[Path, list[str]]]) -> list[str]:
    """The titles that are wanted: those of a file, or one alone. Leaves with the known ones where a name is none."""
    if not only:
        return list(known)
    wanted = only.split(",")
    files = {name: [t for t, (file, _) in known.items() if file.stem == name] for name in wanted}
    titles = {name: [name] if " " in name and name in known else files[name] for name in wanted}
    if unknown := [name for name in wanted if not titles[name]]:
        sys.exit(f"no benchmark {', '.join(unknown)}; known: {', '.join(known)}")
    return [each for name in wanted for each in titles[name]]


def main() -> None:
    """Run, keep the lines, write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="names, or names with their arguments, with commas between them")
    parser.add_argument("--resume", action="store_true", help="without what was measured today already")
    parser.add_argument(
        "--kept", action="store_true", help="run nothing, write the table from the kept lines"
    )
    args = parser.parse_args()
    known = {
        title(file.stem, arguments): (file, arguments)
        for file in sorted(HERE.glob("*.py"))
        if file.stem not in NO_BENCHMARKS
        for arguments in variants(file)
    }
    wanted = chosen(args.only, known)
    lines = KEPT.read_text(encoding="utf-8").splitlines() if KEPT.exists() else []
    results = {title(found["name"], found["arguments"]): found for found in map(json.loads, lines)}
    for name in () if args.kept else wanted:
        file, arguments = known[name]
        if args.resume and is_current(results.get(name), file):
            print(f"{name}: measured today", file=sys.stderr, flush=True)
            continue
        print(name, file=sys.stderr, flush=True)
        if found := measured(file, arguments):
            results[name] = found
            kept = "".join(json.dumps(results[key]) + "\n" for key in sorted(results))
            KEPT.write_text(kept, encoding="utf-8")
            PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")
    if args.kept and results:
        PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main()
