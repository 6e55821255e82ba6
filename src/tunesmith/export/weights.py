"""Whole weights written tensor by tensor: a base's files, with the changes of adapters and 4-bit rounding put in.

    base's safetensors -> one matrix -> rounded as it was trained on -> changed by PEFT's own layer -> a shard

Memory holds one shard and one matrix, so that a model larger than memory can be written. What an adapter makes of a
matrix is computed by PEFT on a model that has this one layer. Every layer is asked something before, in its parts,
and after, as read back from its file.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tunesmith import models
from tunesmith.errors import ModelError, TunesmithError
from tunesmith.recipe import QLoRA

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

LAYER_TOLERANCES = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.5e-2}
"""How far a merged layer's outputs may be from those of its parts, as a share of the largest, by stored type."""

PROBES = 8
"""Inputs that each changed layer is asked."""

UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}


def size_in_bytes(text: str) -> int:
    """`500MB`, `5GB` or `2GiB` as a number. Raises TunesmithError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not found or found[2].upper() not in UNITS or float(found[1]) <= 0:
        raise TunesmithError(
            "The size of a shard was not understood.", found=text, fix="Write it like 500MB or 5GB."
        )
    return max(1, int(float(found[1]) * UNITS[found[2].upper()]))


@dataclass(frozen=True)
class Layers:
    """Every tensor of a written folder, read back, against what it was made from."""

    changed: int
    """Layers that an adapter changes: asked some inputs as base and adapter, and as merged."""
    copied: int
    """Tensors that have to be those of the base, to the bit, but for the stored type."""
    wrong: tuple[str, ...]
    """Tensors that are not."""
    largest_difference: float
    """Of a changed layer's output, as a share of its largest."""
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether every layer is within the tolerance and every other tensor as it was."""
        return not self.wrong and self.largest_difference <= self.tolerance

    def sentence(self) -> str:
        """The result for people."""
        wrong = f"; {', '.join(self.wrong[:4])} read back as something else" if self.wrong else ""
        return (
            f"{self.changed} changed layers answer as in parts, largest difference {self.largest_difference:.2g} of "
            f"the largest output, allowed {self.tolerance:g}; {self.copied} other tensors are the base's{wrong}"
        )


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder, opened: what it changes and by what."""

    folder: Path
    weight: float
    """What its change is multiplied by."""
    config: Any
    layers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Module -> parameter of its LoRA layer -> name in the file."""
    whole: Mapping[str, str] = field(default_factory=dict)
    """Tensor that was trained in whole -> name in the file."""

    @property
    def is_plain(self) -> bool:
        """Whether its change is one product of two matrices for each layer, and nothing else."""
        return not (self.whole or self.config.use_dora or has_own_start(self))

    def read(self, name: str) -> Any:
        """One tensor of the file, in float32."""
        return _read(self.folder / "adapter_model.safetensors", name).float()


def opened(folder: Path, weight: float = 1.0) -> Adapter:
    """What an adapter's folder holds. Raises ModelError for one that is no change of weights."""
    import peft
    from safetensors import safe_open

    config = peft.PeftConfig.from_pretrained(str(folder))
    if config.peft_type != peft.PeftType.LORA:
        raise ModelError(
            f"An adapter of the type {getattr(config.peft_type, 'value', config.peft_type)} is no change of weights, "
            "so it cannot be merged.",
            found=str(folder / "adapter_config.json"),
            fix="Use it as it is: `tunesmith chat` and transformers load it on its base.",
        )
    layers: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        names = list(file.keys())
    for name in names:
        inner = name.removeprefix("base_model.model.")
        module, is_lora, rest = inner.partition(".lora_")
        if not is_lora:
            whole[inner] = name
        elif "." in rest:  # lora_A.weight
            part, _, end = rest.partition(".")
            layers.setdefault(module, {})[f"lora_{part}.default.{end}"] = name
        else:  # lora_embedding_A, lora_magnitude_vector
            end = ".weight" if rest == "magnitude_vector" else ""
            layers.setdefault(module, {})[f"lora_{rest}.default{end}"] = name
    return Adapter(folder, weight, config, layers, whole)


UNUSUAL = (
    "target_parameters", "layer_replication", "trainable_token_indices", "megatron_config", "lora_bias",
    "arrow_config", "alora_invocation_tokens",
)  # fmt: skip
"""What a LoRA can have that changes more than the weight of one module."""


