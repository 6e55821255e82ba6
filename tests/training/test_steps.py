"""A step that runs out of memory goes on with less of it, and one that meets no number stops and names the rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from tunesmith import api, dataflow
from tunesmith.compose import compose, overlaid
from tunesmith.errors import OutOfResources, TrainingDiverged
from tunesmith.methods import METHODS
from tunesmith.training import state
from tunesmith.training.run import Run, open_run

COLORS = ("red", "blue", "green", "one", "two")


def row(kind: str, n: int) -> dict[str, Any]:
    question = {"prompt": f"what is the count of {n}" + " and more" * (n % 3)}
    if kind in ("dpo", "reward", "orpo", "cpo", "simpo", "kto"):
        return {**question, "chosen": f"{COLORS[n % 5]} {n}", "rejected": f"no {COLORS[(n + 1) % 5]} rows"}
    return {**question, "response": f"{COLORS[n % 5]} {n}" + " yes" * (n % 4)}


@pytest.fixture
def made(tiny_model_folder, tiny_t5_folder, tmp_path):
    """A recipe of three steps of two forward passes of four rows."""

    def recipe(kind: str = "sft", **changes: Any):
        path = tmp_path / f"{kind}.jsonl"
        path.write_text("".join(json.dumps(row(kind, n)) + "\n" for n in range(40)))
        layer = {
            "output_dir": str(tmp_path / "runs"),
            "model": {"base": str(tiny_t5_folder if METHODS[kind].model == "seq2seq" else tiny_model_folder)},
            "method": {"kind": kind},
            "data": {"dataset": str(path), "max_length": 96},
            "training": {
                "max_steps": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "warmup_steps": 0,
                "learning_rate": 1e-2, "eval_steps": 2, "save_steps": 2, "logging_steps": 1,
                "load_best_model_at_end": False,
            },
            "evaluation": {"skip": True},
        }  # fmt: skip
        return compose(overlaid(layer, changes)).recipe

    return recipe


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: t for file in run.final_model.glob("*.safetensors") for name, t in load_file(file).items()}


def losses(run: Run) -> list[float]:
    return [event["loss"] for event in run.events() if event["kind"] == "step"]


@pytest.fixture
def short_of_memory(monkeypatch):
    """Have the passes of certain numbers run out of memory, or all of more than so many rows."""
    said = {
        "device": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        "host": lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        "python": MemoryError,
    }

    def install(*, calls=(), at="forward", kind="device", rows=None, rehearsing=False):
        fit, seen = dataflow.fit, {"forward": 0, "backward": 0, "evaluate": 0}

        def short(trainer, *args, **kwargs):
            model = trainer.model

            def before(module, given, named):
                if trainer.is_rehearsing is not rehearsing:
                    return
                ids = named.get("input_ids", given[0] if given else None)
                name = "forward" if module.training else "evaluate"
                seen[name] += 1
                if (name == at and seen[name] in calls) or (rows and len(ids) > rows):
                    raise said[kind]()

            model.register_forward_pre_hook(before, with_kwargs=True)

            def after(gradient):
                if trainer.is_rehearsing is not rehearsing:
                    return
                seen["backward"] += 1
                if at == "backward" and seen["backward"] in calls:
                    raise said[kind]()

            if at == "backward":
                # The first weights are reached last, when most of the gradient is already there. Where a hook looks
                # at its gradient, a tied table's is added up in another order (`forward/lookup.py`).
                next(p for p in model.parameters() if p.requires_grad).register_hook(after)
            return fit(trainer, *args, **kwargs)

        monkeypatch.setattr(dataflow, "fit", short)

    return install


def decisions(run: Run, name: str) -> list[dict[str, Any]]:
    return [event for event in run.events() if event["kind"] == "decision" and event["name"] == name]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Runs with memory enough, each made once."""
    folder, runs = tmp_path_factory.mktemp("straight"), {}

    def run(made, kind: str, **changes: Any) -> Run:
        name = f"{kind}-{'-'.join(changes)}"
        if name not in runs:
            recipe = made(kind, name=name, output_dir=str(folder), **changes)
            runs[name] = Run(api.train(recipe).run)
        return runs[name]

    return run


