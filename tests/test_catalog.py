"""The catalogue: what ships, what a user adds, and data sets by name from the recipe to the rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from tunesmith import api, catalog
from tunesmith.cli import app
from tunesmith.compose import as_yaml, compose, union_members, validated
from tunesmith.data import prepare
from tunesmith.data.formats import FORMATS
from tunesmith.errors import DataError, RecipeError
from tunesmith.evaluation.metrics import METRICS, format_metrics_output
from tunesmith.methods import METHODS
from tunesmith.recipe import Recipe


@pytest.fixture(autouse=True)
def _no_catalog_of_whoever_runs_this(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv(catalog.VARIABLE, raising=False)


@pytest.fixture
def own(tmp_path):
    """Write a catalogue of the user's and give its file."""

    def write(content) -> Path:
        file = tmp_path / "catalog.yaml"
        file.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
        return file

    return write


@pytest.fixture
def articles(tmp_path, own):
    """Thirty articles in columns of their own, and a catalogue that says how they are read."""
    rows = [{"article": f"red {n} blue", "highlights": f"green {n}", "id": n} for n in range(30)]
    (tmp_path / "articles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return own(
        {
            "datasets": {
                "my-news": {
                    "about": "news", "path": "articles.jsonl", "format": "prompt_completion",
                    "columns": {"article": "prompt", "highlights": "completion"},
                    "preparation": {"type": "summarization", "prompt_prefix": "summarize: "},
                }
            }
        }
    )  # fmt: skip


def examples_of(section):
    splits = prepare(section, METHODS["sft"].adapt)
    return [example for _, _, example in splits.rows() if example]


@pytest.mark.parametrize("name", catalog.catalog().datasets)
def test_every_shipped_data_set_fits_the_recipe(name):
    entry = catalog.catalog().datasets[name]
    data = compose({"data": {"dataset": name}}).recipe.data
    assert data.dataset == entry.path
    assert data.dataset.count("/") == 1
    assert entry.format in FORMATS
    known = {column for names in FORMATS[entry.format].columns for column in names} | {"input", "text"}
    assert set(data.columns.values()) <= known
    assert data.columns == entry.columns


def test_methods_and_metrics_are_those_of_the_program():
    assert catalog.get_available_options("fine_tuning_methods") == list(union_members("method"))
    assert catalog.get_available_options("evaluation_metrics") == list(METRICS)
    text = Path(catalog.__file__).with_name("catalog.yaml").read_text(encoding="utf-8")
    assert not set(yaml.safe_load(text)) & {"fine_tuning_methods", "evaluation_metrics"}


@pytest.mark.parametrize("part", ["tokenization_strategies", "collation_strategies"])
def test_every_strategy_is_a_recipe(part):
    names = catalog.get_available_options(part)
    assert {"default", "seq2seq", "custom"} <= set(names)
    for name in names:
        layer = getattr(catalog.catalog(), part)[name].recipe
        recipe = validated(catalog.strategy(part, name))
        assert recipe.method.kind == layer.get("method", {}).get("kind", "sft")


def test_custom_lengths():
    layer = catalog.strategy("tokenization", "custom", max_input_length=300, max_output_length=20)
    method = validated(layer).method
    assert (method.max_input_length, method.max_output_length) == (300, 20)


def test_lengths_that_a_strategy_does_not_have():
    with pytest.raises(RecipeError, match="has no max_input_length"):
        catalog.strategy("tokenization", "default", max_input_length=3)
    with pytest.raises(RecipeError, match="Did you mean 'custom'"):
        catalog.strategy("tokenization", "custm")


def test_the_documented_name_of_seed_003():
    """`--dataset alpaca-instruct --task instruct --lora` of the seed's page, which its program took for a folder."""
    composition = compose({"task": "instruct", "data": {"dataset": "alpaca-instruct"}})
    assert composition.recipe.data.dataset == "tatsu-lab/alpaca"
    assert composition.recipe.data.format == "instruction"
    assert "alpaca-instruct" in " ".join(composition.notes)


