"""GRPO and RLOO through the product: our prompts and rewards in TRL's trainers, and what they make of them."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

from tunesmith import api, dataflow, models
from tunesmith.compose import compose, overlaid
from tunesmith.data import templates
from tunesmith.data.templates import end_of_turn_ids
from tunesmith.errors import DataError, Interrupted, RunError
from tunesmith.methods import METHODS, rewards, sampled
from tunesmith.recipe import GRPO, RLOO, Training
from tunesmith.training.fit import arguments
from tunesmith.training.run import Run, open_run

KINDS = ("grpo", "rloo")
FUNCTIONS = """
def letters(prompt, completion, reference):
    return sum(map(completion.lower().count, "aeiou")) / 10 + 0.01 * len(completion)
def constant(prompt, completion, reference):
    return 1.0
def picky(prompt, completion, reference):
    if prompt.row.number % 3 == 0:
        raise KeyError("no such thing")
    return float(len(completion))
def undefined(prompt, completion, reference):
    return float("nan")
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with reward functions, in which commands are run."""
    (tmp_path / "reward_functions.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    monkeypatch.delitem(__import__("sys").modules, "reward_functions", raising=False)
    return tmp_path


@pytest.fixture
def quick(here, tiny_model_folder, question_file):
    """A recipe of four steps of eight answers to two prompts, with changes."""

    def recipe(kind="grpo", **changes):
        layer = {
            "output_dir": str(here / "runs"),
            "model": {"base": str(tiny_model_folder)},
            "method": {
                "kind": kind, "num_generations": 4, "max_new_tokens": 6,
                "rewards": "reward_functions:letters", "beta": 0.1,
            },
            "data": {"dataset": str(question_file), "max_length": 64},
            "training": {
                "max_steps": 4, "per_device_train_batch_size": 8, "warmup_steps": 0, "learning_rate": 1e-2,
                "eval_steps": 2, "save_steps": 2, "logging_steps": 1, "scheduler": "linear",
                "gradient_accumulation_steps": 1,
            },
            "evaluation": {"skip": True},
        }  # fmt: skip
        return compose(overlaid(layer, changes)).recipe

    return recipe


def trainer_of(recipe, folder, name="made"):
    """The trainer that a recipe comes to, its run, and the prompts."""
    encodings = dataflow.encodings(recipe, dataflow.splits(recipe))
    plan = dataflow.plan(recipe, encodings, None, dataflow.asked(recipe, encodings))
    tokenizer, _ = dataflow._tokenizer(recipe)
    model = models.attach(
        models.load_model(recipe.model.base),
        recipe.adapter,
        gradient_checkpointing=False,
        merged_base=folder / "merged",
    )
    models.set_stop_tokens(model, tokenizer)
    path = folder / name
    path.mkdir()
    method = METHODS[recipe.method.kind]
    training, _, _ = method.settled(recipe.method, recipe.training, len(encodings.train))
    trainer = method.build(
        recipe.method,
        model=model,
        tokenizer=tokenizer,
        train=encodings.train,
        validation=encodings.validation,
        arguments=arguments(plan, training, recipe.tracking, name=name, staging=path / ".staging"),
        run=Run(path),
        keep=2,
    )
    return trainer, Run(path), encodings


def weights(folder):
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_asked_with_the_very_tokens_of_the_data(quick, here, kind):
    trainer, _, encodings = trainer_of(quick(kind), here)
    seen = []
    honest = trainer.model.generate

    def generate(**given):
        if not given["generation_config"].do_sample:
            return honest(**given)  # validation
        mask = given["attention_mask"].bool()
        seen.extend(row[kept].tolist() for row, kept in zip(given["input_ids"], mask, strict=True))
        config = given["generation_config"]
        assert (config.do_sample, config.temperature, config.top_k, config.max_new_tokens) == (
            True, 1.0, 0, 6,
        )  # fmt: skip
        assert config.eos_token_id == list(end_of_turn_ids(trainer.processing_class))
        return honest(**given)

    trainer.model.generate = generate
    trainer.train()
    by_ids = {tuple(e.input_ids): p for e, p in zip(encodings.train, encodings.train.examples, strict=True)}
    assert len(seen) == 4 * 8
    for ids in seen:
        prompt = by_ids[tuple(ids)]
        assert ids == templates.prompt_ids(prompt.messages, trainer.processing_class)
    groups = [tuple(map(tuple, seen[n : n + 4])) for n in range(0, len(seen), 4)]
    assert all(len(set(group)) == 1 for group in groups), "the answers of a group have one prompt"


def drawn(trainer):
    """One batch of answers with its rewards, as the trainer makes it."""
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    return trainer._generate_and_score_completions(batch), trainer._drawn[2]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_of_grpo_are_those_computed_by_hand(quick, here, scale):
    method = {"rewards": ["reward_functions:letters", {"kind": "metric", "name": "repetition", "weight": 3}]}
    trainer, _, _ = trainer_of(quick("grpo", method={**method, "scale_rewards": scale}), here)
    batch, scored = drawn(trainer)
    expected = [scored.columns["letters"][n] + 3 * scored.columns["repetition"][n] for n in range(8)]
    assert scored.totals == pytest.approx(expected)
    totals = scored.totals
    for n, advantage in enumerate(batch["advantages"].tolist()):
        group = totals[n // 4 * 4 : n // 4 * 4 + 4]
        among = group if scale == "group" else totals
        mean = sum(among) / len(among)
        spread = (sum((x - mean) ** 2 for x in among) / (len(among) - 1)) ** 0.5
        by_hand = (totals[n] - sum(group) / 4) / (1 if scale == "none" else spread + 1e-4)
        assert advantage == pytest.approx(by_hand, abs=1e-3)
    assert len({round(value, 5) for value in totals}) > 2, "negative control: the rewards differ"


def test_advantages_of_rloo_leave_each_answer_out_of_its_own_baseline(quick, here):
    trainer, _, _ = trainer_of(quick("rloo", method={"reward_clip": 0.25}), here)
    batch, scored = drawn(trainer)
    assert max(scored.totals) > 0.25, "something is clipped"
    totals = [min(value, 0.25) for value in scored.totals]  # at the start there is no divergence to take off
    for n, advantage in enumerate(batch["advantages"].tolist()):
        others = [totals[m] for m in range(n // 4 * 4, n // 4 * 4 + 4) if m != n]
        assert advantage == pytest.approx(totals[n] - sum(others) / 3, abs=1e-4)


def plain_logps(model, prompt, answer):
    """Log-probabilities of an answer's tokens, without padding, from the plain model's logits."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
    return [float(logits[len(prompt) + n - 1, token]) for n, token in enumerate(answer)]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_probabilities_are_those_without_padding(quick, here, tiny_model_folder, tiny_tokenizer, family):
    base = tiny_model_folder
    if family == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=len(tiny_tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=64,
            initializer_range=0.5, eos_token_id=tiny_tokenizer.eos_token_id, bos_token_id=None,
        )  # fmt: skip
        base = here / "gpt2"
        GPT2LMHeadModel(config).save_pretrained(base)
        tiny_tokenizer.save_pretrained(base)
    rows = [{"prompt": "red " * (n % 5) + str(n), "response": "one"} for n in range(40)]
    (here / "uneven.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {
        "model": {"base": str(base)},
        "data": {"dataset": str(here / "uneven.jsonl"), "near_duplicates": "ignore"},
        "training": {"per_device_train_batch_size": 16},
    }
    trainer, _, _ = trainer_of(quick("rloo", **changes), here)
    plain = models.load_model(str(base)).eval()
    batch, _ = drawn(trainer)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    with torch.no_grad():
        found, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, batch["completion_ids"].shape[1]
        )
    widths = batch["prompt_mask"].sum(-1)
    assert len(set(widths.tolist())) > 1, "something is padded"
    for n in range(len(widths)):
        prompt = batch["prompt_ids"][n][batch["prompt_mask"][n].bool()].tolist()
        kept = batch["completion_mask"][n].bool()
        expected = plain_logps(plain, prompt, batch["completion_ids"][n][kept].tolist())
        assert found[n][kept].tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_the_reference_is_the_start_and_stays_there(quick, here, tiny_model_folder, adapter):
    changes = {"adapter": {"kind": adapter}, "method": {"loss": "grpo"}}
    result = api.train(quick("grpo", **changes))
    run = Run(result.run)
    kl = [e["measures"]["kl"] for e in run.events() if e["kind"] == "step"]
    assert kl[0] == pytest.approx(0.0, abs=1e-6)
    assert all(value > 1e-7 for value in kl[1:])
    [said] = [e["value"] for e in run.events() if e.get("name") == "reference"]
    assert said == {"full": "copy", "lora": "adapter off"}[adapter]
    base, final = weights(tiny_model_folder), weights(run.final_model)
    if adapter == "lora":
        assert final
        assert all(".lora_" in name for name in final), "nothing but the adapter is saved"
        assert not (run.final_model / "ref").exists()
    else:
        assert any(not torch.equal(final[name], base[name]) for name in base)
    assert weights(tiny_model_folder).keys() == base.keys()