@pytest.mark.parametrize(
    ("kind", "at", "calls"),
    [
        ("sft", "backward", (2,)),
        pytest.param("sft", "forward", (1,), marks=pytest.mark.thorough),
        pytest.param("sft", "forward", (3, 4), marks=pytest.mark.thorough),
        pytest.param("dpo", "backward", (2,), marks=pytest.mark.slow),
        pytest.param("sft", "forward", (2,), marks=pytest.mark.thorough),
        pytest.param("sft", "forward", (6,), marks=pytest.mark.thorough),
        pytest.param("sft", "backward", (1,), marks=pytest.mark.thorough),
        pytest.param("sft", "backward", (5,), marks=pytest.mark.thorough),
        pytest.param("dpo", "forward", (1,), marks=pytest.mark.thorough),
        pytest.param("reward", "forward", (2,), marks=pytest.mark.thorough),
        pytest.param("seq2seq", "forward", (3,), marks=pytest.mark.thorough),
    ],
)
def test_a_step_that_runs_out_of_memory_is_taken_again_in_smaller_passes(
    made, straight, short_of_memory, kind, at, calls
):
    adapter = {"adapter": {"kind": "lora", "rank": 4}} if kind == "reward" else {}
    whole = straight(made, kind, **adapter)
    short_of_memory(calls=calls, at=at, kind="device" if at == "forward" else "host")
    run = Run(api.train(made(kind, name="short", **adapter)).run)
    found = decisions(run, "micro-batch")
    assert [d["value"] for d in found] == [2, 1][: len(found)]
    assert found, "negative control: nothing ran out"
    assert "with the same rows for each update" in found[0]["reason"]
    # T5 has dropout, of which smaller passes draw other numbers.
    assert losses(run) == pytest.approx(losses(whole), abs=0.05 if kind == "seq2seq" else 1e-5)
    one, other = weights(run), weights(whole)
    if kind != "seq2seq":
        assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in other)
    tokens = lambda r: [e["tokens"] for e in r.events() if e["kind"] == "step"]  # noqa: E731
    assert tokens(run) == tokens(whole)


@pytest.mark.thorough
def test_random_numbers_are_drawn_anew(made, straight, short_of_memory):
    """With dropout, all rows of the smaller passes but the first draw others; the step before does not."""
    changes = {"adapter": {"kind": "lora", "rank": 4, "dropout": 0.2}}
    whole = straight(made, "sft", **changes)
    short_of_memory(calls=(5,))
    run = Run(api.train(made(name="short", **changes)).run)
    assert losses(run)[:2] == losses(whole)[:2]
    assert losses(run)[2] == pytest.approx(losses(whole)[2], rel=0.05)


@pytest.mark.slow
def test_a_validation_that_runs_out_of_memory_is_made_in_halves(made, straight, short_of_memory):
    changes = {"data": {"validation": 0.3}}
    whole = straight(made, "sft", **changes)
    short_of_memory(calls=(1, 3), at="evaluate", kind="python")
    run = Run(api.train(made(name="short", **changes)).run)
    assert decisions(run, "validation batch")
    found = [[e["loss"] for e in r.events() if e["kind"] == "evaluation"] for r in (run, whole)]
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert torch.equal(next(iter(weights(run).values())), next(iter(weights(whole).values())))


@pytest.mark.slow
def test_a_checkpoint_that_runs_out_of_memory_is_written_again(made, monkeypatch):
    from tunesmith.training import state

    write, calls = state.write, []

    def short(trainer, folder):
        calls.append(folder)
        if len(calls) == 1:
            raise MemoryError
        write(trainer, folder)

    monkeypatch.setattr(state, "write", short)
    run = Run(api.train(made(name="short")).run)
    assert [d["value"] for d in decisions(run, "memory")] == ["saved again"]
    assert {p.name for p in run.checkpoints.iterdir()} == {"checkpoint-step-2", "checkpoint-step-3"}


