"""The wizard: seven steps of questions, through a real pseudo-terminal where the terminal matters."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
import types

import pytest

from tunesmith import wizard
from tunesmith.errors import TunesmithError
from tunesmith.training.run import find_runs, open_run

COMMAND = [sys.executable, "-m", "tunesmith"]
ENVIRONMENT = {**os.environ, "TERM": "dumb", "COLUMNS": "160", "HF_HUB_OFFLINE": "1"}
if "PYTHONPATH" in os.environ:  # the sessions run in folders of their own
    ENVIRONMENT["PYTHONPATH"] = os.pathsep.join(
        map(os.path.abspath, os.environ["PYTHONPATH"].split(os.pathsep))
    )


@pytest.fixture
def here(tmp_path, monkeypatch, tiny_model_folder):
    """A working folder with `model`, a list of questions, and one with columns of its own."""
    (tmp_path / "model").symlink_to(tiny_model_folder)
    rows = [{"prompt": f"what is the count of {i}", "response": f"red {i % 5}"} for i in range(120)]
    (tmp_path / "questions.json").write_text(json.dumps(rows), encoding="utf-8")
    odd = [{"ask": row["prompt"], "say": row["response"]} for row in rows]
    (tmp_path / "odd.json").write_text(json.dumps(odd), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


MODEL = ["model", ""]
DATA = ["questions.json", "no", "64"]
BASELINE = ["yes", "", "4"]
LORA = ["2", "4", ""]
TRAINING = ["1", "4", "1e-3", "yes"]


@pytest.fixture
def brief(monkeypatch):
    """Answers of four tokens for those who decline the baseline and are not asked how long they may be."""
    monkeypatch.setattr(wizard, "NEW_TOKENS", 4)


@pytest.fixture
def answer(monkeypatch):
    """Run the wizard on these answers; gives what it asked and its result."""

    def play(*answers: str):
        waiting, asked = list(answers), []

        def typed(prompt: str) -> str:
            asked.append(prompt)
            if not waiting:
                raise EOFError
            given = waiting.pop(0)
            if given == "^C":
                raise KeyboardInterrupt
            return given

        monkeypatch.setattr("builtins.input", typed)
        result = wizard.run()
        assert not waiting, f"not asked for: {waiting}"
        return asked, result

    return play


def test_the_defaults_are_those_of_the_seed(here, answer, capsys):
    """Every question with its default; the answers become the recipe that is planned."""
    asked, result = answer(*MODEL, *DATA, *BASELINE, "", "", "", "", "", "", "no", "quit")
    assert [q.strip() for q in asked] == [
        "Enter model name [gpt2]:",
        "Enter output directory [./finetuned_model]:",
        "Enter dataset path or name:",
        "Limit number of samples? (yes/no) [yes]:",
        "Maximum length in tokens (1 to 512) [512]:",
        "Measure the model before training, on held-out questions with references? (yes/no) [yes]:",
        "Number of questions (1 to 18) [18]:",
        "Longest answer in tokens [100]:",
        "LoRA rank (r) [8]:",
        "LoRA alpha [32]:",
        "LoRA dropout [0.1]:",
        "Number of epochs [3]:",
        "Batch size [4]:",
        "Learning rate [0.0002]:",
        "Start training? (yes/no) [yes]:",
        "Number of epochs [3]:",
    ]
    assert result == {"run": None}
    printed = capsys.readouterr().out
    for title in ("model", "data", "baseline", "LoRA", "training"):
        assert f"of 7: {title}" in printed
    assert "120 rows with the columns prompt, response" in printed
    assert "read as prompt_response: the columns prompt, response are there" in printed
    assert "18 held out + 0 dropped" in printed
    assert "rougeL (points)" in printed, "the baseline, with references"
    assert re.search(r"total_steps +18 +3 epochs of 6 steps", printed), "the plan"
    assert "Nothing was written" in printed
    assert not find_runs(here)


def test_an_encoder_decoder_is_trained_as_one_and_an_encoder_is_refused(here, answer, tiny_t5_folder, capsys):
    from transformers import BertConfig

    (here / "t5").symlink_to(tiny_t5_folder)
    BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(here / "bert")
    answer("bert", "t5", "", *DATA, "no", *LORA, "1", "4", "", "no", "quit")
    printed = capsys.readouterr().out
    assert "is an encoder-only model" in printed
    assert re.search(r"total_steps +\d+ ", printed), "the plan"
    assert "inputs have up to" in " ".join(printed.split())


@pytest.fixture
def hub_set(monkeypatch):
    """A Hub that has `someone/data` and `someone/other`; gives what was asked of it."""
    import datasets

    from tunesmith.data import sources

    asked = []

    def load(name, config, **options):
        asked.append((name, config, options["split"], options["data_files"]))
        rows = [{"prompt": f"what is the count of {i}", "response": f"red {i % 5}"} for i in range(120)]
        return datasets.Dataset.from_list(rows)

    known = {"someone/data", "someone/other"}
    monkeypatch.setattr(
        sources, "_problem_on_hub", lambda name, _: None if name in known else "it has no such set"
    )
    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_the_sample_limit_and_hub_questions(here, answer, hub_set, capsys):
    asked, _ = answer(
        *MODEL,
        "someone/dat",
        "someone/data",
        "",
        "yes",
        "train*.parquet",
        "",
        "yes",
        "",
        "64",
        "back",
        "quit",
    )
    assert [q.strip() for q in asked[2:11]] == [
        "Enter dataset path or name:",
        "Enter dataset path or name:",
        "Enter dataset config (empty for none):",
        "Load specific file from repo? (yes/no) [no]:",
        "Enter file or pattern:",
        "Enter split [train]:",
        "Limit number of samples? (yes/no) [yes]:",
        "Number of samples [1000]:",
        "Maximum length in tokens (1 to 512) [512]:",
    ]
    assert "neither a file, a folder, an example:NAME nor a Hub data set" in capsys.readouterr().out
    assert hub_set == [("someone/data", None, "train", "train*.parquet")]


def test_an_optional_answer_can_be_taken_back(here, answer, hub_set):
    first = ["someone/data", "en", "", "", "no", "64"]
    asked, _ = answer(*MODEL, *first, "back", "", "", "", "", "", "", "back", "", "-", "", "", "", "", "quit")
    configs = [q.strip() for q in asked if "config" in q]
    assert configs == [
        "Enter dataset config (empty for none):",
        "Enter dataset config (- for none) [en]:",
        "Enter dataset config (- for none) [en]:",
    ]
    assert [config for _, config, *_ in hub_set] == ["en", "en", None]


def test_answers_about_one_data_set_are_no_defaults_for_another(here, answer, hub_set):
    asked, _ = answer(
        *MODEL, "someone/data", "en", "yes", "*.csv", "test", "no", "64", "back",
        "someone/other", "", "", "", "", "", "quit",
    )  # fmt: skip
    second = [
        q.strip()
        for q in asked
        if q.startswith(("Enter dataset config", "Load", "Enter file", "Enter split"))
    ][4:]
    assert second == [
        "Enter dataset config (empty for none):",
        "Load specific file from repo? (yes/no) [no]:",
        "Enter split [train]:",
    ]
    assert hub_set[-1] == ("someone/other", None, "train", None)


def test_a_data_set_of_the_catalogue_is_read_as_it_says(here, answer, monkeypatch, capsys):
    (here / "catalog.yaml").write_text(
        "datasets: {mine: {about: own columns, path: odd.json, columns: {ask: prompt, say: completion}}}"
    )
    monkeypatch.setenv("TUNESMITH_CATALOG", str(here / "catalog.yaml"))
    asked, _ = answer(*MODEL, "mine", "no", "64", "no", "quit")
    assert not [q for q in asked if "config" in q or "Column" in q]
    printed = capsys.readouterr().out
    assert "data set 'mine' of the catalogue is" in printed
    assert "120 rows with the columns prompt, completion" in printed
    assert "18 held out + 0 dropped" in printed


def test_declining_the_baseline_asks_nothing_about_it(here, answer, capsys):
    asked, _ = answer(*MODEL, *DATA, "no", "quit")
    assert [q.split(" (")[0] for q in asked[-2:]] == [
        "Measure the model before training, on held-out questions with references?",
        "LoRA rank",
    ]
    said = "After training both are compared on 18 held-out questions, with answers of up to 100 tokens."
    assert said in capsys.readouterr().out


@pytest.fixture
def short_model(here, tiny_model_folder):
    """`short`: the tiny model with a context of 96 tokens."""
    import shutil

    shutil.copytree(tiny_model_folder, here / "short")
    config = json.loads((here / "short/config.json").read_text())
    (here / "short/config.json").write_text(json.dumps(config | {"max_position_embeddings": 96}))


def test_a_default_that_was_taken_is_that_of_the_next_model(here, answer, short_model, capsys):
    asked, _ = answer(*MODEL, "questions.json", "no", "", "back", "back", "short", "", "", "", "", "quit")
    assert [q.strip() for q in asked if q.startswith("Maximum")] == [
        "Maximum length in tokens (1 to 512) [512]:",
        "Maximum length in tokens (1 to 96) [96]:",
    ]
    assert "does not fit any more" not in capsys.readouterr().out


def test_an_answer_that_fits_no_more_is_said_and_dropped(here, answer, short_model, capsys):
    asked, _ = answer(*MODEL, "questions.json", "no", "400", "back", "back", "short", "", "", "", "", "quit")
    assert asked[-2].strip() == "Maximum length in tokens (1 to 96) [96]:"
    said = "The answer from before does not fit any more. A whole number, 1 to 96; found '400'."
    assert said in capsys.readouterr().out


def test_the_base_is_asked_again_only_where_something_changed(here, answer, monkeypatch, capsys):
    from tunesmith import api

    measured = []
    baseline = api.baseline
    monkeypatch.setattr(
        api,
        "baseline",
        lambda recipe, **o: measured.append(recipe.evaluation.max_items) or baseline(recipe, **o),
    )
    answer(
        *MODEL, *DATA, *BASELINE, "back", "", "", "", "2", "4", "", "1", "back", "back", "", "7", "",
        "back", "back", "back", "", "", "", "", "50", "", "", "", "quit",
    )  # fmt: skip
    assert measured == [18, 7, 7], "once, then for other questions, then for another length"
    printed = capsys.readouterr().out
    assert printed.count("the base is not asked again") == 1
    assert printed.count("95 % interval") == 4, "the figures are shown every time"


def test_what_later_steps_said_of_another_model_does_not_count(here, answer, monkeypatch):
    """On CUDA the precision goes by the model; that of the training's step must not outlive a change of it."""
    from tunesmith import api

    precision, planned = ["bf16"], []
    plan = api.plan
    monkeypatch.setattr(wizard, "_precision", lambda session: precision[0])
    monkeypatch.setattr(
        api, "plan", lambda recipe: planned.append(recipe.training.mixed_precision) or plan(recipe)
    )
    step = wizard.model_step

    def changing(session):
        step(session)
        precision[0] = "no" if planned else "bf16"

    monkeypatch.setattr(wizard, "STEPS", (("model", changing), *wizard.STEPS[1:]))
    answer(*MODEL, *DATA, "no", *LORA, "1", "4", "1e-3", *["back"] * 5, "", "", "", "", "", "", "quit")
    assert planned == ["bf16", "bf16", "no"]


