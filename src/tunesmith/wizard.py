"""The guided session of `tunesmith` without arguments: seven steps of questions, then a run like any other.

    model -> data -> baseline -> LoRA -> training -> comparison -> upload

Every answer is a field of one recipe, and the verbs of `api` do the work. Enter takes the default in
brackets, `back` returns to the step before, `quit` and Ctrl-C end and say what is kept. Nothing heavy
is imported before a step needs it.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.compose import Composition, compose, overlaid
from tunesmith.errors import Interrupted, ModelError, TunesmithError, counted
from tunesmith.finetuner import GRADIENT_ACCUMULATION, NEW_TOKENS, get_user_input

if TYPE_CHECKING:
    from tunesmith.api import Result
    from tunesmith.evaluation import EvalRow

QUESTIONS = 100
"""Held-out questions that are asked unless another number is given."""

OF_THE_DATA = (
    "Enter dataset config",
    "Load specific file from repo? (yes/no)",
    "Enter file or pattern",
    "Enter split",
    "Column of the question",
    "Column of the answer",
)
"""Questions whose answers hold for one data set only."""


class Back(Exception):
    """The user wants the step before."""


class Quit(Exception):
    """The user wants to end."""


@dataclass(frozen=True)
class Measured:
    """What the base model answered, and the parts of the recipe and the rows that this belongs to."""

    parts: Any
    rows: list[EvalRow]
    result: Result


@dataclass
class Session:
    """What was answered so far, and what came of it."""

    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """A sparse part of the recipe for each step, so that going back replaces just that part."""
    answers: dict[str, str] = field(default_factory=dict)
    """Earlier answers by question: the defaults when a step comes again. A default that was taken is none,
    because another model or data set may have another one."""
    dataset: str | None = None
    """The data set that those of OF_THE_DATA are about."""
    context: int | None = None
    """Context length of the model, in tokens."""
    targets: str = ""
    """Where the adapter sits on this model, in a sentence."""
    measured: Measured | None = None
    started: Path | None = None
    """Folder of the run that was started last."""
    result: Result | None = None

    def composed(self) -> Composition:
        """The recipe of all answers so far."""
        return compose(overlaid(*self.layers.values()))


def on_terminal() -> bool:
    """Whether there is somebody to ask."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def run() -> dict[str, Any]:
    """Walk through the steps; gives the folder of the run that was started, if one was."""
    session = Session()
    say("[bold]tunesmith[/]: fine-tune a model in seven steps, and see whether it got better.", markup=True)
    say(
        "[dim]Enter takes the default in brackets, Tab completes, `back` returns to the step before, `quit` ends.[/]",
        markup=True,
    )
    number = 0
    with completion():
        try:
            while number < len(STEPS):
                title, step = STEPS[number]
                for later, _ in STEPS[number:]:
                    # What was answered there before may belong to another model or another data set.
                    session.layers.pop(later.lower(), None)
                say(f"\n[bold]Step {number + 1} of {len(STEPS)}: {title}[/]", markup=True)
                try:
                    step(session)
                    number += 1
                except Back:
                    number = max(number - 1, 0)
                except Interrupted:
                    raise
                except TunesmithError as error:
                    for line in error.lines():
                        say(line, style="red")
        except (Quit, KeyboardInterrupt, Interrupted):
            say("\n" + kept(session))
            return _payload(session)
    for line in ending(session):
        say(line)
    return _payload(session)


def kept(session: Session) -> str:
    """What remains of a session that was ended early."""
    from tunesmith.training.run import Run, is_run

    if session.started is None or not is_run(session.started):
        return "Ended. Nothing was written."
    run, place = Run(session.started), shlex.quote(str(session.started))
    if run.state() == "done":
        return f"Ended. Kept: the finished run {session.started}.\n" + "\n".join(ending(session))
    saved = sorted(p.name for p in run.checkpoints.iterdir()) if run.checkpoints.is_dir() else []
    what = f"with {', '.join(saved)}" if saved else "without a checkpoint"
    return f"Ended. Kept: the run {session.started}, {what}.\nIt goes on with  tunesmith resume {place}"


def ending(session: Session) -> list[str]:
    """Where the recipe is, and the one command that does all of it again."""
    if session.started is None:
        return []
    recipe = session.started / "recipe.yaml"
    again = free_name(session.started)
    return [
        f"recipe    {recipe}",
        f"again     tunesmith train {shlex.quote(str(recipe))} --name {shlex.quote(again.name)}",
        f"chat      tunesmith chat {shlex.quote(str(session.started))}",
    ]


