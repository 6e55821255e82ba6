"""A model's folder written as one GGUF file, for llama.cpp, Ollama and whoever else reads that format.

    safetensors -> names and layout of llama.cpp -> quantised tensor by tensor -> one file

What llama.cpp computes for an architecture is fixed in its code (`src/models/*.cpp`); what a model asks for beyond that
is either folded into its weights, which changes nothing but rounding, or refused before any work. The format is
described in ggml's `docs/gguf.md`; names come from the `gguf` package, which llama.cpp's own tools use.
"""

from __future__ import annotations

import collections
import importlib.util
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from tunesmith.errors import ModelError, TunesmithError, nearest
from tunesmith.export.vocabulary import Vocabulary

FEW_BITS = 8.0
"""Bits for each weight below which the embedding and the head are stored in more."""

Keys = dict[str, int | float | str | bool | list[bool]]


@dataclass(frozen=True)
class Family:
    """How models of one kind are said in GGUF."""

    architecture: str
    """Its name in llama.cpp."""
    keys: Callable[[Any], Keys]
    """Hyperparameters of a configuration, without the architecture's name before them."""
    weights: Callable[[str, Any, Any], Any]
    """(name in the checkpoint, tensor, configuration) -> the tensor as llama.cpp wants it."""
    problem: Callable[[Any], str | None]
    """What of a configuration llama.cpp cannot compute."""


@dataclass(frozen=True)
class Written:
    """A GGUF file and how its weights are stored."""

    file: Path
    architecture: str
    quant: str
    tensors: Mapping[str, int]
    """Number of tensors by how they are stored: vectors stay float32, and what a quantiser's blocks do not divide."""
    notes: tuple[str, ...]


def family_of(config: Any, *, folder: str) -> Family:
    """The family of a model's configuration. Raises ModelError naming those that can be written, and where a model
    of such a family asks for what llama.cpp does not compute."""
    config = text_part(config)
    found = FAMILIES.get(config.model_type)
    if found is None:
        raise ModelError(
            f"Models of the kind '{config.model_type}' are not written as GGUF.",
            found=f"{folder}; no {CONVERTER} of llama.cpp, by {CONVERTER_AT} or on the PATH",
            fix=f"Written are: {', '.join(sorted(FAMILIES))}. For others set {CONVERTER_AT} to llama.cpp's folder, "
            f"whose {CONVERTER} is then used.",
        )
    if problem := found.problem(config):
        raise ModelError(
            f"llama.cpp's '{found.architecture}' does not compute what this model does.",
            found=problem,
            fix="Use the merged model with transformers or vLLM: `tunesmith export --to safetensors`. Where "
            f"llama.cpp's own {CONVERTER} can write it, set {CONVERTER_AT} to its folder.",
        )
    return found


NESTED = {"gemma3": "gemma3_text"}
"""Kinds of models that see pictures too -> the kind of their part for text, which is a whole model of its own."""

WRAPPED = (
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)
"""How files name the weights of that part, and how they are called where it stands alone."""
SEEING = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
"""Weights beside that part."""


def text_part(config: Any) -> Any:
    """The configuration of the part that reads and writes text; of most models it is all of it."""
    return config.text_config if config.model_type in NESTED else config


CONVERTER = "convert_hf_to_gguf.py"
"""llama.cpp's own program that writes GGUF files."""
CONVERTER_AT = "TUNESMITH_LLAMA_CPP"
"""Environment variable with the folder of llama.cpp, or with the converter itself."""
CONVERTED = ("f32", "f16", "bf16", "q8_0")
"""How the converter can store weights."""


def converter() -> Path | None:
    """llama.cpp's converter, where it is installed: by the environment variable, or on the PATH.

    Raises ModelError where the variable names a place without it.
    """
    if given := os.environ.get(CONVERTER_AT):
        place = Path(given).expanduser()
        found = place / CONVERTER if place.is_dir() else place
        if not found.is_file():
            raise ModelError(
                f"{CONVERTER_AT} names no converter.",
                found=str(place),
                fix=f"Give the folder that has {CONVERTER}.",
            )
        return found
    there = shutil.which(CONVERTER) or shutil.which(CONVERTER.replace("_", "-"))
    return Path(there) if there else None


