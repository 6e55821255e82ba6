"""What of the held-out questions stands in the training data, and what answers copy from it."""

import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows_by_hand import row

from tunesmith import api
from tunesmith.compose import compose
from tunesmith.data.examples import Conversation, Message, Row, Text
from tunesmith.evaluation import measuring
from tunesmith.evaluation.leakage import (
    Leakage,
    containment,
    copied,
    find,
    grams,
    jaccard,
    longest_common,
    normalized,
    remark,
    subsets,
)
from tunesmith.evaluation.rows import read_rows
from tunesmith.recipe import Recipe
from tunesmith.training.run import Run

WORDS = [
    f"{a}{b}"
    for a in ("ka", "lo", "mi", "ne", "ru", "sta", "ve")
    for b in ("dan", "fir", "gos", "lum", "pit")
]


def chat(question, answer="fine", *, n=1, source="train", group=None, system=None):
    turns = (Message("user", question), Message("assistant", answer))
    if system:
        turns = (Message("system", system), *turns)
    return Conversation(turns, Row(source, n), group=group)


def said(count, seed):
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def test_nothing_in_common_is_nothing():
    found = find([chat(said(30, n)) for n in range(20)], [chat(said(30, 100 + n)) for n in range(100)])
    assert (found.leaked, found.review, found.pairs) == ({}, (), ())
    assert found.sentence() == "none of 20 held-out questions was found among 100 training rows"
    assert find([], [chat("x")]).sentence() == "nothing is held out"


@pytest.mark.parametrize(
    ("asked", "trained", "kind"),
    [
        (chat("What is RED?"), chat("what is　ｒｅｄ"), "exact"),
        (chat("what is red", system="be kind"), chat("what is red", system="be short"), "exact"),
        (chat("what is red", "a color"), chat("What is red?", "a wine"), "other answer"),
        (chat(said(20, 1), group="db1"), chat(said(20, 2), group="db1"), "group"),
        (chat(said(60, 3)), chat(said(60, 3) + " kadan lofir"), "near"),
        (chat(said(30, 4)), chat(" ".join((said(200, 5), said(30, 4), said(200, 6)))), "contained"),
        (Text(said(80, 7), Row("a", 1)), Text(said(80, 7) + " kadan", Row("b", 1)), "near"),
        (chat("如何在三天内学会骑自行车并且不会摔倒受伤呢请告诉我方法"),
         chat("如何在三天内学会骑自行车并且不会摔倒受伤呢请告诉我方法吧"), "near"),
    ],
    ids=["normalized", "system", "other answer", "group", "near", "contained", "text", "chinese"],
)  # fmt: skip
def test_each_kind_of_leak_is_found(asked, trained, kind):
    others = [chat(said(40, 50 + n), n=n + 2, group=f"g{n}") for n in range(50)]
    found = find([chat(said(25, 40)), asked], [*others[:20], trained, *others[20:]])
    assert found.leaked == {1: kind}
    assert found.counts[kind] == 1
    [pair] = [p for p in found.pairs if p.kind == kind]
    assert (pair.item, pair.leaked, pair.trained) == (1, True, str(trained.row))
    assert "1 of 2 held-out questions leaked" in found.sentence()


def test_half_alike_is_for_people_to_look_at():
    half = said(60, 8).split()
    other = " ".join(half[:46] + said(14, 9).split())
    found = find([chat(" ".join(half))], [chat(other)])
    assert found.leaked == {}
    assert found.review == (0,)
    assert "1 more are to be looked at" in found.sentence()


def test_copies_of_a_question_are_no_form_and_hide_no_leak():
    asked = [chat(said(30, n), said(5, 50 + n)) for n in range(6)]
    near = [chat(f"{said(30, n)} kadan", said(5, 50 + n), n=n) for n in (1, 4)]
    trained = [*near * 30, *(chat(said(30, 100 + n), n=9 + n) for n in range(40))]
    assert set(find(asked, trained).leaked) == {1, 4}
    assert set(find(asked * 6, trained).leaked) == {n for n in range(36) if n % 6 in (1, 4)}