def _payload(session: Session) -> dict[str, Any]:
    return {"run": str(session.started) if session.started else None}


def model_step(session: Session) -> None:
    """Which model, and where the result goes."""
    from tunesmith import models

    def found(text: str) -> str:
        models.locate(text)
        models.check_writes(text)  # an encoder and a reward model, which write nothing, are refused here
        return text

    say("A folder, a Hub id, a finished run, or `tiny`, which ships with tunesmith.", style="dim")
    base = ask(session, "Enter model name", "gpt2", found, lambda text: [*_paths(text), "tiny"])
    place = "Enter output directory"
    if place in session.answers:  # since then a training may have written there
        session.answers[place] = _free(session.answers[place])
    folder = Path(ask(session, place, _free("./finetuned_model"), _free_folder, _paths))
    say("Looking at the model ...", style="dim")
    from tunesmith.generation import context_length

    outline = models.outline(base)
    session.context = context_length(outline)
    facts = models.describe(outline)
    context = f", {session.context:,} tokens of context" if session.context else ""
    say(f"{facts.architecture}: {facts.parameters:,} parameters in {facts.layers} layers{context}")
    where = "attention"
    try:
        targets = models.target_modules(outline, where)
        session.targets = "The adapter sits on the attention's matrices: "
    except ModelError as error:
        where = "all-linear"
        targets = models.target_modules(outline, where)
        session.targets = f"{error.problem} So the adapter sits on all linear layers: "
    session.targets += ", ".join(targets)
    session.layers["model"] = {
        "model": {"base": base},
        "method": {"kind": "seq2seq" if models.kind(base) == "seq2seq" else "sft"},
        "adapter": {"kind": "lora", "targets": where},
        "output_dir": str(folder.parent),
        "name": folder.name,
    }


def data_step(session: Session) -> None:
    """Which examples, how many, how long, and how they are read."""
    from tunesmith import catalog
    from tunesmith.assets import EXAMPLES
    from tunesmith.data import OPENING, formats, sources
    from tunesmith.data.shaping import SHAPING, shaped
    from tunesmith.recipe import DataSource

    def found(text: str) -> str:
        sources.locate(str(catalog.resolved({"dataset": text})["dataset"]))
        return text

    names = [*(f"example:{name}" for name in EXAMPLES), *catalog.catalog().datasets]
    say(
        "A file or folder, a name of the catalogue, a Hub id, or `example:support` and others that ship.",
        style="dim",
    )
    dataset = ask(session, "Enter dataset path or name", None, found, lambda t: [*_paths(t), *names])
    if dataset != session.dataset:
        session.dataset = dataset
        for question in OF_THE_DATA:
            session.answers.pop(question, None)
    section: dict[str, Any] = {"dataset": dataset}
    said = catalog.notes(section)
    for note in said:
        say(note)
    if not (said or dataset.startswith("example:") or Path(dataset).expanduser().exists()):
        section["config"] = optional(session, "Enter dataset config")
        if yes(session, "Load specific file from repo?", "no"):
            section["data_files"] = ask(session, "Enter file or pattern", None)
        section["split"] = ask(session, "Enter split", "train")
    if yes(session, "Limit number of samples?", "yes"):
        section["max_rows"] = number(session, "Number of samples", 1000, low=1)
    longest = min(512, session.context or 512)
    length = number(session, "Maximum length in tokens", longest, low=1, high=session.context)
    fields = DataSource.model_validate(section)
    opened = sources.open_source(fields.dataset, **fields.model_dump(include=OPENING))
    source = sources.checked(shaped(opened, **fields.model_dump(include=SHAPING)), fields.dataset)
    columns = list(source.columns)
    say(f"{source.facts.count:,} rows with the columns {', '.join(columns)}")
    try:
        detection = formats.detect(source, format=fields.format)
        say(f"They are read as {' and '.join(f.name for f in detection.formats)}: {detection.reason}.")
    except TunesmithError as error:
        say(error.problem)

        def column(text: str) -> str:
            if text not in columns:
                raise ValueError(f"There is no column '{text}'. Columns there: {', '.join(columns)}.")
            return text

        section["input_text_key"] = ask(session, "Column of the question", None, column, lambda _: columns)
        section["output_text_key"] = ask(session, "Column of the answer", None, column, lambda _: columns)
    session.layers["data"] = {"data": {**section, "max_length": length}}


