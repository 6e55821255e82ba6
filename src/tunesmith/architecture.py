"""A model in numbers from its configuration alone: parts, layers, memory, what LoRA would train.

The modules are built on PyTorch's meta device, so that a model of any size costs neither memory nor a
download of weights. Where a folder has weights, the headers of its safetensors files say their types.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tunesmith import models
from tunesmith.errors import ModelError, TunesmithError
from tunesmith.recipe import LoRA
from tunesmith.untrusted import header

Kind = Literal["causal", "seq2seq", "reward", "encoder", "image-text", "other"]

PARTS = ("embeddings", "attention", "feed-forward", "norms", "head", "vision", "other")
"""What parameters are counted under; a weight that two parts share counts once, under the first."""

TRAINED: tuple[Kind, ...] = ("causal", "seq2seq", "reward")
"""Kinds that a method here trains."""

NEEDS: dict[Kind, str] = {
    "causal": "method kind sft: it continues a text",
    "seq2seq": "method kind seq2seq: an encoder reads the question, a decoder writes the answer",
    "reward": "method kind reward: it gives an answer a score and writes none",
    "encoder": "it cannot generate text: every token sees those after it, so no method here trains it",
    "image-text": "it reads images beside text; no method here trains it",
    "other": "it is no language model that continues or answers a text; no method here trains it",
}

BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip

STORED = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8",
    "BOOL": "bool",
}  # fmt: skip
"""Types as safetensors headers name them."""

QLORA = " (--qlora)"
"""What is said beside 4 bits of a model that can be trained so."""

NF4_BLOCK, CONSTANT_BLOCK = 64, 256
"""4-bit weights share one constant per 64, and doubly quantized constants one per 256 of these (QLoRA,
arXiv 2305.14314, section 3: 0.5 bits per weight come down to 0.127)."""


@dataclass(frozen=True)
class Quantization:
    """How a model's linear layers are packed, as its `quantization_config` says."""

    method: str
    bits: int
    group: int | None
    """Weights that share one scale; None where an output row does."""
    double: bool = False
    """Whether the 4-bit constants are quantized themselves."""
    skipped: tuple[str, ...] | None = None
    """Modules that stay as they are; None leaves the choice to transformers."""

    def sentence(self) -> str:
        """One line for people."""
        double = ", double quantization" if self.double else ""
        group = f", blocks of {self.group}" if self.group else ""
        return f"{self.bits} bits ({self.method}{group}{double})"

    def bytes_of(self, outputs: int, inputs: int) -> int:
        """Bytes of one packed matrix, with the constants that unpack it.

        Sources: bitsandbytes' `quantize_4bit` (a float32 maximum per block, or a byte per block, a float32
        per 256 blocks and one offset; a table of 16, or 16 and 256, float32 values) and `Linear8bitLt` (a
        float32 per output); the packed layers of AutoGPTQ and AutoAWQ (a float16 scale and a packed zero
        per group, GPTQ also an int32 per input).
        """
        count = outputs * inputs
        if self.method == "bitsandbytes" and self.bits == 4:
            blocks = math.ceil(count / NF4_BLOCK)
            constants = (
                blocks + 4 * math.ceil(blocks / CONSTANT_BLOCK) + 4 + 4 * 256 if self.double else 4 * blocks
            )
            return math.ceil(count / 2) + constants + 4 * 16
        if self.method == "bitsandbytes":
            return count + 4 * outputs
        groups = math.ceil(inputs / self.group) if self.group else 1
        packed = math.ceil(count * self.bits / 8) + 2 * groups * outputs
        packed += math.ceil(groups * outputs * self.bits / 8)
        return packed + (4 * inputs if self.method == "gptq" else 0)


