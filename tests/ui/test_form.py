"""The form against the recipe: every field has a control, every value comes back, and only what counts is asked."""

from __future__ import annotations

import json
import shlex

import pytest
import typer
from click.testing import CliRunner

pytest.importorskip("gradio")

from tunesmith import api
from tunesmith.cli import app
from tunesmith.compose import compose, nested, overlaid, union_members
from tunesmith.errors import InputError, RecipeError
from tunesmith.recipe import Recipe, fields
from tunesmith.ui import form
from tunesmith.ui.form import UNSET
from tunesmith.ui.workspace import Workspace

FACTS = [(f.path, f.kind) for f in fields() if f.path.partition(".")[0] not in form.ELSEWHERE]
COMMAND = typer.main.get_command(app)  # once: it takes a while
BY_FIELD = {(c.path, c.kind): c for c in form.controls()}


def control(path: str, kind: str | None = None) -> form.Control:
    return BY_FIELD[path, kind]


def kinds_for(c: form.Control) -> dict:
    """The layer in which a control's field is there at all."""
    return {c.section: {"kind": c.kind}} if c.kind else {}


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    return Workspace(tmp_path / "space")


@pytest.mark.parametrize(("path", "kind"), FACTS, ids=[f"{path}-{kind}" for path, kind in FACTS])
def test_every_field_has_a_control_with_its_help(path, kind):
    found = control(path, kind)
    fact = next(f for f in fields() if (f.path, f.kind) == (path, kind))
    assert found.about == " ".join(fact.about.split())
    assert found.default == fact.default
    # Literal types are asked for by their words, truth values by a switch, numbers by a number.
    if fact.type == "true | false":
        assert found.widget == "switch"
    elif fact.type in ("number", "whole number"):
        assert found.widget in ("number", "share")
        assert found.whole == (fact.type == "whole number")
    elif "list of data sources" in fact.type or "rewards" in fact.type or fact.type == "names and names":
        assert found.widget == "yaml"


def test_there_is_nothing_but_the_fields_and_the_kinds():
    kinds = {f"{union}.kind" for union in form.KINDS}
    assert {(c.path, c.kind) for c in form.controls()} == {*FACTS, *((path, None) for path in kinds)}
    assert control("method.kind").choices == tuple(union_members("method"))
    assert control("adapter.kind").choices == tuple(union_members("adapter"))


@pytest.mark.parametrize(("path", "kind"), FACTS, ids=[f"{path}-{kind}" for path, kind in FACTS])
def test_what_a_control_shows_is_what_is_read_back(path, kind):
    """Recipe -> form -> recipe: an untouched form changes nothing."""
    c = control(path, kind)
    base = form.filled(kinds_for(c)).base
    value = form.value_at(base, path)
    raw = form.shown(c, value)
    again = form.read(c, raw)
    layer = kinds_for(c) if again is UNSET else overlaid(kinds_for(c), nested(path, again))
    assert compose(layer).recipe == base


VALUES = {
    "share": [0.25, 0.75],
    "number": ["2", "0.25", "3e-1"],
    "text": ["some words: and a colon, 'quoted'"],
    "names": [["exact_match", "rougeL"]],
}
OWN_VALUES = {
    "data.columns": {"a": "prompt", "b": "completion"},
    "data.mix": [{"dataset": "example:chat", "weight": 2}],
    "evaluation.server.models": {"base": "one"},
    "method.rewards": [{"kind": "metric", "name": "exact_match", "weight": 0.5}],
    "adapter.targets": "q_proj, v_proj",
    "training.eval_steps": "7",
    "tracking.trackers": ["tensorboard"],
    "evaluation.server.base_url": "https://example.org/v1",
    "data.dataset": "example:chat",
    "data.prompt_length": 40,
    "name": "my run",
}
"""Raw values of fields that take none of the others."""


@pytest.mark.parametrize(("path", "kind"), FACTS, ids=[f"{path}-{kind}" for path, kind in FACTS])
def test_what_is_entered_is_set_shown_again_and_written_as_a_command(path, kind):
    """Form -> recipe -> form, and form -> command -> recipe."""
    if path in form.SETTLED:
        pytest.skip("the workbench sets it")
    c = control(path, kind)
    layer, raw = entered(c)
    recipe = compose(layer).recipe
    value = form.value_at(recipe, path)
    assert value != form.value_at(form.filled(kinds_for(c)).base, path), raw
    once = form.shown(c, value)
    assert form.shown(c, form.value_at(compose(put(c, layer, form.read(c, once))).recipe, path)) == once
    assert composed_from(form.argv(layer)) == recipe