def test_a_form_that_all_questions_fill_is_no_leak():
    form = said(60, 10)
    asked = [chat(f"{form} {said(12, 400 + n)}", said(5, 450 + n)) for n in range(100)]
    trained = [chat(f"{form} {said(12, 600 + n)}", said(5, 800 + n), n=n) for n in range(150)]
    assert find(asked, trained).leaked == {}
    copy = f"{form} {said(12, 407)}"
    assert find(asked, [*trained, chat(copy.upper(), said(5, 457))]).leaked == {7: "exact"}
    assert find(asked, [*trained, chat(copy + " kadan", said(5, 457))]).leaked == {7: "near"}
    one, other = (frozenset({1, 2}), frozenset({2, 3}))
    assert jaccard(one, other) == 1 / 3
    assert containment(one, other) == 1 / 2


@pytest.mark.parametrize(
    ("asked", "trained", "expected"),
    [
        ("How do I reset my password?", "How do I reset my passwords", "leaked"),
        ("How do I reset my password?", "Tell me: how do I reset my password on the old site of the bank?", "leaked"),
        ("Wie setze ich mein Passwort zurück?", "wie setze ich mein passwort zurueck", "review"),
        ("What is the capital of France?", "What is the capital of Norway?", "nothing"),
        ("What is 1213 plus 1425?", "What is 1213 plus 1426?", "review"),
        ("骑自行车怎么学最快", "骑自行车怎么学最快呢", "leaked"),
        ("please explain to me the water cycle of the earth in a few words",
         "please explain to me the water cycle of the earth in a few words ok", "leaked"),
    ],
    ids=["a letter", "in a longer one", "umlaut", "another word", "another number", "chinese", "ten words"],
)  # fmt: skip
def test_short_near_copies_are_found_and_other_questions_are_not(asked, trained, expected):
    answers = ("first this and then that, with a long explanation of why", "something else altogether here")
    others = [chat(said(8, 70 + n), said(9, 90 + n), n=n) for n in range(40)]
    found = find([chat(asked, answers[0])], [*others, chat(trained, answers[1])])
    got = "leaked" if found.leaked else "review" if found.review else "nothing"
    assert got == expected


def test_a_few_questions_that_are_alike_hide_one_another_not():
    shared = said(40, 500)
    four = [chat(f"{shared} {said(1, 510 + n)}", n=n) for n in range(4)]
    asked = [*four, *(chat(said(40, 530 + n)) for n in range(16))]
    trained = [chat(said(40, 560 + n), n=n) for n in range(150)]
    found = find(asked, [*trained, chat(f"{shared} {said(1, 599)}", n=900)])
    assert set(found.leaked) == {0, 1, 2, 3}
    assert found.notes == ()


def test_every_limit_is_counted_and_said(monkeypatch):
    from tunesmith.evaluation import leakage

    form = said(60, 10)
    asked = [chat(f"{form} {said(12, 400 + n)}", said(5, 450 + n)) for n in range(30)]
    trained = [chat(f"{form} {said(12, 600 + n)}", said(5, 800 + n), n=n) for n in range(150)]
    assert find(asked, trained).notes == (
        "30 questions share passages with many rows (a form); these passages do not count",
    )
    [note] = find([chat("hi", "ok"), chat(said(30, 1))], [chat(said(30, 2))]).notes
    assert note.startswith("1 questions are too short")
    copies = [chat(said(30, 1) + f" {n}", n=n) for n in range(9)]
    assert "13 more are counted only" in find([chat(said(30, 1))], copies).notes[-1]
    monkeypatch.setattr(leakage, "LOOKED_THROUGH", 5)
    assert "first 5 of 9 training rows" in find([chat(said(30, 1))], copies).notes[0]
    assert copied([said(30, 3)], [said(30, 4)] * 9).limit() == ""
    monkeypatch.setattr(leakage, "CORPUS", 300)
    told = copied([said(30, 3)], [said(30, 4)] * 9)
    assert 1 < told.looked_through < 9 == told.trained
    assert f"first {told.looked_through} of 9 training answers" in told.limit()


