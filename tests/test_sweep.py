"""Sweeps: a space that is checked first, trials that go on, a choice that held-out questions had no part in."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from tunesmith import api, sweeps
from tunesmith.compose import compose, overlaid
from tunesmith.errors import Interrupted, RecipeError, RunError
from tunesmith.sweeps import space as spaces
from tunesmith.sweeps.trials import Pruned, Trial, name_of
from tunesmith.training.run import Run

pytest.importorskip("optuna")


@pytest.fixture
def recipe(tiny_model_folder, question_file, tmp_path):
    base = {
        "name": "colors", "output_dir": str(tmp_path / "runs"), "model": {"base": str(tiny_model_folder)},
        "data": {"dataset": str(question_file), "max_length": 64, "held_out": 0.3, "validation": 0.1},
        "adapter": {"kind": "lora", "rank": 4},
        "training": {
            "max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 0,
            "eval_steps": 1, "save_steps": 2,
        },
        "evaluation": {"resamples": 200, "max_new_tokens": 4, "engine_check": 0, "samples": 0},
    }  # fmt: skip

    def made(*changes):
        return compose(overlaid(base, *changes)).recipe

    return made


SPACE = ["training.learning_rate=loguniform(1e-4,1e-2)", "adapter.rank=choice(2,4)"]


def searched(recipe, *texts):
    return spaces.checked(spaces.read(texts), recipe)


# The space


def test_a_space_is_read_from_texts_and_files_with_the_types_of_the_recipe(recipe, tmp_path):
    file = tmp_path / "space.yaml"
    file.write_text(
        "training.learning_rate: loguniform(1e-5, 1e-3)\nadapter: {rank: [4, 8], dropout: 'uniform(0, 0.2)'}\n"
    )
    found = searched(
        recipe(), str(file), "training.warmup_steps=int(0,100,30)", "training.scheduler=choice(linear)"
    )
    assert {path: str(given) for path, given in found.items()} == {
        "training.learning_rate": "loguniform(1e-05, 0.001)",
        "adapter.rank": "choice(4, 8)",
        "adapter.dropout": "uniform(0, 0.2)",
        "training.warmup_steps": "int(0, 90, 30)",
        "training.scheduler": "choice(linear)",
    }
    [rates] = searched(recipe(), "training.learning_rate=choice(1e-5, 2e-4)").values()
    assert rates.values == (1e-5, 2e-4), "YAML reads 1e-5 as text"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("training.learning_rat=loguniform(1e-5,1e-3)", "Did you mean 'learning_rate'"),
        ("adapter.ratio=uniform(0,1)", "it belongs to freeze"),
        ("training.learning_rate=lognormal(1,2)", "Did you mean 'loguniform'"),
        ("training.learning_rate=3", "no distribution"),
        ("training.learning_rate=loguniform(0,1)", "lower end above 0"),
        ("training.learning_rate=uniform(2,1)", "below the higher one"),
        ("training.learning_rate=uniform(-1,1)", "has to be greater than 0"),
        ("training.weight_decay=choice(0.1,much)", "takes a number"),
        ("training.scheduler=choice(cosine,linaer)", "Did you mean 'linear'"),
        ("adapter.rank=uniform(2,8)", "write int(2, 8)"),
        ("adapter.rank=choice(2,2)", "twice"),
        ("training.warmup_steps=int(0,1.5)", "whole numbers"),
        ("training.seed=int(0,9)", "share the seed"),
        ("data.max_length=choice(32,64)", "same rows"),
        ("data=choice(1)", "is a section"),
    ],
)
def test_what_is_no_space_of_this_recipe_is_refused_before_any_trial(recipe, tmp_path, text, says):
    with pytest.raises(RecipeError) as error:
        api.sweep(recipe(), [text])
    assert says in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_all_faults_are_told_at_once_and_values_that_do_not_fit_together_too(recipe):
    with pytest.raises(RecipeError, match="2 faults") as error:
        searched(recipe(), "training.learning_rat=uniform(1,2)", "adapter.rank=choice(0,4)")
    assert "learning_rate" in str(error.value)
    assert "adapter.rank" in str(error.value)
    several = recipe({"launch": {"kind": "accelerate", "processes": 2}})
    with pytest.raises(RecipeError, match=r"do not fit together: training\.per_device_train_batch_size=3"):
        searched(several, "training.per_device_train_batch_size=choice(4,3)")
    dpo = recipe({"method": {"kind": "dpo"}})
    with pytest.raises(RecipeError, match="what its loss means"):
        searched(dpo, "method.beta=choice(0.1,0.3)")


def test_values_drawn_by_chance_lie_in_the_space_and_depend_on_seed_and_number(recipe):
    space = searched(
        recipe(), *SPACE, "training.warmup_steps=int(0,100,30)", "training.num_epochs=uniform(1,2)"
    )
    drawn = [spaces.drawn(space, 0, number) for number in range(300)]
    assert drawn == [spaces.drawn(space, 0, number) for number in range(300)]
    assert drawn[0] != spaces.drawn(space, 1, 0)
    rates = sorted(values["training.learning_rate"] for values in drawn)
    assert 1e-4 <= rates[0] <= rates[-1] <= 1e-2
    assert math.log10(rates[150]) == pytest.approx(-3, abs=0.2), "as many below as above the middle"
    assert {values["training.warmup_steps"] for values in drawn} == {0, 30, 60, 90}
    assert {values["adapter.rank"] for values in drawn} == {2, 4}


# Trials


@pytest.fixture
def pretended(monkeypatch):
    """Trials whose loss is a function of their learning rate, at once."""
    carried = []

    def carried_out(number, given, *, report, watch=None):
        loss = abs(math.log10(given["training"]["learning_rate"]) + 3)
        carried.append((number, given))
        found = []
        for step in (1, 2):
            found.append((step, loss + 1 / step))
            try:
                report(step, loss + 1 / step)
            except Pruned as error:
                return Trial(number, {}, "pruned", loss + 1 / step, step, tuple(found), 0.0, error.problem)
        if loss > 0.95:
            return Trial(number, {}, "failed", reason="The loss is nan.")
        return Trial(number, {}, "done", loss + 0.5, 2, tuple(found))

    monkeypatch.setattr(sweeps, "carried_out", carried_out)
    monkeypatch.setattr(sweeps, "_compared", lambda *given: ((), []))
    return carried


def swept(recipe, texts=SPACE, trials=6, pruner="none", seed=0, watch=lambda event: None):
    space = spaces.read(texts)
    return sweeps.sweep(
        recipe, space, trials=trials, engine="optuna", pruner=pruner, seed=seed, compared=1, watch=watch
    )


def test_a_sweep_that_was_killed_goes_on_with_what_it_would_have_tried(recipe, pretended, tmp_path):
    whole = swept(recipe({"output_dir": str(tmp_path / "whole")}), trials=14)
    values = [dict(trial.values) for trial in whole.trials]
    assert whole.best.value == min(trial.value for trial in whole.trials if trial.state == "done")
    pretended.clear()
    swept(recipe(), trials=5)
    folder = Path(recipe().output_dir) / "colors.sweep"
    kept = json.loads((folder / "sweep.json").read_text())
    kept["trials"][4] |= {
        "state": "open",
        "value": None,
        "step": None,
        "validations": [],
    }  # as when it was killed
    (folder / "sweep.json").write_text(json.dumps(kept))
    again = swept(recipe(), trials=14)
    assert [dict(trial.values) for trial in again.trials] == values
    assert [number for number, _ in pretended] == [0, 1, 2, 3, 4, 4, *range(5, 14)], "none that was finished"
    assert [trial.value for trial in again.trials] == [trial.value for trial in whole.trials]
    nothing_more = swept(recipe(), trials=14)
    assert nothing_more.trials == again.trials
    with pytest.raises(RunError, match="another one") as error:
        swept(recipe(), texts=SPACE[:1])
    assert "adapter.rank" in str(error.value)
    with pytest.raises(RunError, match="seed was 0, is 1"):
        swept(recipe(), seed=1)


def test_all_trials_share_all_but_their_values(recipe, pretended):
    swept(recipe(), trials=3)
    for number, given in pretended:
        changed = [line.split(" ")[0] for line in api.differences(recipe(), recipe.__call__(given))]
        assert set(changed) <= {"training.learning_rate", "adapter.rank"}
        assert given["evaluation"]["skip"], "no trial is measured on held-out questions before one is chosen"
        assert given["name"] == name_of(number)


def test_a_space_that_is_used_up_ends_the_sweep_and_says_so(recipe, pretended):
    done = swept(recipe(), ["adapter.rank=choice(2,4,8)"], trials=9)
    assert sorted(trial.values["adapter.rank"] for trial in done.trials) == [2, 4, 8]
    assert "used up after 3 trials" in " ".join(done.sentences())


def test_trials_that_lag_behind_are_pruned_and_failures_are_counted(recipe, pretended):
    done = swept(recipe(), trials=20, pruner="median")
    assert done.count("pruned") >= 2
    assert {trial.state for trial in done.trials} <= {"done", "pruned", "failed"}
    worst = max(trial.validations[0][1] for trial in done.trials if trial.state == "done")
    medians = [trial for trial in done.trials if trial.state == "pruned"]
    assert all("lags behind" in trial.reason for trial in medians)
    assert min(trial.validations[0][1] for trial in medians) < worst or done.count("done") == 4
    record = json.loads((done.folder / "sweep.json").read_text())
    assert record["counts"] == {state: done.count(state) for state in ("done", "pruned", "failed", "open")}
    assert sum(record["counts"].values()) == 20


def test_a_sweep_whose_first_trials_all_fail_ends_with_their_reason(recipe, pretended):
    with pytest.raises(RunError, match="first 3 trials have failed") as error:
        swept(recipe(), ["training.learning_rate=uniform(0.5,1)"], trials=9)
    assert "The loss is nan" in str(error.value)


def test_real_trials_are_runs_and_the_best_is_compared_on_held_out_questions(recipe, monkeypatch):
    """Three trials of two steps; the second is stopped by hand, and the sweep goes on with it."""
    done = sweeps.carried_out

    def stopped(number, given, **how):
        if number == 1 and not (Path(given["output_dir"]) / "stopped").exists():
            (Path(given["output_dir"]) / "stopped").touch()
            raise Interrupted("Stopped.")
        return done(number, given, **how)

    monkeypatch.setattr(sweeps, "carried_out", stopped)
    with pytest.raises(Interrupted, match="in trial 1 of 3"):
        api.sweep(recipe(), SPACE, trials=3, compared=1)
    found = api.sweep(recipe(), SPACE, trials=3, compared=1)
    assert [trial.state for trial in found.trials] == ["done"] * 3
    starts = 0
    for trial in found.trials:
        run = Run(found.folder / trial.name)
        assert run.state() == "done"
        best = run.read("best_model/best_model_info.json")
        assert (best["step"], best["eval_loss"]) == (trial.step, trial.value)
        assert run.recipe().adapter.rank == trial.values["adapter.rank"]
        assert not (run.evaluation / "scores.json").exists()
        starts += sum(event.get("state") == "training" for event in run.events())
    assert starts == 3
    assert found.best.value == min(trial.value for trial in found.trials)
    second = sorted(found.trials, key=lambda trial: trial.value)[1]
    assert [one.comparison.model.split(" ")[0] for one in found.against] == ["base", second.name]
    for one in found.against:
        c = one.comparison
        assert c.against == found.best.name
        assert c.n == 12, "of the 40 rows three tenths"
        if c.low is not None:
            assert one.low <= c.low <= c.high <= one.high, "wider, since they hold together"
    from tunesmith.compose import read_layer, validated

    best = validated(read_layer(found.recipe))
    assert best.adapter.rank == found.best.values["adapter.rank"]
    assert not best.evaluation.skip
    page = found.page.read_text()
    assert "flatters it" in page
    assert all(trial.name in page for trial in found.trials)


def test_the_verb_prints_the_table_and_refuses_unknown_engines(recipe, pretended, tmp_path):
    from typer.testing import CliRunner

    from tunesmith.cli import app
    from tunesmith.compose import as_yaml

    file = tmp_path / "recipe.yaml"
    file.write_text(as_yaml(recipe()))
    given = ["sweep", str(file), "--space", SPACE[0], "--trials", "2", "--json"]
    told = CliRunner().invoke(app, given)
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout.strip().splitlines()[-1])
    assert found["best"] == min(found["trials"], key=lambda trial: trial["value"])["name"]
    assert Path(found["recipe"]).is_file()
    refused = CliRunner().invoke(app, [*given, "--engine", "optune"])
    assert refused.exit_code == 1
    assert "Did you mean 'optuna'" in refused.output


def test_a_metric_that_rises_is_chosen_by_its_highest_value(recipe, pretended, monkeypatch):
    by = recipe({"training": {"best_by": "exact_match"}})
    study = sweeps._study(searched(by, *SPACE), {}, by, "none", 0, 0)
    assert study.direction.name == "MAXIMIZE"
    told = replace(swept(by, trials=3))
    assert told.best.value == max(trial.value for trial in told.trials if trial.state == "done")