def test_a_data_set_by_name_from_the_command_line_to_the_rows(articles, tmp_path, tiny_model_folder):
    arguments = ["plan", "--dataset", "my-news", "--catalog", articles, "--base-model", tiny_model_folder,
                 "--max-length", "128", "--json"]  # fmt: skip
    result = CliRunner().invoke(app, list(map(str, arguments)))
    planned = json.loads(result.stdout.strip().splitlines()[-1])
    assert result.exit_code == 0, planned
    assert planned["rows"]["rows_in"] == 30
    assert any("my-news" in note for note in planned["notes"])
    said = " ".join(d["value"] for d in planned["plan"]["decisions"] if d["name"] == "data")
    assert "column article is read as prompt" in said
    assert "every question begins with 'summarize: '" in said
    with catalog.using(articles):
        data = compose({"data": {"dataset": "my-news"}}).recipe.data
    assert data.dataset == str(tmp_path / "articles.jsonl")
    first = examples_of(data)[0]
    assert [m.content for m in first.messages] == ["summarize: red 0 blue", "green 0"]
    assert first.extra["id"] == 0


def test_the_recipe_of_a_run_needs_no_catalogue(articles):
    with catalog.using(articles):
        recipe = compose({"data": {"dataset": "my-news"}}).recipe
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


def test_what_is_given_wins_over_the_catalogue(articles):
    with catalog.using(articles):
        data = compose(
            {"data": {"dataset": "my-news", "prompt_prefix": "short: ", "max_rows": 5}}
        ).recipe.data
        mixed = compose({"data": {"dataset": "example:sql", "mix": [{"dataset": "my-news"}]}}).recipe.data
    assert (data.prompt_prefix, data.max_rows) == ("short: ", 5)
    assert mixed.mix[0].columns == {"article": "prompt", "highlights": "completion"}


@pytest.fixture
def subset(own):
    """A data set whose entry sets what a user may want otherwise."""
    fields = {"config": "main", "split": "train", "format": "instruction", "columns": {"context": "input"}}
    return own({"datasets": {"subset": {"about": "x", "path": "a/b", **fields}}})


def test_what_is_given_wins_also_where_it_is_the_default(subset):
    given = {"config": None, "split": None, "format": "auto", "columns": {}}
    with catalog.using(subset):
        for layer in (given, *({name: value} for name, value in given.items())):
            composition = compose({"data": {"dataset": "subset", **layer}})
            data = composition.recipe.data.model_dump()
            kept = {
                "config": "main",
                "split": "train",
                "format": "instruction",
                "columns": {"context": "input"},
            }
            assert {name: data[name] for name in kept} == {**kept, **layer}
            [note] = composition.notes
            assert all(f"{name} {value}" in note.partition("instead")[2] for name, value in layer.items())
        assert (
            compose({"data": {"dataset": "example:sql", "mix": [{"dataset": "subset", "format": "auto"}]}})
            .recipe.data.mix[0]
            .format
            == "auto"
        )


def test_a_layer_below_says_what_it_means_and_no_more(subset, tmp_path):
    """A recipe as a run keeps it has every field of its own data set; a short one has what somebody wrote."""
    whole, short = tmp_path / "whole.yaml", tmp_path / "short.yaml"
    whole.write_text(as_yaml(compose({"data": {"dataset": "example:sql"}}).recipe))
    short.write_text("data: {dataset: example:sql, format: messages, max_rows: 5}")
    beside = tmp_path / "beside.yaml"
    beside.write_text("data: {dataset: subset, format: auto}")
    with catalog.using(subset):
        of_whole = compose({"data": {"dataset": "subset"}}, file=whole).recipe.data
        of_short = compose({"data": {"dataset": "subset"}}, file=short).recipe.data
        of_beside = compose({"data": {"split": None}}, file=beside).recipe.data
    assert (of_whole.format, of_whole.split, of_whole.columns) == (
        "instruction",
        "train",
        {"context": "input"},
    )
    assert (of_short.format, of_short.split, of_short.max_rows) == ("messages", "train", 5)
    assert (of_beside.format, of_beside.split, of_beside.config) == ("auto", None, "main")


def test_a_file_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dolly").mkdir()
    composition = compose({"data": {"dataset": "dolly"}})
    assert (composition.recipe.data.dataset, composition.notes) == ("dolly", ())


def test_validate_and_inspect_take_names(articles, tiny_model_folder):
    with catalog.using(articles):
        report = api.validate("my-news")
        recipe = api.inspected_recipe("my-news", str(tiny_model_folder), {"data": {"max_length": 128}})
    assert (report.rows, report.has_errors) == (30, False)
    [row] = api.inspect(recipe, rows=["1"])
    assert "summarize: red 0" in "".join(text for text, _ in row.pieces)