@pytest.mark.parametrize(
    ("capability", "kind", "precision"),
    [
        ((9, 0), "sft", "bf16"),
        ((9, 0), "seq2seq", "bf16"),
        ((7, 5), "sft", "fp16"),
        ((7, 5), "seq2seq", "no"),
    ],
)
def test_a_gpu_gets_the_precision_that_it_has(capability, kind, precision, monkeypatch):
    monkeypatch.setattr("tunesmith.plan.device", lambda: "cuda")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *device: capability)
    session = types.SimpleNamespace(layers={"model": {"method": {"kind": kind}}})
    assert wizard._precision(session) == precision


def test_changed_rows_are_asked_anew(here, answer, monkeypatch):
    """The same answers, but another file under the same name."""
    from tunesmith import api

    measured = []
    baseline = api.baseline
    monkeypatch.setattr(api, "baseline", lambda recipe, **o: measured.append(1) or baseline(recipe, **o))
    step = wizard.lora_step

    def rewrite(session):
        rows = [{"prompt": f"what is the count of {i}", "response": f"red {i % 5}"} for i in range(90)]
        (here / "questions.json").write_text(json.dumps(rows), encoding="utf-8")
        step(session)

    steps = tuple((title, rewrite if title == "LoRA" else made) for title, made in wizard.STEPS)
    monkeypatch.setattr(wizard, "STEPS", steps)
    answer(*MODEL, *DATA, "yes", "5", "4", "back", "", "", "", "quit")
    assert measured == [1, 1]