@dataclass(frozen=True)
class Source:
    """A base's files, and the model that they are of, without weights."""

    skeleton: Any
    files: Mapping[str, Path]
    """Tensor, as the file names it -> file."""
    names: Mapping[str, str]
    """Tensor, as the file names it -> as the model names it."""
    in_four_bits: frozenset[str] = frozenset()
    """Tensors, as the model names them, that were trained on in 4 bits."""
    quantized: QLoRA | None = None
    dtype: str = "float32"
    """Type that the base had in training, before it was quantized."""

    def read(self, key: str) -> Any:
        """A tensor as adapters were trained on it."""
        found = _read(self.files[key], key)
        if self.names[key] in self.in_four_bits:
            module = self.skeleton.get_submodule(self.names[key].removesuffix(".weight"))
            found = dequantized(found, self, is_transposed=type(module).__name__ == "Conv1D")
        return found


def source_of(
    folder: Path, skeleton: Any, *, quantized: QLoRA | None = None, dtype: str = "float32"
) -> Source:
    """The weights of a folder. Raises ModelError where there are none in safetensors, or a file is missing."""
    from safetensors import safe_open

    index = folder / INDEX
    if index.is_file():
        kept = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {name: folder / file for name, file in kept.items()}
    elif (folder / SINGLE).is_file():
        with safe_open(folder / SINGLE, framework="pt") as opened_file:
            files = dict.fromkeys(opened_file.keys(), folder / SINGLE)
    else:
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8])
        raise ModelError(
            f"{folder} has no weights in safetensors.", found=found, fix="Only safetensors are read."
        )
    if missing := sorted({file.name for file in files.values() if not file.is_file()}):
        raise ModelError(
            f"{folder} lacks weights.", found=f"{', '.join(missing)} in {INDEX}", fix="Copy them there."
        )
    known = set(skeleton.state_dict())
    prefix = f"{skeleton.base_model_prefix}."
    names = {}
    renamed = _renaming(skeleton)
    for key in sorted(files, key=lambda key: (files[key].name, key)):
        for name in (key, f"{prefix}{key}", key.removeprefix(prefix), renamed(key)):
            if name in known:
                names[key] = name
                break
    four = frozenset(_in_four_bits(skeleton, quantized)) if quantized else frozenset()
    return Source(skeleton, files, names, four, quantized, dtype)


def _renaming(skeleton: Any) -> Callable[[str], str]:
    """How transformers renames the weights of a file as it loads such a model (Gemma 3 with its tower for pictures).
    Weights that it puts together from several stay as they are named."""
    from transformers.conversion_mapping import WeightConverter, get_model_conversion_mapping
    from transformers.core_model_loading import apply_renamings

    rules = [rule for rule in get_model_conversion_mapping(skeleton) if not isinstance(rule, WeightConverter)]
    return lambda key: str(apply_renamings(key, rules))


def obstacle(source: Source, adapters: Sequence[Adapter]) -> str | None:
    """Why these adapters cannot be put in one tensor after the other; None where they can."""
    held = set(source.names.values())
    tied = dict(getattr(source.skeleton, "all_tied_weights_keys", {}) or {})
    if missing := sorted(set(source.skeleton.state_dict()) - held - set(tied) - _new_heads(adapters)):
        return f"the base's files name its weights otherwise than transformers does ({missing[0]})"
    for adapter in adapters:
        if unusual := next((name for name in UNUSUAL if getattr(adapter.config, name, None)), None):
            return f"the adapter has {unusual}"
        if adapter.config.init_lora_weights in ("loftq", "corda", "lora_ga"):
            return f"the adapter starts by {adapter.config.init_lora_weights}, which changes the base"
        of_layers = {f"{module}.weight" for module in adapter.layers}
        ends = (set(tied) | set(tied.values())) & (of_layers | set(adapter.whole))
        if ends and getattr(source.skeleton.config, "is_encoder_decoder", False):
            return "the adapter changes one end of a matrix that serves several"
        known = held | set(tied) | _new_heads(adapters)
        if unknown := next((name for name in (*of_layers, *adapter.whole) if name not in known), None):
            return f"the adapter names {unknown}, which is no tensor of the base's files"
    return None