def true_leaks(asked, trained):
    """The same by brute force over all pairs."""
    kept = set()
    for n, a in enumerate(asked):
        for t in trained:
            whole = [f"{e.messages[0].content}\n{e.messages[1].content}" for e in (a, t)]
            near = jaccard(*(grams(text, 5, characters=False) for text in whole))
            alone = jaccard(*(grams(e.messages[0].content, 5, characters=False) for e in (a, t)))
            near = max(near, alone)
            long = grams(a.messages[0].content, 13, characters=False)
            if near >= 0.8 or containment(long, grams(whole[1], 13, characters=False)) >= 0.8:
                kept.add(n)
    return kept


def test_every_near_copy_that_all_pairs_have_is_found():
    draw = random.Random(11)
    asked = [chat(said(40, 1000 + n)) for n in range(60)]
    trained = [chat(said(40, 5000 + n), n=n) for n in range(60)]
    for n, a in enumerate(asked):
        words = a.messages[0].content.split()
        for _ in range(n // 12):
            words[draw.randrange(40)] = "changed"
        trained.append(chat(" ".join(words), n=100 + n))
    truth = true_leaks(asked, trained)
    assert 12 < len(truth) < 60
    assert set(find(asked, trained).leaked) == truth


def test_similarity_is_what_datasketch_estimates():
    from datasketch import MinHash

    for seed in range(5):
        one = said(80, seed).split()
        other = one[: 60 + 3 * seed] + said(20, 90 + seed).split()
        hashes = []
        for words in (one, other):
            sketch = MinHash(num_perm=512)
            for n in range(len(words) - 4):
                sketch.update(" ".join(words[n : n + 5]).encode())
            hashes.append(sketch)
        ours = jaccard(*(grams(" ".join(words), 5, characters=False) for words in (one, other)))
        assert hashes[0].jaccard(hashes[1]) == pytest.approx(ours, abs=0.08)


def test_normalized_keeps_what_tells_apart():
    assert normalized("  Ｈello,\nWorld!") == "helloworld"
    assert normalized("3 + 4") != normalized("3 - 4")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("12 - 3", "1 - 23"), ("1.5 times 4", "15 times 4"), ("x-1", "x1"), ("1,5", "15"), ("-3 + 4", "3 + 4"),
        ("1 2", "12"), ("(1) 2", "12"), ("1/2", "12"), ("what is .5?", "what is 5?"), ("7 \u2212 2", "72"),
        ("5-x", "5x"), ("1.5", "1,5"),
    ],
)  # fmt: skip
def test_numbers_never_grow_together(one, other):
    assert normalized(one) != normalized(other)
    counts = find([chat(one)], [chat(other)]).counts
    assert (counts["exact"], counts["other answer"]) == (0, 0)


def test_punctuation_beside_a_number_s_end_is_none_of_it():
    for one, other in [("It is 12.", "it is 12"), ("12 - 3?", "12-3"), ("In 1990, who?", "in 1990 who"),
                       ("x - 1", "x-1"), ("well-known", "well known")]:  # fmt: skip
        assert normalized(one) == normalized(other)


def test_questions_of_signs_alone_are_not_equal_to_each_other():
    assert not find([chat("???")], [chat("!!!")]).leaked


def lcs(one, other):
    lengths, best = [0] * (len(other) + 1), 0
    for a in one:
        row_before = lengths[:]
        for n, b in enumerate(other, 1):
            lengths[n] = row_before[n - 1] + 1 if a == b else 0
            best = max(best, lengths[n])
    return best


