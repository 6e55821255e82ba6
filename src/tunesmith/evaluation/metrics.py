"""Metrics: one signature `(prompt, completion, reference) -> float` for evaluation, comparison and rewards.

Answer metrics are pure functions of texts; one that compares a model's answers with one another is a
function of all of them. Likelihood metrics have no such function: they are computed from the model's own
probabilities of the reference tokens, over all of them at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from tunesmith.data.examples import Prompt
from tunesmith.errors import RecipeError, nearest
from tunesmith.evaluation import (
    classification,
    code,
    completion,
    conversation,
    corpus,
    instructions,
    tasks,
    texts,
)
from tunesmith.evaluation.sql import SQLResult, canonical, execution_match
from tunesmith.evaluation.tasks import code_of

if TYPE_CHECKING:
    from tunesmith.evaluation.rows import EvalRow

Score = Callable[[Prompt, str, str], float]
Unit = Literal["share", "points", "ratio"]


@dataclass(frozen=True)
class Metric:
    """A way to score a model, and how its numbers are to be read."""

    name: str
    label: str
    """As people call it."""
    score: Score | None
    """Score of one answer; None for likelihood metrics and for those that look at all answers at once."""
    higher_is_better: bool
    unit: Unit
    """`share` is 0 to 1, shown in percent; `points` is 0 to 1, shown times 100; `ratio` is shown as it is."""
    about: str
    fits: Callable[[Prompt], bool]
    """Whether the metric means something for this prompt."""
    kind: Literal["answer", "likelihood", "labels", "preference", "reward"]
    """What it looks at: the answer that a model gives, how likely it finds the reference or each label of the set,
    which of two given answers it finds likelier, or which one a reward model gives the higher score."""
    flags: Callable[[Prompt, str, str], tuple[str, ...]] | None = None
    """What else is to be known about a score, such as that a match is vacuous."""
    among: Callable[[Sequence[EvalRow]], Sequence[float | None]] | None = None
    """Scores of all answers of a model, for a metric that compares them with one another or reads more of a row
    than its text; None of a row that is not scored."""
    needs: tuple[str, ...] = ()
    """Metrics that have to be computed before it."""
    attempts: int = 1
    """Answers to each question that it needs at least."""
    runs_code: bool = False
    """Whether it runs what the model wrote."""
    tally: Callable[[Sequence[EvalRow]], Any] | None = None
    """Of a metric that is no mean over answers: a line of counts for each row, of whose sums `statistic` makes the
    value. A row's own score then only says how good it is by itself."""
    statistic: Callable[[Any], Any] | None = None
    signature: Callable[[], str] | None = None
    """How the value was computed, in the words of the library that defines it."""
    fits_all: Callable[[Sequence[Prompt]], bool] | None = None
    """Whether the metric means something for prompts taken together."""

    @property
    def named(self) -> str:
        """Its name as `--metrics` takes it, with the unit that tables show it in."""
        unit = {"share": " (%)", "points": " (points)", "ratio": ""}[self.unit]
        return f"{self.name}{unit}"


def sql_execution(prompt: Prompt, completion: str, reference: str) -> float:
    """1 where the answer, run on SQLite, gives the rows that the reference gives.

    Execution accuracy (Spider, arXiv 1809.08887); rows are compared as a bag, in order where the reference
    has ORDER BY, columns in their order. An answer in a Markdown code fence counts as the code in it.
    """
    return float(_sql_result(prompt, completion, reference).match)


def ex_bag(prompt: Prompt, completion: str, reference: str) -> float:
    """1 where the answer gives the rows of the reference with the columns in some order.

    Execution accuracy as Spider's test suites compute it (arXiv 2010.02840): rows as a bag, in order where the
    reference has ORDER BY, column order free.
    """
    return float(_sql_result(prompt, completion, reference).match_any_columns)


def ex_set(prompt: Prompt, completion: str, reference: str) -> float:
    """1 where the same rows occur in answer and reference, however often and in whatever order.

    Execution accuracy as BIRD computes it (arXiv 2305.03111): repetitions and ORDER BY do not count, column
    order does.
    """
    return float(_sql_result(prompt, completion, reference).match_as_sets)


