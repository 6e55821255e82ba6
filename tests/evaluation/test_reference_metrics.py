"""Every metric of texts equals its reference implementation, or one written down here, on 200 random cases."""

from __future__ import annotations

import math
import random
import re
import string
from collections import Counter

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from rows_by_hand import row
from sacrebleu import BLEU, corpus_bleu, corpus_chrf, sentence_bleu, sentence_chrf

from tunesmith import evaluation, models
from tunesmith.data.examples import Conversation, Message, Prompt, Row, Text
from tunesmith.evaluation.compare import compare, score_interval
from tunesmith.evaluation.metrics import METRICS

CASES = 200
SIGNS = [
    "the",
    "a",
    "cat",
    "cats",
    "Sat",
    "sitting",
    "mat.",
    "über",
    "42",
    "x=1",
    "(no)",
    "\n",
    "go,",
    "Go",
    "-",
]


def cases(seed):
    """Pairs of answer and reference that share some words, some of them empty."""
    draw = random.Random(seed)
    for _ in range(CASES):
        reference = [draw.choice(SIGNS) for _ in range(draw.randint(1, 14))]
        completion = [word if draw.random() < 0.7 else draw.choice(SIGNS) for word in reference]
        completion = completion[draw.randint(0, 2) :] + draw.choices(SIGNS, k=draw.randint(0, 3))
        yield " ".join(completion) if draw.random() > 0.05 else "", " ".join(reference)


def squad_f1(completion, reference):
    """The definition of SQuAD's evaluate-v1.1 by its words, counted one by one."""

    def plain(text):
        text = "".join(c for c in text.lower() if c not in set(string.punctuation))
        return [word for word in re.sub(r"\b(a|an|the)\b", " ", text).split() if word]

    said, wanted = plain(completion), plain(reference)
    if not said or not wanted:
        return float(said == wanted)
    left, common = list(wanted), 0
    for word in said:
        if word in left:
            left.remove(word)
            common += 1
    if not common:
        return 0.0
    precision, recall = common / len(said), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def grams(text, n):
    found = re.findall(r"\w+", text.lower())
    return [tuple(found[at : at + n]) for at in range(len(found) - n + 1)]


def bleu_of(order):
    """sacrebleu's own class with each option spelled out, or its function for the usual four."""
    from sacrebleu.metrics import BLEU

    if order == 4:
        return lambda c, r: sentence_bleu(c, [r], use_effective_order=True, smooth_method="exp").score / 100
    scorer = BLEU(max_ngram_order=order, effective_order=True, smooth_method="exp", tokenize="13a")
    return lambda c, r: scorer.sentence_score(c, [r]).score / 100


def rouge_of(name):
    scorer = RougeScorer([name], use_stemmer=True)
    return lambda c, r: scorer.score(r, c)[name].fmeasure


def distinct_of(n):
    def value(completion, reference):
        found = grams(completion, n)
        return len(set(found)) / len(found) if found else float(bool(grams(completion, 1)))

    return value


def repeated(completion, reference):
    found = grams(completion, 3)
    return sum(g in found[:at] for at, g in enumerate(found)) / len(found) if found else 0.0


def lengths(completion, reference):
    a, b = len(grams(completion, 1)), len(grams(reference, 1))
    return min(a, b) / max(a, b) if max(a, b) else 1.0


REFERENCES = {
    **{name: rouge_of(name) for name in ("rouge1", "rouge2", "rougeL", "rougeLsum")},
    **{name: bleu_of(order) for name, order in (("bleu1", 1), ("bleu2", 2), ("bleu", 4))},
    "chrf": lambda c, r: sentence_chrf(c, [r]).score / 100,
    "sentence_chrf": lambda c, r: sentence_chrf(c, [r]).score / 100,
    "sentence_bleu": lambda c, r: bleu_of(4)(c, r),
    "token_f1": squad_f1,
    "exact_match": lambda c, r: float(re.sub(r"\s+", " ", c).strip() == re.sub(r"\s+", " ", r).strip()),
    "vocabulary_use": distinct_of(1),
    "bigram_diversity": distinct_of(2),
    "repetition": repeated,
    "length_match": lengths,
}


@pytest.mark.parametrize("name", REFERENCES)
def test_equals_its_reference_on_200_random_cases(name):
    different = set()
    for completion, reference in cases(name):
        prompt = Prompt((Message("user", "say"),), reference, Row("a", 1))
        found = METRICS[name].score(prompt, completion, reference)
        assert found == pytest.approx(REFERENCES[name](completion, reference), abs=1e-9), (
            completion,
            reference,
        )
        different.add(round(found, 6))
    assert len(different) > (1 if name == "exact_match" else 5), "the cases tell values apart"


