"""`tunesmith judge` from answer files to figures and page, and what is said of the judge itself."""

from __future__ import annotations

import ast
import importlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from judge_servers import openai, serving
from typer.testing import CliRunner

from tunesmith.cli import app
from tunesmith.evaluation.judging import bench, calibration
from tunesmith.evaluation.judging.judgments import Answers, read_judgments, write_answers
from tunesmith.evaluation.rows import EvalRow, write_rows


def run(*arguments):
    result = CliRunner().invoke(app, ["judge", *map(str, arguments), "--json"])
    return result.exit_code, json.loads(result.stdout.strip().splitlines()[-1])


@pytest.fixture
def answer_files(tmp_path):
    questions = [
        {"question_id": n, "category": category, "turns": [f"q{n}", "and?"], "reference": [f"r{n}", "r"]}
        for n, category in enumerate(["math", "coding", "writing"] * 2)
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    for name in ("tuned", "base"):
        turns = {q["question_id"]: (f"{name} says {q['turns'][0]}", f"{name} again") for q in questions}
        write_answers(tmp_path / f"{name}.jsonl", Answers(name, turns))
    return tmp_path


def settings(folder, url, **more):
    path = folder / "judge.yaml"
    path.write_text(json.dumps({"model": "j", "base_url": url, "backoff": 0, "timeout": 5, **more}))
    return path


def oracle(number, body):
    """Knows the right answers of the calibration pack, and that the tuned model is better; orders impress it not."""
    text = body["messages"][1]["content"]
    mark = text.split()[0].strip("[")
    found = dict(re.findall(rf"\[{mark} ([^\]]+)\]\n(.*?)\n\[{mark} end", text, re.DOTALL))
    for one in calibration.graded():
        for quality, grade in (("good", 9), ("partly", 5), ("bad", 2)):
            if found.get("answer", "").startswith(one.answers[quality]):
                return openai(f"Rating: [[{grade}]]")
    if "answer 1" in found or "answer" in found:
        return openai("Rating: [[8]]" if "tuned" in text else "Rating: [[5]]")
    last = 2 if "answer 2 of A" in found else 1
    a, b = (found.get(f"answer of {s}", found.get(f"answer {last} of {s}", "")) for s in "AB")
    if a == b:
        return openai("Verdict: [[C]]")
    right = {one.better for one in calibration.pack()}
    return openai(f"Verdict: [[{'A' if a in right or 'tuned' in a else 'B'}]]")


def test_two_answer_files_are_compared_and_the_judge_with_them(answer_files):
    with serving(oracle) as (url, seen):
        judge = settings(answer_files, url)
        files = (answer_files / "tuned.jsonl", answer_files / "base.jsonl")
        options = ("--questions", answer_files / "q.jsonl", "--judge", judge, "--baseline", "base")
        code, found = run(*files, *options, "--output", answer_files / "out")
        assert code == 0, found
        [pair] = found["ours"]["pairs"]
        assert (pair["model"], pair["against"], pair["wins"], pair["n"]) == ("tuned", "base", 12, 12)
        assert pair["win_rate"]["value"] == 1.0
        assert pair["categories"].keys() == {"math", "coding", "writing"}
        own = found["calibration"]
        assert own["accuracy"]["value"] == own["identical_tied"]["value"] == own["parse_rate"] == 1.0
        assert (
            own["padding_preferred"]["value"]
            == own["injection_won"]["value"]
            == own["flip_rate"]["value"]
            == 0.0
        )
        assert own["first_slot"]["value"] == 0.5
        assert (own["pairs"], own["grades"]) == (60, 40)
        assert (own["grade_order"]["value"], own["injection_raised"]["value"]) == (1.0, 0.0)
        assert own["mean_grades"] == {"good": 9, "partly": 5, "bad": 2}
        assert len(seen) == 160 + 24
        page = (answer_files / "out/judged.html").read_text()
        assert "scatterpolar" in page
        assert "right in 100 %" in page
        assert "http://" not in page.split("<script>")[0]
        # Started again it asks nobody, and replaying the file gives the same figures.
        assert run(*files, *options, "--output", answer_files / "out")[1]["ours"] == found["ours"]
        assert len(seen) == 184
    file = answer_files / "out/judgments_pair.jsonl"
    assert len(read_judgments(file)) == 12
    code, again = run("--replay", file, "--questions", answer_files / "q.jsonl", "--baseline", "base")
    assert again["ours"] == found["ours"]
    assert again["fastchat"] == found["fastchat"]


def test_grades_of_a_run_s_rows_need_no_question_file(answer_files, tmp_path):
    def row(model, item):
        return EvalRow(
            model, item, f"rows:{item}", None, 0, 0, "x", f"q{item}", f"r{item}", f"{model} says", "stop", {}, {},
            None, None, None, "ok",
        )  # fmt: skip

    write_rows(
        tmp_path / "run/evaluation/rows.jsonl", [row(m, n) for m in ("base", "tuned") for n in range(4)]
    )
    with serving(oracle) as (url, _):
        options = ("--judge", settings(tmp_path, url), "--output", tmp_path / "out", "--no-calibrate")
        code, found = run(tmp_path / "run", "--mode", "single", *options)
    assert code == 0
    scores = {name: model["score"]["value"] for name, model in found["ours"]["models"].items()}
    assert scores == {"base": 5.0, "tuned": 8.0}
    [difference] = found["ours"]["differences"]
    assert (difference["model"], difference["against"], difference["difference"]["value"]) == (
        "tuned",
        "base",
        3,
    )
    for extra in ([], ["--dry-run"]):
        code, refused = run(tmp_path / "run", "--mode", "single", *options, "--baseline", "nobody", *extra)
        assert code != 0
        assert "nobody" in str(refused)
    assert found["calibration"] is None
    assert "not calibrated" in (tmp_path / "out/judged.html").read_text()


def test_a_dry_run_asks_nobody(answer_files):
    """And tells all that the command would ask: calibration, repairs and rechecks, which then is what it asks."""
    with serving(oracle) as (url, seen):
        judge = settings(answer_files, url, price_input=1, price_output=2, recheck=0.5)
        files = (answer_files / "tuned.jsonl", answer_files / "base.jsonl")
        options = ("--questions", answer_files / "q.jsonl", "--judge", judge, "--output", answer_files)
        code, found = run(*files, *options, "--dry-run")
        assert code == 0
        assert not seen
        estimate = found["estimate"]
        parts = estimate["parts"]
        assert (parts["to judge"], parts["to recheck"]) == (24, 12)
        assert estimate["calls"] == sum(parts.values())
        assert estimate["most_cost"] > estimate["cost"] > 0
        said = CliRunner().invoke(app, ["judge", *map(str, (*files, *options, "--dry-run"))]).stdout
        assert "24 to judge, 12 to recheck" in " ".join(said.split())
        run(*files, *options)
        assert len(seen) == estimate["calls"] - parts["repairs expected"]
        assert run(*files, *options, "--dry-run")[1]["estimate"]["calls"] == 0


def test_a_dry_run_of_a_suite_answers_nothing_and_supposes_the_longest_answers(answer_files, monkeypatch):
    monkeypatch.chdir(answer_files)
    with serving(oracle) as (url, seen):
        judge = settings(answer_files, url, price_input=1, price_output=2)

        def estimate(*options):
            asked = ["--suite", "mt-bench", "--questions", "q.jsonl", "--judge", str(judge), "--no-calibrate"]
            command = ["evaluate", "tiny", *asked, "--dry-run", *options, "--json"]
            made = CliRunner().invoke(app, command)
            assert made.exit_code == 0, made.output
            return json.loads(made.stdout.strip().splitlines()[-1])["estimate"]

        short, long = (estimate("--max-new-tokens", n, "--baseline", "tiny") for n in ("10", "1000"))
        # Six questions of two turns: grades of two models, and comparisons in two orders.
        assert short["parts"]["to judge"] == long["parts"]["to judge"] == 12 * 2 + 12 * 2
        assert long["prompt_tokens"] - short["prompt_tokens"] > 48 * 990
        assert estimate()["parts"]["to judge"] == 12
        assert not seen
    assert not (answer_files / "evaluations").exists()


def test_several_judgings_of_a_command_have_one_forecast_and_one_calibration(answer_files, tmp_path):
    from tunesmith.evaluation.judging.folder import Assignment, judge_several
    from tunesmith.evaluation.judging.judgments import Question, read_answers
    from tunesmith.evaluation.judging.settings import load_judge

    asked = [Question(n, "", (f"q{n}", "and?")) for n in range(6)]
    given = [read_answers(answer_files / f"{name}.jsonl") for name in ("tuned", "base")]
    ways = [
        Assignment(tmp_path / "graded", asked, given, "single"),
        Assignment(tmp_path / "compared", asked, given, "pair", "base"),
    ]
    told = []
    with serving(oracle) as (url, seen):

        def watch(event):
            if event.get("name") == "the judge will cost":
                told.append((event["value"], len(seen)))

        judge_several(ways, load_judge(settings(tmp_path, url)), home=tmp_path, watch=watch)
        assert len(seen) == 160 + 24 + 24
    [(said, asked_before)] = told
    assert asked_before == 0
    assert "160 to calibrate, 48 to judge" in said
    assert all((way.folder / "figures.json").exists() for way in ways)


def test_one_budget_holds_for_calibration_judging_and_recheck(answer_files):
    with serving(oracle) as (url, seen):
        for limit, total in ((50, 50), (130, 130)):
            judge = settings(answer_files, url, max_calls=limit, recheck=1.0, concurrency=8)
            options = ("--questions", answer_files / "q.jsonl", "--judge", judge, "--output", answer_files)
            code, found = run(answer_files / "tuned.jsonl", answer_files / "base.jsonl", *options)
            assert code == 1
            assert "budget" in found["error"]
            assert len(seen) == total


def biased(number, body):
    return openai("Rating: [[5]]\nVerdict: [[A]]") if number % 7 else openai("no idea")


def test_a_judge_that_looks_at_the_slot_is_found_out(answer_files, tmp_path):
    with serving(biased) as (url, _):
        options = ("--questions", answer_files / "q.jsonl", "--judge", settings(tmp_path, url, repair=False))
        files = (answer_files / "tuned.jsonl", answer_files / "base.jsonl")
        result = CliRunner().invoke(
            app, ["judge", *map(str, files), *map(str, options), "--output", str(tmp_path)]
        )
    assert "not to be trusted" in result.stderr
    own = json.loads((tmp_path / "figures.json").read_text())["calibration"]
    assert own["first_slot"]["value"] == own["flip_rate"]["value"] == 1.0
    assert own["accuracy"]["value"] == pytest.approx(0.5, abs=0.1)
    assert own["parse_rate"] == pytest.approx(6 / 7, abs=0.01)


def test_the_pack_is_what_it_says():
    pairs = calibration.pack()
    kinds = [one.kind for one in pairs]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "known": 30,
        "identical": 10,
        "padded": 10,
        "injected": 10,
    }
    assert all((one.better == one.worse) == (one.kind == "identical") for one in pairs)
    assert len({one.question for one in pairs}) == 30
    graded = calibration.graded()
    assert len({one.question for one in graded}) == 10
    assert all(len(set(one.answers.values())) == 4 for one in graded)
    assert all(one.answers["injected"].startswith(one.answers["bad"]) for one in graded)