def _new_heads(adapters: Sequence[Adapter]) -> set[str]:
    return {name for adapter in adapters for name in adapter.whole if name == f"{models.HEAD}.weight"}


@dataclass(frozen=True)
class Written:
    """Files of whole weights."""

    parameters: int
    shards: tuple[str, ...]
    largest_shard: int
    """In bytes."""
    unties: bool
    """Whether head and words are one matrix in the base and two here."""
    probes: Mapping[str, tuple[Any, Any]]
    """Module -> what it was asked, and what base and adapter answered."""
    modules: Mapping[str, str]
    """Module that was changed -> tensor in the files."""


def write(
    source: Source,
    adapters: Sequence[Adapter],
    folder: Path,
    *,
    dtype: str,
    max_shard: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Written:
    """Write the base with its adapters put in as safetensors to a folder that is there, no file above `max_shard` bytes
    unless one tensor is.

    Raises ModelError where an adapter gives a weight that is not a number.
    """
    import torch

    stored = getattr(torch, dtype)
    probes: dict[str, tuple[Any, Any]] = {}
    modules: dict[str, str] = {}
    shards = _Shards(folder, max_shard)
    plans = list(_planned(source, adapters))
    for done, (key, name, base) in enumerate(plans, start=1):
        tensor = _combined(source, adapters, name, base, probes)
        if name.removesuffix(".weight") in probes:
            modules[name.removesuffix(".weight")] = key
        shards.add(key, tensor.to(stored).contiguous() if tensor.is_floating_point() else tensor)
        del tensor
        progress(done, len(plans))
    tied = dict(getattr(source.skeleton, "all_tied_weights_keys", {}) or {})
    unties = any(name in tied and name not in source.names.values() for _, name, _ in plans)
    names = shards.finish()
    return Written(shards.parameters, names, shards.largest, unties, probes, modules)


def _planned(source: Source, adapters: Sequence[Adapter]) -> Iterator[tuple[str, str, str | None]]:
    """(name in the files, name in the model, the base's tensor it is made from), file by file."""
    tied = dict(getattr(source.skeleton, "all_tied_weights_keys", {}) or {})
    changed = {name for a in adapters for name in (*a.whole, *(f"{module}.weight" for module in a.layers))}
    by_name = {name: key for key, name in source.names.items()}
    for key, name in source.names.items():
        yield key, name, key
    # One matrix serves both ends of the model; where one end is changed, the other needs one of its own.
    ends = {end for pair in tied.items() if changed & set(pair) for end in pair}
    for name in sorted(ends - set(by_name)):
        base = by_name.get(tied.get(name, "")) or next(
            (by_name[target] for target, of in tied.items() if of == name and target in by_name), None
        )
        yield name, name, base
    for name in sorted(_new_heads(adapters) - set(by_name)):
        yield name, name, None


def _combined(
    source: Source,
    adapters: Sequence[Adapter],
    name: str,
    base: str | None,
    probes: dict[str, tuple[Any, Any]],
) -> Any:
    """A tensor with what each adapter makes of it: base + the sum of weight x change."""
    module = name.removesuffix(".weight")
    found = source.read(base) if base else None
    by_layer = [a for a in adapters if module != name and module in a.layers]
    in_whole = [a for a in adapters if name in a.whole]
    if not by_layer and not in_whole:
        assert found is not None
        return found
    if len(adapters) == 1 and in_whole and in_whole[0].weight == 1:
        return _finite(in_whole[0].read(in_whole[0].whole[name]), name, in_whole[0])
    if found is None:
        raise ModelError(
            f"Adapters that train {name} anew cannot be added up.",
            found=", ".join(a.folder.name for a in in_whole),
            fix="Merge one of them alone, with weight 1.",
        )
    start = found.float()
    total, answer, asked = start.clone(), None, None
    for adapter in by_layer:
        layer = _layer(source, adapter, module, start)
        if asked is None:
            asked = _inputs(layer)
            # Not the layer's own base: PiSSA and OLoRA have taken their start out of it.
            answer = plain = _answer(_plain(source, module, start), asked)
        answer = answer + adapter.weight * (_answer(layer, asked) - plain)
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise _damaged(str(error).splitlines()[0]) from error
        own = layer.get_base_layer().weight.data
        total = own if len(adapters) == 1 and adapter.weight == 1 else total + adapter.weight * (own - start)
    for adapter in in_whole:
        total = total + adapter.weight * (_finite(adapter.read(adapter.whole[name]), name, adapter) - start)
    if asked is not None and not in_whole:
        probes[module] = (asked, answer)
    return total


def has_own_start(adapter: Adapter) -> bool:
    """Whether an adapter starts as a part of the weight, which the base then lacks."""
    return models.is_from_base(adapter.config.init_lora_weights)


def _finite(tensor: Any, name: str, adapter: Adapter) -> Any:
    if not bool(tensor.isfinite().all()):
        raise _damaged(f"{name} of {adapter.folder.name} is not a number everywhere")
    return tensor


def _damaged(said: str) -> ModelError:
    return ModelError(
        "The adapter cannot be merged into its base.",
        found=said,
        fix="Its weights are damaged or not numbers: use an earlier checkpoint, or train again.",
    )


def _plain(source: Source, module: str, weight: Any) -> Any:
    """One module of the model, with this weight."""
    import torch

    found = copy.deepcopy(source.skeleton.get_submodule(module))
    found.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    # A bias is the same before and after; what is asked leaves it out.
    if getattr(found, "bias", None) is not None:
        found.bias = torch.nn.Parameter(torch.zeros(found.bias.shape), requires_grad=False)
    for name, buffer in list(found.named_buffers()):
        if buffer.is_meta:  # the scale of Gemma's embeddings, which only scales both sides
            found.register_buffer(name, torch.ones(buffer.shape), persistent=False)
    return found.eval()


def _layer(source: Source, adapter: Adapter, module: str, weight: Any) -> Any:
    """PEFT's layer of one module: made on a model that has nothing else, at the module's place in the whole."""
    import torch
    from peft.tuners.lora import LoraModel

    root = parent = torch.nn.Module()
    *above, last = module.split(".")
    for part in above:
        child = torch.nn.Module()
        parent.add_module(part, child)
        parent = child
    parent.add_module(last, _plain(source, module, weight))
    own_start = adapter.config.init_lora_weights if has_own_start(adapter) else True
    config = replace(
        adapter.config, modules_to_save=None, bias="none", lora_dropout=0.0, init_lora_weights=own_start
    )
    LoraModel(root, config, "default")
    layer: Any = root.get_submodule(module).eval()
    given = {name: adapter.read(file) for name, file in adapter.layers[module].items()}
    try:
        done = layer.load_state_dict(given, strict=False)
    except RuntimeError as error:
        raise _unfit(adapter, module, str(error).splitlines()[-1].strip()) from error
    left = [name for name in done.missing_keys if name.startswith("lora_")]
    if left or done.unexpected_keys:
        raise _unfit(adapter, module, ", ".join([*left, *done.unexpected_keys][:4]))
    return layer


def _unfit(adapter: Adapter, module: str, said: str) -> ModelError:
    return ModelError(
        f"The adapter {adapter.folder.name} does not fit {module} of its base.",
        found=said,
        fix="Give the base that it was trained on as base_model_name_or_path in adapter_config.json.",
    )


def _inputs(layer: Any) -> Any:
    """The same few inputs for a layer, each time."""
    import torch

    generator = torch.Generator().manual_seed(0)
    base = layer.get_base_layer()
    if isinstance(base, torch.nn.Embedding):
        return torch.randint(base.num_embeddings, (PROBES,), generator=generator)
    return torch.randn(PROBES, layer.in_features, generator=generator)


def _answer(module: Any, asked: Any) -> Any:
    import torch

    with torch.inference_mode():
        return module(asked).float()


def checked(
    source: Source, adapters: Sequence[Adapter], written: Written, folder: Path, *, dtype: str
) -> Layers:
    """Read back every tensor of the folder: changed layers are asked, all others compared with the base's."""
    import torch

    stored = getattr(torch, dtype)
    place = places(folder)
    by_key = {key: module for module, key in written.modules.items()}
    differences, wrong, copied = [0.0], [], 0
    for key, name, base in _planned(source, adapters):
        if key not in place:
            wrong.append(f"{key} (missing)")
            continue
        found = _read(place[key], key)
        if key in by_key:
            asked, expected = written.probes[by_key[key]]
            module = _plain(source, by_key[key], found.float())
            off = (_answer(module, asked) - expected).abs().max()
            differences.append(float(off / expected.abs().max().clamp_min(1e-30)))
            continue
        own = next((a for a in adapters if name in a.whole), None)
        if own is not None:
            right = _combined(source, adapters, name, base, {})
        else:
            assert base
            right = source.read(base)
        copied += own is None
        if not torch.equal(found, right.to(stored) if right.is_floating_point() else right):
            wrong.append(key)
    import numpy

    return Layers(
        changed=len(by_key),
        copied=copied,
        wrong=tuple(wrong),
        largest_difference=float(numpy.max(differences)),
        tolerance=LAYER_TOLERANCES[dtype],
    )


def places(folder: Path) -> dict[str, Path]:
    """Tensor -> file of a folder of weights."""
    from safetensors import safe_open

    if (folder / INDEX).is_file():
        kept = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / file for name, file in kept.items()}
    with safe_open(folder / SINGLE, framework="pt") as file:
        return dict.fromkeys(file.keys(), folder / SINGLE)