def test_wrong_answers_are_said_and_asked_again(here, answer, capsys):
    (here / "taken").mkdir()
    (here / "taken/notes.txt").write_text("mine", encoding="utf-8")
    answer(
        "no-such-model", "./mod", "model", "taken", "new",
        "question.json", "questions.json", "maybe", "no", "999", "0", "64",
        "yes", "23", "2", "0", "4",
        "x", "2", "", "1", "0.2",
        "0", "1", "", "0", "quit",
    )  # fmt: skip
    printed = capsys.readouterr().out
    for said in (
        "There is no model 'no-such-model'",
        "There is no model folder or run ./mod",
        "Did you mean 'model'?",
        "taken is taken. Free is",
        "There is no file question.json",
        "Did you mean 'questions.json'?",
        "Answer yes or no; found 'maybe'",
        "A whole number, 1 to 512; found '999'",
        "A whole number, 1 to 512; found '0'",
        "A whole number, 1 to 18; found '23'",
        "A whole number, 1 or more; found '0'",
        "A whole number, 1 or more; found 'x'",
        "A number at least 0, below 1; found '1'",
        "A number above 0; found '0'",
    ):
        assert said in printed, said


def test_columns_of_ones_own_are_asked_for_by_name(here, answer, capsys):
    asked, _ = answer(*MODEL, "odd.json", "no", "64", "question", "ask", "say", "no", "quit")
    printed = capsys.readouterr().out
    assert "There is no column 'question'. Columns there: ask, say." in printed
    assert [q for q in asked if q.startswith("Column")][-1] == "Column of the answer: "
    assert "18 held out" in printed


