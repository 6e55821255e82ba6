"""Promises that new code joins without being edited: tables equal types, pages equal code, README runs."""

from __future__ import annotations

import ast
import multiprocessing
import os
import re
import runpy
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tunesmith.assets import EXAMPLES, TINY_MODEL
from tunesmith.compose import union_members
from tunesmith.evaluation.metrics import METRICS
from tunesmith.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "COLUMNS": "100",
}


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def commands(page: str) -> list[list[str]]:
    lines = [line for block in blocks("sh", page) for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("tunesmith")]


FORKS = multiprocessing.get_context("forkserver")
"""Processes of their own that need not import everything again: each command of a page runs in one."""
FORKS.set_forkserver_preload(
    ["torch", "transformers.trainer", "trl.trainer.sft_trainer", "peft", "datasets", "plotly", "scipy.stats",
     "sacrebleu", "rouge_score", "hamilton.driver", "rich.progress", "tunesmith.dataflow", "tunesmith.cli"]
)  # fmt: skip


def run_command(command: list[str], folder: Path, log: Path) -> None:
    """Run a command of ours in a folder, in this process, with all that it prints in a file."""
    os.environ.update(ENVIRONMENT)
    os.chdir(folder)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.argv = command
    from tunesmith.cli import main

    main()


PAGES = {
    path.name: path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if commands(path.read_text(encoding="utf-8"))
}
"""Pages with commands of ours in them."""


def test_methods_equal_the_recipe_s_union():
    assert METHODS.keys() == union_members("method").keys()
    assert all(kind == method.kind for kind, method in METHODS.items())


def test_every_metric_says_what_it_is():
    assert all(name == metric.name and len(metric.about) > 20 for name, metric in METRICS.items())
    assert not any("  " in metric.about or "\n" in metric.about for metric in METRICS.values())


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_there_and_small(name):
    assert EXAMPLES[name].path.stat().st_size < 3_000_000
    assert EXAMPLES[name].about


