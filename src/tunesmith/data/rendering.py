"""Chat templates of strangers, rendered where they can do no harm.

A template is a program that came with a model and runs once a row. Jinja's sandbox keeps it from Python's own names,
not from looping for ever or filling the memory. So it runs in a process of its own, in which time, memory and files
are limited, and which is ended when it goes beyond. `install` gives every caller of transformers' chat templates that
process; templates that are our own run here.

The process reads requests as lines of JSON and answers each with one: `{"texts": [...]}` or `{"error": [kind, said,
line]}`. It is the same file, started as a program: it imports Jinja and nothing else of ours.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

SECONDS = 2.0
"""Processor time of one rendering at most."""
PATIENCE = 60.0
"""Seconds of the clock, for a machine that has no processor time to give."""
MEMORY = 512 * 2**20
"""Bytes of memory of the process at most, beside what the rows themselves take."""
LARGEST_TEXT, TIMES = 2**20, 4
"""Characters of a rendered text at most, and how many times what went in where that is more."""
LARGEST_SOURCE = 2**20
"""Characters of a template at most; those in the wild have some ten thousand."""
STRIKES = 3
"""Rows that a template may exhaust the process with before it is not asked again."""
FILES = 16
"""Files the process may have open."""
FROM_OUTSIDE = {
    -getattr(signal, name) for name in ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)
}
"""How a process ends that somebody else ended: none of its limits ends it so."""

_OWN: set[str] = set()
"""Templates that ship with tunesmith: they are known to end."""


def trust(source: str) -> None:
    """Have a template of our own run in this process."""
    _OWN.add(source)


class Template:
    """A stranger's template, with the one method that transformers uses of Jinja's."""

    def __init__(self, source: str) -> None:
        self.source = source

    def render(self, **values: Any) -> str:
        """The text. Raises jinja2's errors, and TemplateError where a limit was met."""
        return self.render_all([values])[0]

    def render_all(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """The texts of several rows in one request."""
        import jinja2

        if _strikes[self.source] >= STRIKES:
            raise jinja2.TemplateError(f"it went beyond its limits for {STRIKES} rows and is not asked again")
        try:
            reply = _worker.ask(self.source, rows)
        except _Beyond as error:
            _strikes[self.source] += 1
            raise jinja2.TemplateError(str(error)) from None
        if "texts" in reply:
            texts: list[str] = reply["texts"]
            return texts
        kind, said, line = reply["error"]
        if kind == "Limit":
            _strikes[self.source] += 1
        if kind == "TemplateSyntaxError":
            raise jinja2.TemplateSyntaxError(said, line)
        if kind in ("TypeError", "ValueError", "AttributeError"):
            raise {"TypeError": TypeError, "ValueError": ValueError}.get(kind, AttributeError)(said)
        raise getattr(jinja2.exceptions, kind, jinja2.TemplateError)(said)

    @property
    def environment(self) -> Any:
        """What parses the source for transformers, which looks in it for the tokens it writes."""
        return _environment()


_strikes: Counter[str] = Counter()


def is_exhausting(source: str) -> bool:
    """Whether a template has gone beyond its limits."""
    return _strikes[source] > 0


_stock: list[Callable[[str], Any]] = []
"""transformers' own function, once it was replaced."""


def template(source: str) -> Any:
    """A template that can be rendered: of Jinja's own kind where the source is ours."""
    return _stock[0](source) if source in _OWN else Template(source)


def install() -> None:
    """Have transformers, and all that renders through it, use this module's templates."""
    from transformers.utils import chat_template_utils

    from tunesmith.assets import TINY_MODEL

    if chat_template_utils._compile_jinja_template is template:
        return
    _stock[:] = [chat_template_utils._compile_jinja_template]
    chat_template_utils._compile_jinja_template = template
    trust((TINY_MODEL / "chat_template.jinja").read_text(encoding="utf-8"))


class _Beyond(Exception):
    """The process met a limit."""


class _Ended(_Beyond):
    """The process is gone."""


class _Worker:
    """The process, started when it is first needed, and again after it was ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> subprocess.Popen[bytes] | None:
        """The process that runs now, if one does."""
        return self._process

    def ask(self, source: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        # What no JSON can hold (a date of a Parquet column) is written as Python writes it.
        asked = {"source": source, "seconds": SECONDS, "rows": rows}
        request = json.dumps(asked, default=str).encode() + b"\n"
        with self._lock:
            process = self._process or self._started()
            try:
                return self._reply(process, request)
            except _Ended:
                self.end()
                if process.returncode not in FROM_OUTSIDE:
                    raise
            except BaseException:
                self.end()
                raise
            try:  # who ended it (a shell, the system for want of memory) meant no row of this template
                return self._reply(self._started(), request)
            except BaseException:
                self.end()
                raise

    def _started(self) -> subprocess.Popen[bytes]:
        import jinja2
        import markupsafe

        # No environment variable, so no key in one; nothing is imported but these two packages.
        folders = [
            os.path.dirname(os.path.dirname(str(package.__file__))) for package in (jinja2, markupsafe)
        ]
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", __file__, *dict.fromkeys(folders)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            bufsize=0,
        )
        return self._process

    def _reply(self, process: subprocess.Popen[bytes], request: bytes) -> dict[str, Any]:
        assert process.stdin
        assert process.stdout
        too_long = f"it took more than {SECONDS} seconds or {MEMORY // 2**20} MiB for one row"
        # However large the request is: the other side reads all of it before it writes.
        try:
            left = memoryview(request)
            while left:
                left = left[os.write(process.stdin.fileno(), left) :]
            end = time.monotonic() + PATIENCE
            parts: list[bytes] = []
            while not parts or not parts[-1].endswith(b"\n"):
                if os.name == "posix":  # elsewhere pipes cannot be waited for
                    waiting = select.poll()
                    waiting.register(process.stdout, select.POLLIN)
                    if not waiting.poll(1000 * max(0.0, end - time.monotonic())):
                        raise _Beyond(too_long)
                parts.append(os.read(process.stdout.fileno(), 1 << 20))
                if not parts[-1]:
                    raise _Ended(too_long)
        except BrokenPipeError:
            raise _Ended(too_long) from None
        reply: dict[str, Any] = json.loads(b"".join(parts))
        return reply

    def end(self) -> None:
        """End the process, if there is one."""
        if self._process:
            self._process.kill()
            self._process.wait()
        self._closed()

    def forget(self) -> None:
        """Leave the process to the one that started it: this one is a fork of that."""
        self._lock = threading.Lock()
        if self._process:
            self._process.returncode = 0  # it is no child of ours to wait for
        self._closed()

    def _closed(self) -> None:
        process, self._process = self._process, None
        for pipe in (process.stdin, process.stdout) if process else ():
            with contextlib.suppress(OSError):
                if pipe:
                    pipe.close()


_worker = _Worker()
atexit.register(_worker.end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_worker.forget)


# From here on: what the process does.


def _environment() -> Any:
    """Jinja as transformers sets it up for chat templates."""
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`, which marks an answer, and writes what is in it."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    class Namespace(jinja2.utils.Namespace):
        """Of Jinja, without names that begin with `_`."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            self, given = args[0], dict(*args[1:], **kwargs)
            for name in given:
                _check(name)
            jinja2.utils.Namespace.__init__(self, given)

        def __setitem__(self, name: str, value: Any) -> None:
            _check(name)
            jinja2.utils.Namespace.__setitem__(self, name, value)

    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace takes no name such as {name!r}")

    class Dict:
        """`dict`, which leads nowhere else."""

        def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict(*args, **kwargs)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args)

    def raise_exception(message: Any) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    def strftime_now(form: str) -> str:
        return datetime.datetime.now().strftime(form)

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    made.filters["tojson"] = tojson
    made.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "dict": Dict(),
        "namespace": Namespace,
    }
    return made


