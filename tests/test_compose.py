"""Layers: what wins, what survives, what is refused."""

from __future__ import annotations

import json

import pytest
import yaml

from tunesmith.compose import (
    TASKS,
    as_yaml,
    assignment,
    compose,
    preset_layer,
    preset_names,
    read_layer,
    validated,
)
from tunesmith.errors import RecipeError
from tunesmith.recipe import Recipe, fields

PRESETS = [name for name in preset_names() if name not in TASKS]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_composes_with_every_task_and_neither_wipes_the_other(task, preset):
    recipe = compose({"task": task}, preset=preset).recipe
    dump = recipe.model_dump()
    assert recipe.task == task
    assert recipe.preset == preset
    upper = preset_layer(preset)
    for section in ("training", "data"):
        expected = {**preset_layer(task).get(section, {}), **upper.get(section, {})}
        for field, value in expected.items():
            assert dump[section][field] == (float(value) if _number(value) else value)


def _number(value):
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, bool)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_an_adapter_takes_its_task_s_values_when_it_is_chosen(task, kind):
    expected = preset_layer(task)["adapter"]["lora"]
    adapter = compose({"task": task, "adapter": {"kind": kind}}).recipe.adapter.model_dump()
    assert {key: adapter[key] for key in expected} == expected
    assert compose({"task": task}).recipe.adapter.kind == "full"


def test_seed_values_of_tasks_and_presets():
    """The table of the seed document, spelled out: these numbers are promised to its users."""
    chat = compose({"task": "chat"}).recipe
    assert (chat.training.learning_rate, chat.training.warmup_steps, chat.data.max_length) == (
        2e-5,
        200,
        2048,
    )
    assert chat.training.scheduler == "cosine_with_restarts"
    code = compose({"task": "code"}).recipe.training
    assert (code.num_epochs, code.per_device_train_batch_size, code.gradient_accumulation_steps) == (5, 2, 4)
    assert code.gradient_checkpointing
    domain = compose({"task": "domain"}).recipe.training
    assert (domain.num_epochs, domain.weight_decay, domain.save_steps) == (10, 0.05, 2000)
    quick = compose(preset="quick_test").recipe.training
    assert (quick.max_steps, quick.eval_steps, quick.save_steps, quick.logging_steps) == (100, 20, 50, 5)
    low = compose({"task": "chat"}, preset="low_resource").recipe
    assert (low.training.gradient_accumulation_steps, low.data.max_length) == (8, 512)
    assert low.training.scheduler == "cosine_with_restarts"
    assert low.training.warmup_steps == 200
    high = compose(preset="high_quality").recipe.training
    assert (high.learning_rate, high.warmup_steps, high.save_total_limit) == (5e-6, 2000, 10)
    production = compose(preset="production").recipe.training
    assert (production.mixed_precision, production.logging_steps, production.save_total_limit) == (
        "bf16",
        20,
        5,
    )
    default = Recipe().training
    assert (default.learning_rate, default.num_epochs, default.warmup_steps, default.max_grad_norm) == (
        5e-5,
        3,
        100,
        1.0,
    )


