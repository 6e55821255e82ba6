"""Files that may hold anything, drawn by hypothesis, and how many rows other readers than ours count in them."""

from __future__ import annotations

import csv
import io
import json

import pyarrow as arrow
import pyarrow.parquet as parquet
from hypothesis import strategies as st

from tunesmith.data.formats import FORMATS

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
