"""The training methods: each a function from plan, model and data to a trainer, and one row of METHODS."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tunesmith.data import EncodedSplits, prompts
from tunesmith.data.examples import Example, Preference
from tunesmith.methods import cpo, dpo, grpo, kto, orpo, ppo, preferred, reward, rloo, sampled, seq2seq, sft
from tunesmith.models import Head, Kind
from tunesmith.plan import Decision
from tunesmith.recipe import Recipe, Training


def nothing(recipe: Recipe) -> None:
    """Check nothing."""


def apart(section: Any) -> str | None:
    """Why a method's loss cannot be worked out in parts by several processes: nothing speaks against it."""
    return None


def together(section: Any) -> str | None:
    """The same of a method whose rows need one another."""
    return "the loss of a row depends on the others of its batch, which several processes would part"


def drawn(section: Any) -> str | None:
    """The same of a method that learns from answers of the model."""
    return "its answers are drawn one after the other from one stream of random numbers"


def unchanged(section: Any, training: Training, num_examples: int) -> tuple[Training, int, list[Decision]]:
    """The training section as it is."""
    return training, 1, []


@dataclass(frozen=True)
class Method:
    """A way to train: its kind in the recipe, the examples it learns from, and how its trainer is built."""

    kind: str
    adapt: Callable[[Example], Example]
    """The example in the shape that the method needs; raises Unusable for one it has no use for."""
    remarks: Mapping[type[Example], str]
    """What to say of data sets with examples of a shape that the method changes."""
    build: Callable[..., Any]
    """The trainer. `fast` says whether likelihoods that it works out before training are the fast forward's; those of
    training are settled by `forward.attach`."""
    template: Callable[..., str]
    """Settles how a tokenizer writes what the model is asked: `(tokenizer, chat_template, section)`."""
    encoded: Callable[..., EncodedSplits]
    """Token ids and labels of all splits: `(splits, tokenizer, data, section)`."""
    model: Kind = "causal"
    """The kind of model that is trained."""
    head: Head | None = None
    """What it gets in the place of its output layer."""
    in_pairs: bool = False
    """Whether two encodings, one after the other, are one example."""
    alone: Callable[[Any], str | None] = apart
    """Why it is trained by one process alone, from its section; None where several give what one gives."""
    check: Callable[[Recipe], None] = nothing
    """Refuses, before anything is read, a recipe that names models or rewards which cannot be what it says they are.
    What needs none of them is refused when the recipe is composed (`compose.conflicts`)."""
    settled: Callable[..., tuple[Training, int, list[Decision]]] = unchanged
    """The training section as the method can use it, how often an example counts in an epoch's batches, and what was
    decided: `(section, training, number of examples)`."""


METHODS = {
    "sft": Method(
        "sft",
        adapt=sft.imitated,
        remarks=sft.REMARKS,
        build=sft.build,
        template=sft.template,
        encoded=sft.encoded,
        check=sft.check_head,
    ),
    "seq2seq": Method(
        "seq2seq",
        adapt=sft.imitated,
        remarks=sft.REMARKS,
        build=seq2seq.build,
        template=seq2seq.template,
        encoded=seq2seq.encoded,
        model="seq2seq",
    ),
    "dpo": Method(
        "dpo",
        adapt=preferred.paired,
        remarks={},
        build=dpo.build,
        template=sft.template,
        encoded=preferred.encoded_pairs,
        in_pairs=True,
        check=preferred.check_reference,
        alone=lambda section: together(section) if section.sft_weight else None,
    ),
    "kto": Method(
        "kto",
        adapt=preferred.rated,
        remarks={Preference: "each preference pair counts as a good and a bad answer"},
        build=kto.build,
        template=sft.template,
        encoded=preferred.encoded,
        check=preferred.check_reference,
        alone=together,
    ),
    "orpo": Method(
        "orpo",
        adapt=preferred.paired,
        remarks={},
        build=orpo.build,
        template=sft.template,
        encoded=preferred.encoded_pairs,
        in_pairs=True,
        alone=together,
    ),
    "cpo": Method(
        "cpo",
        adapt=preferred.paired,
        remarks={},
        build=cpo.build,
        template=sft.template,
        encoded=preferred.encoded_pairs,
        in_pairs=True,
        alone=together,
    ),
    "simpo": Method(
        "simpo",
        adapt=preferred.paired,
        remarks={},
        build=cpo.build,
        template=sft.template,
        encoded=preferred.encoded_pairs,
        in_pairs=True,
        alone=together,
    ),
    "reward": Method(
        "reward",
        adapt=reward.compared,
        remarks={},
        build=reward.build,
        template=reward.template,
        encoded=preferred.encoded_pairs,
        head="score",
        in_pairs=True,
    ),
    "grpo": Method(
        "grpo",
        adapt=prompts.questioned,
        remarks=prompts.REMARKS,
        build=grpo.build,
        template=sampled.template,
        encoded=sampled.encoded,
        settled=sampled.settled,
        alone=drawn,
        check=sampled.check,
    ),
    "rloo": Method(
        "rloo",
        adapt=prompts.questioned,
        remarks=prompts.REMARKS,
        build=rloo.build,
        template=sampled.template,
        encoded=sampled.encoded,
        settled=sampled.settled,
        alone=drawn,
        check=sampled.check,
    ),
    "ppo": Method(
        "ppo",
        adapt=prompts.questioned,
        remarks=prompts.REMARKS,
        build=ppo.build,
        template=sampled.template,
        encoded=sampled.encoded,
        settled=ppo.settled,
        alone=drawn,
        check=ppo.check,
    ),
}
