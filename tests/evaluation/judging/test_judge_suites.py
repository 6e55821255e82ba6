"""Suites: own questions, category temperatures, two turns through the template, judged, and stored as rows."""

from __future__ import annotations

import collections
import csv
import json
import os
import re
import shutil
import signal
import sys
import threading
import types
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from judge_servers import openai, serving
from typer.testing import CliRunner

from tunesmith import api, models
from tunesmith.cli import app
from tunesmith.compose import compose
from tunesmith.data import templates
from tunesmith.data.examples import Message
from tunesmith.errors import DataError, MissingExtra, TunesmithError
from tunesmith.evaluation.judging import bench, harness, suites
from tunesmith.evaluation.judging.judgments import Answers, Question, read_answers, write_answers
from tunesmith.evaluation.judging.questions import read_questions
from tunesmith.evaluation.rows import read_rows
from tunesmith.generation import generate
from tunesmith.recipe import Evaluation

CATEGORIES = ["writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"]
ARENA = Path(bench.__file__).with_name("arena_prompts.yaml")
MT_BENCH = suites.SUITES["mt-bench"]


def evaluate(*arguments):
    result = CliRunner().invoke(app, ["evaluate", *map(str, arguments), "--json"])
    return result.exit_code, json.loads(result.stdout.strip().splitlines()[-1])


def test_the_own_questions_are_eighty_of_two_turns():
    questions = suites.mt_bench_questions()
    assert len(questions) == 80
    counts = collections.Counter(q.category for q in questions)
    assert list(counts.items()) == [(category, 10) for category in CATEGORIES]
    assert all(len(q.turns) == 2 and all(len(text) > 15 for text in q.turns) for q in questions)
    assert len({text for q in questions for text in q.turns}) == 160
    for q in questions:
        assert len(q.references) == (2 if q.category in ("reasoning", "math", "coding") else 0)
        assert all(q.references)
    assert {(q.category, MT_BENCH.temperature(q)) for q in questions} == {
        ("writing", 0.7), ("roleplay", 0.7), ("stem", 0.1), ("humanities", 0.1), ("extraction", 0.0), ("math", 0.0),
        ("coding", 0.0), ("reasoning", 0.0),
    }  # fmt: skip
    assert MT_BENCH.temperature(Question(1, "cooking", ("q",))) == 0.7
    assert MT_BENCH.temperature(Question(1, "math", ("q",), temperature=0.3)) == 0.3


def test_some_references_are_right_by_brute_force():
    """Those that a program can check: counted, not derived."""
    found = {q.turns[0][:24]: q.references for q in suites.mt_bench_questions() if q.references}
    threes = [n for n in range(100, 1000) if n % 7 == 0 and n % 5]
    first, second = found["How many three-digit num"]
    assert first.startswith(str(len(threes)))
    assert second.startswith(str(sum(n % 2 == 0 for n in threes)))

    def ways(step, broken=None):
        return step == 0 or (step > 0 and step != broken and ways(step - 1, broken) + ways(step - 2, broken))

    first, second = found["A staircase has ten step"]
    assert (first.split(".")[0], second.split(".")[0]) == (str(ways(10)), str(ways(10, 4)))
    first, second = found["What is the remainder wh"]
    assert (int(first[0]), int(second[0])) == (7**100 % 5, 7**100 % 100)
    ages = [
        (k, n) for k in range(3, 99) for n in range(3, 99) if k - 2 == 3 * (n - 2) and k + 4 == 2 * (n + 4)
    ]
    assert f"Kim is {ages[0][0]} and Lou is {ages[0][1]}" in found["Two years ago Kim was th"][0]


SMALL = [
    Question(1, "math", ("what is one", "and two"), ("1", "2")), Question(2, "writing", ("red blue", "green")),
    Question(3, "math", ("count", "hello yes")), Question(4, "stem", ("paris",)),
]  # fmt: skip


