import math

import pytest
import torch

from tunesmith import evaluation
from tunesmith.data.examples import Conversation, Message, Row, Text, content_hash
from tunesmith.data.templates import encode, prompt_ids
from tunesmith.errors import RecipeError, RunError
from tunesmith.evaluation import evaluate, items, read_rows, scores, write_rows


@pytest.fixture(scope="module")
def model(tiny_model_folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_folder)


def conversation(n, *, words=3, **fields):
    messages = (
        Message("user", "what is " + "red " * (n % 7)),
        Message("assistant", "blue " * (words + n % 5) + str(n)),
    )
    return Conversation(messages, Row("data", n + 1), **fields)


@pytest.fixture(scope="module")
def examples():
    return [conversation(n, group=f"g{n % 3}") for n in range(12)]


def brute_force(model, item, *, shift=1):
    """Negative log-likelihood, tokens and correct ones, one token at a time."""
    nll = tokens = correct = 0
    with torch.no_grad():
        for position, label in enumerate(item.labels):
            if label == -100 or position == 0:
                continue
            logits = model(torch.tensor([item.input_ids[: position + 1 - shift]])).logits[0, -1]
            nll -= float(torch.log_softmax(logits, -1)[label])
            tokens, correct = tokens + 1, correct + int(logits.argmax() == label)
    return nll, tokens, correct


@pytest.mark.parametrize("batch_tokens", [8192, 40])
def test_likelihood_is_that_of_brute_force(model, tiny_tokenizer, examples, batch_tokens):
    asked = items([*examples, Text("what is the capital of france", Row("t", 1))], tiny_tokenizer)
    rows = evaluate(
        model,
        tiny_tokenizer,
        asked,
        name="base",
        metrics=["perplexity", "token_accuracy"],
        batch_tokens=batch_tokens,
    )
    total = [0.0, 0, 0]
    for item, row in zip(asked, rows):
        expected = brute_force(model, item)
        assert row.nll == pytest.approx(expected[0], abs=1e-3)
        assert (row.tokens, row.correct) == expected[1:]
        total = [a + b for a, b in zip(total, expected)]
        assert row.output is None
    found = scores(rows, ["perplexity", "token_accuracy"])
    assert found["perplexity"]["value"] == pytest.approx(math.exp(total[0] / total[1]), rel=1e-4)
    assert found["token_accuracy"]["value"] == pytest.approx(total[2] / total[1])
    shifted = brute_force(model, asked[0], shift=0)
    assert abs(shifted[0] - rows[0].nll) > 0.1, "negative control: labels one off give another number"


def test_rows_hold_what_was_asked_and_do_not_depend_on_order(model, tiny_tokenizer, examples, tmp_path):
    asked = items(examples, tiny_tokenizer)
    told = []
    options = {"name": "base", "metrics": ["exact_match", "rougeL", "perplexity"], "max_new_tokens": 6}
    rows = evaluate(
        model,
        tiny_tokenizer,
        asked,
        progress=lambda stage, done, total: told.append((stage, done, total)),
        **options,
    )
    assert [row.status for row in rows] == ["ok"] * 12
    assert rows[0].prompt_text == examples[0].messages[0].content
    assert rows[0].reference == examples[0].messages[1].content
    assert rows[4].source_row == "data:5"
    assert rows[4].group == "g1"
    assert asked[0].prompt_ids == tuple(prompt_ids(examples[0].messages[:1], tiny_tokenizer))
    assert asked[0].labels == tuple(encode(examples[0], tiny_tokenizer).labels)
    assert told[-1] == ("base: likelihood", 12, 12)
    shuffled = evaluate(model, tiny_tokenizer, asked[::-1], **options)[::-1]
    for row, other in zip(rows, shuffled):
        assert (row.output, row.scores["rougeL"], row.prompt_sha256) == (
            other.output, other.scores["rougeL"], other.prompt_sha256,
        )  # fmt: skip
        assert row.nll == pytest.approx(other.nll, abs=1e-4)
    path = write_rows(tmp_path / "rows.jsonl", rows)
    assert read_rows(path) == rows
    path.write_text('{"model": 1}\n')
    with pytest.raises(RunError, match="Line 1"):
        read_rows(path)


def test_items_are_chosen_by_content(tiny_tokenizer, examples):
    chosen = {n.row.number for n in items(examples, tiny_tokenizer, max_items=5)}
    assert chosen == {e.row.number for e in sorted(examples, key=content_hash)[:5]}
    assert {n.row.number for n in items(examples[::-1], tiny_tokenizer, max_items=5)} == chosen


def test_cut_likelihoods_are_counted(model, tiny_tokenizer):
    long = conversation(0, words=900)
    [item] = items([long], tiny_tokenizer, max_length=100)
    assert len(item.input_ids) == 100
    assert item.tokens_cut > 0
    [whole] = items([long], tiny_tokenizer)
    [row] = evaluate(model, tiny_tokenizer, [whole], name="base", metrics=["perplexity"])
    assert row.tokens_cut == 0, "what is longer than the model's context is read in windows"
    assert row.tokens == sum(label != -100 for label in whole.labels)
    assert row.windows == 1 + math.ceil((len(whole.input_ids) - 512) / 256)


def test_likelihoods_are_the_same_however_few_logits_are_copied_at_once(
    model, tiny_tokenizer, examples, monkeypatch
):
    asked = items(examples, tiny_tokenizer)
    found = []
    for most in (evaluation.LOGITS_AT_ONCE, 3 * model.config.vocab_size, 1):
        monkeypatch.setattr(evaluation, "LOGITS_AT_ONCE", most)
        rows = evaluate(model, tiny_tokenizer, asked, name="base", metrics=["perplexity"])
        found.append([(row.nll, row.tokens, row.correct) for row in rows])
    assert found[0] == found[1] == found[2]


def test_a_broken_reference_is_an_error_row_and_an_unfit_metric_a_recipe_error(model, tiny_tokenizer):
    broken = conversation(1, extra={"schema": "CREATE TABLE t (a);", "setup": "INSERT INTO t VALUES (1);"})
    [row] = evaluate(
        model, tiny_tokenizer, items([broken], tiny_tokenizer), name="base",
        metrics=["sql_execution", "exact_match"], max_new_tokens=4,
    )  # fmt: skip
    assert row.status.startswith("error:sql_execution: the reference query does not run")
    assert set(row.scores) == {"exact_match"}
    assert scores([row], ["sql_execution"])["sql_execution"]["n_errors"] == 1
    plain = items([conversation(1)], tiny_tokenizer)
    with pytest.raises(RecipeError, match="fits none"):
        evaluate(model, tiny_tokenizer, plain, name="base", metrics=["sql_execution"])
    with pytest.raises(RecipeError, match="no metric"):
        evaluate(model, tiny_tokenizer, plain, name="base", metrics=["meteor"])


def test_an_example_that_the_template_refuses_is_counted(model, tiny_tokenizer, examples):
    refused = Conversation((Message("user", "no answer"),), Row("data", 99))
    asked = items([examples[0], refused], tiny_tokenizer)
    rows = evaluate(model, tiny_tokenizer, asked, name="base", metrics=["exact_match"], max_new_tokens=2)
    assert [row.status == "ok" for row in rows] == [True, False]
    assert evaluation.scores(rows, ["exact_match"])["exact_match"]["n_errors"] == 1
