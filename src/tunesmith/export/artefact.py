"""One file that runs elsewhere, made from a run, an adapter or a model's folder, with the verdict beside it.

    adapter -> whole weights -> the target's file -> read back -> parity.json -> renamed

A folder under the name that was asked for has passed; one that has not is kept with the ending `.failed`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tunesmith import models
from tunesmith.data.templates import end_of_turn_ids
from tunesmith.engines import llamacpp
from tunesmith.errors import MissingExtra, ModelError, OutOfResources, TunesmithError, nearest, size
from tunesmith.evaluation.report import told_in_report
from tunesmith.export import card, gguf, graph, merge, ollama, parity, weights
from tunesmith.export.parity import VERDICT, Held
from tunesmith.export.vocabulary import Vocabulary, vocabulary_of
from tunesmith.generation import context_length
from tunesmith.training.run import Run, write_whole

TARGETS = {
    "gguf": "One file for llama.cpp and Ollama, with tokenizer and chat template, and a Modelfile.",
    "onnx": "A graph with its weights for onnxruntime, tokenizer and chat template beside it.",
    "safetensors": "Whole weights for transformers and vLLM, in another type or in smaller files.",
}
"""What a model can be exported to."""

STORED = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "auto": "auto"}
"""How safetensors can be stored, and what the types are called elsewhere; `auto` as they were."""

DEFAULTS = {"gguf": "f16", "onnx": "f32", "safetensors": "auto"}
"""How weights are stored where that is not said."""

MAX_TRIED = 200
"""Held-out texts on which the way to split text is tried, beside those that ship."""


@dataclass(frozen=True)
class Exported:
    """An artefact's folder and its verdict."""

    folder: Path
    file: Path
    target: str
    quant: str
    size: int
    """In bytes."""
    tensors: dict[str, int]
    parity: parity.Parity
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool | None:
        """Whether it answers as the model does; None where it could not be asked, as the verdict's `unproven` says."""
        return self.parity.passed

    def as_dict(self) -> dict[str, Any]:
        """The result as `--json` prints it; it ends with exit code 1 where the verdict is bad. An artefact that could
        not be asked was still written as asked for, and nothing was found wrong: exit code 0 and `passed: null`."""
        return {
            **asdict(self),
            "folder": str(self.folder),
            "file": str(self.file),
            "parity": self.parity.as_dict(),
            "passed": self.passed,
            "unproven": self.parity.unproven if self.passed is None else None,
            **({"exit_code": 1} if self.passed is False else {}),
        }


CHECKS = ("auto", "logits", "prompts")
"""How an artefact is tried: as a whole in float32 or, where that does not fit, in bfloat16, or else by its prompts
alone; always as a whole in float32; by its prompts alone."""

REFERENCES = {"float32": 4, "bfloat16": 2}
"""Types in which the model can be computed that an artefact is compared with, and their bytes for each weight."""


def check_target(target: str, quant: str, check: str = "auto") -> None:
    """Raises before any work for a target, a way to store weights or a check that there is not, or a missing package.
    The check `logits` insists on a proof, and so on who reads the file."""
    import importlib.util

    if target not in TARGETS:
        raise TunesmithError(f"Models are not exported to '{target}'.", fix=nearest(target, TARGETS))
    if check not in CHECKS:
        raise TunesmithError(f"An artefact is not tried by '{check}'.", fix=nearest(check, CHECKS))
    needed = {"gguf": ("gguf",), "onnx": ("onnx", "onnxscript", "onnxruntime")}.get(target, ())
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise MissingExtra(missing[0], f"Writing {target.upper()}", install=f"'tunesmith[{target}]'")
    if target == "gguf" and check == "logits" and not llamacpp.is_installed():
        raise MissingExtra("llama-cpp-python", "Proving a GGUF file", install="'tunesmith[llama-cpp]'")
    if target == "gguf":
        gguf.check_quant(quant)
    elif quant not in (allowed := STORED if target == "safetensors" else ("f32",)):
        raise TunesmithError(f"Weights are not stored as '{quant}' in {target}.", fix=nearest(quant, allowed))


def check_writes(source: Path, target: str) -> None:
    """Raises ModelError before any work for a model that answers nothing: nobody would give its score."""
    if models.kind(str(source)) == "reward":
        raise ModelError(
            f"A reward model is not written as {target.upper()}: it gives a text one score and answers nothing.",
            found=str(source),
            fix="Use `tunesmith export --to safetensors`, or `tunesmith merge`; transformers reads that.",
        )