def baseline_step(session: Session) -> None:
    """How well the base answers questions that training will never see."""
    measure = yes(session, "Measure the model before training, on held-out questions with references?", "yes")
    from tunesmith import api
    from tunesmith.display import Display

    session.layers["baseline"] = {"training": {"mixed_precision": _precision(session)}}
    say("Reading and splitting the data ...", style="dim")
    _, rows = api.plan(session.composed().recipe)
    counts = rows["rows"]
    say(
        f"{counts['rows_in']} rows = {counts['train']} train + {counts['validation']} validation + "
        f"{counts['held_out']} held out + {counts['dropped']} dropped"
    )
    for reason, count in rows["dropped"].items():
        say(f"dropped {count}: {reason}")
    held_out = counts["held_out"]
    if not held_out:
        say("Nothing is held out of so few rows, so nothing will be measured.")
        session.layers["baseline"] |= {"evaluation": {"skip": True}}
        return
    asked, new_tokens = min(QUESTIONS, held_out), NEW_TOKENS
    if measure:
        asked = number(session, "Number of questions", asked, low=1, high=held_out)
        new_tokens = number(session, "Longest answer in tokens", new_tokens, low=1)
    session.layers["baseline"] |= {"evaluation": {"max_items": asked, "max_new_tokens": new_tokens}}
    if not measure:
        questions = counted(asked, "held-out question")
        say(f"After training both are compared on {questions}, with answers of up to {new_tokens} tokens.")
        return
    parts = _measured_parts(session, counts)
    if session.measured and session.measured.parts == parts:
        say("Model, data and questions are as before, so the base is not asked again.")
    else:
        with Display(quiet=False) as display:
            result, base_rows = api.baseline(session.composed().recipe, watch=display)
        session.measured = Measured(parts, base_rows, result)
    say(scores_text(session.measured.result))


def lora_step(session: Session) -> None:
    """Size and place of the adapter."""
    say(session.targets)
    rank = number(session, "LoRA rank (r)", 8, low=1)
    alpha = number(session, "LoRA alpha", 32, low=1)
    dropout = decimal(session, "LoRA dropout", 0.1, low=0.0, below=1.0)
    session.layers["lora"] = {"adapter": {"kind": "lora", "rank": rank, "alpha": alpha, "dropout": dropout}}


def training_step(session: Session) -> None:
    """How long and how fast; the plan; then the training itself."""
    epochs = number(session, "Number of epochs", 3, low=1)
    say(f"A training step learns from {GRADIENT_ACCUMULATION} batches.")
    batch = number(session, "Batch size", 4, low=1)
    rate = decimal(session, "Learning rate", 2e-4, low=0.0, above=True)
    from tunesmith import api
    from tunesmith.display import Display
    from tunesmith.results import plan_text
    from tunesmith.training.run import anchored, folder_name

    session.layers["training"] = {
        "training": {
            "num_epochs": epochs,
            "per_device_train_batch_size": batch,
            "learning_rate": rate,
            "gradient_accumulation_steps": GRADIENT_ACCUMULATION,
            "scheduler": "linear",
            "warmup_steps": 0,
            "mixed_precision": _precision(session),
            "eval_steps": "epoch",
            "save_steps": "epoch",
            "logging_steps": 10,
        }
    }
    composition = session.composed()
    folder = Path(composition.recipe.output_dir) / folder_name(composition.recipe)
    if folder.exists():
        session.layers["training"]["name"] = free_name(folder).name
        composition = session.composed()
        say(f"{folder} is taken, so this run goes to {free_name(folder)}.")
    plan, rows = api.plan(composition.recipe)
    say(plan_text(plan, rows, composition))
    if not yes(session, "Start training?", "yes"):
        session.answers.pop("Start training? (yes/no)", None)
        say("Then once more.")
        return training_step(session)
    recipe = anchored(composition.recipe)
    session.started, session.result = Path(recipe.output_dir) / folder_name(recipe), None
    kept: dict[str, Any] = {}
    if session.measured and session.measured.parts == _measured_parts(session, rows["rows"]):
        kept = {"base_rows": session.measured.rows, "base_check": session.measured.result.engine_check}
    with Display(quiet=False) as display:
        session.result = api.train(recipe, **kept, watch=display)


