"""The command line: parse, call api, print. Nothing heavy is imported before a verb needs it.

Every verb takes `--json` and then prints one JSON object as the last line of stdout; everything for
people who watch goes to stderr.
"""

from __future__ import annotations

import functools
import inspect
import io
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from tunesmith import __version__, catalog, launch, libraries, ranks
from tunesmith.compose import (
    Composition,
    assignment,
    compose,
    nested,
    overlaid,
    preset_names,
    scalar,
    union_members,
)
from tunesmith.display import Display, escaped, open_console, score_text, table_of
from tunesmith.errors import (
    TERMINATED,
    Interrupted,
    RecipeError,
    RunError,
    Terminated,
    TunesmithError,
    as_ours,
    does,
    nearest,
    size,
)
from tunesmith.recipe import FieldFact, fields

app = typer.Typer(
    name="tunesmith",
    help="Fine-tune a language model on your own examples, and prove that it got better.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help starts faster and keeps wide options readable
)


def _say_version(is_asked: bool) -> None:
    if is_asked:
        print(f"tunesmith {__version__}")
        raise typer.Exit


@app.callback()
def before_the_verb(
    *,
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_say_version, help="Show the version and end."),
    ] = False,
) -> None:
    """Options of `tunesmith` itself."""


FLAGS: dict[str, str] = {
    "--task": "task",
    "--method": "method.kind",
    "--base-model": "model.base",
    "--chat-template": "model.chat_template",
    "--dataset": "data.dataset",
    "--format": "data.format",
    "--input-text-key": "data.input_text_key",
    "--output-text-key": "data.output_text_key",
    "--max-rows": "data.max_rows",
    "--max-length": "data.max_length",
    "--lora-rank": "adapter.rank",
    "--lora-alpha": "adapter.alpha",
    "--lora-dropout": "adapter.dropout",
    "--target-modules": "adapter.targets",
    "--num-epochs": "training.num_epochs",
    "--max-steps": "training.max_steps",
    "--learning-rate": "training.learning_rate",
    "--warmup-steps": "training.warmup_steps",
    "--per-device-train-batch-size": "training.per_device_train_batch_size",
    "--per-device-eval-batch-size": "training.per_device_eval_batch_size",
    "--gradient-accumulation-steps": "training.gradient_accumulation_steps",
    "--gradient-checkpointing": "training.gradient_checkpointing",
    "--mixed-precision": "training.mixed_precision",
    "--eval-steps": "training.eval_steps",
    "--save-steps": "training.save_steps",
    "--logging-steps": "training.logging_steps",
    "--num-workers": "training.num_workers",
    "--seed": "training.seed",
    "--metrics": "evaluation.metrics",
    "--max-new-tokens": "evaluation.max_new_tokens",
    "--run-code": "evaluation.run_code",
    "--attempts": "evaluation.attempts",
    "--launch": "launch.kind",
    "--processes": "launch.processes",
    "--parallel": "parallel.kind",
    "--workers": "launch.workers",
    "--trackers": "tracking.trackers",
    "--push-to-hub": "export.push_to_hub",
    "--hub-model-id": "export.hub_model_id",
    "--output-dir": "output_dir",
    "--name": "name",
}
"""Short options and the recipe field each one sets; its help is the field's docstring."""

EVALUATION_FLAGS = (
    "--format", "--input-text-key", "--output-text-key", "--max-rows", "--max-length", "--max-new-tokens",
    "--chat-template", "--run-code", "--attempts",
)  # fmt: skip
"""Those of them that say how a data set is read and answered, for `evaluate` and `compare`."""

VALIDATION_FLAGS = (
    "--task", "--method", "--format", "--input-text-key", "--output-text-key", "--max-rows", "--max-length",
    "--chat-template",
)  # fmt: skip
"""Those that say how `validate` reads a data set and how long its rows may be."""

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]


CatalogOption = Annotated[
    Path | None,
    typer.Option(
        "--catalog", metavar="FILE", help="A catalogue of your own beside the shipped one (docs/catalog.md)."
    ),
]

ModelArgument = Annotated[str, typer.Argument(help="A run's folder, a model folder, a Hub id, or `tiny`.")]
MetricsOption = Annotated[
    str | None, typer.Option(metavar="NAME,NAME", help="`tunesmith show metrics` lists them.")
]
DtypeOption = Annotated[
    str,
    typer.Option(
        metavar="auto|float32|float16|bfloat16", help="How weights are stored; `auto` as the base's are."
    ),
]
ShardSizeOption = Annotated[str, typer.Option(metavar="SIZE", help="Largest file of weights.")]
PortOption = Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")]
TokenOption = Annotated[
    str | None,
    typer.Option(help="Environment variable with the token; by default one is made and shown once."),
]
ModelPathOption = Annotated[str | None, typer.Option(help="The model, as an option instead of the argument.")]
JudgeOption = Annotated[
    str | None,
    typer.Option(
        "--judge", metavar="FILE", help="Who judges: a YAML file of settings (docs/judge.md), or local:MODEL."
    ),
]
QuestionsOption = Annotated[
    Path | None,
    typer.Option("--questions", metavar="FILE", help="File of questions or prompts (docs/mt-bench.md)."),
]
ReferencesOption = Annotated[
    Path | None,
    typer.Option("--references", metavar="FILE", help="Reference answers, in the format of answer files."),
]


FACTS = {fact.path: fact for fact in reversed(list(fields()))}
"""The recipe's fields by path; of a field that several kinds share, the first kind's."""
KINDS = {
    "method": (
        "sft",
        "How the model learns (`tunesmith show methods`): from answers (sft), from preferences (dpo) and so on.",
    ),
    "launch": (
        "local",
        "Where the run runs: in this process, or in several of this machine that share every step "
        "(`docs/accelerate.md`).",
    ),
    "parallel": (
        "ddp",
        "How several processes hold the model: whole in each (ddp), or in shares "
        "(fsdp, deepspeed; `docs/accelerate.md`).",
    ),
}
"""Sections whose kind has a flag of its own: the kind where none is given, and what it decides."""
FACTS |= {
    f"{name}.kind": FieldFact(f"{name}.kind", None, " | ".join(union_members(name)), default, about)
    for name, (default, about) in KINDS.items()
}


def converted(text: str | bool, kind: str) -> Any:
    """An option's text as a value of the field's type; the recipe then checks it."""
    return scalar(text) if isinstance(text, str) and "number" in kind else text


