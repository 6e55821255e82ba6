"""The command line: cheap to start, every documented flag accepted, one JSON object, exit codes that mean something."""

from __future__ import annotations

import io
import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

import tunesmith
from tunesmith import api
from tunesmith.cli import FLAGS, app
from tunesmith.compose import TASKS, compose
from tunesmith.errors import RecipeError
from tunesmith.evaluation.metrics import METRICS, TASK_METRICS
from tunesmith.recipe import fields
from tunesmith.training.run import open_run

SEED_FLAGS = """--task --dataset --base-model --config --output-dir --max-steps --lora --lora-rank --freeze-ratio
--resume --mixed-precision --gradient-checkpointing --eval-steps --save-steps --push-to-hub --hub-model-id
--per-device-train-batch-size --gradient-accumulation-steps --max-length --num-workers --num-epochs
--learning-rate""".split()  # noqa: SIM905
"""Every option that the seed documents name, the six that their program rejected included."""


@pytest.fixture
def invoke():
    """Run a verb with `--json`; gives exit code, the JSON object, and everything printed."""

    def run(*arguments: str):
        result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
        lines = result.stdout.strip().splitlines()
        return result.exit_code, json.loads(lines[-1]) if lines else None, result.stdout

    return run


@pytest.fixture
def quick_flags(tiny_model_folder, question_file, tmp_path):
    return [
        "--base-model", tiny_model_folder, "--dataset", question_file, "--output-dir", tmp_path / "runs",
        "--max-steps", "2", "--warmup-steps", "0", "--max-new-tokens", "4", "--max-length", "128",
        "--set", "evaluation.resamples=100",
    ]  # fmt: skip


def test_every_seed_flag_is_an_option_of_train():
    options = {option for parameter in get_command(app).commands["train"].params for option in parameter.opts}
    assert set(SEED_FLAGS) <= options


SEED_COMMANDS = [
    ("--task code", "task", "code"),
    ("--dataset ./chat_data.jsonl", "data.dataset", "./chat_data.jsonl"),
    ("--base-model ./base_model", "model.base", "./base_model"),
    ("--config quick_test", "preset", "quick_test"),
    ("--output-dir ./elsewhere", "output_dir", "./elsewhere"),
    ("--max-steps 7", "training.max_steps", 7),
    ("--lora", "adapter.kind", "lora"),
    ("--lora --lora-rank 32", "adapter.rank", 32),
    ("--freeze-ratio 0.7", "adapter.ratio", 0.7),
    ("--resume checkpoint-step-1000", "resume", "checkpoint-step-1000"),
    ("--mixed-precision bf16", "training.mixed_precision", "bf16"),
    ("--mixed-precision fp16", "training.mixed_precision", "fp16"),
    ("--gradient-checkpointing", "training.gradient_checkpointing", True),
    ("--eval-steps 50", "training.eval_steps", 50),
    ("--save-steps 200", "training.save_steps", 200),
    ("--push-to-hub --hub-model-id me/mine", "export.push_to_hub", True),
    ("--hub-model-id me/mine", "export.hub_model_id", "me/mine"),
    ("--per-device-train-batch-size 1", "training.per_device_train_batch_size", 1),
    ("--gradient-accumulation-steps 8", "training.gradient_accumulation_steps", 8),
    ("--max-length 512", "data.max_length", 512),
    ("--num-workers 8", "training.num_workers", 8),
    ("--num-epochs 10", "training.num_epochs", 10),
    ("--learning-rate 1e-6", "training.learning_rate", 1e-6),
]
"""Words of the seed's commands, and what of the recipe they say."""


@pytest.mark.parametrize(("words", "path", "expected"), SEED_COMMANDS, ids=[c[0] for c in SEED_COMMANDS])
def test_a_seed_flag_reaches_the_recipe_it_trains_with(invoke, monkeypatch, words, path, expected):
    """Each flag alone, against the value that it has without; of `--task chat`, whose defaults are others."""
    from tunesmith import api

    trained = []

    def caught(recipe, *, resume, **_):
        trained.append({**recipe.model_dump(), "resume": resume})
        raise api.TunesmithError("caught")

    monkeypatch.setattr(api, "train", caught)
    for arguments in ([], words.split()):
        invoke("train", *([] if "--task" in words else ["--task", "chat"]), *arguments)
    found = []
    for values in trained:
        for name in path.split("."):
            values = values.get(name)
        found.append(values)
    before, after = found
    assert after == expected
    assert before != expected