@pytest.mark.thorough  # as tests/test_methods.py, and to the end of a longer run
@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_to_be_trained_changes(quick, here, kind, adapter):
    trainer, _, _ = trainer_of(quick(kind, adapter={"kind": adapter, **({"rank": 2} if adapter == "lora" else {})}),
                               here)  # fmt: skip
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainable = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    changed = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert changed <= trainable
    if adapter == "lora":
        assert all(".lora_" in name for name in changed)
        assert sum(".lora_B" in name for name in changed) == sum(".lora_B" in n for n in trainable)


CASES = {
    "grpo": {"kind": "grpo"},
    "rloo": {"kind": "rloo"},
    "two steps on each batch": {"kind": "grpo", "num_iterations": 2},
}


@pytest.mark.parametrize(
    "case",  # tests/test_methods.py resumes every method
    [pytest.param(c, marks=() if c == "two steps on each batch" else pytest.mark.thorough) for c in CASES],
)
def test_a_resumed_run_is_the_straight_run(quick, here, monkeypatch, case):
    method = CASES[case]
    # Five steps an epoch: the stop is in the second one. An odd step splits the two steps on one batch.
    training = {"max_steps": 9, "save_steps": 1, "eval_steps": 3}
    straight = Run(api.train(quick(method["kind"], name="straight", method=method, training=training)).run)

    from tunesmith.training import callbacks

    honest = callbacks.StopOnRequest.on_step_end

    def interrupting(self, args, state, control, **kwargs):
        self.requested = self.requested or state.global_step == 7
        honest(self, args, state, control, **kwargs)

    monkeypatch.setattr(callbacks.StopOnRequest, "on_step_end", interrupting)
    with pytest.raises(Interrupted):
        api.train(quick(method["kind"], name="stopped", method=method, training=training))
    monkeypatch.setattr(callbacks.StopOnRequest, "on_step_end", honest)
    stopped = open_run(here / "runs/stopped")
    held = (stopped.checkpoints / "checkpoint-step-7" / sampled.BUFFER).exists()
    assert held == ("num_iterations" in method)
    api.resume(stopped.path)
    for folder in ("final_model", "checkpoints/checkpoint-step-9"):
        expected, found = weights(straight.path / folder), weights(stopped.path / folder)
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    measured = [
        {e["step"]: e["measures"].get("reward") for e in run.events() if e["kind"] == "step"}
        for run in (straight, stopped)
    ]
    assert measured[0] == measured[1]
    assert len(set(measured[0].values())) > 4, "negative control: rewards differ from step to step"


