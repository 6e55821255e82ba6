"""No secret gets out: canaries in every place that holds one, and then every byte that is left behind is searched.

Verbs are taken from the command line's own list, so that a new one is tested without being named here.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
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


class Taking:
    """A Hub that takes everything, and keeps what it was given."""

    endpoint = "https://hub.example"
    taken: dict[str, bytes] = {}

    def __init__(self, token=None):
        self.token = token

    def create_repo(self, *args, **options):
        assert CANARY in os.environ["HF_TOKEN"], "the client has the token"

    def upload_folder(self, *, folder_path, ignore_patterns, **options):
        from huggingface_hub.utils import filter_repo_objects

        names = [str(p.relative_to(folder_path)) for p in Path(folder_path).rglob("*") if p.is_file()]
        for name in filter_repo_objects(names, ignore_patterns=ignore_patterns):
            self.taken[name] = (Path(folder_path) / name).read_bytes()

    def upload_file(self, *, path_or_fileobj, path_in_repo, **options):
        self.taken[path_in_repo] = path_or_fileobj


def served(*arguments, paths) -> str:
    """What a server says on both streams, in its replies and in the command lines of its processes, from its start to
    SIGTERM, with the canary as its token; it is asked with the token, with another one and with none."""
    secret = f"{CANARY}-{'t' * 30}"
    said = Path("said")
    with said.open("wb") as file:
        started = subprocess.Popen(
            [sys.executable, "-m", "tunesmith", *map(str, arguments), "--port", "0", "--token-env", "SERVED_TOKEN"],
            stdout=file, stderr=file, env={**os.environ, "SERVED_TOKEN": secret, "COLUMNS": "200"},
        )  # fmt: skip
    try:
        until = time.monotonic() + 120
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", said.read_text())):
            assert started.poll() is None, said.read_text()
            assert time.monotonic() < until
            time.sleep(0.1)
        told, codes = [], []
        for token in (secret, "another" * 6, None):
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            with httpx.Client(base_url=found[0], headers=headers, timeout=60) as client:
                for path in paths:
                    reply = client.get(path.replace("TOKEN", token or ""), follow_redirects=True)
                    told.append(reply.text)
                    codes.append(reply.status_code)
                told.append(client.post("/v1/chat/completions", content=b"{").text)
        assert 200 in codes, "the right token was known"
        assert 401 in codes, "another one is not"
        ours = [started.pid, *(child.pid for child in psutil.Process(started.pid).children(recursive=True))]
        told += [Path(f"/proc/{pid}/cmdline").read_text() for pid in ours]
        started.send_signal(signal.SIGTERM)
        started.wait(60)
        return "".join(told) + said.read_text()
    finally:
        if started.poll() is None:
            started.kill()
            started.wait()
        said.unlink()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model_folder):
    """A run with an adapter, trained once in such an environment."""
    folder = tmp_path_factory.mktemp("finished")
    rows = [{"prompt": f"what is the count of {n}", "response": f"it is {n}"} for n in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": {"base": str(tiny_model_folder)}, "output_dir": str(folder / "runs"), "name": "run",
        "adapter": {"kind": "lora", "rank": 2}, "data": {"dataset": str(folder / "rows.jsonl"), "max_length": 128},
        "training": {"max_steps": 2, "per_device_train_batch_size": 4, "warmup_steps": 0},
        "evaluation": {"max_new_tokens": 2, "resamples": 100},
    }  # fmt: skip
    (folder / "recipe.json").write_text(json.dumps(recipe))
    with pytest.MonkeyPatch.context() as patch:
        for name in VARIABLES:
            patch.setenv(name, f"sk-{CANARY}-{name}")
        code, said = asked("train", "--config", folder / "recipe.json", "--json")
    assert code == 0, said
    return folder


WORK = {
    "merge": lambda run: asked("merge", run, "--output", "merged", "--rows", "2", "--json"),
    "export": lambda run: asked("export", run, "--to", "safetensors", "--output", "out", "--rows", "2", "--json"),
    "push": lambda run: asked("push", run, "me/mine", "--json"),
    "sweep": lambda run: asked(
        "sweep", run.parents[1] / "recipe.json", "--space", "training.learning_rate=loguniform(1e-4,1e-2)",
        "--trials", "2", "--compared", "0", "--output-dir", "swept", "--json",
    ),
    "serve": lambda run: (0, served("serve", run, paths=["/v1/models", "/healthz", "/metrics", "/missing"])),
    "web": lambda run: (0, served("web", "--workspace", "w", paths=["/?token=TOKEN", "/", "/missing"])),
}  # fmt: skip


@pytest.mark.thorough
@pytest.mark.parametrize("verb", WORK)
def test_no_verb_says_or_leaves_a_secret_where_it_does_its_work(
    canaries, children, finished, tmp_path, monkeypatch, capfd, verb
):
    """To its end: what it says, what it writes anywhere, the run's folder, what is sent, and all command lines."""
    monkeypatch.setattr("huggingface_hub.HfApi", Taking)
    Taking.taken.clear()
    code, said = WORK[verb](finished / "runs" / "run")
    assert code == 0, said
    assert CANARY not in said + "".join(capfd.readouterr())
    assert not left(tmp_path)
    assert not left(finished)
    assert CANARY not in "".join(children)
    assert CANARY.encode() not in b"".join(Taking.taken.values())
    assert (verb == "push") == bool(Taking.taken)


@pytest.mark.thorough
def test_a_leak_would_be_found(canaries, children, tmp_path):
    """The control: the search finds a secret that was written, in a name, and on a command line."""
    (tmp_path / f"a-{CANARY}").write_text("")
    (tmp_path / "b").write_bytes(b"\0" + CANARY.encode())
    subprocess.run([sys.executable, "-c", "", CANARY], check=True)
    assert sorted(left(tmp_path)) == [f"a-{CANARY}", "b"]
    assert CANARY in "".join(children)


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
