"""Objects of one process used from another: how tests reach a program that they do not trust.

The tests run in a judge, the program in a process of its own. Plain data crosses as copies, in JSON; arguments that
the program changed are changed for the judge as well. Whatever else there is (functions, generators, objects of the
program's classes) stays where it is, and the other side holds a `Remote`, whose every use is a question over the line.

The judge doubts what it is told. A program must not learn the wanted result and then agree with it, so plain data is
compared with plain data in the judge only, and what the tests read as a builtin is the judge's own. The program may
use what it was handed, but no name with which it could climb into the judge's frames. Read by `sandboxed.py` inside
the sandbox, which has the standard library only.
"""

from __future__ import annotations

import builtins
import importlib
import json
import math
import operator
import os
import sys
import types
from collections.abc import Callable
from typing import Any

MOST = 50_000_000
"""Bytes of one message."""
SEQUENCES: dict[str, type] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
BASES = (bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset)
PLAIN_FUNCTIONS = frozenset(
    ["abs", "all", "any", "ascii", "bin", "chr", "divmod", "format", "hash", "hex", "isinstance", "issubclass", "iter",
     "len", "max", "min", "next", "oct", "ord", "pow", "repr", "round", "sorted", "sum"]
)  # fmt: skip
"""Builtin functions that cross by name; the judge takes no others from a program."""
VALUES: dict[tuple[str, str], Callable[[Any], tuple[Any, ...]]] = {
    ("collections", "Counter"): lambda v: (dict(v),),
    ("collections", "OrderedDict"): lambda v: (list(v.items()),),
    ("collections", "defaultdict"): lambda v: (v.default_factory, dict(v)),
    ("collections", "deque"): lambda v: (list(v), v.maxlen),
    ("fractions", "Fraction"): lambda v: (v.numerator, v.denominator),
    ("decimal", "Decimal"): lambda v: (str(v),),
    ("datetime", "date"): lambda v: (v.year, v.month, v.day),
    ("datetime", "timedelta"): lambda v: (v.days, v.seconds, v.microseconds),
    ("datetime", "time"): lambda v: (v.hour, v.minute, v.second, v.microsecond),
    ("datetime", "datetime"): lambda v: (v.year, v.month, v.day, v.hour, v.minute, v.second, v.microsecond),
}
"""Values of the standard library that cross as copies, by the arguments that make them again."""
SINGLE = {"Ellipsis": Ellipsis, "NotImplemented": NotImplemented}
COMPARED = {name: getattr(operator, name) for name in ("lt", "le", "gt", "ge", "eq", "ne")}
ARITHMETIC = {
    name.strip("_"): getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "lshift", "rshift", "and_",
                 "or_", "xor")
}  # fmt: skip


