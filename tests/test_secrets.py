"""No secret gets out: canaries in every place that holds one, and then every byte that is left behind is searched.

Verbs are taken from the command line's own list, so that a new one is tested without being named here.
"""

import json
import os
import sys
from pathlib import Path

import pytest
from evaluation.judging.judge_servers import serving
from typer.testing import CliRunner

from tunesmith import api
from tunesmith.cli import app
from tunesmith.compose import compose
from tunesmith.errors import RecipeError, TunesmithError

CANARY = "cnry9f27e4b1"
VARIABLES = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN", "OPENAI_API_KEY", "ANTHROPIC_API_KEY", "WANDB_API_KEY",
    "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "GOOGLE_API_KEY",
    "AZURE_OPENAI_API_KEY", "JUDGE_KEY", "GITHUB_TOKEN", "COMET_API_KEY", "DATABASE_URL",
)  # fmt: skip


@pytest.fixture
def canaries(monkeypatch, tmp_path):
    """The environment of somebody who has every key; gives what is looked for."""
    monkeypatch.chdir(tmp_path)
    for name in VARIABLES:
        monkeypatch.setenv(name, f"sk-{CANARY}-{name}")
    monkeypatch.setenv("https_proxy", f"http://me:{CANARY}@127.0.0.1:9")
    monkeypatch.setenv("DATABASE_URL", f"postgres://me:{CANARY}@db/x")
    return CANARY


_children: list[str] = []


@pytest.fixture
def children():
    """The command lines of all that is started, which every user of a machine can read."""
    if not _children:

        def heard(event, args):
            if event == "subprocess.Popen":
                _children.append(repr(args[1]))

        sys.addaudithook(heard)
    _children[:] = ["watched"]
    return _children


def left(folder: Path) -> list[str]:
    """Every file in which the canary stands, in its bytes or its name."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file() and (CANARY.encode() in path.read_bytes() or CANARY in path.name):
            found.append(str(path.relative_to(folder)))
    return found


def asked(*arguments) -> tuple[int, str]:
    """What a verb says, on both streams, with the traceback where there is one."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    trace = "" if done.exception is None or isinstance(done.exception, SystemExit) else repr(done.exception)
    return done.exit_code, done.output + trace


VERBS = sorted(command.name or command.callback.__name__ for command in app.registered_commands)


def test_the_verbs_are_found():
    assert {"train", "evaluate", "judge", "push", "plan", "validate"} <= set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_says_or_leaves_a_secret_where_it_fails(canaries, children, tmp_path, verb, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *said: (_ for _ in ()).throw(EOFError))
    for arguments in ([verb, "--help"], [verb, "missing"], [verb, "missing", "--json"], [verb, "--none"]):
        _, said = asked(*arguments)
        assert CANARY not in said, arguments
    assert not left(tmp_path)
    assert CANARY not in "".join(children)


class Hub:
    """A Hub that refuses, with the header that it was sent, as some clients say it."""

    def __init__(self, token=None):
        self.token = token

    def create_repo(self, *args, **options):
        raise ValueError(f"bad header: Bearer {self.token or os.environ['HF_TOKEN']}")


@pytest.mark.slow
def test_a_run_from_training_to_upload_leaves_no_secret(
    canaries, children, tmp_path, tiny_model_folder, question_file, monkeypatch, capfd
):
    """Train, evaluate, judge, report, resume and push, each once well and once not, with a stub for the network."""
    said = []
    recipe = {
        "model": {"base": str(tiny_model_folder)}, "output_dir": str(tmp_path / "runs"), "name": "run",
        "data": {"dataset": str(question_file), "max_length": 128},
        "training": {"max_steps": 2, "per_device_train_batch_size": 4, "save_steps": 1, "warmup_steps": 0},
        "evaluation": {"max_new_tokens": 4, "resamples": 100},
    }  # fmt: skip
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    run = tmp_path / "runs" / "run"
    code, text = asked("train", "--config", tmp_path / "recipe.json", "--json")
    assert code == 0, text
    said.append(text)
    for arguments in (("evaluate", run), ("resume", run), ("train", "--config", tmp_path / "recipe.json")):
        said.append(asked(*arguments, "--json")[1])

    def judged(number, body):
        # The server repeats the key that it was sent, in a refusal and in its words.
        return (401, f"the key sk-{CANARY}-JUDGE_KEY is wrong", {})

    with serving(judged) as (url, seen):
        settings = {"model": "m", "base_url": url, "api_key_env": "JUDGE_KEY"}
        (tmp_path / "judge.json").write_text(json.dumps(settings))
        said.append(asked("judge", run, "--judge", tmp_path / "judge.json", "--json")[1])
        assert any(CANARY in str(headers) for *_, headers in seen), "the stub was asked with the key"
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    code, text = asked("push", run, "--hub-model-id", "me/mine", "--json")
    assert code
    said.append(text)
    with pytest.raises(TunesmithError) as error:
        api.push(run, repository="me/mine", token=f"hf_{CANARY}")
    said += [str(error.value), repr(error.value.__cause__)]

    def broken(*args, **options):
        raise KeyError("a bug of ours")

    monkeypatch.setattr("tunesmith.training.fit.fit", broken)
    said.append(asked("train", "--config", tmp_path / "recipe.json", "--name", "other")[1])
    said.append("".join(capfd.readouterr()))
    assert CANARY not in "".join(said)
    assert not left(tmp_path)
    assert CANARY not in "".join(children)


@pytest.mark.parametrize("field", ["data.dataset", "model.base", "evaluation.server.base_url", "name"])
def test_a_recipe_takes_no_password_in_an_address(field):
    layer: dict = {"model": {"base": "tiny"}, "data": {"dataset": "example:chat"}}
    *sections, name = field.split(".")
    at = layer
    for section in sections:
        at = at.setdefault(section, {})
    at[name] = f"https://me:{CANARY}@example.com/x"
    with pytest.raises(RecipeError) as error:
        compose(layer)
    assert CANARY not in str(error.value)
    assert "password" in str(error.value)


def test_a_judge_s_settings_take_no_key(tmp_path):
    from tunesmith.evaluation.judging.settings import load_judge

    path = tmp_path / "judge.yaml"
    for text in (
        f"model: m\napi_key: {CANARY}\n",
        f"model: m\nbase_url: https://me:{CANARY}@example.com/v1\n",
    ):
        path.write_text(text)
        with pytest.raises(RecipeError) as error:
            load_judge(path)
        assert CANARY not in str(error.value)