def test_where_the_users_catalogue_lies(articles, monkeypatch, tmp_path):
    assert catalog.user_file() is None
    home = tmp_path / "config" / "tunesmith"
    home.mkdir(parents=True)
    (home / "catalog.yaml").write_text(articles.read_text(), encoding="utf-8")
    assert "my-news" in catalog.catalog().datasets
    other = tmp_path / "other.yaml"
    other.write_text("datasets: {other: {about: x, path: a/b}}", encoding="utf-8")
    monkeypatch.setenv(catalog.VARIABLE, str(other))
    assert "my-news" not in catalog.catalog().datasets
    assert "dolly" in catalog.catalog().datasets
    with catalog.using(articles):
        assert "my-news" in catalog.catalog().datasets
    assert "other" in catalog.catalog().datasets


def test_own_entries_are_added_or_replace(own):
    file = own(
        {
            "model_examples": {"code": ["me/model"], "mine": ["me/other"]},
            "datasets": {"dolly": {"about": "mine", "path": "me/dolly"}},
        }
    )
    with catalog.using(file):
        found = catalog.catalog()
        assert catalog.get_available_options("models")[-1] == "mine"
    assert found.model_examples["code"][-1] == "me/model"
    assert len(found.model_examples["code"]) > 1
    assert found.datasets["dolly"].path == "me/dolly"
    assert catalog.catalog().datasets["dolly"].path != "me/dolly"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"dataset": {}}, "Did you mean 'datasets'"),
        ({"datasets": {"a": {"about": "x", "path": "y", "columnz": {}}}}, "Did you mean 'columns'"),
        ({"datasets": {"a": {"about": "x", "pth": "y"}}}, "Did you mean 'path'"),
        ({"datasets": {"a": {"about": "x"}}}, "datasets.a.path"),
        ({"datasets": {"a": {"about": "x", "path": "y", "task": "chatt"}}}, "datasets.a.task"),
        (
            {"datasets": {"a": {"about": "x", "path": "y", "preparation": {"type": "summarization", "prefix": ""}}}},
            "Did you mean 'prompt_prefix'",
        ),
        (
            {"datasets": {"a": {"about": "x", "path": "y", "preparation": {"type": "text_classification"}}}},
            "prompt_length belongs to text_classification",
        ),
        ({"datasets": {"a/b": {"about": "x", "path": "y"}}}, "a/b"),
        (
            {"tokenization_strategies": {"long": {"about": "x", "recipe": {"data": {"max_lenth": 4}}}}},
            "Did you mean 'max_length'",
        ),
        ("datasets: [", "not YAML"),
        ("", "is empty"),
        ("- a", "holds no catalogue"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_catalogues_say_where_and_what(own, content, expected):
    with catalog.using(own(content)), pytest.raises(RecipeError) as error:
        catalog.catalog()
    assert expected in "\n".join(error.value.lines())


def test_a_catalogue_that_is_not_there(tmp_path):
    result = CliRunner().invoke(app, ["show", "catalog", "--catalog", str(tmp_path / "no.yaml"), "--json"])
    assert result.exit_code == 1
    assert "catalogue file" in json.loads(result.stdout.strip().splitlines()[-1])["error"]


def test_a_misspelled_data_set_names_the_nearest():
    with pytest.raises(DataError, match="Did you mean 'alpaca-instruct' of the catalogue"):
        examples_of(compose({"data": {"dataset": "alpaca-instrct"}}).recipe.data)


def test_show_catalog_lists_every_part():
    result = CliRunner().invoke(app, ["show", "catalog", "--json"])
    shown = json.loads(result.stdout)["catalog"]
    assert {entry["part"] for entry in shown} == set(catalog.PARTS)
    keys = {entry["key"] for entry in shown}
    assert {"sft", "rougeL", "alpaca-instruct", "example:support", "custom"} <= keys
    assert len(api.show("catalog", "metrics")) == len(METRICS)
    with pytest.raises(RecipeError, match="Did you mean 'datasets'"):
        api.show("catalog", "datasetz")


@pytest.mark.parametrize("short", catalog.SHORT)
def test_a_part_has_one_name_in_every_row(short):
    rows = api.show("catalog", short)
    assert rows == api.show("catalog", catalog.SHORT[short])
    assert all(row["name"] == f"{short}: {row['key']}" for row in rows)


def test_what_is_shown_has_no_indentation_of_the_source(articles):
    with catalog.using(articles):
        shown = [*api.show("catalog"), *api.show("methods"), *api.show("metrics")]
    assert not [row["about"] for row in shown if "\n" in row["about"] or "  " in row["about"]]


def test_show_catalog_finds_what_has_a_name(articles):
    [dolly] = api.show("catalog", "dolly")
    assert dolly["name"] == "datasets: dolly"
    assert dolly["value"]["columns"] == {"context": "input", "response": "output"}
    both = api.show("catalog", "default")
    assert [row["name"] for row in both] == ["tokenization: default", "collation: default"]
    for name in ("example:sql", "rougeL", "seq2seq", "code"):
        assert {row["key"] for row in api.show("catalog", name)} == {name}
    with catalog.using(articles):
        assert api.show("catalog", "my-news")[0]["value"]["dataset"].endswith("articles.jsonl")
    result = CliRunner().invoke(app, ["show", "catalog", "dolly"])
    assert "databricks/databricks-dolly-15k" in result.stdout


def test_what_the_catalogue_does_not_have_names_the_nearest_or_the_parts_once():
    with pytest.raises(RecipeError, match="Did you mean 'dolly'"):
        api.show("catalog", "doly")
    with pytest.raises(RecipeError) as error:
        api.show("catalog", "qqqq")
    assert error.value.fix == "Known: collation, datasets, methods, metrics, models, tokenization."
    with pytest.raises(RecipeError, match="no part 'dolly'"):
        catalog.get_available_options("dolly")


def test_available_options_of_a_configuration_as_plain_values():
    assert catalog.get_available_options("datasets", {"datasets": {"a": 1, "b": 2}}) == ["a", "b"]
    with pytest.raises(RecipeError, match="Did you mean 'datasets'"):
        catalog.get_available_options("dataset", {"datasets": {}})


def test_metrics_as_lines():
    assert format_metrics_output({"rougeL": 0.123456, "n": 4, "verdict": "better"}) == (
        "rougeL: 0.1235\nn: 4\nverdict: better"
    )


class TestShaping:
    """`data.columns`, `data.prompt_prefix` and `data.prompt_length` on files."""

    @pytest.fixture
    def section(self, tmp_path):
        def write(rows, **fields):
            (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            layer = {"dataset": str(tmp_path / "rows.jsonl"), "near_duplicates": "ignore", **fields}
            return compose({"data": layer}).recipe.data

        return write

    def test_texts_become_questions_and_their_continuations(self, section):
        rows = [{"review": f"0123456789 and {n}", "label": 0} for n in range(20)] + [{"review": "short"}]
        data = section(
            rows, columns={"review": "text"}, prompt_prefix="> ", prompt_length=10, format="prompt_completion"
        )
        found = examples_of(data)
        assert [m.content for m in found[0].messages] == ["> 0123456789", " and 0"]
        assert len(found) == 20, "a text with nothing left to answer is dropped"

    def test_columns_may_change_places(self, section):
        data = section([{"prompt": f"a{n}", "completion": f"q{n}"} for n in range(20)],
                       columns={"prompt": "completion", "completion": "prompt"})  # fmt: skip
        assert [m.content for m in examples_of(data)[0].messages] == ["q0", "a0"]

    @pytest.mark.parametrize(
        ("fields", "expected"),
        [
            ({"columns": {"questionz": "prompt"}}, "does not have: questionz"),
            ({"columns": {"q": "a"}}, "one name"),
            ({"prompt_length": 3}, "prompt_length cuts the column text"),
            ({"prompt_prefix": "x"}, "goes before the column prompt"),
        ],
        ids=str,
    )
    def test_what_does_not_fit_is_said(self, section, fields, expected):
        with pytest.raises(DataError, match=expected):
            examples_of(section([{"q": f"q{n}", "a": "x"} for n in range(20)], **fields))

    def test_another_shape_is_another_cache_entry(self, section):
        rows = [{"q": f"q{n}", "a": f"a{n}"} for n in range(20)]
        names = {"columns": {"q": "prompt", "a": "completion"}}
        assert examples_of(section(rows, **names))[0].messages[0].content == "q0"
        assert examples_of(section(rows, **names, prompt_prefix="now "))[0].messages[0].content == "now q0"