TEXT = st.text(alphabet="abc ", max_size=40)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(TEXT, min_size=1, max_size=4), st.lists(TEXT, max_size=4))
def test_longest_common_substring_is_that_of_brute_force(answers, trained):
    truth = [max((lcs(a, t) for t in trained), default=0) for a in answers]
    assert longest_common(answers, trained) == truth
    assert longest_common(answers, trained, least=8) == [n if n >= 8 else 0 for n in truth]


def test_copied_passages_are_counted():
    told = said(60, 20)
    found = copied([told[10:200], said(12, 21), ""], [said(50, 22), told])
    assert found.answers == 3
    assert found.copies == 1
    assert found.longest == len(told[10:200].strip())
    assert copied([], ["a"]).share == 0.0


def test_a_gain_that_lives_in_the_leaked_questions_is_called_that():
    asked = [chat(said(30, 300 + n)) for n in range(60)]
    leakage = find(asked, asked[:30])
    assert set(leakage.leaked) == set(range(30))
    base = [row(n, float(n % 3 == 0)) for n in range(60)]
    tuned = [row(n, 1.0 if n < 30 else float(n % 3 == 0), model="tuned") for n in range(60)]
    parts = subsets(leakage, base, tuned, "exact_match")
    assert (parts["dirty"].verdict, parts["clean"].verdict) == ("better", "no evidence")
    assert parts["clean"].n == parts["dirty"].n == 30
    assert remark(leakage, parts).endswith("it may be memory, not skill.")
    weak = {name: replace(c, n=n, difference=gain) for (name, c), n, gain in
            zip(parts.items(), (39, 1), (0.087, 0.6), strict=True)}  # fmt: skip
    assert list(weak) == ["clean", "dirty"]
    assert remark(leakage, weak).endswith(" 87% of the gain is left without them, on fewer questions: the evidence is "
                                          "weaker.")  # fmt: skip
    lost = {**weak, "clean": replace(weak["clean"], difference=0.01)}  # of 0.025 over all
    assert "memory" in remark(leakage, lost)
    assert "gain" not in remark(leakage, {**weak, "dirty": replace(weak["dirty"], difference=-9.0)}), (
        "there is none"
    )
    everywhere = [row(n, 1.0, model="tuned") for n in range(60)]
    assert "memory" not in remark(leakage, subsets(leakage, base, everywhere, "exact_match"))
    assert "was found" in remark(find(asked, []), {})


@pytest.fixture
def trained(tiny_model_folder, tmp_path):
    """A run on rows of which a source's own split lets twelve leak into what is held out."""
    lines = [{"question": said(14, n), "answer": said(12, 700 + n)} for n in range(60)]
    folder = tmp_path / "set"
    folder.mkdir()
    for name, chosen in (("train", lines[:48]), ("test", lines[36:])):
        text = ""
        for line in chosen:
            asked = line["question"].upper() if name == "test" else line["question"]
            text += json.dumps({"prompt": asked, "response": line["answer"]}) + "\n"
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    layer = {
        "output_dir": str(tmp_path / "runs"), "name": "leaky", "model": {"base": str(tiny_model_folder)},
        "data": {"dataset": str(folder), "near_duplicates": "ignore", "max_length": 200},
        "training": {"max_steps": 1, "per_device_train_batch_size": 2, "warmup_steps": 0},
        "evaluation": {"max_new_tokens": 4, "resamples": 100},
    }  # fmt: skip
    return compose(layer).recipe, lines