@pytest.mark.slow
def test_where_one_row_is_too_much_the_numbers_are_told(made, short_of_memory):
    short_of_memory(rows=0.5)
    with pytest.raises(OutOfResources, match="step 1") as error:
        api.train(made(name="short"))
    assert "a single row of" in error.value.found
    assert "CUDA out of memory" in error.value.found


@pytest.mark.thorough
def test_a_loss_that_cannot_be_parted_says_so(made, short_of_memory):
    """The stock forward of ORPO gives all logits of a batch, which would be held whole however they are made."""
    short_of_memory(calls=(1,))
    with pytest.raises(OutOfResources) as error:
        api.train(made("orpo", name="short", training={"forward": "stock"}))
    assert "depends on the others of its batch" in error.value.found


REWARDED = {
    "method": {
        "num_generations": 4,
        "max_new_tokens": 6,
        "rewards": [{"kind": "metric", "name": "length_match"}],
    }
}
WHOLE = {
    "orpo": {}, "cpo": {"method": {"sft_weight": 0.5}}, "simpo": {}, "kto": {"data": {"max_length": 64}},
    "dpo": {"method": {"sft_weight": 1.0}}, "grpo": REWARDED, "rloo": REWARDED,
    "ppo": {"method": {"max_new_tokens": 6, "rewards": REWARDED["method"]["rewards"]}},
}  # fmt: skip
"""Methods in whose losses a row depends on the others of its batch, with options under which it does."""


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "orpo" else pytest.mark.thorough) for kind in WHOLE]
)
def test_a_batch_that_must_stay_whole_is_read_in_parts(made, straight, monkeypatch, kind):
    """The loss is that of the undisturbed run; a mean of the losses of parts would be another one."""
    adapter = {"adapter": {"kind": "lora", "rank": 4}} if kind in ("dpo", "kto") else {}
    changes = overlaid(WHOLE[kind], adapter)
    whole = straight(made, kind, **changes)
    fit, read, failed = dataflow.fit, [], []

    def short(trainer, *args, **kwargs):
        model = trainer.model.policy if kind == "ppo" else trainer.model
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model

        def before(module, given, named):
            if trainer.is_rehearsing or not (trainer.model.training and torch.is_grad_enabled()):
                return
            ids = named.get("input_ids", given[0] if given else None)
            if not failed:
                failed.append(1)
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            read.append(int(ids.numel()))

        inner.base_model.register_forward_pre_hook(before, with_kwargs=True)
        return fit(trainer, *args, **kwargs)

    monkeypatch.setattr(dataflow, "fit", short)
    run = Run(api.train(made(kind, name="short", **changes)).run)
    [found] = decisions(run, "micro-batch")
    assert failed
    assert found["value"] >= 1
    assert "with the same" in found["reason"]
    assert losses(run) == pytest.approx(losses(whole), abs=1e-5)
    one, other = weights(run), weights(whole)
    assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in other)
    logged = lambda r: [  # noqa: E731
        {n: v for n, v in e.get("measures", {}).items() if "time" not in n and "seconds" not in n}
        for e in r.events()
        if e["kind"] == "step"
    ]
    for mine, theirs in zip(logged(run), logged(whole), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-3, nan_ok=True)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["kto", "cpo"])
def test_a_validation_whose_batches_must_stay_whole_is_read_in_parts(made, straight, monkeypatch, kind):
    changes = overlaid(WHOLE[kind], {"data": {"validation": 0.3}})
    whole = straight(made, kind, **changes)
    fit, failed = dataflow.fit, []

    def short(trainer, *args, **kwargs):
        def before(module, given, named):
            if not trainer.model.training and len(failed) < 2:
                failed.append(1)
                raise MemoryError

        trainer.model.base_model.register_forward_pre_hook(before, with_kwargs=True)
        return fit(trainer, *args, **kwargs)

    monkeypatch.setattr(dataflow, "fit", short)
    run = Run(api.train(made(kind, name="short", **changes)).run)
    assert len(decisions(run, "validation batch")) == 2
    found = [[e["loss"] for e in r.events() if e["kind"] == "evaluation"] for r in (run, whole)]
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert losses(run) == losses(whole), "and training is as it was, to the bit"


