"""Batched generation from token ids, shared by evaluation, previews and chat.

Causal prompts are left-padded with an explicit attention mask (inferring the mask fails where the padding token
is the end-of-text token), sorted by length so that little is padded, and cut into batches by tokens, which ended rows
leave. Of an
encoder-decoder model the prompts are what the encoder reads, padded on the right.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from tunesmith.errors import OutOfResources, is_out_of_memory
from tunesmith.models import check_can_write, first_tokens, is_seq2seq

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Generated:
    """One answer: its new tokens without the stop token, their text, and why it ended."""

    ids: tuple[int, ...]
    text: str
    finish_reason: Literal["stop", "length"]
    stop_id: int | None = None
    """The stop token that ended it; None at the length limit."""
    exact: bool = True
    """False where a server gave text only, and the ids are that text's, encoded again."""


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    batch_tokens: int = 8192,
    temperature: float = 0.0,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
    finished: Callable[[int, Generated], None] | None = None,
) -> list[Generated]:
    """Answers to token-id prompts, in their order; greedy at temperature 0.

    Nothing is taken from the model folder's generation_config.json. An answer gets at most the room that
    the model's context length leaves after its prompt; a prompt that leaves none gets an empty answer with
    finish reason "length". Sampled answers are reproducible for the same prompts and batch size only, as
    one random stream serves a batch. `progress` is told the number of finished prompts, `finished` each answer with
    its prompt's number as soon as it is there.
    """
    import torch
    from transformers import DynamicCache

    check_can_write(model)
    pairs = is_seq2seq(model)
    rooms = [room(model, len(prompt), max_new_tokens) for prompt in prompts]
    answers: dict[int, Generated] = {}

    def keep(found: dict[int, Generated]) -> None:
        answers.update(found)
        if finished:
            for number, answer in found.items():
                finished(number, answer)
        if progress:
            progress(len(answers))

    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {number} has no tokens")
    keep({n: Generated((), "", "length") for n in range(len(prompts)) if not rooms[n]})
    pad_id = _pad_id(tokenizer, stop_ids)
    first = first_tokens(model)

    # Greedy rows may be left and taken up again; what is drawn hangs on who is beside.
    resumes = temperature == 0 and not pairs and bool(stop_ids)
    compacts = resumes and _keeps_rows_apart(model)
    written: dict[int, list[int]] = {n: [] for n in range(len(prompts)) if rooms[n]}

    def answer_batch(batch: Sequence[int]) -> list[list[int]]:
        given = [[*prompts[number], *written[number]] for number in batch]
        width = max(map(len, given))
        # A row that ran on beyond the context length while others are unfinished would index positions that models
        # with learned positions do not have.
        steps = min(rooms[number] - len(written[number]) for number in batch)
        ids = torch.full((len(batch), width), pad_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for line, tokens in enumerate(given):
            start = 0 if pairs else width - len(tokens)
            ids[line, start : start + len(tokens)] = torch.tensor(tokens)
            mask[line, start : start + len(tokens)] = 1
        ids, mask = ids.to(model.device), mask.to(model.device)
        lines: list[list[int]] = [[] for _ in batch]
        going = list(range(len(batch)))
        past: Any = None
        while True:
            config = _generation_config(
                room=steps, stop_ids=stop_ids, pad_id=pad_id, temperature=temperature, first=first
            )
            ending: dict[str, Any] = {}
            if resumes:
                leaving = _some_ended if compacts else _mostly_ended
                ending = {
                    "stopping_criteria": leaving(ids.shape[1], steps, stop_ids),
                    "past_key_values": past,
                }
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                return_dict_in_generate=True,
                **ending,
            )
            # A decoder's output begins with its start token, a causal model's with the prompt.
            new: list[list[int]] = output.sequences[:, 1 if pairs else ids.shape[1] :].tolist()
            for line, tokens in zip(going, new, strict=True):
                lines[line] += tokens
            steps -= len(new[0])
            rest = [n for n, tokens in enumerate(new) if not any(token in stop_ids for token in tokens)]
            past = getattr(output, "past_key_values", None)
            if not (compacts and steps and rest) or type(past) is not DynamicCache:
                return lines
            kept = torch.tensor(rest, device=ids.device)
            past.batch_select_indices(kept)
            ids = output.sequences[kept]
            mask = torch.cat([mask[kept], mask.new_ones(len(rest), len(new[0]))], dim=1)
            going = [going[n] for n in rest]

    def ended(number: int, line: Sequence[int]) -> bool:
        """Keep what a row has written; whether it is at its end."""
        written[number] += line
        return not resumes or len(written[number]) >= rooms[number] or any(t in stop_ids for t in line)

    with for_inference(model), no_inherited_settings(model), seeded(model, seed):
        while written:
            left = {number: rooms[number] - len(ids) for number, ids in written.items()}
            lengths = {n: len(prompts[n]) + rooms[n] for n in written}
            sizes = {n: size.bit_length() if resumes else size for n, size in left.items()}
            for size in sorted(set(sizes.values())):
                alike = {n: length for n, length in lengths.items() if sizes[n] == size}
                for batch in length_batches(alike, tokens=batch_tokens):
                    for part, lines in halving(answer_batch, batch):
                        done = [n for n, line in zip(part, lines, strict=True) if ended(n, line)]
                        keep({n: cut(written.pop(n), stop_ids, tokenizer) for n in done})
    return [answers[number] for number in range(len(prompts))]


