"""Leakage: held-out questions that a model has met in training, and answers that it only copies from there.

Splits are made so that equal questions, groups and near-duplicates never part (data/splitting.py), so between the
splits of one data set next to nothing should be found. What is left are near-copies below that limit, clusters that
were too large to keep together, splits that the source names itself, and evaluation sets of their own.

Every training row that shares an n-gram with a held-out question is a candidate, so that none can be missed as by
sketches (docs/decisions/0007); it is judged by the true Jaccard similarity (Broder 1997) and by containment, the share
of a question's n-grams that stand in one training row (arXiv 2005.14165, appendix C). The shorter a text, the shorter
the n-grams that it is told by. N-grams see no paraphrase and no
translation (arXiv 2311.04850), and what the base itself was trained on is not known here.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from tunesmith.data.examples import Example, Preference, Rating, Text, Unusable, texts
from tunesmith.data.prompts import prompt_of, questioned
from tunesmith.evaluation.compare import Comparison, compare, sentence
from tunesmith.evaluation.rows import EvalRow
from tunesmith.evaluation.tasks import windows
from tunesmith.plan import Decision

Kind = Literal["exact", "other answer", "near", "contained", "group"]

KINDS: dict[Kind, str] = {
    "exact": "the same question with the same answer",
    "other answer": "the same question with another answer",
    "near": "nearly the same words (Jaccard similarity of shingles)",
    "contained": "the question's n-grams stand in one training row",
    "group": "the same group (a database, a document)",
}
COPY = 0.8
"""From this similarity or containment on a question counts as leaked."""
REVIEW = 0.5
"""From this one on it is shown, to be looked at; of short texts, where one word is much, from SHORT_REVIEW."""
SHORT_REVIEW = 0.65
LONG_WORDS, SHORT_WORDS = 26, 10
"""Words from which on a text is told by 5-grams of words, and from which on by 3-grams; below by characters."""
SHORT_CHARACTERS = 40
"""Below so many characters code and scripts without spaces are told by 4-grams of characters, not by 8-grams."""
FORM = 20
"""An n-gram that stands in more than three and one in twenty of the different held-out questions may be a form's: an
instruction or schema that all are asked with. It is one where as large a share of the training rows has it too, or
FORM_ROWS of them; then it says nothing about any of them and does not count. A few questions that are alike are no
form."""
FORM_ROWS = 20
"""Training rows that have a form's n-gram, at most."""
FEW = 3
"""Fewer n-grams than this of its own are too little to find a question by."""
SHOWN = 5
"""Pairs of one question that are kept with their texts."""
KEPT = 200
"""Pairs that are kept with their texts; all are counted."""
LOOKED_THROUGH = 50_000
"""Training rows among which near-copies are looked for; for equal ones all are."""
CORPUS = 2_000_000
"""Characters of training answers among which copied passages are looked for."""
EXTENDED = 200
"""Places at which a passage that stands in training very often is extended."""
SEED = 16
"""Characters of the shortest passage that counts."""
PASSAGE = 50
"""Characters from which on a common passage may be a copy."""


@dataclass(frozen=True)
class Pair:
    """A held-out question and a training row that have too much in common."""

    item: int
    """Number of the held-out example."""
    asked: str
    """Its row."""
    trained: str
    """The row of the training data."""
    kind: Kind
    score: float
    """Jaccard similarity or containment; 1 for what is equal."""
    leaked: bool
    """False where it is only to be looked at."""
    asked_text: str
    trained_text: str


@dataclass(frozen=True)
class Leakage:
    """What of the held-out questions was found in the training data."""

    questions: int
    trained: int
    """Training and validation rows that were looked through."""
    leaked: Mapping[int, Kind]
    """Held-out items that leaked, and by what first."""
    review: tuple[int, ...]
    """Items that are only to be looked at."""
    counts: Mapping[str, int]
    """Leaked items by kind; one may have several."""
    pairs: tuple[Pair, ...] = ()
    notes: tuple[str, ...] = ()

    def sentence(self) -> str:
        """What was found, for people."""
        if not self.questions:
            return "nothing is held out"
        if not self.leaked and not self.review:
            return f"none of {self.questions} held-out questions was found among {self.trained} training rows"
        by_kind = ", ".join(f"{count} {kind}" for kind, count in self.counts.items() if count)
        said = f"{len(self.leaked)} of {self.questions} held-out questions leaked"
        said += f" ({by_kind})" if by_kind else ""
        return said + (f", {len(self.review)} more are to be looked at" if self.review else "")

    def as_dict(self) -> dict[str, Any]:
        """As leakage.json keeps it."""
        return {**asdict(self), "leaked": {str(item): kind for item, kind in self.leaked.items()}}