# The fullest batch first


@pytest.fixture
def late(tmp_path):
    """Rows of which the longest comes at the last step."""
    order = torch.randperm(40, generator=torch.Generator().manual_seed(42)).tolist()
    rows = [row("sft", n) for n in range(40)]
    rows[order[22]]["prompt"] += " and more" * 8
    path = tmp_path / "late.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return {"data": {"dataset": str(path), "held_out": 0.0, "validation": 0.0}, "training": {"seed": 42}}


def test_the_fullest_batch_is_tried_first_and_undone(made, late, monkeypatch):
    """To the bit: a run that tries it is a run that does not."""
    fit, tried = dataflow.fit, []

    def watched(trainer, *args, rehearsal=None, **kwargs):
        assert rehearsal is not None

        def before(module, given, named):
            if trainer.is_rehearsing:
                tried.append((trainer.state.global_step, named["input_ids"].shape[-1]))

        trainer.model.register_forward_pre_hook(before, with_kwargs=True)
        assert (len(rehearsal.rows), rehearsal.step) == (4, 3)
        assert rehearsal.states == 8 * sum(p.numel() for p in trainer.model.parameters())
        return fit(trainer, *args, rehearsal=rehearsal if is_tried else None, **kwargs)

    monkeypatch.setattr(dataflow, "fit", watched)
    runs = []
    for is_tried in (True, False):
        runs.append(Run(api.train(made(name=f"tried-{is_tried}", **late)).run))
    assert len(tried) == 1, "in the first run, once"
    assert tried[0][0] == 0, "before the first step"
    widths = [e["tokens"] for e in runs[1].events() if e["kind"] == "step"]
    assert widths[2] - widths[1] > widths[1] - widths[0], "the fullest step is the last one"
    assert losses(runs[0]) == losses(runs[1])
    one, other = map(weights, runs)
    assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.slow
def test_memory_runs_out_before_the_first_step_or_not_at_all(made, late, straight, short_of_memory):
    whole = straight(made, "sft", **late)
    short_of_memory(calls=(1,), rehearsing=True)
    run = Run(api.train(made(name="short", **late)).run)
    [found] = decisions(run, "micro-batch")
    assert (found["step"], found["value"]) == (1, 2)
    assert "of step 3, the fullest batch of the run, which was tried before the first step" in found["reason"]
    assert losses(run) == pytest.approx(losses(whole), abs=1e-5)


@pytest.mark.thorough
def test_a_batch_that_will_never_fit_ends_the_run_before_its_first_step(made, late, short_of_memory):
    short_of_memory(rows=0.5, rehearsing=True)
    recipe = made(name="short", **late)
    with pytest.raises(OutOfResources, match="step 3 of the run, whose batch is the fullest one") as error:
        api.train(recipe)
    assert "a single row of" in error.value.found
    assert not (Path(recipe.output_dir) / "short").exists(), "nothing was trained, and the name is free again"


@pytest.fixture
def poisoned(monkeypatch):
    """Have one row's answer, or the gradient or the weights of a step, be no number."""

    def install(what: str, *, mark: str = "", step: int = 2):
        fit = dataflow.fit

        def bad(trainer, *args, **kwargs):
            compute, ids = trainer.compute_loss, trainer.processing_class

            def loss_of(model, inputs, *given, **named):
                found = compute(model, inputs, *given, **named)
                texts = ids.batch_decode(inputs["input_ids"])
                hit = what == "loss" and trainer.model.training and any(mark in text for text in texts)
                return found * float("nan") if hit and not isinstance(found, tuple) else found

            trainer.compute_loss = loss_of
            parameter = next(trainer.model.parameters())
            if what == "gradient":
                parameter.register_hook(
                    lambda g: g * float("inf") if trainer.state.global_step == step - 1 else g
                )
            if what == "weights":

                def spoil(*_):
                    if trainer.state.global_step == step - 1:
                        parameter.data[0, 0] = float("nan")

                trainer.model.register_forward_pre_hook(spoil)
            return fit(trainer, *args, **kwargs)

        monkeypatch.setattr(dataflow, "fit", bad)

    return install