def entered(c: form.Control) -> tuple[dict, object]:
    """A layer in which somebody has used this control, with the first value that the recipe takes."""
    if c.path in OWN_VALUES:
        candidates = [OWN_VALUES[c.path]]
        if c.widget == "yaml":
            candidates = [form.shown(c, candidates[0])]
    elif c.widget in VALUES:
        candidates = [*VALUES[c.widget], "1", "3"] if c.widget == "number" else VALUES[c.widget]
    else:
        words = [word for _, word in form.choices(c) if word] if c.widget != "switch" else []
        candidates = words or [not c.default]
    base = form.filled(kinds_for(c)).base
    for beside in ({}, *BESIDE):
        for raw in candidates:
            layer = put(c, overlaid(kinds_for(c), beside), form.read(c, raw))
            found = form.filled(layer)
            if not found.faults and form.value_at(found.sound, c.path) != form.value_at(base, c.path):
                return layer, raw
    raise AssertionError(f"nothing could be entered for {c.path}: {found.faults}")


BESIDE = (
    {"method": {"loss": "robust"}},
    {"method": {"f_divergence": "alpha_divergence"}},
    {"method": {"value": "critic"}},
    {"adapter": {"kind": "freeze", "ratio": 0.5}},
)
"""What some fields need beside them."""


def put(c: form.Control, layer: dict, value: object) -> dict:
    return form.put(layer, c.path, value)


def composed_from(argv: list[str]) -> Recipe:
    """What the command line makes of a command, caught before anything is trained."""
    caught = []

    def train(recipe, **given):
        caught.append(recipe)
        raise RecipeError("caught")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "train", train)
        said = CliRunner().invoke(COMMAND, argv[1:])
    assert caught, said.output
    return caught[0]


def test_a_command_survives_the_shell():
    layer = {
        "name": "it's; $HOME",
        "data": {"system_prompt": 'a\n"b" `c`'},
        "method": {"kind": "dpo", "beta": 0.3},
    }
    argv = form.argv(layer)
    assert shlex.split(shlex.join(argv)) == argv
    assert composed_from(argv) == compose(layer).recipe


@pytest.mark.parametrize("kind", list(union_members("method")))
def test_only_what_the_method_has_is_asked(kind):
    found = form.filled({"method": {"kind": kind}})
    asked = {c.path for c in form.visible(found, expert=True) if c.section == "method"}
    own = {f"method.{name}" for name in union_members("method")[kind].model_fields if name != "kind"}
    assert "method.kind" in asked
    assert asked - {"method.kind"} <= own
    for c in form.visible(found, expert=True):
        if c.section == "method" and c.path != "method.kind":
            assert c.kind == kind


def shows(layer: dict, path: str, *, expert: bool = True) -> bool:
    return path in {c.path for c in form.visible(form.filled(layer), expert=expert)}


def test_fields_that_an_error_says_have_no_effect_are_not_asked():
    dpo = {"method": {"kind": "dpo"}}
    assert not shows(dpo, "method.label_smoothing")
    assert shows(overlaid(dpo, {"method": {"loss": "robust"}}), "method.label_smoothing")
    assert not shows(dpo, "method.divergence_alpha")
    assert shows(overlaid(dpo, {"method": {"f_divergence": "alpha_divergence"}}), "method.divergence_alpha")
    assert shows(dpo, "method.f_divergence")
    assert not shows(overlaid(dpo, {"method": {"loss": "nca_pair"}}), "method.f_divergence")
    assert not shows({"method": {"kind": "ppo"}}, "method.critic")
    assert shows({"method": {"kind": "ppo", "value": "critic"}}, "method.critic")


def test_fields_that_another_section_makes_idle_are_not_asked():
    assert shows({}, "data.packing")
    assert not shows({"method": {"kind": "dpo"}}, "data.packing")
    freeze = {"adapter": {"kind": "freeze"}}
    assert shows(freeze, "training.cache_frozen")
    assert not shows({}, "training.cache_frozen")
    assert not shows(overlaid(freeze, {"method": {"kind": "grpo"}}), "training.cache_frozen")
    assert not shows({"data": {"dataset": "example:sql"}}, "data.revision")
    assert shows({"data": {"dataset": "owner/name"}}, "data.revision")
    assert not shows({}, "adapter.rank")
    assert shows({"adapter": {"kind": "qlora"}}, "adapter.double_quantization")
    assert not shows({"adapter": {"kind": "lora"}}, "adapter.double_quantization")


