"""Constraints: for each an answer that satisfies it and a mutation that does not, drawn at random."""

from __future__ import annotations

import itertools
import json
import random
import re

import pytest
from rows_by_hand import row
from typer.testing import CliRunner

from tunesmith import evaluation, models
from tunesmith.cli import app
from tunesmith.data.examples import Conversation, Message, Prompt, Row
from tunesmith.data.formats import FORMATS
from tunesmith.evaluation import completion, instructions
from tunesmith.evaluation.instructions import CHECKS
from tunesmith.evaluation.metrics import METRICS, default_metrics

WORDS = ["lamp", "shade", "warm", "cable", "bright", "table", "switch", "glass"]


def asked(**constraints):
    return Prompt((Message("user", "say"),), "x", Row("a", 1), checks={"constraints": constraints})


def text_of(draw, n):
    return " ".join(draw.choices(WORDS, k=n))


def counted(unit, joint=" "):
    """Makers for `min_` and `max_` of a unit: n of them satisfy, one fewer or one more does not."""

    def least(draw):
        n = draw.randint(1, 6)
        return n, joint.join([unit(draw)] * n), joint.join([unit(draw)] * (n - 1))

    def most(draw):
        n = draw.randint(1, 6)
        return n, joint.join([unit(draw)] * n), joint.join([unit(draw)] * (n + 1))

    return least, most


def pairs(name, unit, joint=" "):
    least, most = counted(unit, joint)
    return {f"min_{name}": least, f"max_{name}": most}


def word(draw):
    return draw.choice(WORDS)


MAKERS = {
    **pairs("sentences", lambda draw: f"{text_of(draw, 3)}."),
    **pairs("paragraphs", lambda draw: text_of(draw, 4), "\n\n"),
    **pairs("bullets", lambda draw: draw.choice(["- ", "* ", "• ", "1. "]) + text_of(draw, 2), "\n"),
    **pairs("headings", lambda draw: "#" * draw.randint(1, 6) + " " + word(draw), "\n"),
    **pairs("highlights", lambda draw: draw.choice(["*{}*", "**{}**"]).format(text_of(draw, 2))),
    **pairs("placeholders", lambda draw: f"[{word(draw)}]"),
    **pairs("capital_words", lambda draw: word(draw).upper()),
    "min_words": lambda d: (n := d.randint(2, 9), text_of(d, n), text_of(d, n - 1)),
    "max_words": lambda d: (n := d.randint(1, 9), text_of(d, n), text_of(d, n + 1)),
    "min_characters": lambda d: (n := d.randint(2, 9), "x" * n, "x" * (n - 1)),
    "max_characters": lambda d: (n := d.randint(1, 9), "x" * n, "x" * (n + 1)),
    "contains": lambda d: (w := d.sample(WORDS, 2), f"the {w[1].upper()}, a {w[0]}.", f"the {w[1]} {w[0]}s"),
    "forbids": lambda d: (w := word(d), f"{w}s and more", f"a {w.title()}!"),
    "starts_with": lambda d: (w := word(d), f" {w.upper()} is", f"a {w}"),
    "ends_with": lambda d: ([word(d), "end"], "the End ", "the end of it"),
    "json": lambda d: (True, json.dumps({word(d): d.random()}), f"{{{word(d)}: 1"),
    "json_keys": lambda d: (w := d.sample(WORDS, 2), json.dumps(dict.fromkeys(w)), json.dumps({w[0]: 1})),
    "min_counts": lambda d: ({(w := word(d)): (n := d.randint(2, 4))}, f"{w} " * n, f"{w} " * (n - 1)),
    "max_counts": lambda d: ({(w := word(d)): (n := d.randint(1, 4))}, f"{w}, " * n, f"{w}, " * (n + 1)),
    "min_letters": lambda d: ({"Q": (n := d.randint(1, 4))}, "q" * n, "q" * (n - 1) + "o"),
    "case": lambda d: (
        c := d.choice(["upper", "lower", "title"]), getattr(text_of(d, 3), c)(), "aB " + text_of(d, 2),
    ),
    "no_commas": lambda d: (True, text_of(d, 4), f"{text_of(d, 2)}, {word(d)}"),
    "quoted": lambda d: (True, f'"{text_of(d, 3)}"', f'"{text_of(d, 3)}" said {word(d)}'),
    "title": lambda d: (True, f"<<{text_of(d, 2)}>>\n{word(d)}", f"<{text_of(d, 2)}>"),
    "postscript": lambda d: ("P.S.", f"{text_of(d, 3)}\np.s. {word(d)}", f"{text_of(d, 3)} P.S."),
    "one_of": lambda d: (["Yes", "No", "My answer"], d.choice(["yes.", " NO", "my answer!"]), f"yes {word(d)}"),
    "separated": lambda d: ({"***": (n := d.randint(2, 4))}, "a ***" * (n - 1) + "b", "a ***" * n + "b"),
    "paragraph_begins": lambda d: ({"2": (w := word(d))}, f"a b\n\n{w.title()}, so", f"{w} b\n\nso {w}"),
    "ascii": lambda d: (True, text_of(d, 3), f"{text_of(d, 3)} é"),
}  # fmt: skip


