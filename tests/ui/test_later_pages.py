"""Train, Evaluate, Chat, Ship and Runs: what their buttons do, and what they show, on one run of the tiny model."""

from __future__ import annotations

import contextlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

pytest.importorskip("gradio")

from tunesmith import api
from tunesmith.compose import compose, overlaid
from tunesmith.errors import InputError, TunesmithError
from tunesmith.training.run import Run
from tunesmith.ui import curves, preferences, trash
from tunesmith.ui.choosing import model_named, run_names, run_path
from tunesmith.ui.jobs import Job, Queue
from tunesmith.ui.keys import allowed
from tunesmith.ui.pages import chat, evaluate, runs, ship, train
from tunesmith.ui.workspace import Workspace

EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("shop") / "w")


@pytest.fixture(scope="module")
def layer(workspace, tiny_model_folder):
    """A recipe on files of the workspace."""
    shutil.copytree(tiny_model_folder, workspace.uploads / "model")
    rows = [
        {"prompt": f"what is {EVIL} of {i}", "response": f"{'red' if i % 2 else 'blue'} {i}"}
        for i in range(40)
    ]
    data = workspace.uploads / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": {"base": str(workspace.uploads / "model")},
        "data": {"dataset": str(data), "max_length": 128},
        "adapter": {"kind": "lora", "rank": 2},
        "training": {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 0.05, "warmup_steps": 0,
                     "logging_steps": 1, "eval_steps": 2},
        "evaluation": {"max_new_tokens": 6, "resamples": 200},
    }  # fmt: skip


@pytest.fixture(scope="module")
def result(workspace, layer):
    """One finished run, `shop`."""
    return api.train(compose({**layer, "output_dir": str(workspace.runs), "name": "shop"}).recipe)


def test_a_start_is_one_command_under_a_free_name(workspace, layer, result):
    argv, name = train.planned(workspace, layer)
    assert argv[:2] == ["tunesmith", "train"]
    assert name == "custom_questions"
    assert f"--name {name}" in " ".join(argv)
    assert str(workspace.runs) in argv
    (workspace.runs / name).mkdir()
    assert train.planned(workspace, layer)[1] == "custom_questions-2"
    (workspace.runs / name).rmdir()
    with pytest.raises(InputError, match="taken"):
        train.planned(workspace, layer, "shop")
    with pytest.raises(InputError):
        train.planned(workspace, layer, "../../elsewhere")
    with pytest.raises(InputError, match="no recipe"):
        train.planned(workspace, {})
    with pytest.raises(InputError, match="outside"):
        train.planned(workspace, overlaid(layer, {"data": {"dataset": "/etc/passwd"}}))


def test_fifty_clicks_without_a_name_are_one_job(tmp_path, monkeypatch):
    workspace, layer = Workspace(tmp_path / "w"), {"data": {"dataset": "example:support"}}
    monkeypatch.setattr(Queue, "_start_worker", lambda self, patience: None)

    def click(_):
        with contextlib.suppress(InputError):
            return train.start(workspace, layer)

    with ThreadPoolExecutor(8) as clicks:
        started = [job for job in clicks.map(click, range(50)) if job]
    assert len(started) == 1
    queue = Queue(workspace.jobs)
    assert [job.id for job in queue.jobs() if job.is_open] == [started[0].id]
    again = train.start(workspace, layer, "again")
    assert again.run == "again", "a name says that it is meant"
    other = train.start(workspace, overlaid(layer, {"training": {"seed": 9}}))
    assert len({started[0].run, again.run, other.run}) == 3
    for job in (started[0], again):
        queue.stop(job.id)
    assert train.start(workspace, layer).is_open, "what was canceled may begin anew"


def test_train_shows_the_command_or_why_there_is_none(tmp_path):
    workspace = Workspace(tmp_path / "w")
    assert "--name shop" in train.preview(workspace, {"data": {"dataset": "example:support"}}, "shop")
    assert train.unnamed(workspace, {"name": "mine"}).startswith("mine, ")
    assert train.unnamed(workspace, {}) == train.UNNAMED
    assert train.preview(workspace, {}, None).startswith("# There is no recipe yet.")
    said = train.preview(workspace, {"data": {"dataset": "/etc/passwd"}}, None)
    assert said.startswith("# ")
    assert "\n" not in said
    assert "outside" in said