def test_every_seed_flag_has_its_words():
    assert {word for words, *_ in SEED_COMMANDS for word in words.split() if word[:2] == "--"} == set(
        SEED_FLAGS
    )


@pytest.mark.parametrize("is_terminal", [True, False])
def test_chat_shows_its_prompts_on_a_terminal_only(monkeypatch, is_terminal):
    """Questions that are piped in give answers and nothing else on stdout."""
    from tunesmith import api, wizard

    class Chat:
        template = "plain"

        def __init__(self, model):
            pass

        def remark(self, messages):
            return None

        def answer(self, messages, **_):
            return iter(["you said ", messages[-1]["content"]])

    monkeypatch.setattr(api, "Chat", Chat)
    monkeypatch.setattr(wizard, "on_terminal", lambda: is_terminal)
    talk = CliRunner().invoke(app, ["chat", "tiny"], input="one\n\ntwo\n/exit\n")
    assert talk.exit_code == 0
    assert talk.stdout.count("you> ") == (4 if is_terminal else 0)
    assert [line for line in talk.stdout.splitlines() if "said" in line] == (
        ["you> you said one", "you> you> you said two"] if is_terminal else ["you said one", "you said two"]
    )


def test_every_short_flag_names_a_field():
    paths = {fact.path for fact in fields()}
    assert set(FLAGS.values()) - {"method.kind", "launch.kind", "parallel.kind"} <= paths


def test_all_seed_flags_work_together(invoke, quick_flags, tmp_path):
    code, result, _ = invoke(
        "train", *quick_flags, "--task", "chat", "--config", "low_resource", "--lora", "--lora-rank", "2",
        "--mixed-precision", "no", "--gradient-checkpointing", "--eval-steps", "1", "--save-steps", "1",
        "--per-device-train-batch-size", "2", "--gradient-accumulation-steps", "2", "--num-workers", "1",
        "--num-epochs", "1", "--learning-rate", "1e-4", "--freeze-ratio", "0.0", "--no-push-to-hub",
    )  # fmt: skip
    assert code == 0, result
    recipe = open_run(result["run"]).recipe()
    assert recipe.task == "chat"
    assert (recipe.adapter.kind, recipe.adapter.rank) == ("lora", 2)
    training = recipe.training
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (2, 2)
    assert (training.mixed_precision, training.num_workers, training.learning_rate) == ("no", 1, 1e-4)
    assert (recipe.data.max_length, training.num_epochs, training.eval_steps) == (128, 1, 1)
    assert result["run"].endswith("runs/chat_questions")
    named = set(TASK_METRICS["chat"]) - {"repeats_answer"}  # which needs earlier turns
    assert {c["metric"] for c in result["comparisons"]} >= named
    report = Path(result["report"]).read_text(encoding="utf-8")
    assert all(METRICS[name].label in report for name in named)


