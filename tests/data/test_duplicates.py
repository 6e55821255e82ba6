"""Sketches against what they estimate: exact Jaccard similarity, and datasketch as an independent estimate."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data.duplicates import BANDS, BINS, THRESHOLD, NearDuplicates, plain, sketches

VOCABULARY = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "bdglmnrst"]


def text(rng, words):
    return " ".join(rng.choices(VOCABULARY, k=words))


def altered(original, rng, share):
    """The text with this share of its words replaced."""
    words = original.split()
    for place in rng.sample(range(len(words)), round(share * len(words))):
        words[place] = rng.choice(VOCABULARY)
    return " ".join(words)


def triples(said):
    words = re.findall(r"[a-z0-9]+", said.lower())
    return {tuple(words[n : n + 3]) for n in range(max(len(words) - 2, 1))}


def jaccard(a, b):
    return overlap(triples(a), triples(b))


def overlap(first, second):
    return len(first & second) / len(first | second)


def estimates(pairs):
    made = sketches([said for pair in pairs for said in pair])
    return (made[::2] == made[1::2]).mean(axis=1)


@pytest.fixture(scope="module")
def pairs():
    rng = random.Random(7)
    originals = [text(rng, rng.randint(60, 200)) for _ in range(600)]
    return [
        (said, altered(said, rng, rng.choice([0, 0.01, 0.02, 0.04, 0.08, 0.15, 0.4]))) for said in originals
    ]


def test_the_estimate_is_the_similarity_within_its_standard_error(pairs):
    exact = np.array([jaccard(*pair) for pair in pairs])
    error = estimates(pairs) - exact
    expected = np.sqrt(exact * (1 - exact) / BINS)
    assert abs(error.mean()) < 0.01
    assert np.sqrt((error**2).mean()) < 1.2 * np.sqrt((expected**2).mean())
    assert (estimates(pairs)[exact == 1] == 1).all()


def test_datasketch_makes_errors_of_the_same_size(pairs):
    MinHash = pytest.importorskip("datasketch").MinHash

    def of(said):
        made = MinHash(num_perm=BINS, seed=1)
        made.update_batch([" ".join(words).encode() for words in triples(said)])
        return made

    chosen = pairs[:200]
    exact = np.array([jaccard(*pair) for pair in chosen])
    theirs = np.array([of(a).jaccard(of(b)) for a, b in chosen])
    ours = estimates(chosen)
    spread = [np.sqrt(((estimate - exact) ** 2).mean()) for estimate in (ours, theirs)]
    assert spread[0] < 1.25 * spread[1]
    clear = abs(exact - THRESHOLD) > 0.15
    assert ((ours >= THRESHOLD) == (theirs >= THRESHOLD))[clear].mean() > 0.99


def test_pairs_are_those_of_exact_similarity():
    rng = random.Random(3)
    originals = [text(rng, 150) for _ in range(150)]
    rows = originals + [altered(said, rng, share) for said, share in zip(originals, [0.0, 0.01, 0.3] * 50)]
    near = NearDuplicates()
    for start in range(0, len(rows), 70):
        near.add(rows[start : start + 70])
    assert near.count == len(rows)
    found = {tuple(pair) for pair in near.pairs().tolist()}
    said = [triples(row) for row in rows]
    exact = {
        (later, earlier): overlap(said[later], said[earlier])
        for later in range(len(rows))
        for earlier in range(later)
    }
    assert found >= {pair for pair, similarity in exact.items() if similarity >= 0.92}
    assert all(exact[pair] >= 0.65 for pair in found)


def test_banding_finds_what_its_comment_says():
    width = BINS // BANDS
    assert 1 - (1 - THRESHOLD**width) ** BANDS > 0.9997


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("One, two: three!", "one two (three)", True),
        ("one two three", "three two one", False),
        ("what is 3 + 4", "what is 3 - 4", False),
        ("日本語の文", "日本語の 文", True),
        ("日本語の文", "語日本の文", False),
        ("", "...", True),
        ("a", "", False),
    ],
)
def test_what_counts_as_the_same_text(a, b, same):
    first, second = sketches([a, b])
    assert bool((first == second).all()) is same


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=40), min_size=1, max_size=8))
def test_a_sketch_depends_on_its_text_alone(texts):
    together = sketches(texts)
    for number, said in enumerate(texts):
        assert (sketches([said])[0] == together[number]).all()


def test_sketches_made_elsewhere_are_the_same_rows():
    rows = ["one two three four", "five six seven", "one two three four"]
    here, elsewhere = NearDuplicates(), NearDuplicates()
    here.add(rows)
    elsewhere.add_sketches(sketches(rows))
    assert here.pairs().tolist() == elsewhere.pairs().tolist() == [[2, 0]]
    assert NearDuplicates().pairs().tolist() == []


@given(st.text(alphabet="aB3 .,?!()-+é\n"), st.text(alphabet="aB3 .,?!()-+é\n"))
@settings(max_examples=200)
def test_plain_texts_are_equal_only_where_sketches_are(one, other):
    assert (sketches([one]) == sketches([plain(one)])).all()
    if plain(one) == plain(other):
        assert (sketches([one]) == sketches([other])).all()


def test_plain_keeps_signs_that_mean_something():
    assert plain(' What  is "3 - 4"?') == "what is 3 - 4" != plain("what is 3 + 4")