def recipe_options(
    *, only: Sequence[str] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a verb the recipe's options; it receives them as one sparse `flags` layer.

    A verb that asks for a `composition` gets that instead, and the options that name file, preset and adapter.
    """

    def decorate(verb: Callable[..., Any]) -> Callable[..., Any]:
        facts = {option: FACTS[path] for option, path in FLAGS.items() if only is None or option in only}
        names = {option: option.removeprefix("--").replace("-", "_") for option in facts}
        asked = inspect.signature(verb, eval_str=True).parameters
        sources = inspect.signature(_composed, eval_str=True).parameters if "composition" in asked else {}
        shared = [p for name, p in sources.items() if name != "flags"]

        @functools.wraps(verb)
        def wrapped(**given: Any) -> Any:
            values = {option: given.pop(names[option]) for option in facts}
            layers = [
                nested(FLAGS[option], converted(value, facts[option].type))
                for option, value in values.items()
                if value is not None
            ]
            layers += [assignment(text) for text in given.pop("set_") or []]
            flags = overlaid(*layers)
            # A field that is in no section has the name of its option, or a word that any sentence may have.
            typed = {FLAGS[o]: o for o, value in values.items() if value is not None and "." in FLAGS[o]}
            typed |= {"adapter.ratio": "--freeze-ratio"} if given.get("freeze_ratio") else {}
            try:
                with catalog.using(given.pop("catalog_file")):
                    if not shared:
                        return verb(**given, flags=flags)
                    composition = _composed(**{p.name: given.pop(p.name) for p in shared}, flags=flags)
                    return verb(**given, composition=composition)
            except RecipeError as error:
                raise _as_typed(error, typed) from error.__cause__

        own = [*shared, *(p for name, p in asked.items() if name not in ("flags", "composition"))]
        options = [_option(option, names[option], fact) for option, fact in facts.items()]
        options.append(
            inspect.Parameter(
                "set_",
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[
                    list[str] | None,
                    typer.Option(
                        "--set",
                        help="Any field of the recipe: `--set adapter.dora=true` (repeatable).",
                        metavar="FIELD=VALUE",
                    ),
                ],
            )
        )
        options.append(
            inspect.Parameter(
                "catalog_file", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=CatalogOption
            )
        )
        ordered = sorted([*own, *options], key=lambda p: p.kind)
        wrapped.__signature__ = inspect.Signature(ordered)  # type: ignore[attr-defined]
        wrapped.__annotations__ = {p.name: p.annotation for p in ordered}
        return wrapped

    return decorate


def _as_typed(error: RecipeError, typed: Mapping[str, str]) -> RecipeError:
    """The error with the options that were typed beside the fields that they set."""

    def told(text: str | None) -> str | None:
        for path, option in typed.items():
            text = re.sub(
                rf"(?<![\w.])(?<!--set ){re.escape(path)}(?![\w.]*\w)(?! \()",
                f"{path} ({option})",
                text or "",
                count=1,
            )
        return text or None

    error.problem, error.found = told(error.problem) or "", told(error.found)
    return error


def _option(option: str, name: str, fact: FieldFact) -> inspect.Parameter:
    is_bool = fact.type == "true | false"
    declared = typer.Option(
        f"{option}/--no-{option[2:]}" if is_bool else option,
        help=fact.about.replace("\n", " "),
        metavar=None if is_bool else _metavar(fact.type),
        show_default=False,
    )
    kind: Any = bool | None if is_bool else str | None
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, declared]
    )


def _metavar(kind: str) -> str:
    short = {"whole number": "N", "number": "X", "text": "TEXT", "list of text": "NAME,NAME", "null": ""}
    words = [short.get(part, part.removeprefix("list of ")) for part in kind.split(" | ")]
    return "|".join(word for word in words if word)


def verb(function: Callable[..., Any]) -> Callable[..., None]:
    """Run a verb, print what it gives, and end with the exit code that its error has."""

    @functools.wraps(function)
    def run(**given: Any) -> None:
        from tunesmith.terminal import inert, json_line

        as_json = given.pop("as_json")
        try:
            payload, text = function(**given, quiet=as_json)
        except TunesmithError as error:
            launch.let_the_first_speak()
            _fail(error.lines(), error.exit_code, as_json, error)
        except KeyboardInterrupt as error:
            code = TERMINATED if isinstance(error, Terminated) else Interrupted.exit_code
            _fail(["Stopped."], code, as_json)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except Exception as error:
            if ours := as_ours(error):
                _fail(ours.lines(), ours.exit_code, as_json, ours)
            print(inert(traceback.format_exc()), end="", file=sys.stderr)
            _fail(
                [
                    f"This is a bug in tunesmith: {type(error).__name__}: {error}",
                    "  do:    report it with the lines above",
                ],
                4,
                as_json,
            )
        else:
            if not ranks.is_first():
                return
            if text and not as_json:
                _print(text)
            if as_json:
                print(json_line(payload))
            if payload.get("exit_code"):
                raise typer.Exit(payload["exit_code"])

    parameters = [
        p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name != "quiet"
    ]
    parameters.append(
        inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json)
    )
    run.__signature__ = inspect.Signature(sorted(parameters, key=lambda p: p.kind))  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def _print(text: Any) -> None:
    """What a verb says. Piped, the lines of a table end with their words: rich fills each up to the longest one."""
    console, is_plain = open_console(stderr=False), isinstance(text, str)
    if is_plain or console.is_terminal:
        console.print(text, markup=not is_plain)  # plain text may hold brackets
        return
    with console.capture() as caught:
        console.print(text)
    print("\n".join(line.rstrip(" ") for line in caught.get().split("\n")), end="")


EXCERPT = re.compile(r"\n {9}[^\n]*\n {9} *\^")
"""A line of a file and the caret under it, which are for people."""


def _fail(lines: Sequence[str], code: int, as_json: bool, error: TunesmithError | None = None) -> NoReturn:
    from tunesmith.terminal import json_line

    console = open_console()
    console.print(lines[0], style="bold red", markup=False, highlight=False)
    for line in lines[1:]:
        console.print(line, markup=False, highlight=False)
    if as_json:
        facts: dict[str, Any] = {"error": EXCERPT.sub("", "\n".join(lines))}
        if error:
            found = EXCERPT.sub("", error.found) if error.found else None
            facts |= {"problem": error.problem, "found": found, "fix": error.fix}
            facts |= getattr(error, "details", {})
        print(json_line({**facts, "exit_code": code}))
    raise typer.Exit(code)


@app.command("demo", help="Fine-tune the shipped tiny model on text-to-SQL and prove that it got better.")
@verb
def demo_verb(
    *,
    output_dir: Annotated[str, typer.Option(help="Folder in which the run's folder is made.")] = "runs",
    quiet: bool,
) -> Any:
    """Run the demo."""
    from tunesmith import api, results

    with Display(quiet=quiet) as display:
        result = api.demo(output_dir=output_dir, watch=display)
    return result.as_dict(), results.result_text(result)


TRAIN_HELP = """Fine-tune a model on your examples, and measure it against its base on held-out ones.

`tunesmith train --base-model tiny --dataset example:support --task instruct --lora`

`tunesmith train recipe.yaml --set training.learning_rate=1e-4`"""

RecipeFile = Annotated[
    Path | None, typer.Argument(metavar="[RECIPE]", help="A recipe file (YAML or JSON); flags override it.")
]
ConfigOption = Annotated[
    str | None,
    typer.Option(
        "--config", "--preset", metavar="NAME|FILE",
        help="A preset (`tunesmith show presets`) or a recipe file.",
    ),
]  # fmt: skip

LoraOption = Annotated[bool, typer.Option("--lora", help="Train low-rank adapters instead of all weights.")]
QloraOption = Annotated[
    bool, typer.Option("--qlora", help="LoRA on a 4-bit base; made for CUDA, slow on a CPU.")
]
FreezeOption = Annotated[
    float | None, typer.Option(help="Freeze this share of the layers, from the bottom; 0 freezes none.")
]


def _composed(
    recipe_file: RecipeFile = None,
    *,
    config: ConfigOption = None,
    lora: LoraOption = False,
    qlora: QloraOption = False,
    freeze_ratio: FreezeOption = None,
    flags: dict[str, Any],
) -> Composition:
    """One recipe from the file, the preset and the flags of a command; `recipe_options` gives a verb these options."""
    chosen = [
        option
        for option, given in (("--lora", lora), ("--qlora", qlora), ("--freeze-ratio", bool(freeze_ratio)))
        if given
    ]
    if len(chosen) > 1:
        raise TunesmithError(f"{' and '.join(chosen)} exclude each other.", fix="Give one of them.")
    adapter: dict[str, Any] = {}
    if lora or qlora:
        adapter = {"kind": "qlora" if qlora else "lora"}
    elif freeze_ratio:
        adapter = {"kind": "freeze", "ratio": freeze_ratio}
    preset = config if config in preset_names() else None
    if (
        config
        and not preset
        and (Path(config).suffix in {".yaml", ".yml", ".json"} or Path(config).is_file())
    ):
        if recipe_file:
            raise TunesmithError(
                "Two recipe files were given.", found=f"{recipe_file} and {config}", fix="Give one."
            )
        recipe_file = Path(config)
    elif config:
        preset = config
    if "processes" in flags.get("launch", {}):
        flags = overlaid({"launch": {"kind": "accelerate"}}, flags)
    if "workers" in flags.get("launch", {}):
        flags = overlaid({"launch": {"kind": "ray"}}, flags)
    layer = overlaid({"adapter": adapter} if adapter else {}, flags)
    if recipe_file:
        _check_is_recipe(recipe_file)
    return compose(layer, file=recipe_file, preset=preset if preset != "default" else None)


def _check_is_recipe(path: Path) -> None:
    """Raises TunesmithError for a data set or a run in the place of a recipe file, with the option that takes it."""
    if path.suffix.lower() in {".yaml", ".yml", ".json"} and not path.is_dir():
        return  # a list of rows in JSON shows when it is read
    from tunesmith.data.sources import READERS
    from tunesmith.training.run import is_run

    if is_run(path):
        raise TunesmithError(
            f"{path} is a run, and a recipe file belongs here.",
            fix=f"`tunesmith resume {path}` continues it; {path / 'recipe.yaml'} is its recipe; --base-model {path} "
            "trains on from its model.",
        )
    if path.is_dir() or (path.suffix.lower() in READERS and path.is_file()):
        raise TunesmithError(
            f"{path} looks like a data set, and a recipe file belongs here.",
            found="a folder" if path.is_dir() else f"a {path.suffix} file",
            fix=f"Give it as --dataset {path}.",
        )


@app.command("train", help=TRAIN_HELP)
@verb
@recipe_options()
def train_verb(
    *,
    resume: Annotated[
        str | None,
        typer.Option(
            help="Continue this run's folder from a checkpoint, such as `checkpoint-step-1000` or `latest`."
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="With a launch on a cluster (slurm, kubernetes, ray with nodes): show the files, write none.",
        ),
    ] = False,
    composition: Composition,
    quiet: bool,
) -> Any:
    """Train."""
    from tunesmith import api, results

    if launch.is_job(composition.recipe.launch):
        with Display(quiet=quiet) as display:
            return _job(composition, display, resume=resume, is_written=not dry_run)
    if dry_run:
        raise TunesmithError(
            "--dry-run shows the files of a job, and this recipe is trained here.",
            fix="`tunesmith plan` shows what a run would do; --launch slurm or kubernetes makes it a job.",
        )
    with Display(quiet=quiet) as display:
        _show_notes(composition, display)
        result = api.train(composition.recipe, resume=resume, watch=display)
    return result.as_dict(), results.result_text(result)


def _job(composition: Composition, display: Display, *, resume: str | None, is_written: bool) -> Any:
    """Write what a cluster is to be given, or only show it."""
    from tunesmith import api, jobs
    from tunesmith.training.run import folder_name, write_whole

    recipe = composition.recipe
    folder = Path(recipe.output_dir).expanduser() / f"{folder_name(recipe)}.job"
    made = api.job(recipe, folder, resume=resume)
    notes = [*composition.notes, *made.notes]
    if is_written:
        replaced = [n for n, text in made.files.items() if _differs(folder / n, text)]
        if replaced:
            notes.append(f"files of an earlier job in {folder} were replaced: {', '.join(replaced)}")
        for name, text in made.files.items():
            write_whole(folder / name, text)
    if others := [name for name in jobs.FILES if name not in made.files and (folder / name).is_file()]:
        notes.append(
            f"{', '.join(others)} in {folder} {does('belong', len(others))} to a job for another launcher, which may "
            "still want them: remove what you no longer submit"
        )
    for note in notes:
        display({"kind": "warning", "message": note})
    shown = "\n".join(f"# {folder / name}\n{text}" for name, text in made.files.items())
    payload = {
        "folder": str(folder), "files": made.files, "submit": made.submit, "written": is_written, "notes": notes,
    }  # fmt: skip
    there = f"cd {shlex.quote(str(folder))} && {made.submit}"
    return payload, f"Submit it: {there}" if is_written else f"{shown}\n# {there}"


def _differs(file: Path, text: str) -> bool:
    """Whether a file is there with another text."""
    return file.is_file() and file.read_text(encoding="utf-8", errors="replace") != text


@app.command("resume", help="Continue an interrupted run from its newest whole checkpoint.")
@verb
def resume_verb(
    run: Annotated[str, typer.Argument(help="The run's folder.")],
    *,
    checkpoint: Annotated[
        str, typer.Option(help="A checkpoint's name, `latest`, or `start` for none.")
    ] = "latest",
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that go on with it; by default as many as the recipe says."),
    ] = None,
    quiet: bool,
) -> Any:
    """Resume."""
    from tunesmith import api, results

    with Display(quiet=quiet) as display:
        result = api.resume(run, checkpoint=checkpoint, processes=processes, watch=display)
    return result.as_dict(), results.result_text(result)


VERIFY_HELP = """Prove that a run of a recipe continues to the bit: train a few steps, and again from each checkpoint.

`tunesmith verify-resume --base-model tiny --dataset example:support --task instruct --lora --steps 3`"""


@app.command("verify-resume", help=VERIFY_HELP)
@verb
@recipe_options()
def verify_resume_verb(
    *,
    steps: Annotated[int, typer.Option(min=2, help="Optimizer steps of the whole run.")] = 4,
    composition: Composition,
    quiet: bool,
) -> Any:
    """Verify that a recipe's runs can be continued."""
    from tunesmith import api

    with Display(quiet=quiet) as display:
        _show_notes(composition, display)
        found = api.verify_resume(composition.recipe, steps=steps, watch=display)
    if not found.equal:
        raise RunError(
            "A run of this recipe would not continue to the bit.",
            found=found.sentence(),
            fix="Report it with the recipe; a run of it that is not interrupted is not concerned.",
        )
    return found.as_dict(), found.sentence()


@app.command("plan", help="Show what a recipe would do with its rows and on this machine, without doing it.")
@verb
@recipe_options()
def plan_verb(
    *,
    self_check: Annotated[
        bool,
        typer.Option(
            "--self-check",
            help="Compare loss and gradient of some rows in batches of 8 and 2 x 4, and packed and padded.",
        ),
    ] = False,
    device: Annotated[
        str | None,
        typer.Option("--device", help="Plan for a device by name, such as h100-80gb, without having it."),
    ] = None,
    composition: Composition,
    quiet: bool,
) -> Any:
    """Plan."""
    from tunesmith import api, results

    plan, rows = api.plan(composition.recipe, device=device, measured=True)
    payload = {"plan": plan.as_dict(), **rows, "notes": composition.notes}
    text = results.plan_text(plan, rows, composition)
    if self_check:
        found = api.self_check(composition.recipe)
        payload |= {"self_check": found.as_dict(), **({} if found.equal else {"exit_code": 1})}
        for compared in found.compared:
            text.add_row("self-check", "equal" if compared.equal else "NOT equal", compared.sentence())
        for why in found.left_out:
            text.add_row("self-check", "not compared", escaped(why))
    return payload, text


PREPARE_HELP = """Read and tokenize a recipe's rows ahead of the training, on all processors, or on several nodes.

`tunesmith prepare recipe.yaml` here; on the second of four nodes with one cache (TUNESMITH_CACHE):
`tunesmith prepare recipe.yaml --share 2/4`. `train` finds what was made."""


@app.command("prepare", help=PREPARE_HELP)
@verb
@recipe_options()
def prepare_verb(
    *,
    cores: Annotated[
        int | None,
        typer.Option("--cores", min=1, help="Processes that tokenize; by default one per processor."),
    ] = None,
    share: Annotated[
        str, typer.Option("--share", help="K/N: of N nodes this is the K-th, and does its share.")
    ] = "1/1",
    composition: Composition,
    quiet: bool,
) -> Any:
    """Prepare."""
    from rich.table import Table

    from tunesmith import api

    first, _, of = share.partition("/")
    if not (first.isdigit() and of.isdigit()):
        raise TunesmithError(f"'{share}' is no share.", fix="Give K/N, such as --share 2/4.")
    with Display(quiet=quiet) as display:
        _show_notes(composition, display)
        found = api.prepare(
            composition.recipe,
            processes=cores or os.cpu_count() or 1,
            share=(int(first), int(of)),
            watch=display,
        )
    text = Table.grid(padding=(0, 2))
    text.add_row("rows", f"{found['rows']:,} in {found['pieces']:,} pieces, {found['made']:,} made now")
    if found["joined"]:
        counts = found["counts"]
        text.add_row(
            "tokens", f"{found['tokens']:,} to train on, of {counts['train']:,} rows; {found['seconds']} s"
        )
    else:
        text.add_row("missing", f"{found['missing']:,} pieces, which other nodes have to do")
    text.add_row("cache", escaped(found["cache"]))
    return {**found, "notes": [*composition.notes, *found.get("notes", [])]}, text


SWEEP_HELP = """Try values of a recipe's fields, choose by validation, and compare the best on held-out questions.

`tunesmith sweep recipe.yaml --space 'training.learning_rate=loguniform(1e-5,1e-3)'`

`tunesmith sweep recipe.yaml --space space.yaml --trials 50 --engine ray --workers 8`"""


@app.command("sweep", help=SWEEP_HELP)
@verb
@recipe_options()
def sweep_verb(
    *,
    space: Annotated[
        list[str] | None,
        typer.Option(
            "--space",
            metavar="FIELD=DISTRIBUTION|FILE",
            help="What to search: choice(A,B), uniform, loguniform, int or logint(LOW,HIGH), or a YAML file of such "
            "lines (repeatable).",
        ),
    ] = None,
    trials: Annotated[
        int, typer.Option(min=1, help="Trials in all, those of an earlier start included.")
    ] = 20,
    engine: Annotated[
        str, typer.Option(metavar="optuna|ray", help="One trial after the other, or several at once on Ray.")
    ] = "optuna",
    pruner: Annotated[
        str,
        typer.Option(metavar="median|asha|none", help="What ends trials that lag behind at a validation."),
    ] = "median",
    sweep_seed: Annotated[int, typer.Option(min=0, help="Seed of what is proposed.")] = 0,
    compared: Annotated[
        int, typer.Option(min=0, help="Next best trials that the best one is compared with, beside the base.")
    ] = 3,
    composition: Composition,
    quiet: bool,
) -> Any:
    """Sweep."""
    from typing import get_args

    from tunesmith import api, results, sweeps

    for option, value, known in (
        ("--engine", engine, get_args(sweeps.Engine)),
        ("--pruner", pruner, get_args(sweeps.Pruner)),
    ):
        if value not in known:
            raise TunesmithError(f"There is no {option} '{value}'.", fix=nearest(value, known))
    with Display(quiet=quiet) as display:
        _show_notes(composition, display)
        found = api.sweep(
            composition.recipe,
            space or (),
            trials=trials,
            engine=engine,  # type: ignore[arg-type]
            pruner=pruner,  # type: ignore[arg-type]
            seed=sweep_seed,
            compared=compared,
            watch=display,
        )
    return found.as_dict(), results.sweep_text(found)


FIND_LR_HELP = """Find a learning rate by a short range test on throw-away copies of the model; nothing is trained.

`tunesmith find-lr --base-model tiny --dataset example:support --task instruct --lora --html rates.html`"""


@app.command("find-lr", help=FIND_LR_HELP)
@verb
@recipe_options()
def find_lr_verb(
    *,
    low: Annotated[
        float | None, typer.Option(help="Lowest rate; by default 1e-7, of adapters 1e-6.", show_default=False)
    ] = None,
    high: Annotated[
        float | None, typer.Option(help="Highest rate; by default 1, of adapters 10.", show_default=False)
    ] = None,
    steps: Annotated[int, typer.Option(min=10, help="Optimizer steps of a sweep.")] = 100,
    seeds: Annotated[int, typer.Option(min=1, help="Sweeps, each with a seed of its own.")] = 3,
    html: Annotated[Path | None, typer.Option(help="Write the curve to this HTML page as well.")] = None,
    composition: Composition,
    quiet: bool,
) -> Any:
    """Find a learning rate."""
    from tunesmith import api, results

    with Display(quiet=quiet) as display:
        _show_notes(composition, display)
        search = api.find_lr(
            composition.recipe, low=low, high=high, steps=steps, seeds=seeds, page=html, watch=display
        )
    used = composition.recipe.training.learning_rate
    payload = {**search.as_dict(), "recipe_learning_rate": used, "page": str(html) if html else None}
    return payload, results.rates_text(search, html)


@app.command("evaluate", help="Measure a run's model, or any model, on held-out examples.")
@verb
@recipe_options(only=EVALUATION_FLAGS)
def evaluate_verb(
    model: ModelArgument,
    *,
    dataset: Annotated[
        str | None,
        typer.Option(help="Examples, without those that the run has seen; by default its held-out split."),
    ] = None,
    metrics: MetricsOption = None,
    output: Annotated[str | None, typer.Option(help="Folder for rows and scores.")] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            metavar="mt-bench|alpaca|arena|lm-eval:TASKS",
            help="Questions of a suite in place of held-out examples (docs/mt-bench.md).",
        ),
    ] = None,
    questions: QuestionsOption = None,
    references: ReferencesOption = None,
    judge: JudgeOption = None,
    baseline: Annotated[
        str | None,
        typer.Option(help="With --suite: the model, or file of answers, that the judge compares with."),
    ] = None,
    calibrate: Annotated[
        bool, typer.Option(help="With --judge: first ask it about answers of known worth (160 calls).")
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --suite and --judge: say what judging would take at most.")
    ] = False,
    flags: dict[str, Any],
    quiet: bool,
) -> Any:
    """Evaluate."""
    from tunesmith import api, results
    from tunesmith.evaluation.judging.headline import is_empty

    of_suites = {
        "--questions": questions, "--references": references, "--judge": judge, "--baseline": baseline,
        "--dry-run": dry_run,
    }  # fmt: skip
    ignored = [name for name, given in of_suites.items() if given and not suite]
    ignored += [name for name, given in (("--dataset", dataset), ("--metrics", metrics)) if given and suite]
    if ignored:
        raise TunesmithError(
            f"{' and '.join(ignored)} would have no effect {'with' if suite else 'without'} --suite.",
            fix="Leave it out." if suite else "Give --suite (docs/mt-bench.md).",
        )
    if suite:
        with Display(quiet=quiet) as display:
            found = api.evaluate_suite(
                model, suite, questions=questions, references=references, judge=judge, baseline=baseline,
                calibrate=calibrate, dry_run=dry_run, settings=flags, output=output, watch=display,
            )  # fmt: skip
        if dry_run:
            return found, results.forecast_text(found)
        judged = [found[part] for part in ("graded", "compared") if part in found]
        failed = {"exit_code": 1} if judged and all(map(is_empty, judged)) else {}
        return {**found, **failed}, results.suite_text(found)
    with Display(quiet=quiet) as display:
        result = api.evaluate(
            model, dataset=dataset, metrics=_names(metrics), settings=flags, output=output, watch=display
        )
    return {**result.as_dict(), "rows": str(result.run)}, results.scores_text(result)


