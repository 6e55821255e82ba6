"""`prepare-deployment`: what is in the folder, that it runs elsewhere, and what the smoke test sees."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
import venv
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import taught
import yaml

pytest.importorskip("fastapi")

import itertools

from dockerfile_parse import DockerfileParser
from typer.main import get_command
from typer.testing import CliRunner

from tunesmith import api
from tunesmith.cli import app
from tunesmith.compose import compose
from tunesmith.data.examples import Message, Prompt, Row
from tunesmith.errors import ModelError, TunesmithError
from tunesmith.export import deployment, parity, wheel
from tunesmith.serving import demo, smoke_test
from tunesmith.serving.limits import Limits
from tunesmith.serving.server import Where, running
from tunesmith.training.lineage import CARRIED

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "a-token-of-tests-1234"


@pytest.fixture(scope="module")
def model(taught_model, tmp_path_factory) -> Path:
    folder = shutil.copytree(taught_model, tmp_path_factory.mktemp("deployed") / "mine")
    (folder / CARRIED).write_text(json.dumps({"run": "x"}))
    return folder


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    """A folder with everything, made once."""
    return api.prepare_deployment(
        model, output_dir=tmp_path_factory.mktemp("out") / "mine-deployed", space=True
    )


@contextmanager
def serving(folder: Path, name: str = "mine"):
    with running(str(folder), {name: folder}, Where(port=0, token=TOKEN), Limits()) as (url, _):
        yield url


def smoke(folder: Path, url: str, *flags: str, token: str = TOKEN) -> tuple[int, dict]:
    done = subprocess.run(
        [sys.executable, "-I", folder / "smoke_test.py", "--url", url, "--json", "--wait", "5", *flags],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], "TUNESMITH_TOKEN": token},
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def failed(found: dict) -> list[str]:
    return [check["check"] for check in found["checks"] if not check["passed"]]


def test_the_folder_is_whole_and_proven(made, model):
    assert made.passed
    assert made.folder.name == "mine-deployed"
    names = {path.relative_to(made.folder).as_posix() for path in made.folder.rglob("*") if path.is_file()}
    assert {
        "README.md", "manifest.json", "requirements.txt", "requirements-demo.txt", "Dockerfile", "compose.yaml",
        "start.sh", "demo.py", "smoke_test.py", "app.py", "parity.json", ".dockerignore",
        "model/model.safetensors", "model/config.json", "model/tokenizer.json", "model/chat_template.jinja",
        "model/generation_config.json", "model/README.md", f"wheels/tunesmith-{wheel.version()}-py3-none-any.whl",
    } <= names  # fmt: skip
    assert {"model/learned.json", "model/merge.json"} & names == set(), (
        "what says who learned what stays here"
    )
    manifest = json.loads((made.folder / "manifest.json").read_text())
    assert set(manifest["files"]) == names - {"manifest.json"}
    for name, facts in manifest["files"].items():
        content = (made.folder / name).read_bytes()
        assert facts == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert manifest["name"] == made.name == "mine"
    assert [probe["answer"] for probe in manifest["probes"]] == [taught.ANSWER] * 4
    assert all(probe["sure"] == taught.ANSWER for probe in manifest["probes"])
    assert made.files == len(names)
    modes = {(made.folder / name).stat().st_mode & 0o666 for name in names}
    assert len(modes) == 1, "weights are as open as the files beside them"
    text = "".join(
        (made.folder / n).read_text()
        for n in names
        if not n.endswith((".safetensors", ".whl", "tokenizer.json"))
    )
    assert str(model.parent) not in text, "no folder of this machine is in it"


def test_the_served_endpoint_has_its_verdict(made):
    """Prompts read over HTTP as in training, and the same greedy answers."""
    assert made.served.prompts == made.served.same_prompts == 4
    assert made.served.check.same_answers == 4
    assert made.served.check.new_tokens > 0
    assert "over HTTP" in made.served.read_by
    kept = json.loads((made.folder / "parity.json").read_text())
    assert kept["passed"] is True
    assert kept["artefact"] == "served endpoint"


def test_a_server_of_another_model_fails_the_verdict(model, tiny_model_folder, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tunesmith.export.merge import shipped_questions

    own, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    held = parity.Held(
        shipped_questions(tokenizer, own, is_pair=False), 8, lambda numbers, a, b: (None, "not scored")
    )
    monkeypatch.setenv("OF_TESTS", TOKEN)
    with serving(tiny_model_folder) as url:
        reader = parity.server_reader(url, "mine", tokenizer, api_key_env="OF_TESTS", length=512)
        found = parity.verdict(own, tokenizer, reader, held, artefact="served", quant="float32")
        wrong = parity.server_reader(url, "yours", tokenizer, api_key_env="OF_TESTS")
        with pytest.raises(ModelError, match="gives no answer as 'yours'"):
            wrong.tokens(held.questions[0])
    assert found.same_prompts == 4
    assert not found.passed
    assert found.check.same_answers == 0


def test_questions_that_offer_tools_are_left_out_and_counted(model, monkeypatch):
    from dataclasses import replace

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tunesmith.export.merge import shipped_questions

    own, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    first, *others = shipped_questions(tokenizer, own, is_pair=False)
    tool = {"type": "function", "function": {"name": "count", "parameters": {}}}
    offering = replace(first, prompt=replace(first.prompt, tools=(tool,)))
    held = parity.Held([offering, *others], 4, lambda numbers, a, b: (None, f"not scored: {numbers}"))
    monkeypatch.setenv("OF_TESTS", TOKEN)
    with serving(model) as url:
        reader = parity.server_reader(url, "mine", tokenizer, api_key_env="OF_TESTS")
        found = parity.verdict(own, tokenizer, reader, held, artefact="served", quant="float32")
        with pytest.raises(ModelError, match="offer tools"):
            parity.verdict(
                own,
                tokenizer,
                reader,
                replace(held, questions=[offering]),
                artefact="served",
                quant="float32",
            )
    assert found.passed
    assert (found.prompts, found.with_tools) == (3, 1)
    assert found.unscored == "not scored: [1, 2, 3]"
    assert "1 more offer tools" in found.sentences()[0]


def test_a_template_that_the_server_writes_otherwise_shows(model, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tunesmith.export.merge import shipped_questions

    other = tmp_path / "other"
    shutil.copytree(model, other)
    file = other / "chat_template.jinja"
    file.write_text(
        file.read_text().replace("assistant\\n", "assistant\\n\\n").replace("assistant\n", "assistant\n\n")
    )
    own, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    held = parity.Held(
        shipped_questions(tokenizer, own, is_pair=False), 4, lambda numbers, a, b: (None, "not scored")
    )
    monkeypatch.setenv("OF_TESTS", TOKEN)
    with serving(other) as url:
        reader = parity.server_reader(url, "mine", tokenizer, api_key_env="OF_TESTS")
        found = parity.verdict(own, tokenizer, reader, held, artefact="served", quant="float32")
    assert found.same_prompts == 0
    assert found.check.same_answers == 4, "from the same ids it answers the same"
    assert "4 of 4 prompts are read as other tokens" in found.problems()[0]


def test_test_model_asks_the_server_too(model, tiny_model_folder, monkeypatch):
    monkeypatch.setenv("OF_TESTS", TOKEN)
    with serving(model) as url:
        result = CliRunner().invoke(
            app,
            ["test-model", str(model), "--task", "instruct", "--rows", "4", "--max-new-tokens", "8", "--url", url,
             "--served-as", "mine", "--api-key-env", "OF_TESTS", "--json"],
        )  # fmt: skip
    found = json.loads(result.stdout.strip().splitlines()[-1])
    served = [f for f in found["findings"] if f["check"] == "served"]
    assert result.exit_code == 0, found["findings"]
    assert served[0]["passed"]
    assert found["served"]["same_prompts"] == 4


def test_test_model_asks_a_deployment_s_server_by_its_name_and_what_it_was_asked_itself(made, monkeypatch):
    monkeypatch.setenv("OF_TESTS", TOKEN)
    options = {"task": "code", "rows": 2, "max_new_tokens": 3, "api_key_env": "OF_TESTS"}
    with serving(made.folder / "model") as url:
        found = api.try_model(made.folder, url=url, **options)
        assert found.findings[-1].passed, found.findings[-1]
        assert found.served["artefact"] == "served endpoint 'mine'"
        assert found.served["prompts"] == 2
        assert "which ship for the task 'code'" in found.served["unscored"]
        assert found.served["check"]["new_tokens"] <= 6
        found = api.try_model(made.folder, url=url, served_as="yours", **options)
    assert found.findings[0].passed
    assert not found.findings[-1].passed
    assert "gives no answer as 'yours'" in found.findings[-1].said
    with pytest.raises(TunesmithError, match="is none"):
        api.try_model("no-such-model", url="nowhere")


def test_the_smoke_test_passes_where_the_model_is_served(made):
    with serving(made.folder / "model") as url:
        code, found = smoke(made.folder, url)
        assert code == 0, found
        said = {check["check"]: check["said"] for check in found["checks"]}
        assert list(said) == ["files", "server", "name", "token", "answers", "stream"]
        characters = 4 * len(taught.ANSWER)
        assert said["answers"] == (
            f"4 questions are answered, 4 ended by themselves; {characters} characters are as they were, 4 answers the "
            "very same"
        )
        assert smoke(made.folder, url, "--alive", token="")[0] == 0, "health needs no token"
        assert smoke(made.folder, "http://127.0.0.1:9/v1", "--alive")[0] == 1
        code, found = smoke(made.folder, url, "--no-files", token="another-token-of-tests")
        assert code == 1
        assert failed(found) == ["server"]
        said = smoke(made.folder, url, "--no-files", token="")[1]["checks"][0]["said"]
        assert said.startswith("TUNESMITH_TOKEN is not set")


def test_the_smoke_test_finds_what_is_wrong(made, tiny_model_folder, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(made.folder, folder)
    with (folder / "model/model.safetensors").open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"\x07")
    with serving(tiny_model_folder) as url:
        code, found = smoke(folder, url)
    assert code == 1
    assert failed(found) == ["files", "answers"]
    assert "model/model.safetensors is not the file that was packed" in found["checks"][0]["said"]
    with serving(made.folder / "model", name="yours") as url:
        code, found = smoke(made.folder, url, "--no-files")
    assert code == 1
    assert "name" in failed(found)
    (folder / "manifest.json").write_text('{"files": {}}')
    with serving(made.folder / "model") as url:
        code, found = smoke(folder, url)
    assert code == 1
    assert "KeyError('name')" in found["checks"][2]["said"]
    with pytest.raises(ModelError, match="damaged"):
        api.try_model(folder)
    (folder / "manifest.json").unlink()
    code, found = smoke(folder, "http://127.0.0.1:9/v1")
    assert code == 1
    assert failed(found) == ["manifest"]
    code, found = smoke(made.folder, "http://127.0.0.1:9/v1", "--wait", "0")
    assert code == 1
    assert failed(found) == ["server"]


def test_the_smoke_test_says_that_it_waits(capsys):
    with pytest.raises(smoke_test.Failed, match="nobody answers"):
        smoke_test.Asker("http://127.0.0.1:9/v1", None).wait(0.3, print)
    assert (
        capsys.readouterr().out
        == "http://127.0.0.1:9/v1 does not answer yet; it is waited for, up to 0.3 s\n"
    )
    with pytest.raises(SystemExit):
        smoke_test.main(["--help"])
    assert "(default: 120)" in " ".join(capsys.readouterr().out.split())


def test_without_answers_the_smoke_test_wants_one_and_says_that_it_proves_none(made, tmp_path):
    folder = shutil.copytree(made.folder, tmp_path / "copy")
    manifest = json.loads((folder / "manifest.json").read_text())
    for probe in manifest["probes"]:
        probe |= {"answer": None, "sure": None}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with serving(made.folder / "model") as url:
        code, found = smoke(folder, url, "--no-files")
    assert code == 0, found
    assert "not proven" in next(one["said"] for one in found["checks"] if one["check"] == "answers")

    class Silent:
        def ask(self, path, body):
            [read] = {p["prompt_tokens"] for p in manifest["probes"] if p["messages"] == body["messages"]}
            choice = {"message": {"content": " "}, "finish_reason": "stop"}
            return {"choices": [choice], "usage": {"prompt_tokens": read}}

    with pytest.raises(smoke_test.Failed, match="answered with nothing"):
        smoke_test.check_answers(Silent(), manifest)


def test_the_wheel_is_one(made, tmp_path):
    """Each file as the installed package has it and as RECORD says; the same package gives the same bytes."""
    [file] = (made.folder / "wheels").iterdir()
    assert wheel.write(tmp_path).read_bytes() == file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        info = f"tunesmith-{wheel.version()}.dist-info"
        rows = list(csv.reader(io.StringIO(archive.read(f"{info}/RECORD").decode())))
        assert [row[0] for row in rows] == names
        for name, digest, size in rows[:-1]:
            content = archive.read(name)
            found = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            assert (digest, int(size)) == (f"sha256={found}", len(content))
            if not name.startswith(info):
                assert content == (ROOT / "src" / name).read_bytes()
        assert "tunesmith/serving/app.py" in names
        assert not [n for n in names if "__pycache__" in n or n.endswith(".safetensors")]
        assert b"tunesmith.cli:main" in archive.read(f"{info}/entry_points.txt")
        assert f"Version: {wheel.version()}" in archive.read(f"{info}/METADATA").decode()


def test_the_pins_are_what_is_installed_and_what_that_needs():
    from importlib import metadata

    pins = dict(line.split("==") for line in wheel.pins())
    assert pins["torch"] == metadata.version("torch").partition("+")[0]
    assert pins["transformers"] == metadata.version("transformers")
    assert {"starlette", "huggingface_hub", "tokenizers", "MarkupSafe"} <= set(pins)
    assert {"trl", "datasets", "peft", "scipy", "pytest"} & set(pins) == set(), (
        "the server needs none of these"
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    own = {re.match(r"[\w-]+", line)[0].lower() for line in project["dependencies"]}
    own |= {re.match(r"[\w-]+", line)[0].lower() for line in project["optional-dependencies"]["serve"]}
    assert {name.lower() for name in wheel.SERVING} <= own, "what the server needs is declared"


def test_the_containers_serve_it_for_a_user_without_rights(made):
    parser = DockerfileParser(
        fileobj=io.BytesIO((made.folder / "Dockerfile").read_bytes()), env_replace=False
    )
    stages: list[list[tuple[str, str]]] = []
    for step in parser.structure:
        if step["instruction"] == "FROM":
            stages.append([])
        if step["instruction"] != "COMMENT":
            stages[-1].append((step["instruction"], step["value"]))
    names = [stage[0][1].split(" AS ")[1] for stage in stages]
    assert names == ["server", "demo", "space"]
    for stage in stages:
        users = [value for name, value in stage if name == "USER"]
        assert users[-1] == "tunesmith"
        for _, value in (step for step in stage if step[0] == "COPY"):
            *sources, _ = (word for word in value.split() if not word.startswith("--"))
            for source in sources:
                assert (made.folder / source).exists(), source
            is_read_by_user = not {"requirements.txt", "requirements-demo.txt", "wheels"} & set(sources)
            assert value.startswith("--chown=tunesmith ") is is_read_by_user, value
    server = dict(stages[0])
    command = json.loads(server["CMD"])
    assert command[:5] == ["tunesmith", "serve", "model", "--name", "mine"]
    assert command[command.index("--token-env") + 1] == "TUNESMITH_TOKEN"
    parsed = yaml.safe_load((made.folder / "compose.yaml").read_text())["services"]
    assert set(parsed) == {"cpu", "vllm", "demo"}
    assert all(port.startswith("127.0.0.1:") for one in parsed.values() for port in one["ports"])
    assert parsed["cpu"]["environment"]["TUNESMITH_ALLOWED_HOSTS"] == "${TUNESMITH_ALLOWED_HOSTS:-}"
    assert server["HEALTHCHECK"].endswith(json.dumps(parsed["cpu"]["healthcheck"]["test"][1:]))
    for one in parsed.values():
        [kind, python, *_] = one["healthcheck"]["test"]
        assert (kind, python.rstrip("3")) == ("CMD", "python"), "what all of the images have"
    vllm = parsed["vllm"]
    assert vllm["command"][:4] == ["--model", "/model", "--served-model-name", "mine"]
    assert vllm["volumes"] == ["./model:/model:ro"]
    assert "TUNESMITH_TOKEN:?" in vllm["environment"]["VLLM_API_KEY"]
    assert re.fullmatch(r"vllm/vllm-openai:v\d+\.\d+\.\d+", vllm["image"])


def parsed(words: list[str]) -> dict:
    """Options of `tunesmith serve` as its own parser reads them; it ends for one that there is not."""
    assert words[:2] == ["tunesmith", "serve"]
    return get_command(app).commands["serve"].make_context("serve", words[2:]).params


def test_the_container_s_command_is_one_of_ours(made):
    text = (made.folder / "Dockerfile").read_text()
    [command] = [json.loads(line.removeprefix("CMD ")) for line in text.splitlines() if '"serve"' in line]
    given = parsed(command)
    assert (given["model"], given["name"], given["host"]) == ("model", "mine", "0.0.0.0")
    assert given["token_env"] == "TUNESMITH_TOKEN"
    assert given["allowed_host"] == ["server"], "as the page in the other container calls it"
    assert given["engine"] == "transformers"


def ready(folder: Path) -> None:
    """Say as start.sh does that .venv is of this folder."""
    [file] = (folder / "wheels").iterdir()
    sums = subprocess.run(
        ["cksum", "requirements.txt", f"wheels/{file.name}"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    (folder / ".venv/.ready").write_text(f"{folder} {sums.stdout}")


def test_start_sh_gives_the_token_by_its_name_and_passes_options_on(made, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(made.folder, folder)
    (folder / ".venv/bin").mkdir(parents=True)
    ready(folder)
    stub = folder / ".venv/bin/python"
    stub.write_text('#!/bin/sh\npwd\n[ "$1 $2" = "-m tunesmith" ] || exit 3\nshift 2\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)

    def words(**environment: str) -> list[str]:
        done = subprocess.run(
            [folder / "start.sh", "--port", "8001"], cwd=tmp_path, env={"PATH": "/usr/bin:/bin", **environment},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        where, *given = done.stdout.splitlines()
        assert Path(where) == folder
        return given

    given = parsed(["tunesmith", *words(TUNESMITH_TOKEN=TOKEN)])
    assert (given["model"], given["name"], given["port"]) == ("model", "mine", 8001)
    assert given["token_env"] == "TUNESMITH_TOKEN"
    assert TOKEN not in words(TUNESMITH_TOKEN=TOKEN), "every user of a machine can read commands"
    assert parsed(["tunesmith", *words()])["token_env"] is None
    requirements = folder / "requirements.txt"
    requirements.write_text(requirements.read_text() + "\n")
    with pytest.raises(subprocess.CalledProcessError):
        words(PYTHON="false")  # another version, which is installed anew


def test_start_sh_is_a_script(made):
    assert os.access(made.folder / "start.sh", os.X_OK)
    assert subprocess.run(["sh", "-n", made.folder / "start.sh"]).returncode == 0


def is_understood(command: str) -> bool:
    """Whether `hf` has a command with its options: with --help it does nothing, and refuses what it does not know."""
    from click.testing import CliRunner as Runner
    from huggingface_hub.cli.hf import app as hf

    return Runner().invoke(hf, [*shlex.split(command)[1:], "--help"]).exit_code == 0


def test_the_space_says_how_it_is_built(made):
    _, front, text = (made.folder / "README.md").read_text().split("---\n", 2)
    said = yaml.safe_load(front)
    assert said["sdk"] == "docker"
    assert said["app_port"] == 7860
    assert "server_port=7860" in (made.folder / "app.py").read_text()
    commands = re.findall(r"^\$ (hf .*)$", text, re.MULTILINE)
    assert [is_understood(command) for command in commands] == [True, True]
    assert not is_understood("hf upload OWNER/x . --repo-kind space")
    assert "Proven" in text


def test_other_servers_stop_and_draw_as_it_was_measured(made):
    settings = json.loads((made.folder / "model/generation_config.json").read_text())
    assert "do_sample" not in settings
    assert "top_k" not in settings
    assert settings["eos_token_id"]
    assert made.vllm is None, "so that vLLM answers as measured"
    assert [note.partition(",")[0] for note in made.notes] == ["what was trained on is not here"]


def test_what_draws_otherwise_is_taken_out_and_said(tmp_path):
    """Of a base that was merged in memory generation_config.json comes along."""
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"do_sample": True, "top_k": 5, "pad_token_id": 1, "eos_token_id": 7}))
    [note] = deployment._settled(tmp_path, (2, 3))
    assert "lost do_sample, top_k" in note
    assert json.loads(file.read_text()) == {"pad_token_id": 1, "eos_token_id": [2, 3]}


def test_without_a_space_there_is_none_and_a_folder_that_is_not_asked_is_unproven(model, tmp_path):
    from tunesmith.evaluation.report import shipped
    from tunesmith.training.run import Run

    result = CliRunner().invoke(
        app,
        ["prepare-deployment", "--model-path", str(model), "--output-dir", str(tmp_path / "d"), "--check", "files",
         "--name", "support", "--json"],
    )  # fmt: skip
    found = json.loads(result.stdout.strip().splitlines()[-1])
    assert result.exit_code == 0, found
    kept = json.loads((tmp_path / "d/parity.json").read_text())
    for facts in (found, found["served"], kept):
        assert facts["passed"] is None
        assert "not asked over HTTP: as asked for" in facts["unproven"]
    assert found["merged"]["passed"] is True
    assert [one["passed"] for one in shipped(Run(tmp_path), [])] == ["unproven"]
    assert any("unproven: it was not asked over HTTP" in note for note in found["notes"])
    assert "not asked as a whole" in (tmp_path / "d/README.md").read_text()
    assert not (tmp_path / "d/app.py").exists()
    assert not (tmp_path / "d/README.md").read_text().startswith("---")
    assert "AS space" not in (tmp_path / "d/Dockerfile").read_text()
    probes = json.loads((tmp_path / "d/manifest.json").read_text())["probes"]
    assert all(p["answer"] is None and p["prompt_tokens"] > 4 for p in probes)


def test_what_cannot_be_deployed_is_refused_and_leaves_nothing(model, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/x").write_text("x")
    with pytest.raises(TunesmithError, match=r"(?s)not empty.*--output-dir"):
        api.prepare_deployment(model, output_dir=tmp_path / "taken")
    with pytest.raises(TunesmithError, match="no name for a model"):
        api.prepare_deployment(model, output_dir=tmp_path / "d", name="my model")
    with pytest.raises(TunesmithError, match="no page 'sqll'"):
        api.prepare_deployment(model, output_dir=tmp_path / "d", demo="sqll")
    with pytest.raises(TunesmithError, match="not stored as 'int3'"):
        api.prepare_deployment(model, output_dir=tmp_path / "d", dtype="int3")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_verdict_that_is_bad_marks_the_folder(model, tmp_path, monkeypatch):
    """A server that stops elsewhere than the model was trained to is found out before the folder is handed out."""
    from tunesmith.serving import models as served_models

    monkeypatch.setattr(served_models.templates, "end_of_turn_ids", lambda tokenizer: ())
    result = CliRunner().invoke(app, ["prepare-deployment", str(model), "--output-dir", str(tmp_path / "d")])
    assert result.exit_code == 1
    assert "weights   passed\n" in result.output
    assert "served    FAILED: " in result.output
    assert "start.sh" not in result.output
    assert json.loads((tmp_path / "d.failed/parity.json").read_text())["passed"] is False
    assert not (tmp_path / "d").exists()


def test_what_is_found_in_the_folder_fails_it(model, tmp_path):
    """A secret, and a text that was trained on, which only the manifest has."""
    folder = shutil.copytree(model, tmp_path / "mine")
    template = folder / "chat_template.jinja"
    template.write_text("{# hf_" + "a1" * 15 + " #}" + template.read_text())
    options = {"output_dir": tmp_path / "d", "check": "files"}
    found = api.prepare_deployment(folder, **options)
    assert not found.passed
    assert found.folder == tmp_path / "d.failed"
    assert "a Hugging Face token" in found.findings[0]
    assert found.as_dict()["exit_code"] == 1
    assert api.prepare_deployment(folder, **options, despite=True).folder == tmp_path / "d"


def test_the_manifest_is_looked_through_for_rows(tmp_path):
    row = "a row that was trained on, which is rather long\nwith two lines"
    facts = {"demo": {"form": {"system": "You write SQL for a database, and nothing else.", "user": row}}}
    (tmp_path / "manifest.json").write_text(json.dumps(facts))
    trained = [row, facts["demo"]["form"]["system"]]
    findings, notes = deployment._findings(tmp_path, trained, facts["demo"])
    assert findings == ["manifest.json: 1 text that the model was trained on"]
    assert "system text of the rows" in notes[0]


# The page.


def prompt(system: str | None, user: str, **checks: str) -> Prompt:
    turns = [Message("system", system)] if system is not None else []
    return Prompt((*turns, Message("user", user)), "SELECT 1", Row("x", 1), checks=checks)


TABLES = "CREATE TABLE a (x TEXT, y VARCHAR(20));\nCREATE TABLE b (z INT);"
OTHER = "create table c (k decimal(3, 2))"


@pytest.mark.parametrize(
    ("prompts", "form"),
    [
        ([prompt(None, f"{TABLES}\n\nHow many a?"), prompt(None, f"{OTHER}\n\nHow much?")],
         {"user": "{schema}\n\n{question}"}),
        ([prompt(None, f"{s}\n\nHow {q}?", schema=s) for s, q in ((TABLES, "many"), (OTHER, "much"))],
         {"user": "{schema}\n\n{question}"}),
        ([prompt(f"Write SQL.\nSCHEMA:\n{TABLES}", "How many a?"), prompt(f"Write SQL.\nSCHEMA:\n{OTHER}", "And c?")],
         {"system": "Write SQL.\nSCHEMA:\n{schema}", "user": "{question}"}),
        ([prompt("SQL only", f"Tables:\n{s}\nQuestion:\n{q}\nSQL:") for s, q in ((TABLES, "How?"), (OTHER, "Why?"))],
         {"system": "SQL only", "user": "Tables:\n{schema}\nQuestion:\n{question}\nSQL:"}),
        ([prompt(None, "Hello"), prompt(None, "How are you?")], None),
        ([prompt(None, f"A {TABLES}\nx?"), prompt(None, f"B {OTHER}\ny?")], None),
        ([], None),
        ([prompt("SQL only", f"{TABLES}\nQuestion:\nHow many?\nSQL:")], None),
    ],
    ids=["one after the other", "a column", "in the system turn", "labelled", "a chat", "in two ways", "nothing",
         "one row"],
)  # fmt: skip
def test_the_page_puts_a_schema_as_the_rows_do(prompts, form):
    assert deployment.form_of(prompts)[0] == form


def test_a_chat_begins_as_all_rows_do():
    def made_of(*prompts):
        asked = [parity.Question((1,), "", one) for one in prompts]
        return deployment._demo(parity.Held(asked, 8, lambda numbers, own, others: (None, "")), "auto")

    assert made_of(prompt("Be kind.", "a"), prompt("Be kind.", "b"))["system"] == "Be kind."
    differing = made_of(prompt("Be kind.", "a"), prompt(None, "b"))
    assert "system" not in differing
    assert "different system texts" in differing["notes"][0]


def test_a_question_about_a_schema_is_put_in_its_places():
    form = {"system": "Tables: {schema}!", "user": "{question} ({schema})"}
    assert demo.sql_messages(form, " CREATE {question} ", " how {schema}? ") == [
        {"role": "system", "content": "Tables: CREATE {question}!"},
        {"role": "user", "content": "how {schema}? (CREATE {question})"},
    ]


def test_the_page_s_client_streams_and_says_what_is_wrong(made):
    with serving(made.folder / "model") as url:
        asked = [{"role": "user", "content": "what is the count of 3"}]
        pieces = list(demo.Server(url, "mine", TOKEN).answer(asked))
        assert pieces[-1] == taught.ANSWER
        assert all(b.startswith(a) for a, b in itertools.pairwise(pieces))
        with pytest.raises(RuntimeError, match="A token is missing or wrong"):
            list(demo.Server(url, "mine", "wrong").answer(asked))
        with pytest.raises(RuntimeError, match="There is no model 'yours'"):
            list(demo.Server(url, "yours", TOKEN).answer(asked))
    with pytest.raises(RuntimeError, match="does not answer"):
        list(demo.Server(url, "mine", TOKEN, seconds=2).answer(asked))


def test_a_history_of_gradio_is_read():
    history = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "metadata": None},
    ]
    assert demo.turns(history) == [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]


def call(url: str, name: str, *values) -> str:
    """What a page's function gives, asked over gradio's own HTTP interface."""
    body = json.dumps({"data": values}).encode()
    request = urllib.request.Request(
        f"{url}/gradio_api/call/{name}", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as reply:
        event = json.load(reply)["event_id"]
    with urllib.request.urlopen(f"{url}/gradio_api/call/{name}/{event}", timeout=60) as reply:
        lines = reply.read().decode().splitlines()
    kinds = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    found = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert kinds[-1] == "complete", lines
    return found[-1][0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sql", "chat"])
def test_the_page_asks_the_served_model(made, kind):
    pytest.importorskip("gradio")
    manifest = json.loads((made.folder / "manifest.json").read_text())
    manifest["demo"] = {"kind": kind, "form": deployment.SQL_FORM, "about": "Ask."}
    with serving(made.folder / "model") as url:
        blocks = demo.build(manifest, demo.Server(url, "mine", TOKEN))
        _, address, _ = blocks.launch(prevent_thread_lock=True, quiet=True, share=False)
        try:
            assert "127.0.0.1" in address
            given = (demo.SCHEMA, "what is the count of 3") if kind == "sql" else ("what is the count of 3",)
            assert (
                call(address.rstrip("/"), "text_to_sql" if kind == "sql" else "chat", *given) == taught.ANSWER
            )
            labels = [c["props"].get("label") for c in blocks.config["components"]]
            assert ("Schema" in labels) is (kind == "sql")
        finally:
            blocks.close()


# Elsewhere.

HIDDEN = """
import sys
class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {names!r} else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
"""


def start(command: list, folder: Path, **environment: str) -> tuple[subprocess.Popen, str]:
    """Start a server and wait for its address."""
    kept = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TUNESMITH_CACHE")
    }
    server = subprocess.Popen(
        [str(word) for word in command], cwd=folder, stderr=subprocess.PIPE, text=True,
        env={**kept, "TUNESMITH_TOKEN": TOKEN, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    said = []
    for line in server.stderr:
        said.append(line)
        if match := re.search(r"Serving at (\S+)", line):
            return server, match[1]
    server.wait()
    raise AssertionError("".join(said))


@pytest.mark.slow
def test_the_server_needs_only_what_is_pinned(made, tmp_path):
    """`tunesmith serve` from the wheel, with every package out of reach that requirements.txt does not name."""
    from importlib import metadata

    pinned = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in wheel.pins()}
    pinned |= {
        re.sub(r"[-_.]+", "-", d.name).lower()
        for d in metadata.distributions()
        if d.name.startswith(wheel.OF_TORCH)
    }
    modules = metadata.packages_distributions()
    hidden = {
        module
        for module, owners in modules.items()
        if not {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners}
        & {*pinned, "tunesmith", "pip", "setuptools"}
    }
    assert {"trl", "peft", "datasets", "scipy", "pandas"} <= hidden
    with zipfile.ZipFile(next((made.folder / "wheels").iterdir())) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "site/sitecustomize.py").write_text(HIDDEN.format(names=hidden))
    server, url = start(
        [sys.executable, "-m", "tunesmith", "serve", "model", "--name", "mine", "--port", "0", "--token-env",
         "TUNESMITH_TOKEN", "--engine", "transformers"],
        made.folder,
        PYTHONPATH=str(tmp_path / "site"),
    )  # fmt: skip
    try:
        code, found = smoke(made.folder, url)
        assert code == 0, found
    finally:
        server.terminate()
        server.wait(20)


@pytest.mark.thorough
def test_it_installs_into_a_virtual_environment_of_its_own(made, tmp_path, monkeypatch):
    """start.sh as it stands. Without a package index the pinned packages are lent from this environment; with
    TUNESMITH_PROVE_DEPLOYMENT=1 they are installed from the index, which takes minutes."""
    folder = tmp_path / "elsewhere"
    shutil.copytree(made.folder, folder)
    if "TUNESMITH_PROVE_DEPLOYMENT" not in os.environ:
        venv.create(folder / ".venv", with_pip=True)
        version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        lent = folder / ".venv/lib" / version / "site-packages/lent.pth"
        lent.write_text(next(p for p in sys.path if p.endswith("site-packages")) + "\n")
        pip = [
            folder / ".venv/bin/pip",
            "install",
            "--quiet",
            "--no-index",
            "--no-deps",
            *(folder / "wheels").iterdir(),
        ]
        subprocess.run(pip, check=True)
        ready(folder)
    monkeypatch.delenv("PYTHONPATH", raising=False)  # or the sources would be what is proven
    server, url = start(
        ["./start.sh", "--port", "0", "--engine", "transformers"],
        folder,
        HOME=str(tmp_path),
        TUNESMITH_ALLOWED_HOSTS="models.example.org",
    )
    try:
        code, found = smoke(folder, url)
        assert code == 0, found
        place = url.removesuffix("/v1") + "/health"
        named = urllib.request.Request(place, headers={"Host": "models.example.org"})
        assert urllib.request.urlopen(named).status == 200
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(urllib.request.Request(place, headers={"Host": "other.example.org"}))
        where = subprocess.run(
            [folder / ".venv/bin/python", "-c", "import tunesmith; print(tunesmith.__file__)"],
            capture_output=True, text=True, cwd="/", check=True,
        )  # fmt: skip
        assert where.stdout.startswith(str(folder / ".venv"))
        if "TUNESMITH_PROVE_DEPLOYMENT" in os.environ:
            the_page_installs_and_asks(folder, url)
    finally:
        server.terminate()
        server.wait(20)


def free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    for one in held:
        one.bind(("127.0.0.1", 0))
    found = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return found


def asked_until_it_answers(page: subprocess.Popen, port: int) -> str:
    """What the page at a port says to a question, as soon as it is there."""
    until = time.monotonic() + 120
    while True:
        try:
            return call(f"http://127.0.0.1:{port}", "chat", "what is the count of 3")
        except OSError:
            assert page.poll() is None
            assert time.monotonic() < until
            time.sleep(0.5)


def the_page_installs_and_asks(folder: Path, url: str) -> None:
    """The page beside the server in its environment, as README.md says, and what pip says of all that is there."""
    pip = folder / ".venv/bin/pip"
    words = [pip, "install", "--quiet", "-r", "requirements-demo.txt", "-c", "requirements.txt"]
    subprocess.run(words, cwd=folder, check=True)
    said = subprocess.run([pip, "check"], capture_output=True, text=True).stdout.splitlines()
    # tunesmith itself is installed without what training needs.
    assert [line for line in said if not line.startswith(("tunesmith ", "No broken"))] == []
    [port] = free_ports(1)
    page = subprocess.Popen(
        [folder / ".venv/bin/python", "demo.py"], cwd=folder,
        env={**os.environ, "TUNESMITH_URL": url, "TUNESMITH_TOKEN": TOKEN, "GRADIO_SERVER_PORT": str(port)},
    )  # fmt: skip
    try:
        assert asked_until_it_answers(page, port) == taught.ANSWER
    finally:
        page.terminate()
        page.wait(20)


@pytest.mark.thorough
def test_the_space_starts_server_and_page(made, tmp_path):
    """app.py of the folder: the server for itself, the page for everybody, one answer through both."""
    pytest.importorskip("gradio")
    inner, outer = free_ports(2)
    code = f"import app; app.main(server_name='127.0.0.1', server_port={outer})"
    started = subprocess.Popen(
        [sys.executable, "-c", code], cwd=made.folder,
        env={**os.environ, "TUNESMITH_PORT": str(inner), "PYTHONPATH": f"{ROOT / 'src'}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        assert asked_until_it_answers(started, outer) == taught.ANSWER
    finally:
        started.terminate()
        started.wait(40)
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{inner}/health", timeout=2)


@pytest.mark.slow
def test_a_run_becomes_a_folder_with_its_own_form_and_scores(tiny_model_folder, tmp_path):
    """From an adapter that learned text-to-SQL to a page with a schema; the report tells of the served endpoint."""
    run = api.train(
        compose(
            {
                "output_dir": str(tmp_path / "runs"), "name": "sql", "model": {"base": str(tiny_model_folder)},
                "data": {"dataset": "example:sql", "max_rows": 60, "max_length": 500, "held_out": 0.3},
                "adapter": {"kind": "lora"},
                "training": {"max_steps": 3, "per_device_train_batch_size": 4, "warmup_steps": 0},
                "evaluation": {"max_new_tokens": 12, "resamples": 100, "max_items": 8},
            }
        ).recipe
    ).run  # fmt: skip
    made = api.prepare_deployment(run, output_dir=tmp_path / "d", rows=6)
    assert made.passed, made.served.problems()
    assert made.served.prompts == made.served.same_prompts == 6
    assert made.served.score is not None
    assert made.demo == "sql"
    manifest = json.loads((made.folder / "manifest.json").read_text())
    assert manifest["demo"]["form"] == deployment.SQL_FORM
    assert manifest["run"] == "sql"
    assert manifest["scores"]
    assert demo.QUESTION in manifest["probes"][0]["messages"][0]["content"]
    assert not made.findings
    page = (run / "report.html").read_text()
    assert "<h3>exports/served: " in page
    tried = api.try_model(made.folder, rows=4, max_new_tokens=12)
    assert "files have their hashes" in tried.findings[0].said


def test_the_hash_of_a_file_is_sha256(tmp_path):
    file = tmp_path / "x"
    file.write_bytes(b"ab" * 2_000_000)
    assert smoke_test.sha256(file) == hashlib.sha256(file.read_bytes()).hexdigest()