def test_the_train_page_shows_the_run_as_it_is(workspace, result):
    seen = curves.events_of(result.run).look()
    said = train.status(seen, None, Run(result.run).state())
    assert "done" in said
    assert "4 of 4" in said
    assert "time left" not in said, "it has ended"
    assert "time left" in train.status(replace(seen, state="training"), None, "running")
    assert "interrupted" not in train.status(replace(seen, state="interrupted"), None, "running"), (
        "it goes on"
    )
    titles = {figure["title"] for figure in seen.figures}
    assert set(train.MAIN) <= titles
    plot = train.plot(seen, "Loss")
    assert plot is train.plot(seen, "Loss"), "made once for all who watch"
    drawn = json.loads(plot.plot)
    assert [trace["name"] for trace in drawn["data"]] == ["training", "validation"]
    assert drawn["data"][0]["x"] == [1, 2, 3, 4]
    assert train.plot(seen, "none") is None
    assert train.samples(seen)[0][0] == "4", "the newest answers first"


def test_evaluate_shows_the_verdict_and_every_answer(workspace, result):
    known = evaluate.places(workspace, "shop")
    found = evaluate.measured(known[evaluate.OWN])
    from tunesmith.evaluation.compare import sentence

    assert found.verdict == sentence(result.primary)
    assert found.kind == result.primary.verdict
    rows = [json.loads(line) for line in (result.run / "evaluation/rows.jsonl").read_text().splitlines()]
    assert len(found.answers) == sum(row["model"] == "tuned" for row in rows) == result.primary.n
    assert found.table[0][:3] == ("metric", "base", "tuned")
    assert len(found.table) == 1 + len(result.comparisons)
    assert evaluate.measured(known[evaluate.OWN]) is found, "read once while nothing is written"
    html = evaluate.verdict(found)
    assert "<img" not in html

    every = evaluate.chosen_answers(found, "", "all")
    assert every == list(range(len(found.answers)))
    one = found.answers[0]
    hits = evaluate.chosen_answers(found, f"WHAT {one['reference']}", "all")
    assert 0 in hits
    assert len(hits) < len(every)
    parts = [set(evaluate.chosen_answers(found, "", kind)) for kind in ("better", "worse", "differing")]
    assert parts[0].isdisjoint(parts[1])
    assert all(found.answers[n]["gain"] > 0 for n in parts[0])
    assert evaluate.answer_line(found, 0)[1] == one["question"]
    assert len(evaluate.answer_line(found, 0)) == 7


def test_a_comparison_of_two_models_is_found_and_shown(workspace, result, layer):
    made = api.compare(layer["model"]["base"], result.run, settings={"evaluation": {"max_new_tokens": 4}})
    known = evaluate.places(workspace, "shop")
    assert list(known) == [evaluate.OWN, "model against shop"]
    found = evaluate.measured(known["model against shop"])
    assert found.names == ("model", "shop")
    assert found.kind == made.primary.verdict
    assert len(found.answers) == made.primary.n
    header = found.table[0]
    assert header[1:3] == ("model", "shop")