def test_every_constraint_has_its_property():
    assert set(MAKERS) == set(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_an_answer_that_satisfies_and_its_mutation(name):
    draw = random.Random(name)
    for _ in range(40):
        limit, good, bad = MAKERS[name](draw)
        prompt = asked(**{name: limit})
        assert METRICS["constraints"].score(prompt, good, "") == 1, (limit, good)
        assert METRICS["constraints"].score(prompt, bad, "") == 0, (limit, bad)
        assert METRICS["all_constraints"].score(prompt, f"<think>{bad}</think>\n{good}", "") == 1
        for metric in ("constraints", "all_constraints", "constraints_loose", "all_constraints_loose"):
            assert METRICS[metric].score(prompt, "  ", "") == 0, "an empty answer keeps none"


def test_flags_that_are_off_ask_for_nothing():
    for name in ("no_commas", "quoted", "title", "ascii"):
        assert METRICS["constraints"].score(asked(**{name: False}), "a, é", "") == 1
    assert METRICS["constraints"].score(asked(json=False), "a", "") == 1
    assert METRICS["constraints"].score(asked(json=False), "{}", "") == 0


def test_loose_readings_are_the_eight_of_ifeval():
    text = "Sure, here:\n*red* lamp\nHope it helps!"
    found = list(instructions.variants(text))
    lines = text.split("\n")
    expected = {
        form.replace("*", "") if bare else form
        for form in ("\n".join(lines), "\n".join(lines[1:]), "\n".join(lines[:-1]), lines[1])
        for bare in (False, True)
    }
    assert len(found) == 8
    assert set(found) == expected
    prompt = asked(max_words=2, starts_with="red", no_commas=True)
    assert METRICS["constraints"].score(prompt, text, "") == 0
    assert METRICS["all_constraints_loose"].score(prompt, text, "") == 1
    assert METRICS["constraints_loose"].score(asked(max_words=1), text, "") == 0


def test_loose_is_never_stricter_than_strict():
    draw = random.Random(0)
    for _ in range(200):
        chosen = draw.sample(sorted(MAKERS), 3)
        made = {name: MAKERS[name](draw) for name in chosen}
        prompt = asked(**{name: limit for name, (limit, _, _) in made.items()})
        text = "\n".join(draw.choice(texts[1:]) for texts in made.values())
        strict, loose = instructions.kept(prompt, text), instructions.kept(prompt, text, loosely=True)
        assert all(b or not a for a, b in zip(strict, loose))
        share = METRICS["constraints"].score(prompt, text, "")
        assert share == pytest.approx(sum(strict) / 3)
        assert METRICS["all_constraints"].score(prompt, text, "") == float(share == 1)


def test_columns_of_a_row_reach_the_checks():
    values = {
        "prompt": "say",
        "response": "x",
        "max_words": 2,
        "constraints": {"no_commas": True, "json": None},
    }
    example = FORMATS["prompt_response"].convert(values, Row("a", 1))
    prompt = evaluation.prompt_of(example)
    assert instructions.constraints_of(prompt) == {"max_words": 2, "no_commas": True}
    assert METRICS["constraints"].fits(prompt)
    assert METRICS["constraints"].score(prompt, "one, two, three", "") == 0
    assert not METRICS["constraints"].fits(
        Prompt(prompt.messages, "x", prompt.row, checks={"title": "A book"})
    )
    assert "all_constraints" in default_metrics([prompt], False, "instruct")


def test_an_unknown_constraint_names_the_nearest():
    with pytest.raises(ValueError, match="max_words"):
        METRICS["constraints"].score(asked(maxwords=3), "a", "")


@pytest.mark.parametrize(
    ("answer", "refuses"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I cannot do that.", True),
        ("As an AI language model, I have no lamp.", True),
        ("Unfortunately, I am unable to say.", True),
        ("Sorry to hear that! Turn it off first.", True),
        ("You cannot open it without a key.", False),
        ("The word sorry has five letters.", False),
        ("I can help.", False),
    ],
)
def test_refusals(answer, refuses):
    assert completion.is_refusal(answer) == refuses


def test_completion_is_four_rates_and_all_of_them():
    good = {"output": "It is red.", "finish_reason": "stop", "reference": "It is blue."}
    cases = [
        (good, 1, 1, 1, 1),
        (good | {"output": " "}, 0, 1, 0, 1),
        (good | {"finish_reason": "length"}, 1, 0, 1, 1),
        (good | {"output": "It is"}, 1, 1, 0, 1),
        (good | {"output": "```python\nx"}, 1, 1, 0, 1),
        (good | {"output": "I can't say."}, 1, 1, 1, 0),
        (good | {"output": "I can't say.", "reference": "Sorry, no."}, 1, 1, 1, 1),
        (good | {"output": "red", "reference": "blue"}, 1, 1, 1, 1),
    ]
    rows = [row(n, **fields) for n, (fields, *_) in enumerate(cases)]
    for column, name in enumerate(("answered", "ended", "uncut", "not_refused"), start=1):
        assert list(METRICS[name].among(rows)) == [case[column] for case in cases], name
    assert list(METRICS["completed"].among(rows)) == [float(all(case[1:])) for case in cases]


def test_completion_through_evaluate(tiny_model_folder, tiny_tokenizer):
    examples = [Conversation((Message("user", "what is one"), Message("assistant", "red")), Row("a", 1))]
    [found] = evaluation.evaluate(
        models.load_model(str(tiny_model_folder)), tiny_tokenizer, evaluation.items(examples, tiny_tokenizer),
        name="m", metrics=["completed", "ended", "answered"], max_new_tokens=3,
    )  # fmt: skip
    assert found.scores["ended"] == float(found.finish_reason == "stop")
    assert set(found.scores) == {"completed", "ended", "answered"}


def test_the_page_lists_every_constraint():
    import re
    from pathlib import Path

    page = (Path(__file__).parents[2] / "docs/constraints.md").read_text("utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    assert sorted(itertools.chain(*(re.findall(r"`(\w+)`", cell) for cell in rows))) == sorted(CHECKS)


@pytest.mark.parametrize("command", ["validate", "train", "evaluate"])
def test_an_unknown_constraint_is_refused_before_anything_is_asked(
    command, tiny_model_folder, tmp_path, monkeypatch
):
    """With file, row and nearest name; each of a table's rows may leave constraints of others open."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": f"Say {n}.", "response": f"It is {n}.", "constraints": {"max_words": 5, "min_word": None}}
        for n in range(30)
    ]
    rows[6]["constraints"] = {"max_words": 5, "max_sentence": 1}
    file = tmp_path / "asked.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    given = {
        "validate": ["validate", str(file)],
        "train": [
            "train",
            "--dataset",
            str(file),
            "--base-model",
            str(tiny_model_folder),
            "--max-length",
            "256",
        ],
        "evaluate": ["evaluate", str(tiny_model_folder), "--dataset", str(file)],
    }[command]
    done = CliRunner().invoke(app, given, env={"COLUMNS": "200"})
    said = " ".join((done.output + str(done.exception or "")).split())
    assert done.exit_code != 0, said
    assert "there is no constraint 'max_sentence'" in said
    assert "Did you mean 'max_sentences'" in said
    assert re.search(r"asked\.jsonl:7\b", said), said
    assert not list(tmp_path.rglob("rows.jsonl"))
