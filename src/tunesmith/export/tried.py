"""Whether a model's folder works: whole, loadable, asked under its own template, and answering sensibly.

    files -> weights -> template -> ends -> answers (ended, not empty, no loops) -> perplexity -> speed

Every check says what it found; one that fails fails the whole. A number that is only to be known fails nothing.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tunesmith import evaluation, models
from tunesmith.data import pairs, templates
from tunesmith.data.examples import Message, Prompt, Row, Unusable
from tunesmith.data.templates import end_of_turn_ids
from tunesmith.errors import ModelError, TunesmithError, counted, size
from tunesmith.evaluation import Item, measuring
from tunesmith.evaluation.forgetting import general_texts
from tunesmith.evaluation.report import told_in_report
from tunesmith.export import merge, parity
from tunesmith.export.deployment import MANIFEST
from tunesmith.export.held import held_for
from tunesmith.export.parity import Parity
from tunesmith.generation import Generated, context_length, generate
from tunesmith.models import Kind
from tunesmith.serving import smoke_test
from tunesmith.training.lineage import run_behind_folder
from tunesmith.training.run import (
    Run,
    Watch,
    deciding,
    is_run,
    open_run,
    unwritable,
    warning,
    write_whole,
)

TASK_PROMPTS = {
    "chat": ("Hello! Can you help me?", "What could I cook with rice and two eggs?", "Thank you. What is your name?",
             "I cannot sleep. What can I do?"),
    "code": ("Write a Python function that reverses a string.", "Write a SQL query that counts the rows of users.",
             "What does `x = [n * n for n in range(5)]` do in Python?", "Write a shell command that lists all files."),
    "instruct": ("Name the three primary colors.", "Rewrite in a polite way: give me the report now.",
                 "Summarize in one sentence: the train was late because snow had blocked the tracks.",
                 "Write a list of four fruits."),
    "domain": ("Explain in two sentences what this field is about.", "What is the most important term here, and why?",
               "The first step is", "In summary,"),
}  # fmt: skip
"""By task, what is asked where there are no held-out rows."""

LEAST_ENDED = 0.5
"""Share of the answers that have to end by themselves: a model that was tuned to answer stops."""
MOST_LOOPS = 0.25
"""Share of the answers that may go round in circles."""
TURNS, LEAST = 4, 12
"""A loop at an answer's end: the same tokens, however many, `TURNS` times or more in a row, `LEAST` together."""
SPAN, MOST_SAID = 8, 0.5
"""A loop anywhere: of all `SPAN` tokens in a row more than this share were there before, `LEAST` or more of them."""


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    check: str
    passed: bool
    said: str


@dataclass(frozen=True)
class Sample:
    """A question with its answer."""

    question: str
    answer: str
    finish_reason: str
    loops: bool
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Tried:
    """All that was found about a model's folder."""

    folder: str
    findings: tuple[Finding, ...]
    samples: tuple[Sample, ...] = ()
    perplexity: float | None = None
    perplexity_on: str | None = None
    """Whose perplexity that is."""
    first_token_seconds: float | None = None
    """Median over the questions."""
    answer_seconds: float | None = None
    tokens_per_second: float | None = None
    """Of all answers, one at a time, as the first user of a server would see it."""
    device: str | None = None
    served: Mapping[str, Any] | None = None
    """The verdict on a server that was asked the same."""

    @property
    def passed(self) -> bool:
        """Whether every check did."""
        return all(finding.passed for finding in self.findings)

    @property
    def is_whole(self) -> bool:
        """Whether there is a model with a template, whatever it answers."""
        return all(f.passed for f in self.findings if f.check in ("files", "weights", "template")) and any(
            f.check == "template" for f in self.findings
        )

    def as_dict(self) -> dict[str, Any]:
        """The result as `--json` prints it; it ends with exit code 1 where a check failed."""
        return {
            **asdict(self),
            "passed": self.passed,
            "failed": [finding.check for finding in self.findings if not finding.passed],
            **({} if self.passed else {"exit_code": 1}),
        }