@dataclass(frozen=True)
class Architecture:
    """What is known of a model without its weights."""

    name: str
    architecture: str
    kind: Kind
    needs: str
    """What it is trained with, or why it is not."""
    layers: int
    decoder_layers: int | None
    """Layers of the decoder, where there is an encoder beside it; `layers` are then the encoder's."""
    hidden_size: int | None
    parameters: int
    parts: Mapping[str, int]
    """Parameters by part; together they are all of them."""
    dtype: str
    dtype_from: str
    quantization: Quantization | None
    quantized_parameters: int
    memory: int | None
    """Bytes of weights and buffers when loaded as the model is; None where the packing is not known."""
    memory_as: Mapping[str, int]
    """The same if it were loaded in another type."""
    context: int | None
    vocabulary: int | None
    lora_targets: tuple[str, ...]
    """What `--lora` would train, or what the folder's own adapter does; empty where nothing is known."""
    lora_rank: int | None
    lora_parameters: int | None
    """Parameters of that adapter; None where there is none to speak of."""
    template: str | None
    """Where the chat template is from; None where the model has none."""
    stored: Mapping[str, int] = field(default_factory=dict)
    """Bytes on disk by type, from the safetensors headers; empty without weights."""
    adapter: str | None = None
    """What a folder with an adapter puts on this base."""
    notes: tuple[str, ...] = ()
    modules: str = ""
    """The modules as PyTorch prints them."""

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return asdict(self)

    def entries(self) -> list[dict[str, Any]]:
        """The summary as `show model` lists it: a name, words for people, and the value they stand for."""
        layers = f"{self.layers} encoder and {self.decoder_layers} decoder layers"
        targets, size = self._adapter_words()
        lines: list[tuple[str, str, Any]] = [
            ("architecture", self.architecture, self.architecture),
            ("kind", f"{self.kind}: {self.needs}", self.kind),
            ("adapter", self.adapter or "", self.adapter),
            ("parameters", f"{self.parameters:,}", self.parameters),
            *(
                (f"  {part}", f"{count:,} ({count / self.parameters:.1%})", count)
                for part, count in self.parts.items()
            ),
            (
                "layers",
                layers if self.decoder_layers else str(self.layers),
                [self.layers, self.decoder_layers],
            ),
            ("width", str(self.hidden_size or ""), self.hidden_size),
            ("dtype", f"{self.dtype}, says {self.dtype_from}", self.dtype),
            (
                "quantization",
                f"{self.quantization.sentence()}: {self.quantized_parameters:,} of the parameters"
                if self.quantization
                else "none",
                self.quantization and asdict(self.quantization),
            ),
            ("memory at load", _size(self.memory) if self.memory else "not known", self.memory),
            *((f"  as {name}", _size(count), count) for name, count in self.memory_as.items()),
            (
                "on disk",
                ", ".join(f"{name} {_size(count)}" for name, count in self.stored.items()),
                dict(self.stored),
            ),
            ("context", f"{self.context:,} tokens" if self.context else "not stated", self.context),
            ("vocabulary", f"{self.vocabulary:,} tokens" if self.vocabulary else "none", self.vocabulary),
            ("chat template", self.template or "none", self.template),
            ("adapter targets", targets, list(self.lora_targets)),
            ("adapter size", size, self.lora_parameters),
            *(("note", note, note) for note in self.notes),
            ("modules", self.modules, None),
        ]
        return [
            {"name": name, "about": about} | ({} if value is None else {"value": value})
            for name, about, value in lines
            if about
        ]

    def _adapter_words(self) -> tuple[str, str]:
        """Targets and size of an adapter, for people."""
        if self.kind not in TRAINED:
            return f"none: {self.needs}", ""
        named = ", ".join(self.lora_targets) or "not known: name them with --target-modules"
        if self.lora_parameters is None:
            return named, ""
        rank = f" at rank {self.lora_rank}" if self.lora_rank else ""
        share = self.lora_parameters / self.parameters
        return named, f"{self.lora_parameters:,} trainable parameters{rank} ({share:.4%})"