def normalized(text: str) -> str:
    """Letters, digits and signs alone: NFKC, case folded, without white space and punctuation.

    Beside a digit a point, a comma or a minus stays where it belongs to a number or a difference, and numbers never
    grow together: what stood between them stays as a space.
    """
    folded = unicodedata.normalize("NFKC", text).casefold().replace("\u2212", "-").replace("\0", "")
    folded = re.sub(r"\s*-\s*(?=\d)|(?<=\d)\s*-\s*(?=\w)", "\0-", folded)  # \0 marks a sign that stays
    folded = re.sub(r"([.,])(?=\d)", "\0\\1", folded)
    found: list[str] = []
    kept = apart = False
    for c in folded:
        if c == "\0":
            kept = True
        elif not kept and (c.isspace() or unicodedata.category(c).startswith("P")):
            apart = True
        else:
            if apart and c.isdigit() and found and found[-1].isdigit():
                found.append(" ")
            found.append(c)
            kept = apart = False
    return "".join(found)


WORD = re.compile(r"\w+")
SPACELESS = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
"""Letters of scripts that are written without spaces, or whose words are short as ours are not."""
SIGNS = re.compile(r"[{}()\[\];=<>+*/\\|&_#$]")


def by_characters(text: str) -> bool:
    """Whether a text is told apart by characters rather than words: code, or a script without spaces."""
    size = sum(not c.isspace() for c in text) or 1
    return len(SPACELESS.findall(text)) >= 0.2 * size or len(SIGNS.findall(text)) >= 0.08 * size


def grams(text: str, size: int, *, characters: bool) -> frozenset[int]:
    """Hashes of all n-grams of `size` words or characters; of a shorter text its only one."""
    parts = _parted(text, characters=characters)
    if len(parts) <= size:
        return frozenset([hash(tuple(parts))]) if parts else frozenset()
    return frozenset(map(hash, windows(parts, size)))


def _parted(text: str, *, characters: bool) -> Sequence[str]:
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(folded.split()) if characters else WORD.findall(folded)


def jaccard(one: frozenset[int], other: frozenset[int]) -> float:
    """Share of common members among all members; 0 where there are none."""
    together = len(one | other)
    return len(one & other) / together if together else 0.0


def containment(asked: frozenset[int], trained: frozenset[int]) -> float:
    """Share of the first one's members that the second one has."""
    return len(asked & trained) / len(asked) if asked else 0.0


@dataclass(frozen=True)
class _View:
    """One way to compare: which n-grams of a question are looked for in which text of a training row."""

    kind: Kind
    part: Literal["question", "whole"]
    """The training row's text; a held-out one is told by the same part, where it is said to be contained by its
    question."""
    size: int
    characters: bool

    @property
    def short(self) -> bool:
        """Whether this is for texts in which a word or a number more is much."""
        return self.characters and self.size == 4

    @property
    def least(self) -> float:
        """From which score on a pair is shown."""
        if self.kind == "contained" and self.size == 3:
            return COPY  # three words in a row are common, and half of a few are nothing
        return SHORT_REVIEW if self.short else REVIEW

    def of(self, text: str) -> frozenset[int]:
        return grams(text, self.size, characters=self.characters)

    def score(self, asked: Set[int], trained: Set[int], common: int) -> float:
        if self.kind == "contained":
            return common / len(asked) if len(asked) >= FEW else 0.0
        return common / (len(asked) + len(trained) - common) if len(asked) >= FEW else 0.0


@dataclass(frozen=True)
class _Asked:
    item: int
    row: str
    question: str
    answer: str
    whole: str
    views: Mapping[_View, frozenset[int]]


