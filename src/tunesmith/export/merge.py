"""Adapters merged into their base: plain weights in one folder, proven to answer as base and adapters do.

    adapters -> the base's tensors, one after the other -> shards, set aside -> every layer asked, as read back
             -> the whole model asked held-out questions, where it fits -> parity.json -> renamed

A folder under the name that was asked for has passed the check.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tunesmith import models
from tunesmith.errors import ModelError, RunError, TunesmithError, nearest
from tunesmith.evaluation.report import told_in_report
from tunesmith.evaluation.unseen import carry_together
from tunesmith.export import parity, weights
from tunesmith.export.card import copy_licences, write_made_card
from tunesmith.export.parity import NEW_TOKENS, VERDICT, Check, Held, Parity, Question
from tunesmith.recipe import QLoRA
from tunesmith.training.lineage import FACTS, packing_behind, run_behind
from tunesmith.training.run import (
    Run,
    check_writable,
    dataset_name,
    open_as_new,
    write_whole,
)

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

CHECKS = ("auto", "logits", "layers")
"""How a merged model is tried: layer by layer always; as a whole where it fits, always, or never."""

MAX_SHARD = 5 * 10**9
"""Largest file of weights, in bytes."""

MAX_PROMPT_TOKENS = 128


@dataclass(frozen=True)
class Part:
    """An adapter that is merged, with the factor of its change and the run that trained it."""

    folder: Path
    weight: float = 1.0
    run: Run | None = None


@dataclass(frozen=True)
class Merged:
    """A merged model's folder and how it came to be."""

    folder: Path
    base: str
    adapter: str
    """Name of the adapter, or the sum of several."""
    run: str | None
    """The run that the adapter is of."""
    dtype: str
    parameters: int
    shards: tuple[str, ...]
    parity: Parity
    notes: tuple[str, ...] = ()

    @property
    def check(self) -> Check | None:
        """The whole model against base and adapter; None where it was too large to be asked."""
        return self.parity.check

    def as_dict(self) -> dict[str, Any]:
        """The result as `--json` prints it."""
        proof = self.parity.as_dict()
        return {**asdict(self), "folder": str(self.folder), "parity": proof, "check": proof["check"]}


@dataclass(frozen=True)
class Made:
    """Whole weights with all that belongs to them in a folder, layer by layer tried but not yet as a model."""

    base: str
    dtype: str
    parameters: int
    shards: tuple[str, ...]
    layers: weights.Layers | None
    """None where they were merged in memory."""
    kind: models.Kind
    tokenizer: Any
    skeleton: Any
    """The model without its weights."""
    reference: Callable[[], Any] | str
    """Gives base and adapters, loaded; or why there is no such thing."""
    computed: str
    """Type in which that computes."""
    notes: tuple[str, ...]


def adapter_of(model: str | Path, run: Run | None) -> Path:
    """The adapter's folder behind a run, or a folder that is one.

    Raises ModelError where there is none (a run that trained the weights themselves names where they are), and
    RunError for a run without a final model.
    """
    if run and run.path == Path(model).expanduser() and not run.final_model.is_dir():
        raise run.unfinished()
    folder = Path(models.locate(str(model)))
    if not folder.is_dir():
        raise ModelError(
            f"'{model}' is not a folder on this machine.",
            fix="Download the adapter first (`hf download OWNER/NAME --local-dir FOLDER`) and give the folder.",
        )
    models.check_as_written(folder)
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


def weighted(adapter: str) -> tuple[str, float]:
    """`PATH=0.6` in its parts; a path alone, even one with such a name, has the weight 1."""
    path, equals, weight = adapter.rpartition("=")
    if not equals or Path(adapter).expanduser().is_dir():
        return adapter, 1.0
    try:
        return path, float(weight)
    except ValueError:
        raise TunesmithError(
            f"The weight of the adapter {path} is not a number.", found=weight, fix="Write it like PATH=0.6."
        ) from None


def check_dtype(dtype: str) -> None:
    """Raises TunesmithError for a type that merged weights are not stored in."""
    if dtype not in ("auto", *DTYPES):
        raise TunesmithError(f"Weights are not stored as '{dtype}'.", fix=nearest(dtype, ("auto", *DTYPES)))