def _limited() -> None:
    """Give this process little memory, few files, and no file to write; Windows has no such limits."""
    try:
        import resource
    except ImportError:
        return
    limits = {"FSIZE": 0, "NPROC": 0, "CORE": 0, "NOFILE": FILES, "AS": MEMORY}
    for name, value in limits.items():
        with contextlib.suppress(OSError, ValueError, AttributeError):  # what a system does not know
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def _end_after(seconds: float) -> None:
    """End this process where it takes more processor time than that; 0 for no end."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _answered(line: bytes, environment: Any, compiled: dict[str, Any]) -> dict[str, Any]:
    from jinja2 import TemplateError

    largest = max(LARGEST_TEXT, TIMES * len(line))
    try:
        request = json.loads(line)
        source, rows = request["source"], request["rows"]
        if len(source) > LARGEST_SOURCE:
            raise MemoryError
        if source not in compiled:
            _end_after(request["seconds"])
            compiled.clear()
            compiled[source] = environment.from_string(source)
        texts = []
        for row in rows:
            _end_after(request["seconds"])
            text = compiled[source].render(**row)
            if len(text) > largest:
                return {"error": ["Limit", f"it wrote {len(text):,} characters, above {largest:,}", 0]}
            texts.append(text)
        return {"texts": texts}
    except (MemoryError, RecursionError, OverflowError) as error:
        return {"error": ["Limit", f"it went beyond its limits ({type(error).__name__})", 0]}
    except Exception as error:
        kind = type(error).__name__
        known = isinstance(error, TemplateError | TypeError | ValueError | AttributeError)
        said = (error.message or "") if isinstance(error, TemplateError) else str(error)
        return {"error": [kind if known else "TemplateError", said[:500], getattr(error, "lineno", 0) or 0]}


def _serve() -> None:
    environment, compiled = _environment(), dict[str, Any]()
    import jinja2.compiler
    import jinja2.runtime  # noqa: F401

    environment.from_string("{% for a in [1] %}{{ a|tojson }}{% endfor %}").render()
    _limited()
    for line in sys.stdin.buffer:
        reply = json.dumps(_answered(line, environment, compiled)).encode() + b"\n"
        _end_after(0)
        sys.stdout.buffer.write(reply)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.path[:0] = sys.argv[1:]
    _serve()