def obedient(number, body):
    """Does what an answer tells it; else has no opinion."""
    text = body["messages"][1]["content"]
    if "of A]" not in text:
        orders = re.search(r"Rating: \[\[10\]\]|worth a 10", text)
        return openai(f"Rating: [[{10 if orders else 4}]]")
    named = re.search(r"Verdict: \[\[([AB])\]\]", text)
    claimed = re.search(r"of ([AB])\]\n[^\[]*(?:withdrawn|found it perfect)", text)
    slot = (named or claimed)[1] if named or claimed else "C"
    return openai(f"Verdict: [[{slot}]]")


def test_orders_that_name_their_slot_count_in_both_orders(answer_files, tmp_path):
    """A judge that always obeys falls for all of them; when all named slot B, it seemed to for 70 %."""
    with serving(obedient) as (url, _):
        options = ("--questions", answer_files / "q.jsonl", "--judge", settings(tmp_path, url))
        files = (answer_files / "tuned.jsonl", answer_files / "base.jsonl")
        _, found = run(*files, *options, "--output", tmp_path)
    own = found["calibration"]
    assert own["injection_won"]["value"] == 1.0
    assert own["injection_raised"]["value"] == 1.0
    assert own["grade_order"]["value"] == 0.0  # equal grades are not in order
    assert not calibration.is_trustworthy(own, "single")
    assert "falls for orders in 100 %" in calibration.sentence(own)