def writer_of(config: Any, *, folder: str, quant: str) -> Path | None:
    """Who writes a model: None where it is this module, else llama.cpp's converter, which knows more families and more
    of what those known here ask for.

    Raises ModelError where neither can, before any work.
    """
    text = text_part(config)
    own = FAMILIES.get(text.model_type)
    if own and not own.problem(text):
        return None
    if not (found := converter()):
        family_of(config, folder=folder)  # says what is in the way
        return None
    if quant not in CONVERTED:
        raise ModelError(
            f"llama.cpp's converter does not store weights as '{quant}'.", fix=nearest(quant, CONVERTED)
        )
    return found


def convert(program: Path, folder: Path, file: Path, *, quant: str) -> Written:
    """Have llama.cpp's converter write whole weights. Raises ModelError with its last words where it fails."""
    import gguf

    begin = [sys.executable, str(program)] if program.suffix == ".py" else [str(program)]
    done = subprocess.run(
        [*begin, str(folder), "--outfile", str(file), "--outtype", quant],
        capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if done.returncode or not file.is_file():
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()][-3:]
        raise ModelError(
            "llama.cpp's converter wrote no file.",
            found=f"exit code {done.returncode}: {' | '.join(said) or 'it said nothing'}",
            fix=f"Run it by hand: python {program} MERGED_MODEL --outtype {quant}",
        )
    reader = gguf.GGUFReader(file)
    counts = collections.Counter(tensor.tensor_type.name for tensor in reader.tensors)
    architecture = str(reader.get_field("general.architecture").contents())  # type: ignore[union-attr]
    return Written(file, architecture, quant, counts, (f"written by llama.cpp's converter, {program.name}",))


def context_in(file: Path) -> int:
    """Most tokens of a prompt with its answer, as a file says."""
    import gguf

    reader = gguf.GGUFReader(file)
    [name] = [name for name in reader.fields if name.endswith(".context_length")]
    return int(reader.get_field(name).contents())  # type: ignore[union-attr]


@cache
def quants() -> tuple[str, ...]:
    """How weights can be stored, most bits first: what the installed `gguf` package can compute, found by asking it.

    The k-quants need llama.cpp's own tool. None where the package is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        return ()
    import gguf
    import numpy

    found = []
    for kind in gguf.GGMLQuantizationType:
        try:
            gguf.quantize(numpy.zeros((1, gguf.GGML_QUANT_SIZES[kind][0]), dtype=numpy.float32), kind)
        except (NotImplementedError, KeyError):
            continue
        if _file_type(gguf, kind.name.lower()) is not None:
            found.append(kind)
    return tuple(k.name.lower() for k in sorted(found, key=lambda kind: (-bits_of(kind.name), int(kind))))


def bits_of(quant: str) -> float:
    """Bits for each weight, the scales of blocks included."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[quant.upper()]]
    return 8 * size / block


def check_quant(quant: str) -> None:
    """Raises TunesmithError for a way to store weights that there is not."""
    if quant not in (known := quants()):
        raise TunesmithError(f"Weights are not stored as '{quant}' in GGUF.", fix=nearest(quant, known))


