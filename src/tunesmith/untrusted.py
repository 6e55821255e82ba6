"""A stranger's model folder, looked at before any library reads it.

It may be read, and nothing else: no code of it is run, no file outside it is opened, no pickle is loaded, and its
configuration asks for no more memory than its weights fill.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tunesmith.errors import ModelError

LARGEST_CONFIG, LARGEST_TOKENIZER = 16 * 2**20, 256 * 2**20
"""Bytes of a JSON file at most; `tokenizer.json` of 250,000 words has 33 MiB."""
LARGEST_TEMPLATE = 2**20
"""Bytes of a chat template at most; those in the wild have some ten thousand."""
LARGEST_HEADER = 100 * 2**20
"""Bytes of a safetensors header at most, as the safetensors package has it."""
DEEPEST = 64
"""Levels in a JSON file at most."""
MOST_LAYERS = 4096
"""Layers, blocks or experts at most, whatever the weights hold."""
LARGEST_SIZE = 2**31
"""A single size in a configuration at most."""
SLACK = 16
"""How many times as many weights as it has bytes a folder may describe: packed weights have two or more to a byte."""
FREE = 2**28
"""Weights that a folder may describe however little it holds."""

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".npz")
"""Suffixes of weights that are not read; most of them can run code when they are."""
TOKENIZERS = ("tokenizer.json", "vocab.json")
DESCRIPTIONS = (
    "config.json", "adapter_config.json", "generation_config.json", "tokenizer_config.json", "chat_template.json",
    "special_tokens_map.json", "added_tokens.json", "preprocessor_config.json", "processor_config.json", *TOKENIZERS,
)  # fmt: skip
"""What the libraries read of a model besides its weights."""

_LAYERS = re.compile(
    r"(num|n)_.*(layers?|blocks|experts)$|^n_layer$|^(num_)?(local_|routed_)?experts$|^depth$"
)
_SIZES = re.compile(
    r"(_size|_dim|_rank|_width|_length|_heads|_states|_positions|_embeddings)$|^(d|n)_[a-z]+$"
)
_FILES = re.compile(r"_(file|path|dir|folder)$")
_KERNELS = re.compile(r"(attn|attention|experts?)_implementation")


def check_folder(folder: Path, *, is_whole: bool = True) -> None:
    """Raises ModelError for a model's folder that is more, or less, than weights and descriptions to be read. Of one
    that need not be whole weights may be missing."""
    folder = folder.resolve()
    root = _root(folder)
    _check_links(folder, root)
    for path in folder.glob("*.jinja"):
        _check_length(path, LARGEST_TEMPLATE)
    described = {
        path.name: read_json(path)
        for path in sorted(folder.glob("*.json"))
        if path.name in DESCRIPTIONS or path.name.endswith(".index.json")
    }
    for name, content in described.items():
        if isinstance(content, Mapping) and name not in TOKENIZERS and not name.endswith(".index.json"):
            _check_names(folder, name, content)
        if name.endswith(".index.json"):
            _check_index(folder, name, content, is_whole=is_whole)
    if "adapter_config.json" in described:
        _check_adapter(folder, described["adapter_config.json"])
    elif "config.json" in described:
        _check_sizes(folder, described["config.json"])


def _root(folder: Path) -> Path:
    """The folder that files may lie in: in the Hub's cache a snapshot is made of links to files beside it."""
    is_snapshot = folder.parent.name == "snapshots" and (folder.parent.parent / "blobs").is_dir()
    return folder.parent.parent if is_snapshot else folder


def _check_links(folder: Path, root: Path) -> None:
    for path in sorted([*folder.iterdir(), *folder.glob("*/*")]):
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            raise ModelError(
                f"{path.name} in the model folder {folder} is a link to a file outside it.",
                found=str(path.readlink()),
                fix="If that is meant, put the file itself into the folder; else do not use the folder.",
            )


def read_json(path: Path) -> Any:
    """A JSON file of a model. Raises ModelError where it is too large, nested too deeply, or none."""
    _check_length(path, LARGEST_TOKENIZER if path.name in TOKENIZERS else LARGEST_CONFIG)
    if path.name in TOKENIZERS:
        return None  # the tokenizers package reads it, and has limits of its own
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        depth = _depth(content)
    except RecursionError:
        depth = DEEPEST + 1
    except (OSError, ValueError) as error:
        raise ModelError(f"{path.name} of the model {path.parent} is not JSON.", found=str(error)) from None
    if depth > DEEPEST:
        raise ModelError(
            f"{path.name} of the model {path.parent} is nested too deeply.",
            fix=f"At most {DEEPEST} levels are read; no configuration needs more.",
        )
    return content


