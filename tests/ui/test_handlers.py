"""Seed 000's handlers: its arguments, its results, its errors, on the tiny model."""

from __future__ import annotations

import inspect

import pytest

pytest.importorskip("gradio")

from tunesmith import api, catalog
from tunesmith.compose import Recipe
from tunesmith.errors import RecipeError
from tunesmith.ui import handlers

SEED_ARGUMENTS = (
    "model_name", "dataset_file", "dataset_hub", "method", "tokenization", "collation", "lora_r", "lora_alpha",
    "lora_dropout", "reward_model_name", "num_train_epochs", "per_device_train_batch_size",
    "gradient_accumulation_steps", "training_kwargs",
)  # fmt: skip
"""As `app.py` of the seed has them, in its order."""


@pytest.fixture
def recipes(monkeypatch) -> list[Recipe]:
    """Recipes that would be trained."""
    caught: list[Recipe] = []

    def train(recipe):
        caught.append(recipe)
        raise RecipeError("caught")

    monkeypatch.setattr(api, "train", train)
    return caught


def test_the_arguments_are_the_seed_s():
    assert tuple(inspect.signature(handlers.handle_fine_tune).parameters) == SEED_ARGUMENTS
    assert tuple(inspect.signature(handlers.handle_submit).parameters) == ("model_name",)
    assert tuple(inspect.signature(handlers.handle_evaluate).parameters) == ("model_name", "metric")


def test_submit_gives_the_architecture_or_the_error(tiny_model_folder):
    summary, error = handlers.handle_submit(str(tiny_model_folder))
    assert summary.startswith("LlamaForCausalLM: ")
    assert "(q_proj): Linear" in summary
    assert error == ""
    summary, error = handlers.handle_submit("./nowhere")
    assert summary == ""
    assert "nowhere" in error
    assert handlers.handle_submit("  ")[0] == ""


def test_every_argument_reaches_the_recipe(recipes, question_file):
    handlers.handle_fine_tune(
        "tiny", question_file, "example:chat", "PPO", "default", "packed", 4.0, 16.0, 0.2, "my-reward", 2.0, 3.0, 5.0,
        learning_rate=1e-3, output_dir="out", max_length=99, epsilon=None,
    )  # fmt: skip
    # `epsilon` is GRPO's, so that the recipe is refused by name
    assert recipes == []
    handlers.handle_fine_tune(
        "tiny", question_file, "example:chat", "PPO", "default", "default", 4.0, 16.0, 0.2, "my-reward", 2.0, 3.0, 5.0,
        learning_rate=1e-3, output_dir="out", max_length=99,
    )  # fmt: skip
    [recipe] = recipes
    assert recipe.model.base == "tiny"
    assert recipe.data.dataset == str(question_file)  # the file goes before what is selected
    assert recipe.data.max_length == 99
    assert (recipe.method.kind, [r.model for r in recipe.method.rewards]) == ("ppo", ["my-reward"])
    assert recipe.adapter.model_dump(include={"kind", "rank", "alpha", "dropout"}) == {
        "kind": "lora", "rank": 4, "alpha": 16, "dropout": 0.2,
    }  # fmt: skip
    assert recipe.training.num_epochs == 2
    assert recipe.training.per_device_train_batch_size == 3
    assert recipe.training.gradient_accumulation_steps == 5
    assert recipe.training.learning_rate == 1e-3
    assert recipe.output_dir == "out"


@pytest.mark.parametrize("method", catalog.get_available_options("fine_tuning_methods"))
def test_every_method_of_the_catalogue_is_taken(recipes, method):
    handlers.handle_fine_tune("tiny", None, "example:chat", method)
    assert recipes[0].method.kind == method
    assert recipes[0].adapter.kind == "full"  # LoRA only where lora_r says so


@pytest.mark.parametrize("name", catalog.get_available_options("tokenization_strategies"))
def test_tokenization_of_the_catalogue(recipes, name):
    lengths = {"max_input_length": 40, "max_output_length": 20} if name == "custom" else {}
    handlers.handle_fine_tune("tiny", None, "example:chat", "SFT", name, **lengths)
    expected = catalog.strategy("tokenization", name, **lengths)
    found = recipes[0].model_dump()
    for section, settings in expected.items():
        assert {key: found[section][key] for key in settings} == settings


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, handlers.NO_DATA),
        ({"dataset_hub": "None"}, handlers.NO_DATA),
        ({"dataset_hub": "example:chat", "method": "SFTT"}, "Did you mean 'sft'?"),
        ({"dataset_hub": "example:chat", "tokenization": "fancy"}, "no tokenization strategy 'fancy'"),
        ({"dataset_hub": "example:chat", "collation": "fancy"}, "no collation strategy 'fancy'"),
        (
            {"dataset_hub": "example:chat", "method": "DPO", "tokenization": "seq2seq"},
            "is for the method seq2seq",
        ),
        ({"dataset_hub": "example:chat", "lora_alpha": 8}, "no effect without lora_r"),
        ({"dataset_hub": "example:chat", "reward_model_name": "x"}, "no effect with the method 'sft'"),
        ({"dataset_hub": "example:chat", "learnin_rate": 1}, "Did you mean 'learning_rate'?"),
        ({"dataset_hub": "example:chat", "num_train_epochs": -1}, "greater than 0"),
    ],
)
def test_what_cannot_be_done_comes_back_as_the_error(arguments, said):
    text, error = handlers.handle_fine_tune("tiny", **arguments)
    assert text == ""
    assert said in error


def test_tuning_gives_the_model_and_its_scores_and_evaluating_measures_the_tuned_one(
    tiny_model_folder, question_file, tmp_path
):
    text, metrics = handlers.handle_fine_tune(
        str(tiny_model_folder), str(question_file), None, "SFT", lora_r=2, num_train_epochs=1,
        per_device_train_batch_size=8, max_steps=2, output_dir=str(tmp_path), name="seed", held_out=0.2,
        max_length=256, max_new_tokens=4, metrics=["exact_match"], engine_check=0,
    )  # fmt: skip
    assert text.startswith("LlamaForCausalLM: "), metrics
    assert "exact_match base: 0.0000" in metrics
    assert "exact_match tuned: " in metrics
    assert "verdict: " in metrics
    run = tmp_path / "seed"
    assert f"run: {run}" in metrics
    found = handlers.handle_evaluate(str(run), "Exact_Match")
    assert found.startswith("exact_match: 0.0000\nlow: ")
    assert "evaluation" in [p.name for p in run.iterdir()]
    assert "Did you mean 'rougeL'?" in handlers.handle_evaluate(str(run), "rougeK")
    assert "There is no" in handlers.handle_evaluate(str(tmp_path / "none"), "exact_match")
