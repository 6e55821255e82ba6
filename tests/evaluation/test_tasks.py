"""Task metrics: seed 003's own vectors, values by hand, and what happens at the edges."""

from __future__ import annotations

import math

import pytest
from rows_by_hand import row
from sacrebleu import sentence_bleu

from tunesmith import evaluation
from tunesmith.data.examples import Message, Prompt, Row
from tunesmith.evaluation import tasks
from tunesmith.evaluation.metrics import METRICS, TASK_METRICS, default_metrics

# Seed 003's vectors after positions without a label (-100) are dropped, as its program drops them.
PREDICTED = [[6, 7, 8, 9, 9, 9], [5, 6, 7, 2, 2, 3]]
LABELS = [[6, 7, 8, 9, 1, 9], [5, 6, 3, 2, 2, 3]]


def asked(question, reference="", system=None):
    turns = [Message("system", system)] if system else []
    return Prompt((*turns, Message("user", question)), reference, Row("a", 1))


def score(name, completion, reference="", question="say"):
    return METRICS[name].score(asked(question, reference), completion, reference)


def flat(sequences):
    return [[token for sequence in sequences for token in sequence]]


def test_seed_vectors_accuracy():
    """The original has .8333 as well, but took it from logits one place off its labels; ours are shifted."""
    rows = [
        row(n, nll=1.0, tokens=len(labels), correct=sum(map(int.__eq__, predicted, labels)))
        for n, (predicted, labels) in enumerate(zip(PREDICTED, LABELS, strict=True))
    ]  # fmt: skip
    assert evaluation.scores(rows, ["token_accuracy"])["token_accuracy"]["value"] == pytest.approx(10 / 12)


def test_seed_vectors_vocabulary_use():
    assert tasks.distinct(PREDICTED, 1) == pytest.approx(0.5833, abs=1e-4)
    assert tasks.distinct(PREDICTED, 1) == 7 / 12


def test_seed_vectors_bigram_diversity():
    """The original strings all rows together and so counts a pair (9, 5) that nobody wrote."""
    assert tasks.distinct(flat(PREDICTED), 2) == pytest.approx(0.8182, abs=1e-4)
    # 67 78 89 99 99 and 56 67 72 22 23: eight different ones of ten.
    assert tasks.distinct(PREDICTED, 2) == 8 / 10


def test_seed_vectors_pattern_consistency():
    """The original's trigrams cross rows too; row by row three of eight are found."""
    assert tasks.shared(flat(PREDICTED), flat(LABELS), 3) == pytest.approx(0.4)
    # Labels 678 789 891 919 and 563 632 322 223; predicted are 678, 789 and 223.
    assert tasks.shared(PREDICTED, LABELS, 3) == 3 / 8


def test_seed_vectors_response_length():
    """The original divides 12 tokens by 8 different labels, 1.5; two answers have 6 tokens each."""
    assert sum(map(len, PREDICTED)) / len({t for labels in LABELS for t in labels}) == 1.5
    assert sum(map(len, PREDICTED)) / len(PREDICTED) == 6
    assert score("length_match", "six words are in this answer", "three words here") == 3 / 6


def test_repeated_ngrams_by_hand():
    # abc, bca, cab and abc again: one of four.
    assert tasks.repeated(["abcabc"], 3) == 1 / 4
    assert tasks.repeated(["ab"], 3) == 0
    assert score("repetition", "no no no no no") == pytest.approx(2 / 3)
    assert not METRICS["repetition"].higher_is_better


def test_vocabulary_and_bigrams_of_answers():
    assert score("vocabulary_use", "The cat, the dog.") == 3 / 4
    assert score("bigram_diversity", "a b a b a") == 2 / 4
    assert score("bigram_diversity", "word") == 1
    assert score("bigram_diversity", "") == score("vocabulary_use", "") == 0
    assert score("vocabulary_use", "我我你") == 2 / 3


def test_pattern_consistency_of_code():
    reference = "def f(x):\n    return x"  # def f ( x ) : return x: six trigrams
    assert score("pattern_consistency", reference, reference) == 1
    assert score("pattern_consistency", f"Sure:\n```python\n{reference}\n```", reference) == 1
    assert (
        score("pattern_consistency", "def f(y):\n    return y", reference) == 2 / 6
    )  # def f ( and ) : return
    assert not METRICS["pattern_consistency"].fits(asked("?", "a b"))


@pytest.mark.parametrize(
    ("code", "language"),
    [
        ("print(1)", "python"),
        ("def f():\n    return 1", "python"),
        ("x = 1", "python"),
        ('{"a": [1]}', "json"),
        ("SELECT a FROM t", "sql"),
        ("yes", None),
        ("Paris (France)", None),
        ("The answer is 4.", None),
        ("4", None),
        ("Select the best one of these", None),
        ("", None),
        ("int main() { return 0; }", None),
    ],
)
def test_language_of(code, language):
    assert tasks.language_of(code) == language


def test_syntax_validity():
    assert score("syntax_validity", "def g(:", "def f(): pass") == 0
    assert score("syntax_validity", "```python\ndef g(): pass\n```", "def f(): pass") == 1
    assert score("syntax_validity", "", "def f(): pass") == 0
    assert score("syntax_validity", "x = 1", '{"a": 1}') == 0, "the reference's language counts"
    assert score("syntax_validity", "SELECT b FROM u", "SELECT a FROM t") == 1
    assert score("syntax_validity", "SELECT FROM WHERE", "SELECT a FROM t") == 0