@dataclass(frozen=True)
class Questions:
    """What the model is asked, and on what its perplexity is taken."""

    turns: Sequence[tuple[Message, ...]]
    where: str
    """From where the questions are, for people."""
    new_tokens: int
    perplexity: Callable[[Any, Any], tuple[float | None, str]]
    """(model, tokenizer) -> the value, and of what it is."""
    on_references: bool = False
    """Whether that is of answers that the model was tuned to give."""


@dataclass(frozen=True)
class Place:
    """Where a model lies that is tried."""

    folder: Path
    run: Run | None = None
    """The run behind it."""
    hashes: Callable[[], str] | None = None
    """Compares the files of a deployment with its manifest."""
    served_as: str | None = None
    """The name under which a deployment serves it."""
    task: str | None = None
    """What a deployment's model was tuned for, where questions ship for that."""


def place_of(model: str | Path) -> Place:
    """Where a run's model, an adapter, whole weights or those of a deployment lie.

    Raises ModelError for a deployment whose manifest is damaged, and RunError for a run without a final model.
    """
    path = Path(model).expanduser()
    run = run_behind_folder(path)
    packed = path / MANIFEST
    if (path / "model").is_dir() and not is_run(path) and packed.is_file():
        try:
            manifest = json.loads(packed.read_text(encoding="utf-8"))
            name, _ = str(manifest["name"]), manifest["files"]
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"{packed} is damaged.", found=repr(error)[:200], fix="Copy the folder again."
            ) from None
        task = manifest.get("task") if manifest.get("task") in TASK_PROMPTS else None
        return Place(path / "model", run, partial(_compared, path, manifest), name, task)
    if not path.is_dir():
        return Place(models.folder_of(str(model)), run)
    own = path / "final_model"
    if is_run(path) and not own.is_dir():
        raise open_run(path).unfinished()
    return Place(own if own.is_dir() else path, run)


def _compared(folder: Path, manifest: Mapping[str, Any]) -> str:
    try:
        return smoke_test.check_files(folder, manifest)
    except smoke_test.Failed as failure:
        raise ModelError("The folder is not as it was packed.", found=str(failure)) from None


