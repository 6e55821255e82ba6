"""How a model talks: how varied its answers are among one another, whether they keep to the topic, how turns go on.

Each property of the flow of a conversation is a rate of its own; nothing is mixed into one number. None of them says
whether an answer is right.
"""

from __future__ import annotations

import math
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from tunesmith.data.examples import Prompt
from tunesmith.evaluation.tasks import ngrams, words

if TYPE_CHECKING:
    from tunesmith.evaluation.rows import EvalRow

VOCABULARY = 30_522
"""Words that an answer could draw from, as in the paper on EAD (the size of BERT's vocabulary)."""
RAREFIED = 100
"""N-grams that distinct_1 to 3 are the expectation over, whatever the answers' lengths."""
SAMPLED = 60
"""Answers that self-BLEU is taken over; it grows with their square."""
SAME = 0.8
"""From this ROUGE-L on an answer repeats the one before."""
LEAK = re.compile(
    r"(?mi)^\s*(?:#+\s*|\*\*)?(?:user|human|assistant|system)(?:\*\*)?\s*:|<\|(?:im_start|im_end|user|assistant|system|eot_id)"
    r"|<(?:start|end)_of_turn>|\[/?INST\]"
)


def ead(rows: Sequence[EvalRow]) -> list[float | None]:
    """Different words of all answers / the number expected of as many words drawn at random.

    Expectation-adjusted distinct (arXiv 2202.13587): N / (V (1 - ((V - 1) / V)^C)) with N different words among C, and
    a vocabulary V of 30,522. Unlike vocabulary_use it does not fall only because answers are longer. A row's own score
    is its part: each word shared by d answers counts 1 / d.
    """
    found = [words(row.output or "") for row in rows]
    used_by = Counter(word for answer in found for word in set(answer))
    drawn = sum(map(len, found))
    if not drawn:
        return [0.0] * len(rows)
    # (V-1)/V to a large power: by logarithms, without losing what is left of 1.
    expected = -VOCABULARY * math.expm1(drawn * math.log1p(-1 / VOCABULARY))
    return [len(rows) * sum(1 / used_by[word] for word in set(answer)) / expected for answer in found]


def distinct_1(rows: Sequence[EvalRow]) -> list[float | None]:
    """Different words expected among 100 words drawn from all answers / 100: distinct-1 without the effect of length.

    Rarefaction (Hurlbert 1971, Ecology 52, 577-586): sum over words of 1 - C(N - N_w, 100) / C(N, 100), where N_w of
    the N words are this one. Not scored where the answers have fewer than 100 words together.
    """
    return _rarefied(rows, 1)


def distinct_2(rows: Sequence[EvalRow]) -> list[float | None]:
    """Different pairs of neighbouring words expected among 100 drawn from all answers / 100; as distinct_1."""
    return _rarefied(rows, 2)


def distinct_3(rows: Sequence[EvalRow]) -> list[float | None]:
    """Different runs of three words expected among 100 drawn from all answers / 100; as distinct_1."""
    return _rarefied(rows, 3)


def _rarefied(rows: Sequence[EvalRow], n: int) -> list[float | None]:
    """Of each row its part, so that their mean is the value: a gram that occurs often is shared out by occurrence."""
    found = [ngrams([words(row.output or "")], n) for row in rows]
    times: Counter[Any] = Counter()
    for grams in found:
        times.update(grams)
    drawn = times.total()
    if drawn < RAREFIED:
        return [None] * len(rows)

    def log_choices(of: int) -> float:
        """log C(of, 100), as far as it does not cancel."""
        return math.lgamma(of + 1) - math.lgamma(of - RAREFIED + 1)

    whole = log_choices(drawn)
    seen = {
        count: -math.expm1(log_choices(drawn - count) - whole) if drawn - count >= RAREFIED else 1.0
        for count in set(times.values())
    }
    scale = len(rows) / RAREFIED
    return [
        scale * sum(seen[times[gram]] * count / times[gram] for gram, count in grams.items())
        for grams in found
    ]


def self_bleu(rows: Sequence[EvalRow]) -> list[float | None]:
    """Mean BLEU of each answer against all others as references (Texygen, arXiv 1802.01886); lower is more varied.

    Over 60 answers at most, drawn with a fixed seed, the same questions for every model; as of sacrebleu, up to four
    words, effective order.
    """
    chosen = sorted(range(len(rows)), key=lambda at: (rows[at].item, rows[at].sample))
    if len(chosen) > SAMPLED:
        chosen = random.Random(0).sample(chosen, SAMPLED)
    texts = {at: rows[at].output or "" for at in chosen}
    values: list[float | None] = [None] * len(rows)
    if len(chosen) < 2:
        return values
    for at in chosen:
        others = [text for other, text in texts.items() if other != at]
        values[at] = float(_bleu().sentence_score(texts[at], others).score) / 100
    return values


@lru_cache
def _bleu() -> Any:
    from sacrebleu import BLEU

    return BLEU(effective_order=True)


def self_repetition(rows: Sequence[EvalRow]) -> list[float | None]:
    """Share of answers with a run of four words that another answer has too (after arXiv 2403.00553); lower is better.

    Phrases that come back whatever is asked show here. Equal answers to equal questions count as well.
    """
    found = [set(ngrams([words(row.output or "")], 4)) for row in rows]
    used_by = Counter(gram for grams in found for gram in grams)
    return [float(any(used_by[gram] > 1 for gram in grams)) for grams in found]


