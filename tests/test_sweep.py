"""Sweeps: a space that is checked first, trials that go on, a choice that held-out questions had no part in."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest

from tunesmith import api, launch, on_ray, sweeps
from tunesmith.compose import as_yaml, compose, overlaid
from tunesmith.errors import (
    Interrupted,
    OutOfMemory,
    OutOfResources,
    RecipeError,
    RunError,
    TrainingDiverged,
    as_ours,
)
from tunesmith.recipe import Recipe
from tunesmith.sweeps import page
from tunesmith.sweeps import space as spaces
from tunesmith.sweeps.trials import Pruned, Trial, carried_out, name_of
from tunesmith.training.continuing import differences
from tunesmith.training.run import Run, create

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
        ("training.learning_rate", "says no values"),
        ("training.learning_rate=loguniform(0,1)", "lower end above 0"),
        ("training.learning_rate=uniform(2,1)", "below the higher one"),
        ("training.learning_rate=uniform(-1,1)", "has to be greater than 0"),
        ("training.weight_decay=choice(0.1,much)", "takes a number"),
        ("training.scheduler=choice(cosine,lineer)", "Did you mean 'linear'"),
        ("adapter.rank=uniform(2,8)", "write int(2, 8)"),
        ("adapter.rank=choice(2,2)", "twice"),
        ("training.warmup_steps=int(0,1.5)", "whole numbers"),
        ("training.seed=int(0,9)", "share the seed"),
        ("data.max_length=choice(32,64)", "same rows"),
        ("data=choice(1)", "is a section"),
        ("parallel.kind=choice(ddp,fsdp)", "nothing of what a trial learns"),
        ("training.gradient_checkpointing=choice(true,false)", "nothing of what a trial learns"),
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
    several = recipe(
        {"launch": {"kind": "accelerate", "processes": 2}, "training": {"gradient_accumulation_steps": 1}}
    )
    with pytest.raises(RecipeError, match=r"do not fit together: training\.per_device_train_batch_size=3"):
        searched(several, "training.per_device_train_batch_size=choice(4,3)")
    with pytest.raises(RecipeError, match=r"per_device_train_batch_size=3"):
        searched(several, "training.per_device_train_batch_size=int(2,4)")
    dpo = recipe({"method": {"kind": "dpo"}})
    with pytest.raises(RecipeError, match="what its loss means"):
        searched(dpo, "method.beta=choice(0.1,0.3)")


def test_a_field_that_is_given_twice_is_refused_with_both(recipe, tmp_path):
    file = tmp_path / "space.yaml"
    file.write_text("adapter: {rank: [2, 4]}\n")
    with pytest.raises(RecipeError, match=r"adapter\.rank is given twice") as error:
        searched(recipe(), str(file), "adapter.rank=choice(8,16)")
    assert str(file) in str(error.value)
    assert "choice(8,16)" in str(error.value)


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


def test_a_kind_is_searched_with_the_fields_that_it_has(recipe):
    given = recipe({"adapter": {"dropout": 0.1}})
    space = searched(given, "adapter.kind=choice(lora,qlora,freeze,full)")
    found = [spaces.settled(given, {"adapter.kind": kind}).adapter for kind in space["adapter.kind"].values]
    assert [one.kind for one in found] == ["lora", "qlora", "freeze", "full"]
    assert [(one.rank, one.dropout) for one in found[:2]] == [(4, 0.1)] * 2, "what was set, where it is known"
    with pytest.raises(RecipeError, match=r"do not fit together: adapter\.kind=freeze, adapter\.rank=2"):
        searched(given, "adapter.kind=choice(lora,freeze)", "adapter.rank=choice(2,4)")


@pytest.mark.parametrize(
    "ends",
    [
        ("int(1000000, 2000000)", "int(1000001, 2000000)"),
        ("uniform(0.12345678, 1)", "uniform(0.12345679, 1)"),
    ],
)
def test_spaces_that_differ_are_written_differently(ends):
    written = [str(spaces.distribution(text)) for text in ends]
    assert written == list(ends)


# Trials


@pytest.fixture
def pretended(monkeypatch):
    """Trials whose loss is a function of their learning rate, at once."""
    carried = []

    def carried_out(number, given, *, report, watch=None):
        loss = pretended_loss(given["training"]["learning_rate"])
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
    monkeypatch.setattr(sweeps, "_compared", lambda *given: sweeps.Compared(()))
    return carried


def pretended_loss(rate):
    return abs(math.log10(rate) + 3)


def swept(recipe, texts=SPACE, trials=6, pruner="none", seed=0, watch=lambda event: None):
    space = searched(recipe, *texts)
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
        own = Recipe.model_validate(given)
        changed = [line.split(" ")[0] for line in differences(recipe(), own)]
        assert set(changed) <= {"training.learning_rate", "adapter.rank"}
        assert given["evaluation"]["skip"], "no trial is measured on held-out questions before one is chosen"
        assert given["name"] == name_of(number)


def test_a_space_that_is_used_up_ends_the_sweep_and_says_so(recipe, pretended):
    space = ["adapter.rank=choice(1,2,3,4,5)", "training.warmup_steps=int(0,3)"]
    done = swept(recipe(), space, trials=25)
    assert len({tuple(trial.values.values()) for trial in done.trials}) == 20, (
        "each combination, and none twice"
    )
    assert "used up after 20 trials" in " ".join(done.sentences())


def test_trials_that_lag_behind_are_pruned_and_failures_are_counted(recipe, pretended):
    done = swept(recipe(), trials=20, pruner="median")
    assert done.count("pruned") >= 2
    ended = []  # the validations of trials that were done by then
    for trial in done.trials:
        loss = pretended_loss(trial.values["training.learning_rate"])
        state, best = "failed" if loss > 0.95 else "done", math.inf
        for step in (1, 2):
            best = min(best, loss + 1 / step)
            if len(ended) >= sweeps.STARTUP and best > statistics.median(one[step] for one in ended):
                state = "pruned"
                break
        assert trial.state == state, trial
        if state == "done":
            ended.append({1: loss + 1, 2: loss + 0.5})
        if state == "pruned":
            assert "lags behind" in trial.reason
    record = json.loads((done.folder / "sweep.json").read_text())
    assert record["counts"] == {state: done.count(state) for state in ("done", "pruned", "failed", "open")}
    assert sum(record["counts"].values()) == 20


def test_asha_lets_the_best_quarter_go_on(recipe, pretended):
    done = swept(recipe(), trials=16, pruner="asha")
    seen = []
    for trial in done.trials:
        first = pretended_loss(trial.values["training.learning_rate"]) + 1
        among = sorted([*seen, first])
        assert (trial.state == "pruned") == (first > among[max(len(among) // 4, 1) - 1]), trial
        if trial.state != "failed":
            seen.append(first)
    assert done.count("pruned") >= 4


def test_trials_in_processes_of_their_own_are_not_pruned_and_that_is_said(recipe, pretended):
    several = recipe({"launch": {"kind": "accelerate", "processes": 2}})
    done = swept(several, trials=12, pruner="median")
    assert done.count("pruned") == 0
    assert "No trial was pruned: trials train in processes of their own" in " ".join(done.sentences())


@pytest.fixture
def on_pretended_ray(monkeypatch):
    """What Ray is asked for, and trials that end there: of three validations the middle one is the best."""
    given = {}

    def tried(asked, section, *, record, told, **how):
        given.update(how, asked=[one["number"] for one in asked], workers=section.workers)
        for one in asked:
            for step, value in ((1, 3.0), (2, 1.0), (2, 1.0), (3, 2.0)):  # the second told again
                told(one["number"], step, value)
            kept = json.loads((Path(one["recipe"]["output_dir"]) / "sweep.json").read_text())
            assert [trial["state"] for trial in kept["trials"]].count("open") >= 1
            if one["number"] % 2:
                record({"number": one["number"], "state": "pruned", "reason": "by ASHA"})
            else:
                record({"number": one["number"], "state": "done", "value": 1.0, "step": 2})

    monkeypatch.setattr(on_ray, "tried", tried)
    monkeypatch.setattr(sweeps, "_compared", lambda *given: sweeps.Compared(()))
    return given


def test_trials_at_once_are_drawn_without_repeats_and_know_their_best_validation(recipe, on_pretended_ray):
    """Each trains in one worker: eight rows to a step, and three workers, are no contradiction."""
    asked = recipe({"launch": {"kind": "ray", "workers": 3}, "training": {"gradient_accumulation_steps": 1}})
    done = api.sweep(asked, ["training.max_steps=choice(2,4,6)"], trials=9, engine="ray")
    assert on_pretended_ray["asked"] == [0, 1, 2]
    assert on_pretended_ray["horizon"] == 6, "the longest trial's steps"
    assert sorted(trial.values["training.max_steps"] for trial in done.trials) == [2, 4, 6]
    assert "used up after 3 trials" in " ".join(done.sentences())
    pruned = done.trials[1]
    assert (pruned.state, pruned.step, pruned.value) == ("pruned", 2, 1.0)
    assert pruned.validations == ((1, 3.0), (2, 1.0), (3, 2.0))


def test_a_sweep_of_ray_that_goes_on_without_it_denies_no_trial_that_was_pruned(
    recipe, on_pretended_ray, pretended
):
    asked = recipe({"launch": {"kind": "ray", "workers": 2}})
    assert api.sweep(asked, SPACE, trials=4, engine="ray").count("pruned") == 2
    for trials, said in ((6, "No further trial was pruned"), (6, ""), (4, "")):
        done = swept(asked, trials=trials, pruner="median")
        told = " ".join(done.sentences())
        assert done.count("pruned") == 2
        assert "No trial was" not in told
        assert said in told
        assert said or "No further" not in told


def test_what_its_values_bring_about_fails_a_trial_and_all_else_ends_the_sweep(recipe, monkeypatch):
    def trial(error):
        def train(recipe, *, watch):
            watch({"kind": "evaluation", "step": 1, "loss": 2.0})
            raise error

        monkeypatch.setattr(api, "train", train)
        return carried_out(7, recipe().model_dump(mode="json"), report=lambda step, value: None)

    for error in (TrainingDiverged("The loss is nan."), OutOfMemory("The memory is not enough.")):
        found = trial(error)
        assert (found.state, found.value, found.reason) == ("failed", 2.0, error.problem)
    assert isinstance(as_ours(MemoryError("of the device")), OutOfMemory)
    told = {
        "problem": "The loss is nan.",
        "found": None,
        "fix": None,
        "exit_code": 3,
        "class": "TrainingDiverged",
    }
    first = (0, SimpleNamespace(signal_name=lambda: "<N/A>", exitcode=3))
    started = launch._why(SimpleNamespace(get_first_failure=lambda: first), {"error": told}, 2)
    assert trial(started).state == "failed", "in started processes as well"
    with pytest.raises(OutOfResources, match="disk"):
        trial(OutOfResources("The disk is full."))


def test_a_trial_that_goes_on_reports_its_earlier_validations_but_never_its_last_step(recipe, monkeypatch):
    given = recipe({"name": "trial-000"})
    folder = Path(given.output_dir) / "trial-000"
    run = create(given)
    run.event("state", state="training", step=0, total_steps=3)
    run.event("evaluation", step=1, loss=2.0)

    def resume(path, *, watch):
        assert path == folder
        watch({"kind": "evaluation", "step": 2, "loss": 1.5})
        watch({"kind": "evaluation", "step": 3, "loss": 1.0})

    monkeypatch.setattr(api, "resume", resume)
    reported = []
    found = carried_out(0, given.model_dump(mode="json"), report=lambda *one: reported.append(one))
    assert reported == [(1, 2.0), (2, 1.5)]
    assert found.validations == ((1, 2.0), (2, 1.5), (3, 1.0))


def test_plots_hide_no_trial_of_a_rising_metric(recipe, pretended):
    done = swept(recipe({"training": {"best_by": "exact_match"}}), trials=1)
    values = (0.1, 0.1, 0.2, 0.9)
    trials = tuple(Trial(n, dict(done.best.values), "done", value, 1) for n, value in enumerate(values))
    rising = sweeps.replace(done, trials=trials, best=trials[3])
    assert page._heights(rising) == (0.1, 0.9)
    assert "upper edge" not in page.page(rising)
    falling = sweeps.replace(rising, by="loss", best=trials[0])
    assert page._heights(falling)[1] == pytest.approx(0.6)
    assert "1 trial above 0.6 at the upper edge" in page.page(falling)


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
    events = Run(found.folder / found.best.name).events()
    [held_out] = [event["rows"]["held_out"] for event in events if event.get("state") == "prepared"]
    second = sorted(found.trials, key=lambda trial: trial.value)[1]
    assert [one.comparison.model.split(" ")[0] for one in found.against] == ["base", second.name]
    for one in found.against:
        c = one.comparison
        assert c.against == found.best.name
        assert c.n == held_out > 0
        if c.low is not None:
            assert one.low <= c.low <= c.high <= one.high, "wider, since they hold together"
    monkeypatch.setattr(api, "compare", lambda *given, **how: pytest.fail("compared again"))
    again = api.sweep(recipe(), SPACE, trials=3, compared=1)
    assert again.against == found.against, "kept, since nothing has changed"
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


def test_workers_that_share_prompts_are_refused_without_their_engine(recipe, question_file, tmp_path):
    from typer.testing import CliRunner

    from tunesmith.cli import app

    asked = ["generate", "tiny", str(question_file), "--output", str(tmp_path / "answers.jsonl")]
    refused = CliRunner().invoke(app, [*asked, "--shards", "2"])
    assert refused.exit_code == 1
    assert "--shards is for the engine ray" in refused.output
    with pytest.raises(RecipeError, match=r"evaluation\.shards is for the engine 'ray'"):
        api.train(recipe({"evaluation": {"shards": {"workers": 8}}}))


def test_a_metric_that_rises_is_chosen_by_its_highest_value(recipe, pretended, monkeypatch):
    by = recipe({"training": {"best_by": "exact_match"}})
    search = sweeps._Search(
        by, searched(by, *SPACE), {}, Path(), 1, "optuna", "none", 0, lambda trial: None, lambda event: None
    )
    study = sweeps._study(search, 0)
    assert study.direction.name == "MAXIMIZE"
    told = swept(by, trials=3)
    assert told.best.value == max(trial.value for trial in told.trials if trial.state == "done")