def test_a_loss_that_is_no_number_names_its_row_by_file_and_number(made, poisoned):
    poisoned("loss", mark="count of 17")
    recipe = made(name="bad", training={"max_steps": 9, "save_steps": 1})
    with pytest.raises(TrainingDiverged, match="The loss is not a number at step") as error:
        api.train(recipe)
    assert error.value.found == "row sft.jsonl:18", "counted from 1, and no other row of its batch"
    run = open_run(Path(recipe.output_dir) / "bad")
    kept = sorted(run.checkpoints.iterdir()) if run.checkpoints.exists() else []
    assert all(torch.isfinite(t).all() for f in kept for t in load_file(f / "model.safetensors").values())


@pytest.mark.parametrize("what", ["gradient", pytest.param("weights", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["sft", pytest.param("dpo", marks=pytest.mark.thorough)])
def test_gradients_and_weights_that_are_no_numbers_stop_before_the_update(made, poisoned, kind, what):
    poisoned(what)
    recipe = made(kind, name="bad", training={"save_steps": 1})
    with pytest.raises(
        TrainingDiverged, match=f"The {what}.* at step 2; the weights were not updated"
    ) as error:
        api.train(recipe)
    assert error.value.found.count(f"{kind}.jsonl:") == 8, "all rows of the step"
    run = open_run(Path(recipe.output_dir) / "bad")
    assert [p.name for p in run.checkpoints.iterdir()] == ["checkpoint-step-1"]
    assert run.state() == "failed"


@pytest.mark.thorough
def test_rows_of_packed_blocks_are_named_too(made, poisoned):
    poisoned("loss", mark="count of 17")
    with pytest.raises(TrainingDiverged) as error:
        api.train(made(name="bad", data={"packing": True}, training={"max_steps": 20}))
    assert "sft.jsonl:18" in error.value.found


@pytest.mark.slow
def test_the_plain_trainer_ends_well_with_weights_that_are_no_numbers(tmp_path, tiny_model_folder):
    """The control of what is tested above."""
    from test_checkpoints import trainer_of
    from transformers import Trainer

    from tunesmith.recipe import Recipe
    from tunesmith.training.run import create

    run = create(Recipe(output_dir=str(tmp_path), name="plain"))
    trainer = trainer_of(run, tiny_model_folder, Trainer)
    with torch.no_grad():
        next(trainer.model.parameters())[0, 0] = float("nan")
    trainer.train()
    assert (run.staging / "checkpoint-4" / "model.safetensors").exists()


@pytest.mark.thorough
def test_memory_of_this_machine_that_really_runs_out(made, tmp_path, monkeypatch):
    """The address space is limited for real, while it trains, to less than a step of all rows at once needs."""
    import resource

    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps(row("sft", n)) + "\n" for n in range(1500)))
    recipe = made(
        name="limited", data={"dataset": str(path)},
        training={"per_device_train_batch_size": 1024, "gradient_accumulation_steps": 1, "max_steps": 1},
    )  # fmt: skip
    api.train(made(name="warm"))  # what is imported and allocated once
    fit = dataflow.fit

    def limited(*args, **kwargs):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        try:
            resource.setrlimit(resource.RLIMIT_AS, (used + 60 * 2**20, hard))
            return fit(*args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))

    monkeypatch.setattr(dataflow, "fit", limited)
    run = Run(api.train(recipe).run)
    assert decisions(run, "micro-batch")
    assert len(losses(run)) == 1


# Memory runs out anywhere


MADE_FOR = {
    "_save_checkpoint": "a save", "save_model": "the model", "evaluate": "a validation",
    "_init_group": "an update", "adam": "an update", "backward": "a backward pass", "compute_loss": "a forward pass",
    "get_batch_samples": "a batch",
}  # fmt: skip
"""What tensors are made for, by the function that makes them, those that call others first."""


