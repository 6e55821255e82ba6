"""An adapter merged into its base: plain weights in one folder, proven to answer as base and adapter do.

    adapter -> base + adapter answer some prompts -> merged, saved aside -> the same prompts, read back -> renamed

A folder under the name that was asked for has passed the check.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith import models
from tunesmith.errors import ModelError, RunError, TunesmithError, nearest
from tunesmith.evaluation.unseen import CARRIED
from tunesmith.export.card import write_merged_card
from tunesmith.export.parity import NEW_TOKENS, TOLERANCES, Check, Question, answered, checked, difference
from tunesmith.recipe import QLoRA
from tunesmith.training.run import Run, dataset_name, is_run, open_run, write_whole

if TYPE_CHECKING:
    from tunesmith.data.examples import Prompt

FACTS = "merge.json"
"""What a merged folder was made from and what the check found, in that folder."""

WEIGHTS = "adapter_model.safetensors"

PROMPTS = (
    "What is the capital of France?",
    "Summarize in one sentence: the meeting was moved from Monday to Thursday because two people were ill.",
    "Write a list of three colors.",
    "1, 2, 3, 4,",
)
"""What is asked where no run with held-out questions is behind the adapter."""

DTYPES = ("float32", "float16", "bfloat16")
"""How merged weights can be stored."""

NUM_PROMPTS = 4
MAX_PROMPT_TOKENS = 128


@dataclass(frozen=True)
class Merged:
    """A merged model's folder and how it came to be."""

    folder: Path
    base: str
    adapter: str
    run: str | None
    """The run that the adapter is of."""
    dtype: str
    parameters: int
    check: Check
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The result as `--json` prints it."""
        return {
            **asdict(self),
            "folder": str(self.folder),
            "check": {**asdict(self.check), "passed": self.check.passed},
        }


def adapter_of(model: str | Path, run: Run | None) -> Path:
    """The adapter's folder behind a run, or a folder that is one.

    Raises ModelError where there is none (a run that trained the weights themselves names where they are), and
    RunError for a run without a final model.
    """
    if run and run.path == Path(model).expanduser() and not run.final_model.is_dir():
        best = run.best_model if run.best_model.is_dir() else None
        raise RunError(
            f"The run {run.path} has no final model.",
            found=f"state '{run.state()}'",
            fix=f"`tunesmith resume {run.path}`"
            + (f", or merge its best model so far: {best}." if best else "."),
        )
    folder = Path(models.locate(str(model)))
    if not folder.is_dir():
        raise ModelError(
            f"'{model}' is not a folder on this machine.",
            fix="Download the adapter first (`hf download OWNER/NAME --local-dir FOLDER`) and give the folder.",
        )
    if not (folder / "adapter_config.json").is_file():
        what = (
            f"adapter kind '{run.recipe().adapter.kind}'" if run else "whole weights, no adapter_config.json"
        )
        raise ModelError(
            f"There is nothing to merge in {model}: it has no adapter.",
            found=what,
            fix=f"Its weights are whole as they are, in {folder}.",
        )
    if not (folder / WEIGHTS).is_file():
        raise ModelError(
            f"The adapter {folder} has no {WEIGHTS}.",
            found=", ".join(sorted(p.name for p in folder.iterdir())[:8]),
            fix="Only safetensors are read; save the adapter as such.",
        )
    return folder


def free_place(folder: Path) -> Path:
    """The folder, where nothing is in the way. Raises RunError where something is."""
    if folder.is_dir() and any(folder.iterdir()):
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8])
        raise RunError(f"The folder {folder} is not empty.", found=found, fix="Give another --output.")
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file.", fix="Give another --output.")
    return folder


def merge(
    adapter: Path,
    folder: Path,
    *,
    run: Run | None = None,
    dtype: str = "auto",
    progress: Callable[[str, str, str], None],
) -> Merged:
    """Merge an adapter's folder into its base and write the whole model to `folder`, checked.

    `run` is the one that trained it, if any. `dtype` is how weights are stored: `auto` as the base's are, of a
    base that was trained on in 4 bits as the adapter's are. `progress` is told a name, a value and the reason.
    Works on the CPU, in float32. Raises ModelError where the base is missing, needs code of its own or is
    stored quantized, and where the check fails: the folder then gets the ending `.failed`.
    """
    import torch

    base, revision = base_of(adapter)
    config = models.configuration(base, revision=revision)
    if getattr(config, "quantization_config", None):
        raise ModelError(
            f"The base {base} is stored quantized, and an adapter is merged into whole weights.",
            found=f"quantization_config in {base}",
            fix="Set base_model_name_or_path in adapter_config.json to the model that it was quantized from.",
        )
    is_quantized = run is not None and isinstance(run.recipe().adapter, QLoRA)
    stored, why = _stored(dtype, config, adapter, is_quantized=is_quantized)
    progress("base", base, "as the adapter names it" + (f", revision {revision}" if revision else ""))
    progress("dtype", stored, why)
    notes = []
    if is_quantized:
        notes.append(
            "the adapter was trained and measured on a 4-bit base and is merged into the whole weights: its scores "
            "are not quite the run's; `tunesmith compare` measures how far they are apart"
        )

    tokenizer = models.load_tokenizer(str(adapter if has_tokenizer(adapter) else base))
    kind = models.kind(str(adapter))
    is_pair = kind == "seq2seq"
    progress("template", *settled(tokenizer, is_pair))
    model = models.load_model(str(adapter)).eval()
    if not hasattr(model.base_model, "merge_and_unload"):
        of_type = next(iter(model.peft_config.values())).peft_type
        raise ModelError(
            f"An adapter of the type {getattr(of_type, 'value', of_type)} is no change of weights, so it cannot be "
            "merged.",
            found=str(adapter / "adapter_config.json"),
            fix="Use it as it is: `tunesmith chat` and transformers load it on its base.",
        )
    asked = _asked(run, tokenizer, model, is_pair=is_pair)
    before = answered(model, tokenizer, asked)
    model = models.merged(model)
    if _without_code(model.config, tokenizer):
        notes.append("the configuration named code of its own; that is left out, transformers has the model")
    models.set_stop_tokens(model, tokenizer)
    model = model.to(getattr(torch, stored))
    parameters = sum(p.numel() for p in model.parameters())

    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        del model
        gc.collect()
        after = answered(
            models.load_model(str(staging)).eval(), tokenizer, asked, along=[answer.ids for answer in before]
        )
        differences = [difference(one, other) for one, other in zip(before, after, strict=True)]
        check = checked(differences, tolerance=TOLERANCES[stored])
        merged = Merged(
            folder=folder,
            base=_shareable(base),
            adapter=adapter.name,
            run=run.path.name if run else None,
            dtype=stored,
            parameters=parameters,
            check=check,
            notes=tuple(notes),
        )
        origin = {"run_folder": _way(folder, run.path)} if run else {}
        facts = {**merged.as_dict(), "folder": folder.name, **origin}
        write_whole(staging / FACTS, json.dumps(facts, indent=1))
        if (adapter / CARRIED).is_file():
            shutil.copy2(adapter / CARRIED, staging / CARRIED)
        said = [f"This is the adapter `{adapter.name}` merged into `{merged.base}`, stored in {stored}.",
                f"Checked against base and adapter, both in float32: {check.sentence()}."]  # fmt: skip
        write_merged_card(staging, run, merged.base, said, notes, kind=kind)
        if not check.passed:
            failed = folder.with_name(f"{folder.name}.failed")
            shutil.rmtree(failed, ignore_errors=True)
            staging.rename(failed)
            raise ModelError(
                "The merged model does not answer as base and adapter do.",
                found=check.sentence(),
                fix=f"It is kept in {failed} to look at; use the adapter as it is"
                + (", or store it as it is computed: --dtype float32." if stored != "float32" else "."),
            )
        if folder.is_dir():
            folder.rmdir()
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return merged


def base_of(adapter: Path) -> tuple[str, str | None]:
    """The base that an adapter names, and its revision. Raises ModelError where it is not there."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    if not base:
        raise ModelError(
            f"The adapter {adapter} names no base.",
            found="adapter_config.json without base_model_name_or_path",
            fix="Write the folder or Hub id of its base there.",
        )
    revision = config.get("revision")
    try:
        models.locate(base, revision=revision)
    except ModelError as error:
        raise ModelError(
            f"The base of the adapter {adapter} is missing: {base}.",
            found=error.found or error.problem,
            fix="Put it back, or write where it is now as base_model_name_or_path into adapter_config.json.",
        ) from None
    return base, revision