def _keeps_rows_apart(model: Any) -> bool:
    """Whether what a model keeps of tokens is keys and values, from which those of ended rows can be left out."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    layers = DynamicCache(config=model.config.get_text_config()).layers
    return bool(model._supports_default_dynamic_cache()) and all(isinstance(n, DynamicLayer) for n in layers)


LEAST_STEPS = 8
"""Tokens that are still to be written where it pays to leave a batch, and to go on without the ended rows."""


def _some_ended(width: int, steps: int, stop_ids: Sequence[int]) -> Any:
    """Leaves a batch once a quarter of its rows have ended, as each costs as much as one that goes on. The others go on
    from their keys and values."""
    return _leaving(
        stop_ids,
        lambda ids, ended: 4 * ended >= len(ids) and width + steps - ids.shape[1] >= LEAST_STEPS,
    )


def _mostly_ended(width: int, steps: int, stop_ids: Sequence[int]) -> Any:
    """Leaves a batch once three quarters of its rows have ended. The others are read anew in a batch of their own.

    That is done where it reads fewer tokens than the ended rows would add, if what is left were half used.
    """

    def worth(ids: Any, ended: int) -> bool:
        going, left = len(ids) - ended, width + steps - ids.shape[1]
        return bool(4 * going <= len(ids) and going * ids.shape[1] < ended * left / 2)

    return _leaving(stop_ids, worth)


def _leaving(stop_ids: Sequence[int], worth: Callable[[Any, int], bool]) -> Any:
    """Ends the writing of a whole batch where that is worth it: `(tokens so far, rows that have ended)`."""
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Leaving(StoppingCriteria):  # type: ignore[misc]
        def __init__(self) -> None:
            self.ended: Any = None

        def __call__(self, ids: Any, scores: Any, **kwargs: Any) -> Any:
            now = torch.isin(ids[:, -1], torch.tensor(list(stop_ids), device=ids.device))
            self.ended = now if self.ended is None else self.ended | now
            return torch.full_like(now, worth(ids, int(self.ended.sum())))

    return StoppingCriteriaList([Leaving()])


def stream(
    model: Any,
    tokenizer: Any,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """One answer's text, piece by piece; a character that spans tokens is held back until it is whole.

    At temperature 0 the pieces join to the text that `generate` gives. `top_p` keeps the smallest set of
    tokens with that much probability (nucleus sampling, arXiv 1904.09751).
    """
    import torch

    check_can_write(model)
    most = room(model, len(prompt), max_new_tokens)
    feeds = feeder(model)
    first = first_tokens(model)
    read: dict[str, Any] = {}
    generator = torch.Generator(device=model.device).manual_seed(seed)
    ids: list[int] = []
    past, sent = None, ""
    with _eval_mode(model):
        while len(ids) < most:
            # Inference mode is entered step by step: held across a yield it would reach the caller.
            with torch.inference_mode():
                output = model(
                    **feeds(model, prompt, ids, past, read, first), past_key_values=past, use_cache=True
                )
                past = getattr(output, "past_key_values", None)
                token = pick(output.logits[0, -1].float(), temperature, top_p, generator)
                if not ids and "forced_bos_token_id" in first:
                    token = first["forced_bos_token_id"]
            if token in stop_ids:
                break
            ids.append(token)
            text = decoded(ids, tokenizer)
            if text.startswith(sent) and not text.endswith("\ufffd"):
                yield text[len(sent) :]
                sent = text
    if rest := decoded(ids, tokenizer)[len(sent) :]:
        yield rest


def feeder(model: Any) -> Callable[..., dict[str, Any]]:
    """What gives a model's inputs for the next token of one answer, step by step."""
    return _decoder_feeds if is_seq2seq(model) else _feeds