GENERATE_HELP = """A model's answers to every row of a set of prompts, into a file of JSON lines.

`tunesmith generate fine_tuned_models/support prompts.jsonl --output answers.jsonl`

`tunesmith generate fine_tuned_models/support prompts.jsonl --output answers.jsonl --engine ray --shards 8`"""

GENERATION_FLAGS = ("--format", "--input-text-key", "--output-text-key", "--max-rows", "--max-new-tokens")
"""Those that say how `generate` reads a set and answers it."""


@app.command("generate", help=GENERATE_HELP)
@verb
@recipe_options(only=GENERATION_FLAGS)
def generate_verb(
    model: ModelArgument,
    prompts: Annotated[
        str,
        typer.Argument(
            help="A file, a folder or a Hub id; rows with a column `prompt`, unless --format or --input-text-key."
        ),
    ],
    *,
    output: Annotated[Path, typer.Option(help="File of the answers; it must not be there.")],
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="auto|padded|paged|vllm|openai|ray", help="What writes them (docs/generation.md)."
        ),
    ] = None,
    shards: Annotated[
        int | None, typer.Option(min=1, help="With --engine ray: workers that share the prompts.")
    ] = None,
    flags: dict[str, Any],
    quiet: bool,
) -> Any:
    """Generate."""
    from dataclasses import asdict

    from tunesmith import api

    if shards and engine != "ray":
        raise TunesmithError("--shards is for the engine ray.", fix="Add --engine ray, or leave it out.")
    chosen = {"engine": engine} if engine else {}
    workers = {"shards": {"workers": shards}} if shards else {}
    with Display(quiet=quiet) as display:
        found = api.generate(
            model,
            prompts,
            output,
            settings=overlaid(flags, {"evaluation": {**chosen, **workers}}),
            watch=display,
        )
    return asdict(found), f"{found.sentence()}\n{'file':<10}{found.file}"