def architecture(base: str, *, revision: str | None = None) -> Architecture:
    """The summary of a run, a folder, a Hub id or `tiny`. Raises ModelError where there is no configuration."""
    from tunesmith.generation import context_length

    folder = models.folder_of(base, revision=revision, weights=False)
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        return _with_adapter(base, adapter)
    config, quantized = _configuration(base, folder)
    kind = kind_of(config)
    model = _modules(base, config, kind)
    stored = _stored(folder)
    dtype, dtype_from = _dtype(config, stored, quantized)
    quantization, notes = _quantization(quantized)
    packed = _packed(model, quantization) if quantization else {}
    lora = LoRA()
    targets: tuple[str, ...] = ()
    if kind in TRAINED:
        try:
            targets = tuple(models.target_modules(model, lora.targets))
        except ModelError as error:
            notes.append(f"LoRA needs --target-modules here: {error.problem}")
    vocabulary, template, said = _tokenizer(base, revision)
    memory_as = _memory_as(model, kind)
    eight, four = list(memory_as.values())[-2:]
    if four > eight:
        notes.append(
            "4 bits take more than 8 bits here: each matrix has tables of 272 constants, more than these small "
            "matrices save"
        )
    text = config.get_text_config()
    parts = _parts(model)
    return Architecture(
        name=base,
        architecture=type(model).__name__,
        kind=kind,
        needs=NEEDS[kind],
        layers=_first(text, "encoder_layers", "num_hidden_layers", "num_layers", "n_layer") or 0,
        decoder_layers=_first(config, "num_decoder_layers", "decoder_layers") if kind == "seq2seq" else None,
        hidden_size=_first(text, "hidden_size", "d_model", "n_embd"),
        parameters=sum(parts.values()),
        parts={name: parts[name] for name in PARTS if parts[name]},
        dtype=dtype,
        dtype_from=dtype_from,
        quantization=quantization,
        quantized_parameters=sum(outputs * inputs for outputs, inputs in packed.values()),
        memory=None
        if quantized and not quantization
        else _memory(model, dtype, quantization or Quantization("none", 16, None), packed),
        memory_as=memory_as,
        context=context_length(model),
        vocabulary=vocabulary or _first(text, "vocab_size"),
        lora_targets=targets,
        lora_rank=lora.rank if targets else None,
        lora_parameters=_lora_parameters(model, targets, lora.rank) if targets else None,
        template=template,
        stored=stored,
        notes=(*notes, *said),
        modules=str(model),
    )


def _size(count: int) -> str:
    return f"{count:,} bytes ({count / 2**30:.2f} GiB)"


def get_model_summary(model_name: str) -> tuple[str, str]:
    """The modules of a model as text, and no error; or no text, and the error with its remedy.

    Quantized models are described without being loaded, so neither a GPU nor bitsandbytes is needed.
    """
    try:
        found = architecture(model_name)
    except TunesmithError as error:
        return "", "\n".join(error.lines())
    head = [f"{found.architecture}: {found.parameters:,} parameters, {found.dtype}"]
    head += [found.quantization.sentence()] if found.quantization else []
    return "\n".join([", ".join(head), found.modules]), ""


def kind_of(config: Any) -> Kind:
    """What a model of this configuration does with text."""
    from transformers.models.auto import modeling_auto as auto

    family = config.model_type
    if config.is_encoder_decoder and family in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return "seq2seq"
    if family in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and hasattr(config, "vision_config"):
        return "image-text"
    if models.fills_gaps(config):
        return "encoder"
    if config.num_labels == 1 and models._architecture(config).endswith(models.SCORING):
        return "reward"
    return "causal" if family in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else "other"