def tried(
    folder: Path,
    *,
    hashes: Callable[[], str] | None = None,
    device: str,
    questions: Callable[[Any, Any], Questions],
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Tried:
    """Try a model's folder. `hashes` compares its files with a manifest, where there is one; `questions` gives for a
    model and its tokenizer what it is asked."""
    findings: list[Finding] = []

    def done(**more: Any) -> Tried:
        return Tried(folder.name, tuple(findings), **more)

    def check(name: str, work: Callable[[], tuple[Any, str]]) -> Any:
        try:
            value, said = work()
        except ModelError as error:
            said = "; ".join(filter(None, (error.problem, error.found, error.fix)))
            findings.append(Finding(name, False, said))
            return None
        findings.append(Finding(name, True, said))
        return value

    if check("files", lambda: (True, _files(folder, hashes))) is None:
        return done()
    model = check("weights", lambda: _weights(folder, device))
    tokenizer = check("template", lambda: _template(folder))
    if tokenizer is not None:
        check("ends", lambda: (True, _ends(folder, tokenizer)))
    if model is None or tokenizer is None:
        return done()
    if models.is_reward(model):
        check("scores", lambda: (True, _scores(model, tokenizer)))
        return done(device=device)
    asked = questions(model, tokenizer)
    samples, firsts = _answers(model, tokenizer, asked, progress)
    findings += _judged(samples, asked)
    value, on = asked.perplexity(model, tokenizer)
    if value is not None:
        vocabulary = model.get_input_embeddings().weight.shape[0]
        findings.append(_perplexity(value, on, vocabulary, on_references=asked.on_references))
    tokens, seconds = sum(s.tokens for s in samples), sum(s.seconds for s in samples)
    speed = tokens / seconds if seconds else None
    if firsts:
        findings.append(
            Finding(
                "speed",
                True,
                f"first token after {1000 * statistics.median(firsts):.0f} ms, whole answer after "
                f"{1000 * statistics.median(s.seconds for s in samples):.0f} ms (medians), {speed or 0:.1f} tokens/s "
                f"one at a time in float32 on {device}",
            )
        )
    return done(
        samples=tuple(samples),
        perplexity=value,
        perplexity_on=on,
        first_token_seconds=statistics.median(firsts) if firsts else None,
        answer_seconds=statistics.median(s.seconds for s in samples) if samples else None,
        tokens_per_second=speed,
        device=device,
    )


def _files(folder: Path, hashes: Callable[[], str] | None) -> str:
    """What is needed is there, and is what the manifest says."""
    place = Path(models.locate(str(folder)))
    is_adapter = (place / "adapter_config.json").is_file()
    needed = ["adapter_config.json", "adapter_model.safetensors"] if is_adapter else ["config.json"]
    missing = [name for name in needed if not (place / name).is_file()]
    if not is_adapter and not list(place.glob("*.safetensors")):
        missing.append("model.safetensors")
    if not any((place / name).is_file() for name in models.TOKENIZER_FILES):
        missing.append("tokenizer.json")
    if missing:
        raise ModelError(
            "The folder is not whole.",
            found=f"no {', no '.join(missing)}",
            fix="Copy it again, or run `tunesmith merge` again.",
        )
    held = sum(path.stat().st_size for path in place.iterdir() if path.is_file())
    said = f"{'an adapter' if is_adapter else 'whole weights'}, {size(held)}"
    return said if hashes is None else f"{said}; {hashes()}"


def _weights(folder: Path, device: str) -> tuple[Any, str]:
    """The model, of whose weights none is missing, made up or not a number."""
    import torch

    began = time.perf_counter()
    place = Path(models.locate(str(folder)))
    is_adapter = (place / "adapter_config.json").is_file()
    model = models.load_model(str(place), device=device)
    missing = _not_taken(model, place) if is_adapter else _made_up(model, place)
    if missing:
        raise ModelError(
            "Weights are missing, or have no place: they would be drawn at random or left out.",
            found=f"{counted(len(missing), 'tensor')}: {', '.join(missing[:3])}",
            fix="Copy the folder again, or save it with the transformers that made it.",
        )
    broken = [name for name, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
    if broken:
        raise ModelError(
            "Weights are not numbers.",
            found=f"{counted(len(broken), 'tensor')}: {', '.join(broken[:3])}",
            fix="Train again from the last checkpoint whose loss was a number.",
        )
    count = sum(p.numel() for p in model.parameters())
    return model.eval(), (
        f"{type(model).__name__}, {count:,} parameters, all there and finite, loaded in "
        f"{time.perf_counter() - began:.1f} s"
    )


def _made_up(model: Any, folder: Path) -> list[str]:
    """Tensors of a model that its files do not hold, by what transformers says on loading."""
    from tunesmith.export import weights

    held = set(weights.source_of(folder, model).names.values())
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    missing = sorted(set(model.state_dict()) - held - tied)
    if not missing:
        return []
    # Some families' files name weights otherwise than their models do; transformers knows which.
    _, info = type(model).from_pretrained(
        str(folder), output_loading_info=True, use_safetensors=True, trust_remote_code=False
    )
    return sorted(info["missing_keys"])


def _not_taken(model: Any, folder: Path) -> list[str]:
    """Tensors of an adapter that its base has no place for, and those that its file lacks: PEFT leaves the first out
    and makes the others up, with a warning."""
    import peft

    from tunesmith.untrusted import header

    own = set(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
    kept = header(folder / "adapter_model.safetensors")
    return sorted({name for name in kept if ".lora_" in name and name not in own} | (set(own) - set(kept)))


def _template(folder: Path) -> tuple[Any, str]:
    """The tokenizer, with a chat template of its own that takes a question."""
    place = Path(models.locate(str(folder)))
    tokenizer = models.load_tokenizer(str(place))
    if not tokenizer.chat_template:
        raise ModelError(
            "The folder has no chat template, so every program would ask the model in its own way.",
            found="no chat_template.jinja and none in tokenizer_config.json",
            fix="Copy chat_template.jinja of the run's final model here, or `tunesmith merge` again.",
        )
    form = pairs if models.kind(str(place)) == "seq2seq" else templates
    try:
        ids = list(form.prompt_ids((Message("user", "Hello"),), tokenizer))
    except Unusable as reason:
        return tokenizer, f"a template of its own, which refuses a lone question: {reason}"
    return tokenizer, f"a template of its own; a question of one word is {counted(len(ids), 'token')}"


def _ends(folder: Path, tokenizer: Any) -> str:
    """Other programs stop where generation_config.json says: it has to be where the template ends a turn."""
    place = Path(models.locate(str(folder)))
    ours = end_of_turn_ids(tokenizer)
    if not ours:
        raise ModelError(
            "Nothing ends an answer.",
            found="no end-of-text token",
            fix="Set eos_token in tokenizer_config.json.",
        )
    words = ", ".join(map(str, tokenizer.convert_ids_to_tokens(list(ours))))
    file = place / "generation_config.json"
    if (place / "adapter_config.json").is_file():
        return f"answers end at {words}; an adapter has no generation_config.json to say so to others"
    try:
        said = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
    except ValueError as error:
        raise ModelError("generation_config.json is damaged.", found=str(error)) from None
    named = set(said if isinstance(said, list) else [said]) - {None}
    if lacking := [token for token in ours if token not in named]:
        raise ModelError(
            "Other programs would write on where an answer ends.",
            found=f"generation_config.json ends answers at {sorted(named) or 'nothing'}, the template at {list(ours)}",
            fix=f"Write eos_token_id: {sorted({*named, *lacking})} there; `tunesmith merge` does.",
        )
    return f"answers end at {words}, for other programs as well"


def _scores(model: Any, tokenizer: Any) -> str:
    from tunesmith.scoring import RewardModel

    asked = [(Message("user", "What is the capital of France?"),)] * 2
    one, other = RewardModel(model, tokenizer).scores(asked, ["Paris.", "x x x x"])
    if not (math.isfinite(one) and math.isfinite(other)):
        raise ModelError("A score is not a number.", found=f"{one}, {other}")
    return f"a reward model: it gives scores ({one:.3g} and {other:.3g}), and writes no answers"


def _answers(
    model: Any, tokenizer: Any, asked: Questions, progress: Callable[[str, int, int], None]
) -> tuple[list[Sample], list[float]]:
    """Each question's greedy answer, one at a time, with its seconds, and those to the first token."""
    form = pairs if models.is_seq2seq(model) else templates
    stop_ids = end_of_turn_ids(tokenizer)
    samples, firsts = list[Sample](), list[float]()

    def written(ids: Sequence[int], most: int) -> tuple[Generated, float]:
        began = time.perf_counter()
        [found] = generate(model, tokenizer, [ids], max_new_tokens=most, stop_ids=stop_ids, batch_tokens=1)
        return found, time.perf_counter() - began

    for number, turns in enumerate(asked.turns, start=1):
        try:
            ids = list(form.prompt_ids(turns, tokenizer))
        except Unusable:
            continue  # counted by what is missing
        if not firsts:
            written(ids, 1)  # what is loaded at the first call is no model's speed
        firsts.append(written(ids, 1)[1])
        found, seconds = written(ids, asked.new_tokens)
        samples.append(
            Sample(
                turns[-1].content, found.text, found.finish_reason, loops(found.ids), len(found.ids), seconds
            )
        )
        progress("answers", number, len(asked.turns))
    return samples, firsts


def loops(ids: Sequence[int]) -> bool:
    """Whether an answer says the same again and again (degenerate repetition, arXiv 1904.09751).

    Either it ends in the same tokens in a row, or most of it has been said before (arXiv 1908.04319), with something
    between or behind: long passages that come again, and lists whose lines differ in little.
    """
    spans = [tuple(ids[at : at + SPAN]) for at in range(len(ids) - SPAN + 1)]
    again = len(spans) - len(set(spans))
    if again >= LEAST and again > MOST_SAID * len(spans):
        return True
    for period in range(1, len(ids) // TURNS + 1):
        length = 0
        while length + period < len(ids) and ids[-1 - length] == ids[-1 - length - period]:
            length += 1
        if length + period >= max(TURNS * period, LEAST):
            return True
    return False


def _judged(samples: Sequence[Sample], asked: Questions) -> list[Finding]:
    total = len(asked.turns)
    refused = total - len(samples)
    empty = sum(not s.answer.strip() for s in samples)
    ended = sum(s.finish_reason == "stop" for s in samples)
    looped = sum(s.loops for s in samples)
    told = f" ({refused} refused by the template)" if refused else ""
    return [
        Finding(
            "answers",
            bool(samples) and not refused and not empty,
            f"{len(samples) - empty} of {counted(total, 'question')} are answered{told}, {asked.where}",
        ),
        Finding(
            "stops",
            ended >= LEAST_ENDED * len(samples),
            f"{ended} of {counted(len(samples), 'answer')} end by themselves within "
            f"{counted(asked.new_tokens, 'token')}; at least {LEAST_ENDED:.0%} have to",
        ),
        Finding(
            "loops",
            looped <= MOST_LOOPS * len(samples),
            f"{looped} of {counted(len(samples), 'answer')} go round in circles; at most {MOST_LOOPS:.0%} may",
        ),
    ]


def _perplexity(value: float, on: str, vocabulary: int, *, on_references: bool) -> Finding:
    """A model that finds its own references less likely than one that finds all tokens alike is broken: a wrong
    tokenizer, or random weights. Text of another kind it may have forgotten."""
    return Finding(
        "perplexity",
        math.isfinite(value) and (value < vocabulary or not on_references),
        f"{value:,.2f} {on}; {vocabulary:,} is that of a guess among all tokens",
    )


def verdict(found: Tried) -> str:
    """What the checks come to, and no more than that."""
    names = [finding.check for finding in found.findings]
    if failed := [finding.check for finding in found.findings if not finding.passed]:
        return f"FAILED: {', '.join(failed)}, of {counted(len(names), 'check')} made"
    return (
        f"passed: {', '.join(names)}. That it works is shown by this, and not that its answers are right: "
        "`tunesmith evaluate` and `tunesmith compare` measure that"
    )


def of_items(items: Sequence[Item], on: str) -> Callable[[Any, Any], tuple[float | None, str]]:
    """What takes the perplexity of references."""

    def taken(model: Any, tokenizer: Any) -> tuple[float | None, str]:
        usable = [item for item in items if not item.error and item.labels]
        if not usable:
            return None, "nothing to take it of"
        rows = evaluation.evaluate(model, tokenizer, usable, name="model", metrics=["perplexity"])
        return evaluation.value(rows, "perplexity"), on

    return taken


def sentences(found: Tried) -> list[tuple[str, str]]:
    """The result for people: a word and a line each."""
    lines = [(f.check, f"{'' if f.passed else 'FAILED: '}{f.said}") for f in found.findings]
    shown = [("asked", s.question) for s in found.samples[:2]]
    answers = [("answer", s.answer or "(nothing)") for s in found.samples[:2]]
    return [*lines, *(pair for both in zip(shown, answers, strict=True) for pair in both)]


def asked_of(task: str | None) -> tuple[list[tuple[Message, ...]], str]:
    """The questions that ship for a task, or for none."""
    texts: Mapping[str, Sequence[str]] = TASK_PROMPTS
    given = texts.get(task or "", merge.PROMPTS)
    where = f"which ship for the task '{task}'" if task in texts else "which ship for any task"
    return [(Message("user", text),) for text in given], where


def questions_for(
    model_or_run: Run | Path,
    dataset: str | None,
    task: str | None,
    model: Any,
    tokenizer: Any,
    *,
    rows: int,
    max_new_tokens: int | None,
    watch: Watch,
) -> Questions:
    """Held-out questions of a run or a data set, where there are any, else those that ship."""
    kind: Kind = "seq2seq" if models.is_seq2seq(model) else "causal"
    run = model_or_run if isinstance(model_or_run, Run) else None
    if (run and task is None) or dataset:
        model_asked = model_or_run.path if isinstance(model_or_run, Run) else model_or_run
        try:
            _, questions = measuring.questions_for([model_asked], dataset, None, None, watch, rows=rows)
        except TunesmithError as error:
            if dataset:
                raise
            warning(watch)(f"The run's held-out rows cannot be asked: {error.problem}")
        else:
            recipe = questions.recipe
            items = evaluation.items(
                questions.examples, tokenizer, loss_on=recipe.method.loss_on, max_length=recipe.data.max_length,
                kind=kind,
            )  # fmt: skip
            turns = [item.prompt.messages for item in items if item.prompt and not item.error]
            where = f"held-out rows of {run.path.name}" if run and not dataset else f"rows of {dataset}"
            if turns:
                return Questions(
                    turns,
                    where,
                    max_new_tokens or recipe.evaluation.max_new_tokens,
                    of_items(items, "on their references"),
                    on_references=True,
                )
    asked, where = asked_of(task)
    general = evaluation.items(general_texts(), tokenizer, kind=kind)
    return Questions(
        asked[:rows], where, max_new_tokens or 256, of_items(general, "on general text that ships")
    )


def with_server(
    found: Tried,
    place: Place,
    asked: Questions | None,
    url: str,
    name: str,
    *,
    api_key_env: str | None,
    by_its_run: bool,
    rows: int,
    watch: Watch,
) -> Tried:
    """What was found about a model, and whether the server at an address answers as it does; see `_served_verdict`."""

    def told(passed: bool, said: str) -> tuple[Finding, ...]:
        return (*found.findings, Finding("served", passed, said))

    if not found.is_whole or asked is None:
        why = "not asked: there is no model here to compare it with, or one that answers nothing"
        return replace(found, findings=told(False, why))
    try:
        verdict = _served_verdict(
            place.run, place.folder, url, name, api_key_env, asked,
            by_its_run=by_its_run, rows=rows, watch=watch,
        )  # fmt: skip
    except ModelError as error:
        why = "; ".join(filter(None, (error.problem, error.found, error.fix)))
        return replace(found, findings=told(False, why))
    said = "; ".join(verdict.problems() or verdict.sentences())
    return replace(found, findings=told(bool(verdict.passed), said), served=verdict.as_dict())


def _served_verdict(
    run: Run | None,
    folder: Path,
    url: str,
    name: str,
    api_key_env: str | None,
    tried_with: Questions,
    *,
    by_its_run: bool,
    rows: int,
    watch: Watch,
) -> Parity:
    """The verdict on a served endpoint, against the model in this process, which was asked the same.

    Where those are questions of its run (`by_its_run`), they are scored as well, and the verdict is kept with the run.
    """
    (model, computed), tokenizer = merge.reference_of(folder, run), models.load_tokenizer(str(folder))
    is_pair = bool(model.config.is_encoder_decoder)
    models.settle_template(tokenizer, is_pair=is_pair)
    if run and by_its_run:
        asked = replace(held_for(run, model, tokenizer, rows, watch), new_tokens=tried_with.new_tokens)
    else:
        form, questions = pairs if is_pair else templates, list[parity.Question]()
        for number, turns in enumerate(tried_with.turns):
            prompt = Prompt(tuple(turns), "", Row("asked", number))
            try:
                ids = tuple(form.prompt_ids(prompt.messages, tokenizer))
            except Unusable:
                continue  # counted among the answers
            questions.append(parity.Question(ids, parity.text_of(prompt, tokenizer), prompt))
        unscored = f"asked were {len(questions)} questions, {tried_with.where}"
        asked = parity.Held(questions, tried_with.new_tokens, lambda numbers, own, others: (None, unscored))
    context = None if is_pair else context_length(model)
    stored = str(getattr(models.configuration(str(folder)), "dtype", None)).removeprefix("torch.")
    found = parity.verdict(
        model,
        tokenizer,
        parity.server_reader(url, name, tokenizer, api_key_env=api_key_env, length=context),
        asked,
        artefact=f"served endpoint '{name}'",
        quant=stored if stored in parity.TOLERANCES else "float32",
        context=context,
        reference=computed,
    )
    if run and by_its_run:
        file = run.path / "exports" / "served" / parity.VERDICT
        if found.passed or not file.is_file():
            if why := unwritable(run.path):
                warning(watch)(f"The run does not keep this verdict: {why}.")
            else:
                write_whole(file, json.dumps(found.as_dict(), indent=1))
                told_in_report(run, deciding(watch))
        else:
            warning(watch)(
                "The run's report keeps its earlier verdict: this address may be that of another model."
            )
    return found