def _stored(asked: str, config: Any, adapter: Path, *, is_quantized: bool) -> tuple[str, str]:
    """Type of the stored weights, and why."""
    if asked not in ("auto", *DTYPES):
        raise TunesmithError(f"Weights are not stored as '{asked}'.", fix=nearest(asked, ("auto", *DTYPES)))
    if asked != "auto":
        return asked, "as asked for"
    if is_quantized:
        from safetensors import safe_open

        with safe_open(adapter / WEIGHTS, framework="pt") as weights:
            own = str(weights.get_tensor(next(iter(weights.keys()))).dtype).removeprefix("torch.")
        return (own if own in DTYPES else "float32"), "that of the adapter; its base was quantized"
    own = str(getattr(config, "dtype", None)).removeprefix("torch.")
    if own in DTYPES:
        return own, "that of the base's weights"
    return "float32", "the base's configuration names none of " + ", ".join(DTYPES)


def has_tokenizer(folder: Path) -> bool:
    """Whether a model's folder brings a tokenizer of its own."""
    return any((folder / name).is_file() for name in models.TOKENIZER_FILES)


def settled(tokenizer: Any, is_pair: bool) -> tuple[str, str]:
    """Settle the chat template that goes with a model; where it is and why."""
    from tunesmith.data import pairs
    from tunesmith.data.templates import set_template

    return "saved with it", (pairs.settle_template if is_pair else set_template)(tokenizer, None)


