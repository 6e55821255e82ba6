"""A judge behind a network that fails in every way: no row is lost, none is judged twice, no budget is exceeded."""

from __future__ import annotations

import collections
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from judge_servers import dripping, openai, serving
from safetensors.torch import load_file, save_file

from tunesmith import http
from tunesmith.errors import RecipeError, RunError
from tunesmith.evaluation.judging import asking
from tunesmith.evaluation.judging.book import Book
from tunesmith.evaluation.judging.client import Reply
from tunesmith.evaluation.judging.judging import IDENTICAL, NO_ANSWER, jobs, judge_all, requests
from tunesmith.evaluation.judging.judgments import Answers, Question
from tunesmith.evaluation.judging.prompts import load_prompts
from tunesmith.evaluation.judging.settings import Judge, load_judge

TEXTS = load_prompts()
QUESTIONS = [Question(n, "math", (f"what is {n}?", "and twice that?")) for n in range(12)]
GOOD = Answers("good", {q.id: (f"good one {q.id}", f"good two {q.id}") for q in QUESTIONS})
BAD = Answers("bad", {q.id: (f"bad one {q.id}", f"bad two {q.id}") for q in QUESTIONS})


def judged(url, path, todo, **settings):
    judge = Judge(model="j", base_url=url, **{"backoff": 0.0, "timeout": 10.0, **settings})
    return judge_all(todo, judge, asking.asker(judge), TEXTS, path)


def forecast(path, todo, **settings):
    judge = Judge(**{"model": "j", "base_url": "http://127.0.0.1:1/v1", **settings})
    with Book(path) as book:
        return asking.forecast(judge, {"to judge": requests(todo, asking.asker(judge), TEXTS)}, book)


def shown(body):
    return body["messages"][1]["content"]


def better(body):
    """An honest judge: finds the good answer whatever its slot."""
    slot = re.search(r"answer (?:2 )?of (\w)\]\ngood \w+ \d+\n", shown(body))[1]
    return f"Because.\nVerdict: [[{slot}]]"


def asked_for(body):
    """What a request asks for, without the random mark."""
    text = shown(body)
    return text.replace(text.split()[0].strip("["), "")


def test_a_network_that_fails_in_every_way_loses_and_repeats_nothing(tmp_path, monkeypatch):
    """Every request meets another failure first, then the same verdict as without any."""
    tries, lock = collections.Counter(), threading.Lock()
    answered = collections.Counter()
    failures = [
        (429, "", {"Retry-After": "0"}), (500, "oh", {}), (503, "", {}), (200, "{not json", {}), (200, "", {}),
        (200, '{"choices": []}', {}), (200, "[]", {}), (200, '{"choices": [{"message": {"content": 7}}]}', {}),
        (200, "short", {"Content-Length": "500"}), 0.0, (200, "x" * 60_000, {}), dripping, (504, "", {}),
        (429, "", {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}), 2.5,
    ]  # fmt: skip
    monkeypatch.setattr(http, "LARGEST", 50_000)

    def reply(number, body):
        name = asked_for(body)
        with lock:
            tries[name] += 1
            if tries[name] == 1:
                return failures[len(tries) % len(failures)]
            answered[name] += 1
        return openai(better(body))

    todo = jobs(QUESTIONS, [BAD, GOOD], "pair", baseline="bad")
    with serving(reply) as (url, seen):
        found = judged(url, tmp_path / "replies.jsonl", todo, timeout=1.5, concurrency=16)
        assert len(seen) == 2 * 48
        # Everything is in the book: nobody is asked again, and the judgments are the same to the letter.
        again = judged(url, tmp_path / "replies.jsonl", todo)
        assert again.judgments == found.judgments
        assert len(seen) == 2 * 48
    assert len(found.judgments) == 24
    assert {(one.question, one.turn) for one in found.judgments} == {
        (q.id, t) for q in QUESTIONS for t in (1, 2)
    }
    assert all((one.g1_winner, one.g2_winner) == ("model_1", "model_1") for one in found.judgments)
    assert all(one.model_1 == "good" for one in found.judgments)
    assert set(answered.values()) == {1}
    assert len(answered) == 48


def test_time_outs_are_tried_again_and_counted_as_charged(tmp_path):
    def reply(number, body):
        return 2.5 if number == 1 else openai("Rating: [[4]]")

    todo = jobs(QUESTIONS[:1], [GOOD], "single")[:1]
    with serving(reply) as (url, seen):
        found = judged(url, tmp_path / "r.jsonl", todo, timeout=1.0)
        assert len(seen) == 2
    assert found.judgments[0].score == 4.0
    assert found.spent["calls"] == 2
    assert found.spent["completion_tokens"] == 1024 + 2  # the lost call at its most, the other as counted


