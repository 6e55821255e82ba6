"""llama.cpp in this process, where llama-cpp-python is installed: a GGUF file asked by token ids.

Used to prove that an exported file answers as the model it was made from. Its cache is kept in float32, and one
sequence is computed at a time, so that nothing but the file decides.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import MissingExtra, ModelError


@dataclass(frozen=True)
class Loaded:
    """A GGUF file in memory."""

    model: Any
    context: Any
    vocabulary: Any
    num_tokens: int
    length: int
    """Most tokens of a prompt with its answer."""
    is_pair: bool
    """Whether it is an encoder-decoder model."""


def is_installed() -> bool:
    """Whether llama.cpp can be asked here."""
    return importlib.util.find_spec("llama_cpp") is not None


def version() -> str:
    """Name and version for the record."""
    from importlib import metadata

    return f"llama-cpp-python {metadata.version('llama-cpp-python')}"


@contextmanager
def opened(
    file: Path, *, length: int, threads: int | None = None, words_only: bool = False
) -> Iterator[Loaded]:
    """The file, loaded on the CPU with room for `length` tokens, or its context, and freed afterwards. With
    `words_only` its weights are not loaded, and all it can do is to put texts into tokens.

    Raises ModelError where llama.cpp does not take it.
    """
    if not is_installed():
        raise MissingExtra("llama-cpp-python", f"Asking {file.name}", install="'tunesmith[llama-cpp]'")
    import llama_cpp as cpp
    import torch

    _silence(cpp)
    settings = cpp.llama_model_default_params()
    settings.n_gpu_layers = 0
    settings.vocab_only = words_only
    model = cpp.llama_model_load_from_file(str(file).encode(), settings)
    if not model:
        raise ModelError(
            f"llama.cpp does not load {file.name}.",
            found=f"{file}, {version()}",
            fix="`llama-cli -m FILE` says why; please report it with the model's config.json.",
        )
    length = min(int(cpp.llama_model_n_ctx_train(model)), length)
    options = cpp.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = length
    options.n_threads = options.n_threads_batch = threads or torch.get_num_threads()
    options.type_k = options.type_v = cpp.GGML_TYPE_F32
    options.flash_attn_type = cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    options.swa_full = True
    context = None if words_only else cpp.llama_init_from_model(model, options)
    try:
        vocabulary = cpp.llama_model_get_vocab(model)
        yield Loaded(
            model,
            context,
            vocabulary,
            num_tokens=int(cpp.llama_vocab_n_tokens(vocabulary)),
            length=length,
            is_pair=bool(cpp.llama_model_has_encoder(model)),
        )
    finally:
        if context:
            cpp.llama_free(context)
        cpp.llama_model_free(model)


def chat_template(loaded: Loaded) -> str | None:
    """The chat template in the file, with which llama.cpp's own programs put a conversation."""
    import llama_cpp as cpp

    found = cpp.llama_model_chat_template(loaded.model, None)
    return found.decode("utf-8") if found else None


def tokenized(loaded: Loaded, text: str) -> list[int]:
    """Ids of a text that a template has written with its special tokens. To that of an encoder-decoder model the file
    has its end added; llama.cpp's server then takes the template's own away, and so does this."""
    import llama_cpp as cpp

    raw = text.encode()
    if loaded.is_pair and cpp.llama_vocab_get_add_eos(loaded.vocabulary):
        end = cpp.llama_vocab_get_text(loaded.vocabulary, cpp.llama_vocab_eos(loaded.vocabulary))
        raw = raw.removesuffix(end)
    room = len(raw) + 8
    ids = (cpp.llama_token * room)()
    count = cpp.llama_tokenize(loaded.vocabulary, raw, len(raw), ids, room, loaded.is_pair, True)
    if count < 0:
        raise ModelError(
            "llama.cpp gave more tokens than a text has bytes.", found=f"{-count} for {len(raw)} bytes"
        )
    return list(ids[:count])


def logits(loaded: Loaded, prompt: Sequence[int], answer: Sequence[int]) -> Any:
    """Logits after each token of prompt and answer (of an encoder-decoder model after its first token and each of
    the answer), as an array of positions by tokens."""
    import llama_cpp as cpp
    import numpy

    cpp.llama_memory_clear(cpp.llama_get_memory(loaded.context), True)
    if loaded.is_pair:
        _compute(loaded, prompt, 0, wanted=0, encode=True)
        path = [int(cpp.llama_model_decoder_start_token(loaded.model)), *answer]
    else:
        path = [*prompt, *answer]
    _compute(loaded, path, 0, wanted=len(path))
    return numpy.stack([_row(loaded, n) for n in range(len(path))])


def greedy(loaded: Loaded, prompt: Sequence[int], *, room: int, stop_ids: Sequence[int]) -> list[int]:
    """The answer's ids, with the stop token where one ended it."""
    import llama_cpp as cpp

    cpp.llama_memory_clear(cpp.llama_get_memory(loaded.context), True)
    path = list(prompt)
    if loaded.is_pair:
        _compute(loaded, prompt, 0, wanted=0, encode=True)
        path = [int(cpp.llama_model_decoder_start_token(loaded.model))]
    found: list[int] = []
    done = 0
    while len(found) < room:
        _compute(loaded, path, done, wanted=1)
        done += len(path)
        path = [int(_row(loaded, -1).argmax())]
        found += path
        if path[0] in stop_ids:
            break
    return found


def _compute(loaded: Loaded, ids: Sequence[int], start: int, *, wanted: int, encode: bool = False) -> None:
    """One pass over ids from a position on, keeping the logits of the last `wanted`."""
    import llama_cpp as cpp

    batch = cpp.llama_batch_init(len(ids), 0, 1)
    try:
        batch.n_tokens = len(ids)
        for n, token in enumerate(ids):
            batch.token[n], batch.pos[n], batch.n_seq_id[n] = token, start + n, 1
            batch.seq_id[n][0] = 0
            batch.logits[n] = n >= len(ids) - wanted
        status = (cpp.llama_encode if encode else cpp.llama_decode)(loaded.context, batch)
    finally:
        cpp.llama_batch_free(batch)
    if status:
        raise ModelError("llama.cpp could not compute a prompt.", found=f"status {status}, {len(ids)} tokens")


def _row(loaded: Loaded, n: int) -> Any:
    import llama_cpp as cpp
    import numpy

    found = cpp.llama_get_logits_ith(loaded.context, n)
    return numpy.ctypeslib.as_array(found, shape=(loaded.num_tokens,)).copy()


def _silence(cpp: Any) -> None:
    """llama.cpp writes what it does to standard error; our own lines say what matters."""
    global _QUIET
    if _QUIET is None:
        _QUIET = cpp.llama_log_callback(lambda level, text, data: None)
        cpp.llama_log_set(_QUIET, None)
        cpp.llama_backend_init()


_QUIET: Any = None  # kept, since llama.cpp holds no reference to it
