"""Chat templates of the main model families, each with a small tokenizer that has the family's traits.

The templates are those that the installed TRL ships. Those for Mistral, Phi 4 and ChatML are short ones of our own
in the families' public layout: they show that the layout is handled, and are not the models' own files.

Every tokenizer is made up: no vocabulary of a model is used. They are tiny, and have of the family what matters
here: its special tokens, its beginning and end of text, whether plain text gets a beginning-of-text token put
first, and what happens to spaces. What a test shows of a family holds for its template, not for its vocabulary.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

Kind = Literal["bytes", "first", "always", "never"]
"""How text becomes tokens: byte-level BPE, or pieces with a space put before the first piece of a text only
(Mistral v3), before every stretch between special tokens (Llama 2, Phi-3), or not at all (Gemma)."""


@dataclass(frozen=True)
class Traits:
    """What a family's tokenizer and template do, as its public files have it."""

    end: str
    """What closes an answer, behind its last word and through the token that ends the turn."""
    eos: str
    bos: str | None = None
    writes_bos: bool = True
    """Whether the template writes the beginning-of-text token. Where it does, the tokenizer puts one before
    plain text as well: that is how a text comes to have two."""
    kind: Kind = "bytes"
    before: str = ""
    """What the model says between the opening of its turn and the answer's first word."""
    earlier_end: str | None = None
    """What closes an answer that is not the last one, where the whole conversation has an end of its own."""
    trains: Literal["all", "last"] = "all"
    """`last` where the template writes an earlier answer otherwise than the last one."""
    reopens: bool = False
    """Whether the opening of the model's turn is left out around a given answer (a `<think>`)."""
    swallows: bool = False
    """Whether special tokens swallow the space behind them."""
    extra: tuple[str, ...] = ()
    """Special tokens that the template's text does not name."""


@dataclass(frozen=True)
class Family:
    """A template, its traits, and TRL's variant of it that marks what the assistant says."""

    name: str
    template: str = field(repr=False)
    traits: Traits
    reference: str | None = field(default=None, repr=False)
    known: bool = True
    """False for a template newer than the table below; its traits are guessed from what it writes."""


def _chatml(**more: Any) -> Traits:
    return Traits("<|im_end|>", "<|im_end|>", **{"extra": ("<|endoftext|>",), **more})


_GEMMA = Traits("<end_of_turn>", "<eos>", "<bos>", kind="never")
_LLAMA = Traits("<|eot_id|>", "<|eot_id|>", "<|begin_of_text|>", extra=("<|end_of_text|>",))
_COHERE = Traits("<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>")
_DEEPSEEK = Traits(
    "<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", trains="last", reopens=True
)
_EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
_BEHIND_THINK = "\n</think>\n\n"
TRAITS: dict[str, Traits] = {
    "cohere": _COHERE,
    "cohere2": replace(_COHERE, end="<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
    "deepseek": _DEEPSEEK,
    "diffusion_gemma": Traits("<turn|>", "<eos>", "<bos>", kind="never"),
    "gemma": _GEMMA,
    "gemma4": Traits("<turn|>", "<eos>", "<bos>", kind="never"),
    # GLM ends a turn by opening the next one: the end-of-text token is put behind the last answer.
    "glm4moe": Traits("<|endoftext|>", "<|endoftext|>", before="\n<think></think>\n", trains="last"),
    "gptoss": Traits(
        "<|return|>",
        "<|return|>",
        "<|startoftext|>",
        False,
        before="<|channel|>final<|message|>",
        trains="last",
    ),
    "lfm2": _chatml(bos="<|startoftext|>"),
    "llama3": _LLAMA,
    "muse_glimmer": Traits("<|eot|>", "<|eot|>", "<|begin_of_text|>", before=" to=user<|message|>"),
    "nemotron": _chatml(trains="last", reopens=True),
    # Phi-3's tokens swallow the line break behind them, and its pieces put a space before what follows.
    "phi3": Traits(
        "<|end|><|endoftext|>",
        "<|endoftext|>",
        "<s>",
        False,
        "always",
        " ",
        earlier_end="<|end|>",
        swallows=True,
    ),
    "qwen2_5": _chatml(),
    "qwen3": _chatml(before=_EMPTY_THOUGHT, trains="last"),
    "qwen3_instruct": _chatml(),
    "qwen3_vl": _chatml(),
    "qwen3_5_nothink": _chatml(trains="last"),
    "qwen3_5_think": _chatml(before=_BEHIND_THINK, trains="last"),
    "qwen3_6": _chatml(before=_BEHIND_THINK, trains="last"),
    "qwen3_8": _chatml(before=_BEHIND_THINK),
    "idefics3": Traits("<end_of_utterance>", "<end_of_utterance>", "<|begin_of_text|>"),
    "llava_next": Traits("</s>", "</s>", "<s>", False),
    "smolvlm": Traits("<end_of_utterance>", "<end_of_utterance>", "<|im_start|>"),
}
"""By the beginning of a template's name; the longest that fits counts."""

_MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + 'SPACE[/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant take turns') }}{% endif %}{% endfor %}"
)
OWN = (
    # In Mistral's first tokenizers the brackets are plain text, in later ones control tokens.
    Family(
        "mistral_v1", _MISTRAL.replace("SPACE", " "), Traits("</s>", "</s>", "<s>", kind="always", before=" ")
    ),
    Family(
        "mistral_v3", _MISTRAL.replace("SPACE", ""), Traits("</s>", "</s>", "<s>", kind="first", before=" ")
    ),
    Family(
        "phi4",
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}",
        Traits("<|im_end|>", "<|endoftext|>", "<|endoftext|>", writes_bos=False),
    ),
    Family(
        "chatml",
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        _chatml(),
    ),
)
"""Short templates of our own, in the public layout of families that TRL has no template of."""