def _feeds(
    model: Any,
    prompt: Sequence[int],
    ids: Sequence[int],
    past: Any,
    read: dict[str, Any],
    first: Mapping[str, int],
) -> dict[str, Any]:
    """What a causal model is given for its next token: everything at first, then the last token."""
    import torch

    return {
        "input_ids": torch.tensor([[*prompt, *ids] if past is None else ids[-1:]], device=model.device),
        "attention_mask": torch.ones(1, len(prompt) + len(ids), device=model.device, dtype=torch.long),
    }


def _decoder_feeds(
    model: Any,
    prompt: Sequence[int],
    ids: Sequence[int],
    past: Any,
    read: dict[str, Any],
    first: Mapping[str, int],
) -> dict[str, Any]:
    """What a decoder is given for its next token; the encoder reads the prompt once, kept in `read`."""
    import torch

    if not read:
        mask = torch.ones(1, len(prompt), device=model.device, dtype=torch.long)
        asked = torch.tensor([list(prompt)], device=model.device)
        read["encoder_outputs"] = model.get_encoder()(input_ids=asked, attention_mask=mask)
        read["attention_mask"] = mask
    written = [first["decoder_start_token_id"], *ids]
    feed = written if past is None else written[-1:]
    return {**read, "decoder_input_ids": torch.tensor([feed], device=model.device)}


def room(model: Any, prompt: int, max_new_tokens: int) -> int:
    """New tokens that an answer may have behind a prompt of this length; 0 where the prompt leaves none."""
    limit = context_length(model)
    if limit is None:
        return max_new_tokens
    if is_seq2seq(model):  # encoder and decoder have the whole length each; one position is the start token's
        return min(max_new_tokens, limit - 1) if prompt <= limit else 0
    return max(0, min(max_new_tokens, limit - prompt))


def context_length(model: Any) -> int | None:
    """Most tokens that the model can attend to, or None where its configuration does not say.

    Of an encoder-decoder model most tokens in each half; T5 and its kin have no limit but memory.
    """
    config = model.config.get_text_config()
    if is_seq2seq(model):
        names = (
            "max_position_embeddings",
            "max_encoder_position_embeddings",
            "max_decoder_position_embeddings",
        )
        lengths = [int(found) for name in names if (found := getattr(model.config, name, None))]
        return min(lengths, default=None)
    length = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return int(length) if length else None


def length_batches(lengths: dict[int, int], *, tokens: int) -> list[list[int]]:
    """Keys of `lengths` in batches of at most `tokens` padded tokens (at least one key), longest first.

    The longest come first so that memory that does not suffice shows at once.
    """
    batches: list[list[int]] = []
    for key in sorted(lengths, key=lambda k: (-lengths[k], k)):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= tokens:
            batches[-1].append(key)
        else:
            batches.append([key])
    return batches