def comparison_step(session: Session) -> None:
    """Base against tuned on the held-out questions."""
    from tunesmith.results import result_text

    def nothing(text: str) -> None:
        if text:
            raise ValueError("Press Enter, or type `back` or `quit`.")

    assert session.result
    say(result_text(session.result))
    ask(session, "Press Enter to go on", "", nothing)


def upload_step(session: Session) -> None:
    """To the Hub, if wanted."""
    from tunesmith import api

    if not yes(session, "Upload to Hugging Face?", "no"):
        return
    repository = ask(session, "Enter repository (username/repo-name)", None)
    create = yes(session, "Create new repository?", "yes")
    private = yes(session, "Make repository private?", "no")
    token = secret("Enter token (not shown; empty for the Hub's own login)")
    assert session.started
    address = api.push(session.started, repository=repository, private=private, token=token, create=create)
    say(f"Uploaded to {address}")


STEPS: tuple[tuple[str, Callable[[Session], None]], ...] = (
    ("model", model_step),
    ("data", data_step),
    ("baseline", baseline_step),
    ("LoRA", lora_step),
    ("training", training_step),
    ("comparison", comparison_step),
    ("upload", upload_step),
)


def ask(
    session: Session,
    question: str,
    default: str | None,
    check: Callable[[str], Any] = str,
    complete: Callable[[str], Sequence[str]] = lambda text: (),
    *,
    hint: str = "",
) -> Any:
    """An answer that passes its check, asked until one does. Raises Back and Quit when these are typed.

    The default is the answer that was given before, where it still passes.
    """
    shown = default
    if question in session.answers:
        try:
            check(session.answers[question])
            shown = session.answers[question]
        except (TunesmithError, ValueError) as error:
            problem = error.problem if isinstance(error, TunesmithError) else str(error)
            say(f"The answer from before does not fit any more. {problem}", style="dim")
            del session.answers[question]
    asked = f"{question} ({hint})" if hint else question
    while True:
        with offering(complete):
            try:
                text = get_user_input(asked, shown or None) or (shown or "")
            except EOFError:
                raise Quit from None
        _turn(text)
        if not text and shown is None:
            say("An answer is needed here.")
            continue
        try:
            value = check(text)
        except (TunesmithError, ValueError) as error:
            for line in error.lines() if isinstance(error, TunesmithError) else [str(error)]:
                say(line, style="red")
            continue
        if text == default:
            session.answers.pop(question, None)
        else:
            session.answers[question] = text
        return value


def optional(session: Session, question: str) -> str | None:
    """An answer that may be left out; a dash takes an earlier one back."""
    text = ask(session, question, "", hint="- for none" if question in session.answers else "empty for none")
    if text == "-":
        session.answers.pop(question, None)
    return None if text in {"", "-"} else str(text)


def yes(session: Session, question: str, default: str) -> bool:
    """Yes or no."""

    def check(text: str) -> bool:
        if text.lower() not in {"yes", "y", "no", "n"}:
            raise ValueError(f"Answer yes or no; found '{text}'.")
        return text.lower().startswith("y")

    return bool(ask(session, f"{question} (yes/no)", default, check, lambda text: ("yes", "no")))


def number(session: Session, question: str, default: int, *, low: int, high: int | None = None) -> int:
    """A whole number within its bounds."""
    bounds = f"{low:,} or more" if high is None else f"{low:,} to {high:,}"

    def check(text: str) -> int:
        try:
            value = int(text.replace(",", "").replace("_", ""))
        except ValueError:
            value = low - 1
        if value < low or (high is not None and value > high):
            raise ValueError(f"A whole number, {bounds}; found '{text}'.")
        return value

    hint = "" if high is None else bounds
    return int(ask(session, question, str(default), check, hint=hint))