COMPARE_HELP = """Whether each model is better than the first on the same held-out examples, with an interval.

`tunesmith compare tiny fine_tuned_models/support`

`tunesmith compare tiny runs/a runs/b runs/c --metrics exact_match,rougeL`"""


@app.command("compare", help=COMPARE_HELP)
@verb
@recipe_options(only=EVALUATION_FLAGS)
def compare_verb(
    a: Annotated[str, typer.Argument(help="The base: a run, a model folder, a Hub id, or `tiny`.")],
    b: Annotated[list[str], typer.Argument(metavar="B [C ...]", help="The challengers, one or more.")],
    *,
    baseline: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Set all others against this one instead of the first."),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Examples, without those that a run has seen; by default the run's held-out split."
        ),
    ] = None,
    metrics: MetricsOption = None,
    primary: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The metric that the verdict rests on; by default the first that scores answers.",
        ),
    ] = None,
    flags: dict[str, Any],
    quiet: bool,
) -> Any:
    """Compare."""
    from tunesmith import api, results

    with Display(quiet=quiet) as display:
        result = api.compare(
            a,
            *b,
            baseline=baseline,
            dataset=dataset,
            metrics=_names(metrics),
            primary=primary,
            settings=flags,
            watch=display,
        )
    return result.as_dict(), results.result_text(result)