def write(folder: Path, file: Path, *, quant: str, vocabulary: Vocabulary, config: Any, name: str) -> Written:
    """Write a folder of whole weights as one GGUF file. `file` has to lie in a folder that is there.

    Tensor by tensor: memory holds the largest one, in float32. Raises ModelError for an unknown family or a weight
    that it does not have.
    """
    import gguf

    check_quant(quant)
    family = family_of(config, folder=str(folder))
    is_part, config = text_part(config) is not config, text_part(config)
    is_pair = bool(config.is_encoder_decoder)
    layers = max(config.num_layers, config.num_decoder_layers) if is_pair else config.num_hidden_layers
    names = gguf.get_tensor_name_map(_architecture(gguf, family.architecture), layers)
    writer = gguf.GGUFWriter(path=None, arch=family.architecture)
    writer.add_type("model")
    writer.add_name(name)
    file_type = _file_type(gguf, quant)
    assert file_type is not None, "quants() has none without"
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in family.keys(config).items():
        _add(writer, f"{family.architecture}.{key}", value)
    for key, value in vocabulary.keys.items():
        _add(writer, f"tokenizer.{key}", value)

    counts: dict[str, int] = {}
    notes = list(_notes(config))
    if is_part:
        notes.append("the file is for text: what the model sees pictures with is left out")
    with ExitStack() as stack:
        tensors = list(_tensors(folder, config, stack))
        plans = []
        for source, shape, read in tensors:
            target = names.get_name(source, try_suffixes=(".weight", ".bias"))
            if target is None:
                raise ModelError(
                    f"The weight {source} has no name in llama.cpp's '{family.architecture}'.",
                    found=f"{folder}, shape {list(shape)}",
                    fix="Use the merged model with transformers or vLLM: `tunesmith export --to safetensors`.",
                )
            kind = _stored(gguf, target, shape, quant)
            counts[kind.name] = counts.get(kind.name, 0) + 1
            stored = gguf.quant_shape_to_byte_shape(shape, kind) if kind.name not in ("F32", "F16") else shape
            plans.append((target, shape, stored, kind, source, read))
        for target, _, stored, kind, _, _ in plans:
            numpy_type, width = _numpy(kind.name)
            writer.add_tensor_info(target, stored, numpy_type, math.prod(stored) * width, raw_dtype=kind)
        writer.write_header_to_file(path=file)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        try:
            for _, _, _, kind, source, read in plans:
                tensor = family.weights(source, read().float(), config)
                writer.write_tensor_data(gguf.quantize(tensor.contiguous().numpy(), kind))
        finally:
            writer.close()
    if (other := {k: n for k, n in counts.items() if k.lower() not in (quant, "f32")}) and quant not in (
        "f32",
    ):
        said = ", ".join(f"{n} as {k}" for k, n in sorted(other.items()))
        notes.append(f"not every matrix could be stored as {quant}: {said}")
    return Written(file, family.architecture, quant, counts, tuple(notes))


def _tensors(
    folder: Path, config: Any, stack: ExitStack
) -> Iterator[tuple[str, tuple[int, ...], Callable[[], Any]]]:
    """Name, shape and a way to read each weight of a folder, and those that llama.cpp wants beside them."""
    from safetensors import safe_open

    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise ModelError(
            f"{folder} has no weights.", found="no *.safetensors", fix="Give a merged model's folder."
        )
    found: dict[str, tuple[tuple[int, ...], Callable[[], Any]]] = {}
    for shard in shards:
        weights = stack.enter_context(safe_open(shard, framework="pt"))
        for name in weights.keys():  # noqa: SIM118, a file and no mapping
            if name.startswith(SEEING):
                continue
            shape = tuple(weights.get_slice(name).get_shape())
            own = next((to + name.removeprefix(wrap) for wrap, to in WRAPPED if name.startswith(wrap)), name)
            found[own] = shape, partial(weights.get_tensor, name)
    if config.is_encoder_decoder:
        # One table for both sides. llama.cpp takes what goes into the head as it is, so the scale is the head's.
        for copy in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
            found.setdefault("shared.weight", found.get(copy) or ((), lambda: None))
            found.pop(copy, None)
        found.setdefault("lm_head.weight", found["shared.weight"])
    elif config.tie_word_embeddings:
        found.pop("lm_head.weight", None)
    for name, (shape, read) in found.items():
        yield name, shape, read
    yield from _rope_factors(config)


def _rope_factors(config: Any) -> Iterator[tuple[str, tuple[int, ...], Callable[[], Any]]]:
    """How much slower each pair of dimensions turns than its plain frequency (Llama 3's scaling, Phi 3's long and
    short factors), as transformers computes it."""
    import torch

    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind == "llama3":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        size = _head_size(config)
        plain = 1.0 / (rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size))
        yield "rope_freqs.weight", (size // 2,), lambda: plain / scaled
    if kind == "longrope":
        for which in ("long", "short"):
            factors = torch.tensor(rope[f"{which}_factor"], dtype=torch.float32)
            yield f"rope_factors_{which}.weight", tuple(factors.shape), factors.clone


def _stored(gguf: Any, name: str, shape: tuple[int, ...], quant: str) -> Any:
    """How a tensor is stored: as asked for; vectors and the small tables that llama.cpp adds up in float32."""
    types = gguf.GGMLQuantizationType
    if len(shape) < 2 or "attn_rel_b" in name or quant == "f32":
        return types.F32
    asked = types[quant.upper()]
    # The embedding and the head decide most about the loss of few bits, and are looked up, not multiplied.
    if bits_of(quant) < FEW_BITS and name in ("token_embd.weight", "output.weight"):
        asked = types.Q8_0
    ways = [asked, *([types.Q8_0] if bits_of(quant) < FEW_BITS else []), types.F16]
    return next(kind for kind in ways if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0)


def _numpy(kind: str) -> tuple[Any, int]:
    import numpy

    return {"F32": (numpy.float32, 4), "F16": (numpy.float16, 2)}.get(kind, (numpy.uint8, 1))


def _architecture(gguf: Any, name: str) -> Any:
    return next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name)


