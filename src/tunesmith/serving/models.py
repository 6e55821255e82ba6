"""What a server answers with: a base and its adapters, each by a name, with the tokens they are asked by."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith import models
from tunesmith.data import pairs, templates
from tunesmith.data.examples import Message, Unusable
from tunesmith.errors import ModelError, TunesmithError
from tunesmith.generation import context_length

BASE = "base"
"""Name of the model below the adapters."""
LONGEST_NAME = 96


@dataclass(frozen=True)
class Served:
    """One name that requests can ask, as `tunesmith chat` would."""

    name: str
    adapter: str | None
    encoder: Any
    """What `templates.asked` needs; used by one thread at a time."""
    tokenizer: Any
    """For the text of answers, in the thread that writes them: a tokenizer is no place for two threads."""
    stop_ids: tuple[int, ...]
    template: str
    is_seq2seq: bool

    def prompt(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Token ids of a conversation, as in training. Raises Unusable where the template refuses it."""
        turns = tuple(Message(role, text) for role, text in messages)
        if self.is_seq2seq:
            [ids] = templates.asked_whole([turns], self.encoder)
            if isinstance(ids, Unusable):
                raise ids
            return list(ids)
        return templates.asked(turns, self.encoder)

    def text(self, text: str) -> list[int]:
        """Token ids of a text as it is, special tokens in it included."""
        text.encode()  # half a character has no tokens
        return list(self.encoder.tokenizer(text).input_ids)


@dataclass(frozen=True)
class Loaded:
    """A model in memory and the names that it answers to."""

    model: Any
    by_name: Mapping[str, Served]
    context: int | None
    vocabulary: int
    """Number of token ids that the model has."""
    dtype: str

    @property
    def adapters(self) -> tuple[str, ...]:
        """What the model calls its adapters."""
        return tuple(served.adapter for served in self.by_name.values() if served.adapter is not None)


def sources(model: str, name: str | None, adapters: Mapping[str, str]) -> tuple[str, dict[str, Path]]:
    """The base's folder, and by name each folder that is served: the base under its own name, and adapters on it.

    Raises ModelError for adapters of another base, and TunesmithError for a name given twice.
    """
    first = models.folder_of(model)
    name = name or name_of(model)
    found: dict[str, Path] = {}
    named = {checked_name(name): model}
    for other, folder in adapters.items():
        if checked_name(other) in named:
            raise TunesmithError(f"Two models are to be served as '{other}'.", fix="Give another name.")
        named[other] = folder
    base = first
    if (first / "adapter_config.json").is_file():
        base = _base(first)
        if BASE not in named:
            found[BASE] = base
    for other, folder in named.items():
        place = models.folder_of(folder)
        if other != name and not (place / "adapter_config.json").is_file():
            raise ModelError(
                f"{folder} is no adapter, and one base is served at a time.",
                found="no adapter_config.json",
                fix="Start another server for it on another --port.",
            )
        if (place / "adapter_config.json").is_file() and _base(place) != base:
            raise ModelError(
                f"The adapter '{other}' is of another base.",
                found=f"{_base(place)}, not {base}",
                fix="Start another server for it on another --port.",
            )
        found[other] = place
    return str(base), found


def load(base: str, folders: Mapping[str, Path], *, dtype: str, device: str) -> Loaded:
    """The base once, with each adapter on it. Raises ModelError for what cannot be asked."""
    with_adapter = {name: folder for name, folder in folders.items() if str(folder) != base}
    models.check_writes(str(next(iter(with_adapter.values()), base)))
    for name, folder in with_adapter.items():
        if start := models.takes_from_base(folder):
            raise ModelError(
                f"The adapter '{name}' takes a part of its base out as it is loaded, so the base and every other "
                "adapter on it would answer otherwise.",
                found=f"init_lora_weights {start} in {folder / 'adapter_config.json'}",
                fix="Merge it first (`tunesmith merge`) and serve that; a run's final_model is plain LoRA, and served "
                "as it is.",
            )
    called: dict[str, str] = {}
    model = None
    for number, (name, folder) in enumerate(with_adapter.items()):
        called[name] = f"served-{number}" if number else "default"
        if model is None:
            model = models.load_model(str(folder), dtype=dtype, device=device)
        else:
            model.load_adapter(str(folder), adapter_name=called[name], is_trainable=False)
    if model is None:
        model = models.load_model(base, dtype=dtype, device=device)
    model.eval()
    is_pair = models.is_seq2seq(model)
    by_name = {}
    for name, folder in folders.items():
        place = str(folder if models.has_tokenizer(folder) else base)
        tokenizer = models.load_tokenizer(place)
        template = models.settle_template(tokenizer, is_pair=is_pair)[1]
        by_name[name] = served_as(
            name, tokenizer, adapter=called.get(name), is_pair=is_pair, template=template
        )
    rows = model.get_input_embeddings().weight.shape[0]
    return Loaded(model, by_name, context_length(model), rows, dtype)


def served_as(name: str, tokenizer: Any, *, adapter: str | None, is_pair: bool, template: str = "") -> Served:
    """How one name is answered, with a tokenizer whose template is settled; `template` says where that is from."""
    return Served(
        name=name,
        adapter=adapter,
        encoder=(pairs if is_pair else templates).encoder(tokenizer),
        tokenizer=copy.deepcopy(tokenizer),
        stop_ids=templates.end_of_turn_ids(tokenizer),
        template=template,
        is_seq2seq=is_pair,
    )


def name_of(model: str | Path) -> str:
    """The name of a run, of a model's folder or of a Hub's model, without what no name of a served model may hold."""
    name = os.path.basename(os.path.abspath(Path(model).expanduser()))
    return re.sub(r"[^\w.-]+", "-", name)[:LONGEST_NAME] or BASE


def _base(adapter: Path) -> Path:
    base, revision = models.base_of(adapter)
    return models.folder_of(base, revision=revision)


def checked_name(name: str) -> str:
    """A name that requests can ask for. Raises TunesmithError for what is none."""
    if not name or len(name) > LONGEST_NAME or not all(sign.isalnum() or sign in "-_./:" for sign in name):
        raise TunesmithError(
            f"'{name[:LONGEST_NAME]}' is no name for a model.",
            fix="Use letters, digits, dashes, dots and underscores.",
        )
    return name