def test_a_data_set_with_nothing_to_measure_on_is_trained_all_the_same(here, answer, monkeypatch, capsys):
    from tunesmith import api

    plan = api.plan

    def nothing_held_out(recipe):
        found, rows = plan(recipe)
        return found, {**rows, "rows": {**rows["rows"], "held_out": 0}}

    monkeypatch.setattr(api, "plan", nothing_held_out)
    _, result = answer(*MODEL, *DATA, "yes", *LORA, *TRAINING, "", "no")
    assert "Nothing is held out of so few rows" in capsys.readouterr().out
    assert open_run(result["run"]).recipe().evaluation.skip


def test_a_model_without_known_attention_gets_all_linear_layers(here, answer, monkeypatch, capsys):
    from tunesmith import models
    from tunesmith.errors import ModelError

    find = models.target_modules

    def unknown(model, targets):
        if targets == "attention":
            raise ModelError("No module is known as attention.")
        return find(model, targets)

    monkeypatch.setattr(models, "target_modules", unknown)
    answer(*MODEL, *DATA, "no", *LORA, "quit")
    printed = capsys.readouterr().out
    assert "No module is known as attention. So the adapter sits on all linear layers" in printed
    assert "mlp.down_proj" in printed


def test_back_at_every_step_keeps_the_answers_as_defaults(here, answer):
    asked, _ = answer(
        "back", *MODEL, "back", "", "", *DATA, "back", "", "", "", *BASELINE, "back", "", "", "", *LORA, "back",
        "", "", "", "1", "back", "quit",
    )  # fmt: skip
    asked = [q.strip() for q in asked]
    assert asked[:2] == ["Enter model name [gpt2]:"] * 2, "the first step has none before it"
    assert asked[4:6] == ["Enter model name [model]:", "Enter output directory [./finetuned_model]:"]
    assert "Maximum length in tokens (1 to 512) [64]:" in asked
    assert "Longest answer in tokens [4]:" in asked
    assert "LoRA rank (r) [2]:" in asked