def _configuration(base: str, folder: Path) -> tuple[Any, Mapping[str, Any]]:
    """The configuration without its quantization, and that quantization."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # the loaders raise many unrelated types for one user-visible fact
        raise models._not_loaded("configuration", base, error) from error
    quantized = getattr(config, "quantization_config", None) or {}
    if not isinstance(quantized, Mapping):
        quantized = quantized.to_dict()
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config, dict(quantized)


def _modules(base: str, config: Any, kind: Kind) -> Any:
    import torch
    import transformers

    classes = {
        "causal": transformers.AutoModelForCausalLM,
        "seq2seq": transformers.AutoModelForSeq2SeqLM,
        "reward": transformers.AutoModelForSequenceClassification,
        "image-text": transformers.AutoModelForImageTextToText,
        "encoder": transformers.AutoModelForMaskedLM,
    }
    named = classes.get(kind)
    chosen = named if named and type(config) in named._model_mapping else transformers.AutoModel
    try:
        with torch.device("meta"):
            return chosen.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise models._not_loaded("architecture", base, error) from error


def _with_adapter(base: str, file: Path) -> Architecture:
    """The base of an adapter, with what the adapter adds: its own targets, rank and weights."""
    saved = json.loads(file.read_text(encoding="utf-8"))
    below = architecture(str(saved.get("base_model_name_or_path")))
    targets = saved.get("target_modules") or []
    if saved.get("task_type") == "SEQ_CLS":
        below = replace(below, kind="reward", needs=NEEDS["reward"])
    # A text is a pattern of module names.
    named = (targets,) if isinstance(targets, str) else tuple(sorted(targets))
    ranks = sorted({saved.get("r"), *(saved.get("rank_pattern") or {}).values()} - {None})
    extra = saved.get("modules_to_save") or []
    words = (
        saved.get("peft_type", "adapter") + f", rank {' and '.join(map(str, ranks))}" * bool(ranks)
        + f", on {', '.join(named)} of {below.name}" + f", with {', '.join(extra)} trained in full" * bool(extra)
    )  # fmt: skip
    weights = file.with_name("adapter_model.safetensors")
    tensors = header(weights) if weights.is_file() else {}
    sizes: dict[str, int] = {name: math.prod(tensor["shape"]) for name, tensor in tensors.items()}
    # PEFT runs the updates in float32, whatever the base is in; modules trained in full stand beside the base's
    # own in the base's type, and biases in their place.
    updates = sum(size for name, size in sizes.items() if ".lora_" in name)
    copies = sum(
        size for name, size in sizes.items() if set(name.split(".")) & set(extra) and ".lora_" not in name
    )

    def added(dtype: str) -> int:
        return 4 * updates + BYTES.get(dtype, 2) * copies

    notes = () if tensors else (f"the folder has no {weights.name}: the adapter's size is not known",)
    vocabulary, template, missing = _tokenizer(base, None)
    if missing:  # the base's own, as loading does it
        vocabulary, template = below.vocabulary, below.template
    return replace(
        below,
        name=base,
        vocabulary=vocabulary,
        template=template,
        adapter=words,
        lora_targets=named,
        lora_rank=ranks[0] if len(ranks) == 1 else None,
        lora_parameters=sum(sizes.values()) if sizes else None,
        memory=None if below.memory is None else below.memory + added(below.dtype),
        memory_as={name.removesuffix(QLORA): count + added(name) for name, count in below.memory_as.items()},
        notes=(*below.notes, *notes),
    )


def _tokenizer(base: str, revision: str | None) -> tuple[int | None, str | None, list[str]]:
    """Size of the vocabulary, where the chat template is from, and what is to be said of either."""
    try:
        tokenizer = models.load_tokenizer(base, revision=revision)
    except ModelError as error:
        return None, None, [f"vocabulary as in the configuration, template not known: {error.problem}"]
    return len(tokenizer), "its own" if tokenizer.chat_template else None, []


def _stored(folder: Path) -> dict[str, int]:
    """Bytes by type in the safetensors files of a folder, read from their headers only."""
    found: Counter[str] = Counter()
    for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else []:
        for tensor in header(file).values():
            begin, end = tensor["data_offsets"]
            found[STORED.get(tensor["dtype"], tensor["dtype"])] += end - begin
    return dict(found.most_common())


def _dtype(config: Any, stored: Mapping[str, int], quantized: Mapping[str, Any]) -> tuple[str, str]:
    """The type of the weights that are not packed, and who says so."""
    floats = [name for name in stored if "float" in name]
    if floats and not quantized:
        return floats[0], "the weights on disk"
    if config.dtype is not None:
        return str(config.dtype).removeprefix("torch."), "config.json"
    return "float32", "transformers' default: config.json names none"


def _quantization(config: Mapping[str, Any]) -> tuple[Quantization | None, list[str]]:
    """The packing that a `quantization_config` describes, or why its memory is not computed."""
    if not config:
        return None, []
    method = str(config.get("quant_method") or "bitsandbytes")
    if method == "bitsandbytes" or config.get("load_in_4bit") or config.get("load_in_8bit"):
        four = bool(config.get("load_in_4bit"))
        skipped = config.get("llm_int8_skip_modules")
        return Quantization(
            "bitsandbytes",
            4 if four else 8,
            NF4_BLOCK if four else None,
            four and bool(config.get("bnb_4bit_use_double_quant")),
            None if skipped is None else tuple(skipped),
        ), []
    if method in ("gptq", "awq") and config.get("bits"):
        group = int(config.get("group_size", 128))
        skipped = tuple(config.get("modules_to_not_convert") or ())
        return Quantization(method, int(config["bits"]), group if group > 0 else None, skipped=skipped), []
    return None, [f"packed by '{method}', of which the memory is not computed: load it to see"]


def _packed(model: Any, quantization: Quantization) -> dict[str, tuple[int, int]]:
    """The linear layers that are packed, by name, as (outputs, inputs).

    As transformers decides: every Linear and Conv1D but the skipped ones, which are by default the
    output embeddings, what is tied to them and the last module, and those that it keeps in float32.
    """
    import torch
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    skipped = [*(quantization.skipped or ()), *model._keep_in_fp32_modules]
    if quantization.skipped is None or quantization.method != "bitsandbytes":
        skipped += get_keys_to_not_convert(model)
    sizes = {}
    for name, module in model.named_modules():
        is_linear = type(module) is torch.nn.Linear or isinstance(module, Conv1D)
        if is_linear and should_convert_module(name, skipped):
            rows, columns = module.weight.shape
            sizes[name] = (columns, rows) if isinstance(module, Conv1D) else (rows, columns)
    return sizes


def _memory(model: Any, dtype: str, quantization: Quantization, packed: Mapping[str, tuple[int, int]]) -> int:
    """Bytes of parameters (shared ones once) and buffers."""
    wide = set(model._keep_in_fp32_modules if dtype == "float16" else ())
    wide |= set(model._keep_in_fp32_modules_strict if dtype in ("float16", "bfloat16") else ())
    unpacked = sum(
        parameter.numel() * (4 if wide and wide & set(name.split(".")) else BYTES.get(dtype, 4))
        for name, parameter in model.named_parameters()
        if name.removesuffix(".weight") not in packed
    )
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    return int(unpacked) + int(buffers) + sum(quantization.bytes_of(*size) for size in packed.values())


def _memory_as(model: Any, kind: Kind) -> dict[str, int]:
    """Memory of the model in the types that a user can choose between."""
    plain = {
        name: _memory(model, name, Quantization("none", 16, None), {}) for name in ("float32", "bfloat16")
    }
    for label, quantization in (
        ("8 bits", Quantization("bitsandbytes", 8, None)),
        ("4 bits" + QLORA * (kind in TRAINED), Quantization("bitsandbytes", 4, NF4_BLOCK, double=True)),
    ):
        plain[label] = _memory(model, "bfloat16", quantization, _packed(model, quantization))
    return plain


def _lora_parameters(model: Any, targets: tuple[str, ...], rank: int) -> int:
    """Trainable parameters of LoRA: two matrices per target, inputs × rank and rank × outputs."""
    chosen = [n for n in models.linear_modules(model) if any(n == t or n.endswith("." + t) for t in targets)]
    return sum(rank * int(sum(model.get_submodule(name).weight.shape)) for name in chosen)


def _parts(model: Any) -> Counter[str]:
    """Parameters by part, from the modules that own them."""
    head = getattr(model, models.HEAD) if models.is_reward(model) else model.get_output_embeddings()
    head_name = next((name for name, module in model.named_modules() if module is head), None)
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        counts[_part(name, list(_chain(model, name)), head, head_name)] += parameter.numel()
    return counts


def _chain(model: Any, parameter: str) -> Iterator[Any]:
    """The modules that a parameter lies in, from the model down."""
    module = model
    yield module
    for step in parameter.split(".")[:-1]:
        module = getattr(module, step)
        yield module


def _part(name: str, chain: list[Any], head: Any, head_name: str | None) -> str:
    import torch

    kinds = [type(module).__name__.lower() for module in chain]
    in_layer = any(isinstance(module, torch.nn.ModuleList) for module in chain)
    if any(word in name for word in ("vision", "visual", "image_newline", "multi_modal_projector")):
        return "vision"
    if head is not None and chain[-1] is head:
        return "head"
    if "norm" in kinds[-1]:
        return "norms"
    # T5 keeps its relative positions, an Embedding, inside the attention that uses them.
    if any("attention" in kind or "attn" in kind for kind in kinds[1:]):
        return "attention"
    if isinstance(chain[-1], torch.nn.Embedding) or "embedding" in kinds[-1]:
        return "embeddings"
    if any(word in kind for kind in kinds[1:] for word in ("mamba", "mixer", "rwkv", "deltanet", "ssm")):
        return "other"
    if in_layer:
        return "feed-forward"
    above = (head_name or "").split(".")[0]
    return "head" if "." in (head_name or "") and name.split(".")[0] == above else "other"


def _first(config: Any, *names: str) -> int | None:
    return next((int(v) for n in names if isinstance(v := getattr(config, n, None), int)), None)
