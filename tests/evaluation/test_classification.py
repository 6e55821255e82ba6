"""Labels: parsing, statistics against brute force, intervals of whole statistics, probabilities of labels."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
import torch
from rows_by_hand import row

from tunesmith import api, evaluation, models
from tunesmith.data.examples import Conversation, Message, Prompt, Row
from tunesmith.data.templates import encode
from tunesmith.errors import RecipeError
from tunesmith.evaluation import classification
from tunesmith.evaluation.compare import compare, score_interval, sentence
from tunesmith.evaluation.metrics import METRICS, default_metrics, primary_metric
from tunesmith.evaluation.report import write_report

LABELS = ["positive", "negative", "not sure"]


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("Positive.", "positive"),
        ("**negative**", "negative"),
        ("I think it is negative, not positive.", "negative"),
        ("Not  sure", "not sure"),
        ("Sure, it is positively so", None),
        ("", None),
        ("I do not know", None),
    ],
)
def test_labels_are_parsed(answer, found):
    assert classification.parsed(answer, LABELS) == found


def test_the_longer_of_two_labels_at_one_place_is_given():
    assert classification.parsed("very good indeed", ["very", "very good"]) == "very good"


def prompts(references):
    return [Prompt((Message("user", "say"),), r, Row("a", n)) for n, r in enumerate(references)]


@pytest.mark.parametrize(
    ("references", "fits"),
    [
        (["yes", "no"] * 5, True),
        (["Yes", "no", "yes.", "No"] * 3, True),
        (["yes"] * 10, False),
        (["yes", "no"] * 4, False),
        ([str(n) for n in range(40)], False),
        (["a label of far too many words", "no"] * 8, False),
        (["two\nlines", "no"] * 8, False),
    ],
)
def test_a_classification_has_few_labels_that_occur_often(references, fits):
    assert METRICS["macro_f1"].fits_all(prompts(references)) == fits
    names = default_metrics(prompts(references), False)
    assert (names[0] == "label_accuracy") == fits
    assert primary_metric(names) == names[0]


def by_hand(right, given, labels):
    """The textbook definitions, one label at a time; MCC as the correlation of indicator columns."""
    recalls, f1 = [], []
    for name in labels:
        hit = sum(r == g == name for r, g in zip(right, given))
        asked, told = right.count(name), given.count(name)
        recalls.append(hit / asked)
        precision, recall = hit / told if told else 0, hit / asked
        f1.append(2 * precision * recall / (precision + recall) if precision + recall else 0)
    columns = [*labels, None]
    x = np.array([[float(g == name) for name in columns] for g in given])
    y = np.array([[float(r == name) for name in columns] for r in right])

    def cov(a, b):
        return float(((a - a.mean(0)) * (b - b.mean(0))).sum())

    spread = math.sqrt(cov(x, x) * cov(y, y))
    return {
        "label_accuracy": sum(r == g for r, g in zip(right, given)) / len(right),
        "balanced_accuracy": sum(recalls) / len(labels),
        "macro_f1": sum(f1) / len(labels),
        "mcc": cov(x, y) / spread if spread else 0.0,
    }


def random_rows(draw, labels, n, model="base"):
    right = [*labels, *draw.choices(labels, weights=range(1, len(labels) + 1), k=n - len(labels))]
    given = [r if draw.random() < 0.6 else draw.choice([*labels, None]) for r in right]
    said = [f"It is {g.upper()}!" if g else "who knows" for g in given]
    rows = [row(i, model=model, output=s, reference=r) for i, (s, r) in enumerate(zip(said, right))]
    scored = [
        evaluation.replace(
            r, scores=dict.fromkeys(("label_accuracy", "balanced_accuracy", "macro_f1", "mcc"), v)
        )
        for r, v in zip(rows, classification.is_right(rows))
    ]
    return scored, right, given


def test_statistics_equal_brute_force_on_200_random_sets():
    draw = random.Random(0)
    for _ in range(200):
        labels = ["red", "blue", "dark red", "one"][: draw.randint(2, 4)]
        rows, right, given = random_rows(draw, labels, draw.randint(5, 25))
        sums = classification.tally(rows).sum(0)
        for name, expected in by_hand(right, given, labels).items():
            value = (
                METRICS[name].statistic(sums)
                if METRICS[name].statistic
                else np.mean(METRICS[name].among(rows))
            )
            assert float(value) == pytest.approx(expected, abs=1e-9), (name, right, given)
        assert float(classification.accuracy(sums)) == pytest.approx(
            np.mean(classification.is_right(rows)), abs=1e-9
        )


def test_always_the_same_label_is_no_skill():
    rows = [row(n, output="yes", reference="yes" if n % 4 else "no") for n in range(20)]
    sums = classification.tally(rows).sum(0)
    assert float(classification.balanced_accuracy(sums)) == 0.5
    assert float(classification.mcc(sums)) == 0
    found = classification.classification(rows)
    assert (found.majority, found.majority_share, found.unparsed) == ("yes", 0.75, 0)
    assert found.matrix == ((15, 0, 0), (5, 0, 0))
    unsaid = classification.classification([evaluation.replace(r, output="?") for r in rows])
    assert (unsaid.unparsed, unsaid.matrix) == (20, ((0, 0, 15), (0, 0, 5)))
    assert classification.classification(rows[:3]) is None


def test_whole_statistics_have_intervals_and_mirrored_comparisons():
    draw = random.Random(1)
    base, right, given = random_rows(draw, ["red", "blue"], 60)
    better = [evaluation.replace(r, model="tuned", output=r.reference) for r in base]
    tuned = [
        evaluation.replace(r, scores=dict.fromkeys(r.scores, v))
        for r, v in zip(better, classification.is_right(better))
    ]
    score = score_interval(base, "macro_f1", resamples=500)
    assert score.value == pytest.approx(by_hand(right, given, ["red", "blue"])["macro_f1"], abs=1e-9)
    assert score.low < score.value < score.high
    metrics = ["macro_f1", "mcc", "balanced_accuracy"]
    there = compare(base, tuned, metrics=metrics, resamples=500)
    back = compare(tuned, base, metrics=metrics, resamples=500)
    for c, d in zip(there, back):
        assert (c.tuned, c.verdict, d.verdict) == (1.0, "better", "worse")
        assert (c.difference, c.low, c.high) == pytest.approx((-d.difference, -d.high, -d.low))
        assert (c.wins, c.losses) == (d.losses, d.wins)
    same = compare(base, base, metrics=["macro_f1"], resamples=100)[0]
    assert (same.difference, same.verdict, same.p_value) == (0, "no evidence", 1.0)
    assert "macro F1 rose from" in sentence(there[0])


def test_calibration_equals_brute_force_on_200_random_sets():
    draw = random.Random(2)
    for _ in range(200):
        rows = []
        for n in range(draw.randint(1, 30)):
            p = draw.choice([0.5, 0.6, 0.75, 0.9, 1.0, draw.random()])
            probs = {"yes": p, "no": 1 - p}
            rows.append(row(n, reference=draw.choice(["Yes", "no."]), output="", label_probs=probs))
        bins: dict[int, list[tuple[float, bool]]] = {}
        brier = []
        for r in rows:
            name, p = max(r.label_probs.items(), key=lambda pair: pair[1])
            right = r.reference.strip(".").lower()
            place = next(b for b in range(10) if b / 10 < p <= (b + 1) / 10)
            bins.setdefault(place, []).append((p, name == right))
            brier.append(sum((q - float(other == right)) ** 2 for other, q in r.label_probs.items()))
        expected = sum(abs(sum(p for p, _ in b) - sum(ok for _, ok in b)) for b in bins.values()) / len(rows)
        found = classification.calibration_error(classification.calibration_tally(rows).sum(0))
        assert float(found) == pytest.approx(expected, abs=1e-9)
        assert classification.brier(rows) == pytest.approx(brier, abs=1e-9)


@pytest.fixture(scope="module")
def measured(tiny_model_folder, tiny_tokenizer):
    model = models.load_model(str(tiny_model_folder))
    examples = [
        Conversation(
            (Message("user", f"what is {n}"), Message("assistant", ["red", "blue"][n % 2])), Row("a", n)
        )
        for n in range(10)
    ]
    names = ["label_accuracy", "macro_f1", "brier", "label_ranking", "calibration_error"]
    asked = evaluation.items(examples, tiny_tokenizer)
    rows = evaluation.evaluate(model, tiny_tokenizer, asked, name="m", metrics=names, max_new_tokens=2)
    return model, examples, rows


def test_probabilities_of_labels_are_those_of_the_model(measured, tiny_tokenizer):
    model, examples, rows = measured
    for example, found in zip(examples[:3], rows):
        logs = []
        for word in ("red", "blue"):
            turns = (example.messages[0], Message("assistant", word))
            encoding = encode(Conversation(turns, example.row), tiny_tokenizer)
            with torch.no_grad():
                scores = torch.log_softmax(model(torch.tensor([encoding.input_ids])).logits[0].double(), -1)
            logs.append(sum(float(scores[at - 1, t]) for at, t in enumerate(encoding.labels) if t != -100))
        expected = np.exp(logs) / np.exp(logs).sum()
        assert [found.label_probs[word] for word in ("red", "blue")] == pytest.approx(expected, abs=1e-5)


def test_every_label_metric_has_a_score_through_evaluate(measured):
    _, _, rows = measured
    names = ["label_accuracy", "macro_f1", "brier", "label_ranking", "calibration_error"]
    found = evaluation.scores(rows, names)
    assert all(found[name]["n"] == 10 and found[name]["value"] is not None for name in names)
    assert found["calibration_error"]["low"] <= found["calibration_error"]["high"]


def test_other_references_are_refused(tiny_model_folder, tiny_tokenizer):
    examples = [
        Conversation((Message("user", f"what is {n}"), Message("assistant", f"red {n}")), Row("a", n))
        for n in range(12)
    ]
    with pytest.raises(RecipeError, match="few labels"):
        evaluation.evaluate(
            models.load_model(str(tiny_model_folder)), tiny_tokenizer, evaluation.items(examples, tiny_tokenizer),
            name="m", metrics=["macro_f1"],
        )  # fmt: skip


def test_the_report_shows_the_confusion_matrix_and_escapes_labels(run_folder):
    rows = [
        row(n, model=name, reference="<b>yes</b>" if n % 4 else "no", output="no" if n else "?")
        for name in ("base", "tuned")
        for n in range(20)
    ]
    evaluation.write_rows(run_folder / "evaluation" / "rows.jsonl", rows)
    html = write_report(run_folder).read_text("utf-8")
    assert "would be right for 75.0 % of the questions" in html
    assert "1 of 20 answers of tuned give none of the labels" in html
    assert "<b>yes</b>" not in html
    assert '<th scope="row">no</th><td>0</td><td class="better">4</td><td>1</td>' in html


def test_evaluate_says_the_majority_baseline(tiny_model_folder, tmp_path):
    data = tmp_path / "labels.jsonl"
    lines = [{"prompt": f"what is {n}", "response": "red" if n % 4 else "blue"} for n in range(20)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = []
    result = api.evaluate(
        str(tiny_model_folder), dataset=str(data), output=tmp_path / "out",
        settings={"evaluation": {"max_new_tokens": 2}}, watch=told.append,
    )  # fmt: skip
    assert next(iter(result.scores)) == "label_accuracy"
    [said] = [event for event in told if event.get("name") == "labels"]
    assert "always answering 'red' would be right for 75.0 % of 20" in said["reason"]
    kept = json.loads((tmp_path / "out/scores.json").read_text())
    assert sum(map(sum, kept["labels"]["matrix"])) == 20
