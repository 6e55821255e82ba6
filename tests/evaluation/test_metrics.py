import pytest
from rouge_score.rouge_scorer import RougeScorer

from tunesmith.data.examples import Message, Prompt, Row
from tunesmith.errors import RecipeError
from tunesmith.evaluation.metrics import METRICS, default_metrics, known_metrics, primary_metric

PROMPT = Prompt((Message("user", "say"),), "the cat sat", Row("a", 1))
SQL = Prompt(
    (Message("user", "count"),), "SELECT COUNT(*) FROM t", Row("a", 1),
    checks={"schema": "CREATE TABLE t (a INTEGER);", "setup": "INSERT INTO t VALUES (1), (2);"},
)  # fmt: skip
CHINESE = Prompt((Message("user", "?"),), "我不知道", Row("a", 1))


def score(name, completion, reference, prompt=PROMPT):
    return METRICS[name].score(prompt, completion, reference)


def test_exact_match_ignores_white_space_only():
    assert score("exact_match", " the\n cat  sat ", "the cat sat") == 1
    assert score("exact_match", "The cat sat", "the cat sat") == 0
    assert score("exact_match", "", "the") == 0


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL", "rougeLsum"])
def test_rouge_is_that_of_rouge_score(name):
    completion, reference = "cats were sitting\non the mat", "the cat sat\non a mat"
    theirs = RougeScorer([name], use_stemmer=True).score(reference, completion)[name].fmeasure
    assert score(name, completion, reference) == theirs
    assert score(name, "", reference) == 0
    assert score(name, reference, reference) == 1


def test_rouge_by_hand():
    # 2 of 3 words shared on both sides: F1 = 2/3; longest common sequence `the cat` too; one of two pairs.
    assert score("rouge1", "the cat ran", "the cat sat") == pytest.approx(2 / 3)
    assert score("rougeL", "the cat ran", "the cat sat") == pytest.approx(2 / 3)
    assert score("rouge2", "the cat ran", "the cat sat") == pytest.approx(1 / 2)
    # By lines the swapped lines are both found; as one sequence only one of them is.
    assert score("rougeLsum", "a b\nc d", "c d\na b") == pytest.approx(1)
    assert score("rougeL", "a b\nc d", "c d\na b") == pytest.approx(1 / 2)


def test_sql_execution_takes_code_out_of_a_fence():
    assert score("sql_execution", "SELECT 2", SQL.reference, SQL) == 1
    assert score("sql_execution", "Here:\n```sql\nSELECT 2\n```\nDone.", SQL.reference, SQL) == 1
    assert score("sql_execution", "SELECT 3", SQL.reference, SQL) == 0
    assert METRICS["sql_execution"].flags(SQL, "nonsense", SQL.reference)[0].startswith("sql: ")


def test_default_metrics_fit_the_data():
    assert default_metrics([SQL] * 3, False) == [
        "sql_execution",
        "ex_bag",
        "ex_set",
        "sql_vacuous",
        "exact_match",
        "token_accuracy",
        "perplexity",
    ]
    assert default_metrics([PROMPT], False) == [
        "rougeL", "exact_match", "rouge1", "rouge2", "rougeLsum", "token_accuracy", "perplexity",
    ]  # fmt: skip
    assert default_metrics([], True) == ["perplexity", "token_accuracy", "bits_per_byte"]
    assert default_metrics([], False) == []
    assert default_metrics([CHINESE], False) == ["exact_match", "token_accuracy", "perplexity"]


def test_unknown_metric_names_the_nearest():
    with pytest.raises(RecipeError, match="Did you mean 'rougeL'"):
        known_metrics(["exact_match", "rougel"])
    assert known_metrics(["rougeL", "rougeL"]) == ["rougeL"]
    assert primary_metric(["perplexity", "rougeL"]) == "rougeL"
    assert primary_metric(["perplexity"]) == "perplexity"


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_every_metric_explains_itself(metric):
    assert len(metric.about) > 40
    # mean_reward needs a run's rewards.
    is_scored_here = metric.kind in ("answer", "labels") and metric.name != "mean_reward"
    assert (metric.score is None and metric.among is None) != is_scored_here
