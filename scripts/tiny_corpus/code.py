"""Short Python functions with a docstring, each run on its own example before it is used."""

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Snippet:
    """A request in words, the function that answers it, and one checked example."""

    request: str
    source: str
    call: str
    result: str


_NUMBER_BODIES = (
    ("add_{k}", "Return {x} plus {k}.", "{x} + {k}"),
    ("times_{k}", "Return {x} times {k}.", "{x} * {k}"),
    ("minus_{k}", "Return {x} minus {k}.", "{x} - {k}"),
    ("is_above_{k}", "Tell whether {x} is greater than {k}.", "{x} > {k}"),
    ("is_below_{k}", "Tell whether {x} is less than {k}.", "{x} < {k}"),
    ("is_multiple_of_{k}", "Tell whether {x} is a multiple of {k}.", "{x} % {k} == 0"),
    ("remainder_by_{k}", "Return the remainder of {x} divided by {k}.", "{x} % {k}"),
    ("at_least_{k}", "Return the larger of {x} and {k}.", "max({x}, {k})"),
    ("at_most_{k}", "Return the smaller of {x} and {k}.", "min({x}, {k})"),
    ("square_plus_{k}", "Return the square of {x} plus {k}.", "{x} * {x} + {k}"),
)
_LIST_BODIES = (
    ("sum_of_{x}", "Return the sum of the {x}.", "sum({x})"),
    ("largest_of_{x}", "Return the largest of the {x}.", "max({x})"),
    ("smallest_of_{x}", "Return the smallest of the {x}.", "min({x})"),
    ("count_{x}", "Return how many {x} there are.", "len({x})"),
    ("sorted_{x}", "Return the {x} in ascending order.", "sorted({x})"),
    ("reversed_{x}", "Return the {x} in reverse order.", "list(reversed({x}))"),
    ("{x}_above_{k}", "Return the {x} greater than {k}.", "[n for n in {x} if n > {k}]"),
    ("{x}_below_{k}", "Return the {x} less than {k}.", "[n for n in {x} if n < {k}]"),
    ("{x}_plus_{k}", "Return each of the {x} plus {k}.", "[n + {k} for n in {x}]"),
    ("{x}_times_{k}", "Return each of the {x} times {k}.", "[n * {k} for n in {x}]"),
    ("first_{k}_{x}", "Return the first {k} of the {x}.", "{x}[:{k}]"),
    ("last_{k}_{x}", "Return the last {k} of the {x}.", "{x}[-{k}:]"),
    ("average_of_{x}", "Return the average of the {x}.", "sum({x}) / len({x})"),
)
_TEXT_BODIES = (
    ("upper_{x}", "Return the {x} in upper case.", "{x}.upper()"),
    ("reversed_{x}", "Return the {x} backwards.", "{x}[::-1]"),
    ("length_of_{x}", "Return the length of the {x}.", "len({x})"),
    ("{x}_{k}_times", "Return the {x} repeated {k} times.", "{x} * {k}"),
    ("first_{k}_of_{x}", "Return the first {k} letters of the {x}.", "{x}[:{k}]"),
    ("words_of_{x}", "Return the list of words in the {x}.", "{x}.split()"),
)
_NUMBER_NAMES = ("x", "n", "value", "number", "age", "price", "size")
_LIST_NAMES = ("numbers", "values", "prices", "scores", "ages", "items", "sizes", "points")
_TEXT_NAMES = ("text", "word", "name", "title", "line")


def snippet(rng: random.Random) -> Snippet:
    """A random function; its example's result comes from running it."""
    bodies, names, kind = rng.choice((
        (_NUMBER_BODIES, _NUMBER_NAMES, "int"),
        (_LIST_BODIES, _LIST_NAMES, "list[int]"),
        (_TEXT_BODIES, _TEXT_NAMES, "str"),
    ))  # fmt: skip
    title, about, expression = rng.choice(bodies)
    slots = {"x": rng.choice(names), "k": str(rng.randint(2, 9))}
    argument = {
        "int": str(rng.randint(1, 30)),
        "list[int]": str(rng.sample(range(1, 20), 4)),
        "str": repr(rng.choice(("red lamp", "hello", "blue sky", "good day", "tea"))),
    }[kind]
    name, about, expression = (t.format(**slots) for t in (title, about, expression))
    body = f"    return {expression}"
    source = f'def {name}({slots["x"]}):\n    """{about}"""\n{body}\n'
    call = f"{name}({argument})"
    space: dict[str, object] = {}
    exec(source, space)  # our own text: proves that it compiles and gives the example's result
    request = about[0].lower() + about[1:-1]
    return Snippet(f"Write a function {name} that takes {slots['x']} and does this: {request}.",
                   source, call, repr(eval(call, space)))  # fmt: skip


def document(rng: random.Random) -> str:
    """One to three functions, each followed by a call and its result."""
    made = [snippet(rng) for _ in range(rng.randint(1, 3))]
    return "\n".join(f"{s.source}\n# {s.call} -> {s.result}\n" for s in made)