def test_a_field_that_is_set_or_wrong_is_shown_in_any_case():
    layer = {"method": {"kind": "dpo", "label_smoothing": 0.1}}
    found = form.filled(layer)
    assert "no effect with the loss sigmoid" in found.faults["method.label_smoothing"]
    assert shows(layer, "method.label_smoothing", expert=False)
    assert found.recipe is None


def test_the_basic_view_is_what_the_command_line_has_options_for():
    basic = {c.path for c in form.visible(form.filled({}), expert=False)}
    assert {"task", "preset", "model.base", "method.kind", "adapter.kind", "training.learning_rate"} <= basic
    assert "training.scheduler" not in basic
    assert len(basic) < len(form.visible(form.filled({}), expert=True)) / 2
    assert set(form.OF_A_METHOD) <= {path.split(".")[-1] for path, kind in FACTS if kind}


@pytest.mark.parametrize(
    ("layer", "path", "said"),
    [
        ({"training": {"num_epochs": -1}}, "training.num_epochs", "greater than 0; found -1"),
        ({"training": {"learning_rate": "fast"}}, "training.learning_rate", "takes a number"),
        ({"training": {"eval_steps": "often"}}, "training.eval_steps", "epoch"),
        ({"adapter": {"kind": "lora", "dropout": 1.0}}, "adapter.dropout", "less than 1"),
        ({"data": {"held_out": 2}}, "data.held_out", "less than 1"),
        ({"task": "chatt"}, "task", "Did you mean 'chat'?"),
        ({"preset": "quick"}, "preset", "quick_test"),
        ({"method": {"kind": "sfft"}}, "method.kind", "sft"),
        ({"method": {"kind": "ppo", "critic": "x"}}, "method.critic", "value"),
        ({"evaluation": {"server": {"timeout": 0}}}, "evaluation.server.timeout", "greater than 0"),
        ({"data": {"mix": [{"dataset_": "x"}]}}, "data.mix", "dataset_"),
        ({"method": {"kind": "grpo", "rewards": [{"kind": "metric"}]}}, "method.rewards", "list of rewards"),
    ],
)  # fmt: skip
def test_errors_stand_at_their_field(layer, path, said):
    found = form.filled(layer)
    assert set(found.faults) == {path}
    assert said in found.faults[path]
    assert found.recipe is None


def test_several_errors_stand_each_at_its_own_field():
    layer = {"training": {"num_epochs": -1, "seed": -2}, "data": {"max_length": 0}}
    found = form.filled(layer)
    assert set(found.faults) == {"training.num_epochs", "training.seed", "data.max_length"}
    assert found.sound == compose({}).recipe


def test_another_kind_keeps_what_it_has_and_says_what_it_loses():
    layer = {"method": {"kind": "dpo", "beta": 0.2, "loss": "hinge", "f_divergence": "forward_kl"}}
    new, lost = form.changed(layer, control("method.kind"), "cpo")
    assert new == {"method": {"kind": "cpo", "beta": 0.2, "loss": "hinge"}}
    assert lost == ["method.f_divergence was left out: method 'cpo' has no such field."]


def test_a_cleared_control_leaves_the_layer():
    layer = {"training": {"learning_rate": 1e-3}, "evaluation": {"max_items": 4}}
    new, _ = form.changed(layer, control("training.learning_rate"), None)
    assert new == {"evaluation": {"max_items": 4}}
    # Where nothing is a value of its own, and not the default, it is that value.
    new, _ = form.changed(new, control("evaluation.max_items"), None)
    assert new == {"evaluation": {"max_items": None}}


def test_a_preset_shows_in_the_fields_that_it_sets():
    found = form.filled({"preset": "quick_test", "training": {"num_epochs": 9}})
    assert form.current(control("training.max_steps"), found) == 100
    assert form.current(control("training.num_epochs"), found) == 9


def test_yaml_that_is_none_is_an_error_and_bombs_are_refused():
    with pytest.raises(RecipeError, match="columns is not YAML"):
        form.read(control("data.columns"), "{a: [")
    bomb = "a: &a [x,x]\n" + "".join(
        f"{c}: &{c} [{','.join([f'*{p}'] * 40)}]\n" for p, c in zip("abcdefg", "bcdefgh")
    )
    with pytest.raises(RecipeError, match="values"):
        form.read(control("data.columns"), bomb)