def repeated_lines(prompt: Prompt, completion: str, reference: str) -> float:
    """Lines of an answer that are equal to an earlier one / its lines, empty ones apart; lower is better.

    A sign of degeneration (arXiv 1904.09751) that word trigrams of long lines hide.
    """
    lines = [" ".join(line.split()) for line in completion.splitlines() if line.strip()]
    return 1 - len(set(lines)) / len(lines) if lines else 0.0


def turn_coherence(rows: Sequence[EvalRow]) -> list[float | None]:
    """Share of other questions that an answer fits less than its own, by words that both have; 0.5 is chance.

    Area under the ROC curve of own against shuffled questions (Mann and Whitney 1947), similarity being the cosine of
    TF-IDF vectors (Salton and Buckley 1988), weights from all questions of the set. It measures topic, not sense: an
    answer that repeats its question is coherent by it. Equal questions are not put against one another.
    """
    import numpy as np

    asked = [" ".join(words(row.prompt_text)) for row in rows]
    if len(set(asked)) < 2:
        return [None] * len(rows)
    documents = Counter(word for text in set(asked) for word in set(text.split()))
    place = {word: number for number, word in enumerate(documents)}
    total = len(set(asked))
    weight = np.array([math.log((1 + total) / (1 + count)) + 1 for count in documents.values()])

    def vectors(texts: Sequence[str]) -> Any:
        found = np.zeros((len(texts), len(place)))
        for line, text in enumerate(texts):
            for word, times in Counter(text.split()).items():
                if word in place:
                    found[line, place[word]] = times
        found *= weight
        lengths = np.linalg.norm(found, axis=1, keepdims=True)
        return found / np.where(lengths > 0, lengths, 1)

    alike = vectors([" ".join(words(row.output or "")) for row in rows]) @ vectors(asked).T
    values: list[float | None] = []
    for line, text in enumerate(asked):
        others = [at for at, other in enumerate(asked) if other != text]
        own = alike[line, line]
        beaten = (own > alike[line, others] + 1e-12).sum() + (
            np.abs(own - alike[line, others]) <= 1e-12
        ).sum() / 2
        values.append(float(beaten / len(others)))
    return values


def has_earlier_turns(prompt: Prompt) -> bool:
    """Whether an answer of the assistant stands before the last question."""
    return any(turn.role == "assistant" and turn.content for turn in prompt.messages)


def refers_back(prompt: Prompt, completion: str, reference: str) -> float:
    """1 where the answer has a word of four letters or more from an earlier turn that the last question lacks.

    A sign that it uses what was said before. Not scored where there is no earlier turn.
    """
    *earlier, last = [turn.content for turn in prompt.messages if turn.role in ("user", "assistant")]
    known = {word for text in earlier for word in words(text)} - set(words(last))
    return float(any(len(word) >= 4 and word in known for word in words(completion)))


def asks_back(prompt: Prompt, completion: str, reference: str) -> float:
    """1 where the answer asks a question if the reference does, and asks none if it does not.

    A question is a question mark at the end of a sentence, outside of code.
    """
    return float(_asks(completion) == _asks(reference))


def _asks(text: str) -> bool:
    return bool(
        re.search(r"[?？؟](?:[\"')\]”’*_]*)(?:\s|$)", re.sub(r"```.*?(?:```|\Z)", "", text, flags=re.DOTALL))
    )


def role_leak(prompt: Prompt, completion: str, reference: str) -> float:
    """1 where the answer goes on with somebody's turn: a line `User:`, `Assistant:`, or a token of a chat template.

    Lower is better; a reference that has one as well excuses it.
    """
    return float(bool(LEAK.search(completion)) and not LEAK.search(reference))


def script_switch(prompt: Prompt, completion: str, reference: str) -> float:
    """1 where most letters of the answer are of another script than those of the reference; lower is better.

    Scripts by their Unicode names (Latin, Cyrillic, Han ...): a switch between languages of one script is not seen.
    An answer without letters counts as none.
    """
    said, wanted = _script(completion), _script(reference)
    return float(said is not None and wanted is not None and said != wanted)


def _script(text: str) -> str | None:
    names = Counter(unicodedata.name(c, "?").split()[0] for c in text if c.isalpha())
    merged = Counter[str]()
    for name, count in names.items():
        merged["JAPANESE OR CHINESE" if name in ("CJK", "HIRAGANA", "KATAKANA") else name] += count
    return merged.most_common(1)[0][0] if merged else None


def repeats_answer(prompt: Prompt, completion: str, reference: str) -> float:
    """1 where the answer is that of the turn before over again: ROUGE-L above 0.8 (Lin 2004); lower is better.

    Not scored where there is no earlier answer; one that the reference repeats as well is excused.
    """
    from tunesmith.evaluation.metrics import rougeL

    before = [turn.content for turn in prompt.messages if turn.role == "assistant" and turn.content][-1]
    return float(rougeL(prompt, completion, before) > SAME and rougeL(prompt, reference, before) <= SAME)