INSPECT_FLAGS = (
    "--task", "--method", "--chat-template", "--format", "--input-text-key", "--output-text-key", "--max-rows",
    "--max-length",
)  # fmt: skip
"""The recipe's options that decide what a model sees of a row."""


@app.command(
    "inspect", help="Show what a model sees of a data set: every token, trained, context, special or cut off."
)
@verb
@recipe_options(only=INSPECT_FLAGS)
def inspect_verb(
    dataset: Annotated[
        str, typer.Argument(help="A file, folder, Hub id or `example:NAME`; or a run, for its own data.")
    ],
    *,
    model: Annotated[
        str | None, typer.Option("--model", "--base-model", help="A folder, a Hub id, or `tiny`.")
    ] = None,
    row: Annotated[
        list[str] | None,
        typer.Option(
            "--row",
            help="Show this row: `12`, or `file.jsonl:12` (repeatable). The number is that of reports and ledgers: "
            "the line in .jsonl and .txt files, the record in .csv (without its header), .json and .parquet.",
            metavar="N",
        ),
    ] = None,
    count: Annotated[
        int,
        typer.Option(min=1, help="Without --row: this many of the longest, the most truncated and so on."),
    ] = 3,
    html: Annotated[Path | None, typer.Option(help="Write the rows to this HTML page as well.")] = None,
    flags: dict[str, Any],
    quiet: bool,
) -> Any:
    """Inspect."""
    from tunesmith import api, results

    found = api.inspect(api.inspected_recipe(dataset, model, flags), rows=row or (), count=count, page=html)
    payload = {"dataset": dataset, "page": str(html) if html else None, "rows": [r.as_dict() for r in found]}
    return payload, results.inspected_text(found, html)


VALIDATE_HELP = """Find what is wrong with a data set before training on it.

Exit code 1 where there are errors, and with --fix where they are not mended in the copy.

`tunesmith validate my.jsonl --task chat`

`tunesmith validate my.jsonl --model tiny --fix`"""


@app.command("validate", help=VALIDATE_HELP)
@verb
@recipe_options(only=VALIDATION_FLAGS)
def validate_verb(
    source: Annotated[
        str | None, typer.Argument(metavar="DATASET", help="A file, a folder, a Hub id, or `example:NAME`.")
    ] = None,
    *,
    dataset: Annotated[str | None, typer.Option(help="The same, as an option.")] = None,
    model: Annotated[
        str | None, typer.Option(help="A model whose tokenizer and template the rows are tried with.")
    ] = None,
    fix: Annotated[
        bool, typer.Option("--fix", help="Write a cleaned copy, and a ledger of what became of each row.")
    ] = False,
    output: Annotated[
        str | None, typer.Option(help="File of the copy; by default `<name>.clean.jsonl` beside the file.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Findings of a kind that are kept whole.")] = 100,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes for large files; by default one per processor.")
    ] = None,
    flags: dict[str, Any],
    quiet: bool,
) -> Any:
    """Validate."""
    from tunesmith import api, results

    if (source is None) == (dataset is None):
        raise TunesmithError("Which data set to validate is not clear.", fix="Name one: `validate my.jsonl`.")
    if output and not fix:
        raise TunesmithError("--output is where --fix writes to.", fix="Give --fix as well, or neither.")
    with Display(quiet=quiet) as display:
        report = api.validate(
            source or str(dataset),
            task=flags.pop("task", None),
            settings=flags,
            model=model,
            fix=fix,
            output=output,
            limit=limit,
            processes=processes or os.cpu_count() or 1,
            watch=display,
        )
    # What is wrong with rows is not in the copy; what is wrong with the whole file is.
    mended = bool(report.fixed and report.fixed["file"]) and not any(
        found.row is None and found.severity == "error" for found in report.findings
    )
    return {**report.as_dict(), "exit_code": int(report.has_errors and not mended)}, results.report_text(
        report
    )