class Short(TorchDispatchMode):
    """Counts the operations that make tensors, by what they are made for, and has the memory run out at one."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.made = at, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(returned.alias_info is None for returned in func._schema.returns):
            self.count()
        return func(*args, **(kwargs or {}))

    def count(self) -> None:
        frame, names = sys._getframe(), set()
        while frame:
            names.add(frame.f_code.co_name)
            frame = frame.f_back
        self.made.append(next((what for name, what in MADE_FOR.items() if name in names), "what is between"))
        if len(self.made) == self.at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.fixture
def short_at(made, monkeypatch):
    """Trains with the memory running out once, at the operation of a number, and tells what all of them were for."""
    changes = {
        "data": {"validation": 0.2}, "training": {"save_steps": 1}, "evaluation": {"samples": 1, "max_new_tokens": 2},
    }  # fmt: skip

    def run(at: int) -> tuple[Run, list[str]]:
        fit, save_file, short = dataflow.fit, state.save_file, Short(at)

        def fitted(trainer, *args, **kwargs):
            with short:
                return fit(trainer, *args, **kwargs)

        def saved(*args, **kwargs):
            short.count()
            return save_file(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(dataflow, "fit", fitted)
            patch.setattr(state, "save_file", saved)
            return Run(api.train(made(name=f"at-{at}", **changes)).run), short.made

    return run


@pytest.mark.parametrize(
    "wanted",
    [
        pytest.param("each thing once", marks=pytest.mark.slow),
        pytest.param("every update", marks=pytest.mark.thorough),
        *(pytest.param(f"part {n} of everywhere", marks=pytest.mark.thorough) for n in range(4)),
    ],
)
def test_memory_may_run_out_at_any_call(short_at, wanted):
    """Operations that make a tensor, one in turn: sixty evenly spread from the first to the last of a run, in four
    parts, and each one of every update."""
    whole, made_for = short_at(0)
    numbers = {what: [k for k, each in enumerate(made_for, 1) if each == what] for what in made_for}
    assert numbers.keys() == {*MADE_FOR.values(), "what is between"}
    match wanted:
        case "each thing once":  # passes, validations and saves have tests of their own
            chosen = [numbers[what][len(numbers[what]) // 2] for what in ("the model",)]
            first = len(numbers["an update"]) // 4  # its states are made
            chosen += [numbers["an update"][place] for place in (first, -first)]
        case "every update":
            chosen = numbers["an update"]
        case _:
            chosen = list(range(1, len(made_for) + 1, len(made_for) // 60))[int(wanted.split()[1]) :: 4]
    told = []
    for at in chosen:
        run, again = short_at(at)
        where = f"{made_for[at - 1]} ({at} of {len(made_for)})"
        assert again[:at] == made_for[:at], where
        said = [
            e["name"] for e in run.events() if e["kind"] == "decision" and "memory ran out" in e["reason"]
        ]
        assert len(said) == 1, where
        told += said
        assert losses(run) == pytest.approx(losses(whole), abs=1e-5), where
        one, other = weights(run), weights(whole)
        assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in other), where
        if said == ["memory"]:  # taken back to a checkpoint, nothing is another
            assert all(torch.equal(one[name], other[name]) for name in other), where
    assert "memory" in told


@pytest.mark.slow
def test_an_update_that_never_fits_ends_the_run_after_one_more_try(made, monkeypatch):
    from torch.optim import AdamW

    tried, group = [], AdamW._init_group

    def short(self, *args, **kwargs):
        tried.append(len(self.state))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(AdamW, "_init_group", short)
    recipe = made(name="short")
    with pytest.raises(OutOfResources, match="The memory is not enough") as error:
        api.train(recipe)
    assert tried == [0, 0]
    assert "CUDA out of memory" in error.value.found
    assert not (Path(recipe.output_dir) / "short").exists(), "nothing was trained, and the name is free again"
    monkeypatch.setattr(AdamW, "_init_group", group)
    assert len(losses(Run(api.train(recipe).run))) == 3