def test_the_tiny_model_is_small_and_safe():
    names = {path.name for path in TINY_MODEL.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    assert sum(path.stat().st_size for path in TINY_MODEL.iterdir()) < 16_000_000


def test_generated_pages_are_what_the_code_says(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "argv", ["make_docs", "--check"])
    stale = runpy.run_path(str(ROOT / "scripts/make_docs"))["main"]()
    assert stale == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    "page", [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"], ids=lambda p: p.name
)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_tree_in_the_readme_names_every_module_and_folder():
    tree = next(block for block in blocks("text") if "src/tunesmith/" in block)
    package = ROOT / "src/tunesmith"
    modules = {path.stem for path in package.glob("*.py")} - {"__init__"}
    folders = {
        f"{path.name}/"
        for path in package.iterdir()
        if (path / "__init__.py").exists() or path.name == "presets"
    }
    assert [
        name for name in sorted(modules | folders) if not re.search(rf"(?<!\w){re.escape(name)}", tree)
    ] == []


def started(line: str) -> list[str]:
    """A shell line's words from the program on; of a launcher of processes those that it starts, by its own parser."""
    words = shlex.split(line.removeprefix("$ "), comments=True)
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    if words[:1] == ["torchrun"]:
        from torch.distributed.run import get_args_parser

        given = get_args_parser().parse_args(words[1:])
    elif words[:2] == ["accelerate", "launch"]:
        from accelerate.commands.launch import launch_command_parser

        given = launch_command_parser().parse_args(words[2:])
    else:
        return words
    return [given.training_script, *given.training_script_args]


def test_every_command_that_a_page_shows_is_one():
    """Parsed and not run."""
    from typer.main import get_command

    from tunesmith.cli import app

    verbs, read, faults = get_command(app).commands, 0, []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        page = path.read_text(encoding="utf-8")
        shown = [block.replace("\\\n", " ") for kind in ("console", "sh") for block in blocks(kind, page)]
        for line in "\n".join(shown).splitlines():
            if "tunesmith" not in line or not (words := started(line)) or words[0] != "tunesmith":
                continue
            read += 1
            end = next((n for n, word in enumerate(words) if word in ("|", ">", "&&")), None)
            try:
                verbs[words[1]].make_context(words[1], words[2:end])
            except Exception as error:
                faults.append(f"{path.name}: {line}: {error!r}")
    assert not faults
    assert read


LONG = ("merging.md", "methods.md", "reward-model.md")
"""Pages whose commands train for half a minute and more, and are those of other tests as well."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [pytest.param(p, marks=pytest.mark.thorough) if p in LONG else p for p in PAGES]
)
def test_what_a_page_shows_runs(page, tmp_path):
    """Every tunesmith command of a page, in order, in an empty folder with the page's recipes, and its Python."""
    content = PAGES[page]
    for block in blocks("yaml", content):
        if named := re.match(r"# (\S+\.yaml)\n", block):
            (tmp_path / named[1]).write_text(block)
    ran = 0
    for command in commands(content):
        if "PATH_OR_HUB_ID" in command:
            continue
        log = tmp_path / ".log"
        process = FORKS.Process(target=run_command, args=(command, tmp_path, log))
        process.start()
        process.join()
        assert process.exitcode == 0, f"{command}\n{log.read_text(errors='replace')}"
        ran += 1
    assert ran
    for code in blocks("python", content):
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.split()


PARTS_TO_COME: set[str] = set()
"""What may be said to be not there yet; nothing else of the seeds may."""

NOT_MADE = {
    "`install_flash_attn()`",
    "`load_model()`: `low_cpu_mem_usage`",
    "`docs/best_practices.md`, `docs/FAQ.md`",
}

NAMES = {
    "000": """app.py handle_submit handle_fine_tune handle_evaluate utils.py install_flash_attn get_model_summary
        get_available_options format_metrics_output FineTuningMethod SFTMethod DPOMethod PPOMethod
        get_fine_tuning_method EvaluationMetric AccuracyMetric PerplexityMetric RougeMetric get_evaluation_metric
        load_and_prepare_dataset tokenize_and_collate config.json requirements.txt dataset_file dataset_hub
        reward_model_name num_train_epochs lora_r lora_alpha lora_dropout training_kwargs""",
    "001": """data_path input_text_key output_text_key model_id_tokenizer save_best_models hold_out_set_predictions
        training_and_validation_set_metrics finetuned_model_on_validation_set "base" "presaved" google/mt5-small
        AutoModelForSeq2SeqLM Docker graphviz ROUGE LoRA""",
    "002": """SFTTrainer MT-Bench single-answer pair-wise QLoRA packing merge_and_unload text-to-SQL Gradio Spider SHP
        Alpaca UltraFeedback Dolly HH Orca Gemma Mistral CodeLlama""",
    "003": """chat code instruct domain custom quick_test low_resource high_quality production FineTuningConfig
        alpaca-instruct accelerate validate_dataset.py test_model.py prepare_for_deployment.py pytorch_model.bin
        best_model checkpoint-step-1000 coherence flow validity adherence quality finder vocabulary""",
    "004": "finetune_cli LLMFineTuner device peft_model get_user_input",
}
"""Words that the rows of each seed have to hold, beside the flags of 003 and the methods of 004."""


def promises() -> list[tuple[str, str, str, list[str]]]:
    """Seed, promise, place and tests of every row."""
    page = (ROOT / "docs/from-the-seeds.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if re.match(r"\| \d{3} ", line)]
    rows = [re.split(r"\s*\|\s*", line.strip("| ")) for line in lines]
    assert all(len(row) == 4 for row in rows)
    return [
        (seed, promise, place, [] if tests == "-" else re.findall(r"`([^`]+)`", tests))
        for seed, promise, place, tests in rows
    ]


def test_every_promise_is_kept_or_said_to_be_to_come():
    """A row without a test names a part that is still to be built, or is one of the few that never will be."""
    rows = promises()
    assert len(rows) > 200
    assert len({row[:2] for row in rows}) == len(rows), "every promise once"
    for seed, promise, place, tests in rows:
        if tests:
            assert not place.startswith("not "), f"{seed} {promise}: a test, and yet it is not there"
        elif promise in NOT_MADE:
            assert place.startswith("not made: "), promise
        else:
            assert place.removeprefix("not yet: ") in PARTS_TO_COME, f"{seed} {promise}: no test"
            assert seed not in ("001", "004"), f"{promise}: these seeds are kept whole"


def test_every_name_of_the_seeds_has_its_row():
    import inspect

    from test_cli import SEED_FLAGS

    from tunesmith import LLMFineTuner

    methods = [
        f"`{name}(" for name, _ in inspect.getmembers(LLMFineTuner, inspect.isfunction) if name[0] != "_"
    ]
    wanted = {seed: names.split() for seed, names in NAMES.items()}
    wanted["003"] += [f"`{flag}" for flag in SEED_FLAGS]
    wanted["004"] += methods
    assert len(methods) >= 9
    for seed, names in wanted.items():
        said = "\n".join(f"{promise} {place}" for its, promise, place, _ in promises() if its == seed)
        assert [name for name in names if name not in said] == [], seed


def test_every_promise_of_the_seeds_has_its_test():
    """The tests that the table names are there, and none is skipped unsaid."""
    missing = []
    for _, promise, place, tests in promises():
        for test in tests:
            file, *names = test.partition("[")[0].split("::")
            node = _tree(ROOT / file)
            for name in names:
                node = node and next((n for n in node.body if getattr(n, "name", None) == name), None)
            if node is None:
                missing.append(test)
            elif re.search(r"skipif|importorskip|pytest\.skip", ast.unparse(node)):
                assert re.search(r"on request|needs ", place), f"{promise}: {test} may be skipped"
    assert missing == []


@cache
def _tree(file: Path) -> ast.Module | None:
    return ast.parse(file.read_text(encoding="utf-8")) if file.is_file() else None


@pytest.mark.slow
def test_every_case_that_the_table_names_is_collected(pytestconfig, every_case):
    named = [test for *_, tests in promises() for test in tests]
    known = every_case
    rest = {test.split("::")[0] for test in named} - {test.split("::")[0] for test in known}
    # A run of the whole suite knows its cases; a run of some files, or of some cases, asks for the others.
    if rest or any("::" in argument for argument in pytestconfig.args):
        collected = subprocess.run(
            [sys.executable, "-m", "pytest", "-o", "addopts=", "--collect-only", "-q",
             *sorted({test.split("::")[0] for test in named})],
            capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT,
        )  # fmt: skip
        assert collected.returncode == 0, collected.stdout[-2000:]
        known = collected.stdout.splitlines()

    def is_there(test: str) -> bool:
        name, _, case = test.removesuffix("]").partition("[")
        begins = (f"{name}[{case}]", f"{name}[{case}-") if case else (f"{name}[",)
        return any(line == name or line.startswith(begins) for line in known)

    assert [test for test in named if not is_there(test)] == []


def test_every_dependency_has_a_pinned_version_that_fits():
    import tomllib

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    pinned = {canonicalize_name(name): version for name, version in pinned.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for needed in map(Requirement, project["dependencies"]):
        version = pinned[canonicalize_name(needed.name)].split("+")[0].split(";")[0].strip()
        assert needed.specifier.contains(version), needed


def test_the_readme_has_commands():
    assert len(commands(README)) >= 7
    assert len(blocks("python")) == 1


@pytest.mark.thorough
def test_the_demo_proves_its_model_better(tmp_path):
    """The promise of the demo: under 15 % before, at least 75 % after, on at least 200 held-out questions."""
    import json

    result = subprocess.run(
        ["tunesmith", "demo", "--output-dir", tmp_path, "--json"],
        capture_output=True, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    [line] = result.stdout.strip().splitlines()
    shown = json.loads(line)
    assert shown["metric"] == "sql_execution"
    assert shown["base"] < 0.15
    assert shown["tuned"] >= 0.75
    assert shown["n"] >= 200
    assert shown["verdict"] == "better"
    assert shown["low"] > 0.5
    assert Path(shown["run"], "report.html").exists()


@pytest.mark.parametrize(
    "page", [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"], ids=lambda p: p.name
)
def test_no_page_has_a_place_to_be_filled_in(page):
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert not re.findall(r"\b(?:TODO|TBD|FIXME|XXX)\b|\b[A-Z]+_(?:TABLE|ROW|AFTER|FIGURES?)\b", text)
