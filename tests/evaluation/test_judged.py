"""Held-out preferences and ratings: which of two given answers a model finds likelier, through every verb."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tunesmith import api, data, evaluation, models
from tunesmith.compose import compose
from tunesmith.data.templates import IGNORED
from tunesmith.errors import RecipeError
from tunesmith.evaluation.compare import sentence
from tunesmith.evaluation.rows import read_rows
from tunesmith.recipe import Data

COLORS = ("red", "blue", "green", "one", "two", "three", "yes", "no")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("judged")
    pairs = [
        {
            "prompt": f"what is the count of {n}",
            "chosen": f"{COLORS[n % 8]} {n}" * (1 + n % 3),
            "rejected": f"no {COLORS[(n + 3) % 8]} rows" + " yes" * (n % 4),
        }
        for n in range(48)
    ]
    ratings = [
        {"prompt": row["prompt"], "completion": row["chosen" if n % 3 else "rejected"], "label": n % 3 > 0}
        for n, row in enumerate(pairs)
    ]
    made = {}
    for name, rows in (("pairs", pairs), ("ratings", ratings)):
        made[name] = folder / f"{name}.jsonl"
        made[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def mean_likelihood(model, ids, labels) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    found = [
        float(logits[place - 1].log_softmax(-1)[token])
        for place, (token, label) in enumerate(zip(ids, labels, strict=True))
        if label != IGNORED
    ]
    return sum(found) / len(found)


def measured(files, name, folder, metric):
    examples = data.prepare(Data(dataset=str(files[name]), held_out=1 - 1e-9, validation=0.0)).held_out
    tokenizer = models.load_tokenizer(str(folder))
    model = models.load_model(str(folder)).eval()
    items = evaluation.items(examples, tokenizer)
    assert evaluation.judged(items) == [metric]
    rows = evaluation.evaluate(model, tokenizer, items, name="base", metrics=[metric])
    return model, items, rows


def test_preference_accuracy_is_the_share_of_pairs_by_brute_force(files, tiny_model_folder):
    model, items, rows = measured(files, "pairs", tiny_model_folder, "preference_accuracy")
    expected = [
        mean_likelihood(model, item.input_ids, item.labels)
        > mean_likelihood(model, item.rejected.input_ids, item.rejected.labels)
        for item in items
    ]
    assert [row.scores["preference_accuracy"] for row in rows] == [float(won) for won in expected]
    assert {True, False} == set(expected)
    assert all(row.output is None for row in rows)  # nothing is written for it
    [score] = evaluation.scores(rows, ["preference_accuracy"]).values()
    assert score["value"] == pytest.approx(sum(expected) / len(expected))
    assert score["method"] == "Wilson"
    one = rows[0]
    assert one.rejected_nll == pytest.approx(
        -one.rejected_tokens * mean_likelihood(model, items[0].rejected.input_ids, items[0].rejected.labels),
        rel=1e-5,
    )


def test_a_pair_alike_to_the_model_counts_half(files, tiny_model_folder):
    model, items, _ = measured(files, "pairs", tiny_model_folder, "preference_accuracy")
    from dataclasses import replace

    alike = [replace(items[0], rejected=replace(items[0]))]
    tokenizer = models.load_tokenizer(str(tiny_model_folder))
    [row] = evaluation.evaluate(model, tokenizer, alike, name="base", metrics=["preference_accuracy"])
    assert row.scores == {"preference_accuracy": 0.5}


def test_rating_ranking_puts_each_good_answer_beside_one_bad(files, tiny_model_folder):
    model, items, rows = measured(files, "ratings", tiny_model_folder, "rating_ranking")
    good = [item for item in items if item.good]
    bad = [item for item in items if not item.good]
    assert len(good) > len(bad) > 5
    by_number = {row.item: row for row in rows}
    for better, worse in zip(good, bad, strict=False):
        won = mean_likelihood(model, better.input_ids, better.labels) > mean_likelihood(
            model, worse.input_ids, worse.labels
        )
        assert by_number[better.number].scores == {"rating_ranking": float(won)}
    assert sum("rating_ranking" in row.scores for row in rows) == len(bad)
    for item in bad:  # it is neither asked for nor counted as a reference
        row = by_number[item.number]
        assert (row.good, row.nll, row.reference, row.scores) == (False, None, "", {})
        assert row.prompt_text.startswith("what is the count")


def test_a_metric_of_pairs_on_other_data_says_what_it_needs(files, tiny_model_folder):
    with pytest.raises(RecipeError, match="preference_accuracy") as error:
        api.evaluate(str(tiny_model_folder), dataset=str(files["ratings"]), metrics=["preference_accuracy"])
    assert "pairs of answers" in error.value.fix


@pytest.fixture(scope="module")
def run(files, tiny_model_folder, tmp_path_factory):
    """A run that learned a little of which answers are better."""
    recipe = compose(
        {
            "output_dir": str(tmp_path_factory.mktemp("runs")),
            "name": "judged",
            "model": {"base": str(tiny_model_folder)},
            "method": {"kind": "dpo"},
            "data": {"dataset": str(files["pairs"]), "held_out": 0.4, "max_length": 96},
            "training": {
                "max_steps": 12, "per_device_train_batch_size": 8, "warmup_steps": 0, "learning_rate": 2e-2,
                "logging_steps": 2, "eval_steps": 12,
            },
            "evaluation": {"max_new_tokens": 6, "resamples": 500},
        }
    ).recipe  # fmt: skip
    return api.train(recipe)


def test_it_is_the_primary_metric_and_reaches_report_and_card(run):
    assert run.primary.metric == "preference_accuracy"
    assert run.primary.tuned > run.primary.base
    assert "pairs" in sentence(run.primary)
    metrics = [c.metric for c in run.comparisons]
    assert {"rougeL", "perplexity", "length_match"} <= set(metrics)
    rows = read_rows(run.run / "evaluation" / "rows.jsonl")
    assert all(row.output is not None and row.rejected_tokens for row in rows)
    page = (run.run / "report.html").read_text()
    assert "preference accuracy" in page
    assert "rewards/accuracies" in page
    assert "preference accuracy" in (run.run / "final_model" / "README.md").read_text()


def test_evaluate_and_compare_measure_it_again(run, tiny_model_folder, files, tmp_path):
    again = api.evaluate(run.run)
    assert again.scores["preference_accuracy"]["value"] == run.primary.tuned
    assert again.scores["preference_accuracy"]["n"] == run.primary.n
    compared = api.compare(str(tiny_model_folder), run.run)
    assert (compared.primary.metric, compared.primary.base, compared.primary.tuned, compared.primary.verdict) == (
        run.primary.metric, run.primary.base, run.primary.tuned, run.primary.verdict,
    )  # fmt: skip
    # A model that is no run of a preference method is asked about pairs where it is told to.
    plain = api.evaluate(str(tiny_model_folder), dataset=str(files["pairs"]), metrics=["preference_accuracy"])
    assert plain.scores["preference_accuracy"]["n"] == 48