PROMISED = {
    "default": {
        "learning_rate": 5e-5, "num_epochs": 3, "max_steps": None, "warmup_steps": 100, "weight_decay": 0.01,
        "max_grad_norm": 1.0, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 8,
        "gradient_accumulation_steps": 1, "max_length": 1024, "scheduler": "cosine", "eval_steps": 100,
        "save_steps": 500, "logging_steps": 10, "save_total_limit": 3, "load_best_model_at_end": True,
        "mixed_precision": "no", "gradient_checkpointing": False,
    },
    "quick_test": {
        "learning_rate": 5e-5, "num_epochs": 1, "max_steps": 100, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1, "eval_steps": 20, "save_steps": 50, "logging_steps": 5, "warmup_steps": 10,
    },
    "low_resource": {
        "learning_rate": 1e-5, "num_epochs": 5, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8,
        "gradient_checkpointing": True, "mixed_precision": "fp16", "eval_steps": 200, "save_steps": 500,
        "max_length": 512,
    },
    "high_quality": {
        "learning_rate": 5e-6, "num_epochs": 10, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
        "warmup_steps": 2000, "weight_decay": 0.1, "eval_steps": 100, "save_steps": 500, "save_total_limit": 10,
        "load_best_model_at_end": True,
    },
    "production": {
        "learning_rate": 2e-5, "num_epochs": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        "warmup_steps": 500, "eval_steps": 200, "save_steps": 1000, "logging_steps": 20, "mixed_precision": "bf16",
        "gradient_checkpointing": False, "save_total_limit": 5,
    },
    "chat": {
        "learning_rate": 2e-5, "warmup_steps": 200, "gradient_accumulation_steps": 2, "max_length": 2048,
        "scheduler": "cosine_with_restarts",
    },
    "code": {
        "learning_rate": 1e-5, "num_epochs": 5, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4,
        "warmup_steps": 500, "eval_steps": 200, "save_steps": 1000, "max_length": 2048,
        "gradient_checkpointing": True,
    },
    "instruct": {
        "learning_rate": 3e-5, "num_epochs": 2, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
        "eval_steps": 50, "save_steps": 200, "max_length": 1024,
    },
    "domain": {
        "learning_rate": 1e-5, "num_epochs": 10, "gradient_accumulation_steps": 2, "warmup_steps": 1000,
        "eval_steps": 500, "save_steps": 2000, "weight_decay": 0.05,
    },
    "custom": {"learning_rate": 2e-5, "gradient_accumulation_steps": 2},
}  # fmt: skip
"""Every value of seed 003's tasks and presets; of a task's, what it does not name is the default."""


@pytest.mark.parametrize("name", PROMISED)
def test_every_value_that_seed_003_gives_a_task_or_preset(name):
    if name == "default":
        recipe = Recipe()
    else:
        recipe = compose(
            {"task": name} if name in TASKS else {}, preset=None if name in TASKS else name
        ).recipe
    values = {**recipe.training.model_dump(), "max_length": recipe.data.max_length}
    expected = {**PROMISED["default"], **PROMISED[name]} if name in TASKS else PROMISED[name]
    assert {key: values[key] for key in expected} == expected


def test_the_custom_configuration_of_seed_003(tmp_path):
    """The fields of its `FineTuningConfig(...)` in a file for `--config`."""
    given = {
        "learning_rate": 1e-5, "num_epochs": 5, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        "warmup_steps": 500, "eval_steps": 100, "save_steps": 500,
    }  # fmt: skip
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"training": given, "data": {"max_length": 2048}}))
    recipe = compose({"task": "chat"}, file=path).recipe
    assert {key: getattr(recipe.training, key) for key in given} == given
    assert recipe.data.max_length == 2048


@pytest.mark.parametrize(
    ("argument", "path", "value"),
    [
        ("model_name", "model.base", "gpt2"),
        ("dataset_file", "data.dataset", "rows.csv"),
        ("dataset_hub", "data.dataset", "owner/set"),
        ("method", "method.kind", "seq2seq"),
        ("lora_r", "adapter.rank", 4),
        ("lora_alpha", "adapter.alpha", 8),
        ("lora_dropout", "adapter.dropout", 0.05),
        ("num_train_epochs", "training.num_epochs", 2),
        ("per_device_train_batch_size", "training.per_device_train_batch_size", 3),
        ("gradient_accumulation_steps", "training.gradient_accumulation_steps", 5),
    ],
)
def test_what_seed_000_s_handle_fine_tune_takes_is_in_the_recipe(argument, path, value):
    composition = (
        compose({"adapter": {"kind": "lora"}} | assignment(f"{path}={value}"))
        if "adapter" not in path
        else (compose({"adapter": {"kind": "lora", path.split(".")[1]: value}}))
    )
    found = composition.recipe.model_dump()
    for name in path.split("."):
        found = found[name]
    assert found == value