def free_place(folder: Path, *, option: str = "--output") -> Path:
    """The folder, where nothing is in the way of writing it. Raises RunError where something is; `option` names it."""
    if folder.is_dir() and any(folder.iterdir()):
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8])
        raise RunError(f"The folder {folder} is not empty.", found=found, fix=f"Give another {option}.")
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file.", fix=f"Give another {option}.")
    check_writable(folder.parent, fix=f"Give {option} with a folder that can be written.")
    return folder


def merge(
    parts: Sequence[Part],
    folder: Path,
    *,
    dtype: str = "auto",
    max_shard: int = MAX_SHARD,
    check: str = "auto",
    whole: Path | None = None,
    held: Callable[[Any, Any], Held],
    progress: Callable[[str, str, str], None],
    counted: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Merged:
    """Merge adapters into their base and write the whole model to `folder`, checked.

    The change of several adapters is the sum of each one's, times its weight: what PEFT's `add_weighted_adapter`
    computes with `cat`, exactly, and with `linear` only roughly. `dtype` is how weights are stored: `auto` as the
    base's are, of a base that was trained on in 4 bits as the adapter's are. `whole` is a folder of whole weights that
    is written anew, without adapters. `held` gives the questions that the whole
    model is asked, `check` is one of `CHECKS`. `progress` is told a name, a value and the reason. Works on the CPU; the
    sums are done in float32. Raises ModelError where the base is missing, needs code of its own or is stored
    quantized, and where a check fails: the folder then gets the ending `.failed`.
    """
    if check not in CHECKS:
        raise TunesmithError(f"A merged model is not tried by '{check}'.", fix=nearest(check, CHECKS))
    run = parts[0].run if len(parts) == 1 else run_behind(whole) if whole else None
    staging = folder.with_name(f".{folder.name}.tmp")
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(staging, ignore_errors=True)
    try:
        made = make(
            parts, staging, dtype=dtype, max_shard=max_shard, whole=whole, progress=progress, counted=counted
        )
        notes = list(made.notes)
        verdict = replace(_proven(made, staging, check, held, progress, counted), artefact=folder.name)
        write_whole(staging / VERDICT, json.dumps(verdict.as_dict(), indent=1))
        merged = Merged(
            folder=folder,
            base=shareable(made.base),
            adapter=sum_of(parts) if parts else "",
            run=run.path.name if run else None,
            dtype=made.dtype,
            parameters=made.parameters,
            shards=made.shards,
            parity=verdict,
            notes=tuple(notes),
        )
        origin = {"run_folder": _way(folder, run.path)} if run else {}
        facts = {**merged.as_dict(), "folder": folder.name, **origin}
        write_whole(staging / FACTS, json.dumps(facts, indent=1))
        if whole:
            said = f"These are the weights of `{merged.base}`, stored in {made.dtype}."
        else:
            what = "the adapter" if len(parts) == 1 else "the sum of adapters"
            said = f"This is {what} `{merged.adapter}` merged into `{merged.base}`, stored in {made.dtype}."
        checks = [
            f"Checked against {'them' if whole else 'base and adapter'}: {s}." for s in verdict.sentences()
        ]
        write_made_card(staging, run, merged.base, [said, *checks], notes, kind=made.kind)
        if not verdict.passed:
            failed = put_in_place(staging, folder, passed=False)
            raise ModelError(
                "The merged model does not answer as base and adapter do.",
                found="; ".join(verdict.problems()),
                fix=f"It is kept in {failed} to look at; use the adapter as it is"
                + (", or store it as it is computed: --dtype float32." if made.dtype != "float32" else "."),
            )
        put_in_place(staging, folder, passed=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        told_in_report(run, progress)
    return merged


def make(
    parts: Sequence[Part],
    folder: Path,
    *,
    dtype: str = "auto",
    max_shard: int = MAX_SHARD,
    whole: Path | None = None,
    progress: Callable[[str, str, str], None],
    counted: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Made:
    """Write a base with adapters put in, its tokenizer, settings and licence files to a new folder, and check it layer
    by layer. The caller puts the folder in its place."""
    import torch

    base, revision = (str(whole), None) if whole else _common_base(parts)
    adapter = whole or parts[0].folder
    config = models.configuration(base, revision=revision)
    if getattr(config, "quantization_config", None):
        raise ModelError(
            f"The base {base} is stored quantized, and an adapter is merged into whole weights.",
            found=f"quantization_config in {base}",
            fix="Set base_model_name_or_path in adapter_config.json to the model that it was quantized from.",
        )
    quantized, trained_as = _quantized(parts)
    stored, why = _stored(dtype, config, adapter, is_quantized=quantized is not None)
    named = "as it was given" if whole else "as the adapter names it"
    progress("base", base, named + (f", revision {revision}" if revision else ""))
    progress("dtype", stored, why)
    opened = [weights.opened(part.folder, part.weight) for part in parts]
    if len(parts) > 1:
        progress(
            "adapters", sum_of(parts), "changes are added up, as PEFT's add_weighted_adapter does with `cat`"
        )
    tokenizer = models.load_tokenizer(str(adapter if models.has_tokenizer(adapter) else base))
    kind = models.kind(str(adapter))
    progress("template", *models.settle_template(tokenizer, is_pair=kind == "seq2seq"))
    is_new_head = bool(parts) and kind == "reward" and models.kind(base, revision=revision) != "reward"
    head: models.Head | None = "score" if is_new_head else None
    files = models.folder_of(base, revision=revision)
    skeleton = models.outline(base, revision=revision, head=head).eval()
    source = weights.source_of(files, skeleton, quantized=quantized, dtype=trained_as)
    notes = []
    if quantized:
        notes.append(
            "the adapter was trained on a 4-bit base and is merged into these weights, rounded to 4 bits and back: "
            "what was measured is what is stored"
        )
    reference: Callable[[], Any] | str = partial(models.load_model, base)
    if parts:
        reference = _reference(parts, opened, base, revision, quantized, trained_as, head)
    folder.mkdir()
    in_the_way = weights.obstacle(source, opened)
    layers = None
    if in_the_way is None:
        progress("merged", "tensor by tensor", "memory holds one shard and one matrix")
        written = weights.write(
            source, opened, folder, dtype=stored, max_shard=max_shard,
            progress=lambda done, total: counted("merge", done, total),
        )  # fmt: skip
        layers = weights.checked(source, opened, written, folder, dtype=stored)
        parameters, shards = written.parameters, written.shards
        _settle_configuration(skeleton, tokenizer, stored, unties=written.unties)
        skeleton.config.save_pretrained(folder)
        if skeleton.can_generate():
            skeleton.generation_config.save_pretrained(folder)
        model_config = skeleton.config
    else:
        if quantized or isinstance(reference, str):
            raise ModelError("These adapters cannot be merged.", found=in_the_way, fix="Merge one at a time.")
        progress("merged", "in memory", in_the_way)
        notes.append(f"merged in memory and not tensor by tensor: {in_the_way}")
        model = models.merged(reference()) if parts else reference()
        model_config = model.config
        models.set_stop_tokens(model, tokenizer)
        model = model.to(getattr(torch, stored))
        parameters = sum(p.numel() for p in model.parameters())
        model.save_pretrained(folder, max_shard_size=max_shard)
        shards = tuple(sorted(p.name for p in folder.glob("*.safetensors")))
        del model
        gc.collect()
    if _without_code(model_config, tokenizer):
        notes.append("the configuration named code of its own; that is left out, transformers has the model")
        model_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    copy_licences(files, folder)
    if left := carry_together([part.folder for part in parts] or [adapter], folder):
        notes.append(f"what {', '.join(left)} learned from is not known here: `evaluate` cannot leave it out")
    if unknown := [
        part.folder.name for part in parts if not part.run and not models.read_packing(part.folder)
    ]:
        notes.append(
            f"no run is behind {', '.join(unknown)} and no {models.PACKING} beside it, so the base is taken as a whole "
            "one; if it was packed into 4 bits in training, these weights answer otherwise than what was trained"
        )
    return Made(
        base,
        stored,
        parameters,
        shards,
        layers,
        kind,
        tokenizer,
        skeleton,
        reference,
        trained_as,
        tuple(notes),
    )


def sum_of(parts: Sequence[Part]) -> str:
    """The name of one adapter, or of the sum of several with their weights."""
    if len(parts) == 1 and parts[0].weight == 1:
        return parts[0].folder.name
    names = [part.run.path.name if part.run else part.folder.name for part in parts]
    return " + ".join(f"{part.weight:g} x {name}" for part, name in zip(parts, names, strict=True))


def _common_base(parts: Sequence[Part]) -> tuple[str, str | None]:
    base, revision = models.base_of(parts[0].folder)
    marks = {models.fingerprint(base, revision=revision)}
    for part in parts[1:]:
        other, of_revision = models.base_of(part.folder)
        marks.add(models.fingerprint(other, revision=of_revision))
        if (other, of_revision) != (base, revision) and len(marks) > 1:
            raise ModelError(
                "Adapters of different bases are not added up.",
                found=f"{parts[0].folder.name} is of {base}, {part.folder.name} of {other}",
                fix="Merge each into its own base.",
            )
    return base, revision


def _quantized(parts: Sequence[Part]) -> tuple[QLoRA | None, str]:
    """How the base was packed into 4 bits in training, and what type it had before: as the file beside an adapter
    says, or the run behind one that has none. (None, "float32") for a whole one, and where nobody says."""
    found = [packing_behind(part.folder, part.run) for part in parts]
    if len(set(found)) > 1:
        raise ModelError(
            "Adapters of a 4-bit base and of a whole one are not added up: their bases differ.",
            found=", ".join(part.folder.name for part in parts),
            fix="Merge those of one kind, or train the other ones on the same base.",
        )
    packing = next(iter(found), None)
    if packing is None:
        return None, "float32"
    return QLoRA(double_quantization=packing.double_quantization), packing.dtype


def _reference(
    parts: Sequence[Part],
    opened: Sequence[weights.Adapter],
    base: str,
    revision: str | None,
    quantized: QLoRA | None,
    trained_as: str,
    head: models.Head | None,
) -> Callable[[], Any] | str:
    """Base and adapters as PEFT puts them together."""
    is_one = len(parts) == 1 and parts[0].weight == 1
    if is_one and not quantized:
        return partial(models.load_model, str(parts[0].folder))
    if not is_one and not all(adapter.is_plain for adapter in opened):
        return "PEFT adds up no adapters but those that are two matrices for each layer"

    def together() -> Any:
        import peft

        own = models.load_model(
            base,
            revision=revision,
            dtype=trained_as if quantized else "float32",
            quantize=quantized,
            head=head,
        )
        if quantized:
            own = peft.prepare_model_for_kbit_training(own, use_gradient_checkpointing=False)
        names = [f"part{n}" for n in range(len(parts))]
        tuned = peft.PeftModel.from_pretrained(own, str(parts[0].folder), adapter_name=names[0])
        for name, part in zip(names[1:], parts[1:], strict=True):
            tuned.load_adapter(str(part.folder), adapter_name=name)
        if not is_one:
            given = [part.weight for part in parts]
            tuned.base_model.add_weighted_adapter(names, given, "sum", combination_type="cat")
            tuned.set_adapter("sum")
        return tuned.eval()

    return together


def put_in_place(staging: Path, folder: Path, *, passed: bool) -> Path:
    """Give a finished folder its name or, where it did not pass, that name with the ending `.failed`.

    Its files get the mode that a new one has here: safetensors writes them for their owner alone.
    """
    open_as_new(staging)
    final = folder
    if not passed:
        final = folder.with_name(f"{folder.name}.failed")
        shutil.rmtree(final, ignore_errors=True)
    elif folder.is_dir():
        folder.rmdir()
    staging.rename(final)
    return final


def reference_of(source: Path, run: Run | None, *, dtype: str = "float32") -> tuple[Any, str]:
    """The model as its run measured it, and the type in which it is computed: whole weights, or an adapter on the base
    that it was trained on. What is made of `source` has to answer like this.

    The type is `dtype`, but for QLoRA, whose base is packed into 4 bits and computed as it was in training.
    """
    if not (source / "adapter_config.json").is_file():
        return models.load_model(str(source), dtype=dtype).eval(), dtype
    parts = [Part(source, run=run)]
    quantized, trained_as = _quantized(parts)
    if not quantized:
        return models.load_model(str(source), dtype=dtype).eval(), dtype
    found = _reference(parts, [], *models.base_of(source), quantized, trained_as, None)
    assert not isinstance(found, str), "one adapter is always PEFT's"
    return found().eval(), trained_as


def _settle_configuration(skeleton: Any, tokenizer: Any, stored: str, *, unties: bool) -> None:
    """What the merged model's configuration says that its base's does not."""
    import torch

    config = skeleton.config
    config.dtype = getattr(torch, stored)
    config.architectures = [type(skeleton).__name__]
    if unties:
        config.tie_word_embeddings = False
    if hasattr(skeleton, "_shift_right") and config.decoder_start_token_id is None:
        config.decoder_start_token_id = config.pad_token_id
    models.set_stop_tokens(skeleton, tokenizer)


def _proven(
    made: Made,
    folder: Path,
    check: str,
    held: Callable[[Any, Any], Held],
    progress: Callable[[str, str, str], None],
    counted: Callable[[str, int, int], None],
) -> Parity:
    """The verdict on a merged folder: prompts by its own tokenizer, layers, and the whole model where it fits."""
    room = parity.room_for(4 * made.parameters, 4 * made.parameters)
    why = made.reference if isinstance(made.reference, str) else None
    if why is None and check == "layers":
        why = "as asked for, layers were checked and not the whole model"
    if why is None and check == "auto" and not room.suffices:
        why = f"the whole model was not asked: that takes {room}"
    if why is not None and made.layers is None:
        why = None  # nothing else has looked at it
    if why is not None:
        progress("check", "layer by layer", why)
        asked = held(made.skeleton, made.tokenizer)
        return parity.of_prompts(folder, asked.questions, quant=made.dtype, layers=made.layers, unproven=why)
    assert not isinstance(made.reference, str), "without layers there is a model to compare with"
    model = made.reference().eval()
    asked = held(model, made.tokenizer)
    return parity.of_folder(
        model,
        made.tokenizer,
        folder,
        asked,
        quant=made.dtype,
        layers=made.layers,
        reference=made.computed,
        progress=lambda done: counted("parity", done, len(asked.questions)),
    )


def _stored(asked: str, config: Any, adapter: Path, *, is_quantized: bool) -> tuple[str, str]:
    """Type of the stored weights, and why."""
    check_dtype(asked)
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


def _asked(tokenizer: Any, model: Any, *, is_pair: bool) -> list[list[int]]:
    """Token ids of `PROMPTS`, whose ends are cut off so that an answer has room."""
    from tunesmith.data import pairs, templates
    from tunesmith.data.examples import Message, Unusable
    from tunesmith.generation import context_length

    limit = context_length(model)
    most = MAX_PROMPT_TOKENS if limit is None else max(1, min(MAX_PROMPT_TOKENS, limit - NEW_TOKENS))
    form = pairs if is_pair else templates
    found = []
    for text in PROMPTS:
        try:
            ids = form.prompt_ids((Message("user", text),), tokenizer)
        except Unusable:  # a template that wants more than a question; any tokens will do here
            ids = tokenizer(text).input_ids
        found.append(list(ids)[:most])
    return found


def shipped_questions(tokenizer: Any, model: Any, *, is_pair: bool) -> list[Question]:
    """The questions that are asked where no run is behind a model, with the text that stands for them."""
    from tunesmith.data.examples import Message, Prompt, Row

    found = []
    for number, (text, ids) in enumerate(
        zip(PROMPTS, _asked(tokenizer, model, is_pair=is_pair), strict=True)
    ):
        prompt = Prompt((Message("user", text),), "", Row("shipped", number))
        try:
            found.append(Question(tuple(ids), parity.text_of(prompt, tokenizer), prompt))
        except Exception:  # a template that refuses a lone question, with whatever error it raises
            found.append(Question(tuple(ids), text))
    return found


def _without_code(config: Any, tokenizer: Any) -> bool:
    """Take out what would make a loader ask for code; whether there was any."""
    had = bool(getattr(config, "auto_map", None)) or "auto_map" in tokenizer.init_kwargs
    if getattr(config, "auto_map", None):
        del config.auto_map
    tokenizer.init_kwargs.pop("auto_map", None)
    return had


def shareable(base: str) -> str:
    """A Hub id as it is, a folder by its name: what is written into the model travels with it."""
    return dataset_name(base) if Path(base).expanduser().is_dir() else base


def _way(folder: Path, run: Path) -> str:
    """From a merged folder to its run, so that both can move together."""
    import os

    return Path(os.path.relpath(run.resolve(), folder.resolve())).as_posix()
