"""One file that runs elsewhere, made from a run, an adapter or a model's folder, with the verdict beside it.

    adapter -> whole weights -> the target's file -> read back -> parity.json -> renamed

A folder under the name that was asked for has passed; one that has not is kept with the ending `.failed`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunesmith import models
from tunesmith.engines import llamacpp
from tunesmith.errors import MissingExtra, ModelError, TunesmithError, nearest
from tunesmith.export import gguf, merge, ollama, parity
from tunesmith.export.vocabulary import Vocabulary, vocabulary_of
from tunesmith.training.run import Run, write_whole

TARGETS = {"gguf": "One file for llama.cpp and Ollama, with tokenizer and chat template, and a Modelfile."}
"""What a model can be exported to."""

VERDICT = "parity.json"

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


@dataclass(frozen=True)
class Held:
    """Held-out questions to prove an artefact with."""

    questions: Sequence[parity.Question]
    new_tokens: int
    score: Callable[[Sequence[int], Sequence[Any], Sequence[Any]], tuple[Any, str | None]]
    """(numbers of questions, the model's answers to them, the artefact's) -> their comparison, or why there is none."""


def check_target(target: str, quant: str) -> None:
    """Raises before any work for a target or a way to store weights that there is not, or a missing package."""
    if target not in TARGETS:
        raise TunesmithError(f"Models are not exported to '{target}'.", fix=nearest(target, TARGETS))
    gguf.check_quant(quant)
    import importlib.util

    if importlib.util.find_spec("gguf") is None:
        raise MissingExtra("gguf", "Writing GGUF", install="'tunesmith[gguf]'")


def export(
    source: Path,
    folder: Path,
    *,
    quant: str,
    run: Run | None,
    held: Callable[[Any, Any], Held],
    progress: Callable[[str, str, str], None],
    counted: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Exported:
    """Write `source`, a folder of whole weights or an adapter, as GGUF to `folder`, and prove it.

    `held` gives, for a model and its tokenizer, the questions to prove it with. `progress` is told decisions, `counted`
    how far a stage is. Raises ModelError for a family that cannot be written, before any work.
    """
    merge.free_place(folder)
    is_adapter = (source / "adapter_config.json").is_file()
    base = str(source) if not is_adapter else merge.base_of(source)[0]
    gguf.family_of(models.configuration(base), folder=str(source))
    name = (run.path.name if run else source.name).replace(" ", "-")
    file = f"{name}-{quant}.gguf"
    staging = folder.with_name(f".{folder.name}.tmp")
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        whole, notes = source, list[str]()
        if is_adapter:
            merged = merge.merge(source, staging / "merged", run=run, progress=progress)
            whole, notes = merged.folder, list(merged.notes)
            progress("merged", "for the file", merged.check.sentence())
        config = models.configuration(str(whole))
        family = gguf.family_of(config, folder=str(whole))
        tokenizer = models.load_tokenizer(str(source if merge.has_tokenizer(source) else whole))
        merge.settled(tokenizer, config.is_encoder_decoder)
        model = models.load_model(str(source)).eval()
        asked = held(model, tokenizer)
        vocabulary = _vocabulary(tokenizer, config, asked)
        progress(
            "format",
            f"GGUF, architecture {family.architecture}, {quant}",
            f"the model is a {config.model_type}",
        )
        if vocabulary.tried:
            progress(
                "tokenizer",
                str(vocabulary.keys["ggml.pre"]),
                f"the same tokens as the model's own for {vocabulary.tried} of {vocabulary.tried} texts",
            )
        written = gguf.write(
            whole, staging / file, quant=quant, vocabulary=vocabulary, config=config, name=name
        )
        notes += [*vocabulary.notes, *written.notes]
        from tunesmith.data.templates import end_of_turn_ids
        from tunesmith.generation import context_length

        stop_ids = end_of_turn_ids(tokenizer)
        text, problem = ollama.modelfile(file, tokenizer, stop_ids=stop_ids, context=context_length(model))
        write_whole(staging / ollama.NAME, text)
        if problem:
            notes.append(problem)
        verdict = None
        if llamacpp.is_installed():
            verdict = _proven(
                model, tokenizer, staging / file, asked, quant, gguf.context_of(config), counted
            )
            write_whole(staging / VERDICT, json.dumps(verdict.as_dict(), indent=1))
        else:
            notes.append(
                "not proven: llama.cpp was not here to read the file back (pip install 'tunesmith[llama-cpp]')"
            )
        shutil.rmtree(staging / "merged", ignore_errors=True)
        final = folder
        if verdict is not None and not verdict.passed:
            final = folder.with_name(f"{folder.name}.failed")
            shutil.rmtree(final, ignore_errors=True)
        elif folder.is_dir():
            folder.rmdir()
        staging.rename(final)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Exported(
        folder=final,
        file=final / file,
        target="gguf",
        quant=quant,
        size=(final / file).stat().st_size,
        tensors=dict(written.tensors),
        parity=verdict,
        notes=tuple(notes),
    )


def _proven(
    model: Any,
    tokenizer: Any,
    file: Path,
    held: Held,
    quant: str,
    context: int,
    counted: Callable[[str, int, int], None],
) -> parity.Parity:
    numbers = [n for n, asked in enumerate(held.questions) if len(asked.ids) < context]
    if not numbers:
        raise ModelError(
            "No question is short enough for the file's context.",
            found=f"{context} tokens, {len(held.questions)} questions",
            fix="Train on shorter rows, or serve the merged model with transformers or vLLM.",
        )
    differences, same, own, others = parity.of_gguf(
        model,
        tokenizer,
        file,
        [held.questions[n] for n in numbers],
        new_tokens=held.new_tokens,
        progress=lambda done: counted("parity", done, len(numbers)),
    )
    score, unscored = held.score(numbers, own, others)
    return parity.Parity(
        artefact=file.name,
        quant=quant,
        read_by=llamacpp.version(),
        prompts=len(numbers),
        same_prompts=same,
        check=parity.checked(differences, tolerance=parity.TOLERANCES[quant]),
        score=score,
        unscored=unscored,
        too_long=len(held.questions) - len(numbers),
    )


def _vocabulary(tokenizer: Any, config: Any, held: Held) -> Vocabulary:
    from tunesmith.data.templates import end_of_turn_ids

    return vocabulary_of(
        tokenizer,
        rows=config.vocab_size,
        stop_ids=end_of_turn_ids(tokenizer),
        texts=[asked.text for asked in held.questions[:MAX_TRIED]],
    )
