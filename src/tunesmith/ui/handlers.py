"""The three handlers of seed 000's page, with its arguments and results, over `api` and the catalogue.

    handle_submit      a model's name -> its architecture, or what is wrong with the name
    handle_fine_tune   model, data and method -> the tuned model, and how it compares with its base
    handle_evaluate    a run and a metric -> the scores

Names of data sets, methods, metrics, tokenization and collation come from the catalogue (`docs/catalog.md`). The
pages queue runs as processes of their own instead of calling `handle_fine_tune`, which returns when all is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

from tunesmith import catalog
from tunesmith.cli import FLAGS
from tunesmith.compose import OTHER_NAMES, Layer, compose, nested, overlaid
from tunesmith.errors import RecipeError, TunesmithError, nearest
from tunesmith.recipe import Training, fields

NO_DATA = "Please upload a dataset or select one from the Hub."
LENGTHS = ("max_input_length", "max_output_length")
"""Arguments of the tokenization `custom`."""
REWARDED = ("grpo", "rloo", "ppo")
"""Methods that learn from rewards, and so can use a reward model."""


def handle_submit(model_name: str) -> tuple[str, str]:
    """A model's architecture as text, and no error; or no text, and the error with its remedy."""
    from tunesmith.architecture import get_model_summary

    if not (model_name or "").strip():
        return "", "No model is named.\n  do:    Give a folder, a run, a Hub id, or `tiny`."
    return get_model_summary(model_name.strip())


def handle_fine_tune(
    model_name: str,
    dataset_file: Any = None,
    dataset_hub: str | None = None,
    method: str = "SFT",
    tokenization: str = "default",
    collation: str = "default",
    lora_r: float | None = None,
    lora_alpha: float | None = None,
    lora_dropout: float | None = None,
    reward_model_name: str | None = None,
    num_train_epochs: float | None = None,
    per_device_train_batch_size: float | None = None,
    gradient_accumulation_steps: float | None = None,
    **training_kwargs: Any,
) -> tuple[str, str]:
    """Tune a model; gives the tuned model as text, and its scores beside the base's, one line each.

    An uploaded file goes before a data set of the Hub or the catalogue. LoRA is used where `lora_r` is above 0.
    `training_kwargs` are further fields of the recipe by name (`learning_rate=1e-3`), with the names that they have
    elsewhere understood. What cannot be done comes back as an empty text and the error, as everywhere on the page.
    """
    from tunesmith import api

    given = {
        "num_epochs": num_train_epochs,
        "per_device_train_batch_size": per_device_train_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
    }
    try:
        layer = overlaid(
            {"model": {"base": model_name}, "data": {"dataset": _dataset(dataset_file, dataset_hub)}},
            _method(method, tokenization, collation, training_kwargs),
            _adapter(lora_r, lora_alpha, lora_dropout),
            {"training": {name: _whole(value) for name, value in given.items() if value is not None}},
            *(_setting(name, value) for name, value in training_kwargs.items() if name not in LENGTHS),
        )
        layer = overlaid(layer, _rewarded(layer, reward_model_name))
        result = api.train(compose(layer).recipe)
    except TunesmithError as error:
        return "", "\n".join(error.lines())
    assert result.run is not None
    summary, _ = handle_submit(str(result.run))
    return summary, _scores(result.as_dict())


def handle_evaluate(model_name: str, metric: str) -> str:
    """A run's model measured by one metric on what the run held out, as text; or what is wrong."""
    from tunesmith import api
    from tunesmith.evaluation.metrics import format_metrics_output

    try:
        result = api.evaluate(model_name, metrics=[_metric(metric)])
    except TunesmithError as error:
        return "\n".join(error.lines())
    found = result.scores.get(_metric(metric))
    if found is None or found["value"] is None:
        return f"{metric} does not fit what {model_name} held out: no answer could be scored."
    return format_metrics_output(
        {_metric(metric): found["value"], **{n: found[n] for n in ("low", "high", "n")}}
    )


