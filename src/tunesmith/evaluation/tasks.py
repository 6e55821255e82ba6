"""What the answers of a task are looked at for besides being right: variety, syntax, demands that were met.

Functions of texts and of token sequences; `metrics.METRICS` lists those that score answers. N-grams are
counted within a sequence, never from the end of one into the next.
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from tunesmith.data.examples import Prompt
from tunesmith.evaluation import code as code_room
from tunesmith.evaluation.instructions import has_word, num_items, num_sentences

Tokens = Sequence[Hashable]
Language = Literal["json", "sql", "python"]

# Where scripts do not part words by spaces, every sign counts as one.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|\w+")
TOKEN = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|\w+|[^\w\s]")


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return WORD.findall(text.lower())


def tokens(text: str) -> list[str]:
    """Words and single signs as they stand, as code is compared."""
    return TOKEN.findall(text)


def windows(sequence: Tokens, n: int) -> Iterator[tuple[Hashable, ...]]:
    """The n-grams of a sequence, in order."""
    return (tuple(sequence[at : at + n]) for at in range(len(sequence) - n + 1))


def ngrams(sequences: Sequence[Tokens], n: int) -> Counter[tuple[Hashable, ...]]:
    """How often each n-gram occurs, over all sequences."""
    return Counter(gram for sequence in sequences for gram in windows(sequence, n))


def distinct(sequences: Sequence[Tokens], n: int) -> float:
    """Different n-grams / n-grams (distinct-n, Li et al. 2016, arXiv 1510.03055); 0 for nothing at all.

    A sequence too short for an n-gram repeats nothing: 1.
    """
    counts = ngrams(sequences, n)
    return len(counts) / counts.total() if counts else float(any(len(s) for s in sequences))


def repeated(sequences: Sequence[Tokens], n: int) -> float:
    """N-grams that repeat an earlier one / n-grams; 0 where there is none (seq-rep-n, arXiv 1908.04319)."""
    counts = ngrams(sequences, n)
    return 1 - len(counts) / counts.total() if counts else 0.0


def shared(predictions: Sequence[Tokens], references: Sequence[Tokens], n: int) -> float:
    """Different n-grams of the references that the predictions have too / different n-grams of the references.

    Raises ValueError where no reference has an n-gram, since any share of nothing would be made up.
    """
    wanted = ngrams(references, n).keys()
    if not wanted:
        raise ValueError(f"no reference has {n} tokens, so there is nothing to share")
    return len(wanted & ngrams(predictions, n).keys()) / len(wanted)


def code_of(text: str) -> str:
    """What stands in the first Markdown code fence, or the whole text where there is none."""
    fenced = re.search(r"```[\w+-]*[ \t]*\n(.*?)(?:```|\Z)", text, re.DOTALL)
    return (fenced.group(1) if fenced else text).strip()


SQL_BEGINS = re.compile(r"(?i)\s*(select|with|insert|update|delete|create|alter|drop)\b")


def is_valid(code: str, language: Language) -> bool:
    """Whether code parses: by Python's own compiler, by json, by sqlglot."""
    if language == "python":
        return code_room.is_valid_python(code)
    if language == "sql":
        import sqlglot

        try:
            return bool(SQL_BEGINS.match(code)) and all(sqlglot.parse(code))
        except sqlglot.errors.SqlglotError:
            return False
    try:
        json.loads(code)
    except (ValueError, RecursionError):
        return False
    return True


def language_of(code: str) -> Language | None:
    """The language that a text is code in; None for prose and for languages without a parser here.

    A word alone parses as Python, and so does `Paris (France)`: Python needs a statement, or a call without
    a space. JSON needs an object or a list.
    """
    if code[:1] in ("{", "[") and is_valid(code, "json"):
        return "json"
    if is_valid(code, "sql"):
        return "sql"
    if not is_valid(code, "python"):
        return None
    found = list(ast.walk(ast.parse(code)))
    has_statement = any(isinstance(node, ast.stmt) and not isinstance(node, ast.Expr) for node in found)
    has_call = any(isinstance(node, ast.Call) for node in found) and re.search(r"\w\(", code)
    return "python" if has_statement or has_call else None


@dataclass(frozen=True)
class Demand:
    """Something that a question asks of the form of its answer, and how it is checked."""

    about: str
    asked: re.Pattern[str]
    is_met: Callable[[re.Match[str], str], bool]


NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
QUOTED = r"[\"'“‘`]([^\"'”’`]+)[\"'”’`]"
HOW_MANY = (
    r"(exactly |at most |no more than |up to |less than |fewer than |under |at least |more than )?"
    rf"(\d+|{'|'.join(NUMBERS)})[- ]"
)
NO_RANGE = r"(?!\s*or (?:less|fewer|more)\b)"
"""Behind a number: `50 words or less` is another demand than `50 words`."""
NEVER = (
    r"(?:\b(?:do not|should not|must not|may not|avoid|without|never)|n't)(?: ever| even)? "
    r"(?:use|using|include|including|mention(?:ing)?|contain(?:ing)?)"
)


def _number(match: re.Match[str], count: int) -> bool:
    """Whether a count is as many as `HOW_MANY` asks for."""
    bound, word = (match.group(1) or "").strip().lower(), match.group(2).lower()
    wanted = NUMBERS.index(word) if word in NUMBERS else int(word)
    if bound in ("at most", "no more than", "up to"):
        return 0 < count <= wanted
    if bound in ("less than", "fewer than", "under"):
        return 0 < count < wanted
    if bound == "at least":
        return count >= wanted
    return count > wanted if bound == "more than" else count == wanted


def _demand(about: str, asked: str, is_met: Callable[[re.Match[str], str], bool]) -> Demand:
    return Demand(about, re.compile(asked, re.IGNORECASE), is_met)


DEMANDS = (
    _demand(
        "a number of words",
        rf"\b(?:in|with|using|of) {HOW_MANY}words?\b{NO_RANGE}",
        lambda m, text: _number(m, len(text.split())),
    ),
    _demand(
        "a number of sentences",
        rf"\b(?:in|with|using|of) {HOW_MANY}sentences?\b{NO_RANGE}",
        lambda m, text: _number(m, num_sentences(text)),
    ),
    _demand(
        "a number of list items",
        rf"{HOW_MANY}(?:bullet points?|bullets|(?:bulleted |numbered )?list items|numbered (?:items|steps|points))\b",
        lambda m, text: _number(m, num_items(text)),
    ),
    _demand(
        "JSON",
        r"\b(?:answer|reply|respond|return|write|output|format|give)\b[^.?!\n]{0,40}?\b(?:as|in|only|return|output)? ?"
        r"(?:a |an )?(?:valid )?json\b",
        lambda m, text: is_valid(code_of(text), "json"),
    ),
    _demand(
        "capital letters",
        r"\bin (?:all )?(?:upper[- ]?case|capital letters|capitals|caps)\b",
        lambda m, text: text.isupper(),
    ),
    _demand(
        "lower case",
        r"\bin (?:all )?(?:lower[- ]?case|small letters)\b",
        lambda m, text: text.islower(),
    ),
    _demand(
        "a beginning",
        rf"\b(?:start|begin)(?:s|ning)? (?:your \w+ |it )?with (?:the (?:words?|phrase) )?{QUOTED}",
        lambda m, text: text.strip().lower().startswith(m.group(1).lower()),
    ),
    _demand(
        "an end",
        rf"\b(?:end|finish)(?:s|ing)? (?:your \w+ |it )?with (?:the (?:words?|phrase) )?{QUOTED}",
        lambda m, text: text.strip().lower().endswith(m.group(1).lower()),
    ),
    _demand(
        "a word that is to be there",
        rf"(?<!not )(?<!n't )(?<!never )(?<!ever )(?<!even )\b(?:include|mention|contain|use)"
        rf" the (?:word|phrase|keyword|term) {QUOTED}",
        lambda m, text: has_word(m.group(1), text),
    ),
    _demand(
        "a word that is not to be there",
        rf"{NEVER} (?:the (?:word|phrase|keyword|term) )?{QUOTED}",
        lambda m, text: not has_word(m.group(1), text),
    ),
    _demand(
        "yes or no",
        r"\b(?:answer|reply|respond)(?: only| just)?(?: with| by)?(?: only| just)? [\"']?yes[\"']? or [\"']?no[\"']?",
        lambda m, text: text.strip(" .!\n").lower() in ("yes", "no"),
    ),
    _demand("no commas", r"\b(?:without (?:any )?|no )commas\b", lambda m, text: "," not in text),
)
"""Demands that a program can check, after the verifiable instructions of IFEval (arXiv 2311.07911)."""