@dataclass
class _Index:
    """The held-out n-grams of one view."""

    view: _View
    owners: dict[int, list[int]]
    suspects: frozenset[int]
    """N-grams that so many held-out questions share that they may be a form's."""
    longest: int
    """Most n-grams of a held-out text."""
    seen: Counter[int] = field(default_factory=Counter)
    """Training rows that have a suspect."""
    forms: set[int] = field(default_factory=set)
    """Suspects that are one by now."""

    def met(self, own: frozenset[int]) -> None:
        """Count a training row's suspects; what so many rows have finds nothing any more."""
        for gram in own & self.suspects:
            self.seen[gram] += 1
            if self.seen[gram] > FORM_ROWS and gram not in self.forms:
                self.forms.add(gram)
                self.owners.pop(gram, None)

    def settle(self, rows: int) -> None:
        """The forms, when all training rows are known."""
        most = max(3, min(FORM_ROWS, rows // FORM))
        self.forms |= {gram for gram, count in self.seen.items() if count > most}


@dataclass(frozen=True)
class _Candidate:
    """A pair that shares what may be a form; it is judged when all rows are known."""

    index: _Index
    asked: _Asked
    example: Example
    text: str
    grams: frozenset[int]


def find(asked: Sequence[Example], trained: Iterable[Example]) -> Leakage:
    """Which of the held-out examples stand in the training examples, equal, nearly equal, or in one group.

    The training examples are read once, one after the other; the held-out ones are kept in memory.
    """
    wanted = [_prepared(number, example) for number, example in enumerate(asked)]
    by_question, by_group = defaultdict(list), defaultdict(list)
    for a, example in zip(wanted, asked, strict=True):
        if equal := normalized(a.question):  # of signs alone nothing is left that could be equal
            by_question[equal].append(a)
        if example.group is not None:
            by_group[example.group].append(a)
    indices = _indices(wanted)
    found = _Found()
    waiting: list[_Candidate] = []
    count = 0
    for example in trained if wanted else ():
        count += 1
        question, answer = _parts(example)
        for a in by_question.get(normalized(question), ()):
            same = normalized(answer) == normalized(a.answer)
            found.add(a, example, "exact" if same else "other answer", 1.0, question)
        for a in by_group.get(example.group, ()) if example.group is not None else ():
            found.add(a, example, "group", 1.0, question)
        if count > LOOKED_THROUGH:
            continue
        texts = {"question": question, "whole": _whole(example)}
        made: dict[tuple[str, int, bool], frozenset[int]] = {}
        for index in indices:
            view, text = index.view, texts[index.view.part]
            # A text of so many times the other's length is not half alike.
            if view.short and len(text) > 4 * (index.longest + 4):
                continue
            key = (view.part, view.size, view.characters)
            if key not in made:
                made[key] = view.of(text)
            own = made[key]
            _look(index, own, wanted, example, text, found, waiting)
    for index in indices:
        index.settle(min(count, LOOKED_THROUGH))
    for one in waiting:
        forms = one.index.forms
        rest, own = one.asked.views[one.index.view] - forms, one.grams - forms
        _judge(found, one.index.view, one.asked, one.example, one.text, rest, own, len(rest & own))
    return found.result(len(wanted), count, _notes(wanted, indices, count))


def _look(
    index: _Index,
    own: frozenset[int],
    wanted: Sequence[_Asked],
    example: Example,
    text: str,
    found: _Found,
    waiting: list[_Candidate],
) -> None:
    """Judge a training row's text against every held-out one that it has an n-gram in common with."""
    hits: Counter[int] = Counter()
    for gram in own:
        hits.update(index.owners.get(gram, ()))
    index.met(own)
    for item, common in hits.items():
        a = wanted[item]
        theirs = a.views[index.view]
        if index.suspects.isdisjoint(theirs) and index.suspects.isdisjoint(own):
            _judge(found, index.view, a, example, text, theirs, own, common)
            continue
        # It is highest if of the suspects those turn out to be forms that one of both alone has.
        both = (theirs & own) - index.forms
        rest = ((theirs | own) if index.view.kind == "near" else theirs) - index.forms
        if len(both) >= REVIEW * len(rest - (index.suspects - both)):
            waiting.append(_Candidate(index, a, example, text, own))


def _judge(
    found: _Found,
    view: _View,
    a: _Asked,
    example: Example,
    text: str,
    theirs: Set[int],
    own: Set[int],
    common: int,
) -> None:
    """Keep a pair where the true numbers say so."""
    score = view.score(theirs, own, common)
    if score < view.least:
        return
    asked_text = a.question if view.part == "question" else a.whole
    certain = not view.short or NUMBER.findall(asked_text) == NUMBER.findall(text)
    found.add(a, example, view.kind, score, text, certain=certain)


def _indices(wanted: Sequence[_Asked]) -> list[_Index]:
    """The held-out n-grams by view, with those that many different questions share."""
    texts = {a.item: normalized(a.question) for a in wanted}
    most = max(3, len(set(texts.values())) // FORM)
    owners: dict[_View, defaultdict[int, list[int]]] = {}
    longest: Counter[_View] = Counter()

    def is_common(who: Sequence[int]) -> bool:
        """Whether many different questions have it; one that is asked again and again is no form."""
        return len(who) > most and len({texts[item] for item in who}) > most

    for a in wanted:
        for view, own in a.views.items():
            longest[view] = max(longest[view], len(own))
            by_gram = owners.setdefault(view, defaultdict(list))
            for gram in own:
                by_gram[gram].append(a.item)
    return [
        _Index(view, dict(own), frozenset(g for g, who in own.items() if is_common(who)), longest[view])
        for view, own in owners.items()
    ]


def _notes(wanted: Sequence[_Asked], indices: Sequence[_Index], count: int) -> list[str]:
    """What was not looked for, and how often."""
    found = []
    if count > LOOKED_THROUGH:
        found.append(
            f"near-copies were looked for among the first {LOOKED_THROUGH:,} of {count:,} training rows, equal "
            "questions among all"
        )
    forms = {index.view: index.forms for index in indices}
    filled = [a for a in wanted if any(not forms[v].isdisjoint(own) for v, own in a.views.items())]
    lost = [a for a in wanted if all(len(own - forms[view]) < FEW for view, own in a.views.items())]
    if filled:
        found.append(
            f"{len(filled)} questions share passages with many rows (a form); these passages do not count"
        )
    if lost:
        found.append(
            f"{len(lost)} questions are too short, or have too little of their own, for near-copies; equal ones were "
            "looked for"
        )
    return found


class _Found:
    """The pairs as they are found."""

    def __init__(self) -> None:
        self.pairs: dict[tuple[int, str, str], Pair] = {}
        self.kinds: defaultdict[int, set[Kind]] = defaultdict(set)
        self.review: set[int] = set()
        self.unshown: set[tuple[int, str, str]] = set()
        self._shown: Counter[int] = Counter()

    def add(
        self, asked: _Asked, example: Example, kind: Kind, score: float, text: str, *, certain: bool = True
    ) -> None:
        """A pair. What is equal is not called similar as well; what is not `certain` is only to be looked at."""
        if kind in ("near", "contained") and self.kinds.get(asked.item, set()) & {"exact", "other answer"}:
            return
        leaked = score >= COPY and certain
        if leaked:
            self.kinds[asked.item].add(kind)
        else:
            self.review.add(asked.item)
        key = (asked.item, str(example.row), kind)
        before = self.pairs.get(key)
        if before and (before.leaked, before.score) >= (leaked, score):
            return
        if not before and self._shown[asked.item] >= SHOWN:
            self.unshown.add(key)
            return
        self._shown[asked.item] += not before
        self.pairs[key] = Pair(
            asked.item,
            asked.row,
            str(example.row),
            kind,
            round(score, 4),
            leaked,
            asked.whole[:1000],
            text[:1000],
        )

    def result(self, questions: int, trained: int, notes: Sequence[str]) -> Leakage:
        """All that was found."""
        leaked = {
            item: next(k for k in KINDS if k in kinds) for item, kinds in sorted(self.kinds.items()) if kinds
        }
        ordered = sorted(self.pairs.values(), key=lambda p: (-p.leaked, -p.score, p.item, p.trained))
        said = [*notes]
        if self.unshown:
            said.append(
                f"of one question {SHOWN} pairs are listed; {len(self.unshown)} more are counted only"
            )
        if len(ordered) > KEPT:
            said.append(f"{len(ordered)} pairs were found; the {KEPT} closest are listed")
        return Leakage(
            questions,
            trained,
            leaked,
            tuple(sorted(self.review - set(leaked))),
            {kind: sum(kind in kinds for kinds in self.kinds.values()) for kind in KINDS},
            tuple(ordered[:KEPT]),
            tuple(said),
        )


NUMBER = re.compile(r"\d+")


def _prepared(number: int, example: Example) -> _Asked:
    question, answer = _parts(example)
    whole = _whole(example)
    characters = by_characters(whole)
    near = (
        (_near("question", question, characters=characters), question),
        (_near("whole", whole, characters=characters), whole),
    )
    views = {view: view.of(text) for view, text in near}
    words = len(WORD.findall(question))
    long = CHARACTERS if characters and len(question) >= 20 else 0
    if not characters:
        long = 13 if words >= LONG_WORDS else 8 if words >= SHORT_WORDS else 3 if words >= 5 else 0
    if long:
        view = _View("contained", "whole", long, characters)
        views[view] = view.of(question)
    return _Asked(number, str(example.row), question, answer, whole, views)


CHARACTERS = 8
"""Characters in an n-gram of code and of scripts without spaces."""


def _near(part: Literal["question", "whole"], text: str, *, characters: bool) -> _View:
    """How a text's near-copies are looked for: the shorter it is, the shorter its n-grams."""
    parts = len(_parted(text, characters=characters))
    if characters:
        return _View("near", part, CHARACTERS if parts >= SHORT_CHARACTERS else 4, True)
    if parts >= SHORT_WORDS:
        return _View("near", part, 5 if parts >= LONG_WORDS else 3, False)
    return _View("near", part, 4, True)


def _parts(example: Example) -> tuple[str, str]:
    """The last question, with all that was said before it but the system message, and its answer."""
    if isinstance(example, Text):
        return example.text, ""
    if isinstance(example, Rating) and not example.label:
        return _said(example.prompt), _said(example.completion)
    try:
        prompt = prompt_of(questioned(example))
    except Unusable:
        prompt = None
    if prompt is None:
        return "\n".join(texts(example)), ""
    return _said(prompt.messages), prompt.reference


def _said(messages: Iterable[Any]) -> str:
    return "\n".join(m.content for m in messages if m.role != "system")


def _whole(example: Example) -> str:
    """Question and answer, as they are compared; system messages say nothing about a row."""
    if isinstance(example, Preference):
        return "\n".join((_said(example.prompt), _said(example.chosen)))
    return "\n".join(_parts(example))


@dataclass(frozen=True)
class Copied:
    """How much of the answers stands word for word in training answers."""

    answers: int
    share: float
    """Mean share of an answer that its longest passage from training answers makes up."""
    copies: int
    """Answers of which a passage of at least PASSAGE characters from training makes up half or more."""
    longest: int
    """Characters of the longest such passage."""
    looked_through: int = 0
    """Training answers that were looked through."""
    trained: int = 0
    """Training answers that there are."""

    def limit(self) -> str:
        """What was not looked through, in words; empty where all was."""
        if self.looked_through == self.trained:
            return ""
        return (
            f"copied passages were looked for in the first {self.looked_through:,} of {self.trained:,} training "
            f"answers ({CORPUS:,} characters)"
        )


def copied(answers: Sequence[str], trained: Iterable[str]) -> Copied:
    """How much of a model's answers is copied from training answers, by longest common substring.

    Passages of fewer than SEED characters are words that everybody uses, and count as none.
    """
    return copied_of({"": answers}, trained)[""]


def copied_of(sides: Mapping[str, Sequence[str]], trained: Iterable[str]) -> dict[str, Copied]:
    """The same of several models at once, by name: the training answers are looked through once."""
    kept = {name: [_one_spaced(answer) for answer in answers] for name, answers in sides.items()}
    everything = [answer for answers in kept.values() for answer in answers]
    texts, size, count = [], 0, 0
    for text in trained:
        count += 1
        if size <= CORPUS:
            texts.append(_one_spaced(text))
            size += len(texts[-1])
    found = iter(longest_common(everything, texts, least=SEED))
    made = {}
    for name, answers in kept.items():
        lengths = [next(found) for _ in answers]
        shares = [length / len(answer) if answer else 0.0 for length, answer in zip(lengths, answers)]
        made[name] = Copied(
            len(answers),
            sum(shares) / len(shares) if shares else 0.0,
            sum(length >= PASSAGE and share >= 0.5 for length, share in zip(lengths, shares)),
            max(lengths, default=0),
            len(texts),
            count,
        )
    return made


def _one_spaced(text: str) -> str:
    return " ".join(text.split())


def longest_common(answers: Sequence[str], trained: Iterable[str], *, least: int = 1) -> list[int]:
    """Of each answer the length of its longest substring, in characters, that stands in any of the trained texts;
    0 where that is shorter than `least`, a power of 2.

    Substrings are found by hashes of 1, 2, 4, 8 ... characters (Karp, Miller and Rosenberg 1972); the longest ones
    that match are then extended character by character. Of passages that stand there more than EXTENDED times the
    first so many are extended, so of these the length may be up to half of what it is.
    """
    import numpy as np

    texts = list(trained)
    best = [0] * len(answers)
    if not texts or not any(answers):
        return best
    corpus, own = _codes(texts, 1), _codes(answers, 2)
    owner = np.repeat(np.arange(len(answers)), [len(answer) + 1 for answer in answers])
    there, here, length = corpus.astype(np.uint64), own.astype(np.uint64), 1
    before: Any = None
    while length < least:
        if min(len(there), len(here)) <= length:
            return best
        there, here, length = _doubled(there, length), _doubled(here, length), 2 * length
    while True:
        places = np.flatnonzero(np.isin(here, there))
        reached = np.unique(owner[places])
        if before:
            shorter, then, mine, where = before
            ended = where[~np.isin(owner[where], reached)]
            _extend(best, corpus, own, owner, shorter, then, mine, ended)
        for answer in reached.tolist():
            best[answer] = length
        if not len(places):
            return best
        before = (length, there, here, places)
        if min(len(there), len(here)) <= length:
            _extend(best, corpus, own, owner, length, there, here, places)
            return best
        there, here, length = _doubled(there, length), _doubled(here, length), 2 * length


def _codes(texts: Sequence[str], separator: int) -> Any:
    """Code points of all texts, each with a separator behind it that no other array has."""
    import numpy as np

    joined = chr(separator).join([*(text.replace("\1", " ").replace("\2", " ") for text in texts), ""])
    return np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def _doubled(level: Any, length: int) -> Any:
    """Hashes of twice as many characters from those of `length`."""
    import numpy as np

    mixed = level[:-length] * np.uint64(0x9E3779B97F4A7C15) + (level[length:] ^ np.uint64(0xD6E8FEB86659FD93))
    mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xBF58476D1CE4E5B9)
    return mixed ^ (mixed >> np.uint64(29))


def _extend(
    best: list[int], corpus: Any, own: Any, owner: Any, length: int, there: Any, here: Any, places: Any
) -> None:
    """Raise each answer's longest passage to what its matches of `length` reach, to less than twice that length."""
    import numpy as np

    order = np.argsort(there, kind="stable")
    sorted_hashes = there[order]
    begins = np.searchsorted(sorted_hashes, here[places], side="left")
    ends = np.searchsorted(sorted_hashes, here[places], side="right")
    for place, begin, end in zip(places.tolist(), begins.tolist(), ends.tolist(), strict=True):
        answer = owner[place]
        for start in order[begin : min(end, begin + EXTENDED)].tolist():
            # Whether this occurrence can beat the best one is seen at its last needed character.
            need = best[answer]
            stop = min(len(own) - place, len(corpus) - start, 2 * length)
            if need >= stop or own[place + need] != corpus[start + need]:
                continue
            same = own[place : place + stop] == corpus[start : start + stop]
            reach = stop if same.all() else int(same.argmin())
            best[answer] = max(best[answer], reach)


def subsets(
    leakage: Leakage,
    base_rows: Sequence[EvalRow],
    tuned_rows: Sequence[EvalRow],
    metric: str,
    *,
    resamples: int = 10_000,
    confidence: float = 0.95,
) -> dict[str, Comparison]:
    """The primary metric on the questions that did not leak (`clean`) and on those that did (`dirty`)."""
    found = {}
    for name, wanted in (("clean", False), ("dirty", True)):
        sides = [
            [r for r in rows if (r.item in leakage.leaked) is wanted] for rows in (base_rows, tuned_rows)
        ]
        if all(sides):
            [found[name]] = compare(*sides, metrics=[metric], resamples=resamples, confidence=confidence)
    return found


def decision(leakage: Leakage, where: str | Path | None = None) -> Decision:
    """The finding as plans and events keep it; `where` is the file that has the pairs, where there is to be one."""
    reason = "equal questions, groups and near-duplicates share a split, so next to none can leak"
    if leakage.leaked or leakage.review:
        reason = "found in training rows by equal text, groups, similarity or n-grams"
        reason += f"; see {where}" if where else ""
    return Decision("leakage", leakage.sentence(), "; ".join([reason, *leakage.notes]))


def answer_of(example: Example) -> str:
    """What a model that learns an example by heart would write."""
    return _parts(example)[1] or _parts(example)[0]


def effect(
    leakage: Leakage,
    rows: Mapping[str, Sequence[EvalRow]],
    trained: Iterable[str],
    metric: str | None,
    *,
    resamples: int,
    confidence: float,
) -> dict[str, Any]:
    """Leaked questions against the others on one metric, and how much of each model's answers is copied.

    `rows` are those of the base and of the tuned model, `trained` the training answers. The references are looked
    at in the same way: what they have in common with training answers is no fault of a model.
    """
    base, tuned = rows.values()
    parts = {}
    if metric and leakage.leaked:
        parts = subsets(leakage, base, tuned, metric, resamples=resamples, confidence=confidence)
    return {
        "remark": remark(leakage, parts),
        "parts": {name: asdict(c) for name, c in parts.items()},
        "copied": copied_by(rows, trained),
    }


def copied_by(rows: Mapping[str, Sequence[EvalRow]], trained: Iterable[str]) -> dict[str, dict[str, Any]]:
    """`copied` of each model's answers, and of the references; nothing where no model wrote an answer."""
    sides = {name: [r.output for r in own if r.output] for name, own in rows.items()}
    if not any(sides.values()):
        return {}
    references = [r.reference for r in next(iter(rows.values())) if r.reference]
    found = copied_of({**sides, "references": references}, trained)
    return {name: asdict(part) for name, part in found.items()}


HALF = 0.5
"""Share of the gain below which too little of it is left without the leaked questions to be called skill."""


def remark(leakage: Leakage, parts: Mapping[str, Comparison]) -> str:
    """What the leak does to the verdict, in one sentence."""
    if not leakage.leaked:
        return f"Leakage: {leakage.sentence()}."
    clean, dirty = parts.get("clean"), parts.get("dirty")
    said = f"Leakage: {leakage.sentence()}."
    if clean:
        said += f" Without them: {sentence(clean)}"
        if (kept := _kept(clean, dirty) if dirty else None) is not None and clean.verdict != "better":
            if kept < HALF:
                said += " The gain lives in the leaked questions: it may be memory, not skill."
            elif kept < 1:
                said += f" {kept:.0%} of the gain is left without them, on fewer questions: the evidence is weaker."
    elif leakage.questions > len(leakage.leaked):
        clean_ones = leakage.questions - len(leakage.leaked)
        said += f" The other {clean_ones} are clean; the scores are over all {leakage.questions}."
    else:
        said += " No clean question is left to judge by."
    return said


def _kept(clean: Comparison, dirty: Comparison) -> float | None:
    """What share of the gain over all questions is left without the leaked ones; None where there was no gain."""
    number = clean.n + dirty.n
    sign = 1 if clean.higher_is_better else -1
    gain = sign * (clean.n * clean.difference + dirty.n * dirty.difference) / number if number else 0.0
    return sign * clean.difference / gain if gain > 0 else None