WHOLE = {
    "bleu": lambda said, wanted: corpus_bleu(said, [wanted]),
    "bleu1": lambda said, wanted: BLEU(max_ngram_order=1).corpus_score(said, [wanted]),
    "bleu2": lambda said, wanted: BLEU(max_ngram_order=2).corpus_score(said, [wanted]),
    "chrf": lambda said, wanted: corpus_chrf(said, [wanted]),
}


@pytest.mark.parametrize("name", WHOLE)
def test_the_value_of_a_set_is_that_of_sacrebleus_corpus_on_200_random_sets(name):
    """Also of sets so small that no run of words is right, or of empty answers only."""
    made, draw, different = list(cases(name)), random.Random(2), set()
    for _ in range(CASES):
        said, wanted = zip(*draw.sample(made, draw.randint(1, 6)))
        if draw.random() < 0.2:
            said = [text[:4] for text in said]
        rows = [
            row(n, 0.5, metric=name, output=one, reference=other)
            for n, (one, other) in enumerate(zip(said, wanted))
        ]
        found = evaluation.value(rows, name)
        assert found == pytest.approx(WHOLE[name](list(said), list(wanted)).score / 100, abs=1e-9)
        different.add(round(found, 6))
    assert len(different) > 100
    told = score_interval(rows, name, resamples=50)
    assert METRICS[name].signature() in told.method
    assert "version:" in told.method


def test_bleu_is_compared_by_a_paired_bootstrap_of_the_whole_statistic():
    """The interval is that of sacrebleu's corpus score on resampled rows, and no mean of sentences'."""
    made = list(cases("pairs"))[:60]
    base = [
        row(n, 0.1, metric="bleu", output="the cat " + c[:9], reference=r) for n, (c, r) in enumerate(made)
    ]
    tuned = [row(n, 0.1, metric="bleu", output=c, reference=r) for n, (c, r) in enumerate(made)]
    [found] = compare(base, tuned, metrics=["bleu"], resamples=4000)
    said = [[r.output for r in rows] for rows in (base, tuned)]
    wanted = [r.reference for r in base]
    values = [corpus_bleu(texts, [wanted]).score / 100 for texts in said]
    assert [found.base, found.tuned] == pytest.approx(values, abs=1e-9)
    draw, drawn = random.Random(0), []
    scorer = BLEU()
    counted = [scorer._extract_corpus_statistics(texts, [wanted]) for texts in said]
    for _ in range(1000):
        places = draw.choices(range(60), k=60)
        sums = [[sum(column) for column in zip(*(side[n] for n in places))] for side in counted]
        ours, theirs = (scorer._compute_score_from_stats(total).score for total in sums)
        drawn.append(theirs - ours)
    drawn.sort()
    assert 100 * found.low == pytest.approx(drawn[24], abs=1.5)
    assert 100 * found.high == pytest.approx(drawn[-25], abs=1.5)
    assert "of the whole statistic" in found.method
    assert found.verdict == "better"


@pytest.mark.parametrize(("name", "n"), [("distinct_1", 1), ("distinct_2", 2), ("distinct_3", 3)])
def test_distinct_n_of_100_is_what_drawing_gives(name, n):
    """By exact numbers of choices, and near what really drawing 100 of them shows; longer answers change little."""
    draw = random.Random(n)
    for case in range(CASES):
        texts = [" ".join(draw.choices(SIGNS, k=draw.randint(0, 60))) for _ in range(draw.randint(3, 8))]
        found = METRICS[name].among([row(at, output=text) for at, text in enumerate(texts)])
        pool = [gram for text in texts for gram in grams(text, n)]
        if len(pool) < 100:
            assert found == [None] * len(texts)
            continue
        whole = math.comb(len(pool), 100)
        exact = sum(1 - math.comb(len(pool) - count, 100) / whole for count in Counter(pool).values()) / 100
        value = math.fsum(found) / len(found)
        assert value == pytest.approx(exact, abs=1e-9)
        if case < 3:
            tries = [len(set(draw.sample(pool, 100))) / 100 for _ in range(300)]
            assert value == pytest.approx(sum(tries) / len(tries), abs=0.02)


def test_response_diversity_on_random_answers():
    draw = random.Random(0)
    for _ in range(CASES):
        answers = [draw.choice(["a b", " a  b", "c", "d", "e f"]) for _ in range(draw.randint(1, 12))]
        found = METRICS["response_diversity"].among([row(n, output=text) for n, text in enumerate(answers)])
        assert math.fsum(found) == pytest.approx(len({" ".join(a.split()) for a in answers}), abs=1e-9)