class Hub:
    """Stands for huggingface_hub.HfApi."""

    asked: list = []
    endpoint = "https://huggingface.co"

    def __init__(self, token=None):
        Hub.asked = [token]

    def create_repo(self, name, **options):
        Hub.asked.append((name, options))

    def repo_info(self, name):
        return types.SimpleNamespace(private=True)

    def upload_folder(self, *, folder_path, repo_id, **options):
        pass

    def upload_file(self, *, path_or_fileobj, path_in_repo, repo_id, **options):
        assert path_in_repo == "README.md"


def test_a_session_trains_compares_uploads_and_says_how_to_repeat_it(here, answer, monkeypatch, capsys):
    from tunesmith import evaluation

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr("getpass.getpass", lambda prompt: "hf_secret")
    evaluated = []
    evaluate = evaluation.evaluate
    monkeypatch.setattr(
        evaluation, "evaluate", lambda *a, **o: evaluated.append((o["name"], len(a[2]))) or evaluate(*a, **o)
    )
    asked, result = answer(
        *MODEL, *DATA, *BASELINE, *LORA, *TRAINING, "back", "1", "8", "", "yes", "", "yes", "me/mine", "", ""
    )
    assert evaluated == [("base", 18), ("tuned", 18), ("tuned", 18)], (
        "the base is asked once, and held-out questions only"
    )
    assert asked[-4].startswith("Upload to Hugging Face? (yes/no) [no]")
    assert [q.strip() for q in asked[-2:]] == [
        "Create new repository? (yes/no) [yes]:",
        "Make repository private? (yes/no) [no]:",
    ]
    assert Hub.asked == ["hf_secret", ("me/mine", {"private": False, "exist_ok": True})]
    printed = capsys.readouterr().out
    assert "finetuned_model is taken, so this run goes to" in printed
    assert "of 7: comparison" in printed
    assert "Uploaded to https://huggingface.co/me/mine" in printed
    assert "hf_secret" not in printed
    first, second = (open_run(here / name) for name in ("finetuned_model", "finetuned_model-2"))
    assert result == {"run": str(second.path)}
    assert [run.state() for run in (first, second)] == ["done", "done"]
    recipe = second.recipe()
    assert (recipe.adapter.rank, recipe.adapter.alpha, recipe.adapter.dropout) == (2, 4, 0.1)
    assert (recipe.training.num_epochs, recipe.training.per_device_train_batch_size) == (1, 8)
    assert (recipe.training.learning_rate, recipe.training.gradient_accumulation_steps) == (1e-3, 4)
    assert (recipe.data.max_length, recipe.evaluation.max_items, recipe.evaluation.max_new_tokens) == (
        64,
        18,
        4,
    )
    command = next(line for line in printed.splitlines() if line.startswith("again"))
    arguments = shlex.split(command)
    assert arguments[1:3] == ["tunesmith", "train"]
    assert arguments[3:] == [str(second.path / "recipe.yaml"), "--name", "finetuned_model-3"]


def test_ctrl_c_after_the_training_names_the_run(here, answer, brief, capsys):
    answer(*MODEL, *DATA, "no", *LORA, *TRAINING, "^C")
    printed = capsys.readouterr().out
    assert f"Kept: the finished run {here / 'finetuned_model'}" in printed
    assert "again     tunesmith train" in printed