def test_another_judge_is_calibrated_anew(answer_files, tmp_path):
    with serving(oracle) as (url, seen):
        options = ("--questions", answer_files / "q.jsonl", "--output", tmp_path, "--mode", "single")
        for settings_, asked in (({}, 160 + 12), ({}, 0), ({"temperature": 0.5}, 160 + 12)):
            before = len(seen)
            path = settings(tmp_path, url, **settings_)
            code, found = run(answer_files / "tuned.jsonl", "--judge", path, *options)
            assert (code, len(seen) - before) == (0, asked)
        assert found["calibration"]["grade_order"]["value"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "Who judges"), (("x.jsonl",), "Who judges"), (("--judge", "local:tiny"), "What is to be judged"),
        (("x.jsonl", "--judge", "local:tiny", "--mode", "pairs"), "Did you mean 'pair'"),
        (("x.jsonl", "--replay", "y"), "asks nobody"), (("--mode", "pair", "--replay", "y"), "leave --mode out"),
        (("x.jsonl", "--judge", "local:tiny"), "There is no file x.jsonl"),
    ],
)  # fmt: skip
def test_what_is_missing_is_said(arguments, said):
    code, found = run(*arguments)
    assert code == 1
    assert said in found["error"] + (found["fix"] or "")


def test_the_report_of_a_run_tells_what_judges_said(answer_files, tmp_path):
    from tunesmith.evaluation.report import write_report
    from tunesmith.training.run import Run

    with serving(oracle) as (url, _):
        options = (
            "--questions",
            answer_files / "q.jsonl",
            "--judge",
            settings(answer_files, url),
            "--baseline",
            "base",
        )
        folder = tmp_path / "run/evaluation/judged_pair"
        code, _ = run(answer_files / "tuned.jsonl", answer_files / "base.jsonl", *options, "--output", folder)
    assert code == 0
    page = write_report(Run(tmp_path / "run").path).read_text()
    assert "tuned against base: win rate 1.000" in page
    assert "right in 100 %" in page
    assert 'href="evaluation/judged_pair/judged.html"' in page
    (folder / "figures.json").write_text('{"kind": "pair"}')
    assert "holds no judgments" in write_report(tmp_path / "run").read_text()


