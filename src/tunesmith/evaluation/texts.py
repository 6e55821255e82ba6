"""Metrics of words and signs that an answer shares with its reference, in any script."""

from __future__ import annotations

import re
import string
from collections import Counter

from tunesmith.data.examples import Prompt

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def plain(text: str) -> str:
    """A text without case, ASCII punctuation, English articles and extra white space, as SQuAD compares answers."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def token_f1(prompt: Prompt, completion: str, reference: str) -> float:
    """F1 of shared words, repetitions counted, without case, punctuation and articles (SQuAD, arXiv 1606.05250).

    Where one of the two has no words left, 1 if the other has none either.
    """
    said, wanted = plain(completion).split(), plain(reference).split()
    if not said or not wanted:
        return float(said == wanted)
    common = (Counter(said) & Counter(wanted)).total()
    return 2 * common / (len(said) + len(wanted))