def export_weights(
    source: Path,
    folder: Path,
    *,
    quant: str,
    run: Run | None,
    max_shard: int,
    check: str = "auto",
    held: Callable[[Any, Any], Held],
    progress: Callable[[str, str, str], None],
    counted: Callable[[str, int, int], None],
) -> Exported:
    """Write an adapter, merged, or a folder of whole weights as safetensors of a type to `folder`, and prove it."""
    merge.free_place(folder)
    is_adapter = (source / "adapter_config.json").is_file()
    merged = merge.merge(
        [merge.Part(source, run=run)] if is_adapter else [],
        folder,
        dtype=STORED[quant],
        max_shard=max_shard,
        check="layers" if check == "prompts" else check,
        whole=None if is_adapter else source,
        held=held,
        progress=progress,
        counted=counted,
    )
    places = weights.places(folder)
    return Exported(
        folder=folder,
        file=folder / merged.shards[0],
        target="safetensors",
        quant=merged.dtype,
        size=sum((folder / shard).stat().st_size for shard in merged.shards),
        tensors={merged.dtype: len(places)},
        parity=merged.parity,
        notes=merged.notes,
    )


def export(
    source: Path,
    folder: Path,
    *,
    to: str = "gguf",
    quant: str,
    run: Run | None,
    check: str = "auto",
    held: Callable[[Any, Any], Held],
    progress: Callable[[str, str, str], None],
    counted: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Exported:
    """Write `source`, a folder of whole weights or an adapter, as GGUF or ONNX to `folder`, and prove it.

    `held` gives, for a model and its tokenizer, the questions to prove it with, `check` is one of `CHECKS`. `progress`
    is told decisions, `counted` how far a stage is. Raises ModelError for a family that cannot be written and a reward
    model, before any work, and OutOfResources where a graph would not fit into memory.
    """
    merge.free_place(folder)
    check_writes(source, to)
    is_adapter = (source / "adapter_config.json").is_file()
    base = str(source) if not is_adapter else models.base_of(source)[0]
    check_family = partial(gguf.writer_of, quant=quant) if to == "gguf" else graph.check_family
    check_family(models.configuration(base), folder=str(source))
    parameters = sum(p.numel() for p in models.outline(base).parameters())
    if to == "onnx":
        _check_room_for_graph(parameters, check)
    name = (run.path.name if run else source.name).replace(" ", "-")
    staging = folder.with_name(f".{folder.name}.tmp")
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        whole, notes, made = source, list[str](), None
        if is_adapter:
            made = merge.make(
                [merge.Part(source, run=run)], staging / "merged", progress=progress, counted=counted
            )
            whole, notes = staging / "merged", list(made.notes)
            if made.layers and not made.layers.passed:
                return _ill_merged(made, staging, folder, f"{name}-{quant}", to, run, held, progress)
        config = models.configuration(str(whole))
        check_family(config, folder=str(whole))
        tokenizer = models.load_tokenizer(str(source if models.has_tokenizer(source) else whole))
        models.settle_template(tokenizer, is_pair=config.is_encoder_decoder)
        compared = _compared_with(parameters, check, to, quant)
        if compared.reference != "float32":
            progress("parity", compared.reference or "prompts alone", compared.why)
        model = None
        if compared.reference:
            model, used = merge.reference_of(source, run, dtype=compared.reference)
            compared = replace(compared, reference=used)
        asked = held(models.outline(str(whole)) if model is None else model, tokenizer)
        write = _as_gguf if to == "gguf" else _as_onnx
        written = write(
            _Job(
                whole=whole, folder=staging, name=f"{name}-{quant}", quant=quant, config=config, run=run, model=model,
                compared=compared, tokenizer=tokenizer, asked=asked, progress=progress, counted=counted,
            )
        )  # fmt: skip
        verdict = written.verdict
        notes += written.notes
        write_whole(staging / VERDICT, json.dumps(verdict.as_dict(), indent=1))
        card.copy_licences(whole, staging)
        card.write_made_card(
            staging,
            run,
            merge.shareable(base),
            [
                f"This is `{name}` as {to.upper()}, stored in {quant}: `{written.name}`.",
                f"Checked against the model: {verdict.headline()}.",
                *(f"{line[:1].upper()}{line[1:]}." for line in verdict.sentences()),
            ],
            notes,
            kind="seq2seq" if config.is_encoder_decoder else "causal",
            use=written.use,
            tags=[to],
        )
        shutil.rmtree(staging / "merged", ignore_errors=True)
        final = merge.put_in_place(staging, folder, passed=verdict.passed is not False)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    told_in_report(run, progress)
    return Exported(
        folder=final,
        file=final / written.name,
        target=to,
        quant=quant,
        size=sum(p.stat().st_size for p in final.glob(f"{written.name}*")),
        tensors=written.tensors,
        parity=verdict,
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class _Compared:
    """With what an artefact is compared."""

    reference: str | None
    """Type in which the whole model is computed; None where it is not."""
    why: str


def _compared_with(parameters: int, check: str, to: str, quant: str) -> _Compared:
    """The model in float32 where it and its file fit into memory, else in bfloat16, else not at all."""
    if to == "gguf" and not llamacpp.is_installed():
        return _Compared(None, "llama.cpp is not here to read the file back")
    if check == "prompts":
        return _Compared(None, "as asked for, prompts were compared and not the whole model")
    file = parameters * (gguf.bits_of(quant) / 8 if to == "gguf" else 4)
    rooms = {name: parity.room_for(width * parameters, file) for name, width in REFERENCES.items()}
    said = " and ".join(f"{size(room.wanted)} in {name}" for name, room in rooms.items())
    why = f"to compare it as a whole takes {said}, and {size(rooms['float32'].there)} are free"
    if check == "logits":
        return _Compared("float32", "as asked for")
    return _Compared(next((name for name, room in rooms.items() if room.suffices), None), why)


def _check_room_for_graph(parameters: int, check: str) -> None:
    """torch's exporter holds the whole model in float32 and writes a second one; nothing less gives a graph."""
    room = parity.room_for(4 * parameters, 4 * parameters)
    if not room.suffices and check != "logits":
        raise OutOfResources(
            "The model does not fit into memory as ONNX is written.",
            found=f"it takes {room}",
            fix="Take --to gguf or --to safetensors, which are written tensor by tensor, or a machine with more; "
            "--check logits tries it all the same.",
        )


def _ill_merged(
    made: merge.Made,
    staging: Path,
    folder: Path,
    name: str,
    to: str,
    run: Run | None,
    held: Callable[[Any, Any], Held],
    progress: Callable[[str, str, str], None],
) -> Exported:
    """An adapter whose merged weights do not answer as its parts: kept, marked, and no file is made of them."""
    whole = staging / "merged"
    verdict = parity.of_prompts(
        whole, held(made.skeleton, made.tokenizer).questions, quant=made.dtype, layers=made.layers,
        unproven="the merged weights are wrong already, so no file was made of them",
    )  # fmt: skip
    verdict = replace(verdict, artefact=f"merged, for {name}")
    write_whole(staging / VERDICT, json.dumps(verdict.as_dict(), indent=1))
    final = merge.put_in_place(staging, folder, passed=False)
    told_in_report(run, progress)
    return Exported(
        folder=final,
        file=final / "merged" / made.shards[0],
        target=to,
        quant=made.dtype,
        size=sum((final / "merged" / shard).stat().st_size for shard in made.shards),
        tensors={made.dtype: len(weights.places(final / "merged"))},
        parity=verdict,
        notes=(*made.notes, f"the adapter could not be merged: what came out is kept in {final} to look at"),
    )


@dataclass(frozen=True)
class _Job:
    """What one file is made of, and proven with."""

    whole: Path
    """Folder of whole weights."""
    folder: Path
    """Where the file goes."""
    name: str
    quant: str
    config: Any
    run: Run | None
    model: Any
    """What it is compared with; None where nothing is."""
    compared: _Compared
    tokenizer: Any
    asked: Held
    progress: Callable[[str, str, str], None]
    counted: Callable[[str, int, int], None]


@dataclass(frozen=True)
class _MadeFile:
    """A file that was written and tried."""

    name: str
    tensors: dict[str, int]
    """Number of them by how they are stored."""
    verdict: parity.Parity
    notes: list[str]
    use: str
    """How it is used, for the model card."""


def _as_gguf(job: _Job) -> _MadeFile:
    file = f"{job.name}.gguf"
    if program := gguf.writer_of(job.config, folder=str(job.whole), quant=job.quant):
        written = gguf.convert(program, job.whole, job.folder / file, quant=job.quant)
        notes = list(written.notes)
    else:
        vocabulary = _vocabulary(job.tokenizer, job.config, job.asked)
        if vocabulary.tried:
            job.progress(
                "tokenizer",
                str(vocabulary.keys["ggml.pre"]),
                f"the same tokens as the model's own for {vocabulary.tried} of {vocabulary.tried} texts",
            )
        written = gguf.write(
            job.whole,
            job.folder / file,
            quant=job.quant,
            vocabulary=vocabulary,
            config=job.config,
            name=job.name.removesuffix(f"-{job.quant}"),
        )
        notes = [*vocabulary.notes, *written.notes]
    why = f"the model is a {job.config.model_type}" + (f", which {program} writes" if program else "")
    job.progress("format", f"GGUF, architecture {written.architecture}, {job.quant}", why)
    context = gguf.context_in(job.folder / file)
    longest = max(len(question.ids) for question in job.asked.questions)
    recipe = job.run.recipe() if job.run else None
    room, why_room = ollama.context_for(
        gguf.text_part(job.config),
        allowed=context,
        trained=recipe.data.max_length if recipe else None,
        answered=recipe.evaluation.max_new_tokens if recipe else job.asked.new_tokens,
        asked=longest,
    )
    text, problem = ollama.modelfile(
        file, job.tokenizer, stop_ids=end_of_turn_ids(job.tokenizer), context=room, why=why_room
    )
    write_whole(job.folder / ollama.NAME, text)
    if problem:
        notes.append(problem)
    verdict = _proof_of_gguf(job, file, context=context, longest=longest)
    use = card.use_of_gguf(file, context=room, is_pair=bool(job.config.is_encoder_decoder))
    return _MadeFile(file, dict(written.tensors), verdict, notes, use)


def _proof_of_gguf(job: _Job, file: str, *, context: int, longest: int) -> parity.Parity:
    """The verdict by llama.cpp, where it is here; `longest` is the number of tokens of the longest question."""
    unasked = partial(
        parity.unasked, file, job.asked.questions, job.tokenizer,
        is_pair=bool(job.config.is_encoder_decoder), quant=job.quant,
    )  # fmt: skip
    if not llamacpp.is_installed():
        unproven = "llama.cpp was not here to read the file back (pip install 'tunesmith[llama-cpp]')"
        return unasked(read_by="", unproven=unproven, absent="llama.cpp is not installed")
    if job.compared.reference is None:
        with parity.gguf_reader(job.folder / file, job.tokenizer, length=context, words_only=True) as reader:
            same = [list(reader.tokens(question)) == list(question.ids) for question in job.asked.questions]
            return unasked(read_by=reader.name, unproven=job.compared.why, own=(reader, same))
    length = min(context, longest + job.asked.new_tokens)
    with parity.gguf_reader(job.folder / file, job.tokenizer, length=length) as reader:
        return parity.verdict(
            job.model,
            job.tokenizer,
            reader,
            job.asked,
            artefact=file,
            quant=job.quant,
            context=context,
            reference=job.compared.reference,
            progress=lambda done: job.counted("parity", done, len(job.asked.questions)),
        )


def _as_onnx(job: _Job) -> _MadeFile:
    job.progress("format", f"ONNX, {job.quant}, no cache", f"the model is a {job.config.model_type}")
    graph.write(job.whole, job.folder / graph.NAME)
    job.config.save_pretrained(job.folder)
    job.tokenizer.save_pretrained(job.folder)
    notes = ["the graph keeps no cache: for each token that is written, the whole text is read again"]
    tensors = {"F32": len(list(models.outline(str(job.whole)).parameters()))}
    start = job.config.decoder_start_token_id if job.config.is_encoder_decoder else None
    use = card.use_of_onnx(graph.NAME, stop_ids=end_of_turn_ids(job.tokenizer), start=start)
    if job.compared.reference is None:
        own = models.load_tokenizer(str(job.folder))
        verdict = parity.unasked(
            graph.NAME, job.asked.questions, own, is_pair=job.config.is_encoder_decoder,
            read_by=parity.transformers_version(), quant=STORED[job.quant], unproven=job.compared.why,
        )  # fmt: skip
        return _MadeFile(graph.NAME, tensors, verdict, notes, use)
    verdict = parity.verdict(
        job.model,
        job.tokenizer,
        graph.reader(job.folder / graph.NAME, job.model, models.load_tokenizer(str(job.folder))),
        job.asked,
        artefact=graph.NAME,
        quant=STORED[job.quant],
        context=context_length(job.model),
        reference=job.compared.reference,
        progress=lambda done: job.counted("parity", done, len(job.asked.questions)),
    )
    return _MadeFile(graph.NAME, tensors, verdict, notes, use)


def _vocabulary(tokenizer: Any, config: Any, held: Held) -> Vocabulary:
    return vocabulary_of(
        tokenizer,
        rows=gguf.text_part(config).vocab_size,
        stop_ids=end_of_turn_ids(tokenizer),
        texts=[asked.text for asked in held.questions[:MAX_TRIED]],
    )
