"""A model as an ONNX graph, by torch's own exporter, and onnxruntime reading it back.

    whole weights -> torch.export -> onnxscript's optimizer -> model.onnx -> onnxruntime

The graph reads one text and gives the logits after each of its tokens. It keeps no cache: to write on, the whole text
is read again for each token, which suits short answers. (optimum-onnx writes graphs with a cache, but needs
transformers 4.)
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from tunesmith import models
from tunesmith.data.templates import end_of_turn_ids
from tunesmith.errors import ModelError, nearest
from tunesmith.export.parity import Question, Reader, read_as
from tunesmith.generation import context_length, cut

NAME = "model.onnx"

FAMILIES = ("gemma2", "gemma3_text", "gpt2", "llama", "mistral", "phi3", "qwen2", "qwen3", "t5")
"""Kinds of models that are tried, each by a test that compares onnxruntime's logits with transformers'."""

LARGEST_FILE = 1_500_000_000
"""Bytes of weights from which on they lie beside the graph: protobuf holds no more than 2 GB."""


def check_family(config: Any, *, folder: str) -> None:
    """Raises ModelError naming the families, for a model of another."""
    if config.model_type not in FAMILIES:
        raise ModelError(
            f"Models of the kind '{config.model_type}' are not written as ONNX.",
            found=folder,
            fix=f"{nearest(config.model_type, FAMILIES)} Written are: {', '.join(FAMILIES)}.",
        )


def inputs_of(is_pair: bool) -> tuple[str, ...]:
    """What the graph reads."""
    return ("input_ids", "decoder_input_ids") if is_pair else ("input_ids",)


def write(folder: Path, file: Path) -> None:
    """Write a folder of whole weights as a graph of float32. Raises ModelError where torch cannot export it."""
    import torch

    model = models.load_model(str(folder), attention="eager").eval()
    names = inputs_of(model.config.is_encoder_decoder)

    class Read(torch.nn.Module):  # type: ignore[misc]
        """Token ids in, logits out."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *ids: Any) -> Any:
            return self.model(**dict(zip(names, ids, strict=True)), use_cache=False).logits

    given = tuple(torch.zeros(1, 7 - n, dtype=torch.long) for n in range(len(names)))
    longest = context_length(model)
    lengths = tuple({1: torch.export.Dim(f"length_{n}", min=1, max=longest)} for n in range(len(names)))
    try:
        with _quiet():
            program = torch.onnx.export(
                Read().eval(),
                given,
                dynamo=True,
                input_names=list(names),
                output_names=["logits"],
                dynamic_shapes=(lengths,),
                verbose=False,
            )
            assert program is not None
            size = sum(p.numel() * 4 for p in model.parameters())
            program.save(file, external_data=size > LARGEST_FILE)
    except Exception as error:  # torch's exporter raises whatever its stages raise
        first = next(iter(str(error).strip().splitlines()), "")[:300]
        raise ModelError(
            f"torch cannot export {folder.name} as ONNX.",
            found=f"{type(error).__name__}: {first}",
            fix="Use the merged model with transformers or vLLM, or `tunesmith export --to gguf`.",
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter tells of every package of torch's family that is not there; an error says what matters."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def reader(file: Path, model: Any, tokenizer: Any) -> Reader:
    """onnxruntime, on a graph of such a model, with the tokenizer that lies beside it."""
    import numpy
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    first = models.first_tokens(model)
    stop_ids = end_of_turn_ids(tokenizer)

    def logits(ids: Sequence[int], answer: Sequence[int]) -> Any:
        rows = [[*ids], [first["decoder_start_token_id"], *answer]] if len(names) > 1 else [[*ids, *answer]]
        given = {name: numpy.array([row], dtype=numpy.int64) for name, row in zip(names, rows, strict=True)}
        return torch.from_numpy(session.run(None, given)[0][0])

    def greedy(ids: Sequence[int], room: int) -> Any:
        found: list[int] = []
        while len(found) < room and not (found and found[-1] in stop_ids):
            forced = first.get("forced_bos_token_id") if not found else None
            found.append(int(logits(ids, found)[-1].argmax()) if forced is None else forced)
        return cut(found, stop_ids, tokenizer)

    def tokens(asked: Question) -> Sequence[int]:
        return read_as(asked, tokenizer)

    return Reader(
        f"onnxruntime {metadata.version('onnxruntime')}",
        tokens,
        greedy,
        logits,
        context_length(model),
        place="onnx",
    )