def test_each_turn_is_what_the_model_says_after_its_own_first_answer(tiny_model_folder):
    model, tokenizer = bench.load_for_suite(str(tiny_model_folder))
    rows = suites.answer(model, tokenizer, SMALL, name="m", suite=MT_BENCH, max_new_tokens=6, samples=2)
    assert [(r.item, r.sample, r.turn) for r in rows if r.item != 3] == [
        (item, sample, turn) for item in range(3) for sample in range(2) for turn in range(2)
    ]
    assert [r.turn for r in rows if r.item == 3] == [0, 0]
    by_place = {(r.item, r.sample, r.turn): r for r in rows}
    first = by_place[0, 0, 0]
    talk = [Message("user", "what is one"), Message("assistant", first.output), Message("user", "and two")]
    [alone] = generate(
        model, tokenizer, [templates.prompt_ids(talk, tokenizer)], max_new_tokens=6,
        stop_ids=templates.end_of_turn_ids(tokenizer),
    )  # fmt: skip
    assert by_place[0, 0, 1].output == alone.text  # asked among others, and as if alone
    assert (first.generation["temperature"], first.generation["category"]) == (0.0, "math")
    assert (first.reference, by_place[0, 0, 1].reference, first.source_row) == ("1", "2", "mt-bench:1")
    assert by_place[1, 0, 0].generation["temperature"] == 0.7
    assert by_place[0, 0, 0].output == by_place[0, 1, 0].output  # greedy
    assert by_place[1, 0, 0].output != by_place[1, 1, 0].output  # drawn, with the sample's own seed
    again = suites.answer(model, tokenizer, SMALL, name="m", suite=MT_BENCH, max_new_tokens=6, samples=2)
    assert again == rows


def test_a_conversation_without_room_ends_there_and_is_told(tiny_model_folder):
    model, tokenizer = bench.load_for_suite(str(tiny_model_folder))
    long = Question(9, "math", ("what " * 600, "and"))
    rows = suites.answer(model, tokenizer, [long, SMALL[0]], name="m", suite=MT_BENCH, max_new_tokens=4)
    assert "leave no room" in rows[0].status
    assert "the turn before" in rows[1].status
    assert [row.status for row in rows[2:]] == ["ok", "ok"]
    answers = suites.answers_of(rows, [long, SMALL[0]], "m")
    assert answers.up_to(9, 1) is None


