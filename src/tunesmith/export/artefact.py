"""One file that runs elsewhere, made from a run, an adapter or a model's folder, with the verdict beside it.

    adapter -> whole weights -> the target's file -> read back -> parity.json -> renamed

A folder under the name that was asked for has passed; one that has not is kept with the ending `.failed`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tunesmith import models
from tunesmith.data.templates import end_of_turn_ids
from tunesmith.engines import llamacpp
from tunesmith.errors import MissingExtra, ModelError, TunesmithError, nearest
from tunesmith.export import gguf, graph, merge, ollama, parity, weights
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
    parity: parity.Parity | None
    """None where nothing could read the file back, which the notes say."""
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong with it, as far as it could be tried."""
        return self.parity is None or self.parity.passed

    def as_dict(self) -> dict[str, Any]:
        """The result as `--json` prints it; it ends with exit code 1 where the verdict is bad."""
        return {
            **asdict(self),
            "folder": str(self.folder),
            "file": str(self.file),
            "parity": self.parity.as_dict() if self.parity else None,
            "passed": self.passed,
            **({} if self.passed else {"exit_code": 1}),
        }


def check_target(target: str, quant: str) -> None:
    """Raises before any work for a target or a way to store weights that there is not, or a missing package."""
    import importlib.util

    if target not in TARGETS:
        raise TunesmithError(f"Models are not exported to '{target}'.", fix=nearest(target, TARGETS))
    if target == "gguf":
        gguf.check_quant(quant)
    elif quant not in (allowed := STORED if target == "safetensors" else ("f32",)):
        raise TunesmithError(f"Weights are not stored as '{quant}' in {target}.", fix=nearest(quant, allowed))
    needed = {"gguf": ("gguf",), "onnx": ("onnx", "onnxscript", "onnxruntime")}.get(target, ())
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise MissingExtra(missing[0], f"Writing {target.upper()}", install=f"'tunesmith[{target}]'")


def export_weights(
    source: Path,
    folder: Path,
    *,
    quant: str,
    run: Run | None,
    max_shard: int,
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
    held: Callable[[Any, Any], Held],
    progress: Callable[[str, str, str], None],
    counted: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Exported:
    """Write `source`, a folder of whole weights or an adapter, as GGUF or ONNX to `folder`, and prove it.

    `held` gives, for a model and its tokenizer, the questions to prove it with. `progress` is told decisions, `counted`
    how far a stage is. Raises ModelError for a family that cannot be written, before any work.
    """
    merge.free_place(folder)
    is_adapter = (source / "adapter_config.json").is_file()
    base = str(source) if not is_adapter else merge.base_of(source)[0]
    check = partial(gguf.writer_of, quant=quant) if to == "gguf" else graph.check_family
    check(models.configuration(base), folder=str(source))
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
                raise ModelError("The adapter could not be merged.", found=made.layers.sentence())
        config = models.configuration(str(whole))
        check(config, folder=str(whole))
        tokenizer = models.load_tokenizer(str(source if merge.has_tokenizer(source) else whole))
        merge.settled(tokenizer, config.is_encoder_decoder)
        model = merge.reference_of(source, run)
        asked = held(model, tokenizer)
        write = _as_gguf if to == "gguf" else _as_onnx
        file, tensors, verdict, more = write(
            whole, staging, f"{name}-{quant}", quant, config, model, tokenizer, asked, progress, counted
        )
        notes += more
        if verdict is not None:
            write_whole(staging / VERDICT, json.dumps(verdict.as_dict(), indent=1))
        shutil.rmtree(staging / "merged", ignore_errors=True)
        final = merge.put_in_place(staging, folder, passed=verdict is None or verdict.passed)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    merge.told_in_report(run)
    return Exported(
        folder=final,
        file=final / file,
        target=to,
        quant=quant,
        size=sum(p.stat().st_size for p in final.glob(f"{file}*")),
        tensors=tensors,
        parity=verdict,
        notes=tuple(notes),
    )


Written = tuple[str, dict[str, int], parity.Parity | None, list[str]]
"""A file's name, its tensors by how they are stored, the verdict where it could be read back, and notes."""


def _as_gguf(
    whole: Path,
    folder: Path,
    name: str,
    quant: str,
    config: Any,
    model: Any,
    tokenizer: Any,
    asked: Held,
    progress: Callable[[str, str, str], None],
    counted: Callable[[str, int, int], None],
) -> Written:
    file = f"{name}.gguf"
    if program := gguf.writer_of(config, folder=str(whole), quant=quant):
        written = gguf.convert(program, whole, folder / file, quant=quant)
        notes = list(written.notes)
    else:
        vocabulary = _vocabulary(tokenizer, config, asked)
        if vocabulary.tried:
            progress(
                "tokenizer",
                str(vocabulary.keys["ggml.pre"]),
                f"the same tokens as the model's own for {vocabulary.tried} of {vocabulary.tried} texts",
            )
        written = gguf.write(
            whole,
            folder / file,
            quant=quant,
            vocabulary=vocabulary,
            config=config,
            name=name.removesuffix(f"-{quant}"),
        )
        notes = [*vocabulary.notes, *written.notes]
    why = f"the model is a {config.model_type}" + (f", which {program} writes" if program else "")
    progress("format", f"GGUF, architecture {written.architecture}, {quant}", why)
    context = gguf.context_in(folder / file)
    text, problem = ollama.modelfile(file, tokenizer, stop_ids=end_of_turn_ids(tokenizer), context=context)
    write_whole(folder / ollama.NAME, text)
    if problem:
        notes.append(problem)
    if not llamacpp.is_installed():
        notes.append(
            "not proven: llama.cpp was not here to read the file back (pip install 'tunesmith[llama-cpp]')"
        )
        return file, dict(written.tensors), None, notes
    longest = max(len(question.ids) for question in asked.questions)
    length = min(context, longest + asked.new_tokens)
    with parity.gguf_reader(folder / file, tokenizer, length=length) as reader:
        verdict = parity.verdict(
            model,
            tokenizer,
            reader,
            asked,
            artefact=file,
            quant=quant,
            context=context,
            progress=lambda done: counted("parity", done, len(asked.questions)),
        )
    return file, dict(written.tensors), verdict, notes


def _as_onnx(
    whole: Path,
    folder: Path,
    name: str,
    quant: str,
    config: Any,
    model: Any,
    tokenizer: Any,
    asked: Held,
    progress: Callable[[str, str, str], None],
    counted: Callable[[str, int, int], None],
) -> Written:
    progress("format", f"ONNX, {quant}, no cache", f"the model is a {config.model_type}")
    graph.write(whole, folder / graph.NAME)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    verdict = parity.verdict(
        model,
        tokenizer,
        graph.reader(folder / graph.NAME, model, models.load_tokenizer(str(folder))),
        asked,
        artefact=graph.NAME,
        quant=STORED[quant],
        context=context_length(model),
        progress=lambda done: counted("parity", done, len(asked.questions)),
    )
    notes = ["the graph keeps no cache: for each token that is written, the whole text is read again"]
    return graph.NAME, {"F32": len(list(model.parameters()))}, verdict, notes


def _vocabulary(tokenizer: Any, config: Any, held: Held) -> Vocabulary:
    return vocabulary_of(
        tokenizer,
        rows=config.vocab_size,
        stop_ids=end_of_turn_ids(tokenizer),
        texts=[asked.text for asked in held.questions[:MAX_TRIED]],
    )