def _check_length(path: Path, limit: int) -> None:
    size = path.stat().st_size
    if size > limit:
        raise ModelError(
            f"{path.name} of the model {path.parent} is too large to be one.",
            found=f"{size:,} bytes; at most {limit:,} are read",
        )


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max((_depth(item) for item in inner), default=0)


def _items(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at every level."""
    for key, value in content.items():
        yield key, value
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, dict):
                yield from _items(inner)


def is_inside(folder: Path, name: str) -> bool:
    """Whether a name leads to a place in a folder, on every system that knows such names."""
    if not name or "\0" in name or "\\" in name or re.match(r"[A-Za-z]:", name):
        return False
    return (folder / name).resolve().is_relative_to(_root(folder))


def _check_names(folder: Path, file: str, content: Mapping[str, Any]) -> None:
    """No file of a description lies elsewhere, and none asks for a program from the Hub."""
    for key, value in _items(content):
        if not isinstance(value, str):
            continue
        names_file = _FILES.search(key) and not key.endswith("name_or_path") and not is_inside(folder, value)
        # Old tokenizers name files of the machine they were made on, which are not here.
        if names_file and ("\0" in value or (folder / value).exists()):
            raise _outside(folder, file, f"{key}: {value}")
        if "/" in value and _KERNELS.search(key):
            raise ModelError(
                f"{file} of the model {folder} asks for a program from the Hub.",
                found=f"{key}: {value}",
                fix="Remove the line; what computes attention is chosen by model.attention alone.",
            )


def _outside(folder: Path, file: str, found: str) -> ModelError:
    return ModelError(
        f"{file} of the model {folder} names a file outside the folder.",
        found=found,
        fix="Do not use this folder: no model needs that.",
    )


def _check_index(folder: Path, file: str, content: Any, *, is_whole: bool) -> None:
    shards = content.get("weight_map") if isinstance(content, Mapping) else None
    if not isinstance(shards, Mapping):
        raise ModelError(f"{file} of the model {folder} has no weight_map.", fix="Load the model again.")
    if not file.endswith(".safetensors.index.json"):
        return  # of other weights, which are not read
    for name in {str(value) for value in shards.values()}:
        if not is_inside(folder, name):
            raise _outside(folder, file, f"weight_map: {name!r}")
        if not name.endswith(".safetensors"):
            raise _pickled(folder, name)
        if is_whole and not (folder / name).is_file():
            raise ModelError(
                f"The model {folder} is not whole.",
                found=f"no {name}",
                fix="Load it again, with all its files.",
            )


def _pickled(folder: Path, found: str) -> ModelError:
    return ModelError(
        f"The model {folder} has no weights as safetensors.",
        found=f"{found}, which can run a program when it is read",
        fix="Use a revision with safetensors, or convert it where nothing else is: "
        "model.save_pretrained(FOLDER) of transformers writes them.",
    )


def _check_adapter(folder: Path, content: Any) -> None:
    """An adapter has safetensors, names a base, and has nothing imported."""
    if not isinstance(content, Mapping):
        raise ModelError(f"adapter_config.json of {folder} is no object.")
    weights = folder / "adapter_model.safetensors"
    others = [p.name for p in sorted(folder.iterdir()) if p.suffix in PICKLES]
    if weights.is_file():
        header(weights)
    elif others:
        raise _pickled(folder, ", ".join(others[:3]))
    mapping = content.get("auto_mapping") or {}
    library = str(mapping.get("parent_library") or "transformers") if isinstance(mapping, Mapping) else "?"
    imported = None if library.partition(".")[0] == "transformers" else f"auto_mapping: {library}"
    if content.get("megatron_config"):
        imported = f"megatron_core: {content.get('megatron_core')}"
    if imported:
        raise ModelError(
            f"adapter_config.json of {folder} asks for a Python module to be imported.",
            found=imported,
            fix="Remove the line; an adapter needs none.",
        )
    _check_rests(folder, content)


def _check_rests(folder: Path, content: Mapping[str, Any]) -> None:
    """An adapter's base, and the base of that, is at last a model."""
    met, at = {folder}, content
    while isinstance(base := at.get("base_model_name_or_path"), str) and "\0" not in base:
        place = Path(base).expanduser().resolve()
        if not (place / "adapter_config.json").is_file():
            return
        if place in met:
            raise ModelError(
                f"The adapter {folder} rests on itself: there is no model under it.",
                found=f"base_model_name_or_path: {base}",
                fix="Name the model it was trained on in adapter_config.json.",
            )
        met.add(place)
        found = read_json(place / "adapter_config.json")
        at = found if isinstance(found, Mapping) else {}
    raise ModelError(
        f"adapter_config.json of {folder} names no base.",
        found=f"base_model_name_or_path: {at.get('base_model_name_or_path')!r}",
        fix="Name the model it was trained on.",
    )


def _check_sizes(folder: Path, content: Any) -> None:
    """What a configuration describes fits in memory as its weights do, before anything is allocated."""
    if not isinstance(content, Mapping):
        raise ModelError(f"config.json of the model {folder} is no object.")
    for key, value in _items(content):
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        limit = MOST_LAYERS if _LAYERS.search(key) else LARGEST_SIZE if _SIZES.search(key) else None
        if limit is not None and abs(value) > limit:
            raise ModelError(
                f"config.json of the model {folder} describes no model that could be.",
                found=f"{key}: {_number(value)}, above {limit:,}",
                fix="Load it again from where it comes from.",
            )
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        others = [
            p.name for p in sorted(folder.iterdir()) if p.suffix in PICKLES and p.name != "training_args.bin"
        ]
        if others:
            raise _pickled(folder, ", ".join(others[:3]))
        return  # a configuration alone, to be planned with
    tensors = [tensor for file in weights for tensor in header(file).values()]
    stored = sum(end - begin for begin, end in (tensor["data_offsets"] for tensor in tensors))
    described = max(_weights(part) for part in _parts(content))
    if described > SLACK * stored + FREE:
        raise ModelError(
            f"config.json of the model {folder} describes another model than its weights are.",
            found=f"{described:,} weights or more, and files with {stored:,} bytes",
            fix="Load it again from where it comes from.",
        )


def _number(value: int) -> str:
    return f"{value:,}" if abs(value) < 10**18 else f"a number of {value.bit_length()} bits"


def _parts(content: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The configuration and those inside it: of the text of a model that sees, of its encoder."""
    yield content
    for value in content.values():
        if isinstance(value, Mapping):
            yield from _parts(value)


def _weights(part: Mapping[str, Any]) -> int:
    """Fewest weights, roughly, that a configuration means: its words, and its layers' matrices."""

    def size(*names: str) -> int:
        found = [part.get(name) for name in names]
        return max([abs(n) for n in found if isinstance(n, int) and not isinstance(n, bool)], default=0)

    width = size("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "word_embed_proj_dim")
    inner = size("intermediate_size", "d_ff", "n_inner", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim")
    layers = size("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers")
    learned = size("n_positions") if part.get("model_type") in ("gpt2", "openai-gpt", "codegen") else 0
    return width * (size("vocab_size") + learned + layers * (width + inner))


def header(file: Path) -> dict[str, Any]:
    """Type, shape and place of each tensor in a safetensors file, from its header.

    The format: 8 bytes that give the header's length, then JSON, then the tensors. Raises ModelError for a header that
    does not describe its file.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if size < 8 or length > min(size - 8, LARGEST_HEADER):
                raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
            found = json.loads(opened.read(length))
        found.pop("__metadata__", None)
        for name, tensor in found.items():
            begin, end = tensor["data_offsets"]
            shape = tensor["shape"]
            if not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)):
                raise ValueError(f"{name[:80]!r} has no shape")
            # Of types smaller than a byte two and more weights share one.
            if not begin <= end <= size - 8 - length or math.prod(shape) > 8 * (end - begin):
                raise ValueError(f"{name[:80]!r} is said to lie where nothing is")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"{file.name} of the model {file.parent} is not safetensors.",
            found=str(error)[:200] or type(error).__name__,
            fix="Load the file again: it is damaged, or something else.",
        ) from None
    tensors: dict[str, Any] = found
    return tensors