def demands(prompt: Prompt) -> Iterator[tuple[Demand, re.Match[str]]]:
    """The checkable demands of the system message and the last user message, in English words."""
    users = [m.content for m in prompt.messages if m.role == "user"]
    text = "\n".join([m.content for m in prompt.messages if m.role == "system"] + users[-1:])
    for demand in DEMANDS:
        for match in demand.asked.finditer(text):
            yield demand, match


def adherence(prompt: Prompt, completion: str, reference: str) -> float:
    """Demands of the question that the answer meets / demands that a program can check.

    Known demands: a number of words, sentences or list items; JSON, upper or lower case; a given beginning
    or end; a quoted word to use or to avoid; yes or no; no commas. After IFEval's accuracy by instruction
    (arXiv 2311.07911), but the mean over answers; English wording only. An empty answer meets none. A
    question without a demand is not scored.
    """
    met = [demand.is_met(match, completion) for demand, match in demands(prompt)]
    if not met:
        raise ValueError("the question has no demand that a program can check")
    return sum(met) / len(met) if completion.strip() else 0.0


def vocabulary_use(prompt: Prompt, completion: str, reference: str) -> float:
    """Different words / words of an answer (distinct-1, Li et al. 2016, arXiv 1510.03055), mean over answers.

    Longer answers repeat more, so compare models whose answers are of like length. Not a measure of quality
    alone: gibberish is varied as well.
    """
    return distinct([words(completion)], 1)


def bigram_diversity(prompt: Prompt, completion: str, reference: str) -> float:
    """Different pairs / pairs of neighbouring words of an answer (distinct-2, Li et al. 2016, arXiv 1510.03055).

    The mean over answers. 1 for a single word, 0 for an empty answer.
    """
    return distinct([words(completion)], 2)


def repetition(prompt: Prompt, completion: str, reference: str) -> float:
    """Word trigrams of an answer that repeat an earlier one / its word trigrams; lower is better.

    Loops show here (seq-rep-3, Welleck et al. 2020, arXiv 1908.04319). 0 for fewer than three words.
    """
    return repeated([words(completion)], 3)


def pattern_consistency(prompt: Prompt, completion: str, reference: str) -> float:
    """Different token trigrams of the reference that the answer has / different token trigrams of the reference.

    Trigram recall over words and single signs, case counts (cf. ROUGE-3 recall, Lin 2004). An answer in a
    Markdown code fence counts as the code in it. A reference of fewer than three tokens is not scored.
    """
    return shared([tokens(code_of(completion))], [tokens(code_of(reference))], 3)


def syntax_validity(prompt: Prompt, completion: str, reference: str) -> float:
    """1 where the answer parses in the language of the reference; 0 for an empty one.

    JSON by json, SQL by sqlglot, Python by `compile`, which runs nothing; JavaScript, Java, Go, Rust and C++ by
    tree-sitter (`tunesmith[code]`), laxer than a compiler, where a column `language` or a code fence names them. An
    answer in a Markdown code fence counts as the code in it.
    """
    named = code_room.named_language(prompt)
    if named and code_room.has_grammar(named):
        return float(code_room.parses(code_of(completion), named))
    language = language_of(code_of(reference))
    code = code_of(completion)
    return float(language is not None and bool(code) and is_valid(code, language))


def length_match(prompt: Prompt, completion: str, reference: str) -> float:
    """Words of the shorter / words of the longer of answer and reference: 1 where both are as long."""
    lengths = sorted((len(words(completion)), len(words(reference))))
    return lengths[0] / lengths[1] if lengths[1] else 1.0


def response_diversity(answers: Sequence[str]) -> list[float]:
    """Different answers / answers: of each answer 1 / how often it was given, so that their mean is that share.

    White space does not count. A model that answers everything alike comes near 0.
    """
    said = [" ".join(answer.split()) for answer in answers]
    times = Counter(said)
    return [1 / times[answer] for answer in said]


def is_demanding(prompt: Prompt) -> bool:
    """Whether a question has a demand that a program can check."""
    return next(demands(prompt), None) is not None


def is_code(prompt: Prompt) -> bool:
    """Whether the reference is code in a language that can be parsed here."""
    named = code_room.named_language(prompt)
    if named in code_room.GRAMMARS:
        return code_room.has_grammar(named)
    return language_of(code_of(prompt.reference)) is not None


def has_patterns(prompt: Prompt) -> bool:
    """Whether the reference is long enough for a trigram."""
    return len(tokens(code_of(prompt.reference))) >= 3