def test_what_a_judge_costs_is_said_before_anybody_is_asked(workspace, result):
    settings = workspace.uploads / "judge.yaml"
    settings.write_text(
        "api: openai\nmodel: m\nbase_url: http://127.0.0.1:9/v1\nprice_input: 1\nprice_output: 2\n"
    )
    said = evaluate.forecast(workspace, "shop", "judge.yaml", "pair")
    assert "call" in said
    assert not list(result.run.rglob("figures.json"))
    arguments = evaluate.judge_arguments(workspace, "shop", "judge.yaml", "pair")
    assert arguments == ["judge", f"--judge={settings}", "--mode=pair", "--", str(result.run)]
    with pytest.raises(InputError, match="name of a file"):
        evaluate.judge_arguments(workspace, "shop", "../../x.yaml", "pair")
    with pytest.raises(InputError):
        evaluate.judge_named(workspace, "local:/etc")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("model: m\napi_key_env: SECRET_OF_THE_SERVER\n", "may not be named here"),
        (
            "model: m\nbase_url: https://evil.example/v1\napi_key_env: OPENAI_API_KEY\n",
            "sent to api.openai.com only",
        ),
        (
            "model: m\nbase_url: https://elsewhere.example\napi_key_env: JUDGE_KEY\n",
            "sent to judge.example only",
        ),
        ("model: m\nprompts: /etc/passwd\n", "no whole path"),
        ("model: m\nprompts: ../../../etc/passwd\n", "no whole path"),
        ("model: m\ncache: /tmp/replies.jsonl\n", "no whole path"),
        ("model: m\ncache: UPLOADS/../jobs/000001.json\n", "no whole path"),
        ("model: m\ncache: UPLOADS/judge.yaml\n", "does not end in .jsonl"),
        ("model: m\nprompts: UPLOADS/../users.yaml\n", "no whole path"),
        (
            "model: m\nbase_url: https://judge.example:8443/v1\napi_key_env: JUDGE_KEY\n",
            "sent to judge.example only",
        ),
        ("api: local\nmodel: shop\n", "choose local:shop"),
        ("api: local\nmodel: /etc\n", "outside your workspace"),
        ("model: m\napi_key_env: OPENAI_API_KEY\n", None),
        ("api: anthropic\nmodel: m\napi_key_env: ANTHROPIC_API_KEY\n", None),
        ("model: m\nbase_url: https://judge.example/v1\napi_key_env: JUDGE_KEY\n", None),
        ("model: m\nbase_url: https://judge.example:8443/v1\napi_key_env: PORT_KEY\n", None),
        ("model: m\nbase_url: http://127.0.0.1:8000/v1\napi_key_env: OWN_KEY\n", None),
        (
            "model: m\nbase_url: http://127.0.0.1:8001/v1\napi_key_env: OWN_KEY\n",
            "sent to 127.0.0.1:8000 only",
        ),
        ("model: m\nprompts: UPLOADS/prompts.yaml\ncache: UPLOADS/replies.jsonl\n", None),
    ],
)
def test_a_judge_s_settings_have_no_key_and_no_file_that_is_not_the_user_s(tmp_path, settings, said):
    keys = allowed(["JUDGE_KEY=judge.example", "PORT_KEY=Judge.example:8443", "OWN_KEY=127.0.0.1:8000"])
    workspace = Workspace(tmp_path / "w", keys)
    (workspace.runs / "shop").mkdir()
    (workspace.runs / "shop" / "recipe.yaml").write_text("{}")
    (workspace.runs / "shop" / "environment.json").write_text("{}")
    (workspace.uploads / "judge.yaml").write_text(settings.replace("UPLOADS", str(workspace.uploads)))
    if said is None:
        assert evaluate.judge_named(workspace, "judge.yaml").endswith("judge.yaml")
        return
    with pytest.raises(InputError) as refused:
        evaluate.judge_named(workspace, "judge.yaml")
    assert said in " ".join(refused.value.lines())


def test_a_suite_is_priced_by_the_options_that_it_starts_with(workspace, result, layer):
    (workspace.uploads / "judge.yaml").write_text("model: m\nbase_url: http://127.0.0.1:9/v1\n")
    asked = workspace.uploads / "asked.jsonl"
    asked.write_text(json.dumps({"question_id": 1, "category": "math", "turns": ["What is it?"]}) + "\n")
    path, options = evaluate.suite_asked(workspace, "shop", "alpaca", "asked.jsonl", "judge.yaml")
    assert path == result.run
    assert options["baseline"] == layer["model"]["base"]
    arguments = evaluate.suite_arguments(workspace, "shop", "alpaca", "asked.jsonl", "judge.yaml")
    assert arguments == [
        "evaluate", "--suite=alpaca", f"--questions={asked}", f"--judge={workspace.uploads / 'judge.yaml'}",
        f"--baseline={layer['model']['base']}", "--", str(result.run),
    ]  # fmt: skip
    assert "call" in evaluate.suite_forecast(workspace, "shop", "alpaca", "asked.jsonl", "judge.yaml")
    with pytest.raises(InputError, match="costs nothing"):
        evaluate.suite_forecast(workspace, "shop", "mt-bench", None, None)
    evaluate.require_priced(("shop", "judge.yaml"), "shop", "judge.yaml")
    for known in (None, ("shop", "other.yaml")):
        with pytest.raises(InputError, match="was not asked"):
            evaluate.require_priced(known, "shop", "judge.yaml")
    asked.unlink()