def _asked(run: Run | None, tokenizer: Any, model: Any, *, is_pair: bool) -> list[list[int]]:
    """Token ids of the prompts that both models are asked: held-out questions of the run, or else `PROMPTS`.

    Their ends are cut off so that an answer has room.
    """
    from tunesmith.data import pairs, templates
    from tunesmith.data.examples import Message, Unusable
    from tunesmith.generation import context_length

    limit = context_length(model)
    most = MAX_PROMPT_TOKENS if limit is None else max(1, min(MAX_PROMPT_TOKENS, limit - NEW_TOKENS))
    form = pairs if is_pair else templates
    found = []
    for text in (_held_out(run) or PROMPTS)[:NUM_PROMPTS]:
        try:
            ids = form.prompt_ids((Message("user", text),), tokenizer)
        except Unusable:  # a template that wants more than a question; any tokens will do here
            ids = tokenizer(text).input_ids
        found.append(list(ids)[:most])
    return found


def question_text(prompt: Prompt, tokenizer: Any) -> str:
    """What a server is sent for a question: the conversation as the chat template writes it."""
    messages = [{"role": m.role, "content": m.content} for m in prompt.messages]
    text: str = tokenizer.apply_chat_template(
        messages, tools=list(prompt.tools) or None, tokenize=False, add_generation_prompt=True
    )
    return text


def shipped_questions(tokenizer: Any, model: Any, *, is_pair: bool) -> list[Question]:
    """The questions that are asked where no run is behind a model, with the text that stands for them."""
    from tunesmith.data.examples import Message, Prompt, Row

    found = []
    for number, (text, ids) in enumerate(
        zip(PROMPTS, _asked(None, tokenizer, model, is_pair=is_pair), strict=True)
    ):
        prompt = Prompt((Message("user", text),), "", Row("shipped", number))
        found.append(Question(tuple(ids), question_text(prompt, tokenizer)))
    return found


def _held_out(run: Run | None) -> list[str]:
    """Questions that the run has been measured on, for as far as they can be read."""
    from tunesmith.evaluation.rows import read_rows

    try:
        rows = read_rows(run.evaluation / "rows.jsonl") if run else []
    except RunError:
        rows = []
    return list(dict.fromkeys(row.prompt_text for row in rows if row.prompt_text.strip()))


def _without_code(config: Any, tokenizer: Any) -> bool:
    """Take out what would make a loader ask for code; whether there was any."""
    had = bool(getattr(config, "auto_map", None)) or "auto_map" in tokenizer.init_kwargs
    if getattr(config, "auto_map", None):
        del config.auto_map
    tokenizer.init_kwargs.pop("auto_map", None)
    return had


def _shareable(base: str) -> str:
    """A Hub id as it is, a folder by its name: what is written into the model travels with it."""
    return dataset_name(base) if Path(base).expanduser().is_dir() else base


def _way(folder: Path, run: Path) -> str:
    """From a merged folder to its run, so that both can move together."""
    import os

    return Path(os.path.relpath(run.resolve(), folder.resolve())).as_posix()


def run_of(folder: Path) -> tuple[str, Path] | None:
    """Name and folder of the run that a merged model is from; None where it is no such model."""
    try:
        facts: Mapping[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        return str(facts["run"]), (folder / facts["run_folder"]).resolve()
    except (OSError, ValueError, KeyError, TypeError):
        return None


def run_behind(model: str | Path) -> Run | None:
    """The run that a model is, was merged from, or lies in: `final_model`, `best_model` or a checkpoint of it.

    A plain copy of a final model is known by the file that it carries, where its run lies beside it or in `runs`.
    """
    path = Path(model).expanduser()
    origin = run_of(path)
    places = (*([origin[1]] if origin else []), path, *path.parents[:2], *_originals(path))
    return next((open_run(folder) for folder in places if is_run(folder)), None)


def _originals(copy: Path) -> list[Path]:
    """Runs near a copied model whose own final model carries just the same."""
    try:
        own = (copy / CARRIED).read_bytes()
        name = Path(str(json.loads(own)["run"])).name
    except (OSError, ValueError, KeyError, TypeError):
        return []
    near = [Path("runs"), *copy.absolute().parents[:3], *(p / "runs" for p in copy.absolute().parents[:3])]
    found = []
    for run in (place / name for place in near):
        file = run / "final_model" / CARRIED
        if file.is_file() and file.read_bytes() == own:
            found.append(run)
    return found