@pytest.fixture
def small_file(tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [{"question_id": q.id, "category": q.category, "turns": list(q.turns)} for q in SMALL]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answered(
    folder, model, questions, *, engine="padded", watch=lambda event: None, suite="mt-bench", **evaluation
):
    """The rows of a suite that nobody judges, and the record of it."""
    settings = {"evaluation": {"max_new_tokens": 6, "engine": engine, **evaluation}}
    found = api.evaluate_suite(
        model, suite, questions=questions, settings=settings, output=folder, watch=watch
    )
    return read_rows(folder / "rows.jsonl"), found


def outputs(rows):
    return [(r.item, r.sample, r.turn, r.output, r.finish_reason) for r in rows]


@pytest.fixture(scope="module")
def tiny_server(tiny_model_folder):
    """A server that has the tiny model, and what it was asked."""
    model, tokenizer = bench.load_for_suite(str(tiny_model_folder))

    one_at_a_time = threading.Lock()

    def reply(number, body):
        with one_at_a_time:
            [one] = generate(
                model, tokenizer, [body["prompt"]], max_new_tokens=body["max_tokens"],
                stop_ids=templates.end_of_turn_ids(tokenizer), temperature=body["temperature"], seed=body["seed"],
            )  # fmt: skip
        ids = [*one.ids, *([one.stop_id] if one.stop_id is not None else [])]
        choice = {"index": 0, "text": one.text, "finish_reason": one.finish_reason, "token_ids": ids}
        return 200, json.dumps({"choices": [choice]}), {}

    with serving(reply) as (url, seen):
        yield url, seen


def test_any_engine_answers_a_suite_and_is_checked(tmp_path, tiny_model_folder, small_file, tiny_server):
    url, seen = tiny_server
    told = []
    _, found = answered(tmp_path / "a", tiny_model_folder, small_file, watch=told.append)
    name = tiny_model_folder.name
    check = found["engine_check"][name]
    assert (check["engine"], check["passed"], len(check["items"])) == (
        "padded",
        True,
        4,
    )  # drawn answers cannot be
    assert any(event.get("name") == f"engine check of {name}" for event in told)
    asked = small_file.with_name("greedy.jsonl")
    asked.write_text("".join(line + "\n" for line in small_file.read_text().splitlines() if '"math"' in line))
    greedy = outputs(answered(tmp_path / "g", tiny_model_folder, asked)[0])
    for engine, more in (
        ("paged", {}),
        ("openai", {"server": {"base_url": url, "models": {name: "my-tiny"}}}),
    ):
        rows, found = answered(tmp_path / engine, tiny_model_folder, asked, engine=engine, **more)
        assert outputs(rows) == greedy
        assert {row.generation["engine"] for row in rows} == {engine}
        assert found["engine_check"][name]["passed"]
    assert {body["model"] for _, body, _ in seen} == {"my-tiny"}
    assert not (tmp_path / "openai/unfinished").exists()


@pytest.mark.parametrize("turn", [1, 2])
def test_a_suite_that_is_stopped_goes_on_where_it_stopped(tmp_path, tiny_model_folder, small_file, turn):
    made, _ = answered(tmp_path / "whole", tiny_model_folder, small_file, batch_tokens=1)
    stage = f"{tiny_model_folder.name}: turn {turn} at temperature 0"

    def stop(event):
        if event["kind"] == "progress" and event["stage"] == stage and event["done"] == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        answered(tmp_path / "cut", tiny_model_folder, small_file, watch=stop, batch_tokens=1)
    assert not (tmp_path / "cut/rows.jsonl").exists()
    begun = {}

    def first(event):
        if event["kind"] == "progress":
            begun.setdefault(event["stage"], (event["done"], event["total"]))

    rows, _ = answered(tmp_path / "cut", tiny_model_folder, small_file, watch=first, batch_tokens=1)
    assert outputs(rows) == outputs(made)
    assert begun[stage] == (1, 2), "the answer that was there is not made again"
    if turn == 2:
        assert all(done == total for name, (done, total) in begun.items() if "turn 1" in name)


def test_attempts_are_drawn_with_a_seed_each_and_refused_where_all_would_be_alike(
    tmp_path, tiny_model_folder, small_file
):
    rows, _ = answered(tmp_path / "a", tiny_model_folder, small_file, attempts=2)
    drawn = [r for r in rows if r.item == 1 and r.turn == 0]
    assert [(r.sample, r.generation["seed"]) for r in drawn] == [(0, 0), (1, 1)]
    assert drawn[0].output != drawn[1].output
    [line] = [
        json.loads(text)
        for text in (tmp_path / f"a/answers/{tiny_model_folder.name}.jsonl").read_text().splitlines()
        if json.loads(text)["question_id"] == 2
    ]
    assert [choice["index"] for choice in line["choices"]] == [0, 1]
    assert [choice["turns"][0] for choice in line["choices"]] == [r.output for r in drawn]
    small_file.write_text(small_file.read_text().splitlines()[0])
    with pytest.raises(TunesmithError, match="greedily"):
        answered(tmp_path / "b", tiny_model_folder, small_file, attempts=2)


def judge_file(folder, url):
    path = folder / "judge.yaml"
    path.write_text(json.dumps({"model": "j", "base_url": url, "backoff": 0}))
    return path


def test_mt_bench_from_model_to_figures(tmp_path, tiny_model_folder, small_file):
    references = write_answers(tmp_path / "gpt.jsonl", Answers("gpt", {1: ("one it is", "two it is")}))
    baseline = Answers("other", {q.id: tuple("paris" for _ in q.turns) for q in SMALL})
    write_answers(tmp_path / "other.jsonl", baseline)

    def reply(number, body):
        text = body["messages"][1]["content"]
        if "of A]" not in text:
            return openai("Rating: [[3]]" if "paris\n" in text else "Rating: [[7]]")
        slot = "A" if "of A]\nparis\n" not in text else "B"
        return openai(f"Verdict: [[{slot}]]")

    out = tmp_path / "out"
    with serving(reply) as (url, seen):
        arguments = [
            tiny_model_folder, "--suite", "mt-bench", "--questions", small_file, "--references", references,
            "--judge", judge_file(tmp_path, url), "--baseline", tmp_path / "other.jsonl", "--max-new-tokens", "6",
            "--output", out, "--no-calibrate",
        ]  # fmt: skip
        code, found = evaluate(*arguments)
        assert code == 0, found
        shown = [body["messages"][1]["content"] for _, body, _ in seen]
        assert any("reference answer 2]\ntwo it is" in text for text in shown)
        asked = len(seen)
        assert evaluate(*arguments)[1]["compared"]["ours"] == found["compared"]["ours"]
        assert len(seen) == asked  # neither answered nor judged again
    name = tiny_model_folder.name
    graded = found["graded"]["ours"]["models"]
    assert graded["other"]["score"]["value"] < graded[name]["score"]["value"]
    assert graded[name]["n"] == 7
    assert graded[name]["missing_turns"] == 0  # the last question has one turn only
    assert graded[name]["categories"].keys() == {"math", "writing", "stem"}
    [pair] = found["compared"]["ours"]["pairs"]
    assert (pair["model"], pair["against"], pair["win_rate"]["value"]) == (name, "other", 1.0)
    assert found["compared"]["fastchat"][name]["win_rate_adjusted"] == 1.0
    rows = read_rows(out / "rows.jsonl")
    assert {row.scores["judge_grade"] for row in rows if row.output.strip()} <= {3.0, 7.0}
    assert len(rows) == 7
    answers = read_answers(out / "answers" / f"{name}.jsonl")
    assert answers.turns[1] == tuple(row.output for row in rows if row.item == 0)
    for page in ("graded", "compared"):
        assert "scatterpolar" in (out / page / "judged.html").read_text()


def test_prompt_files_of_any_kind_make_a_pair_wise_suite(tmp_path, tiny_model_folder):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(
        '{"instruction": "count", "input": "red", "dataset": "d"}\n\n{"prompt": "hello", "answer": "x"}\n'
    )
    first, second = suites.prompts_of(prompts)
    assert (first.turns, first.category, first.references) == (("count\n\nred",), "d", ())
    assert (second.id, second.references) == (3, ("x",))
    lines = tmp_path / "p.txt"
    lines.write_text("one\ntwo\n")
    assert [q.turns for q in suites.prompts_of(lines)] == [("one",), ("two",)]
    with serving(lambda number, body: openai("Verdict: [[C]]")) as (url, seen):
        code, found = evaluate(
            tiny_model_folder, "--suite", "arena", "--questions", lines, "--judge", judge_file(tmp_path, url),
            "--baseline", tiny_model_folder, "--max-new-tokens", "4", "--output", tmp_path / "out", "--no-calibrate",
        )  # fmt: skip
    assert code == 0, found
    [pair] = found["compared"]["ours"]["pairs"]
    # A model against itself: greedy answers are identical, so that nobody is asked and all are ties.
    assert (pair["ties"], pair["win_rate"]["value"], len(seen)) == (2, 0.5, 0)
    assert pair["against"].endswith("(baseline)")
    own = suites.suite_of("alpaca")
    with pytest.raises(TunesmithError, match="baseline"):
        bench.run_suite(
            tiny_model_folder, own, questions=lines, references=None, judge=None, baseline=None,
            evaluation=Evaluation(), output=tmp_path, watch=lambda event: None,
        )  # fmt: skip


def test_the_arena_judge_answers_first():
    from tunesmith.evaluation.judging.prompts import Turn, load_prompts, pair

    system, _ = pair(load_prompts(ARENA), [Turn("q")], ["a"], ["b"])
    assert "First write your own answer" in system["content"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--suite", "mtbench"), "Did you mean 'mt-bench'"), (("--suite", "alpaca"), "--questions"),
        (("--judge", "local:tiny"), "without --suite"), (("--suite", "mt-bench", "--dataset", "x"), "with --suite"),
        (("--suite", "lm-eval:x", "--judge", "local:tiny"), "no effect with lm-eval"),
        (("--suite", "mt-bench", "--max-rows", "3"), "data.max_rows would have no effect"),
        (("--suite", "lm-eval: ,"), "No task"),
    ],
)  # fmt: skip
def test_options_that_do_nothing_are_refused(arguments, said, tiny_model_folder):
    code, found = evaluate(tiny_model_folder, *arguments)
    assert code == 1
    assert said in found["error"]