def _mirrored(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda one, other: function(other, one)


BINARY: dict[str, Callable[[Any, Any], Any]] = {
    **COMPARED,
    **ARITHMETIC,
    **{f"r{name}": _mirrored(function) for name, function in ARITHMETIC.items()},
    "divmod": divmod,
}
OTHERS: dict[str, Callable[..., Any]] = {
    "bool": bool, "len": len, "iter": iter, "next": next, "repr": repr, "str": str, "hash": hash, "int": int,
    "float": float, "complex": complex, "index": operator.index, "neg": operator.neg, "pos": operator.pos,
    "abs": abs, "invert": operator.invert, "round": round, "trunc": math.trunc, "floor": math.floor,
    "ceil": math.ceil, "reversed": reversed, "format": format, "getitem": operator.getitem,
    "setitem": operator.setitem, "delitem": operator.delitem, "contains": operator.contains, "dir": dir,
    "bytes": bytes, "instancecheck": lambda kind, value: isinstance(value, kind),
    "subclasscheck": lambda kind, value: issubclass(value, kind),
    "enter": lambda value: value.__enter__(), "exit": lambda value, *facts: value.__exit__(*facts),
}  # fmt: skip
ATTRIBUTES: dict[str, Callable[..., Any]] = {"getattr": getattr, "setattr": setattr, "delattr": delattr}
NUMBERS = frozenset(
    ["bool", "len", "repr", "str", "hash", "int", "float", "complex", "index", "neg", "pos", "abs", "invert", "round",
     "trunc", "floor", "ceil", "format", "bytes"]
)  # fmt: skip
CLIMBING = ("_", "gi_", "cr_", "ag_", "f_", "tb_", "co_", "func_")
"""Beginnings of names that lead from an object to frames, code and globals."""


class LineError(BaseException):
    """The other side is gone, or speaks nonsense; no test can catch it and go on."""


class Remote:
    """An object of the other process."""

    def __init__(self, line: Line, number: int, facts: dict[str, Any]) -> None:
        for name, value in (("_line", line), ("_number", number), ("_facts", facts)):
            object.__setattr__(self, name, value)

    def __getattribute__(self, name: str) -> Any:
        if name == "__class__":
            return getattr(builtins, str(_facts(self).get("base")), Remote)
        if name == "__mro_entries__":
            raise LineError(
                "the tests derive from a class of the program, which cannot be judged from outside"
            )
        return _line(self).use(self, "getattr", name)

    def __setattr__(self, name: str, value: Any) -> None:
        _line(self).use(self, "setattr", name, value)

    def __delattr__(self, name: str) -> None:
        _line(self).use(self, "delattr", name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return _line(self).use(self, "call", *args, **options)


def _line(remote: Remote) -> Line:
    return object.__getattribute__(remote, "_line")  # type: ignore[no-any-return]


def _facts(remote: Remote) -> dict[str, Any]:
    return object.__getattribute__(remote, "_facts")  # type: ignore[no-any-return]


def _number(remote: Remote) -> int:
    return object.__getattribute__(remote, "_number")  # type: ignore[no-any-return]


def is_remote(value: Any) -> bool:
    """Whether a value is held by the other side; `isinstance` would ask it for its class."""
    return type(value) is Remote


def _special(name: str) -> Callable[..., Any]:
    def method(self: Remote, *args: Any) -> Any:
        result = _line(self).use(self, name, *args)
        if name in NUMBERS and _facts(self).get("informed"):
            return _informed(result)
        return result

    return method


def _informed(result: Any) -> Any:
    """What the program made of an object of its own and plain data, which may be the wanted result: another object,
    but no number or truth value, which could be made to fit. Raises TypeError for these."""
    if not is_remote(result):
        raise TypeError("an object of the program is no judge of plain data")
    _facts(result)["informed"] = True
    return result


def _binary(name: str, function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def method(self: Remote, other: Any) -> Any:
        line = _line(self)
        if not line.doubts or is_remote(other):
            return line.use(self, name, other)
        if "base" in _facts(self):  # its value is asked for before it can know with what it is compared
            return function(line.use(self, "value"), other)
        if name in ("eq", "ne"):
            return name == "ne"
        return _informed(line.use(self, name, other))

    return method


def _contains(self: Remote, item: Any) -> bool:
    line = _line(self)
    if line.doubts and not is_remote(item):
        return any(other is item or other == item for other in iter(self))
    return bool(line.use(self, "contains", item))


for _name in OTHERS:
    setattr(Remote, f"__{_name}__", _special(_name))
for _name, _function in BINARY.items():
    setattr(Remote, f"__{_name}__", _binary(_name, _function))
setattr(Remote, "__contains__", _contains)  # noqa: B010 - a class that mypy is to know without it


class Line:
    """One end of the line. The judge's end `doubts`; the program's may do with its own objects what it likes."""

    def __init__(self, read_end: int, write_end: int, *, doubts: bool) -> None:
        self.reader = os.fdopen(read_end, "rb")
        self.writer = os.fdopen(write_end, "wb")
        self.doubts = doubts
        self.broken: str | None = None
        """Why nothing that came after can be believed."""
        self.names: dict[str, Any] = {}
        self.given: dict[int, Any] = {}
        self.numbers: dict[int, int] = {}
        self.mirrors: dict[int, type[BaseException]] = {}

    def send(self, *message: Any) -> None:
        """Say one thing. Raises LineError where nobody listens."""
        text = json.dumps(message).encode() + b"\n"
        try:
            self.writer.write(text)
            self.writer.flush()
        except (OSError, ValueError):
            raise self.failed("it ended before its tests did") from None

    def hear(self) -> list[Any]:
        """What the other side says next. Raises LineError where it says nothing, or nothing that is a message."""
        try:
            text = self.reader.readline(MOST)
        except (OSError, ValueError):
            text = b""
        if not text:
            raise self.failed("it ended before its tests did")
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            raise self.failed("it sent no message over the line") from None
        if not isinstance(found, list) or not found:
            raise self.failed("it sent no message over the line")
        return found

    def failed(self, why: str) -> LineError:
        """The error that ends everything, kept so that catching it helps nobody."""
        self.broken = self.broken or why
        return LineError(self.broken)

    def name(self, name: str) -> Any:
        """A global name of the program. Raises NameError where it has none."""
        return self._asked("name", name, [], {})

    def use(self, remote: Remote, what: str, *args: Any, **options: Any) -> Any:
        """What comes of using an object of the other side."""
        return self._asked(_number(remote), what, list(args), options)

    def _asked(self, of: int | str, what: str, args: list[Any], options: dict[str, Any]) -> Any:
        if self.broken:
            raise LineError(self.broken)
        self.send(
            "ask",
            of,
            what,
            [self.encode(arg) for arg in args],
            {name: self.encode(value) for name, value in options.items()},
        )
        while True:
            kind, *facts = self.hear()
            if kind == "ask":
                self._serve(facts)
                continue
            try:
                if kind == "told":
                    result, changed = facts
                    for place, new in changed:
                        _write_back(args[place], self.decode(new))
                    if isinstance(result, list) and result[:1] == ["arg"]:
                        return args[result[1]]
                    return self.decode(result)
                error = self.decode(facts[0]) if kind == "raised" else None
            except (ValueError, TypeError, LookupError, AttributeError, ImportError) as reason:
                raise self.failed(
                    f"it sent what cannot be read over the line: {type(reason).__name__}"
                ) from None
            if not isinstance(error, BaseException):
                raise self.failed("it sent no answer over the line")
            if self.doubts and what == "call" and isinstance(error, StopIteration):
                # As from a generator: `all(map(f, xs))` would end early and hold.
                raise RuntimeError("the program's function raised StopIteration") from error
            raise error

    def serve(self) -> None:
        """Answer until the other side is gone."""
        while True:
            try:
                kind, *facts = self.hear()
            except LineError:
                return
            if kind == "ask":
                self._serve(facts)

    def _serve(self, facts: list[Any]) -> None:
        try:
            of, what, said, options = facts
            args = [self.decode(arg) for arg in said]
            if of == "name":
                if self.doubts or what not in self.names:
                    raise NameError(f"name {what!r} is not defined")
                result = self.encode(self.names[what], shared=True)
            else:
                found = self._done(
                    self.given[of],
                    what,
                    args,
                    {name: self.decode(value) for name, value in options.items()},
                )
                same = [place for place, arg in enumerate(args) if arg is found and is_mutable(arg)]
                result = ["arg", same[0]] if same else self.encode(found)
            changed = []
            for place, (arg, before) in enumerate(zip(args, said, strict=True)):
                if is_mutable(arg) and (after := self.encode(arg)) != before:
                    changed.append([place, after])
        except LineError:
            raise
        except BaseException as error:
            try:
                said = self.encode(error)
            except BaseException:  # an error class may do anything when it is looked at
                said = ["error", ["builtin", "Exception"], ["an error that cannot be told"], None]
            self.send("raised", said)
            return
        self.send("told", result, changed)

    def _done(self, value: Any, what: str, args: list[Any], options: dict[str, Any]) -> Any:
        if what in ("getattr", "setattr", "delattr"):
            name = str(args[0])
            if self.doubts:
                own = type(value).__module__ == "__tests__"
                if name.startswith(CLIMBING) or (what != "getattr" and not own):
                    raise AttributeError(f"{name} is not for the program")
            return ATTRIBUTES[what](value, name, *args[1:])
        if what == "call":
            return value(*args, **options)
        if what == "value":
            base = next(base for base in BASES if isinstance(value, base))
            return base(value)
        return (BINARY.get(what) or OTHERS[what])(value, *args)

    def encode(self, value: Any, *, shared: bool = False) -> Any:
        """A value as JSON; with `shared` what can change stays here, as a global of the program has to."""
        kind = type(value)
        if value is None or kind in (bool, str, float):
            return value
        if kind is int:
            return value if abs(value) < 2**53 else ["int", hex(value)]
        if kind is Remote:
            return ["yours", _number(value)]
        if not (shared and is_mutable(value)):
            if kind.__name__ in SEQUENCES and kind is SEQUENCES[kind.__name__]:
                return [kind.__name__, [self.encode(part) for part in value]]
            if kind is dict:
                return ["dict", [[self.encode(key), self.encode(part)] for key, part in value.items()]]
            if kind is bytes or kind is bytearray:
                return [kind.__name__, value.hex()]
            reduced = VALUES.get((kind.__module__, kind.__name__))
            known = getattr(sys.modules.get(kind.__module__), kind.__name__, None) is kind
            if reduced and known and getattr(value, "tzinfo", None) is None:
                args = [self.encode(part) for part in reduced(value)]
                return ["value", kind.__module__, kind.__name__, args]
        if kind is complex:
            return ["complex", value.real, value.imag]
        if kind is range or kind is slice:
            return [kind.__name__, [self.encode(part) for part in (value.start, value.stop, value.step)]]
        for name, single in SINGLE.items():
            if value is single:
                return ["single", name]
        if isinstance(value, types.ModuleType):
            return ["module", str(getattr(value, "__name__", ""))]
        if isinstance(value, BaseException) and kind is not Remote:
            if remote := value.__dict__.get("_remote"):
                return self.encode(remote)
            said = [self.encode(arg) if is_plain(arg) else str(arg) for arg in value.args]
            return ["error", self.encode(kind), said, self._handle(value)]
        if isinstance(value, type) and issubclass(value, BaseException):
            title = value.__name__
            if getattr(builtins, title, None) is value:
                return ["builtin", title]
            if remote := value.__dict__.get("_remote"):
                return self.encode(remote)
            bases = [self.encode(base) for base in value.__bases__ if issubclass(base, BaseException)]
            return ["error class", self._handle(value), title, bases]
        own = str(getattr(value, "__name__", "")) if kind in (type, types.BuiltinFunctionType) else ""
        if getattr(builtins, own, None) is value and (kind is type or own in PLAIN_FUNCTIONS):
            return ["builtin", own]
        return self._handle(value)

    def _handle(self, value: Any) -> list[Any]:
        number = self.numbers.setdefault(id(value), len(self.given))
        self.given[number] = value  # kept, so that the id is not given to another
        facts: dict[str, Any] = {"type": isinstance(value, type)}
        base = next((base.__name__ for base in BASES if isinstance(value, base)), None)
        return ["mine", number, {**facts, "base": base} if base else facts]

    def decode(self, said: Any) -> Any:
        """The value of JSON. Raises ValueError and its like for what `encode` never says."""
        if not isinstance(said, list):
            if isinstance(said, dict):
                raise ValueError("a bare object")
            return said
        tag, *facts = said
        if tag in SEQUENCES:
            return SEQUENCES[tag](self.decode(part) for part in facts[0])
        match tag:
            case "dict":
                return {self.decode(key): self.decode(part) for key, part in facts[0]}
            case "int":
                return int(facts[0], 16)
            case "bytes":
                return bytes.fromhex(facts[0])
            case "bytearray":
                return bytearray.fromhex(facts[0])
            case "complex":
                return complex(*facts)
            case "range":
                return range(*(int(part) for part in map(self.decode, facts[0])))
            case "slice":
                return slice(*map(self.decode, facts[0]))
            case "single":
                return SINGLE[facts[0]]
            case "value":
                module, name, args = facts
                if (module, name) not in VALUES:
                    raise ValueError(f"{module}.{name}")
                return getattr(importlib.import_module(module), name)(*map(self.decode, args))
            case "module":
                return _module(facts[0])
            case "builtin":
                found = getattr(builtins, facts[0])
                if not isinstance(found, type) and facts[0] not in PLAIN_FUNCTIONS:
                    raise ValueError(facts[0])
                return found
            case "yours":
                return self.given[facts[0]]
            case "mine":
                return Remote(self, int(facts[0]), dict(facts[1]))
            case "error class":
                return self._mirror(*facts)
            case "error":
                kind, args, handle = facts
                error = self.decode(kind)(*map(self.decode, args))
                if handle and type(error) in self.mirrors.values():
                    error._remote = self.decode(handle)
                return error
        raise ValueError(str(tag)[:40])

    def _mirror(self, handle: list[Any], name: str, bases: list[Any]) -> type[BaseException]:
        """A class of errors of the other side, as one of this side that `except` can name."""
        number = int(handle[1])
        if number not in self.mirrors:
            remote = self.decode(handle)
            own = {
                "_remote": remote,
                "__getattr__": lambda error, attribute: _of_error(error, attribute),
                "__module__": "__answer__",
            }
            parents = tuple(map(self.decode, bases)) or (Exception,)
            if not all(isinstance(one, type) and issubclass(one, BaseException) for one in parents):
                raise ValueError("a class of errors that is none")
            self.mirrors[number] = type(str(name), parents, own)
        return self.mirrors[number]


def _of_error(error: BaseException, attribute: str) -> Any:
    remote = error.__dict__.get("_remote")
    if remote is None or attribute.startswith("_"):
        raise AttributeError(attribute)
    return getattr(remote, attribute)


def _module(name: str) -> Any:
    if str(name).split(".")[0] not in sys.stdlib_module_names:
        raise ValueError(f"the module {name}")
    return importlib.import_module(name)


def is_mutable(value: Any) -> bool:
    """Whether a value that crosses as a copy can be changed."""
    kind = type(value)
    return kind in (list, dict, set, bytearray) or (
        kind.__module__ == "collections" and ("collections", kind.__name__) in VALUES
    )


def is_plain(value: Any) -> bool:
    """Whether a value is of a type that crosses as a copy by itself."""
    return value is None or type(value) in (*BASES, range)


def _write_back(old: Any, new: Any) -> None:
    """Give an argument the contents that the other side left in its copy."""
    if type(old) is not type(new) or old == new:
        return
    if isinstance(old, list | bytearray):
        old[:] = new
    elif hasattr(old, "extend"):  # a deque
        old.clear()
        old.extend(new)
    else:
        old.clear()
        old.update(new)