def test_help_and_import_stay_light():
    """Heavy packages load only in the verb that needs them; torch alone costs seconds."""
    script = (
        "import sys; import tunesmith, tunesmith.cli; "
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'datasets', 'hamilton', 'scipy', 'numpy', 'plotly'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.thorough
def test_nothing_but_ours_is_printed_by_evaluate(tiny_model_folder, question_file, tmp_path):
    """No progress bars and warnings of the libraries, which only a fresh process shows."""
    command = [
        sys.executable,
        "-m",
        "tunesmith",
        "evaluate",
        str(tiny_model_folder),
        "--dataset",
        str(question_file),
    ]
    result = subprocess.run(
        [*command, "--metrics", "perplexity", "--max-rows", "12"],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert not re.search("Loading weights|Warning", result.stderr), result.stderr


def test_a_measurement_is_never_written_over_another_one(
    tiny_model_folder, question_file, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    from tunesmith import api

    def measured(metric):
        settings = {"data": {"max_rows": 12, "max_length": 96}}
        return api.evaluate(
            tiny_model_folder, dataset=str(question_file), metrics=[metric], settings=settings
        ).run

    first, other, again = measured("perplexity"), measured("token_accuracy"), measured("perplexity")
    assert other.name == f"{first.name}-2"
    assert again == first
    assert "perplexity" in (first / "scores.json").read_text()


def test_another_model_or_setting_is_another_measurement(
    tiny_model_folder, question_file, tmp_path, monkeypatch
):
    """Of the same folder of weights, and with the same metrics and longest answer."""
    monkeypatch.chdir(tmp_path)
    from tunesmith import api

    model = tmp_path / "model"
    shutil.copytree(tiny_model_folder, model)

    def measured(verb, models, **section):
        settings = {"data": {"max_rows": 12, "max_length": 96}, "evaluation": {"resamples": 20, **section}}
        return verb(*models, dataset=str(question_file), metrics=["perplexity"], settings=settings)

    def alone(**section):
        return measured(api.evaluate, [model], **section).run

    def against(**section):
        return measured(api.compare, [tiny_model_folder, model], **section).saved

    first, compared = alone(), against()
    server = {"base_url": "http://127.0.0.1:8001/v1?team=hush", "api_key_env": "MY_KEY"}
    others = [alone(max_items=5), alone(engine="padded"), alone(server=server)]
    assert [folder.name for folder in others] == [f"{first.name}-{n}" for n in (2, 3, 4)]
    assert "hush" not in (others[-1] / "scores.json").read_text()
    assert alone() == first
    assert against() == compared
    assert against(max_items=5).name == f"{compared.name}-2"
    config = model / "config.json"
    config.write_text(config.read_text() + "\n")
    assert alone().name == f"{first.name}-5"
    assert against().name == f"{compared.name}-3"


def test_public_names_load():
    import tunesmith

    for name in tunesmith.__all__:
        assert getattr(tunesmith, name) is not None
    with pytest.raises(AttributeError):
        _ = tunesmith.nonsense


def test_train_evaluate_compare_chat_runs_and_push_print_one_json_object(
    invoke, quick_flags, tiny_model_folder, question_file, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    code, trained, _ = invoke("train", *quick_flags, "--task", "instruct", "--freeze-ratio", "0.5")
    assert code == 0, trained
    assert trained.keys() >= {
        "metric", "base", "tuned", "difference", "low", "high", "n", "verdict", "seconds", "run",
    }  # fmt: skip
    run = trained["run"]
    code, scores, _ = invoke("evaluate", run, "--metrics", "exact_match,perplexity")
    assert (code, set(scores["scores"])) == (0, {"exact_match", "perplexity"})
    said = CliRunner().invoke(app, ["evaluate", run, "--metrics", "exact_match"]).stdout
    assert re.search(r"exact_match \(%\) +\d+\.\d % +\d+\.\d % to \d+\.\d %", said), (
        "the scale of every table"
    )
    said = CliRunner().invoke(app, ["runs", str(tmp_path / "runs")]).stdout
    assert re.search(r"rougeL +\d+\.\d +\d+\.\d ", said)
    code, scores, _ = invoke(
        "evaluate", tiny_model_folder, "--dataset", question_file, "--metrics", "rouge1", "--max-rows", "5",
        "--max-new-tokens", "2",
    )  # fmt: skip
    assert (code, scores["scores"]["rouge1"]["n"]) == (0, 5)
    code, compared, _ = invoke("compare", tiny_model_folder, run)
    assert code == 0
    assert compared["difference"] == pytest.approx(trained["difference"])
    assert compared["measured_on"]["split_of"] == run
    said = CliRunner().invoke(app, ["compare", str(tiny_model_folder), run], env={"COLUMNS": "200"})
    assert re.search(rf"metric +{tiny_model_folder.name} +instruct_questions +difference", said.stdout)
    assert f"saved     {compared['saved']}" in said.stdout
    assert "measured on" in said.stderr
    code, talk, _ = invoke("chat", run, "--prompt", "what is one", "--max-new-tokens", "3")
    assert (code, talk["messages"][-1]["role"]) == (0, "assistant")
    code, listed, _ = invoke("runs", tmp_path / "runs")
    assert [r["state"] for r in listed["runs"]] == ["done"]
    code, listed, _ = invoke("runs", run)
    assert [r["path"] for r in listed["runs"]] == [run]
    code, error, _ = invoke("evaluate", f"{run}s")
    assert (code, f"Did you mean '{run}'" in error["error"]) == (1, True)
    code, error, _ = invoke("runs", tmp_path / "rums")
    assert (code, "Did you mean" in error["error"]) == (1, True)
    code, error, _ = invoke("push", run)
    assert (code, "hub-model-id" in error["error"]) == (1, True)
    code, error, _ = invoke("resume", run)
    assert (code, "finished" in error["error"]) == (1, True)
    again = ("--task", "instruct", "--freeze-ratio", "0.5", "--resume", "checkpoint-step-2")
    code, error, _ = invoke("train", *quick_flags, *again)
    assert (code, "finished" in error["error"]) == (1, True)


@pytest.mark.slow
def test_a_recipe_is_proved_to_continue_and_its_batches_to_be_equal(invoke, quick_flags, tmp_path):
    code, found, _ = invoke("verify-resume", *quick_flags, "--task", "instruct", "--steps", "2")
    assert (code, found["equal"], found["continued_from"]) == (0, True, [1])
    assert "continues to the bit" in found["sentence"]
    code, found, _ = invoke("plan", *quick_flags, "--task", "instruct", "--self-check")
    assert code == 0
    assert found["self_check"]["equal"]
    assert [c["second"] for c in found["self_check"]["compared"]] == ["4 + 4 accumulated", "packed"]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "what", ["presets", "tasks", "recipe", "formats", "templates", "methods", "metrics", "examples", "model"]
)
def test_show(invoke, what):
    code, shown, _ = invoke("show", what)
    assert code == 0
    assert len(shown[what]) >= 1
    assert all(entry["name"] and entry["about"] for entry in shown[what])


@pytest.mark.parametrize(
    ("arguments", "path", "expected"),
    [
        (["--trackers", "tensorboard"], "tracking.trackers", ["tensorboard"]),
        (["--metrics", "rougeL"], "evaluation.metrics", ["rougeL"]),
        (["--set", "evaluation.metrics=rougeL"], "evaluation.metrics", ["rougeL"]),
        (["--lora", "--set", "adapter.targets=q_proj,v_proj"], "adapter.targets", ["q_proj", "v_proj"]),
        (["--lora", "--target-modules", "q_proj"], "adapter.targets", ["q_proj"]),
        (["--lora", "--target-modules", "all-linear"], "adapter.targets", "all-linear"),
    ],
    ids=str,
)
def test_one_name_is_a_list_of_one(invoke, monkeypatch, arguments, path, expected):
    from tunesmith import api

    def caught(recipe, **_):
        section, field = path.split(".")
        raise api.TunesmithError(f"caught {getattr(getattr(recipe, section), field)!r}")

    monkeypatch.setattr(api, "plan", caught)
    code, error, _ = invoke("plan", *arguments)
    assert (code, error["error"]) == (1, f"caught {expected!r}")


def test_show_model_says_which_one_it_shows(invoke, tiny_model_folder):
    assert "tiny" in invoke("show", "model")[1]["model"][0]["about"]
    assert invoke("show", "model", tiny_model_folder)[1]["model"][0]["name"] == "architecture"


def test_plan_writes_nothing(invoke, quick_flags, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")  # a long path is not broken
    code, planned, _ = invoke("plan", *quick_flags, "--learning-rate", "5")
    assert code == 0
    assert "times the usual" in next(
        d["reason"] for d in planned["plan"]["decisions"] if d["name"] == "learning_rate"
    )
    assert planned["plan"]["total_steps"] == 2
    assert planned["rows"]["rows_in"] == 40
    assert not (tmp_path / "runs").exists()
    assert re.search(r"(?m)^dataset +\S*questions.jsonl", said("plan", *quick_flags).stdout)


@pytest.mark.parametrize(
    ("method", "adapter", "rate", "expected"),
    [
        ("sft", "full", 2e-5, None),
        ("sft", "full", 1e-3, None),
        ("sft", "full", 0.5, "25,000 times the usual 2e-05 of sft with whole weights"),
        ("sft", "lora", 1e-3, None),
        ("sft", "qlora", 1e-9, "200,000 times below the usual 0.0002 of sft with adapters"),
        ("dpo", "full", 1e-3, "1,000 times the usual 1e-06 of dpo with whole weights"),
        ("dpo", "lora", 1e-4, None),
    ],
)
def test_a_learning_rate_that_is_far_off_is_said(method, adapter, rate, expected):
    from tunesmith.compose import union_members
    from tunesmith.plan import rate_remark

    own = getattr(union_members("method")[method], "learning_rates", None)
    said = rate_remark(rate, method=method, own=own, adapter_kind=adapter)
    assert (said is None) if expected is None else (expected in said.reason and "find-lr" in said.reason)


def test_brackets_in_what_is_said_are_shown(capsys):
    """Text from data and messages is no markup: `[no interval]` would be swallowed, `[/x]` raise."""
    from tunesmith.display import Display

    with Display(quiet=False) as display:
        display({"kind": "warning", "message": "+5.0 points [no interval], n=3 [/x]"})
        display(
            {"kind": "decision", "name": "data", "value": "a[b]", "reason": "pip install 'tunesmith[serve]'"}
        )
        display({"kind": "decision", "name": "note", "value": "of two processes", "reason": ""})
        display({"kind": "state", "state": "prepared", "dropped": {"[x] is empty": 1}, "rows": dict.fromkeys(
            ("rows_in", "train", "validation", "held_out", "dropped", "truncated"), 1)})  # fmt: skip
    shown = capsys.readouterr().err
    for text in ("+5.0 points [no interval], n=3 [/x]", "a[b]", "'tunesmith[serve]'", "[x] is empty"):
        assert text in shown
    assert "()" not in shown


def test_an_answer_without_end_is_cut_on_the_screen_only():
    from tunesmith.api import Result
    from tunesmith.display import open_console
    from tunesmith.results import result_text

    sample = {"question": "q", "reference": "r", "base": "round " * 2000, "tuned": "short"}
    result = Result(run=None, comparisons=(), seconds=1.0, samples=(sample,))
    console = open_console()
    console.file = io.StringIO()
    console.print(result_text(result))
    assert len(console.file.getvalue()) < 1000
    assert "12,000 characters" in console.file.getvalue()
    assert result.as_dict()["samples"][0]["base"] == sample["base"]


@pytest.fixture
def begun(tmp_path) -> Path:
    """A run that has not trained."""
    return open_folder(tmp_path)


@pytest.mark.parametrize("verb", ["export", "merge", "test-model", "push", "serve", "evaluate"])
def test_an_unfinished_run_says_how_to_finish_it(invoke, begun, verb):
    open_run(begun).finish("interrupted")
    code, error, _ = invoke(verb, begun, *(["me/x"] if verb == "push" else []))
    assert code == 1
    assert "has no final model" in error["error"]
    assert "it was interrupted" in error["error"]
    assert f"tunesmith resume {begun}" in error["error"]


def test_a_path_is_only_proposed_where_its_name_is_alike(invoke, begun):
    (begun.parent.parent / "wheels").mkdir()
    assert f"Did you mean '{begun}'" in invoke("resume", begun.parent / "onee")[1]["error"]
    assert "Did you mean" not in invoke("resume", begun.parent / "quite-another")[1]["error"]
    assert "Did you mean" not in invoke("runs", begun.parent.parent / "wheel")[1]["error"]


def test_a_bad_dtype_is_refused_before_a_taken_folder(invoke, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/x").touch()
    error = invoke("merge", "tiny", "--dtype", "flaot32", "--output", tmp_path / "taken")[1]
    assert "Weights are not stored as 'flaot32'" in error["error"]


def test_lines_of_a_piped_table_end_with_their_words():
    lines = CliRunner().invoke(app, ["show", "metrics"]).stdout.splitlines()
    assert len({len(line) for line in lines}) > 3
    assert lines == [line.rstrip() for line in lines]


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["train", "--dataset", "missing.jsonl"], 1, "missing.jsonl"),
        (["train", "--lora", "--freeze-ratio", "0.5"], 1, "exclude each other"),
        (["train", "--lora-rank", "4"], 1, "belongs to lora"),
        (["train", "--task", "chatt"], 1, "Did you mean 'chat'"),
        (["train", "--config", "quick_tst"], 1, "Did you mean 'quick_test'"),
        (["train", "missing.yaml"], 1, "cannot be read"),
        (["train", "--name", "a/b"], 1, "a run's name is that of one folder"),
        (["train", "--lora", "--lora-rank", "0"], 1, "adapter.rank (--lora-rank) has to be greater than 0"),
        (["train", "--freeze-ratio", "1.5"], 1, "adapter.ratio (--freeze-ratio) has to be less than 1"),
        (["plan", "--learning-rate", "fast"], 1, "training.learning_rate (--learning-rate) takes a number"),
        (["train", "--launch", "slurm", "--workers", "2"], 1, "or add --set launch.kind=ray."),
        (["train", "--set", "training.learning_rate=fast"], 1, "training.learning_rate takes a number"),
        (
            ["train", "--method", "dpo", "--dataset", "example:support"],
            1,
            "(columns `chosen` and `rejected`)",
        ),
        (["train", "--set", "training.nonsense=1"], 1, "not a field"),
        (["evaluate", "tiny"], 1, "--dataset"),
        (["resume", "nowhere"], 1, "not a run"),
        (["evaluate", "runs/nope"], 1, "runs/nope"),
        (["runs", "nopes"], 1, "no output folder nopes"),
        (["show", "presetz"], 1, "Did you mean 'presets'"),
        (["chat", "tiny", "--prompt", ""], 1, "--prompt is empty"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_errors_say_what_to_do_and_set_the_exit_code(
    invoke, tmp_path, monkeypatch, arguments, code, expected
):
    monkeypatch.chdir(tmp_path)
    got, error, _ = invoke(*arguments)
    assert (got, error["exit_code"]) == (code, code)
    assert expected in error["error"]
    assert list(tmp_path.rglob("*.*")) == []


def test_an_unknown_option_is_a_usage_error():
    assert CliRunner().invoke(app, ["train", "--nonsense"]).exit_code == 2


@pytest.mark.parametrize("task", TASKS)
def test_tasks_are_listed_in_the_help(task):
    assert task in CliRunner().invoke(app, ["train", "--help"]).stdout


# what a first user found


def said(*arguments, **options):
    return CliRunner().invoke(app, [*map(str, arguments)], **options)


@pytest.fixture
def long_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "what is one", "response": "red " * 30}, {"prompt": "what is two", "response": "blue"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_inspect_marks_tokens_where_there_is_no_color(tiny_model_folder, long_rows):
    shown = said("inspect", long_rows, "--model", tiny_model_folder, "--row", 1, "--max-length", 40).stdout
    assert "tokens are {+trained+} context {*special*} [-cut-]" in shown
    assert "{*<|im_start|>*}user\nwhat is one{*<|im_end|>*}" in shown
    assert re.search(r"\{\+red red [red ]*\+\}\[- ?red", shown)
    facts = re.search(r"(\d+) tokens, (\d+) cut; of the (\d+) kept (\d+) trained \((\d+)%\)", shown)
    tokens, cut, kept, trained, share = map(int, facts.groups())
    assert (tokens - cut, kept) == (40, 40)
    assert share == round(100 * trained / kept)
    colored = said(
        "inspect",
        long_rows,
        "--model",
        tiny_model_folder,
        "--row",
        2,
        env={"FORCE_COLOR": "1", "TERM": "xterm"},
    )
    assert "{+" not in colored.stdout


def test_inspect_takes_a_task_as_train_does(invoke, tiny_model_folder, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "what is one", "response": "red " * 1500}) + "\n")
    cut = {}
    for task in ("custom", "chat"):
        code, seen, _ = invoke("inspect", path, "--model", tiny_model_folder, "--task", task, "--row", "1")
        assert code == 0
        cut[task] = seen["rows"][0]["cut"]
    lengths = {task: compose({"task": task}).recipe.data.max_length for task in cut}
    assert lengths["chat"] > lengths["custom"]
    assert cut["custom"] - cut["chat"] == lengths["chat"] - lengths["custom"]
    assert "--task is for data sets" in invoke("inspect", open_folder(tmp_path), "--task", "chat")[1]["error"]


def open_folder(tmp_path):
    from tunesmith.training.run import create

    return create(compose({"output_dir": str(tmp_path / "runs"), "name": "one"}).recipe).path


def test_broken_lines_are_facts_for_programs(invoke, tiny_model_folder, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a", \n')
    for verb in ("plan", "inspect"):
        data = ["--dataset", path] if verb == "plan" else [path]
        code, error, _ = invoke(verb, *data, "--base-model", tiny_model_folder, "--max-length", "64")
        assert (code, error["count"]) == (1, 1)
        assert error["broken"][0]["row"] == 2
        assert "^" not in error["error"]
        assert f"tunesmith validate {path} --fix" in error["fix"]
    said_to_people = said("inspect", path, "--base-model", tiny_model_folder).stderr
    assert "^" in said_to_people


def test_a_second_cleaned_copy_is_refused_before_anything_is_read(invoke, long_rows, monkeypatch):
    from tunesmith.data import validation

    long_rows.write_text('{"prompt": "a", "response": ""}\n' + long_rows.read_text())
    assert invoke("validate", long_rows)[0] == 1
    assert invoke("validate", long_rows, "--fix")[0] == 0, "the copy is free of errors"
    monkeypatch.setattr(validation, "validate", lambda *a, **k: pytest.fail("it was read"))
    monkeypatch.setattr("tunesmith.models.load_tokenizer", lambda *a, **k: pytest.fail("it was loaded"))
    code, error, _ = invoke("validate", long_rows, "--fix", "--model", "tiny")
    assert (code, "already" in error["error"]) == (1, True)


def test_preferences_under_a_task_that_imitates_say_what_is_used(invoke):
    _, report, _ = invoke("validate", "example:preferences", "--task", "chat")
    assert any("the chosen answer is imitated" in note for note in report["notes"])
    assert not any("imitated" in note for note in invoke("validate", "example:preferences")[1]["notes"])
    assert not any(
        "imitated" in note for note in invoke("validate", "example:chat", "--task", "chat")[1]["notes"]
    )


def test_a_data_set_or_a_run_in_the_place_of_a_recipe_is_told_where_it_belongs(
    invoke, long_rows, begun, tmp_path
):
    listed = tmp_path / "rows.json"
    listed.write_text('[{"prompt": "a", "response": "b"}]')
    for given, fix in (
        (long_rows, f"--dataset {long_rows}"), (listed, f"--dataset {listed}"), (begun, f"tunesmith resume {begun}"),
    ):  # fmt: skip
        code, error, _ = invoke("train", given)
        assert code == 1
        assert fix in error["fix"]


def test_the_shipped_data_set_is_taken_aloud(monkeypatch):
    assert any(
        "No data set was named, so the shipped example:sql is used" in note for note in compose({}).notes
    )
    assert not compose({"data": {"dataset": "example:sql"}}).notes
    made = {"rows": 1, "pieces": 1, "made": 1, "joined": False, "missing": 0, "cache": "there"}
    monkeypatch.setattr("tunesmith.api.prepare", lambda *given, **options: made)
    said = CliRunner().invoke(app, ["prepare"]).output
    assert "No data set was named, so the shipped example:sql is used" in said


def test_the_version_is_shown():
    assert said("--version").stdout == f"tunesmith {tunesmith.__version__}\n"
    assert "Commands" in said().output, "without a verb the help is shown"


def test_a_taken_port_shows_before_the_workbench_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tunesmith.ui.app", None)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(RecipeError, match="cannot listen"):
        api.web(tmp_path, port=taken.getsockname()[1])


def test_one_is_singular(long_rows):
    long_rows.write_text('{"prompt": "a", "response": ""}\n' + long_rows.read_text())
    assert "1 error, 0 warnings, 0 notes" in said("validate", long_rows).stdout


def test_tables_are_not_squeezed_where_the_output_is_piped(monkeypatch):
    from tunesmith.display import open_console, table_of

    for columns, whole in ((None, True), ("60", False)):
        monkeypatch.delenv("COLUMNS", raising=False)
        if columns:
            monkeypatch.setenv("COLUMNS", columns)
        console = open_console()
        console.file = io.StringIO()
        table = table_of("name", "about")
        table.add_row("a name", " ".join(["words"] * 30))
        console.print(table)
        assert (" ".join(["words"] * 30) in console.file.getvalue()) is whole