ROWS = [
    {"prompt": "count, please", "category": "c", "reference": "three"},
    {"prompt": "hello", "category": "d"},
]


def as_file(folder, suffix, rows):
    """The rows as a file of each kind that the data room reads."""
    path = folder / f"prompts{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(json.dumps(rows, indent=1) if suffix == ".json" else lines)
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_questions_are_read_from_any_file_of_the_data_room(tmp_path, suffix):
    first, second = read_questions(as_file(tmp_path, suffix, ROWS))
    assert first == Question(1, "c", ("count, please",), ("three",))
    assert second == Question(2, "d", ("hello",))
    turns = ["what?", "and?", "so?"]
    cell = json.dumps(turns) if suffix == ".csv" else turns
    rows = [{"question_id": 85, "turns": cell, "required_temperature": 0.3}]
    [asked] = read_questions(as_file(tmp_path, suffix, rows))
    assert asked == Question(85, "writing", tuple(turns), (), 0.3), "FastChat's category, by its number"


def test_shapes_of_questions(tmp_path):
    def read(*rows):
        return read_questions(as_file(tmp_path, ".jsonl", rows))

    hard = {"uid": "a1", "category": "hard_prompt", "prompt": "p"}
    older = {"question_id": "b", "turns": [{"content": "q"}]}
    alpaca = {"instruction": "i", "output": "o", "dataset": "koala"}
    first, second, third = read(hard, older, alpaca)
    assert (first.id, second.turns, third) == ("a1", ("q",), Question(3, "koala", ("i",)))
    said = [("user", "one"), ("assistant", "1"), ("user", "two"), ("assistant", "2"), ("user", "three")]
    [asked] = read({"messages": [{"role": role, "content": text} for role, text in said]})
    assert (asked.turns, asked.references) == (("one", "two", "three"), ("1", "2"))
    [asked] = read({"conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "1"}]})
    assert (asked.turns, asked.references) == (("one",), ("1",))
    numbered = [{"question_id": id, "turns": ["a"]} for id in (81, 160)]
    assert [q.category for q in read(*numbered)] == ["writing", "humanities"]
    assert [q.category for q in read(*numbered, {"question_id": 161, "turns": ["a"]})] == ["", "", ""]
    assert [q.category for q in read({**numbered[0], "category": "math"})] == ["math"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"prompt": "a"}\n{"prmt": "x"}', r"prompts.jsonl:2 holds no prompt.*Did you mean 'prompt' for 'prmt'"),
        ('{"prompt": "a"}\n{"prompt"', "prompts.jsonl, line 2, column 10"),
        ('{"turns": ["a", 3]}', "jsonl:1 does not fit: expected turns"),
        ('{"turns": ["a"], "question_id": [1]}', "expected question_id as a number or text"),
        ('{"turns": ["a"], "required_temperature": "hot"}', "expected required_temperature"),
        ('{"question_id": 1, "turns": ["a"]}\n{"question_id": 1, "turns": ["b"]}', "twice.*prompts.jsonl:2"),
        ('{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]}', "cannot ask"),
        ('{"messages": [{"role": "usr", "content": "s"}]}', "jsonl:1 holds no conversation"),
        ("", "no rows"),
    ],
)  # fmt: skip
def test_a_file_of_questions_that_does_not_fit_says_where(tmp_path, text, said):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        read_questions(path)
    assert re.search(said, str(caught.value), re.DOTALL), str(caught.value)