def _file_type(gguf: Any, quant: str) -> int | None:
    """llama.cpp's number of a way to store weights; None where it has none."""
    known = {kind.name: int(kind) for kind in gguf.LlamaFileType}
    if quant == "f32":
        return known["ALL_F32"]
    name = f"MOSTLY_{quant.upper()}"
    return next((known[one] for one in (name, f"{name}_MOE") if one in known), None)


def _add(writer: Any, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _window(config: Any) -> int | None:
    """Tokens that a layer sees, where that is fewer than the context and llama.cpp does not know it."""
    window = getattr(config, "sliding_window", None)
    uses = getattr(config, "use_sliding_window", True)
    return int(window) if window and uses and window < config.max_position_embeddings else None


def _notes(config: Any) -> Iterator[str]:
    if config.model_type in ("mistral", "qwen2", "qwen3", "phi3") and (window := _window(config)):
        yield (
            f"the context is {window} tokens in this file, not {config.max_position_embeddings}: llama.cpp does not "
            "compute this model's sliding window, and up to there the answers are the same"
        )


def _decoder_keys(config: Any) -> Keys:
    """What all decoders have."""
    rope = config.rope_parameters or {}
    of_all = rope.get("full_attention", rope)
    keys: Keys = {
        "context_length": int(config.max_position_embeddings),
        "embedding_length": int(config.hidden_size),
        "block_count": int(config.num_hidden_layers),
        "feed_forward_length": int(config.intermediate_size),
        "attention.head_count": int(config.num_attention_heads),
        "attention.head_count_kv": int(config.num_key_value_heads),
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": _head_size(config),
        "attention.value_length": _head_size(config),
        "rope.freq_base": float(of_all["rope_theta"]),
        "rope.dimension_count": int(_head_size(config) * of_all.get("partial_rotary_factor", 1.0)),
        "vocab_size": int(config.vocab_size),
    }
    if of_all.get("rope_type") == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(of_all["factor"])}
    return keys


def _windowless_keys(config: Any) -> Keys:
    keys = _decoder_keys(config)
    if window := _window(config):
        keys["context_length"] = window
    return keys


def _phi3_keys(config: Any) -> Keys:
    keys = _windowless_keys(config)
    original = int(
        getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
    )
    keys["rope.scaling.original_context_length"] = original
    if config.rope_parameters.get("rope_type") == "longrope":
        factor = config.rope_parameters.get("attention_factor")
        if factor is None:
            scale = config.max_position_embeddings / original
            factor = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
        keys["rope.scaling.attn_factor"] = float(factor)
    return keys


def _gemma_keys(config: Any) -> Keys:
    keys = _decoder_keys(config)
    if config.sliding_window:
        keys["attention.sliding_window"] = int(config.sliding_window)
        keys["attention.sliding_window_pattern"] = [
            kind == "sliding_attention" for kind in config.layer_types
        ]
    for name, key in (("attn", "attn_logit_softcapping"), ("final", "final_logit_softcapping")):
        if value := getattr(config, f"{name}_logit_softcapping", None):
            keys[key] = float(value)
    if local := (config.rope_parameters or {}).get("sliding_attention"):
        keys["rope.freq_base_swa"] = float(local["rope_theta"])
    return keys


def _t5_keys(config: Any) -> Keys:
    return {
        "context_length": int(getattr(config, "n_positions", None) or 512),
        "embedding_length": int(config.d_model),
        "feed_forward_length": int(config.d_ff),
        "block_count": int(config.num_layers),
        "decoder_block_count": int(config.num_decoder_layers),
        "attention.head_count": int(config.num_heads),
        "attention.key_length": int(config.d_kv),
        "attention.value_length": int(config.d_kv),
        "attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
        "attention.layer_norm_rms_epsilon": float(config.layer_norm_epsilon),
        "attention.relative_buckets_count": int(config.relative_attention_num_buckets),
        "decoder_start_token_id": int(config.decoder_start_token_id),
        "vocab_size": int(config.vocab_size),
    }