@app.command("chat", help="Talk to a model or a run's model under its own chat template.")
@verb
def chat_verb(
    model: ModelArgument,
    *,
    prompt: Annotated[str | None, typer.Option(help="Ask this once, print the answer and end.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed when temperature is above 0.")] = 0,
    quiet: bool,
) -> Any:
    """Chat."""
    from tunesmith import api, wizard

    if prompt is not None and not prompt.strip():
        raise TunesmithError("--prompt is empty.", fix="Write a question, or leave it out to talk.")
    console = open_console()
    ask = "you> " if wizard.on_terminal() else ""
    talk = api.Chat(model)
    messages = [{"role": "system", "content": system}] if system else []
    from tunesmith.terminal import inert

    shown = inert if sys.stdout.isatty() else str
    remarks: list[str] = []
    if not quiet and prompt is None:
        said = f"{talk.template} /exit or Ctrl-D ends, /new starts afresh."
        console.print(said, style="dim", markup=False, highlight=False)
    while True:
        if prompt is not None:
            question = prompt
        else:
            try:
                question = input(ask).strip()
            except (EOFError, KeyboardInterrupt):
                break
        if question == "/exit":
            break
        if question == "/new":
            messages = messages[:1] if system else []
            continue
        if not question:
            continue
        messages.append({"role": "user", "content": question})
        if remark := talk.remark(messages):
            remarks.append(remark)
            if not quiet:
                console.print(f"[yellow]warning:[/] {escaped(remark)}", highlight=False)
        pieces = []
        for piece in talk.answer(messages, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed):
            pieces.append(piece)
            if not quiet:
                print(shown(piece), end="", flush=True)
        if not quiet:
            print()
        messages.append({"role": "assistant", "content": "".join(pieces)})
        if prompt is not None:
            break
    return {"model": model, "messages": messages, **({"remarks": remarks} if remarks else {})}, None


@app.command("runs", help="List the runs of an output folder with status, scores and size.")
@verb
def runs_verb(
    output_dir: Annotated[str, typer.Argument(help="The output folder.")] = "./fine_tuned_models",
    *,
    quiet: bool,
) -> Any:
    """List runs."""
    from dataclasses import asdict

    from tunesmith import api
    from tunesmith.training.run import dataset_name

    found = api.runs(output_dir)
    table = table_of("run", "state", "model", "dataset", "step", "metric", "base", "tuned", "verdict", "size")
    for run in found:
        table.add_row(
            escaped(run.path.name),
            run.state,
            escaped(dataset_name(run.model)),
            escaped(" + ".join(run.datasets)),
            run.steps,
            run.metric or "",
            score_text(run.base, run.metric),
            score_text(run.tuned, run.metric),
            run.verdict or "",
            size(run.bytes),
        )
    return {"runs": [asdict(run) for run in found]}, table if found else f"No runs in {output_dir}."


MERGE_HELP = """Merge an adapter into its base: whole weights in one folder, checked to answer as both together do.

`tunesmith merge fine_tuned_models/support-lora`"""


@app.command("merge", help=MERGE_HELP)
@verb
def merge_verb(
    model: Annotated[
        str | None, typer.Argument(metavar="[RUN_OR_ADAPTER]", help="A run's or an adapter's folder.")
    ] = None,
    *,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH=WEIGHT", help="A run or adapter of the same base, whose change is added."),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            help="Folder of the merged model; by default `<run>/merged_model` or `<adapter>_merged`."
        ),
    ] = None,
    dtype: DtypeOption = "auto",
    max_shard_size: ShardSizeOption = "5GB",
    check: Annotated[
        str,
        typer.Option(
            metavar="auto|logits|layers",
            help="Whether the whole model is asked beside each layer: if it fits.",
        ),
    ] = "auto",
    rows: Annotated[int, typer.Option(help="Held-out questions that the whole model is asked.")] = 50,
    quiet: bool,
) -> Any:
    """Merge."""
    from tunesmith import api, results

    with Display(quiet=quiet) as display:
        merged = api.merge(
            model,
            adapters=adapter or (),
            output=output,
            dtype=dtype,
            max_shard_size=max_shard_size,
            check=check,
            rows=rows,
            watch=display,
        )
    return merged.as_dict(), results.merged_text(merged)


EXPORT_HELP = """Write a model for another program (GGUF, ONNX, safetensors), and prove that it answers as it did.

`tunesmith export fine_tuned_models/support-lora --quant q8_0`"""


@app.command("export", help=EXPORT_HELP)
@verb
def export_verb(
    model: Annotated[
        str, typer.Argument(metavar="RUN_OR_MODEL", help="A run's, an adapter's or a model's folder.")
    ],
    *,
    to: Annotated[str, typer.Option(metavar="gguf|onnx|safetensors", help="What is written.")] = "gguf",
    quant: Annotated[
        str | None,
        typer.Option(
            metavar="f32|f16|bf16|q8_0|...",
            help="How weights are stored: of GGUF as the `gguf` package can (docs/exporting.md), f16 if not said; of "
            "safetensors the first three, as they were if not said; of ONNX f32.",
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            help="Folder of the file; by default `<run>/exports/<to>-<quant>` or `<model>_<to>-<quant>`."
        ),
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Largest file, of safetensors.")
    ] = "5GB",
    check: Annotated[
        str,
        typer.Option(
            metavar="auto|logits|prompts",
            help="What the file is compared with: the model in float32, in bfloat16 if that does not fit into memory, "
            "else prompts alone; `logits` insists on the first.",
        ),
    ] = "auto",
    rows: Annotated[int, typer.Option(help="Held-out questions that the file is proven with.")] = 50,
    quiet: bool,
) -> Any:
    """Export."""
    from tunesmith import api, results

    with Display(quiet=quiet) as display:
        exported = api.export(
            model,
            to=to,
            quant=quant,
            output=output,
            max_shard_size=max_shard_size,
            check=check,
            rows=rows,
            watch=display,
        )
    return exported.as_dict(), results.exported_text(exported)


JUDGE_HELP = """Let a judge grade answers or compare two models' answers, or recompute the figures of a judgment file.

`tunesmith judge fine_tuned_models/my-run --judge judge.yaml --mode pair`

`tunesmith judge --replay model_judgment/gpt-4_pair.jsonl`"""


@app.command("judge", help=JUDGE_HELP)
@verb
def judge_verb(
    answers: Annotated[
        list[str] | None,
        typer.Argument(help="Answer files in FastChat's JSONL format, runs, or rows.jsonl files."),
    ] = None,
    *,
    judge: JudgeOption = None,
    mode: Annotated[
        str | None,
        typer.Option(
            metavar="single|pair", help="Grade every answer from 1 to 10, or compare models (the default)."
        ),
    ] = None,
    questions: QuestionsOption = None,
    references: ReferencesOption = None,
    baseline: Annotated[
        str | None,
        typer.Option(help="Name of the model that the others are measured against; of a run, base."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder of judgments, figures and plots; by default in the run, or `judged`."),
    ] = None,
    calibrate: Annotated[
        bool, typer.Option(help="First ask the judge about answers of known worth (160 calls).")
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would cost, and ask nobody.")
    ] = False,
    replay: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Recompute every figure of this judgment file, asking no judge."),
    ] = None,
    quiet: bool,
) -> Any:
    """Judge."""
    from tunesmith import api, results
    from tunesmith.evaluation.judging.headline import is_empty
    from tunesmith.evaluation.judging.replay import fastchat_sentences, sentences
    from tunesmith.evaluation.judging.replay import replay as replayed

    if replay is not None:
        of_judges = {
            "answers": answers, "--judge": judge, "--mode": mode, "--references": references, "--output": output,
            "--dry-run": dry_run,
        }  # fmt: skip
        ignored = [name for name, given in of_judges.items() if given]
        if ignored:
            raise TunesmithError(
                f"--replay asks nobody, so that {' and '.join(ignored)} would have no effect.",
                fix=f"leave {' and '.join(ignored)} out, or leave --replay out to ask a judge.",
            )
        found = replayed(replay, questions=questions, baseline=baseline)
        return found, "\n".join([*sentences(found), *fastchat_sentences(found)])
    with Display(quiet=quiet) as display:
        found = api.judge(
            answers or [],
            judge=judge,
            mode=mode or "pair",
            questions=questions,
            references=references,
            baseline=baseline,
            output=output,
            calibrate=calibrate,
            dry_run=dry_run,
            watch=display,
        )
    if dry_run:
        return found, results.forecast_text(found)
    failed = {"exit_code": 1} if is_empty(found) else {}
    return {**found, **failed}, results.judged_text(found, Path(found["output"]))