# Control tokens, as templates name them. Tags in plain pointed brackets are text that has an id of its own.
_SPECIAL = re.compile(
    r"<[|｜][^\s<>|｜'\"]+[|｜]>|<\|[a-z_]+>|<[a-z_]+\|>|<\|\"\|>|<(?:start|end)_of_\w+>|\[gMASK\]|<sop>|<image>"
)
_TAG = re.compile(r"</?(?:think|tool_call|tool_response|arg_key|arg_value)>")
# How Llama 3, Qwen and their like cut text into words: line breaks stick together, whatever comes behind them.
_WORD = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_WORDS = (
    "what is the capital of france paris red blue green one two three hello yes no user assistant system model\n",
    "\n\nuser\n\n\nred  blue   green's end of 12 345\n<think>\n\n</think>\n\n[INST] one [/INST] two",
)


def families() -> list[Family]:
    """Every template of the installed TRL but the training variants, and our own."""
    import trl

    files = (Path(trl.__file__).parent / "chat_templates").glob("*.jinja")
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted(files)}
    found = []
    for name, text in texts.items():
        if name.endswith("_training"):
            continue
        prefix = max((known for known in TRAITS if name.startswith(known)), key=len, default=None)
        # Some templates carry the marks of what the assistant says themselves.
        reference = texts.get(f"{name}_training") or (text if re.search(r"endgeneration\b", text) else None)
        traits = TRAITS[prefix] if prefix else _guessed(text)
        found.append(Family(name, text, traits, reference, known=prefix is not None))
    return [*found, *OWN]


def _guessed(template: str) -> Traits:
    """Traits of a template that the table does not know: a turn ends with the last control token it names."""
    tokens = _SPECIAL.findall(template)
    end = next((t for t in reversed(tokens) if re.search("end|eot|turn|return", t)), "</s>")
    return Traits(end, end, "<s>", "bos_token" in template)


def tokenizer_of(family: Family) -> Any:
    """A small tokenizer with the family's template, special tokens and treatment of spaces."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    traits = family.traits
    names = [*_SPECIAL.findall(family.template), *traits.extra, *_SPECIAL.findall(traits.before + traits.end)]
    names += [token for token in (traits.bos, traits.eos) if token]
    if traits.kind == "first":
        names += ["[INST]", "[/INST]"]
    backend = Tokenizer.from_str(_base(traits.kind))
    backend.add_special_tokens(
        [AddedToken(n, rstrip=traits.swallows, normalized=False, special=True) for n in dict.fromkeys(names)]
    )
    tags = dict.fromkeys(_TAG.findall(family.template))
    backend.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in tags])
    if traits.bos and traits.writes_bos:
        bos = (traits.bos, backend.token_to_id(traits.bos))
        backend.post_processor = TemplateProcessing(single=f"{traits.bos} $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=traits.bos, eos_token=traits.eos, chat_template=family.template
    )


@lru_cache
def _base(kind: Kind) -> str:
    """A BPE tokenizer of a few hundred tokens as JSON, with bytes for all that it has no token of."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_WORD), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(_WORDS * 5, trainer)
        return str(tokenizer.to_str())
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=440, special_tokens=["<unk>", *byte_tokens], show_progress=False)
    trained.train_from_iterator([text.replace("\n", " ") for text in _WORDS * 5], trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(model["vocab"], merges, byte_fallback=True, unk_token="<unk>"))
    if kind == "always":
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(steps)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    # Without the usual strip of the first space, so that decoding shows every token as it is.
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return str(tokenizer.to_str())