def test_validating_leaves_training_as_it_is_and_picks_the_best_by_reward(quick, here):
    often = Run(api.train(quick(name="often", training={"eval_steps": 1, "max_steps": 6})).run)
    never = Run(api.train(quick(name="never", data={"validation": 0.0, "held_out": 0.0},
                                training={"eval_steps": 1, "max_steps": 6})).run)  # fmt: skip
    assert [e["kind"] for e in never.events()].count("evaluation") == 0
    evaluations = {e["step"]: e for e in often.events() if e["kind"] == "evaluation"}
    assert len(evaluations) == 6
    for event in evaluations.values():
        assert event["loss"] == -event["measures"]["reward"]
        assert event["measures"]["rewards/letters/mean"] == event["measures"]["reward"]
    best = max(evaluations, key=lambda step: (evaluations[step]["measures"]["reward"], -step))
    result = often.read("training.json")
    assert result["step_of_final_model"] == best
    assert result["validation_loss"] == evaluations[best]["loss"]
    once = Run(api.train(quick(name="once", training={"eval_steps": 6, "max_steps": 6})).run)
    rewarded = [
        [e["measures"]["reward"] for e in run.events() if e["kind"] == "step"] for run in (often, once)
    ]
    assert rewarded[0] == rewarded[1]

    # the measure on validation prompts is what plain greedy generation and the function give
    recipe = often.recipe()
    encodings = dataflow.encodings(recipe, dataflow.splits(recipe))
    model, tokenizer = models.load_model(str(often.path)).eval(), models.load_tokenizer(str(often.path))
    found = []
    for encoding in encodings.validation:
        ids = torch.tensor([list(encoding.input_ids)])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False,
            eos_token_id=list(end_of_turn_ids(tokenizer)), pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        found.append(sum(map(text.lower().count, "aeiou")) / 10 + 0.01 * len(text))
    assert evaluations[best]["measures"]["reward"] == pytest.approx(sum(found) / len(found), abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("function", "said"), [("picky", "KeyError"), ("undefined", "nan")])
