"""vLLM in this process, where it is installed (Linux with a GPU): base and adapter along one engine, by token ids."""

from __future__ import annotations

import gc
import importlib.util
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.errors import MissingExtra, ModelError, RecipeError
from tunesmith.generation import Generated, cut

if TYPE_CHECKING:
    from tunesmith.engines import Asked, Finished, Say, Source

PART = 512
"""Prompts given at once: enough to keep the engine busy, few enough that a kill loses little."""
MEMORY = 0.8
"""Share of the GPU's memory for weights and cache; all of it is given back before the likelihoods are taken."""
HELD = "_vllm"
"""Where a source keeps its engine and how many tokens that one holds, in a list that is emptied to free it."""
_latest: list[weakref.ref[Source]] = []
"""The source that has an engine by now: for two there is no room on a GPU."""


def answer(source: Source, asked: Asked, finished: Finished, say: Say) -> None:
    """Answer the prompts; `finished` gets them part by part, in their order."""
    if importlib.util.find_spec("vllm") is None:
        raise MissingExtra("vllm", "evaluation.engine=vllm")
    if source.base is None:
        raise RecipeError(
            "vLLM reads a model from its folder, and this one exists in this process only.",
            fix="Use --set evaluation.engine=padded, or save the model first.",
        )
    from vllm import LLM, SamplingParams

    from tunesmith.models import folder_of

    rooms = [asked.room(prompt, source.context) for prompt in asked.prompts]
    waiting = []
    for number, room in enumerate(rooms):
        if room:
            waiting.append(number)
        else:
            finished(number, Generated((), "", "length"))
    if not waiting:
        return
    location, adapter, options = str(folder_of(source.base, revision=source.revision)), None, {}
    if (Path(location) / "adapter_config.json").is_file():
        from vllm.lora.request import LoRARequest

        said = json.loads((Path(location) / "adapter_config.json").read_text(encoding="utf-8"))
        check_adapter(said, source.name)
        adapter = LoRARequest(source.name, 1, location)
        base = str(said["base_model_name_or_path"])
        location = str(folder_of(base, revision=said.get("revision")))
        options = {"enable_lora": True, "max_lora_rank": holding_rank(int(said["r"]))}
    length = max(len(asked.prompts[n]) + rooms[n] for n in waiting)
    llm = _kept(source, length)
    if llm is None:
        # Later turns are longer, and a new engine takes a minute: room for twice as much, to a power of 2.
        length = min(source.context or 2**31, 1 << (2 * length - 1).bit_length())
        llm = _keep(
            source,
            length,
            lambda: LLM(
                model=location,
                tokenizer=None,
                skip_tokenizer_init=True,  # it is given token ids and gives them back
                dtype=source.dtype,
                seed=asked.seed,
                max_model_len=length,
                gpu_memory_utilization=MEMORY,
                generation_config="vllm",  # nothing from the model's own generation_config.json
                trust_remote_code=False,
                **options,
            ),
        )
    try:
        for start in range(0, len(waiting), PART):
            part = waiting[start : start + PART]
            settings = [
                SamplingParams(
                    max_tokens=rooms[n],
                    temperature=asked.temperature,
                    seed=asked.seeds[n] if asked.seeds else asked.seed,
                    stop_token_ids=list(asked.stop_ids),
                    ignore_eos=True,  # the stop tokens are those that every engine gets
                    detokenize=False,
                )
                for n in part
            ]
            prompts = [{"prompt_token_ids": list(asked.prompts[n])} for n in part]
            results = llm.generate(prompts, settings, lora_request=adapter, use_tqdm=False)
            if len(results) != len(part):
                raise ModelError(
                    f"vLLM gave {len(results)} answers to {len(part)} prompts.",
                    fix="Start again to go on where it stopped, or use --set evaluation.engine=padded.",
                )
            for number, result in zip(part, results, strict=True):
                finished(number, _answer(result, number, asked, source.tokenizer))
    except BaseException:
        del llm
        let_go(source)  # what failed is not asked again
        raise


def let_go(source: Source) -> None:
    """Free the engine of a source, where it has one."""
    _free(vars(source).pop(HELD, []))


def _kept(source: Source, length: int) -> Any:
    """The engine that a source has, if it holds so many tokens."""
    held = vars(source).get(HELD, [])
    return held[0] if held and held[1] >= length else None


def _keep(source: Source, length: int, make: Callable[[], Any]) -> Any:
    """A new engine, kept for as long as its source lives; the one that was there before it is freed first."""
    for one in _latest:
        if before := one():
            let_go(before)
    held = vars(source)[HELD] = [make(), length]
    _latest[:] = [weakref.ref(source)]
    weakref.finalize(source, _free, held)
    return held[0]


def _free(held: list[Any]) -> None:
    if not held:
        return
    held.clear()
    gc.collect()
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _answer(result: Any, number: int, asked: Asked, tokenizer: Any) -> Generated:
    given = list(result.prompt_token_ids)
    if given != list(asked.prompts[number]):
        raise ModelError(
            f"vLLM answered other tokens than prompt {number}'s.",
            found=f"{len(given)} tokens instead of {len(asked.prompts[number])}",
            fix="Use --set evaluation.engine=padded, and report this.",
        )
    one = result.outputs[0]
    if one.finish_reason not in ("stop", "length"):
        raise ModelError(
            f"vLLM did not finish the answer to prompt {number}.",
            found=f"finish reason '{one.finish_reason}'",
            fix="Start again to go on where it stopped, or use --set evaluation.engine=padded.",
        )
    return cut(list(one.token_ids), asked.stop_ids, tokenizer)


def check_adapter(said: dict[str, Any], name: str) -> None:
    """Raises RecipeError for an adapter that vLLM would load as something else than it is."""
    from tunesmith.models import is_from_base

    for field, what, is_there in (
        ("use_dora", "DoRA", bool),
        ("modules_to_save", "fully trained modules", bool),
        ("init_lora_weights", "a start that is a part of its base", is_from_base),
    ):
        if is_there(said.get(field)):
            raise RecipeError(
                f"vLLM cannot serve the adapter of '{name}'.",
                found=f"{what} ({field} in adapter_config.json)",
                fix="Merge it first (`tunesmith merge`), or use --set evaluation.engine=paged.",
            )


def holding_rank(rank: int) -> int:
    """The smallest rank that vLLM knows and that holds this one."""
    return next((known for known in (8, 16, 32, 64, 128, 256, 320, 512) if known >= rank), rank)
