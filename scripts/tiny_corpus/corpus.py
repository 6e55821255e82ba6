"""The pre-training corpus: documents of every kind, in fixed proportions."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from tiny_corpus import code, dialogue, english, sql_documents

KINDS = {
    "sql": (sql_documents.document, 0.42),
    "dialogue": (dialogue.document, 0.26),
    "english": (english.document, 0.26),
    "code": (code.document, 0.06),
}
"""Kind of text -> its generator and its share of the documents."""


@dataclass(frozen=True)
class Document:
    kind: str
    text: str


def documents(seed: int, count: int) -> Iterator[Document]:
    """The first `count` documents of a seed; another seed gives unseen ones."""
    rng = random.Random(seed)
    shares = [share for _, share in KINDS.values()]
    for _ in range(count):
        kind = rng.choices(list(KINDS), shares)[0]
        yield Document(kind, KINDS[kind][0](rng))
