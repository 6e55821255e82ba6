"""Files that may hold anything, drawn by hypothesis; what other readers than ours make of them; and the judge of how
ours takes them: every row is accepted or rejected, and every error has its file and its line."""

from __future__ import annotations

import csv
import io
import json
import re

import pyarrow as arrow
import pyarrow.parquet as parquet
from hypothesis import strategies as st

from tunesmith import api, data
from tunesmith.data.formats import FORMATS
from tunesmith.data.sources import DEEPEST, BrokenRows
from tunesmith.errors import TunesmithError
from tunesmith.recipe import Data

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "tool_calls", "x"]), inner, max_size=4
        )
    ),
    max_leaves=8,
)
NAMES = sorted({name for f in FORMATS.values() for names in f.columns for name in names})
columns = st.sampled_from([*NAMES, "x", "tools", "system", "input"])
mixed = st.dictionaries(columns, values, max_size=4)
shaped = st.sampled_from([f.sample for f in FORMATS.values()])
records = st.lists(mixed | shaped | st.builds(lambda a, b: {**a, **b}, shaped, mixed), max_size=12)


def as_lines(rows):
    return "\n".join(json.dumps(row) for row in rows).encode()


def as_csv(rows):
    names = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, names)
    writer.writeheader()
    for row in rows:
        writer.writerow({name: str(value) for name, value in row.items()})
    return out.getvalue().encode("utf-8", "surrogatepass")


def as_parquet(rows):
    out = io.BytesIO()
    try:
        parquet.write_table(arrow.Table.from_pylist(rows), out)
    except (arrow.ArrowException, ValueError, OverflowError, TypeError):  # columns of mixed types
        rows = [
            {name: str(value).encode("ascii", "replace").decode() for name, value in row.items()}
            for row in rows
        ]
        parquet.write_table(arrow.Table.from_pylist(rows), out)
    return out.getvalue()


@st.composite
def files(draw):
    """A suffix and bytes: a proper file, one with a part damaged, or anything at all."""
    suffix = draw(st.sampled_from([".jsonl", ".json", ".csv", ".parquet", ".txt"]))
    make = {
        ".jsonl": as_lines, ".json": lambda rows: json.dumps(rows).encode(), ".csv": as_csv, ".parquet": as_parquet,
        ".txt": as_lines,
    }[suffix]  # fmt: skip
    content = draw(records.map(make) | st.binary(max_size=200))
    if content and draw(st.booleans()):
        at = draw(st.integers(0, len(content) - 1))
        content = content[:at] + draw(st.binary(max_size=6)) + content[at + draw(st.integers(0, 4)) :]
    return suffix, content


def rows_of(path):
    """Rows of a file, counted by other readers than ours; None where these cannot read it to its end."""
    content = path.read_bytes()
    if path.suffix == ".parquet":
        try:
            table = parquet.read_table(path)
            return table.num_rows if table.schema.names else 0  # a name that is not UTF-8 raises
        except (arrow.ArrowException, OSError, ValueError):
            return None
    if path.suffix in (".jsonl", ".txt"):
        return sum(not _is_blank(line, n) for n, line in enumerate(content.split(b"\n")))
    if path.suffix == ".json":
        try:
            value = json.loads(content.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            return None
        return len(value) if isinstance(value, list) else None
    text = content.decode("utf-8-sig", "surrogateescape")
    if not set(text) <= set(PLAIN_CSV):
        return None  # which separator a file has is a guess where there are several
    if text.lstrip().startswith(("{", "[")):
        return None  # JSON under a wrong name, whose first line is no header for us
    try:
        return max(
            sum(bool(cells) for cells in csv.reader(io.StringIO(text, newline=""), strict=True)) - 1, 0
        )
    except csv.Error:
        return None


PLAIN_CSV = "".join(chr(n) for n in range(32, 127) if chr(n) not in ";|") + "\r\n"


def _is_blank(line, number):
    try:
        text = (line if number else line.removeprefix(b"\xef\xbb\xbf")).decode()
    except UnicodeDecodeError:
        return False
    return not text or text.isspace()


def numbers_of(path):
    """The numbers of a file's rows: of the lines where each row is one, else of the rows; None where nobody knows."""
    if path.suffix in (".jsonl", ".txt"):
        lines = enumerate(path.read_bytes().split(b"\n"))
        return [n + 1 for n, line in lines if not _is_blank(line, n)]
    counted = rows_of(path)
    return None if counted is None else list(range(1, counted + 1))


def broken_lines(path):
    """Numbers of the lines of a .jsonl or .txt file that are no row, by Python's own readers; None for other files."""
    if path.suffix not in (".jsonl", ".txt"):
        return None
    found = set()
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if _is_blank(line, number - 1):
            continue
        try:
            text = (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).decode()
            if path.suffix == ".jsonl":
                value = json.loads(text, object_pairs_hook=_once)
                if not isinstance(value, dict) or _levels(value) > DEEPEST:
                    found.add(number)
        except (ValueError, RecursionError):  # UnicodeDecodeError and JSONDecodeError are ValueErrors
            found.add(number)
    return found


def _once(pairs):
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key twice")
    return dict(pairs)


def _levels(value):
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(_levels, inner), default=0)