def test_a_reward_that_fails_stops_the_run_with_the_row(quick, here, kind, function, said):
    with pytest.raises(RunError) as error:
        api.train(quick(kind, method={"rewards": f"reward_functions:{function}"}))
    assert function in str(error.value)
    assert "questions.jsonl:" in str(error.value)
    assert said in str(error.value)


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo"])
def test_every_loss_trains(quick, here, loss):
    method = {"loss": loss, "importance": "sequence" if loss == "grpo" else "token", "mask_cut_answers": True}
    result = api.train(quick("grpo", method=method, training={"max_steps": 2}))
    steps = [e for e in Run(result.run).events() if e["kind"] == "step"]
    assert all(torch.isfinite(torch.tensor(e["grad_norm"])) for e in steps)


def test_what_is_logged_and_shown(quick, here):
    run = Run(api.train(quick("grpo")).run)
    measures = [e["measures"] for e in run.events() if e["kind"] == "step"][-1]
    for name in ("reward", "reward_std", "rewards/letters/mean", "rewards/letters/std", "kl", "entropy",
                 "completions/mean_length", "completions/clipped_ratio", "frac_reward_zero_std"):  # fmt: skip
        assert name in measures
    samples = [e for e in run.events() if e["kind"] == "sample"]
    assert {e["step"] for e in samples} == {1, 2, 3, 4}
    for event in samples:
        assert event["row"].startswith("questions.jsonl:")
        assert event["rewards"] == {"letters": event["reward"]}
        assert "<|" not in event["completion"]
    tokens = [e["tokens"] for e in run.events() if e["kind"] == "step"]
    assert tokens == sorted(tokens)
    assert tokens[0] > 8