def test_likelihood_metrics_on_random_sums():
    """Perplexity, token accuracy and bits per byte are of all tokens, never means of means."""
    draw = random.Random(1)
    for _ in range(CASES):
        facts = [
            (draw.uniform(0, 90), draw.randint(1, 40), draw.randint(1, 200))
            for _ in range(draw.randint(2, 6))
        ]
        rows = [row(n, nll=nll, tokens=t, correct=t // 2, num_bytes=b) for n, (nll, t, b) in enumerate(facts)]
        found = evaluation.scores(rows, ["perplexity", "token_accuracy", "bits_per_byte"])
        nll, tokens, size = (math.fsum(column) for column in zip(*facts))
        correct = sum(t // 2 for _, t, _ in facts)
        assert found["perplexity"]["value"] == pytest.approx(math.exp(nll / tokens), rel=1e-9)
        assert found["token_accuracy"]["value"] == pytest.approx(correct / tokens, abs=1e-9)
        assert found["bits_per_byte"]["value"] == pytest.approx(nll * math.log2(math.e) / size, abs=1e-9)


@pytest.fixture(scope="module")
def model(tiny_model_folder):
    return models.load_model(str(tiny_model_folder))


def test_bits_per_byte_of_a_model(model, tiny_tokenizer):
    text = "what is the capital of frånce? naïve Ünicode"
    [item] = evaluation.items([Text(text, Row("t", 1))], tiny_tokenizer)
    [found] = evaluation.evaluate(model, tiny_tokenizer, [item], name="m", metrics=["bits_per_byte"])
    ids = torch.tensor([item.input_ids])
    with torch.no_grad():
        logs = torch.log_softmax(model(ids).logits[0, :-1].double(), -1)
    nll = -float(logs[range(ids.shape[1] - 1), ids[0, 1:]].sum())
    size = len(text.encode())
    assert found.num_bytes == size
    assert found.scores["bits_per_byte"] == pytest.approx(nll / math.log(2) / size, rel=1e-5)
    answer = Conversation((Message("user", "hi"), Message("assistant", "größer 1")), Row("a", 1))
    [item] = evaluation.items([answer], tiny_tokenizer)
    assert item.num_bytes == len("größer 1".encode()), "the end of the turn has no bytes"


def test_long_texts_are_read_in_windows_that_count_each_token_once(model, tiny_tokenizer):
    """Against a pass for every token: at least half a context stands before each label behind the first window."""
    [item] = evaluation.items([Text("red blue green one two three " * 110, Row("t", 1))], tiny_tokenizer)
    limit, total = model.config.max_position_embeddings, len(item.input_ids)
    assert total > 2 * limit
    [found] = evaluation.evaluate(
        model, tiny_tokenizer, [item], name="m", metrics=["perplexity"], batch_tokens=1024
    )
    assert (found.tokens, found.tokens_cut) == (total - 1, 0)
    assert found.windows == 1 + math.ceil((total - limit) / (limit // 2)) > 2
    nll, done = 0.0, 0
    while done < total:
        end = min(total, limit if not done else done + limit // 2)
        begin = max(0, end - limit)
        with torch.no_grad():
            logs = torch.log_softmax(model(torch.tensor([item.input_ids[begin:end]])).logits[0].double(), -1)
        nll -= sum(float(logs[at - 1 - begin, item.input_ids[at]]) for at in range(max(done, 1), end))
        done = end
    assert found.nll == pytest.approx(nll, rel=1e-5)


def test_bits_per_byte_compare_models_of_other_tokens_and_perplexity_does_not():
    a = [row(n, nll=30.0 + n, tokens=9, correct=3, num_bytes=40) for n in range(12)]
    b = [
        row(n, nll=20.0 + n % 5, tokens=7, correct=3, num_bytes=40, prompt_sha256=f"o{n}") for n in range(12)
    ]
    found = {c.metric: c for c in compare(a, b, metrics=["bits_per_byte", "perplexity"], resamples=200)}
    assert (found["bits_per_byte"].n, found["bits_per_byte"].verdict) == (12, "better")
    assert (found["perplexity"].n, found["perplexity"].verdict) == (0, "inconclusive")
    expected = sum(r.nll for r in b) / math.log(2) / (40 * 12)
    assert found["bits_per_byte"].tuned == pytest.approx(expected, abs=1e-9)