# Answers that are there are never written over, and no judgment is left beside answers that it is not of.


def of_folder(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_answers_of_other_settings_are_kept_apart_by_name_or_refused(
    tmp_path, tiny_model_folder, small_file, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    name = tiny_model_folder.name
    arguments = (tiny_model_folder, "--suite", "mt-bench", "--questions", small_file, "--max-new-tokens")
    first = evaluate(*arguments, 6)[1]["output"]
    assert first == f"evaluations/{name}_mt-bench"
    before = of_folder(tmp_path / first)
    told = []
    again = api.evaluate_suite(
        tiny_model_folder, "mt-bench", questions=small_file, settings={"evaluation": {"max_new_tokens": 4}},
        watch=told.append,
    )  # fmt: skip
    assert again["output"] == f"{first}-2"
    assert of_folder(tmp_path / first) == before
    [event] = [event for event in told if event.get("name") == "output"]
    assert event["reason"] == f"{first} has max new tokens 6 instead of 4"
    assert evaluate(*arguments, 4)[1]["output"] == f"{first}-2"
    code, found = evaluate(*arguments, 5, "--output", first)
    assert code == 1
    assert "max new tokens 6 instead of 5" in found["error"]
    small_file.write_text(small_file.read_text().replace("hello yes", "hello no"))
    assert "other questions" in evaluate(*arguments, 6, "--output", first)[1]["error"]
    assert of_folder(tmp_path / first) == before
    code, found = evaluate(*arguments, 0)
    assert (code, "evaluation.max_new_tokens" in found["error"]) == (1, True)


def test_judgments_stay_with_their_answers_and_another_judge_gets_a_folder_of_its_own(
    tmp_path, tiny_model_folder, small_file, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    arguments = (tiny_model_folder, "--suite", "mt-bench", "--questions", small_file, "--max-new-tokens", "6",
                 "--no-calibrate")  # fmt: skip
    plain = evaluate(*arguments)[1]
    assert "graded" not in plain
    with serving(lambda number, body: openai("Rating: [[4]]")) as (url, _):
        judged = evaluate(*arguments, "--judge", judge_file(tmp_path, url))[1]
        assert judged["output"] == plain["output"], "a judge may come to answers that have none"
        rows = read_rows(f"{plain['output']}/rows.jsonl")
        assert {row.scores.get("judge_grade") for row in rows if row.output.strip()} == {4.0}
        unjudged = evaluate(*arguments)[1]
        assert unjudged["graded"] == judged["graded"], "and what it said stays"
        assert read_rows(f"{plain['output']}/rows.jsonl") == rows
        before = of_folder(tmp_path / plain["output"])
        monkeypatch.setattr(suites, "answer", None)  # nothing is answered again
        stranger = tmp_path / "k.yaml"
        stranger.write_text(json.dumps({"model": "k", "base_url": url, "backoff": 0}))
        other = evaluate(*arguments, "--judge", stranger)[1]
        assert other["output"] == plain["output"] + "-2"
        assert of_folder(tmp_path / plain["output"]) == before
    asked = json.loads((tmp_path / other["output"] / "asked.json").read_text())
    assert asked["judge"][0] == "k"


# What people see, and what `judge` finds


def test_the_verdict_comes_first_and_each_fact_has_a_line(tmp_path, tiny_model_folder, small_file):
    other = write_answers(
        tmp_path / "other.jsonl", Answers("o", {q.id: ("red",) * len(q.turns) for q in SMALL})
    )
    name = tiny_model_folder.name

    def reply(number, body):
        return openai(
            f"Verdict: [[{'A' if 'of B]' + chr(10) + 'red' in body['messages'][1]['content'] else 'B'}]]"
        )

    arguments = [
        "evaluate", tiny_model_folder, "--suite", "alpaca", "--questions", small_file, "--max-new-tokens", "6",
        "--output", tmp_path / "out", "--baseline", other,
    ]  # fmt: skip
    plain = CliRunner().invoke(app, list(map(str, arguments)))
    assert plain.exit_code == 0, plain.output
    assert plain.stdout.startswith(f"{name} has answered 4 questions; nobody has judged the answers.\n")
    with serving(reply) as (url, _):
        arguments += ["--judge", judge_file(tmp_path, url), "--no-calibrate"]
        result = CliRunner().invoke(app, list(map(str, arguments)))
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"{name} is better than other: a win rate of 1.000 [")
    facts = {line[:12].strip(): line[12:] for line in lines if line[:1].isalpha() and line[11:12] == " "}
    assert facts["suite"] == "alpaca: 4 questions, 7 turns"
    assert facts["engine"] == f"{name}: padded, 7/7 equal or near tie"
    assert facts["judge"].startswith("j, not calibrated")
    assert facts["rows"].endswith("rows.jsonl")
    assert any("was trained on is not known" in line for line in lines)


@pytest.mark.parametrize(
    ("estimate", "sure", "word"),
    [
        ((0.7, 0.6, 0.8), True, "better"), ((0.3, 0.2, 0.4), True, "worse"), ((0.6, 0.4, 0.8), True, "no evidence"),
        ((0.9, 0.8, 1.0), False, "inconclusive"), ((None, None, None), True, "inconclusive"),
    ],
)  # fmt: skip
def test_the_verdict_is_that_of_the_interval(estimate, sure, word):
    win_rate = dict(zip(("value", "low", "high"), estimate, strict=True))
    pair = {"win_rate": win_rate, "is_conclusive": sure, "n": 9}
    found = {"model": "a", "baseline": "b", "questions": 9, "compared": {"ours": {"pairs": [pair]}}}
    assert bench.verdict(found)[0] == word
    shifted = {key: value and value - 0.5 for key, value in win_rate.items()}
    grades = {"models": {"a": {"is_conclusive": sure}}, "differences": [{"difference": shifted}]}
    assert bench.verdict({**found, "compared": {}, "graded": {"ours": grades}})[0] == word


def test_answers_of_a_suite_bring_its_questions_to_the_judge(tmp_path, tiny_model_folder, monkeypatch):
    """Of the shipped questions too, with their references: nobody has to name them."""
    own = suites.mt_bench_questions()
    monkeypatch.setattr(suites, "shipped", lambda: [own[20], own[30]])
    answered(tmp_path / "a", tiny_model_folder, None)
    files = sorted((tmp_path / "a/answers").glob("*.jsonl"))
    shown = []

    def reply(number, body):
        shown.append(body["messages"][1]["content"])
        return openai("Rating: [[5]]")

    with serving(reply) as (url, _):
        given = ["judge", *files, "--judge", judge_file(tmp_path, url), "--mode", "single", "--no-calibrate",
                 "--output", tmp_path / "j", "--json"]  # fmt: skip
        result = CliRunner().invoke(app, list(map(str, given)))
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.strip().splitlines()[-1])
    [one] = found["ours"]["models"].values()
    assert (one["n"], set(one["categories"])) == (4, {own[20].category, own[30].category})
    assert any(own[30].references[0] in text for text in shown)


def test_conversations_of_any_number_of_turns_are_asked_and_judged(tmp_path, tiny_model_folder):
    asked = tmp_path / "talks.json"
    asked.write_text(json.dumps([
        {"turns": ["what", "is", "the", "count"], "category": "math"},
        {"messages": [{"role": "user", "content": text} if n % 2 == 0 else {"role": "assistant", "content": text}
                      for n, text in enumerate(["red", "blue", "green"])], "category": "math"},
        {"prompt": "hello", "category": "math"},
    ]))  # fmt: skip
    with serving(lambda number, body: openai("Rating: [[5]]")) as (url, seen):
        rows, _ = answered(tmp_path / "a", tiny_model_folder, asked)
        assert [(r.item, r.turn) for r in rows] == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (2, 0)]
        code, found = evaluate(
            tiny_model_folder, "--suite", "mt-bench", "--questions", asked, "--max-new-tokens", "6", "--output",
            tmp_path / "a", "--judge", judge_file(tmp_path, url), "--no-calibrate", "--set",
            "evaluation.engine=padded",
        )  # fmt: skip
    assert code == 0, found
    [model] = found["graded"]["ours"]["models"].values()
    assert {turn: entry["n"] for turn, entry in model["turns"].items()} == {"1": 3, "2": 2, "3": 1, "4": 1}
    assert (model["missing_turns"], len(seen)) == (0, 7)
    assert found["graded"]["fastchat"][tiny_model_folder.name].keys() == {"turn_1", "turn_2", "average"}