def lines_named(message, path):
    """Numbers of the lines that an error names: by a word, or behind the file's name; what is quoted of the file may
    hold `.5:7` as well."""
    places = re.findall(rf"\b(?:lines?|row|record) (\d+)|{re.escape(path.name)}(?:/\w+)?:(\d+)", message)
    return [int(one or other) for one, other in places]


OF_THE_WHOLE = re.compile(
    r"is not of a known format|has no rows|fit no known format|are of several kinds|None of the (\d+) rows of"
    r"|is not a Parquet file|A column's name in|holds no list of records"
)
"""Errors that are about no line: nothing is there, or all of it is of the wrong kind."""


def unplaced(message, path):
    """What is wrong with where an error says that something is: it names the file, and a line that the file has or
    why it is about all of it."""
    if path.name not in message:
        return [f"the file is not named: {message}"]
    wanted = OF_THE_WHOLE.search(message)
    if wanted:
        counted = rows_of(path)
        if wanted[1] and counted is not None and int(wanted[1]) != counted:
            return [f"{counted} rows are there: {message}"]
        return []
    named = lines_named(message, path)
    if not named:
        return [f"the line is not named: {message}"]
    last = max(len(path.read_bytes().splitlines()), path.read_bytes().count(b"\n") + 1, rows_of(path) or 0)
    return [] if all(0 < number <= last for number in named) else [f"there is no such line: {message}"]


def accounted(path):
    """What is wrong with how a data file is taken, a line each: accepted + rejected are its rows, by number and not
    only in sum, `validate` and `prepare` reject the same, and every error has its place."""
    counted, damaged = rows_of(path), broken_lines(path)
    try:
        report = api.validate(str(path)).as_dict()
    except TunesmithError as error:
        return [f"validate ends with an error: {error}"]
    rows, errors = report["rows"], [f for f in report["findings"] if f["severity"] == "error"]
    wrong = []
    if rows["rows"] != rows["ok"] + rows["with_errors"] + rows["with_warnings"]:
        wrong.append(f"validate accounts for {rows}")
    is_refused = any(
        f["kind"] == "unreadable" for f in report["findings"]
    )  # whole, and said so with the place
    if counted is not None and rows["rows"] != counted and not is_refused:
        wrong.append(f"validate counts {rows['rows']} rows of {counted}")
    of_file = [f for f in errors if f["kind"] in ("unreadable", "undetected")]
    of_rows = [f for f in errors if f not in of_file]
    for finding in of_rows:
        if not finding["row"] or finding["source"].partition("/")[0] != path.name:
            wrong.append(f"an error without its place: {finding}")
    for finding in of_file:
        wrong += unplaced(finding["message"], path)
    rejected = {(f["source"], f["row"]) for f in of_rows}
    alike = (
        any(f["kind"] == "undetected" for f in of_file) and rows["with_errors"] == rows["rows"]
    )  # said once of all
    if len(rejected) != rows["with_errors"] and not alike and len(errors) < report["limit"]:
        wrong.append(f"{rows['with_errors']} rows with errors, of which {len(rejected)} are named")
    broken = {(f["source"], f["row"]) for f in of_rows if f["kind"] in ("unparsable", "not_utf8")}
    if damaged is not None and {number for _, number in broken} != damaged:
        wrong.append(f"lines {sorted(damaged)} are no rows, and {sorted(broken)} are said to be none")
    try:
        entries = list(data.prepare(Data(dataset=str(path), cache=False)).ledger.entries)
    except TunesmithError as error:
        wrong += unplaced(str(error), path)
        if broken and not of_file:
            said = {(row["source"], row["row"]) for row in getattr(error, "details", {}).get("broken", ())}
            if (
                not isinstance(error, BrokenRows)
                or error.details["count"] != len(broken)
                or not said <= broken
            ):
                wrong.append(f"{sorted(broken)} are broken, and prepare says: {error}")
        if not errors:
            wrong.append(f"validate finds no error, and prepare says: {error}")
        return wrong
    if broken or of_file:
        wrong.append(f"prepare takes a file of which validate says: {errors}")
    places = [(entry.row.source, entry.row.number) for entry in entries]
    if len(set(places)) != len(places) or any(name.partition("/")[0] != path.name for name, _ in places):
        wrong.append(f"rows are named twice or by another name: {places}")
    numbers = numbers_of(path)
    if numbers is not None and [number for _, number in places] != numbers:
        wrong.append(f"rows {numbers} are there, and {places} are in the ledger")
    if len(places) != rows["rows"]:
        wrong.append(f"{len(places)} rows have a fate, of {rows['rows']}")
    fates = dict(zip(places, entries, strict=True))
    for entry in entries:
        if entry.fate not in ("train", "validation", "held_out", "dropped"):
            wrong.append(f"no fate: {entry}")
        if entry.fate == "dropped" and not entry.reason:
            wrong.append(f"dropped without a reason: {entry}")
    for finding in of_rows:  # half a character is found where it is tokenized
        place = (finding["source"], finding["row"])
        if finding["kind"] != "surrogate" and place in fates and fates[place].fate != "dropped":
            wrong.append(f"an error that is not dropped: {finding}")
    return wrong