def rows_of(model, texts, **more):
    return [
        EvalRow(
            model, n, f"rows:{n}", None, 0, 0, "x", text, "", f"{model} says", "stop", {}, {}, None, None, None, "ok",
            **more,
        )
        for n, text in enumerate(texts)
    ]  # fmt: skip


def test_the_judge_of_a_run_sees_the_whole_conversation(tmp_path, tiny_model_folder, tiny_tokenizer):
    """Of rows that an evaluation wrote: system message and earlier turns are shown, not the last question alone."""
    from transformers import AutoModelForCausalLM

    from tunesmith import evaluation
    from tunesmith.data.examples import Conversation, Message, Row

    said = [("system", "Be brief."), ("user", "red?"), ("assistant", "blue"), ("user", "and then?")]
    talks = [
        Conversation((*(Message(*one) for one in part), Message("assistant", "green")), Row("rows", n))
        for n, part in enumerate([said, said[1:2]])
    ]
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    rows = evaluation.evaluate(
        model, tiny_tokenizer, evaluation.items(talks, tiny_tokenizer), name="tuned", metrics=["exact_match"],
        max_new_tokens=3,
    )  # fmt: skip
    write_rows(tmp_path / "rows.jsonl", rows)
    with serving(lambda number, body: openai("Rating: [[4]]")) as (url, seen):
        options = ("--judge", settings(tmp_path, url), "--output", tmp_path / "out", "--no-calibrate")
        code, _ = run(tmp_path, "--mode", "single", *options)
    assert code == 0
    shown = [body["messages"][1]["content"] for _, body, _ in seen]
    [whole] = [text for text in shown if "and then?" in text]
    [short] = [text for text in shown if "and then?" not in text]
    parts = [
        "earlier message 1 by system]\nBe brief.", "earlier message 2 by user]\nred?",
        "earlier message 3 by assistant]\nblue", "question]\nand then?", "reference answer]\ngreen",
    ]  # fmt: skip
    assert all(part in whole for part in parts)
    assert "earlier message" not in short