@pytest.mark.parametrize(
    ("question", "good", "bad"),
    [
        ("Answer in one word.", "Paris", "It is Paris"),
        ("Explain it in at most 3 words.", "so it is", "it is as it is"),
        ("Tell it in exactly two sentences.", "It rains. It pours.", "It rains."),
        ("Give three bullet points.", "- a\n- b\n- c", "a, b, c"),
        ("Return JSON.", '{"a": 1}', "a: 1"),
        ("Reply in upper case.", "YES SIR", "Yes"),
        ("Reply in lower case", "yes", "Yes"),
        ('Start your answer with "Dear".', "Dear me", "Oh dear"),
        ('End with "Amen".', "So be it. Amen", "Amen to that"),
        ("Mention the word 'cat'.", "A Cat.", "A category"),
        ('Do not use the word "very".', "good", "very good"),
        ("Don't mention 'tea'.", "coffee", "tea"),
        ("Answer with yes or no.", "No.", "Maybe"),
        ("Write it without commas.", "a b", "a, b"),
    ],
)
def test_demands(question, good, bad):
    assert len(list(tasks.demands(asked(question)))) == 1
    assert score("adherence", good, question=question) == 1
    assert score("adherence", bad, question=question) == 0


def test_adherence_is_the_share_of_demands_met():
    question = "Reply in lower case, in two words, without commas."
    assert score("adherence", "well, no", question=question) == 2 / 3
    assert score("adherence", "", question=question) == 0
    assert not METRICS["adherence"].fits(asked("What is in a word?"))
    assert METRICS["adherence"].fits(asked("Hello", system="Answer in one word."))


def test_different_answers():
    assert tasks.response_diversity(["a b", "a  b", "c", "d"]) == [0.5, 0.5, 1, 1]
    assert tasks.response_diversity([]) == []


@pytest.mark.parametrize(("name", "order"), [("bleu1", 1), ("bleu2", 2), ("bleu", 4)])
def test_bleu(name, order):
    reference, completion = "the cat sat on the mat today", "the cat sat on a mat"
    value = score(name, completion, reference)
    assert score(name, reference, reference) == pytest.approx(1)
    if order == 4:
        assert value == pytest.approx(sentence_bleu(completion, [reference]).score / 100)
    else:
        # 5 of 6 words, 3 of 5 pairs; six words against seven are cut short: exp(1 - 7/6).
        precision = 5 / 6 if order == 1 else math.sqrt(5 / 6 * 3 / 5)
        assert value == pytest.approx(precision * math.exp(1 - 7 / 6))


def test_tasks_add_what_fits_after_the_metrics_that_say_what_is_right():
    code = [asked("add", "def add(a, b):\n    return a + b")]
    assert default_metrics(code, False, "code")[-2:] == ["syntax_validity", "pattern_consistency"]
    assert default_metrics(code, False, "code")[0] == "rougeL"
    assert "adherence" not in default_metrics(code, False, "instruct")
    assert "adherence" in default_metrics([*code, asked("in one word", "x")], False, "instruct")
    fitting = [name for name in TASK_METRICS["chat"] if METRICS[name].fits(code[0])]
    assert default_metrics(code, False, "chat")[-len(fitting) :] == fitting
    assert not {n for names in TASK_METRICS.values() for n in names} & set(default_metrics(code, False))
    assert default_metrics(code, False, "chat", "seq2seq")[-1] == "repetition"
    assert default_metrics(code, False, "instruct", "seq2seq").count("repetition") == 1
    assert {n for names in TASK_METRICS.values() for n in names} <= set(METRICS)


def test_answers_of_a_model_are_compared_with_one_another(tiny_model_folder, tiny_tokenizer):
    """Through `evaluate`: the share of different answers is that of the rows' own texts."""
    from tunesmith import models
    from tunesmith.data.examples import Conversation

    examples = [
        Conversation((Message("user", q), Message("assistant", "red")), Row("a", n))
        for n, q in enumerate(["what is one", "what is one", "count rows"])
    ]
    rows = evaluation.evaluate(
        models.load_model(str(tiny_model_folder)), tiny_tokenizer, evaluation.items(examples, tiny_tokenizer),
        name="m", metrics=["response_diversity", "vocabulary_use"], max_new_tokens=3,
    )  # fmt: skip
    different = len({" ".join(row.output.split()) for row in rows})
    assert different < 3
    found = evaluation.scores(rows, ["response_diversity"])["response_diversity"]
    assert found["value"] == pytest.approx(different / 3)


@pytest.mark.parametrize(
    "question",
    [
        "How do I parse dates in JSON?",
        "Is this valid JSON?",
        "Answer in 50 words or less.",
        "Translate 'I said so'.",
    ],
)
def test_what_is_no_demand_or_none_that_is_known_is_not_checked(question):
    assert not any(demand.asked.search(question) for demand in tasks.DEMANDS)


@pytest.mark.parametrize(
    "question",
    [
        "Never use the word 'very'.",
        "never include the word 'very'",
        "You should not ever mention the word 'very'.",
    ],
)
def test_a_word_that_is_not_to_be_there_is_no_word_that_is(question):
    assert [demand.about for demand in tasks.DEMANDS if demand.asked.search(question)] == [
        "a word that is not to be there"
    ]


@pytest.mark.parametrize(
    ("name", "reference"), [("pattern_consistency", ""), ("pattern_consistency", "a b"), ("adherence", "a")]
)
def test_nothing_to_compare_with_is_an_error_that_says_so(name, reference):
    with pytest.raises(ValueError, match=r"nothing to share|no demand"):
        score(name, "an answer", reference, question="say")
    assert not METRICS[name].fits(asked("say", reference))