@pytest.mark.thorough
def test_after_a_training_its_folder_is_no_default_any_more(here, answer, brief):
    asked, _ = answer("model", "runs/mine", *DATA, "no", *LORA, *TRAINING, "go", *["back"] * 5, "", "quit")
    assert "Enter output directory [runs/mine-2]:" in [q.strip() for q in asked]
    assert [q.strip() for q in asked].count("Press Enter to go on:") == 2, "nothing else is an answer there"


def test_a_stopped_training_is_named_with_its_checkpoint(here, answer, brief, monkeypatch, capsys):
    import signal

    from tunesmith.training.run import Run

    progress = Run.progress

    def stop(run, stage, done, total, **fields):
        progress(run, stage, done, total, **fields)
        if stage == "training" and done == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Run, "progress", stop)
    _, result = answer(*MODEL, *DATA, "no", *LORA, *TRAINING)
    printed = capsys.readouterr().out
    assert "finetuned_model, with checkpoint-step-2" in printed
    assert f"tunesmith resume {here / 'finetuned_model'}" in printed
    assert open_run(result["run"]).state() == "interrupted"


def test_completion_offers_paths_examples_columns_and_words(here):
    (here / "question papers").mkdir()
    with wizard.offering(wizard._paths):
        assert wizard.matches("quest") == ["question papers/", "questions.json"]
        assert wizard.matches(str(here / "od")) == [str(here / "odd.json")]
        assert wizard.matches("ba") == ["back"]
    assert wizard.matches("quest") == []


def test_without_readline_there_is_no_completion_and_no_fuss(monkeypatch):
    monkeypatch.setitem(sys.modules, "readline", None)
    with wizard.completion():
        pass


@pytest.mark.parametrize("about", ["readline", "libedit"])
def test_completion_is_put_back_as_it_was(monkeypatch, about):
    calls = []
    fake = types.SimpleNamespace(
        __doc__=about,
        get_completer=lambda: "mine",
        get_completer_delims=lambda: " ",
        set_completer=lambda c: calls.append(c),
        set_completer_delims=lambda d: calls.append(d),
        parse_and_bind=lambda text: calls.append(text),
    )
    monkeypatch.setitem(sys.modules, "readline", fake)
    with wizard.completion():
        assert calls[-1] == ("tab: complete" if about == "readline" else "bind ^I rl_complete")
    assert calls[-2:] == ["mine", " "]