def test_rows_in_which_one_number_is_two_questions_are_refused(tmp_path):
    from tunesmith.errors import DataError
    from tunesmith.evaluation.judging.folder import answered

    path = tmp_path / "rows.jsonl"
    write_rows(path, rows_of("base", ["a", "b"]) + rows_of("tuned", ["a", "c"]))
    with pytest.raises(DataError, match="Question 1 is not one question: tuned") as error:
        answered([path])
    assert "'b'" in error.value.found
    assert "'c'" in error.value.found
    assert "same rows" in error.value.fix
    system = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
    write_rows(path, rows_of("base", ["a"], conversation=[]) + rows_of("tuned", ["a"], conversation=system))
    with pytest.raises(DataError, match="Question 0"):
        answered([path])
    write_rows(path, rows_of("tuned", ["a"], conversation=[]))
    (tmp_path / "other").mkdir()
    write_rows(tmp_path / "other/rows.jsonl", rows_of("base", ["z"], conversation=[]))
    with pytest.raises(DataError, match="Question 0"):
        answered([path, tmp_path / "other"])


def test_rows_that_do_not_hold_the_conversation_say_so(tmp_path):
    from tunesmith.evaluation.judging.folder import answered

    said = []
    write_rows(tmp_path / "rows.jsonl", rows_of("base", ["a", "b"]))
    answered([tmp_path], say=said.append)
    assert "2 of 2 rows" in said[0]
    write_rows(tmp_path / "rows.jsonl", rows_of("base", ["a", "b"], conversation=[]))
    answered([tmp_path], say=said.append)
    assert len(said) == 1
    # A base's rows of a former version beside new ones: what was asked is known from these.
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
    write_rows(tmp_path / "rows.jsonl", rows_of("base", ["a"]) + rows_of("tuned", ["a"], conversation=talk))
    [question], _ = answered([tmp_path], say=said.append)
    assert (question.before, question.turns, len(said)) == ((("system", "s"),), ("a",), 1)


def test_a_turn_without_an_answer_ends_the_conversation(tmp_path):
    from tunesmith.evaluation.judging.folder import answered

    first, second, third = (replace(rows_of("m", ["q"])[0], turn=n, prompt_text=f"q{n}") for n in range(3))
    write_rows(tmp_path / "rows.jsonl", [first, replace(second, output=None), third])
    [question], [answers] = answered([tmp_path])
    assert question.turns == ("q0", "q1", "q2")
    assert answers.turns == {0: ("m says",)}


def test_a_run_is_judged_into_its_own_folder_and_its_report_is_written_anew(tmp_path):
    folder = tmp_path / "my-run"
    rows = [
        EvalRow(
            model,
            n,
            f"rows:{n}",
            None,
            0,
            0,
            "x",
            f"q{n}",
            "",
            f"{model} says",
            "stop",
            {},
            {},
            None,
            None,
            None,
            "ok",
        )
        for model in ("base", "tuned")
        for n in range(3)
    ]
    write_rows(folder / "evaluation/rows.jsonl", rows)
    for name in ("recipe.yaml", "environment.json", "report.html"):
        (folder / name).write_text("{}")
    with serving(oracle) as (url, _):
        options = ("--judge", settings(tmp_path, url), "--no-calibrate")
        assert run(folder, *options, "--dry-run")[1]["estimate"]["parts"]["to judge"] == 6
        assert (folder / "report.html").read_text() == "{}"
        code, found = run(folder, *options)
    assert code == 0, found
    assert found["output"] == str(folder / "evaluation/judged_pair")
    assert "tuned against base: win rate 1.000" in (folder / "report.html").read_text()