def test_later_layers_win(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("task: code\ntraining: {learning_rate: 3e-4, num_epochs: 7}\n")
    recipe = compose({"training": {"num_epochs": 9}}, file=file, preset="quick_test").recipe
    assert recipe.training.num_epochs == 9
    assert recipe.training.learning_rate == 3e-4
    assert recipe.training.max_steps == 100
    assert recipe.training.gradient_checkpointing


def test_a_bare_no_in_yaml_means_the_word(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("training: {mixed_precision: no}\n")
    assert compose(file=file, preset="production").recipe.training.mixed_precision == "no"


def test_a_file_may_be_json(tmp_path):
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps({"training": {"seed": 3}}))
    assert compose(file=file).recipe.training.seed == 3


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"training": {"learnin_rate": 1}}, "Did you mean 'learning_rate'"),
        ({"trainin": {}}, "Did you mean 'training'"),
        ({"adapter": {"rank": 4}}, "belongs to lora and qlora"),
        ({"adapter": {"kind": "freeze", "rank": 4}}, "no effect with adapter 'freeze'"),
        ({"adapter": {"kind": "lorra"}}, "Did you mean 'lora'"),
        ({"method": {"kind": "sfft"}}, "sft"),
        ({"training": {"num_epochs": -1}}, "found -1"),
        ({"task": "chatt"}, "Did you mean 'chat'"),
        ({"preset": "quick_tst"}, "Did you mean 'quick_test'"),
        ({"training": {"lr": 3}}, "Did you mean 'learning_rate'"),
        ({"training": {"warm": 3}}, "Did you mean 'warmup_steps'"),
        ({"training": {"batch_size": 3}}, "Did you mean 'per_device_train_batch_size'"),
        ({"learning_rate": 3}, "Did you mean 'training.learning_rate'"),
        ({"dataset": "x.csv"}, "Did you mean 'data.dataset'"),
        ({"lora": {"rank": 3}}, "Did you mean 'adapter.kind=lora'"),
        ({"adapter": "lora"}, "adapter is a section: --set adapter.kind=lora"),
        ({"training": None}, "training is a section.*found nothing"),
        ({"adapter": {"rank": 4}}, "add --lora"),
        ({"adapter": {"ratio": 0.5}}, "add --freeze-ratio"),
        ({"launch": {"kind": "slurm", "processes": 2}}, "with slurm write --set launch.processes_per_node=2"),
        ({"launch": {"kind": "slurm", "workers": 2}}, "leave it out, or add --set launch.kind=ray"),
        ({"training": {"num_epochs": "abc"}}, "num_epochs takes a number; found 'abc'"),
        ({"training": {"eval_steps": "abc"}}, "eval_steps takes a whole number or epoch; found 'abc'"),
        ({"training": {"optimizer": "adamw_torh"}}, "Did you mean 'adamw_torch'"),
        (
            {"data": {"mix": [{"dataset_name": "a"}]}},
            "data.mix.0.dataset_name is not a field. Did you mean 'dataset'",
        ),
        ({"data": {"mix": "a.json"}}, "data.mix takes a list of data sources"),
        ({"method": {"kind": ["dpo"]}}, r"There is no method '\['dpo'\]'"),
        ({"method": ["dpo"]}, "method is a section with fields of its own"),
        ({"preset": 5}, "There is no preset '5'"),
        ({"training": {"seed": 2**32}}, r"training.seed: a seed has to be below 2\*\*32"),
        ({"training": {"num_epochs": float("inf")}}, "training.num_epochs takes a number; found inf"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_nearest_name(flags, expected):
    with pytest.raises(RecipeError, match="(?s)" + expected):
        compose(flags)


def test_all_problems_are_told_at_once():
    with pytest.raises(RecipeError) as error:
        compose({"training": {"num_epochs": -1, "foo": 1}, "bar": 2})
    assert all(word in str(error.value) for word in ("num_epochs", "training.foo", "bar"))


def test_choosing_another_kind_leaves_out_lower_fields_and_says_so(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("adapter: {kind: lora, rank: 64}\n")
    composition = compose({"adapter": {"kind": "full"}}, file=file)
    assert composition.recipe.adapter.kind == "full"
    assert any("adapter.rank" in note for note in composition.notes)
    assert compose({"adapter": {"kind": "qlora"}}, file=file).recipe.adapter.rank == 64


def test_broken_yaml_names_line_and_column(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("training:\n  learning_rate: [1\n")
    with pytest.raises(RecipeError, match="line 3, column 1"):
        compose(file=file)


def test_a_value_that_fits_no_member_of_a_union_is_one_problem():
    with pytest.raises(RecipeError) as error:
        compose({"training": {"eval_steps": "often"}})
    assert str(error.value).count("eval_steps") == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "training:\n  seed: 1\n  num_epochs: 2\n  seed: 3\n",
            "line 4, column 3: 'seed' stands here again, after line 2",
        ),
        ('{"task": "chat",\n "task": "code"}', "line 2, column 2: 'task' stands here again"),
        ("", "is empty"),
        ("# nothing but this\n", "is empty"),
    ],
)
def test_doubled_keys_and_empty_files_are_errors(tmp_path, text, expected):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=expected):
        compose(file=file)