def sql_executes(prompt: Prompt, completion: str, reference: str) -> float:
    """1 where the answer is one query that runs to its end on the question's database, whatever it finds.

    Reading only, within a deadline and caps on rows and sizes (the valid share of arXiv 2305.03111).
    """
    return float(_sql_result(prompt, completion, reference).executed)


def sql_exact_match(prompt: Prompt, completion: str, reference: str) -> float:
    """1 where answer and reference are the same query after normalising both.

    Case of names, needless aliases and qualifiers, and the order of conditions do not count; values, DISTINCT and
    the order of columns do (after the exact match of Spider, arXiv 1809.08887, which leaves values out). Parsed
    by sqlglot; 0 for what it cannot parse.
    """
    try:
        return float(canonical(code_of(completion)) == canonical(code_of(reference)))
    except ValueError:
        return exact_match(prompt, code_of(completion), code_of(reference))


def sql_vacuous(prompt: Prompt, completion: str, reference: str) -> float:
    """1 where the answer counts as right although the reference finds no rows on any database that was tried.

    Such a match says little; the share should be near 0 (see arXiv 2010.02840 on false positives).
    """
    result = _sql_result(prompt, completion, reference)
    return float(result.match and result.vacuous)


def exact_match(prompt: Prompt, completion: str, reference: str) -> float:
    """1 where answer and reference are equal after runs of white space became one space; case counts."""
    return float(completion.split() == reference.split())


def rouge1(prompt: Prompt, completion: str, reference: str) -> float:
    """F1 of shared words, stemmed (ROUGE-1, Lin 2004, as of rouge-score)."""
    return _rouge("rouge1", completion, reference)


def rouge2(prompt: Prompt, completion: str, reference: str) -> float:
    """F1 of shared word pairs, stemmed (ROUGE-2, Lin 2004, as of rouge-score)."""
    return _rouge("rouge2", completion, reference)


def rougeL(prompt: Prompt, completion: str, reference: str) -> float:
    """F1 of the longest common word sequence, stemmed (ROUGE-L, Lin 2004, as of rouge-score)."""
    return _rouge("rougeL", completion, reference)


def rougeLsum(prompt: Prompt, completion: str, reference: str) -> float:
    """ROUGE-L by lines: the union of longest common sequences, stemmed (Lin 2004, as of rouge-score)."""
    return _rouge("rougeLsum", completion, reference)


TASK_METRICS: dict[str, tuple[str, ...]] = {
    "chat": (
        "turn_coherence",
        "repeats_answer",
        "role_leak",
        "response_diversity",
        "vocabulary_use",
        "bigram_diversity",
    ),
    "code": ("code_exact_match", "syntax_validity", "pattern_consistency"),
    "instruct": ("adherence", "all_constraints", "constraints", "completed", "length_match", "repetition"),
    "domain": ("vocabulary_use", "bigram_diversity", "bits_per_byte"),
}
"""What a task's answers are looked at for besides being right, after the metrics that say that."""


METHOD_METRICS: dict[str, tuple[str, ...]] = {
    "seq2seq": ("repetition",),
    **dict.fromkeys(("dpo", "kto", "orpo", "cpo", "simpo"), ("length_match", "repetition")),
}
"""The same by method: decoders of encoder-decoder models are prone to loops, preferences to growing lengths."""