# What leads outside


@pytest.mark.parametrize(
    ("layer", "path"),
    [
        ({"model": {"base": "/etc"}}, "model.base"),
        ({"model": {"base": "../other"}}, "model.base"),
        ({"model": {"chat_template": "/etc/passwd"}}, "model.chat_template"),
        ({"data": {"dataset": "/etc/passwd"}}, "data.dataset"),
        ({"data": {"dataset": "~/secret.csv"}}, "data.dataset"),
        ({"data": {"dataset": "pyproject.toml"}}, "data.dataset"),
        ({"data": {"dataset": "s3://bucket/of/the/server"}}, "data.dataset"),
        ({"data": {"mix": [{"dataset": "http://169.254.169.254/rows.jsonl"}]}}, "data.mix"),
        ({"data": {"data_files": "../*"}}, "data.data_files"),
        ({"data": {"dataset": "text", "data_files": "file:///etc/passwd"}}, "data.data_files"),
        ({"data": {"mix": [{"dataset": "a/b", "data_files": "file:///etc/passwd"}]}}, "data.mix"),
        ({"data": {"mix": [{"dataset": "/etc/passwd"}]}}, "data.mix"),
        ({"method": {"kind": "ppo", "value": "critic", "critic": "/srv/model"}}, "method.critic"),
        ({"method": {"kind": "dpo", "reference_model": "/srv/model"}}, "method.reference_model"),
        ({"method": {"kind": "ppo", "rewards": [{"kind": "model", "model": "/srv/model"}]}}, "method.rewards"),
        ({"method": {"kind": "ppo", "rewards": "os:system"}}, "method.rewards"),
        ({"method": {"kind": "ppo", "rewards": [{"kind": "python", "function": "os:system"}]}}, "method.rewards"),
        ({"evaluation": {"engine": "openai", "server": {"api_key_env": "HOME"}}}, "evaluation.server.api_key_env"),
        ({"evaluation": {"engine": "openai", "server": {"api_key_env": "OPENAI_API_KEY"}}},
         "evaluation.server.api_key_env"),
        ({"method": {"kind": "grpo", "rewards": [{"kind": "judge", "base_url": "https://evil.example/v1", "model": "m",
                                                  "api_key_env": "OPENAI_API_KEY"}]}}, "method.rewards"),
        ({"evaluation": {"engine": "ray", "shards": {"address": "ray://evil.example:10001"}}},
         "evaluation.shards.address"),
        ({"evaluation": {"run_code": True}}, "evaluation.run_code"),
        ({"evaluation": {"run_code": "yes"}}, "evaluation.run_code"),
        ({"name": "../run"}, "name"),
        ({"model": {"base": "a\0b"}}, "model.base"),
        # The same below the kind that is chosen, where `compose` finds it.
        ({"method": {"kind": "ppo", "ppo": {"value": "critic", "critic": "/srv/model"}}}, "method.critic"),
        ({"method": {"kind": "dpo", "dpo": {"reference_model": "/srv/model"}}}, "method.reference_model"),
        ({"method": {"kind": "grpo", "grpo": {"rewards": "os:system"}}}, "method.rewards"),
        ({"method": {"kind": "grpo", "grpo": {"rewards": [{"kind": "model", "model": "/srv/model"}]}}},
         "method.rewards"),
        ({"method": {"kind": "grpo", "grpo": {"rewards": [
            {"kind": "judge", "base_url": "https://evil.example/v1", "model": "m", "api_key_env": "HOME"}]}}},
         "method.rewards"),
    ],
)  # fmt: skip
def test_nothing_outside_the_workspace_is_named(layer, path, workspace):
    assert path in form.outside(layer, workspace)
    assert path in form.filled(layer, workspace).faults
    with pytest.raises(InputError):
        form.checked(layer, workspace)


@pytest.mark.parametrize("deep", [1, 2, 3])
def test_no_depth_of_kinds_takes_a_reward_that_is_code_past_an_import(workspace, tmp_path, deep):
    inner = {"rewards": [{"kind": "python", "function": "os:system"}]}
    for _ in range(deep):
        inner = {"grpo": inner}
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps({"model": {"base": "tiny"}, "method": {"kind": "grpo", **inner}}))
    with pytest.raises((InputError, RecipeError)) as refused:
        form.checked(form.imported(file)[0], workspace)
    assert ("runs code" if deep == 1 else "holds a kind once more") in str(refused.value)
    with pytest.raises((InputError, RecipeError)):
        form.checked({"method": {"kind": "grpo", **inner}}, workspace)


