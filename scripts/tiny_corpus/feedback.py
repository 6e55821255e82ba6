"""Replies compared and rated by one rule: right, polite, and to the point.

A reply is bad for one stated reason: the fact is wrong, the tone is rude, the question is dodged,
or the answer drowns in words that repeat it.
"""

import random
from dataclasses import dataclass

from tiny_corpus import dialogue

_RUDE = ("You should know that. ", "What a silly question. ", "Look it up yourself. ",
         "I do not care. ", "Stop asking me. ")  # fmt: skip
_DODGE = ("I do not know.", "Maybe.", "That is hard to say.", "Ask somebody else.",
          "It depends on many things.")  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """A question with a good reply, a bad one, and the reason why it is bad."""

    prompt: str
    chosen: str
    rejected: str
    reason: str


def _wrong(rng: random.Random, said: str, reply: str) -> str:
    """The reply with the wrong fact: the answer that another question of its kind would get."""
    while True:
        other = dialogue.turn(rng)[1]
        if other != reply and other.split()[:2] == reply.split()[:2] and len(other.split()) > 3:
            return other if rng.random() < 0.3 else _swapped(reply, other)
        if rng.random() < 0.02:
            return rng.choice(_DODGE)


def _swapped(reply: str, other: str) -> str:
    swapped = reply.rsplit(" ", 1)[0] + " " + other.rsplit(" ", 1)[1]
    return other if swapped == reply else swapped


def comparison(rng: random.Random) -> Comparison:
    """A question and two replies."""
    said, reply = dialogue.turn(rng)
    reason = rng.choice(("wrong", "rude", "dodge", "wordy"))
    rejected = {
        "wrong": lambda: _wrong(rng, said, reply),
        "rude": lambda: rng.choice(_RUDE) + (reply if rng.random() < 0.5 else ""),
        "dodge": lambda: rng.choice(_DODGE),
        "wordy": lambda: " ".join([reply, "As I said:", reply, "Let me repeat it.", reply]),
    }[reason]()
    return Comparison(said, reply, rejected.strip(), reason)


def comparisons(rng: random.Random, count: int) -> list[Comparison]:
    """Different questions, each with a better and a worse reply."""
    made: dict[str, Comparison] = {}
    while len(made) < count:
        one = comparison(rng)
        if one.chosen != one.rejected:
            made.setdefault(one.prompt, one)
    return list(made.values())