def test_a_radar_is_shown_where_a_suite_was_judged(workspace, result, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(result.run, copy)
    estimate = {"value": 6.0, "low": 5.0, "high": 7.0, "n": 10, "method": "bootstrap"}
    model = {"score": estimate, "categories": dict.fromkeys(("math", "coding", "writing"), estimate)}
    figures = {"kind": "single", "judge": ["m"], "mode": "single", "ours": {"models": {"shop": model}}}
    place = copy / "evaluation" / "mt-bench" / "graded"
    place.mkdir(parents=True)
    (place / "figures.json").write_text(json.dumps(figures))
    from tunesmith.evaluation.report import _judged_figures

    assert [figure["title"] for figure in _judged_figures(place)] == ["Over all", "Radar", "By category"]


def test_both_models_answer_the_same_and_what_is_better_is_kept(workspace, result):
    models = chat.sides(workspace, "shop")
    assert models == (str(workspace.uploads / "model"), str(result.run))
    messages = chat.messages_of("be kind", [], f"what is {EVIL}")
    parts = list(chat.answers(models, messages, max_new_tokens=16, temperature=0.0, seed=0))
    assert len(parts) > 1, "piece by piece"
    base, tuned = parts[-1]
    assert base == "".join(api.chat(models[0], messages, max_new_tokens=16))
    assert tuned == "".join(api.chat(models[1], messages, max_new_tokens=16))
    assert base != tuned
    page = chat.shown([], messages[-1]["content"], (EVIL, tuned), is_open=False)
    assert "<img" not in page
    assert "&lt;img" in page

    base = base if base.strip() else "blue"
    turn = chat.Turn(tuple(messages), base, tuned, models)
    path = chat.prefer(workspace, turn, "tuned")
    [kept] = [json.loads(line) for line in path.read_text().splitlines()]
    assert kept["prompt"] == messages
    assert kept["chosen"] == [{"role": "assistant", "content": tuned}]
    assert kept["rejected"] == [{"role": "assistant", "content": base}]
    assert (kept["chosen_model"], kept["rejected_model"]) == (models[1], models[0])
    assert chat.settled([], turn, "base")[-1]["content"] == base, (
        "the conversation goes on from the better one"
    )
    assert chat.settled([], turn, None)[-1]["content"] == tuned
    with pytest.raises(InputError, match="same"):
        chat.prefer(workspace, chat.Turn(tuple(messages), "a  b", "a b", models), "base")
    with pytest.raises(InputError, match="empty"):
        chat.prefer(workspace, chat.Turn(tuple(messages), "blue", " ", models), "base")
    with pytest.raises(InputError, match="no two answers"):
        chat.prefer(workspace, None, "base")
    with pytest.raises(InputError, match="no question"):
        chat.messages_of("", [], " ")
    path.unlink()

    part = replace(turn, base="blu", tuned="", is_whole=False)
    assert 'aria-busy="true"' in chat.shown([], messages[-1]["content"], ("blu", ""), is_open=True)
    left, page, question, note = chat.stopped([], part)
    assert (left, question) == (part, "")
    assert "blu" in page
    assert "aria-busy" not in page
    assert "not whole" in note
    assert chat.settled([], part, None)[-1]["content"] == "blu", "a stopped turn stays in the conversation"
    with pytest.raises(InputError, match="stopped"):
        chat.prefer(workspace, part, "base")
    left, page, question, note = chat.stopped([], replace(part, base=""))
    assert (left, page, question) == (None, chat.TRY, messages[-1]["content"])
    chat.let_go()


def test_the_command_of_a_chat_asks_what_the_page_asked(workspace, result, capsys):
    """Both models, with system message, seed and temperature: the same answers."""
    import shlex

    from tunesmith.cli import app

    models = chat.sides(workspace, "shop")
    messages = chat.messages_of("be kind", [], "-what is it")
    settings = {"max_new_tokens": 8, "temperature": 1.5, "seed": 7}
    *_, answered = chat.answers(models, messages, **settings)
    lines = chat.commands(models, messages, **settings).splitlines()
    for line, wanted in zip(lines, answered, strict=True):
        _, verb, *options = shlex.split(line)
        with contextlib.suppress(SystemExit):
            app([verb, "--json", *options])
        found = json.loads(capsys.readouterr().out.splitlines()[-1])["messages"]
        assert found == [*messages, {"role": "assistant", "content": wanted}]
    later = chat.messages_of("", [*messages[1:], {"role": "assistant", "content": "x"}], "more")
    assert "2 messages before it" in chat.commands(models, later, **settings).splitlines()[0]
    chat.let_go()


def test_a_dpo_run_learns_from_what_was_preferred(workspace, result):
    with pytest.raises(InputError, match="No pair"):
        chat.dpo_layer(workspace, "shop")
    for number in range(24):
        asked = [{"role": "user", "content": f"what is the count of {number}"}]
        if number % 3 == 0:
            asked = [{"role": "system", "content": "be kind"}, *asked]
        preferences.keep(
            workspace.chats, prompt=asked, chosen=f"red {number}", rejected="blue", models=("a", "b")
        )
    with (workspace.chats / preferences.NAME).open("a") as cut:
        cut.write('{"prompt": [{"ro')
    preferences.keep(
        workspace.chats,
        prompt=[{"role": "user", "content": "hello"}],
        chosen="yes",
        rejected="no",
        models=("a", "b"),
    )
    layer = overlaid(
        chat.dpo_layer(workspace, "shop"),
        {
            "output_dir": str(workspace.runs), "name": "preferred", "adapter": {"kind": "lora", "rank": 2},
            "data": {"max_length": 128},
            "training": {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1},
            "evaluation": {"skip": True},
        },
    )  # fmt: skip
    train.planned(workspace, {key: part for key, part in layer.items() if key not in ("output_dir", "name")})
    made = Run(api.train(compose(layer).recipe).run)
    losses = [event["loss"] for event in made.events() if event["kind"] == "step"]
    assert len(losses) == 2
    rows = made.read("plan.json")["rows"]
    assert rows["rows_in"] == 25, "all but what was cut off"
    shutil.rmtree(made.path)


def test_shipping_is_a_command_and_a_verdict(workspace, result, tmp_path):
    assert not Run(result.run).is_whole
    whole = tmp_path / "whole"
    whole.mkdir()
    assert not Run(whole).is_whole, "its training is not finished"
    (whole / "final_model").mkdir()
    assert Run(whole).is_whole
    assert ship.made(workspace, result.run) == ship.NOTHING
    place = workspace.exports / "shop-merged"
    wanted = ["merge", "--dtype=auto", f"--output={place}", "--", str(result.run)]
    assert ship.merge_arguments(workspace, result.run, "auto") == wanted
    assert ship.export_arguments(workspace, result.run, "gguf", "q8_0")[1:3] == ["--to=gguf", "--quant=q8_0"]
    with pytest.raises(TunesmithError):
        ship.export_arguments(workspace, result.run, "gguf", "q9")
    with pytest.raises(InputError, match="missing"):
        ship.push_arguments(result.run, "--despite-findings", public=False)
    assert "--public" not in ship.push_arguments(result.run, "me/shop", public=False)
    api.merge(result.run, output=place, rows=4)
    said = ship.made(workspace, result.run)
    assert "shop-merged: passed its check" in said
    assert "ts-good" in said
    assert f'href="/gradio_api/file={place}/model.safetensors" download' in said
    (place / ".hidden").write_text("x")
    (place / "a&b <i>.txt").write_text("x")
    assert "a&amp;b &lt;i&gt;.txt</a>" in ship.downloads(place)
    assert ".hidden" not in ship.downloads(place)
    assert ship.downloads(place / "not-there") == ""
    assert str(workspace.exports / "shop-merged-2") in str(
        ship.merge_arguments(workspace, result.run, "auto")
    )
    (workspace.runs / "sho").mkdir()
    assert ship.made(workspace, workspace.runs / "sho") == ship.NOTHING
    (workspace.runs / "sho").rmdir()
    verdict = json.loads((place / "parity.json").read_text())
    (place / "parity.json").write_text(json.dumps({**verdict, "passed": False}))
    assert "FAILED its check" in ship.made(workspace, result.run)
    shutil.rmtree(place)


def test_runs_are_listed_compared_deleted_and_put_back(workspace, result):
    copy = workspace.runs / "copy"
    shutil.copytree(result.run, copy)
    info = copy / "final_model" / "best_model_info.json"
    info.write_text(json.dumps({**json.loads(info.read_text()), "step": 2}))
    with (copy / "events.jsonl").open("a") as log:
        log.write(json.dumps({"kind": "decision", "step": 2, "name": "best model", "value": "step 2"}) + "\n")
    found = api.runs(workspace.runs)
    listed = {line[0]: line for line in runs.lines(found)}
    assert listed.keys() == {"shop", "copy"}
    assert listed["shop"][1] == "done"
    assert listed["copy"][4] == "4, best 2"
    assert "validated best" in runs.disk(workspace, found)
    assert listed["shop"][8] == result.primary.verdict
    assert "Loss" in runs.titles(workspace, ["shop", "copy"])
    drawn = json.loads(runs.overlaid(workspace, ["shop", "copy"], "Loss").plot)
    names = [trace["name"] for trace in drawn["data"]]
    assert names == ["shop, training", "shop, validation", "copy, training", "copy, validation"]
    assert drawn["data"][0]["line"]["color"] != drawn["data"][2]["line"]["color"]

    weights = {p.name: p.read_bytes() for p in copy.rglob("*.safetensors")}
    start, end = trash.delete(workspace, "copy")
    assert (start, end.parent) == (copy, workspace.trash)
    assert run_names(workspace) == ["shop"]
    [thrown] = trash.thrown(workspace)
    assert thrown.name == "copy"
    assert "The trash takes" in runs.disk(workspace, api.runs(workspace.runs))
    trash.undo(workspace, thrown.id)
    assert {p.name: p.read_bytes() for p in copy.rglob("*.safetensors")} == weights
    assert trash.thrown(workspace) == []

    trash.delete(workspace, "copy")
    shutil.copytree(result.run, copy)
    with pytest.raises(InputError, match="again"):
        trash.undo(workspace, trash.thrown(workspace)[0].id)
    trash.delete(workspace, "copy")
    assert len(trash.thrown(workspace)) == 2, "two of one name in the same second"
    assert trash.empty(workspace) == 2
    assert not list(workspace.trash.iterdir())
    with pytest.raises(InputError):
        trash.undo(workspace, "../../x")
    with pytest.raises(InputError):
        trash.delete(workspace, "../runs/shop")


def test_a_run_that_is_written_or_awaited_is_not_deleted(workspace, result):
    run = Run(result.run)
    with run.lock(), pytest.raises(InputError, match="in use"):
        trash.delete(workspace, "shop")
    queue = Queue(workspace.jobs)
    queue._write(Job("000001", "merge", "Merge shop", ("merge",), "shop", 0.0))
    with pytest.raises(InputError, match="in use"):
        trash.delete(workspace, "shop")
    queue.stop("000001")
    assert run_path(workspace, "shop").is_dir()


def test_models_are_runs_or_names_but_no_paths(workspace, result):
    assert model_named(workspace, "shop") == str(result.run)
    assert model_named(workspace, "tiny") == "tiny"
    assert model_named(workspace, "owner/name") == "owner/name"
    for path in ("/etc", "../x", "~/x", str(workspace.root.parent)):
        with pytest.raises(InputError):
            model_named(workspace, path)
