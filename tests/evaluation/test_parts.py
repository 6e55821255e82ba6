"""The primary metric by category and length, and where the report and the model card show it."""

import json
from dataclasses import asdict, replace

from rows_by_hand import row

from tunesmith.evaluation.compare import compare
from tunesmith.evaluation.parts import bands, category_column, parts
from tunesmith.evaluation.report import write_report


def sides(base, tuned):
    return (
        [row(n, v) for n, v in enumerate(base)],
        [row(n, v, model="tuned") for n, v in enumerate(tuned)],
    )


def test_a_column_sorts_where_most_rows_have_one_of_a_few_short_texts():
    rows = [{"category": "red" if n % 2 else "blue", "schema": "x" * 99} for n in range(10)]
    assert category_column(rows) == "category"
    assert category_column([*rows, *[{}] * 11]) is None, "less than half of them"
    assert category_column([{"category": "one"}] * 10) is None, "nothing to tell apart"
    assert category_column([{"category": str(n)} for n in range(30)]) is None, "too many"
    assert category_column([{"category": "a" * 80 + str(n % 2)} for n in range(10)]) is None, "long texts"
    assert category_column(
        [{"category": str(n), "difficulty": "hard" if n % 3 else "easy"} for n in range(30)]
    ) == ("difficulty")


def test_bands_are_quarters_and_equal_lengths_share_one():
    found = bands({n: n + 1 for n in range(40)})
    assert found[0] == found[9] == "1 to 10 tokens"
    assert found[10] == "11 to 20 tokens"
    assert found[39] == "31 to 40 tokens"
    assert bands(dict.fromkeys(range(40), 7)) == {}
    assert bands({n: n for n in range(19)}) == {}, "too few"
    assert set(bands({n: 1 if n < 30 else 9 for n in range(40)}).values()) == {"1 tokens", "2 to 9 tokens"}


def test_each_part_is_the_comparison_on_its_rows_with_p_adjusted_over_the_parts():
    base, tuned = [0.0] * 80, [float(n < 40 or n % 5 == 0) for n in range(80)]
    one, other = sides(base, tuned)
    kinds = {n: ("easy", "hard")[n >= 40] for n in range(80)}
    found = parts(one, other, "exact_match", categories=kinds, lengths={n: n for n in range(80)})
    by_name = {part["name"]: part["comparison"] for part in found}
    assert [part["by"] for part in found] == ["category"] * 2 + ["length"] * 4
    assert [part["name"] for part in found[2:]] == [
        "0 to 19 tokens",
        "20 to 39 tokens",
        "40 to 59 tokens",
        "60 to 79 tokens",
    ]
    [alone] = compare(one[40:], other[40:], metrics=["exact_match"])
    assert by_name["hard"]["difference"] == alone.difference == 0.2
    assert by_name["hard"]["p_alone"] == alone.p_value
    assert by_name["easy"]["verdict"] == "better"
    assert by_name["40 to 59 tokens"]["wins"] == 4
    for kind, number in (("category", 2), ("length", 4)):
        values = [p["comparison"] for p in found if p["by"] == kind]
        assert min(c["p_value"] for c in values) == number * min(c["p_alone"] for c in values)
    assert all(
        p["verdict"] == "no evidence" for p in (by_name["40 to 59 tokens"], by_name["60 to 79 tokens"])
    )


def test_the_report_has_parts_filter_and_what_could_be_found(run_folder):
    one, other = sides([0.0] * 40, [1.0] * 20 + [0.0] * 20)
    found = parts(
        one, other, "exact_match", categories={n: "<b>x" if n < 20 else "y" for n in range(40)}, lengths={}
    )
    (run_folder / "evaluation/parts.json").write_text(json.dumps({"column": "topic", "parts": found}))
    html = write_report(run_folder).read_text("utf-8")
    assert 'id="parts"' in html
    assert "By topic" in html
    assert "&lt;b&gt;x" in html
    assert 'id="which"' in html
    assert html.count('data-gain="1.0"') > 40
    assert "points / " in html
    (run_folder / "evaluation/parts.json").write_text(json.dumps({"parts": [{"by": "length"}]}))
    assert "parts.json is not a record of parts" in write_report(run_folder).read_text("utf-8")


def test_the_report_has_leakage(run_folder):
    from tunesmith.data.examples import Conversation, Message, Row
    from tunesmith.evaluation.leakage import effect, find
    from tunesmith.evaluation.rows import read_rows

    def chat(text, n):
        return Conversation((Message("user", text), Message("assistant", "<i>no")), Row("rows", n))

    rows = read_rows(run_folder / "evaluation/rows.jsonl")
    asked = [chat(f"what of <b>{n}", n) for n in range(60)]
    leakage = find(asked, asked[:10])
    own = {name: [r for r in rows if r.model == name] for name in ("base", "tuned")}
    facts = effect(leakage, own, ["SELECT"], "sql_execution", resamples=200, confidence=0.95)
    (run_folder / "evaluation/leakage.json").write_text(json.dumps({**leakage.as_dict(), **facts}))
    html = write_report(run_folder).read_text("utf-8")
    assert "10 of 60 held-out questions leaked (10 exact)" in html
    assert "questions that did not leak" in html
    assert "what of &lt;b&gt;3" in html
    assert "what of <b>" not in html
    assert asdict(leakage)["questions"] == 60


def test_the_card_has_parts_leakage_forgetting_and_how_answers_were_made(run_folder):
    from tunesmith.evaluation.compare import Comparison
    from tunesmith.evaluation.report import how_answered
    from tunesmith.evaluation.rows import read_rows, write_rows
    from tunesmith.export.card import write_card
    from tunesmith.training.run import Run

    one, other = sides([0.0] * 40, [1.0] * 20 + [0.0] * 20)
    found = parts(
        one, other, "exact_match", categories={n: "a|b" if n < 20 else "y" for n in range(40)}, lengths={}
    )
    run = Run(run_folder)
    run.write("evaluation/parts.json", {"column": "topic", "parts": found})
    run.write("evaluation/forgetting.json", {"sentence": "No evidence that it forgot: so many bits."})
    copies = {"answers": 60, "share": 0.1, "copies": 3, "longest": 70, "looked_through": 5, "trained": 9}
    run.write(
        "evaluation/leakage.json",
        {"remark": "Leakage: 2 of 60 held-out questions leaked (2 near).", "notes": ["a form was left out"],
         "copied": {"tuned": copies, "references": copies}},
    )  # fmt: skip
    kept = run.read("evaluation/comparison.json")["comparisons"]
    rows = read_rows(run.evaluation / "rows.jsonl")
    drawn = [replace(r, sample=n, generation={"temperature": 0.7, "max_new_tokens": 99})
             for r in rows for n in (0, 1)]  # fmt: skip
    for written, how in ((rows, "greedily"), (drawn, "2 attempts each, drawn at temperature 0.7")):
        assert how_answered(written).startswith(how)
        write_rows(run.evaluation / "rows.jsonl", written)
        write_card(run, [Comparison(**c) for c in kept])
        card = (run.final_model / "README.md").read_text("utf-8")
        page = write_report(run.path).read_text("utf-8")
        for text in (card, page):
            assert f"the same held-out questions, {how}" in text or f"the same questions, {how}" in text
    assert "greedily" not in card + page
    assert "### By topic" in card
    assert "| a\\|b | 20 |" in card
    assert "- Forgetting: No evidence that it forgot" in card
    assert "Leakage: 2 of 60" in card
    assert "first 5 of 9 training answers" in card
    assert "Leakage: a form was left out." in card
    assert how_answered([]) == ""