# Questions that a model has met in training


@pytest.fixture(scope="module")
def trained_run(tiny_model_folder, tmp_path_factory):
    """A run that was trained on the first of SMALL, word for word, in a longer conversation."""
    folder = tmp_path_factory.mktemp("trained")
    rows = [
        {"messages": [
            {"role": "user", "content": "what is one"}, {"role": "assistant", "content": "1"},
            {"role": "user", "content": "thank you"}, {"role": "assistant", "content": "yes"},
        ]},
        *({"messages": [{"role": "user", "content": f"row {n} of {n * n}"}, {"role": "assistant", "content": "no"}]}
          for n in range(11)),
    ]  # fmt: skip
    file = folder / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    layer = {
        "output_dir": str(folder), "name": "run", "model": {"base": str(tiny_model_folder)},
        "data": {"dataset": str(file), "validation": 0.0, "held_out": 0.0, "max_length": 64},
        "training": {"max_steps": 1, "per_device_train_batch_size": 1, "warmup_steps": 0},
        "evaluation": {"skip": True},
    }  # fmt: skip
    return Path(api.train(compose(layer).recipe).run)


def test_questions_met_in_training_are_told_and_the_figures_given_without_them(
    tmp_path, tiny_model_folder, trained_run, small_file
):
    """The judge prefers what the run says to the question that it was trained on, and nothing else."""

    def reply(number, body):
        text = body["messages"][1]["content"]
        if "of A]" not in text:
            return openai("Rating: [[9]]" if "what is one" in text else "Rating: [[3]]")
        return openai("Verdict: [[C]]")

    told = []
    with serving(reply) as (url, _):
        found = api.evaluate_suite(
            trained_run, "mt-bench", questions=small_file, judge=judge_file(tmp_path, url), calibrate=False,
            baseline=tiny_model_folder, settings={"evaluation": {"max_new_tokens": 6}}, watch=told.append,
        )  # fmt: skip
    base = tiny_model_folder.name
    leak = found["leakage"]
    assert (leak["questions"], leak["leaked"], leak["unknown"]) == (
        4,
        1,
        {base: "it is no run of tunesmith."},
    )
    assert any(f"What {base} was trained on is not known" in str(event.get("message")) for event in told)
    assert any(event.get("name") == "leakage" and "1 of 4" in event["value"] for event in told)
    every, clean = (part["models"]["run"]["score"] for part in (
        found["graded"]["ours"], leak["clean"]["graded"]["ours"]
    ))  # fmt: skip
    assert (every["n"], clean["n"], clean["value"]) == (7, 5, 3.0)
    assert every["value"] == pytest.approx((2 * 9 + 5 * 3) / 7)
    assert "run has 3.00" in leak["clean"]["graded"]["sentences"][0]
    assert leak["clean"]["compared"]["ours"]["pairs"][0]["n"] == 5
    assert found["output"] == str(trained_run / "evaluation/mt-bench")
    kept = json.loads((trained_run / "evaluation/mt-bench/leakage.json").read_text())
    assert list(kept["leaked"]) == ["0"]
    again = api.evaluate_suite(
        trained_run, "mt-bench", questions=small_file, baseline=tiny_model_folder,
        settings={"evaluation": {"max_new_tokens": 6}},
    )  # fmt: skip
    assert again["output"] == found["output"], "what is written into a run is no change of its model"
    assert again["leakage"] == leak


