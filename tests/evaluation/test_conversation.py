"""How a model talks: values against brute force, and rates of a conversation's flow by hand."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from rows_by_hand import row
from sacrebleu import sentence_bleu

from tunesmith import evaluation
from tunesmith.data.examples import Message, Prompt, Row
from tunesmith.evaluation import conversation
from tunesmith.evaluation.metrics import METRICS, default_metrics

WORDS = ["lamp", "shade", "warm", "cable", "bright", "table", "switch", "glass", "red", "blue"]


def rows_of(answers, questions=None):
    questions = questions or [f"question {n}" for n in range(len(answers))]
    return [row(n, output=a, prompt_text=q) for n, (a, q) in enumerate(zip(answers, questions))]


def drawn(draw, n):
    return [" ".join(draw.choices(WORDS, k=draw.randint(0, 9))) for _ in range(n)]


def test_ead_equals_the_formula_in_exact_numbers_on_200_random_sets():
    draw = random.Random(0)
    for _ in range(200):
        answers = drawn(draw, draw.randint(1, 8))
        found = METRICS["ead"].among(rows_of(answers))
        every = " ".join(answers).split()
        v = Fraction(conversation.VOCABULARY)
        expected = float(len(set(every)) / (v * (1 - ((v - 1) / v) ** len(every)))) if every else 0.0
        assert math.fsum(found) / len(answers) == pytest.approx(expected, abs=1e-9)


def test_ead_does_not_fall_with_length_where_distinct_does():
    draw = random.Random(1)
    source = [f"w{n}" for n in range(conversation.VOCABULARY)]
    short, long = ([" ".join(draw.choices(source, k=k)) for _ in range(50)] for k in (20, 800))
    ead = [math.fsum(METRICS["ead"].among(rows_of(answers))) / 50 for answers in (short, long)]
    plain = [len(set(" ".join(a).split())) / len(" ".join(a).split()) for a in (short, long)]
    assert ead == pytest.approx([1, 1], abs=0.02)
    assert plain[1] < plain[0] - 0.3


def test_self_bleu_equals_sacrebleu_on_random_sets():
    draw = random.Random(2)
    for _ in range(200):
        answers = drawn(draw, 3)
        found = METRICS["self_bleu"].among(rows_of(answers))
        for n, value in enumerate(found):
            others = [a for m, a in enumerate(answers) if m != n]
            theirs = sentence_bleu(answers[n], others, use_effective_order=True).score / 100
            assert value == pytest.approx(theirs, abs=1e-9)


def test_self_bleu_is_taken_of_the_same_questions_for_every_model():
    rows = rows_of([f"answer {n}" for n in range(100)])
    found = METRICS["self_bleu"].among(rows)
    other = METRICS["self_bleu"].among([evaluation.replace(r, output="same") for r in rows[::-1]])[::-1]
    assert sum(value is not None for value in found) == conversation.SAMPLED
    assert [value is None for value in found] == [value is None for value in other]
    assert all(value == pytest.approx(1) for value in other if value is not None)
    assert METRICS["self_bleu"].among(rows[:1]) == [None]


def test_self_repetition_and_lines_equal_brute_force_on_200_random_sets():
    draw = random.Random(3)
    for _ in range(200):
        answers = [" ".join(draw.choices(WORDS[:3], k=draw.randint(0, 8))) for _ in range(4)]
        grams = [{tuple(a.split()[at : at + 4]) for at in range(len(a.split()) - 3)} for a in answers]
        expected = [float(any(grams[n] & grams[m] for m in range(4) if m != n)) for n in range(4)]
        assert METRICS["self_repetition"].among(rows_of(answers)) == expected
        lines = draw.choices(["a b", " a  b ", "", "c"], k=draw.randint(0, 6))
        seen, again = [], 0
        for line in (re.sub(r"\s+", " ", line).strip() for line in lines):
            again += line in seen if line else 0
            seen += [line] if line else []
        value = METRICS["repeated_lines"].score(asked(), "\n".join(lines), "")
        assert value == pytest.approx(again / len(seen) if seen else 0, abs=1e-9)


def test_turn_coherence_equals_brute_force_on_200_random_sets():
    draw = random.Random(4)
    for _ in range(200):
        n = draw.randint(2, 7)
        questions, answers = [
            [" ".join(draw.choices(WORDS, k=draw.randint(1, 4))) for _ in range(n)] for _ in "qa"
        ]
        found = METRICS["turn_coherence"].among(rows_of(answers, questions))
        unique = sorted(set(questions))
        df = Counter(w for q in unique for w in set(q.split()))

        total = len(unique)

        def vector(text, df=df, total=total):
            counts = Counter(w for w in text.split() if w in df)
            return {w: c * (math.log((1 + total) / (1 + df[w])) + 1) for w, c in counts.items()}

        def cosine(a, b):
            norm = math.sqrt(sum(x * x for x in a.values()) * sum(x * x for x in b.values()))
            return sum(a[w] * b.get(w, 0) for w in a) / norm if norm else 0.0

        for k, value in enumerate(found):
            others = [q for q in questions if q != questions[k]]
            if len(unique) < 2:
                assert value is None
                continue
            own = cosine(vector(answers[k]), vector(questions[k]))
            against = [cosine(vector(answers[k]), vector(q)) for q in others]
            wins = [0.5 if abs(own - x) < 1e-9 else float(own > x) for x in against]
            assert value == pytest.approx(np.mean(wins), abs=1e-9)


def test_coherent_answers_beat_a_shuffled_baseline():
    questions = [f"How do I mend the {a} {b}?" for a, b in itertools.permutations(WORDS[:5], 2)]
    answers = [f"Take the {q.split()[-2]} {q.split()[-1][:-1]} apart." for q in questions]
    own = METRICS["turn_coherence"].among(rows_of(answers, questions))
    shuffled = random.Random(0).sample(answers, len(answers))
    assert np.mean(own) > 0.9
    assert np.mean(METRICS["turn_coherence"].among(rows_of(shuffled, questions))) == pytest.approx(
        0.5, abs=0.15
    )


def asked(*turns, reference="Fine."):
    turns = turns or ("Hello",)
    roles = itertools.cycle(["user", "assistant"])
    return Prompt(tuple(Message(next(roles), t) for t in turns), reference, Row("a", 1))


TALK = ("My cat is called Minka.", "What a lovely name!", "What should she eat?")


@pytest.mark.parametrize(
    ("name", "prompt", "completion", "value"),
    [
        ("refers_back", asked(*TALK), "Minka should eat fish.", 1),
        ("refers_back", asked(*TALK), "She should eat fish.", 0),
        ("asks_back", asked(reference="Which one?"), 'Do you mean "red"?', 1),
        ("asks_back", asked(reference="Which one?"), "The red one.", 0),
        ("asks_back", asked(reference="Red."), "Red.\n```\na ? b\n```", 1),
        ("asks_back", asked(reference="Red."), "Why?", 0),
        ("role_leak", asked(), "Fine.\nUser: and you?", 1),
        ("role_leak", asked(), "Fine.<|im_start|>user", 1),
        ("role_leak", asked(), "**Assistant:** Fine.", 1),
        ("role_leak", asked(), "The user: a person.", 0),
        ("role_leak", asked(reference="User: one"), "User: one", 0),
        ("script_switch", asked(reference="Bien"), "Хорошо", 1),
        ("script_switch", asked(reference="Bien"), "Fine, 好", 0),
        ("script_switch", asked(reference="いいです"), "好", 0),
        ("script_switch", asked(reference="Bien"), "42", 0),
        ("repeats_answer", asked(*TALK), "What a lovely name!", 1),
        ("repeats_answer", asked(*TALK), "Fish, mostly.", 0),
        ("repeats_answer", asked(*TALK, reference="What a lovely name!"), "What a lovely name!", 0),
    ],
)
def test_flow_by_hand(name, prompt, completion, value):
    assert METRICS[name].fits(prompt)
    assert METRICS[name].score(prompt, completion, prompt.reference) == value


def test_a_first_turn_has_nothing_to_refer_to_or_repeat():
    assert not METRICS["refers_back"].fits(asked())
    assert not METRICS["repeats_answer"].fits(asked())
    assert {"turn_coherence", "repeats_answer"} <= set(default_metrics([asked(*TALK)], False, "chat"))