def _dataset(file: Any, hub: str | None) -> str:
    """The data set: an uploaded file, as a path or as Gradio hands it over, else what was selected."""
    if file:
        return str(file if isinstance(file, str | PathLike) else file.name)
    if hub and hub != "None":
        return hub
    raise RecipeError(NO_DATA)


def _method(method: str, tokenization: str, collation: str, given: Mapping[str, Any]) -> Layer:
    """Method, tokenization and collation by the names of the catalogue. Raises RecipeError where two contradict."""
    known = catalog.get_available_options("fine_tuning_methods")
    kind = str(method).lower()
    if kind not in known:
        raise RecipeError(f"There is no method '{method}'.", fix=nearest(kind, known))
    lengths = {name: int(given[name]) for name in LENGTHS if given.get(name) is not None}
    layers = [
        catalog.strategy("tokenization", tokenization, **lengths),
        catalog.strategy("collation", collation),
    ]
    kinds = {layer["method"]["kind"] for layer in layers if "kind" in layer.get("method", {})}
    if kinds and kind not in ("sft", *kinds):
        raise RecipeError(
            f"The tokenization '{tokenization}' with the collation '{collation}' is for the method "
            f"{' and '.join(sorted(kinds))}.",
            found=f"method '{kind}'",
            fix="Choose `default` for both.",
        )
    return overlaid({"method": {"kind": kind}}, *layers)


def _adapter(rank: float | None, alpha: float | None, dropout: float | None) -> Layer:
    if not rank:
        lost = [name for name, value in (("lora_alpha", alpha), ("lora_dropout", dropout)) if value]
        if lost:
            raise RecipeError(
                f"{' and '.join(lost)} have no effect without lora_r.", fix="Give lora_r, such as 8."
            )
        return {}
    section: Layer = {"kind": "lora", "rank": _whole(rank)}
    if alpha is not None:
        section["alpha"] = _whole(alpha)
    if dropout is not None:
        section["dropout"] = dropout
    return {"adapter": section}


def _rewarded(layer: Layer, reward_model: str | None) -> Layer:
    if not reward_model:
        return {}
    kind = layer["method"]["kind"]
    if kind not in REWARDED:
        raise RecipeError(
            f"A reward model has no effect with the method '{kind}'.",
            fix=f"Leave it out, or use {', '.join(REWARDED)}.",
        )
    return {"method": {"rewards": [{"kind": "model", "model": reward_model}]}}


def _setting(name: str, value: Any) -> Layer:
    """A further field of the recipe by its own name, the name it has elsewhere, or its path."""
    if "." in name:
        return nested(name, value)
    own = OTHER_NAMES.get(name, name)
    option = FLAGS.get("--" + own.replace("_", "-"))
    if option:
        return nested(option, value)
    places = [fact.path for fact in fields() if fact.path.rpartition(".")[2] == own]
    if own in Training.model_fields or not places:
        return {"training": {own: value}}  # of an unknown one the recipe says what was probably meant
    if len(set(places)) > 1:
        raise RecipeError(
            f"'{name}' is a field of several sections.", fix=f"Give one of {', '.join(sorted(set(places)))}."
        )
    return nested(places[0], value)


def _metric(name: str) -> str:
    """A metric's name as the catalogue has it, whatever the case. Unknown ones stay, to be refused by name."""
    known = catalog.get_available_options("evaluation_metrics")
    return next((own for own in known if own.lower() == str(name).strip().lower()), str(name))


def _whole(value: float) -> float:
    """Numbers of a page come as floats; a whole one is meant."""
    return int(value) if float(value).is_integer() else value


def _scores(result: Mapping[str, Any]) -> str:
    from tunesmith.evaluation.metrics import format_metrics_output

    if not result["comparisons"]:
        return "Nothing was held out to measure on."
    lines = {}
    for compared in result["comparisons"]:
        lines[f"{compared['metric']} base"] = compared["base"]
        lines[f"{compared['metric']} tuned"] = compared["tuned"]
    return format_metrics_output({**lines, "verdict": result["verdict"], "run": result["run"]})