def test_training_data_that_is_not_known_is_said(tmp_path, tiny_model_folder, small_file):
    _, found = answered(tmp_path / "a", tiny_model_folder, small_file)
    assert found["leakage"]["remarks"] == [
        f"What {tiny_model_folder.name} was trained on is not known, so it may have met any question: it is no run of "
        "tunesmith."
    ]
    assert "leaked" not in found["leakage"]


# lm-evaluation-harness: the real one is an extra; this stands in for it at its own seam.


def stand_in(monkeypatch, evaluate):
    package = types.ModuleType("lm_eval")
    package.simple_evaluate, package.__version__ = evaluate, "0.4.9"
    models_ = types.ModuleType("lm_eval.models")
    huggingface = types.ModuleType("lm_eval.models.huggingface")

    class HFLM:
        def __init__(self, *, pretrained, tokenizer):
            self.model, self.tokenizer = pretrained, tokenizer

    huggingface.HFLM = HFLM
    for name, module in (
        ("lm_eval", package),
        ("lm_eval.models", models_),
        ("lm_eval.models.huggingface", huggingface),
    ):
        monkeypatch.setitem(sys.modules, name, module)


def test_the_harness_gets_our_model_and_its_samples_become_rows(tmp_path, tiny_model_folder, monkeypatch):
    def simple_evaluate(*, model, tasks, log_samples, confirm_run_unsafe_code, apply_chat_template):
        assert (log_samples, confirm_run_unsafe_code, apply_chat_template) == (True, False, True)
        assert model.model.config.hidden_size == 16
        samples = [
            {"doc_id": n, "target": "4", "arguments": [["2+2=", {"until": ["\n"]}]], "filtered_resps": ["4"],
             "filter": name, "metrics": ["exact_match", "odd", "words"], "exact_match": float(n), "odd": float("nan"),
             "words": (-1.5, 3)}
            for name in ("strict", "loose") for n in range(2)
        ]  # fmt: skip
        return {"results": {tasks[0]: {"exact_match,strict": 0.5, "alias": "x"}}, "samples": {tasks[0]: samples},
                "versions": {tasks[0]: 3}}  # fmt: skip

    stand_in(monkeypatch, simple_evaluate)
    code, found = evaluate(tiny_model_folder, "--suite", "lm-eval:arithmetic", "--output", tmp_path)
    assert code == 0, found
    assert found["results"] == {"arithmetic": {"exact_match,strict": 0.5}}
    assert (found["version"], found["task_versions"]) == ("0.4.9", {"arithmetic": 3})
    assert found["chat_template"] == "applied"
    rows = read_rows(tmp_path / "rows.jsonl")
    assert [(r.item, r.sample, r.scores["exact_match"]) for r in rows] == [
        (0, 0, 0.0), (1, 0, 1.0), (0, 1, 0.0), (1, 1, 1.0),
    ]  # fmt: skip
    assert (rows[1].source_row, rows[1].prompt_text, rows[1].output) == ("lm-eval:arithmetic:1", "2+2=", "4")
    assert rows[0].scores == {"exact_match": 0.0}
    assert rows[0].flags == {"odd": ["NaN"], "words": ["[-1.5, 3]"]}, "what is no number is kept"
    assert harness._asked([["a", 1], ["b", 2]]) == '[["a", 1], ["b", 2]]'