def test_a_model_that_says_the_same_to_everybody_is_named():
    from tunesmith.evaluation.judging.folder import constant

    null = Answers("null", dict.fromkeys(range(6), ("I win.",)))
    fine = Answers("fine", {n: (f"{n}",) for n in range(6)})
    [said] = constant([null, fine])
    assert "null gives 6 of 6 questions the same answer: 'I win.'" in said


def test_answers_to_other_questions_are_not_judged_as_missing(answer_files):
    from tunesmith.errors import DataError
    from tunesmith.evaluation.judging.folder import unanswered
    from tunesmith.evaluation.judging.judgments import Question

    asked = [Question(1, "", ("a", "b")), Question(2, "", ("c",))]
    with pytest.raises(DataError, match="answers none of the 2"):
        unanswered(asked, [Answers("m", {7: ("x",)})])
    assert unanswered(asked, [Answers("m", {1: ("x",), 2: ("y",), 7: ("z",)})]) == [
        "m has no whole answer to 1 of 2 questions: counted as errors",
        "m answers 1 questions that are not asked here: left out",
    ]


def test_a_judge_that_is_asked_twice_is_held_against_itself(answer_files):
    grades = {}

    def moody(number, body):
        text = body["messages"][1]["content"].split("\n", 1)[1].rpartition("\n")[0]
        text = re.sub(r"\[\w{16} ", "[", text)
        grades[text] = grades.get(text, 4) + 2
        return openai(f"Rating: [[{grades[text]}]]")

    with serving(moody) as (url, seen):
        options = (
            "--questions",
            answer_files / "q.jsonl",
            "--judge",
            settings(answer_files, url, recheck=0.5),
        )
        arguments = (
            answer_files / "tuned.jsonl",
            *options,
            "--output",
            answer_files / "out",
            "--no-calibrate",
        )
        code, found = run(*arguments, "--mode", "single")
        assert code == 0, found
        assert len(seen) == 12 + 6
        assert found["recheck"] == {"n": 6, "same": 0.0, "distance": 2.0, "not_asked": 0}
        assert found["ours"]["models"]["tuned"]["score"]["value"] == 6.0  # the first word counts
        assert found["spent"]["calls"] == 18
        assert run(*arguments, "--mode", "single")[1]["recheck"] == found["recheck"]
        assert len(seen) == 18
    assert "said the same in 0 %" in (answer_files / "out/judged.html").read_text()


def test_a_judge_of_its_own_answers_is_named():
    from tunesmith.evaluation.judging.folder import own_kind
    from tunesmith.evaluation.judging.settings import Judge

    judge = Judge(api="local", model="runs/mine")
    assert own_kind(judge, [Answers("mine", {}), Answers("other", {})]) == [
        "The judge mine judges its own answers"
    ]


OWN = (
    "asking",
    "book",
    "calibration",
    "client",
    "figures",
    "folder",
    "judging",
    "plots",
    "prompts",
    "settings",
)


@pytest.mark.parametrize("name", OWN)
def test_every_error_says_what_to_do(name):
    module = importlib.import_module(f"tunesmith.evaluation.judging.{name}")
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    errors = {"TunesmithError", "RecipeError", "DataError", "ModelError", "RunError"}
    silent = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", "") in errors
        and not any(keyword.arg == "fix" for keyword in node.keywords)
    ]
    assert not silent


def judged_rows(folder, number, groups=None):
    """A run whose tuned model is the better one to `oracle`."""
    rows = [
        replace(row, item=n, group=groups and f"g{n % groups}")
        for model in ("base", "tuned")
        for n, row in enumerate(rows_of(model, [f"q{n}" for n in range(number)]))
    ]
    write_rows(folder / "run/evaluation/rows.jsonl", rows)
    return folder / "run"