def test_what_never_gets_a_verdict_is_an_error_and_is_tried_again_next_time(tmp_path):
    def reply(number, body):
        if "what is 3?" in shown(body):
            return 500, "", {}
        if "what is 4?" in shown(body):
            return openai("As [1] says: well done.")
        return openai("Rating: [[6]]")

    todo = jobs(QUESTIONS[:6], [GOOD], "single")
    with serving(reply) as (url, seen):
        found = judged(url, tmp_path / "r.jsonl", todo, retries=2)
        scores = {(one.question, one.turn): one for one in found.judgments}
        assert len(scores) == 12
        assert "HTTP 500" in scores[3, 1].error
        assert scores[4, 1].error == "a reply without a verdict"
        assert [scores[n, t].score for n in (3, 4) for t in (1, 2)] == [None] * 4
        assert sum(one.score == 6 for one in found.judgments) == 8
        repairs = [body for _, body, _ in seen if len(body["messages"]) == 4]
        assert len(repairs) == 2, "a reply without a verdict is asked for it once"
        assert repairs[0]["messages"][2]["content"] == "As [1] says: well done."
        before = len(seen)
        judged(url, tmp_path / "r.jsonl", todo, retries=0)
        assert (
            len(seen) - before == 2
        )  # what failed on the way; what was answered badly is not paid for again


def test_a_repaired_verdict_counts(tmp_path):
    def reply(number, body):
        return openai("Rating: [[8]]" if len(body["messages"]) == 4 else "It is fine.")

    with serving(reply) as (url, _):
        found = judged(url, tmp_path / "r.jsonl", jobs(QUESTIONS[:1], [GOOD], "single"))
    assert [one.score for one in found.judgments] == [8.0, 8.0]


def test_answers_that_are_missing_or_identical_are_not_asked_about(tmp_path):
    half = Answers("half", {0: ("good one 0",), 1: ("$ERROR$", "x"), 2: GOOD.turns[2]})
    todo = jobs(QUESTIONS[:3], [GOOD, half], "pair", baseline="half")
    with serving(lambda number, body: openai("Verdict: [[A]]")) as (url, seen):
        found = judged(url, tmp_path / "r.jsonl", todo).judgments
    assert not seen
    outcomes = {(one.question, one.turn): (one.g1_winner, one.flags, one.errors[0]) for one in found}
    assert outcomes[0, 1] == ("tie", (IDENTICAL,), "")
    assert outcomes[0, 2] == ("error", (), NO_ANSWER)
    assert outcomes[1, 1][0] == "error"
    assert outcomes[2, 2][0] == "tie"


@pytest.mark.parametrize(
    ("limits", "most"),
    [
        ({"max_calls": 5}, 5),
        ({"max_cost": 0.02, "price_input": 1.0, "price_output": 10.0, "concurrency": 4}, None),
    ],
)
def test_a_budget_is_never_exceeded_and_the_rest_can_follow(tmp_path, limits, most):
    todo, path = jobs(QUESTIONS, [GOOD], "single"), tmp_path / "r.jsonl"
    with serving(lambda number, body: openai("Rating: [[6]]", read=900, written=400)) as (url, seen):
        for _ in range(2):  # a second start does not begin a new budget
            with pytest.raises(RunError, match="budget") as error:
                judged(url, path, todo, **limits)
        assert "run the same command again" in error.value.fix
        assert "Raise max_calls or max_cost" in error.value.fix
        with Book(path) as book:
            assert book.spent.calls == len(seen) == len(book.entries)
            if most:
                assert len(seen) == most
            else:
                money = (book.spent.prompt_tokens * 1 + book.spent.completion_tokens * 10) / 1e6
                assert money <= 0.02
                assert len(seen) == 2  # .0098 spent; a third could cost another .011
        done = len(seen)
        assert forecast(path, todo, repair=False, base_url=url).calls == 24 - done
        found = judged(url, path, todo)
        assert len(seen) == 24
        assert all(one.score == 6.0 for one in found.judgments)