def test_leaks_are_told_before_training_and_kept_with_the_run(trained, tmp_path):
    recipe, lines = trained
    plan, facts = api.plan(recipe)
    [decision] = [d for d in plan.decisions if d.name == "leakage"]
    run = Run(api.train(recipe).run)
    kept = run.read("evaluation/leakage.json")
    assert kept["questions"] == len({r.item for r in read_rows(run.evaluation / "rows.jsonl")})
    assert decision.value.startswith(
        f"{len(kept['leaked'])} of {kept['questions']} held-out questions leaked"
    )
    assert facts["leakage"]["leaked"] == len(kept["leaked"])
    assert "leakage.json" not in decision.reason, "a plan writes no file"
    [begun] = [e for e in run.events() if e.get("name") == "leakage"]
    assert f"see {run.path / 'evaluation/leakage.json'}" in begun["reason"]
    assert set(kept["copied"]) == {"base", "tuned", "references"}
    leaky = {line["question"] for line in lines[:48]}
    dirty = {r.item for r in read_rows(run.evaluation / "rows.jsonl") if r.prompt_text.lower() in leaky}
    assert len(dirty) == 12
    assert {int(item) for item in kept["leaked"]} == dirty
    assert {name: part["n"] for name, part in kept["parts"].items()} == {"clean": 12, "dirty": 12}
    warned = [e["message"] for e in run.events() if e["kind"] == "warning"]
    assert kept["remark"] in warned
    page = (run.path / "report.html").read_text(encoding="utf-8")
    assert 'id="leakage"' in page
    # Another evaluation set: exact questions are left out anyway, near-copies and contained ones are told.
    other = tmp_path / "other.jsonl"
    rows = [{"prompt": f"{lines[n]['question']} please", "response": lines[n]["answer"]} for n in range(10)]
    rows += [{"prompt": said(14, 900 + n), "response": said(12, 950 + n)} for n in range(12)]
    other.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    told = []
    result = api.evaluate(run.path, dataset=str(other), watch=told.append)
    found = result.as_dict()["leakage"]
    assert found["leaked"] == 10
    assert found["questions"] == 22
    [warning] = [e["message"] for e in told if e["kind"] == "warning" and "Leakage" in e["message"]]
    assert warning.endswith(f"The pairs are in {result.run / 'leakage.json'}.")
    assert not [e for e in told if "evaluation/leakage.json" in str(e.get("reason"))]
    assert json.loads((result.run / "leakage.json").read_text())["pairs"][0]["leaked"]
    compared = api.compare(recipe.model.base, run.path, dataset=str(other))
    assert compared.leakage["parts"]["leaky"]["clean"]["n"] == 12
    assert compared.leakage["parts"]["leaky"]["dirty"]["n"] == 10


def test_of_a_run_held_against_its_base_the_run_is_the_one_that_may_remember():
    """As a sweep compares: the best trial stands first, its base behind it."""
    from tunesmith.recipe import Recipe

    asked = [chat(said(30, 300 + n)) for n in range(60)]
    questions = SimpleNamespace(leakage=find(asked, asked[:30]), recipe=Recipe(), learned=lambda: iter(()))
    base = [row(n, float(n % 3 == 0)) for n in range(60)]
    best = [row(n, 1.0 if n < 30 else float(n % 3 == 0), model="trial-001") for n in range(60)]
    sides = {"trial-001": best, "tiny": base}
    metrics = ["exact_match"]
    found = measuring.leak_facts(questions, sides, metrics, "exact_match", ["tiny"])
    assert found["parts"]["trial-001 over tiny"]["dirty"]["verdict"] == "better"
    assert "it may be memory, not skill" in found["remark"]
    unknown = measuring.leak_facts(questions, sides, metrics, "exact_match")
    assert unknown["parts"]["tiny"]["dirty"]["verdict"] == "worse"
    assert "memory" not in unknown["remark"]


def test_clean_questions_are_not_denied_where_nothing_is_compared():
    leaked = chat("What is the tallest mountain of the whole island?")
    found = find([leaked, chat("Who wrote the second of these books?", "nobody", n=2)], [leaked])
    assert len(found.leaked) == 1
    assert "The other 1 are clean" in remark(found, {})


def test_of_several_models_without_a_leak_the_remark_is_said_once():
    found = Leakage(12, 40, {}, (), {})
    questions = measuring.Questions(Recipe(), (), None, Path(), leakage=found)
    for names in (("a",), ("a", "b"), ("a", "b", "c")):
        facts = measuring.leak_facts(questions, {name: [] for name in names}, ["rougeL"], None)
        assert facts["remark"] == f"Leakage: {found.sentence()}."