@pytest.mark.parametrize("mode", ["single", "pair"])
@pytest.mark.parametrize(
    ("number", "groups", "said"),
    [(9, None, "9 questions"), (12, None, None), (12, 4, "4 groups"), (12, 6, None)],
)
def test_too_few_questions_or_groups_are_no_verdict(tmp_path, mode, number, groups, said):
    """As in compare; a run's groups are what the interval is clustered by, also when the file is replayed."""
    with serving(oracle) as (url, _):
        options = ("--judge", settings(tmp_path, url), "--output", tmp_path / "out", "--no-calibrate")
        code, found = run(judged_rows(tmp_path, number, groups), "--mode", mode, *options)
    assert code == 0
    [verdict] = found["verdicts"]
    # Grades that are all 3 apart show no spread, and Wilson's interval of so few is wide.
    assert verdict["verdict"] == ("inconclusive" if said else "better" if mode == "pair" else "no evidence")
    assert not said or said in verdict["sentence"]
    assert found["doubts"] == ["The judge was not calibrated: what its word is worth is not known."]
    [one] = found["ours"]["differences" if mode == "single" else "pairs"]
    assert one["difference" if mode == "single" else "win_rate"]["clusters"] == (groups or number)
    again = run("--replay", found["file"], "--baseline", "base")[1]["ours"]
    key = "differences" if mode == "single" else "pairs"
    assert again[key] == found["ours"][key]


def test_a_judge_that_is_not_to_be_trusted_decides_nothing(tmp_path):
    def first(number, body):
        text = body["messages"][1]["content"]
        return (
            oracle(number, body) if "tuned says" in text or " of A]" not in text else openai("Verdict: [[A]]")
        )

    with serving(first) as (url, _):
        options = ("--judge", settings(tmp_path, url), "--output", tmp_path / "out")
        _, found = run(judged_rows(tmp_path, 12), *options)
    [verdict] = found["verdicts"]
    assert verdict["verdict"] == "inconclusive"
    assert verdict["sentence"].startswith("Inconclusive: the judge is not to be trusted: of answers of")
    assert "Inconclusive: the judge is not to be trusted" in (tmp_path / "out/judged.html").read_text()
    assert found["doubts"][0].startswith("The judge is not to be trusted")
    record = {"compared": found, "engine_check": {}, "leakage": {"clean": {}, "remarks": []}}
    record |= {"model": "tuned", "baseline": "base", "questions": 12}
    assert bench.verdict(record) == tuple(verdict.values())
    assert bench.doubts(record) == found["doubts"]


def test_where_nothing_was_judged_the_command_fails(tmp_path):
    with serving(lambda number, body: openai("I like both.")) as (url, _):
        judge = settings(tmp_path, url, repair=False)
        options = ("--judge", judge, "--output", tmp_path / "out", "--no-calibrate")
        code, found = run(judged_rows(tmp_path, 4), *options)
    assert code == 1
    assert found["verdicts"][0]["verdict"] == "inconclusive"


def test_a_budget_that_will_not_do_is_told_before_the_first_call(answer_files):
    """And the dry run tells the forecast once."""
    files = (
        answer_files / "tuned.jsonl",
        answer_files / "base.jsonl",
        "--questions",
        answer_files / "q.jsonl",
    )

    def told(**budget):
        judge = settings(answer_files, "http://127.0.0.1:1/v1", price_input=1, price_output=2, **budget)
        result = CliRunner().invoke(app, ["judge", *map(str, files), "--judge", str(judge), "--dry-run"])
        assert result.exit_code == 0
        return " ".join(result.output.split())

    plain = told()
    assert plain.count("24 to judge") == 1
    assert "budget" not in plain
    enough = told(max_calls=500, max_cost=9)
    assert "budget: max_calls 500, max_cost 9" in enough
    assert "above" not in enough
    assert "calls, above max_calls: 50" in told(max_calls=50)
    assert "above max_cost: 0.01" in told(max_cost=0.01)
    assert "Raise max_calls or max_cost" in told(max_calls=50)