def decimal(
    session: Session,
    question: str,
    default: float,
    *,
    low: float,
    below: float | None = None,
    above: bool = False,
) -> float:
    """A number from `low` (above it, with `above`) up to and without `below`."""
    bounds = f"{'above' if above else 'at least'} {low:g}" + (
        f", below {below:g}" if below is not None else ""
    )

    def check(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if (
            not (value > low if above else value >= low)
            or (below is not None and value >= below)
            or value == float("inf")
        ):
            raise ValueError(f"A number {bounds}; found '{text}'.")
        return value

    return float(ask(session, question, f"{default:g}", check))


def secret(question: str) -> str | None:
    """An answer that is not shown while it is typed; None for nothing."""
    import getpass

    try:
        text = getpass.getpass(f"{question}: ").strip()
    except EOFError:
        raise Quit from None
    _turn(text)
    return text or None


def _turn(text: str) -> None:
    if text.lower() == "back":
        raise Back
    if text.lower() in {"quit", "exit"}:
        raise Quit


def say(text: Any, *, style: str | None = None, markup: bool = False) -> None:
    """Print for the user."""
    from tunesmith.terminal import Console

    Console(soft_wrap=True).print(text, style=style, markup=markup, highlight=False)


def scores_text(result: Result) -> Any:
    """The base's scores with their intervals."""
    from tunesmith.display import score_text, table_of
    from tunesmith.evaluation.metrics import METRICS

    table = table_of("metric", "base model", "95 % interval", "n")
    for name, score in result.scores.items():
        if score["value"] is not None:
            value, low, high = (score_text(score[part], name) for part in ("value", "low", "high"))
            table.add_row(
                METRICS[name].named, value, f"{low} to {high}" if low else "no interval", str(score["n"])
            )
    return table


def free_name(folder: Path) -> Path:
    """The folder itself where it is free, else the first `<name>-2`, `-3` that is."""
    stem = re.sub(r"-\d+$", "", folder.name)
    tries = (folder, *(folder.with_name(f"{stem}-{n}") for n in range(2, 10_000)))
    return next(path for path in tries if not path.exists() or (path.is_dir() and not any(path.iterdir())))


def _free(text: str) -> str:
    """The folder as it is written, or the next one like it that is free."""
    folder = Path(os.path.abspath(Path(text).expanduser()))
    free = free_name(folder)
    if free == folder:
        return text
    return str(free) if text.startswith(("/", "~")) else os.path.relpath(free)


def _free_folder(text: str) -> str:
    folder = Path(os.path.abspath(Path(text).expanduser()))
    free = free_name(folder)
    if free != folder:
        raise ValueError(f"{text} is taken. Free is {free}.")
    return str(folder)


def _precision(session: Session) -> str:
    from tunesmith import plan as planning
    from tunesmith.training import gpu

    if planning.device() != "cuda":
        return "no"
    if gpu.has_bfloat16():
        return "bf16"
    is_seq2seq = session.layers["model"]["method"]["kind"] == "seq2seq"
    return "no" if is_seq2seq else "fp16"  # T5's layers overflow in fp16


def _measured_parts(session: Session, counts: Mapping[str, int]) -> Any:
    """What the base's answers depend on."""
    recipe = session.composed().recipe
    precision = recipe.training.mixed_precision
    return (recipe.model, recipe.data, recipe.method, recipe.evaluation, precision, dict(counts))


def _paths(text: str) -> list[str]:
    """Files and folders that begin like this."""
    typed = os.path.expanduser(text)
    found = sorted(glob.glob(glob.escape(typed) + "*"))
    start = text if typed == text else None
    return [
        ((text + path[len(typed) :]) if start is None else path) + ("/" if os.path.isdir(path) else "")
        for path in found
    ]


_offered: list[Callable[[str], Sequence[str]]] = []


@contextlib.contextmanager
def offering(complete: Callable[[str], Sequence[str]]) -> Iterator[None]:
    """Offer these completions while a question is open."""
    _offered.append(complete)
    try:
        yield
    finally:
        _offered.pop()


def matches(text: str) -> list[str]:
    """What Tab may complete the text to, in the question that is open."""
    words = [*_offered[-1](text), "back", "quit"] if _offered else []
    return [word for word in dict.fromkeys(words) if word.startswith(text)]


@contextlib.contextmanager
def completion() -> Iterator[None]:
    """Tab completion through readline, where the system has it."""
    try:
        import readline
    except ImportError:
        yield
        return

    def completer(text: str, state: int) -> str | None:
        found = matches(text)
        return found[state] if state < len(found) else None

    before = readline.get_completer(), readline.get_completer_delims()
    readline.set_completer(completer)
    readline.set_completer_delims("\t\n")  # paths may hold spaces
    is_libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")
    try:
        yield
    finally:
        readline.set_completer(before[0])
        readline.set_completer_delims(before[1])