def test_the_saved_recipe_reads_back_equal(tmp_path):
    recipe = compose(
        {"task": "domain", "adapter": {"kind": "lora", "dora": True}}, preset="production"
    ).recipe
    file = tmp_path / "recipe.yaml"
    file.write_text(as_yaml(recipe))
    assert validated(read_layer(file)) == recipe
    assert yaml.safe_load(as_yaml(recipe))["adapter"]["kind"] == "lora"


def test_assignments():
    assert assignment("training.learning_rate=2e-5") == {"training": {"learning_rate": "2e-5"}}
    assert compose(assignment("training.learning_rate=2e-5")).recipe.training.learning_rate == 2e-5
    assert assignment("adapter.dora=true") == {"adapter": {"dora": True}}
    with pytest.raises(RecipeError, match="PATH=VALUE"):
        assignment("training.learning_rate")
    with pytest.raises(RecipeError, match="not a value"):
        assignment("training.learning_rate=[")


@pytest.mark.parametrize(("given", "names"), [("a", ["a"]), ("a, b", ["a", "b"]), (["a"], ["a"]), ("", [])])
def test_a_list_of_names_may_be_given_as_text(given, names):
    recipe = compose({"evaluation": {"metrics": given}, "adapter": {"kind": "lora", "targets": given}}).recipe
    assert recipe.evaluation.metrics == names
    assert recipe.adapter.targets == names
    assert compose({"tracking": {"trackers": "wandb,mlflow"}}).recipe.tracking.trackers == ["wandb", "mlflow"]
    assert compose(assignment("adapter.kind=lora")).recipe.adapter.targets == "attention"


def test_a_recipe_does_not_change():
    with pytest.raises(ValueError, match="frozen"):
        Recipe().training.seed = 1


def test_every_field_says_what_it_is_for():
    assert [fact.path for fact in fields() if len(fact.about) < 10] == []


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("method.source_prefix=summarize: ", "summarize: "),
        ("method.source_prefix='a: '", "a: "),
        ("method.source_prefix=null", None),
        ("data.system_prompt=Rules: be short", "Rules: be short"),
        ("name=2024", "2024"),
    ],
)
def test_text_is_set_as_it_stands(text, value):
    path = text.partition("=")[0].split(".")
    found = assignment(text)
    for part in path:
        found = found[part]
    assert found == value


def test_what_is_no_text_is_still_yaml():
    assert assignment("training.learning_rate=2e-5")["training"]["learning_rate"] in (2e-5, "2e-5")
    assert assignment("adapter.dora=true") == {"adapter": {"dora": True}}
    assert assignment("adapter.targets=[q, v]") == {"adapter": {"targets": ["q", "v"]}}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"task: chat\nmodel: {base: t\xe9st}\n", r"line 2, column 16 is not UTF-8"),
        (b"task: 2026-99-99\n", "line 1, column 7 is not YAML"),
        (b"[" * 5000, "line 1, column 65: more than 64 levels"),
        (b"seed: " + b"9" * 5000, "line 1, column 7 is not YAML"),
    ],
)
def test_a_recipe_file_that_is_spoiled_is_refused_in_words(tmp_path, content, said):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=said):
        read_layer(path)