def test_a_forecast_counts_what_is_new_and_expects_repairs(tmp_path):
    todo, prices = jobs(QUESTIONS, [GOOD, BAD], "pair"), {"price_input": 3.0, "price_output": 15.0}
    found = forecast(tmp_path / "r.jsonl", todo, **prices)
    assert found.parts == {"to judge": 48, "repairs expected": 3}  # 5 % of 48, rounded up
    assert (found.calls, found.most_calls, found.most_completion_tokens) == (51, 96, 51 * 1024)
    assert found.cost == pytest.approx((found.prompt_tokens * 3 + 51 * 1024 * 15) / 1e6)
    assert found.most_cost > 96 * 1024 * 15 / 1e6 > found.cost
    assert "51 calls (48 to judge, 3 repairs expected)" in found.sentence()
    plain = forecast(tmp_path / "r.jsonl", todo, **prices, repair=False)
    assert (plain.calls, plain.most_calls) == (48, 48)
    assert found.prompt_tokens > plain.prompt_tokens + 3 * 1024  # a repair reads the reply, too
    with serving(lambda number, body: openai("no idea")) as (url, _):
        judged(url, tmp_path / "r.jsonl", todo[:2], repair=False)
        known = forecast(tmp_path / "r.jsonl", todo[:2], base_url=url)
    assert (known.known, known.calls, known.parts["repairs expected"]) == (4, 4, 4)  # these lack one for sure


def test_what_an_endpoint_does_not_count_is_counted_at_its_most(tmp_path):
    uncounted = json.dumps({"choices": [{"message": {"content": "Rating: [[6]]"}}]})
    with serving(lambda number, body: (200, uncounted, {})) as (url, seen):
        found = judged(url, tmp_path / "r.jsonl", jobs(QUESTIONS[:1], [GOOD], "single")[:1])
    size = sum(len(m["content"].encode()) for m in seen[0][1]["messages"])
    assert found.spent["completion_tokens"] == 1024
    assert size <= found.spent["prompt_tokens"] <= size + 24


def test_a_budget_of_many_threads_counts_each_call_at_every_moment(tmp_path):
    """A call that moves from those under way to those paid for is in one of them, whoever looks."""
    judge = Judge(model="j", max_calls=60)
    with Book(tmp_path / "r.jsonl") as book:
        costs, over = asking.Costs(judge, book), []

        def work(name):
            for n in range(10):
                try:
                    costs.admit([(f"{name}-{n}", (5, 5))])
                except asking.OverBudget:
                    over.append(name)
                else:
                    book.add(f"{name}-{n}", Reply("x"), [], (5, 5))

        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        assert (book.spent.calls, len(over)) == (60, 20)
        assert book.committed().calls == 60


def test_what_a_dead_process_was_asking_counts_against_the_budget(tmp_path):
    """A call is put aside in the book before it is made, so that a kill forgets no money."""
    path = tmp_path / "r.jsonl"
    with Book(path) as book:
        book.send("refused", (100, 10))
        book.free("refused")
        book.send("lost", (100, 10))
    with Book(path) as book:
        assert (book.spent.calls, book.spent.prompt_tokens, book.spent.completion_tokens) == (1, 100, 10)
        assert not book.underway


