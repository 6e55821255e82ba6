"""The questions that an artefact is proven with: held-out ones of the run behind it, or those that ship."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tunesmith import dataflow, evaluation, models
from tunesmith.errors import TunesmithError
from tunesmith.evaluation import compare as comparing
from tunesmith.evaluation import measuring
from tunesmith.evaluation.code import running_allowed
from tunesmith.evaluation.compare import Comparison
from tunesmith.evaluation.metrics import METRICS, primary_metric
from tunesmith.export import merge
from tunesmith.export.parity import NEW_TOKENS, Held, Question, text_of
from tunesmith.generation import Generated
from tunesmith.training.run import Run, Watch


def check_rows(rows: int) -> None:
    """Raises TunesmithError for a proof by no question."""
    if rows < 1:
        raise TunesmithError(
            "Nothing is proven without questions.", found=f"rows = {rows}", fix="Give 1 or more."
        )


def held_for(run: Run | None, model: Any, tokenizer: Any, rows: int, watch: Watch) -> Held:
    """Questions to prove an artefact with: held-out ones of the run behind it, or those that ship."""
    is_pair = bool(model.config.is_encoder_decoder)

    def shipped(why: str) -> Held:
        asked = merge.shipped_questions(tokenizer, model, is_pair=is_pair)
        return Held(asked, NEW_TOKENS, lambda numbers, own, others: (None, why))

    if run is None:
        return shipped("no run is behind this model, so there are no held-out rows")
    if models.is_reward(model):
        return shipped("a reward model answers nothing")
    try:
        _, questions = measuring.questions_for([run.path], None, None, None, watch, rows=rows)
    except TunesmithError as error:
        return shipped(f"the run's held-out rows cannot be asked: {error.problem}")
    recipe = questions.recipe
    found = evaluation.items(
        questions.examples,
        tokenizer,
        loss_on=recipe.method.loss_on,
        max_items=rows,
        max_length=recipe.data.max_length,
        kind="seq2seq" if is_pair else "causal",
    )
    usable = [item for item in found if item.prompt and not item.error]
    metric, unlike = _judging_metric(dataflow.metrics(recipe, usable), run_code=recipe.evaluation.run_code)
    if not usable:
        return shipped("the run held out no questions that are answered")

    def score(
        numbers: Sequence[int], own: Sequence[Generated], others: Sequence[Generated]
    ) -> tuple[Comparison | None, str | None]:
        if metric is None:
            return None, unlike
        settings = {"max_new_tokens": recipe.evaluation.max_new_tokens, "temperature": 0.0}
        with running_allowed(recipe.evaluation.run_code):
            one, other = (
                evaluation.rows_of(
                    [usable[n] for n in numbers], given, name=name, metrics=[metric], settings=settings
                )
                for name, given in (("base", own), ("tuned", others))
            )
        compared = comparing.compare(
            one,
            other,
            metrics=[metric],
            resamples=recipe.evaluation.resamples,
            confidence=recipe.evaluation.confidence,
            names=("the model", "the file"),
        )
        return compared[0], unlike

    asked = [
        Question(item.prompt_ids, text_of(item.prompt, tokenizer), item.prompt)
        for item in usable
        if item.prompt
    ]
    return Held(asked, recipe.evaluation.max_new_tokens, score)


def _judging_metric(names: Sequence[str], *, run_code: bool) -> tuple[str | None, str | None]:
    """By which of a run's metrics an artefact's answers are judged: the primary one, where single greedy answers can
    be; else another, or none, and why."""
    primary = primary_metric(names)
    if primary is None:
        return None, "the run has no metric"

    def obstacle(name: str) -> str | None:
        metric = METRICS[name]
        if metric.kind != "answer":
            return "it scores no answers"
        if metric.attempts > 1:
            return "it needs several answers to a question, and an artefact is asked once, greedily"
        if metric.score is None:
            return "it is a figure of all answers together"
        if metric.runs_code and not run_code:
            return "it runs the code that the model writes, which is off (evaluation.run_code)"
        return None

    why = obstacle(primary)
    found = next((n for n in (primary, *METRICS[primary].needs, *names) if obstacle(n) is None), None)
    if why is None:
        return primary, None
    if found is None:
        return None, f"the run's own metric, {METRICS[primary].label}, cannot judge it: {why}"
    return found, f"not judged by the run's own metric, {METRICS[primary].label}: {why}"
