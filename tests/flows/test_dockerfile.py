"""The Dockerfile of the flow: its instructions checked one by one, and what they do done in a clean environment."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
from dockerfile_parse import DockerfileParser
from question_files import questions, save_t5, write

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "docker/question_answer.Dockerfile"
INSTRUCTIONS = {"FROM", "RUN", "WORKDIR", "ARG", "COPY", "USER", "ENV", "ENTRYPOINT", "CMD"}


def instructions(name: str | None = None) -> list[tuple[str, str]]:
    parser = DockerfileParser(fileobj=io.BytesIO(FILE.read_bytes()), env_replace=False)
    found = [
        (step["instruction"], step["value"]) for step in parser.structure if step["instruction"] != "COMMENT"
    ]
    return [step for step in found if name in (None, step[0])]


def values(name: str) -> list[str]:
    return [value for _, value in instructions(name)]


def runs(program: str) -> list[list[str]]:
    """The words of every command that starts with a program, over all RUN instructions."""
    commands = [shlex.split(part) for value in values("RUN") for part in value.split("&&")]
    return [words for words in commands if words[0] == program]


def test_every_instruction_is_known_and_in_order():
    names = [name for name, _ in instructions()]
    assert set(names) == INSTRUCTIONS
    assert names[0] == "FROM"
    assert names[-2:] == ["ENTRYPOINT", "CMD"]
    assert names.count("FROM") == names.count("USER") == 1


def test_the_base_is_named_with_a_version_that_the_package_takes():
    [image] = values("FROM")
    name, _, tag = image.partition(":")
    version = re.match(r"(\d+)\.(\d+)-slim-\w+$", tag)
    assert name == "python"
    assert version, "the tag names Python's version and Debian's release"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    least = tuple(map(int, project["requires-python"].removeprefix(">=").split(".")))
    assert tuple(map(int, version.groups())) >= least


def test_graphviz_is_installed_for_real_and_lists_are_not_kept():
    [value] = [value for value in values("RUN") if "apt-get" in value]
    steps = [part.split() for part in value.split("&&")]
    assert steps[0] == ["apt-get", "update"]
    assert steps[1][:2] == ["apt-get", "install"]
    assert {"-y", "--no-install-recommends", "graphviz"} <= set(steps[1])
    assert steps[-1] == ["rm", "-rf", "/var/lib/apt/lists/*"]


def test_packages_are_those_of_the_constraints():
    torch, ours = runs("pip")
    assert torch[-1] == "$(grep '^torch==' constraints.txt)+cpu"
    assert ours[-3:] == ["--constraint", "constraints.txt", ".[draw]"]
    assert all(words[:3] == ["pip", "install", "--no-cache-dir"] for words in (torch, ours))
    pinned = {
        line.split("==")[0].lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["draw"]]
    for requirement in needed:
        name = re.match(r"[\w.-]+", requirement).group().lower()
        assert name.replace("_", "-") in {p.replace("_", "-") for p in pinned}, name


def test_what_is_copied_is_there_and_sent_to_the_builder():
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {source for value in values("COPY") for source in value.split()[:-1]}
    assert copied == sent
    assert all((ROOT / source).exists() for source in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["readme"] in copied


def test_it_runs_as_a_user_without_rights():
    [user] = values("USER")
    assert user != "root"
    [added] = runs("useradd")
    assert added[-1] == user
    assert int(added[added.index("--uid") + 1]) >= 1000
    order = [f"{name} {value}" for name, value in instructions()]
    at = order.index(f"USER {user}")
    assert not any(step.startswith(("RUN", "COPY")) for step in order[at:])
    assert f"chown {user} {values('WORKDIR')[-1]}" in order[at - 1]


def test_it_starts_the_flow():
    [entry], [command] = values("ENTRYPOINT"), values("CMD")
    program, flag, module = json.loads(entry)
    assert (program, flag) == ("python", "-m")
    assert importlib.util.find_spec(module)
    assert json.loads(command) == ["--help"]


def test_nothing_is_fetched_or_known_that_should_not_be():
    text = FILE.read_text()
    assert not re.search(r"curl|wget|sudo|chmod 777|http://|token|password|secret", text, re.IGNORECASE)
    assert [url.split("/")[2] for url in re.findall(r"https://\S+", text)] == ["download.pytorch.org"]


@pytest.mark.slow
@pytest.mark.skipif(
    "TUNESMITH_PROVE_IMAGE" not in os.environ,
    reason="takes three minutes; set TUNESMITH_PROVE_IMAGE=1 to run it",
)
def test_its_commands_work_in_a_clean_environment(tmp_path):
    """COPY, ARG, ENV and every pip command are done as written, below a folder and in a fresh virtual environment;
    then ENTRYPOINT is run with CMD, and trains. apt-get and useradd belong to the image and are left out."""
    version = re.search(r":(\d+\.\d+)", values("FROM")[0]).group(1)
    if version != f"{sys.version_info[0]}.{sys.version_info[1]}":
        pytest.skip(f"the image has Python {version}, and this is {sys.version.split()[0]}")
    venv.create(tmp_path / "venv", with_pip=True)
    root = tmp_path / "root"
    kept = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(("PIP_", "SSL_")) or "proxy" in name.lower()
    }
    environment = {
        **kept, "PATH": f"{tmp_path / 'venv/bin'}:/usr/bin:/bin", "HOME": str(tmp_path), "PIP_RETRIES": "1",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    here = root
    ran = 0
    for name, value in instructions():
        if name == "WORKDIR":
            here = root / value.lstrip("/")
            here.mkdir(parents=True, exist_ok=True)
        elif name in ("ARG", "ENV"):
            key, _, given = value.partition("=")
            environment[key] = (
                os.environ.get(f"TUNESMITH_{key}", given) if name == "ARG" else f"{root}{given}"
            )
        elif name == "COPY":
            *sources, target = value.split()
            for source in sources:
                if (ROOT / source).is_dir():
                    shutil.copytree(
                        ROOT / source, here / target, ignore=shutil.ignore_patterns("__pycache__")
                    )
                else:
                    shutil.copy(ROOT / source, here / target)
        elif name == "RUN" and value.startswith("pip "):
            done = subprocess.run(
                ["/bin/sh", "-c", value], cwd=here, env=environment, capture_output=True, text=True
            )
            if done.returncode and re.search(
                "No matching distribution|ConnectionError|Max retries", done.stderr
            ):
                pytest.skip(f"no package index with what is needed: {done.stderr.strip().splitlines()[-1]}")
            assert done.returncode == 0, done.stderr
            ran += 1
    assert ran == 2
    assert here == root / "work"
    [entry], [command] = values("ENTRYPOINT"), values("CMD")
    environment |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

    def start(*flags: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*json.loads(entry), *flags], cwd=here, env=environment, capture_output=True, text=True
        )

    helped = start(*json.loads(command))
    assert helped.returncode == 0, helped.stderr
    assert "--data-path" in helped.stdout
    save_t5(here / "t5")
    write(here / "questions.json", questions(41))
    trained = start(
        "--data-path", "questions.json", "--output-text-key", "gpt4_replies_target", "--model-id", "t5",
        "--max-new-tokens", "4", "--num-train-epochs", "1", *(["--draw", "dag.png"] if shutil.which("dot") else []),
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    assert json.loads(trained.stdout)["save_best_models"]["status"] == "success"
    assert (here / "hamilton-t5-peft/adapter_model.safetensors").exists()
    assert (here / "dag.png").exists() == bool(shutil.which("dot"))
    listed = subprocess.run(
        ["pip", "list", "--format", "json"], env=environment, capture_output=True, text=True, check=True
    )
    pins = dict(
        line.lower().replace("_", "-").split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    for package in json.loads(listed.stdout):
        name = package["name"].lower().replace("_", "-")
        if name in pins:
            assert package["version"].split("+")[0] == pins[name], name


@pytest.mark.slow
def test_it_builds():
    """The image itself, where a Docker daemon and the network are there."""
    docker = shutil.which("docker")
    if not docker or subprocess.run([docker, "info"], capture_output=True).returncode:
        pytest.skip("no Docker daemon answers here")
    built = subprocess.run(
        [docker, "build", "--quiet", "-f", FILE, "-t", "tunesmith-question-answer-test", ROOT],
        capture_output=True,
        text=True,
    )
    if re.search("dial tcp|failed to resolve|no such host|i/o timeout", built.stderr):
        pytest.skip(f"the base image cannot be reached: {built.stderr.strip().splitlines()[-1]}")
    assert built.returncode == 0, built.stderr
    helped = subprocess.run(
        [docker, "run", "--rm", "tunesmith-question-answer-test"], capture_output=True, text=True
    )
    assert helped.returncode == 0, helped.stderr
    assert "--data-path" in helped.stdout