def halving(
    work: Callable[[Sequence[int]], list[_Result]], batch: Sequence[int]
) -> Iterator[tuple[Sequence[int], list[_Result]]]:
    """Results of a batch, cut in halves as often as memory demands.

    Raises OutOfResources where one item alone does not fit.
    """
    import torch

    waiting = [list(batch)]
    while waiting:
        part = waiting.pop()
        results: list[_Result] | None = None
        try:
            results = work(part)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(part) == 1:
                raise OutOfResources(
                    "The device's memory does not suffice for one single example.",
                    found=str(error).splitlines()[0] if str(error) else None,
                    fix="Lower evaluation.max_new_tokens or data.max_length, or use a smaller model.",
                ) from None
        if results is None:
            # Outside the handler, whose traceback would keep the failed batch's tensors alive.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            middle = len(part) // 2
            waiting += [part[middle:], part[:middle]]
        else:
            yield part, results


@contextlib.contextmanager
def for_inference(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; the model's modes are put back as they were."""
    import torch

    with _eval_mode(model), torch.inference_mode():
        yield


@contextlib.contextmanager
def _eval_mode(model: Any) -> Iterator[None]:
    """Evaluation mode; each module gets its own flag back, as frozen parts may differ from the rest."""
    training = {module: module.training for module in model.modules()}
    use_cache = getattr(model.config, "use_cache", None)
    model.eval()
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag
        if use_cache is not None:
            model.config.use_cache = use_cache


@contextlib.contextmanager
def no_inherited_settings(model: Any) -> Iterator[None]:
    """Take the model's own generation defaults away for a while: `generate` fills what we leave open from them."""
    from transformers import GenerationConfig

    owners = [model, model.get_base_model()] if hasattr(model, "get_base_model") else [model]
    before = [owner.generation_config for owner in owners]
    for owner in owners:
        owner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for owner, config in zip(owners, before, strict=True):
            owner.generation_config = config


@contextlib.contextmanager
def seeded(model: Any, seed: int) -> Iterator[None]:
    """A random stream of our own; torch's is left as found, so that evaluating never changes a training."""
    import torch

    device = model.device
    kind = device.type if device.type in {"cuda", "mps", "xpu"} else "cuda"
    devices = [device] if device.type == kind else []
    with torch.random.fork_rng(devices=devices, device_type=kind):
        torch.manual_seed(seed)
        yield


def _generation_config(
    *, room: int, stop_ids: Sequence[int], pad_id: int, temperature: float, first: Mapping[str, int]
) -> Any:
    from transformers import GenerationConfig

    draws = temperature >= COLDEST
    sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if draws else {}
    return GenerationConfig(
        max_new_tokens=room,
        do_sample=draws,
        num_beams=1,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=pad_id,
        use_cache=True,
        **first,
        **sampling,
    )


def _pad_id(tokenizer: Any, stop_ids: Sequence[int]) -> int:
    """Any id serves where there is no padding token: padding is masked before the prompt and cut after it."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return stop_ids[0] if stop_ids else 0


def cut(ids: Sequence[int], stop_ids: Sequence[int], tokenizer: Any) -> Generated:
    """New tokens up to the first stop token; only padding follows it."""
    end = next((position for position, token in enumerate(ids) if token in stop_ids), None)
    kept = tuple(ids if end is None else ids[:end])
    text = decoded(kept, tokenizer)
    return Generated(kept, text, "length") if end is None else Generated(kept, text, "stop", ids[end])


def decoded(ids: Sequence[int], tokenizer: Any) -> str:
    """The text of an answer's tokens, without special ones."""
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


COLDEST = 1e-5
"""Temperature below which the likeliest token is taken: a logit divided by less may leave float32, and of two logits
that differ at all the likelier one is drawn anyway."""


def pick(logits: Any, temperature: float, top_p: float, generator: Any) -> int:
    """The next token: the likeliest below `COLDEST`, else drawn from the smallest set with `top_p` probability.

    Raises ValueError for logits that are no numbers: a GPU would be lost to its process by drawing from them.
    """
    import torch

    if temperature < COLDEST:
        return int(logits.argmax())
    scaled = (logits - logits.max()) / temperature
    probabilities, order = torch.softmax(scaled, -1).sort(descending=True)
    if not probabilities[0] > 0:
        raise ValueError("the model's logits are not numbers")
    left = probabilities.cumsum(-1) - probabilities >= top_p
    left[0] = False  # also where top_p is 0 in float32
    probabilities[left] = 0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])