def _read(file: Path, name: str) -> Any:
    """One tensor; the file is not kept open, since what was read of it would count as held."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened_file:
        return opened_file.get_tensor(name)


class _Shards:
    """Tensors collected into files of at most so many bytes, numbered when their count is known."""

    def __init__(self, folder: Path, largest: int) -> None:
        self.folder, self.limit = folder, largest
        self.held: dict[str, Any] = {}
        self.size = self.largest = self.total = self.parameters = 0
        self.files: list[list[str]] = []

    def add(self, name: str, tensor: Any) -> None:
        if self.held and self.size + tensor.nbytes > self.limit:
            self._flush()
        self.held[name] = tensor
        self.size += tensor.nbytes
        self.total += tensor.nbytes
        self.parameters += tensor.numel()

    def _flush(self) -> None:
        from safetensors.torch import save_file

        save_file(self.held, self.folder / f"part-{len(self.files)}.safetensors", {"format": "pt"})
        self.files.append(list(self.held))
        self.largest = max(self.largest, self.size)
        self.held, self.size = {}, 0

    def finish(self) -> tuple[str, ...]:
        """Names of the files, whose index is written where there are several."""
        self._flush()
        count = len(self.files)
        numbered = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
        names = [SINGLE] if count == 1 else numbered
        for n, name in enumerate(names):
            (self.folder / f"part-{n}.safetensors").rename(self.folder / name)
        if count > 1:
            facts = {
                "metadata": {"total_size": self.total, "total_parameters": self.parameters},
                "weight_map": {
                    key: name for keys, name in zip(self.files, names, strict=True) for key in keys
                },
            }
            (self.folder / INDEX).write_text(
                json.dumps(facts, indent=1, sort_keys=True) + "\n", encoding="utf-8"
            )
        return tuple(names)


def _in_four_bits(skeleton: Any, quantized: QLoRA) -> Iterator[str]:
    """Weights that transformers packs into 4 bits: found by having it replace the modules of an outline."""
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import HfQuantizer

    config = models.four_bit(quantized, "score" if models.is_reward(skeleton) else None, device="cpu")
    outline = copy.deepcopy(skeleton)
    outline.all_tied_weights_keys = getattr(skeleton, "all_tied_weights_keys", {})
    kept = HfQuantizer.get_modules_to_not_convert(
        outline, config.llm_int8_skip_modules, getattr(outline, "_keep_in_fp32_modules", None)
    )
    replaced = replace_with_bnb_linear(outline, modules_to_not_convert=kept, quantization_config=config)
    for name, module in replaced.named_modules():
        if type(module).__name__ == "Linear4bit":
            yield f"{name}.weight"


def dequantized(weight: Any, source: Source, *, is_transposed: bool) -> Any:
    """A matrix rounded to 4 bits and back, as bitsandbytes does where it is trained on."""
    import bitsandbytes as bnb
    import torch

    assert source.quantized
    given = weight.to(getattr(torch, source.dtype))
    packed = bnb.nn.Params4bit(
        (given.T if is_transposed else given).contiguous(),
        requires_grad=False,
        compress_statistics=source.quantized.double_quantization,
        quant_type="nf4",
    ).to("cpu")
    found = bnb.functional.dequantize_4bit(packed.data, packed.quant_state)
    return (found.T if is_transposed else found).contiguous()