def default_metrics(
    prompts: Sequence[Prompt],
    has_text: bool,
    task: str = "custom",
    method: str = "sft",
    judged: Sequence[str] = (),
    run_code: bool = False,
) -> list[str]:
    """The metrics that fit the data, the primary one first, then what task and method add.

    A metric fits where it means something for at least half of the prompts, one that is added where it does
    for any. `judged` are those that fit answers which were judged; they come first. With `run_code` rows that have
    tests are measured by these.
    """
    if judged:
        return [*judged, *default_metrics(prompts, has_text, task, method, run_code=run_code)]
    if run_code and prompts and _fits_most("pass_at_1", prompts):
        return ["pass_at_1", *default_metrics(prompts, has_text, task, method)]
    if not prompts:
        return ["perplexity", "token_accuracy", "bits_per_byte"] if has_text else []
    further = dict.fromkeys((*TASK_METRICS.get(task, ()), *METHOD_METRICS.get(method, ())))
    added = [name for name in further if any(METRICS[name].fits(p) for p in prompts)]
    if _fits_most("sql_execution", prompts):
        executed = ["sql_execution", "ex_bag", "ex_set", "sql_vacuous"]
        return [*executed, "exact_match", "token_accuracy", "perplexity", *added]
    if are_labels(prompts):
        labels = ["label_accuracy", "balanced_accuracy", "macro_f1", "mcc", "token_accuracy", "perplexity"]
        return [*labels, *added]
    chat = [
        "rougeL",
        "exact_match",
        "rouge1",
        "rouge2",
        "rougeLsum",
        "token_accuracy",
        "perplexity",
    ]
    return [*(name for name in chat if _fits_most(name, prompts)), *added]


def known_metrics(names: Sequence[str]) -> list[str]:
    """The names, once each and in their order. Raises RecipeError for one that is not in `METRICS`."""
    for name in names:
        if name not in METRICS:
            raise RecipeError(f"There is no metric '{name}'.", fix=nearest(name, METRICS))
    return list(dict.fromkeys(names))


def check_runnable(names: Sequence[str], *, run_code: bool, attempts: int) -> None:
    """Raises RecipeError for metrics that run a model's code where that is off, or that need more attempts."""
    for metric in (METRICS[name] for name in known_metrics(names)):
        if metric.runs_code and not run_code:
            raise RecipeError(
                f"The metric '{metric.name}' runs the code that the model writes, which is off.",
                fix="Read docs/running-code.md, then add --run-code (evaluation.run_code: true).",
            )
        if metric.attempts > attempts:
            raise RecipeError(
                f"The metric '{metric.name}' needs at least {metric.attempts} answers to each question.",
                found=f"evaluation.attempts: {attempts}",
                fix=f"Set --attempts {2 * metric.attempts}, or use pass_at_1.",
            )


def primary_metric(names: Sequence[str]) -> str | None:
    """The metric on which the verdict rests: the first that scores whole answers, or else the first."""
    return next((name for name in names if METRICS[name].kind != "likelihood"), names[0] if names else None)


def format_metrics_output(metrics: Mapping[str, Any]) -> str:
    """Metrics as lines `name: value` for people, numbers that are not whole with four decimals."""
    return "\n".join(
        f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}"
        for name, value in metrics.items()
    )


def _fits_most(name: str, prompts: Sequence[Prompt]) -> bool:
    return 2 * sum(METRICS[name].fits(prompt) for prompt in prompts) >= len(prompts)


def _always(prompt: Prompt) -> bool:
    return True


def _has_reference(prompt: Prompt) -> bool:
    return bool(prompt.reference)


def _has_schema(prompt: Prompt) -> bool:
    return bool(prompt.checks.get("schema")) and bool(prompt.reference)


def are_labels(prompts: Sequence[Prompt]) -> bool:
    """Whether the references are few labels that occur often."""
    return classification.are_labels([p.reference for p in prompts if p.reference])


def _is_latin(prompt: Prompt) -> bool:
    """rouge-score knows the letters a to z and digits only; in other scripts every score would be 0."""
    letters = [c for c in prompt.reference if c.isalnum()]
    return 2 * sum(c.isascii() for c in letters) >= len(letters) > 0


def _sql_result(prompt: Prompt, completion: str, reference: str) -> SQLResult:
    schema, setup = prompt.checks["schema"], prompt.checks.get("setup") or ""
    return execution_match(str(schema), str(setup), code_of(completion), code_of(reference))


def _sql_flags(prompt: Prompt, completion: str, reference: str) -> tuple[str, ...]:
    result = _sql_result(prompt, completion, reference)
    flags = ("vacuous",) if result.vacuous and result.match else ()
    return flags if result.executed else (*flags, f"sql: {result.error}")


def _rouge(name: str, completion: str, reference: str) -> float:
    return float(_rouge_scorer(name).score(reference, completion)[name].fmeasure)