def test_a_wrong_key_stops_at_once_and_is_in_no_message(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("JUDGE_KEY", "sk-secret-7")
    todo = jobs(QUESTIONS, [GOOD], "single")
    with serving(lambda number, body: (401, "bad\x1b[2J key sk-secret-7", {})) as (url, seen):
        with pytest.raises(RunError, match="HTTP 401") as error:
            judged(url, tmp_path / "r.jsonl", todo, api_key_env="JUDGE_KEY", concurrency=1)
        assert len(seen) == 1
        assert seen[0][2]["Authorization"] == "Bearer sk-secret-7"
    written = "".join(path.read_text() for path in tmp_path.iterdir())
    assert "sk-secret-7" not in str(error.value) + written + "".join(capfd.readouterr())
    assert "***" in str(error.value)
    assert "\x1b" not in str(error.value)
    monkeypatch.setenv("JUDGE_KEY", "two\nlines")
    with pytest.raises(RecipeError) as refused:
        judged(url, tmp_path / "r.jsonl", todo, api_key_env="JUDGE_KEY")
    assert "two" not in str(refused.value)


def test_a_redirect_is_not_followed(tmp_path):
    with serving(lambda number, body: (307, "", {"Location": "http://127.0.0.1:1/"})) as (url, seen):
        with pytest.raises(RunError, match="HTTP 307"):
            judged(url, tmp_path / "r.jsonl", jobs(QUESTIONS, [GOOD], "single"), concurrency=1)
        assert len(seen) == 1


def test_a_judge_out_of_reach_is_given_up(tmp_path):
    todo = jobs(
        [Question(n, "x", (f"q{n}",)) for n in range(40)],
        [Answers("m", dict.fromkeys(range(40), ("a",)))],
        "single",
    )
    with pytest.raises(RunError, match="out of reach") as error:
        judged("http://127.0.0.1:1/v1", tmp_path / "r.jsonl", todo, retries=0)
    assert "Is it running" in error.value.fix


def test_anthropic_s_messages_are_spoken_too(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "k")
    content = {"content": [{"type": "thinking"}, {"type": "text", "text": "Rating: [[9]]"}],
               "usage": {"input_tokens": 11, "output_tokens": 3}, "stop_reason": "end_turn"}  # fmt: skip
    with serving(lambda number, body: (200, json.dumps(content), {})) as (url, seen):
        todo = jobs(QUESTIONS[:1], [GOOD], "single")[:1]
        found = judged(url, tmp_path / "r.jsonl", todo, api="anthropic", api_key_env="JUDGE_KEY")
    path, body, headers = seen[0]
    assert path == "/v1/messages"
    assert {name.lower(): value for name, value in headers.items()}["x-api-key"] == "k"
    assert "Authorization" not in headers
    assert [m["role"] for m in body["messages"]] == ["user"]
    assert "You grade one answer" in body["system"]
    assert found.judgments[0].score == 9.0
    assert (found.spent["prompt_tokens"], found.spent["completion_tokens"]) == (11, 3)


def test_a_line_that_a_crash_cut_off_is_taken_away(tmp_path):
    todo, path = jobs(QUESTIONS[:2], [GOOD], "single"), tmp_path / "r.jsonl"
    with serving(lambda number, body: openai("Rating: [[6]]")) as (url, seen):
        judged(url, path, todo)
        path.write_bytes(path.read_bytes()[:-20])
        found = judged(url, path, todo)
        assert found.repaired
        assert len(seen) == 5
    path.write_text("{}\n" + path.read_text())
    with pytest.raises(RunError, match="Line 1"):
        judged("http://127.0.0.1:1/v1", path, todo)


CHILD = """
import sys
from test_judge_asking import *
from pathlib import Path
judged(sys.argv[1], Path(sys.argv[2]), jobs(QUESTIONS, [BAD, GOOD], "pair", baseline="bad"), concurrency=2)
"""


def test_after_kill_9_nothing_in_the_book_is_paid_for_again(tmp_path):
    """A process is killed while it judges; the next one asks only what is not in the book."""
    path, served = tmp_path / "replies.jsonl", collections.Counter()
    lock, hold = threading.Lock(), threading.Event()

    def reply(number, body):
        if number > 20:
            hold.wait(20)  # these calls are under way when the process dies
        with lock:
            served[asked_for(body)] += 1
        return openai(better(body))

    with serving(reply) as (url, seen):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
        child = subprocess.Popen([sys.executable, "-c", CHILD, url, path], env=environment)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and child.poll() is None:
            if len(seen) >= 22 and path.exists() and path.read_bytes().count(b'"reply"') >= 20:
                break
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert child.returncode == -signal.SIGKILL
        in_book = path.read_bytes().count(b'"reply"')
        assert in_book == 20
        with Book(path) as book:
            assert book.spent.calls == 22  # the two under way may have been charged
        hold.set()
        before = len(seen)
        found = judged(url, path, jobs(QUESTIONS, [BAD, GOOD], "pair", baseline="bad"))
        assert len(seen) - before == 48 - in_book
    assert len(found.judgments) == 24
    assert all((one.g1_winner, one.g2_winner) == ("model_1", "model_1") for one in found.judgments)
    # Twice served are at most the two calls that were under way: their replies never came.
    assert sum(count - 1 for count in served.values()) <= 2


def test_two_processes_do_not_write_one_book(tmp_path):
    with (
        Book(tmp_path / "r.jsonl"),
        pytest.raises(RunError, match="Another process"),
        Book(tmp_path / "r.jsonl"),
    ):
        pass


def test_replies_are_those_of_one_address_port_and_path_included(tmp_path):
    """Two servers on one machine may serve other models under one name."""

    def grade(value):
        return lambda number, body: openai(f"Rating: [[{value}]]")

    todo, path = jobs(QUESTIONS[:1], [GOOD], "single"), tmp_path / "r.jsonl"
    with serving(grade(3)) as (first, one), serving(grade(8)) as (second, two):
        for _ in range(2):
            assert [j.score for j in judged(first, path, todo).judgments] == [3.0, 3.0]
            assert [j.score for j in judged(second, path, todo).judgments] == [8.0, 8.0]
        assert (len(one), len(two)) == (2, 2)
        judged(f"{first}/other", path, todo)
        assert len(one) == 4
        assert one[-1][0] == "/v1/other/chat/completions"
        judged(f"{first}/", path, todo)
        assert len(one) == 4  # the same address


def test_replies_of_a_local_judge_are_those_of_its_weights(tmp_path, tiny_model_folder):
    folder, texts = tmp_path / "judge", load_prompts()
    shutil.copytree(tiny_model_folder, folder)
    brief = type(texts)({**texts.texts, "single": "Grade. {material}", "material": "{mark}"}, "test")
    todo = jobs([Question(0, "x", ("red",))], [Answers("m", {0: ("blue",)})], "single")
    judge = Judge(api="local", model=str(folder), max_tokens=4, repair=False)

    def calls():
        return judge_all(todo, judge, asking.asker(judge), brief, tmp_path / "r.jsonl").spent["calls"]

    assert [calls(), calls()] == [1, 1]
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor + 0.5 for name, tensor in weights.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    assert [calls(), calls()] == [2, 2]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: m\nmodle: x", "Did you mean 'model'?"), ("api: other\nmodel: m", "api"),
        ("- a", "holds no judge's settings"),
        ("model: m\napi_key: sk", "environment variable"), ("model: m\nmax_cost: 1", "prices"), ("{}", "model"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_say_so(tmp_path, text, said):
    path = tmp_path / "judge.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as error:
        load_judge(path)
    assert said in str(error.value)


def test_a_model_of_this_machine_can_be_the_judge(tmp_path, tiny_model_folder):
    judge = load_judge(f"local:{tiny_model_folder}").model_copy(update={"max_tokens": 8, "batch_size": 3})
    asker = asking.asker(judge)
    assert "<|im_start|>" in asker.specials
    short = [Question(n, "x", ("red",)) for n in range(2)]
    todo = jobs(short, [Answers("m", {0: ("blue",), 1: ("green",)})], "single")
    texts = load_prompts()
    brief = type(texts)({**texts.texts, "single": "Grade. {material}", "material": "{mark}"}, "test")
    found = judge_all(todo, judge, asker, brief, tmp_path / "r.jsonl")
    assert [one.error for one in found.judgments] == [
        "a reply without a verdict"
    ] * 2  # it has learned nothing
    assert found.spent["calls"] == 4  # each once, and once for the verdict alone
    again = judge_all(todo, judge, asker, brief, tmp_path / "r.jsonl")
    assert again.judgments == found.judgments


@pytest.mark.parametrize("repair", [False, True])
def test_a_judge_that_gives_no_verdict_is_not_asked_on(tmp_path, repair):
    """Its replies are kept, and the same command goes on behind them."""
    todo, path = jobs(QUESTIONS, [GOOD, BAD], "pair"), tmp_path / "r.jsonl"  # 48 requests
    with serving(lambda number, body: openai("Both are nice.")) as (url, seen):
        with pytest.raises(RunError, match=r"first 20 replies hold none.*Both are nice") as error:
            judged(url, path, todo, repair=repair)
        assert "the same command goes on" in error.value.fix
        assert len(seen) == 20 * (1 + repair)
        with pytest.raises(RunError, match="no verdict"):
            judged(url, path, todo, repair=repair)
        assert len(seen) == 40 * (1 + repair)
        found = judged(url, path, todo, repair=repair)  # the last 8 are no sample of 20
    assert len(seen) == 48 * (1 + repair)
    assert all(one.g1_winner == "error" for one in found.judgments)


def test_a_judge_whose_verdicts_come_when_asked_again_is_asked_on(tmp_path):
    todo, told = jobs(QUESTIONS, [GOOD], "single"), []

    def reply(number, body):
        return openai("Rating: [[6]]" if len(body["messages"]) == 4 else "Nice.")

    with serving(reply) as (url, seen):
        judge = Judge(model="j", base_url=url, backoff=0.0)
        found = judge_all(
            todo,
            judge,
            asking.asker(judge),
            TEXTS,
            tmp_path / "r.jsonl",
            progress=lambda *now: told.append(now),
        )
    assert len(seen) == 48
    assert all(one.score == 6.0 for one in found.judgments)
    assert list(dict.fromkeys(told)) == [(n, 24) for n in range(25)]