def test_code_of_models_is_run_where_the_start_allows_it(tmp_path):
    layer = {"evaluation": {"run_code": True}}
    assert form.outside(layer, Workspace(tmp_path / "w", runs_code=True)) == {}


def test_a_link_out_of_the_workspace_is_outside(workspace, tmp_path):
    (tmp_path / "secret.jsonl").write_text("{}")
    (workspace.uploads / "mine.jsonl").symlink_to(tmp_path / "secret.jsonl")
    assert "data.dataset" in form.outside(
        {"data": {"dataset": str(workspace.uploads / "mine.jsonl")}}, workspace
    )


def test_what_ships_what_is_on_the_hub_and_what_is_inside_may_be_named(workspace):
    inside = str(workspace.uploads / "mine.jsonl")
    layer = {
        "model": {"base": "tiny", "chat_template": "chatml"},
        "data": {"dataset": inside, "mix": [{"dataset": "a/b"}]},
        "evaluation": {
            "engine": "openai",
            "server": {"base_url": "https://api.openai.com/v1", "api_key_env": "OPENAI_API_KEY"},
        },
    }
    assert form.outside(layer, workspace) == {}
    made = form.checked({**layer, "output_dir": "/elsewhere"}, workspace)
    assert made.recipe.output_dir == str(workspace.runs)


# Recipes as files


def test_a_run_s_full_recipe_is_imported_as_what_it_sets(tmp_path):
    from tunesmith.compose import as_yaml

    layer = {"task": "chat", "method": {"kind": "dpo", "beta": 0.2}, "adapter": {"kind": "lora"}}
    whole = compose(layer).recipe
    file = tmp_path / "recipe.yaml"
    file.write_text(as_yaml(whole))
    found, notes = form.imported(file)
    assert compose(found).recipe == whole
    assert found == {**layer, "data": {"dataset": "example:sql"}}
    assert notes == ["output_dir was left out: Runs are kept in your workspace."]


def test_settings_of_a_kind_are_imported_where_it_is_chosen(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("adapter: {kind: lora, lora: {rank: 4}, freeze: {ratio: 0.2}}\n")
    found, notes = form.imported(file)
    assert found == {"adapter": {"kind": "lora", "rank": 4}}
    assert notes == ["adapter.freeze was left out: the adapter is 'lora'."]
    # QLoRA is a LoRA, and takes its settings, as in `compose`.
    file.write_text("adapter: {kind: qlora, lora: {rank: 4}}\n")
    assert form.imported(file) == ({"adapter": {"kind": "qlora", "rank": 4}}, [])


def test_what_the_form_writes_is_what_it_reads(tmp_path):
    layer = {"task": "code", "adapter": {"kind": "lora", "rank": 4}, "data": {"columns": {"a": "prompt"}}}
    file = tmp_path / "recipe.yaml"
    file.write_text(form.as_yaml(layer))
    assert form.imported(file)[0] == layer


# The components


BLOCKS = {
    "switch": "checkbox", "choice": "dropdown", "own": "dropdown", "names": "dropdown", "share": "slider",
    "number": "textbox", "text": "textbox", "yaml": "textbox",
}  # fmt: skip


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_every_control_becomes_a_component_with_label_id_and_help(kind):
    import gradio as gr

    found = form.filled({"method": {"kind": kind}, "adapter": {"kind": "qlora"}})
    with gr.Blocks():
        for c in form.visible(found, expert=True):
            made = form.component(c, found)
            assert made.elem_id == "recipe-" + c.path.replace(".", "-")
            assert made.label == c.title
            assert made.interactive == (c.path not in form.SETTLED)
            assert made.info
            assert made.get_block_name() == BLOCKS[c.widget]
            if c.widget in ("choice", "own"):
                offered = [value for _, value in made.choices]
                assert set(offered) >= {*c.choices, made.value}
                assert made.allow_custom_value == (c.widget == "own")


def test_a_fault_stands_in_the_label_which_is_plain_text():
    import gradio as gr

    found = form.filled({"training": {"num_epochs": -1}})
    with gr.Blocks():
        made = form.component(control("training.num_epochs"), found)
    assert made.value == "-1"
    assert "has to be greater than 0" in made.label
    assert "ts-fault" in made.elem_classes
