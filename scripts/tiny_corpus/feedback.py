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


_KIND = ("With pleasure.", "Gladly.", "Happy to help.", "My pleasure.", "Certainly.", "Good question.",
         "Let me help you.", "Sure.")  # fmt: skip
_CURT = ("If I must.", "Not again.", "Be quick.", "Leave me alone.", "What now?", "I have no time.",
         "You again.", "Go away.")  # fmt: skip


def tones(rng: random.Random, count: int) -> list[Comparison]:
    """Different questions, each with the right reply twice: behind a kind word, and behind a curt one.

    None of them opens a reply in the corpus, so a base model has no opinion on them.
    """
    made: dict[str, Comparison] = {}
    while len(made) < count:
        said, reply = dialogue.turn(rng)
        kind, curt = rng.choice(_KIND), rng.choice(_CURT)
        made.setdefault(said, Comparison(said, f"{kind} {reply}", f"{curt} {reply}", "curt"))
    return list(made.values())