def _as_is(name: str, tensor: Any, config: Any) -> Any:
    return tensor


def _interleaved(name: str, tensor: Any, config: Any) -> Any:
    """llama.cpp turns neighbouring dimensions of a head ('llama'), transformers those half a head apart."""
    for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
        if f"self_attn.{part}." in name:
            rows = tensor.shape[0] // heads // 2
            return tensor.view(heads, 2, rows, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
    return tensor


def _gemma(name: str, tensor: Any, config: Any) -> Any:
    """Norms hold what is added to 1. A scale of the queries other than llama.cpp's is taken into the weights."""
    if name.endswith("norm.weight"):
        tensor = tensor + 1
    holds_scale = "q_norm" if config.model_type.startswith("gemma3") else "q_proj"
    return tensor * _query_factor(config) if f".{holds_scale}." in name else tensor


LARGEST_GEMMA = {"gemma2": 46, "gemma3_text": 62}
"""Number of layers of the 27B models, whose queries llama.cpp scales by the width over the number of heads."""


def _query_factor(config: Any) -> float:
    """The model's scale of queries over the one that llama.cpp takes."""
    by_heads = config.num_hidden_layers == LARGEST_GEMMA[config.model_type]
    taken = config.hidden_size // config.num_attention_heads if by_heads else _head_size(config)
    return math.sqrt(taken / config.query_pre_attn_scalar)


def _act(config: Any, *allowed: str) -> str | None:
    act = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    return None if act in allowed else f"the activation '{act}', where {' or '.join(allowed)} is computed"


def _rope(config: Any, *allowed: str) -> str | None:
    rope = config.rope_parameters or {}
    kinds = [r.get("rope_type", "default") for r in (rope.values() if "full_attention" in rope else [rope])]
    other = [kind for kind in kinds if kind not in allowed]
    return f"the position scaling '{other[0]}', where {' or '.join(allowed)} is computed" if other else None


def _llama_problem(config: Any) -> str | None:
    return _act(config, "silu") or _rope(config, "default", "linear", "llama3")


def _qwen_problem(config: Any) -> str | None:
    return _act(config, "silu") or _rope(config, "default", "linear")


def _phi3_problem(config: Any) -> str | None:
    if config.hidden_size != _head_size(config) * config.num_attention_heads:
        return "heads that are not the width divided by their number"
    return _act(config, "silu") or _rope(config, "default", "longrope")


def _gemma_problem(config: Any) -> str | None:
    if config.model_type == "gemma2" and not config.tie_word_embeddings:
        return "a head that is not the embedding"
    return _act(config, "gelu_pytorch_tanh") or _rope(config, "default", "linear")


def _t5(name: str, tensor: Any, config: Any) -> Any:
    is_scaled = name == "lm_head.weight" and config.scale_decoder_outputs
    return tensor * config.d_model**-0.5 if is_scaled else tensor


def _t5_problem(config: Any) -> str | None:
    if config.relative_attention_max_distance != 128:
        return f"relative positions up to {config.relative_attention_max_distance}, where 128 is computed"
    if config.num_decoder_layers > config.num_layers:
        return "more decoder than encoder layers, with which llama.cpp does not load"
    act = config.feed_forward_proj
    return (
        None
        if act in ("relu", "gated-gelu")
        else f"the activation '{act}', where relu or gated-gelu is computed"
    )


FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama", _decoder_keys, _interleaved, _llama_problem),
    "mistral": Family("llama", _windowless_keys, _interleaved, _llama_problem),
    "qwen2": Family("qwen2", _windowless_keys, _as_is, _qwen_problem),
    "qwen3": Family("qwen3", _windowless_keys, _as_is, _qwen_problem),
    "gemma2": Family("gemma2", _gemma_keys, _gemma, _gemma_problem),
    "gemma3_text": Family("gemma3", _gemma_keys, _gemma, _gemma_problem),
    "phi3": Family("phi3", _phi3_keys, _as_is, _phi3_problem),
    "t5": Family("t5", _t5_keys, _t5, _t5_problem),
}
"""`model_type` -> how it is written."""