def test_a_model_without_a_chat_template_is_asked_without_one(tmp_path, tiny_model_folder, monkeypatch):
    plain = shutil.copytree(tiny_model_folder, tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    seen = []

    def simple_evaluate(**given):
        seen.append(given["apply_chat_template"])
        return {"results": {}, "samples": {}}

    stand_in(monkeypatch, simple_evaluate)
    told = []
    for model in (plain, tiny_model_folder):
        harness.run(model, "x", tmp_path / "out" / model.name, watch=told.append)
    assert seen == [False, True]
    assert [e["value"] for e in told if e.get("name") == "chat template"] == ["not applied", "applied"]
    with pytest.raises(TunesmithError, match="not written over"):
        harness.run(plain, "x", tmp_path / "out" / tiny_model_folder.name, watch=told.append)


def test_a_harness_that_is_missing_or_fails_says_what_to_do(tmp_path, tiny_model_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtra, match="lm-eval"):
        harness.run(tiny_model_folder, "x", tmp_path, watch=lambda event: None)

    def unknown(**given):
        raise KeyError("no such task")

    stand_in(monkeypatch, unknown)
    with pytest.raises(TunesmithError, match="cannot run x"):
        harness.run(tiny_model_folder, "x", tmp_path, watch=lambda event: None)


def test_a_model_that_cannot_talk_is_refused(tiny_t5_folder):
    assert models.kind(str(tiny_t5_folder)) == "seq2seq"
    with pytest.raises(TunesmithError, match="conversation"):
        bench.load_for_suite(str(tiny_t5_folder))
