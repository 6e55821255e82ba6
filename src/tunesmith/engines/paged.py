"""Transformers' continuous batching: the cache lies in pages, and a finished answer's place is taken at once.

The fast path on a GPU; on a CPU it is slower than padding. It takes whatever it is given and drops what it does not
know, without an exception, so everything it is asked is set here and every result is looked at.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunesmith.errors import ModelError, OutOfResources, RecipeError
from tunesmith.generation import Generated, cut, for_inference, no_inherited_settings, seeded
from tunesmith.models import is_seq2seq

if TYPE_CHECKING:
    from tunesmith.engines import Asked, Finished, Say, Source

PAGE = 32
"""Tokens of a page on a CPU, where the cache is made just as large as the questions need."""
ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "paged|eager")
WAIT = 0.2
"""Seconds between two looks at whether the engine lives; Ctrl-C is heard between them."""
CPU_TOKENS = 2**17
"""Most tokens of the cache on a CPU: the engine's own choice, 60 % of what is free, is no way to treat a laptop."""


def refused(model: Any) -> str | None:
    """Why a model cannot be paged, in words; None where it can."""
    if is_seq2seq(model):
        return "it is an encoder-decoder model"
    owner = _owner(model)
    if not hasattr(owner, "init_continuous_batching"):
        return "its class has no continuous batching"
    attention = getattr(owner.config, "_attn_implementation", None)
    if attention not in ATTENTIONS:
        return f"its attention is '{attention}', and pages need one of {', '.join(ATTENTIONS[:-1])}"
    if getattr(owner, "_is_stateful", False):
        return "it keeps a state instead of a cache"
    return None


def answer(source: Source, asked: Asked, finished: Finished, say: Say) -> None:
    """Answer the prompts; `finished` gets each one as it comes, in any order."""
    from transformers import ContinuousBatchingConfig, GenerationConfig
    from transformers.generation.continuous_batching.utils import WorkloadHints

    model = source.model
    if why := refused(model):
        raise RecipeError(
            f"The paged engine cannot answer for '{source.name}': {why}.",
            fix="Use --set evaluation.engine=padded, or leave it at auto.",
        )
    rooms = [asked.room(prompt, source.context) for prompt in asked.prompts]
    for number, room in enumerate(rooms):
        if not room:
            finished(number, Generated((), "", "length"))
    waiting = {f"ask-{number}": number for number, room in enumerate(rooms) if room}
    if not waiting:
        return
    longest = max(len(asked.prompts[n]) for n in waiting.values())
    sampling = {"temperature": asked.temperature, "top_k": 0, "top_p": 1.0} if asked.temperature > 0 else {}
    settings = GenerationConfig(
        max_new_tokens=asked.max_new_tokens,  # without it answers run on until the cache is full
        do_sample=asked.temperature > 0,
        num_beams=1,
        eos_token_id=list(asked.stop_ids) or -1,
        **sampling,
    )
    sizes = {}
    if model.device.type == "cpu":
        pages = [-(-(len(asked.prompts[n]) + rooms[n]) // PAGE) + 1 for n in waiting.values()]
        sizes = {"page_size": PAGE, "num_blocks": min(sum(pages), max(CPU_TOKENS // PAGE, max(pages)))}
    how = ContinuousBatchingConfig(
        auto_switch_to_flash=False,  # would change the attention that the model is trained and shipped with
        drop_unsupported_processors=False,
        seed=asked.seed,
        **sizes,
    )
    owner = _owner(model)
    hints = WorkloadHints(longest, asked.max_new_tokens, len(waiting))
    with for_inference(model), no_inherited_settings(model), seeded(model, asked.seed):
        manager = owner.init_continuous_batching(settings, how, hints)
        try:
            manager.start()
            # Prompts with a common beginning one after another share its pages.
            for key in sorted(waiting, key=lambda k: tuple(asked.prompts[waiting[k]]), reverse=True):
                number = waiting[key]
                manager.add_request(
                    list(asked.prompts[number]),
                    request_id=key,
                    max_new_tokens=rooms[number],
                    eos_token_id=list(asked.stop_ids) or -1,
                )
            while waiting:
                result = manager.get_result(timeout=WAIT)
                if result is None:
                    if not manager.is_running():
                        break
                    continue
                if not result.is_finished():
                    continue
                number = waiting.pop(result.request_id)
                _check(result, number, asked)
                finished(number, cut(result.generated_tokens, asked.stop_ids, source.tokenizer))
        finally:
            manager.stop(block=True, timeout=30, hard_stop=bool(waiting))
            manager.destroy()
    if waiting:
        error = manager.background_thread_status.fatal_error
        raise OutOfResources(
            f"The paged engine ended with {len(waiting)} of {len(rooms)} prompts unanswered.",
            found=str(error).splitlines()[0] if error else None,
            fix="Start again to go on where it stopped, or use --set evaluation.engine=padded.",
        )


def _check(result: Any, number: int, asked: Asked) -> None:
    """Raises for a result that is no answer: failed, or to other tokens than were asked."""
    if result.error is not None or result.status.name != "FINISHED":
        raise OutOfResources(
            f"The paged engine failed at prompt {number} of {len(asked.prompts[number])} tokens.",
            found=f"{result.status.name}: {result.error}",
            fix="Lower evaluation.max_new_tokens or data.max_length, or use --set evaluation.engine=padded.",
        )
    given = list(result.prompt_ids)
    if given != list(asked.prompts[number]):
        raise ModelError(
            f"The paged engine answered other tokens than prompt {number}'s.",
            found=f"{len(given)} tokens instead of {len(asked.prompts[number])}",
            fix="Use --set evaluation.engine=padded, and report this.",
        )


def _owner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