def test_the_wizard_is_cheap_to_import():
    script = (
        "import sys, tunesmith.wizard; heavy = {'torch', 'transformers', 'trl', 'peft', 'datasets', 'hamilton', "
        "'scipy', 'numpy', 'huggingface_hub'}; print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_without_a_terminal_there_is_help_and_a_clear_refusal():
    alone = subprocess.run(COMMAND, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=ENVIRONMENT)
    assert alone.returncode == 2
    assert "Commands:" in alone.stdout + alone.stderr
    asked = subprocess.run(
        [*COMMAND, "wizard"], stdin=subprocess.DEVNULL, capture_output=True, text=True, env=ENVIRONMENT
    )
    assert asked.returncode == 1
    assert "there is none here" in asked.stderr


def test_json_is_not_for_questions(monkeypatch):
    from typer.testing import CliRunner

    from tunesmith.cli import app

    monkeypatch.setattr(wizard, "on_terminal", lambda: True)
    result = CliRunner().invoke(app, ["wizard", "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout.splitlines()[-1])["exit_code"] == 1


@pytest.mark.thorough
def test_an_upload_that_fails_keeps_the_step_and_the_model(here, answer, brief, monkeypatch, capsys):
    monkeypatch.setattr("getpass.getpass", lambda prompt: "")
    _, result = answer(*MODEL, *DATA, "no", *LORA, *TRAINING, "", "yes", "me/mine", "", "", "back", "", "no")
    printed = capsys.readouterr().out
    assert f"not uploaded to me/mine; it is whole in {result['run']}/final_model" in printed
    assert printed.count("of 7: upload") == 3
    assert open_run(result["run"]).state() == "done"


@pytest.fixture
def terminal(here):
    """Start a command on a pseudo-terminal in the working folder."""
    pexpect = pytest.importorskip("pexpect", reason="pseudo-terminals are Unix's")
    started = []

    def start(*arguments: str):
        child = pexpect.spawn(
            sys.executable, ["-m", "tunesmith", *arguments], cwd=str(here), env=ENVIRONMENT,
            encoding="utf-8", timeout=300, dimensions=(50, 160),
        )  # fmt: skip
        started.append(child)
        return child

    yield start
    for child in started:
        child.close(force=True)


def ended(child) -> int:
    import pexpect

    child.expect(pexpect.EOF)
    child.close()
    return child.exitstatus


def interrupt(child, answer: str) -> None:
    """Ctrl-C at a question. Python does not see one that comes between a prompt's last letter and its waiting for
    keys, before it does the next one: on a busy machine that gap is long."""
    import pexpect

    for _ in range(20):
        child.sendintr()
        if child.expect([answer, pexpect.TIMEOUT], timeout=5) == 0:
            return
    raise AssertionError(f"no {answer!r} in {child.before!r}")


def test_ctrl_c_at_the_first_question_exits_0_and_says_that_nothing_was_kept(terminal, here):
    child = terminal()
    child.expect("Step 1 of 7: model")
    child.expect(r"Enter model name \[gpt2\]: ")
    interrupt(child, "Ended. Nothing was written.")
    assert ended(child) == 0
    assert not (here / "finetuned_model").exists()


@pytest.mark.slow
def test_tab_completes_and_back_and_quit_work_on_a_terminal(terminal):
    child = terminal("wizard")
    child.expect(r"Enter model name \[gpt2\]: ")
    child.sendline("mode")
    child.expect("There is no model 'mode'")
    child.expect("Did you mean 'model'")
    child.expect(r"\[gpt2\]: ")
    child.send("mo\t")
    child.expect("model/")
    child.sendline("")
    child.expect(r"Enter output directory \[./finetuned_model\]: ")
    child.sendline("")
    child.expect(r"LlamaForCausalLM: [^\r]* parameters in 4 layers, 512 tokens of context")
    child.expect("Step 2 of 7: data")
    child.expect("Enter dataset path or name: ")
    child.send("quest\t")
    child.expect("questions.json")
    child.sendline("")
    child.expect("Limit number of samples")
    child.sendline("back")
    child.expect("Step 1 of 7: model")
    child.expect(r"Enter model name \[model/\]: ")
    child.sendline("quit")
    child.expect("Nothing was written")
    assert ended(child) == 0


@pytest.mark.thorough
def test_going_back_on_a_terminal_shows_the_defaults_of_what_is_chosen_now(terminal, short_model):
    child = terminal()
    walk(child, ("Enter model name", "model"), ("Enter output directory", ""))
    walk(child, ("Enter dataset path", "/nope.json"))
    child.expect("There is no file /nope.json")
    child.expect("Check the path")
    walk(child, ("Enter dataset path", "questions.json"), ("Limit number", "no"))
    walk(child, (r"Maximum length in tokens \(1 to 512\) \[512\]: ", "400"), ("Measure the model", "back"))
    walk(
        child,
        ("Enter dataset path", "back"),
        (r"Enter model name \[model\]: ", "short"),
        ("Enter output", ""),
    )
    walk(child, (r"Enter dataset path or name \[questions.json\]: ", ""), (r"Limit number[^\r]*\[no\]: ", ""))
    child.expect("does not fit any more. A whole number, 1 to 96; found '400'")
    walk(child, (r"Maximum length in tokens \(1 to 96\) \[96\]: ", "64"), ("Measure the model", ""))
    walk(child, (r"Number of questions \(1 to 18\) \[18\]: ", ""), ("Longest answer", "4"))
    walk(
        child,
        ("LoRA rank", "back"),
        ("Measure the model", ""),
        ("Number of questions", ""),
        ("Longest answer", ""),
    )
    child.expect("the base is not asked again")
    walk(child, ("LoRA rank", "back"), ("Measure the model", "no"))
    child.expect("compared on 18 held-out questions, with answers of up to 100 tokens")
    child.expect(r"LoRA rank \(r\) \[8\]: ")
    assert "Number of questions" not in child.before
    child.sendline("quit")
    child.expect("Nothing was written")
    assert ended(child) == 0


def walk(child, *answers: tuple[str, str]) -> None:
    for question, typed in answers:
        child.expect(question)
        child.sendline(typed)


FIRST = (
    ("Enter model name", "model"), ("Enter output directory", "runs/mine"),
    ("Enter dataset path", "questions.json"), ("Limit number", "no"), ("Maximum length", "64"),
    ("Measure the model", "yes"), ("Number of questions", ""), ("Longest answer", "4"),
    ("LoRA rank", "2"), ("LoRA alpha", "4"), ("LoRA dropout", ""),
)  # fmt: skip


@pytest.mark.thorough
def test_a_whole_session_on_a_terminal_and_the_command_that_repeats_it(terminal, here):
    child = terminal()
    walk(
        child,
        *FIRST,
        ("Number of epochs", "1"),
        ("Batch size", "4"),
        ("Learning rate", ""),
        ("Start training", ""),
    )
    child.expect("Step 6 of 7: comparison")
    child.expect("report")
    walk(child, ("Press Enter", ""), ("Upload to Hugging Face", "yes"), ("Enter repository", "me/mine"))
    walk(child, ("Create new", ""), ("Make repository private", "yes"))
    child.expect("Enter token")
    child.waitnoecho()
    child.sendline("hf_never_shown")
    child.expect("was not uploaded to me/mine")
    assert "hf_never_shown" not in child.before + child.after
    walk(child, ("Upload to Hugging Face", "no"))
    child.expect(r"again +tunesmith (train [^\r]*)\r\n")
    again = shlex.split(child.match[1])
    assert ended(child) == 0
    first = open_run(here / "runs/mine")
    assert first.state() == "done"
    assert again[1:] == [str(here / "runs/mine/recipe.yaml"), "--name", "mine-2"]
    subprocess.run([*COMMAND, *again], cwd=here, env=ENVIRONMENT, check=True, capture_output=True)
    second = open_run(here / "runs/mine-2")
    assert second.recipe().model_copy(update={"name": "mine"}) == first.recipe()
    assert second.read("evaluation/scores.json") == first.read("evaluation/scores.json")


@pytest.mark.thorough
def test_ctrl_c_while_training_on_a_terminal_exits_0_and_names_the_checkpoint(terminal, here):
    child = terminal()
    walk(
        child,
        *FIRST,
        ("Number of epochs", "500"),
        ("Batch size", "4"),
        ("Learning rate", ""),
        ("Start training", ""),
    )
    run = here / "runs/mine"
    while not (run / "events.jsonl").exists() or '"training"' not in (run / "events.jsonl").read_text():
        assert child.isalive()
        time.sleep(0.05)  # and leave the machine to the training
    child.sendintr()
    child.expect(r"Ended. Kept: the run [^\r]*/runs/mine, with [^\r]*checkpoint-step-")
    child.expect(r"tunesmith resume [^\r]*/runs/mine")
    assert ended(child) == 0
    assert open_run(run).state() == "interrupted"


def test_a_verb_s_error_keeps_the_step(here, answer, monkeypatch, capsys):
    """A plan that cannot be carried out is said, and the questions come again."""
    from tunesmith import api

    plans = iter([TunesmithError("The disk is full.", fix="Free some.")])
    plan = api.plan

    def once(recipe):
        for error in plans:
            raise error
        return plan(recipe)

    monkeypatch.setattr(api, "plan", once)
    asked, _ = answer(*MODEL, *DATA, "no", "no", "quit")
    assert "The disk is full." in capsys.readouterr().out
    assert sum(q.startswith("Measure the model") for q in asked) == 2
