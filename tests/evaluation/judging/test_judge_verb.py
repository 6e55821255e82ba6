"""`tunesmith judge` from answer files to figures and page, and what is said of the judge itself."""

from __future__ import annotations

import json
import re

import pytest
from judge_servers import openai, serving
from typer.testing import CliRunner

from tunesmith.cli import app
from tunesmith.evaluation.judging import calibration
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
        assert own["pairs"] == 60
        assert len(seen) == 120 + 24
        page = (answer_files / "out/judged.html").read_text()
        assert "scatterpolar" in page
        assert "right in 100 %" in page
        assert "http://" not in page.split("<script>")[0]
        # Started again it asks nobody, and replaying the file gives the same figures.
        assert run(*files, *options, "--output", answer_files / "out")[1]["ours"] == found["ours"]
        assert len(seen) == 144
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
    assert found["calibration"] is None
    assert "not calibrated" in (tmp_path / "out/judged.html").read_text()


def test_a_dry_run_asks_nobody(answer_files):
    judge = settings(answer_files, "http://127.0.0.1:1/v1", price_input=1, price_output=2)
    options = ("--questions", answer_files / "q.jsonl", "--judge", judge, "--dry-run")
    code, found = run(
        answer_files / "tuned.jsonl", answer_files / "base.jsonl", *options, "--output", answer_files
    )
    assert code == 0
    assert found["estimate"]["calls"] == 24
    assert found["estimate"]["most_cost"] > 0


def biased(number, body):
    return openai("Verdict: [[A]]") if number % 7 else openai("no idea")


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
    assert said in found["error"]


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
        options = ("--judge", settings(tmp_path, url), "--baseline", "base", "--no-calibrate")
        assert run(folder, *options, "--dry-run")[1]["estimate"]["calls"] == 6
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
        assert found["recheck"] == {"n": 6, "same": 0.0, "distance": 2.0}
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