@pytest.mark.parametrize(
    ("size", "steps", "group", "settled"),
    [(8, 1, 4, 1), (4, 1, 8, 2), (6, 1, 4, 2), (3, 2, 4, 4), (4, 3, 8, 4), (1, 1, 2, 2), (16, 2, 8, 2)],
)
def test_a_batch_that_holds_no_whole_groups_is_settled_and_said(size, steps, group, settled):
    training = Training(per_device_train_batch_size=size, gradient_accumulation_steps=steps)
    found, passes, decisions = sampled.settled(GRPO(num_generations=group, num_iterations=3), training, 1000)
    assert found.gradient_accumulation_steps == settled
    assert settled * size % group == 0
    assert passes == group * 3
    names = [decision.name for decision in decisions]
    assert ("gradient_accumulation_steps" in names) == (settled != steps)
    assert sum((steps + n) * size % group == 0 for n in range(settled - steps)) == 0, "the least that fits"


def test_too_few_prompts_for_a_step_are_an_error(quick, here):
    with pytest.raises(DataError, match="A step needs 50 prompts"):
        sampled.settled(RLOO(num_generations=2), Training(per_device_train_batch_size=100), 49)


def test_the_plan_counts_answers(quick, here):
    recipe = quick("grpo", training={"max_steps": None, "num_epochs": 2, "per_device_train_batch_size": 4,
                                     "gradient_accumulation_steps": 2})  # fmt: skip
    encodings = dataflow.encodings(recipe, dataflow.splits(recipe))
    plan = dataflow.plan(recipe, encodings, None, dataflow.asked(recipe, encodings))
    assert plan.examples == len(encodings.train)
    assert plan.total_steps == 2 * plan.steps_per_epoch
    assert plan.steps_per_epoch == -(-len(encodings.train) * 4 // 8)
    assert any("answers" in d.reason for d in plan.decisions if d.name == "total_steps")


@pytest.mark.parametrize("adapter", [{"init": "pissa"}, {"bias": "all"}])
def test_the_start_is_copied_where_switching_the_adapter_off_does_not_give_it(quick, here, adapter):
    section = {"kind": "lora", "rank": 2, "targets": "query-value", **adapter}
    run = Run(api.train(quick("grpo", adapter=section)).run)
    [decision] = [e for e in run.events() if e.get("name") == "reference"]
    assert decision["value"] == "copy"
    steps = [e["measures"]["kl"] for e in run.events() if e["kind"] == "step"]
    assert steps[0] == pytest.approx(0.0, abs=1e-6), "the reference is the model that training starts from"
    assert max(map(abs, steps)) > 1e-6


def test_prompts_alone_are_trained_on_and_measured(quick, here):
    rows = [{"prompt": f"name {n}", "max_words": 2} for n in range(40)]
    (here / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {
        "data": {"dataset": str(here / "asked.jsonl"), "format": "prompt"},
        "method": {"rewards": "constraints"},
        "evaluation": {"skip": False, "max_new_tokens": 4, "resamples": 100, "metrics": ["constraints"]},
    }
    result = api.train(quick("grpo", **changes))
    [compared] = result.comparisons
    assert compared.metric == "constraints"


def test_a_judges_calls_are_logged(quick, here, monkeypatch):
    made = rewards.Reward(
        "judge", 1.0, lambda p, c: [float(len(t)) for t in c], "", facts=lambda: {"calls": 5.0}
    )
    monkeypatch.setattr(rewards, "resolve", lambda *given, **named: [made])
    run = Run(api.train(quick("grpo", training={"max_steps": 1})).run)
    [event] = [e for e in run.events() if e["kind"] == "step"]
    assert event["measures"]["cost/judge/calls"] == 5.0


def test_copying_the_reference_leaves_the_policy_alone(quick, here):
    trainer, _, _ = trainer_of(quick("grpo"), here)
    reference = trainer.ref_model
    assert not any(p.requires_grad for p in reference.parameters())
    before = copy.deepcopy(reference.state_dict())
    trainer.train()
    assert all(torch.equal(before[name], value) for name, value in reference.state_dict().items())