SERVE_HELP = """Serve a run's model, or any model, with OpenAI's HTTP interface: chat, completions, models, streaming.

`tunesmith serve fine_tuned_models/support-lora --adapter shop=fine_tuned_models/shop-lora`"""


@app.command("serve", help=SERVE_HELP)
@verb
def serve_verb(
    model: Annotated[
        str, typer.Argument(metavar="MODEL_OR_RUN", help="A run's, an adapter's or a model's folder.")
    ],
    *,
    name: Annotated[
        str | None, typer.Option(help="Name that requests ask for; the folder's by default.")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=RUN_OR_ADAPTER", help="Another adapter on the same base; several times."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; other machines reach 0.0.0.0.")
    ] = "127.0.0.1",
    port: PortOption = 8000,
    token_env: TokenOption = None,
    no_token: Annotated[bool, typer.Option("--no-token", help="Answer everybody on this machine.")] = False,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            help="A name under which the server is reached; several times. Also: TUNESMITH_ALLOWED_HOSTS, with spaces "
            "between."
        ),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            metavar="auto|transformers|vllm", help="auto is vLLM where it is installed, fits and has a GPU."
        ),
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(metavar="float32|bfloat16|float16", help="Precision of the weights.")
    ] = "float32",
    temperature: Annotated[
        float, typer.Option(min=0.0, max=2.0, help="Of requests that name none; 0 takes the likeliest token.")
    ] = 0.0,
    concurrency: Annotated[int, typer.Option(help="Requests that are answered at once.")] = 64,
    queue: Annotated[int, typer.Option(help="Requests that wait; one more gets status 429.")] = 256,
    prompt_tokens: Annotated[int, typer.Option(help="Longest prompt.")] = 8192,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, and the default.")] = 1024,
    body_bytes: Annotated[int, typer.Option(help="Largest body of a request.")] = 1_000_000,
    quiet: bool,
) -> Any:
    """Serve."""
    from tunesmith import api

    named: dict[str, str] = {}
    for text in adapter or ():
        key, _, folder = text.partition("=")
        if not key or not folder:
            raise TunesmithError(
                f"--adapter '{text}' is not NAME=RUN_OR_ADAPTER.", fix="Write --adapter shop=RUN."
            )
        if key in named:
            raise TunesmithError(f"Two adapters are named '{key}'.", fix="Give another name.")
        named[key] = folder
    console = open_console()

    def say(sentence: str) -> None:
        if not quiet:
            console.print(sentence, style="dim", markup=False, highlight=False)

    def ready(url: str, token: str | None) -> None:
        console.print(f"Serving at {url} (Ctrl-C ends)", markup=False, highlight=False, soft_wrap=True)
        if token:
            console.print(f"token: {token}", markup=False, highlight=False, soft_wrap=True)

    api.serve(
        model,
        name=name,
        adapters=named,
        host=host,
        port=port,
        token_env=token_env,
        no_token=no_token,
        allowed_hosts=allowed_host or (),
        engine=engine,
        dtype=dtype,
        temperature=temperature,
        limits={
            "concurrency": concurrency,
            "queue": queue,
            "prompt_tokens": prompt_tokens,
            "max_tokens": max_tokens,
            "body_bytes": body_bytes,
        },
        say=say,
        ready=ready,
    )
    return {"model": model}, None


WEB_HELP = """Serve the web workbench: data, recipe, plan, training, evaluation, chat and export in the browser.

`tunesmith web --port 7860 --workspace workbench` prints the address with its token. Training runs in processes of its
own: neither closing the browser nor stopping this command ends it."""


@app.command("web", help=WEB_HELP)
@verb
def web_verb(
    *,
    workspace: Annotated[
        str, typer.Option(metavar="FOLDER", help="Where uploads, recipes, runs and exports are.")
    ] = "workbench",
    host: Annotated[
        str, typer.Option(help="Address to listen at; others reach 0.0.0.0, and then --users is needed.")
    ] = "127.0.0.1",
    port: PortOption = 7860,
    token_env: TokenOption = None,
    users: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Accounts that sign in, each with a workspace of its own."),
    ] = None,
    add_user: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Add an account to --users FILE, its password asked for, and end."),
    ] = None,
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="A name under which the workbench is reached; several times.")
    ] = None,
    key_env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=HOST[:PORT]",
            help="Variable that users' settings may name as a key, and the host that may be sent it; several times.",
        ),
    ] = None,
    run_code: Annotated[
        bool,
        typer.Option(
            "--run-code",
            help="Let users' recipes have the code run that models write, in its sandbox (docs/running-code.md).",
        ),
    ] = False,
    dataset: Annotated[
        str | None, typer.Option(help="Data set that the first page shows, like `example:support`.")
    ] = None,
    quiet: bool,
) -> Any:
    """Serve the workbench."""
    if add_user is not None:
        if users is None:
            raise TunesmithError("--add-user needs the file of accounts.", fix="Give --users FILE.")
        from tunesmith.ui import accounts

        password = typer.prompt(f"Password for {add_user}", hide_input=True, confirmation_prompt=True)
        known = accounts.add(Path(users), add_user, password)
        said = f"{add_user} {'has another password' if known else 'may sign in'}; start the workbench again."
        return {"user": add_user, "changed": known}, said
    from tunesmith import api

    console = open_console()

    def say(sentence: str) -> None:
        if not quiet:
            console.print(sentence, style="dim", markup=False, highlight=False)

    def ready(url: str) -> None:
        console.print(f"The workbench is at {url} (Ctrl-C ends it; training goes on)",
                      markup=False, highlight=False, soft_wrap=True)  # fmt: skip

    api.web(
        workspace,
        host=host,
        port=port,
        token_env=token_env,
        users=users,
        allowed_hosts=allowed_host or (),
        key_envs=key_env or (),
        run_code=run_code,
        recipe={"data": {"dataset": dataset}} if dataset else None,
        say=say,
        ready=ready,
    )
    return {"workspace": workspace}, None


def _one_model(given: str | None, model_path: str | None) -> str:
    """The model as an argument or as the seeds' `--model-path`."""
    if given and model_path and given != model_path:
        raise TunesmithError("Two models are named.", found=f"{given}, {model_path}", fix="Name one.")
    if not (given or model_path):
        raise TunesmithError("Which model is missing.", fix="Name a run or a model's folder.")
    return str(given or model_path)


TRY_HELP = """Try a finished model: files, weights, template, stop tokens, answers, loops, perplexity, speed.

Exit code 1 where one of them is not as it has to be.

`tunesmith test-model fine_tuned_models/support-lora`

`tunesmith test-model fine_tuned_models/support-lora --url http://127.0.0.1:8000/v1 --api-key-env TUNESMITH_TOKEN`"""