@lru_cache
def _rouge_scorer(name: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([name], use_stemmer=True)


def _answer(
    name: str,
    label: str,
    score: Score,
    unit: Unit,
    *,
    fits: Callable[[Prompt], bool] = _always,
    flags: Callable[[Prompt, str, str], tuple[str, ...]] | None = None,
    higher_is_better: bool = True,
    runs_code: bool = False,
) -> Metric:
    about = _about(score)
    return Metric(
        name, label, score, higher_is_better, unit, about, fits, "answer", flags, runs_code=runs_code
    )


def _of_labels(
    name: str,
    label: str,
    *,
    among: Callable[[Sequence[EvalRow]], Sequence[float | None]] = classification.is_right,
    kind: Literal["answer", "labels"] = "answer",
    unit: Unit = "share",
    higher_is_better: bool = True,
    tally: Callable[[Sequence[EvalRow]], Any] | None = None,
    statistic: Callable[[Any], Any] | None = None,
) -> Metric:
    return Metric(
        name,
        label,
        None,
        higher_is_better,
        unit,
        _about(statistic or among),
        classification.is_label,
        kind,
        among=among,
        tally=tally,
        statistic=statistic,
        fits_all=are_labels,
    )


def _pass_at(k: int) -> Metric:
    return Metric(
        f"pass_at_{k}",
        f"pass@{k}",
        None,
        True,
        "share",
        f"The chance that at least one of {k} answers to a question passes its tests, by the unbiased estimator "
        "1 - C(n - c, k) / C(n, k) from n attempts of which c pass (HumanEval, arXiv 2107.03374). Needs "
        f"`evaluation.attempts` of at least {k}, better twice as many, and `evaluation.run_code`.",
        code.has_tests,
        "answer",
        among=code.pass_at(k),
        needs=("pass_at_1",),
        attempts=k,
        runs_code=True,
    )


def _about(function: Callable[..., Any]) -> str:
    return inspect.cleandoc(function.__doc__ or "").replace("\n\n", " ").replace("\n", " ")


LABEL_STATISTICS: tuple[tuple[str, str, Unit, Callable[[Any], Any]], ...] = (
    ("balanced_accuracy", "balanced accuracy", "points", classification.balanced_accuracy),
    ("macro_f1", "macro F1", "points", classification.macro_f1),
    ("mcc", "Matthews correlation", "ratio", classification.mcc),
)

CORPUS: tuple[tuple[str, str, int | None, str, Callable[[Any], Any], Callable[[Prompt], bool]], ...] = (
    ("bleu", "BLEU", 4, "Up to four words. ", corpus.bleu, _is_latin),
    ("bleu1", "BLEU-1", 1, "Single words. ", corpus.bleu, _is_latin),
    ("bleu2", "BLEU-2", 2, "Words and word pairs. ", corpus.bleu, _is_latin),
    ("chrf", "chrF", None, "", corpus.chrf, _has_reference),
)
CONSTRAINTS: tuple[tuple[Score, str, Unit], ...] = (
    (instructions.constraints, "constraints kept", "points"),
    (instructions.constraints_loose, "constraints kept, loosely", "points"),
    (instructions.all_constraints, "all constraints kept", "share"),
    (instructions.all_constraints_loose, "all constraints kept, loosely", "share"),
)
AMONG: tuple[tuple[Callable[[Sequence[EvalRow]], Sequence[float | None]], str, Unit, bool], ...] = (
    (conversation.ead, "different words, length-corrected", "points", True),
    (conversation.distinct_1, "different words of 100", "points", True),
    (conversation.distinct_2, "different word pairs of 100", "points", True),
    (conversation.distinct_3, "different word triples of 100", "points", True),
    (conversation.self_bleu, "self-BLEU", "points", False),
    (conversation.self_repetition, "phrases of other answers", "share", False),
    (conversation.turn_coherence, "turn coherence", "points", True),
)
FLOW: tuple[tuple[Score, str, Callable[[Prompt], bool], bool], ...] = (
    (conversation.refers_back, "refers back", conversation.has_earlier_turns, True),
    (conversation.asks_back, "asks back as the reference does", _has_reference, True),
    (conversation.role_leak, "speaks for others", _always, False),
    (conversation.script_switch, "script switched", _has_reference, False),
    (conversation.repeats_answer, "repeats the answer before", conversation.has_earlier_turns, False),
)
RATES = (
    (completion.completed, "completed"),
    (completion.answered, "answered"),
    (completion.ended, "ended by itself"),
    (completion.uncut, "not cut off"),
    (completion.not_refused, "not refused"),
)

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "mean_reward",
            "mean reward",
            None,
            True,
            "ratio",
            "What the rewards of a run's method are worth for an answer, added up by their weights.",
            lambda prompt: True,
            "answer",
        ),
        _answer(
            "sql_execution",
            "SQL execution accuracy",
            sql_execution,
            "share",
            fits=_has_schema,
            flags=_sql_flags,
        ),
        _answer("ex_bag", "execution, columns in any order", ex_bag, "share", fits=_has_schema),
        _answer("ex_set", "execution, rows as sets", ex_set, "share", fits=_has_schema),
        _answer("sql_executes", "SQL executes", sql_executes, "share", fits=_has_schema),
        _answer("sql_exact_match", "same query", sql_exact_match, "share", fits=_has_schema),
        _answer(
            "sql_vacuous",
            "vacuous matches",
            sql_vacuous,
            "share",
            fits=_has_schema,
            higher_is_better=False,
        ),
        _answer("exact_match", "exact match", exact_match, "share", fits=_has_reference),
        _answer("rougeL", "ROUGE-L", rougeL, "points", fits=_is_latin),
        _answer("rouge1", "ROUGE-1", rouge1, "points", fits=_is_latin),
        _answer("rouge2", "ROUGE-2", rouge2, "points", fits=_is_latin),
        _answer("rougeLsum", "ROUGE-Lsum", rougeLsum, "points", fits=_is_latin),
        *(
            Metric(
                name,
                label,
                corpus.sentence_score(order),
                True,
                "points",
                said + _about(statistic),
                fits,
                "answer",
                tally=corpus.tally(order),
                statistic=statistic,
                signature=corpus.signature(order),
            )
            for name, label, order, said, statistic, fits in CORPUS
        ),
        _answer("sentence_bleu", "sentence BLEU", corpus.sentence_bleu, "points", fits=_is_latin),
        _answer("sentence_chrf", "sentence chrF", corpus.sentence_chrf, "points", fits=_has_reference),
        _answer("token_f1", "token F1", texts.token_f1, "points", fits=_has_reference),
        _answer("syntax_validity", "valid syntax", tasks.syntax_validity, "share", fits=tasks.is_code),
        _answer("code_exact_match", "same program", code.code_exact_match, "share", fits=tasks.is_code),
        _answer(
            "pass_at_1",
            "pass@1",
            code.pass_at_1,
            "share",
            fits=code.has_tests,
            flags=code.flags,
            runs_code=True,
        ),
        _pass_at(5),
        _pass_at(10),
        _answer(
            "pattern_consistency",
            "pattern consistency",
            tasks.pattern_consistency,
            "points",
            fits=tasks.has_patterns,
        ),
        _answer("adherence", "demands met", tasks.adherence, "points", fits=tasks.is_demanding),
        *(
            _answer(score.__name__, label, score, unit, fits=instructions.is_constrained)
            for score, label, unit in CONSTRAINTS
        ),
        *(
            Metric(rate.__name__, label, None, True, "share", _about(rate), _always, "answer", among=rate)
            for rate, label in RATES
        ),
        _answer("length_match", "length match", tasks.length_match, "points", fits=_has_reference),
        _answer("repetition", "repetition", tasks.repetition, "points", higher_is_better=False),
        _answer("vocabulary_use", "vocabulary use", tasks.vocabulary_use, "points"),
        _answer("bigram_diversity", "bigram diversity", tasks.bigram_diversity, "points"),
        Metric(
            "response_diversity",
            "different answers",
            None,
            True,
            "points",
            _about(tasks.response_diversity),
            _always,
            "answer",
            among=lambda rows: tasks.response_diversity([row.output or "" for row in rows]),
        ),
        _answer(
            "repeated_lines",
            "repeated lines",
            conversation.repeated_lines,
            "points",
            higher_is_better=False,
        ),
        *(
            Metric(
                function.__name__,
                label,
                None,
                higher,
                unit,
                _about(function),
                _always,
                "answer",
                among=function,
            )
            for function, label, unit, higher in AMONG
        ),
        *(
            _answer(score.__name__, label, score, "share", fits=fits, higher_is_better=higher)
            for score, label, fits, higher in FLOW
        ),
        _of_labels("label_accuracy", "label accuracy"),
        *(
            _of_labels(name, label, unit=unit, tally=classification.tally, statistic=statistic)
            for name, label, unit, statistic in LABEL_STATISTICS
        ),
        _of_labels("label_ranking", "likeliest label is right", among=classification.ranked, kind="labels"),
        _of_labels(
            "brier",
            "Brier score",
            among=classification.brier,
            kind="labels",
            unit="ratio",
            higher_is_better=False,
        ),
        _of_labels(
            "calibration_error",
            "calibration error",
            among=classification.brier,
            kind="labels",
            unit="points",
            higher_is_better=False,
            tally=classification.calibration_tally,
            statistic=classification.calibration_error,
        ),
        Metric(
            "preference_accuracy",
            "preference accuracy",
            None,
            True,
            "share",
            "Share of pairs of which the model finds the better answer likelier per token (mean log-likelihood of the "
            "answer's tokens given the prompt; a tie counts half). The ranking accuracy of arXiv 2405.19534, by "
            "length as in SimPO's reward (2405.14734, equation 4): by sums, the shorter answer would win for being "
            "shorter. No reference model is asked, so base and tuned model are measured alike.",
            _always,
            "preference",
        ),
        Metric(
            "rating_ranking",
            "rating ranking",
            None,
            True,
            "share",
            "Share of good answers that the model finds likelier per token than the bad answer that each is put "
            "beside, to another question mostly; each answer is used once. It estimates the area under the ROC curve "
            "(Mann and Whitney 1947). Questions differ in how hard their answers are to foresee, so read the "
            "difference between two models rather than the number.",
            _always,
            "preference",
        ),
        Metric(
            "ranking_accuracy",
            "ranking accuracy",
            None,
            True,
            "share",
            "Share of pairs of which a reward model gives the better answer the higher score; a tie counts half. "
            "(arXiv 2009.01325, 2403.13787.)",
            _always,
            "reward",
        ),
        Metric(
            "ranking_log_loss",
            "ranking log loss",
            None,
            False,
            "ratio",
            "-log of the probability that a reward model gives the true order of a pair, sigmoid(score of the better "
            "answer - score of the worse one) (Bradley and Terry 1952), mean over pairs, in nats; lower is better. "
            "0.69 is a coin's; above it the model is surer than it is right.",
            _always,
            "reward",
        ),
        Metric(
            "token_accuracy",
            "token accuracy",
            None,
            True,
            "share",
            "Share of reference tokens that the model, given all tokens before, finds most likely "
            "(over all labelled tokens, so that long answers weigh more).",
            _always,
            "likelihood",
        ),
        Metric(
            "perplexity",
            "perplexity",
            None,
            False,
            "ratio",
            "exp(sum of negative log-likelihoods / number of tokens) of the reference tokens, over all "
            "labelled tokens (Jelinek et al. 1977); lower is better. A text longer than the model's context is read in "
            "windows that overlap by half, each token counted once.",
            _always,
            "likelihood",
        ),
        Metric(
            "bits_per_byte",
            "bits per byte",
            None,
            False,
            "ratio",
            "Sum of negative log-likelihoods of the reference tokens / (ln 2 x UTF-8 bytes of their text), over all "
            "of them (bits_per_byte of lm-evaluation-harness; arXiv 2101.00027, section 3.1); lower is better. Unlike "
            "perplexity it can be compared between models with tokenizers of their own. Long texts are read in "
            "windows as for perplexity; what a model could not read whole is not scored. A text's very first token, "
            "where none stands before it, has no likelihood and adds its bytes only.",
            _always,
            "likelihood",
        ),
    )
}