@app.command("test-model", help=TRY_HELP)
@verb
def try_model_verb(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[DIR]", help="A run's, an adapter's, a model's or a deployment's folder."),
    ] = None,
    *,
    model_path: ModelPathOption = None,
    dataset: Annotated[
        str | None, typer.Option(help="Rows to ask, instead of the run's held-out ones.")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(metavar="chat|code|instruct|domain", help="Ask the questions that ship for this task."),
    ] = None,
    rows: Annotated[int, typer.Option(help="Questions at most.")] = 12,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer; the run's own, or 256.")] = None,
    url: Annotated[
        str | None, typer.Option(help="Ask the server there too, and compare it token by token.")
    ] = None,
    served_as: Annotated[
        str | None, typer.Option(help="The model's name there; the folder's by default.")
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="Environment variable with the server's token.")
    ] = None,
    quiet: bool,
) -> Any:
    """Try."""
    from tunesmith import api, results

    with Display(quiet=quiet) as display:
        found = api.try_model(
            _one_model(model, model_path),
            dataset=dataset,
            task=task,
            rows=rows,
            max_new_tokens=max_new_tokens,
            url=url,
            served_as=served_as,
            api_key_env=api_key_env,
            watch=display,
        )
    return found.as_dict(), results.tried_text(found)


DEPLOY_HELP = """Make a folder that serves a model elsewhere, and prove it over HTTP: weights, server, page, containers.

`tunesmith prepare-deployment fine_tuned_models/support-lora --output-dir support`"""


@app.command("prepare-deployment", help=DEPLOY_HELP)
@verb
def prepare_deployment_verb(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[RUN_OR_MODEL]", help="A run's, an adapter's or a model's folder."),
    ] = None,
    *,
    output_dir: Annotated[str, typer.Option(help="The folder that is made.")],
    model_path: ModelPathOption = None,
    name: Annotated[
        str | None, typer.Option(help="Name that requests ask for; the run's by default.")
    ] = None,
    dtype: DtypeOption = "auto",
    max_shard_size: ShardSizeOption = "5GB",
    space: Annotated[
        bool, typer.Option("--space", help="With what a Space of the Hugging Face Hub needs.")
    ] = False,
    demo: Annotated[
        str,
        typer.Option(
            metavar="auto|chat|sql",
            help="The page: a chat, or a schema and a question; `auto` as the data is.",
        ),
    ] = "auto",
    check: Annotated[
        str,
        typer.Option(metavar="auto|files", help="Whether the served model is asked: if it fits, or not."),
    ] = "auto",
    rows: Annotated[int, typer.Option(help="Held-out questions that it is proven with.")] = 50,
    despite_findings: Annotated[
        bool, typer.Option("--despite-findings", help="Make it in spite of what was found in it.")
    ] = False,
    quiet: bool,
) -> Any:
    """Prepare."""
    from tunesmith import api, results

    with Display(quiet=quiet) as display:
        made = api.prepare_deployment(
            _one_model(model, model_path),
            output_dir=output_dir,
            name=name,
            dtype=dtype,
            max_shard_size=max_shard_size,
            space=space,
            demo=demo,
            check=check,
            rows=rows,
            despite=despite_findings,
            watch=display,
        )
    return made.as_dict(), results.deployment_text(made)


PUSH_HELP = """Upload a run's final model, or any model's folder, to the Hugging Face Hub, after a search for secrets.

`tunesmith push fine_tuned_models/support-lora me/support --dry-run`"""


@app.command("push", help=PUSH_HELP)
@verb
def push_verb(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_MODEL", help="A run's, an adapter's, a merged model's or a GGUF file's folder."
        ),
    ],
    repository: Annotated[
        str | None, typer.Argument(metavar="[REPO]", help="Repository, `owner/name`.")
    ] = None,
    *,
    hub_model_id: Annotated[str | None, typer.Option(help="The repository, as an option.")] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Create it so that you and yours can read it: the default.")
    ] = False,
    public: Annotated[
        bool,
        typer.Option(
            "--public",
            help="Create it so that everybody can read it; to a public repository nothing is sent without this.",
        ),
    ] = False,
    create: Annotated[bool, typer.Option(help="Create the repository where it is missing.")] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be sent, and send nothing.")
    ] = False,
    despite_findings: Annotated[
        bool, typer.Option("--despite-findings", help="Send it in spite of what was found in it.")
    ] = False,
    quiet: bool,
) -> Any:
    """Push."""
    from tunesmith import api, results

    if repository and hub_model_id and repository != hub_model_id:
        raise TunesmithError(
            "Two repositories are named.", found=f"{repository}, {hub_model_id}", fix="Name one."
        )
    if private and public:
        raise TunesmithError("A repository is --private or --public.", found="both", fix="Give one.")
    wanted = repository or hub_model_id
    if dry_run:
        plan = api.push_plan(run, repository=wanted, private=not public)
        return plan.as_dict(), results.push_text(plan)
    with Display(quiet=quiet) as display:
        address = api.push(
            run, repository=wanted, private=not public, create=create, despite=despite_findings, watch=display
        )
    return {"run": run, "url": address}, address


PULL_HELP = """Fetch a model from the Hugging Face Hub into a folder: weights, settings, tokenizer and card, never code.

`tunesmith pull me/support`

`tunesmith pull support-lora --output support` fetches what the run of that name was pushed to."""


@app.command("pull", help=PULL_HELP)
@verb
def pull_verb(
    repository: Annotated[
        str,
        typer.Argument(
            metavar="REPO",
            help="Repository, `owner/name`, or a run that was pushed from here: its folder or its name.",
        ),
    ],
    *,
    output_dir: Annotated[
        str, typer.Option(metavar="FOLDER", help="Where the run is, when it is given by its name.")
    ] = "./fine_tuned_models",
    output: Annotated[str | None, typer.Option(help="Folder; by default the repository's name.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    quiet: bool,
) -> Any:
    """Pull."""
    from tunesmith import api

    heard: list[Mapping[str, Any]] = [{"value": repository}]

    with Display(quiet=quiet) as display:

        def watch(event: Mapping[str, Any]) -> None:
            heard.append(event)
            display(event)

        folder = api.pull(repository, output=output, revision=revision, output_dir=output_dir, watch=watch)
    return {"repository": heard[-1]["value"], "folder": str(folder)}, str(folder)


@app.command(
    "show",
    help="Show what there is: presets, tasks, recipe, formats, templates, methods, metrics, examples, model, "
    "catalog.",
)
@verb
def show_verb(
    what: Annotated[
        str,
        typer.Argument(
            help="presets | tasks | recipe | formats | templates | methods | metrics | examples | model | catalog"
        ),
    ],
    name: Annotated[
        str | None,
        typer.Argument(
            help="For `model`: a run, folder, Hub id or `tiny`. For `catalog`: a part of it, or a name in it."
        ),
    ] = None,
    *,
    catalog_file: CatalogOption = None,
    quiet: bool,
) -> Any:
    """Show."""
    from tunesmith import api

    with catalog.using(catalog_file):
        entries = api.show(what, name)
    table = table_of("name", "what it is")
    for entry in entries:
        sample = entry.get("sample")
        about = escaped(entry["about"]) + (f"\n[dim]{escaped(sample)}[/]" if sample else "")
        table.add_row(escaped(entry["name"]), about)
    return {what: entries}, table


@app.command("wizard", help="Answer questions step by step; what `tunesmith` alone does on a terminal.")
@verb
def wizard_verb(*, quiet: bool) -> Any:
    """Ask."""
    from tunesmith import wizard

    if quiet or not wizard.on_terminal():
        raise TunesmithError(
            "The wizard asks questions on a terminal, and there is none here.",
            fix="Give the answers as options: `tunesmith train --help`.",
        )
    return wizard.run(), None


def _show_notes(composition: Composition, display: Display) -> None:
    for note in composition.notes:
        display({"kind": "warning", "message": note})


def _names(text: str | None) -> list[str] | None:
    return [name.strip() for name in text.split(",") if name.strip()] if text else None


def main() -> None:
    """Entry point of the `tunesmith` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a message may quote half a character
    libraries.own_process()
    if len(sys.argv) == 1 and sys.stdin.isatty() and sys.stdout.isatty():
        sys.argv.append("wizard")
    app()
