"""PPO through the Trainer: what is trained and saved, resume, seeds, probabilities computed in several ways."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file

from tunesmith import api, models
from tunesmith.compose import compose
from tunesmith.errors import ModelError, RecipeError, RunError
from tunesmith.methods import ppo_trainer as ppo
from tunesmith.methods.rewards import Scored
from tunesmith.recipe import PPO, Freeze, Full, LoRA
from tunesmith.training.run import Run

ADAPTERS = {
    "full": Full(),
    "freeze": Freeze(ratio=0.5),
    "lora": LoRA(rank=4, dropout=0.1),
    "lora-bias": LoRA(rank=4, bias="all"),
}


@dataclass
class Asked:
    input_ids: tuple[int, ...]


@pytest.fixture
def made(tiny_model_folder, tmp_path):
    """A trainer on a dozen prompts, whose answers are rewarded by a function of their text."""

    def make(section=None, *, adapter="full", score=None, run="run", steps=4, prompts=12, **arguments):
        torch.manual_seed(0)
        tokenizer = models.load_tokenizer(str(tiny_model_folder))
        model = models.attach(models.load_model(str(tiny_model_folder)), ADAPTERS[adapter])
        folder = tmp_path / run
        folder.mkdir(exist_ok=True)
        asked = [Asked(tuple(tokenizer(f"what is {'one ' * (n % 3)}{n}").input_ids)) for n in range(prompts)]
        options = {
            "output_dir": str(folder / ".staging"), "max_steps": steps, "learning_rate": 1e-3,
            "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_strategy": "steps",
            "save_steps": 2, "logging_steps": 1, "report_to": ["none"], "use_cpu": True, "seed": 3,
            "remove_unused_columns": False, "disable_tqdm": True, "lr_scheduler_type": "linear",
            "logging_nan_inf_filter": False, "include_num_input_tokens_seen": "non_padding",
        }  # fmt: skip

        def by_length(numbers, texts):
            return Scored([len(t) / 10 for t in texts], {"length": [len(t) / 10 for t in texts]})

        return ppo.trainer(
            section or PPO(max_new_tokens=6, ppo_epochs=2, num_minibatches=2),
            model=model,
            tokenizer=tokenizer,
            train=asked,
            validation=asked[:3],
            score=score or by_length,
            arguments={**options, **arguments},
            run=Run(folder),
            keep=5,
        )

    return make


def parameters(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


MEASURES = (
    "reward", "reward_std", "rewards/length/mean", "rewards/length/std", "kl", "kl_coefficient", "policy_loss",
    "value_loss", "entropy", "approx_kl", "clip_fraction", "explained_variance", "completions/mean_length",
    "completions/clipped_ratio", "objective", "seconds/generation", "seconds/learning",
)  # fmt: skip


@pytest.mark.parametrize(
    ("adapter", "value"),
    [
        ("full", "trunk"),
        ("lora", "critic"),
        pytest.param("freeze", "critic", marks=pytest.mark.thorough),
        pytest.param("lora", "trunk", marks=pytest.mark.thorough),
        pytest.param("lora-bias", "trunk", marks=pytest.mark.thorough),
    ],
)
def test_only_what_the_adapter_names_is_trained_and_a_resumed_run_is_the_straight_one(made, adapter, value):
    section = PPO(
        max_new_tokens=6, ppo_epochs=2, num_minibatches=2, value=value, kl_target=0.01, kl_horizon=40
    )
    straight = made(section, adapter=adapter)
    before = parameters(straight)
    straight.train()
    after = parameters(straight)
    for name in before:
        is_changed = not torch.equal(before[name], after[name])
        is_trained = dict(straight.model.named_parameters())[name].requires_grad
        assert is_changed <= is_trained, name
    assert any(not torch.equal(before[n], after[n]) for n in before if n.startswith("policy."))
    assert not torch.equal(before["value_head.weight"], after["value_head.weight"])
    for name in MEASURES:
        assert len(logged(straight, name)) == 4, name
        assert all(map(math.isfinite, logged(straight, name))), name
    # KL is 0 until something is learned, and the coefficient has followed it
    assert logged(straight, "kl")[0] == pytest.approx(0, abs=1e-5)
    assert logged(straight, "kl_coefficient")[:2] == [0.05, pytest.approx(0.05 * (1 - 0.2 * 4 / 40))]

    # A run that was stopped after two steps
    resumed = made(section, adapter=adapter, run="resumed")
    resumed.train(resume_from_checkpoint=str(straight.run_folder.checkpoints / "checkpoint-step-2"))
    for name, weight in parameters(resumed).items():
        assert torch.equal(weight, after[name]), name
    assert resumed.kl_coefficient == straight.kl_coefficient
    assert logged(resumed, "reward") == logged(straight, "reward")
    assert logged(resumed, "kl") == logged(straight, "kl")


def test_a_checkpoint_is_a_plain_model_with_the_value_beside_it(made, tiny_model_folder):
    from transformers import AutoModelForCausalLM

    trainer = made()
    trainer.train()
    folder = trainer.run_folder.checkpoints / "checkpoint-step-4"
    plain = AutoModelForCausalLM.from_pretrained(folder)
    own = dict(trainer.model.policy.named_parameters())
    assert all(torch.equal(p, own[name]) for name, p in plain.named_parameters())
    assert set(load_file(folder / "value.safetensors")) == {"value_head.weight", "value_head.bias"}
    assert "value" not in "".join(load_file(folder / "model.safetensors"))
    assert json.loads((folder / "ppo.json").read_text())["kl_coefficient"] == 0.05
    assert not list(folder.glob("*.bin"))


def test_the_seed_decides(made):
    first, again, other = (made(run=f"run{n}", seed=seed, steps=2) for n, seed in enumerate((3, 3, 4)))
    for trainer in (first, again, other):
        trainer.train()
    assert logged(first, "reward") == logged(again, "reward")
    assert logged(first, "reward") != logged(other, "reward")
    for (name, one), two in zip(parameters(first).items(), parameters(again).values(), strict=True):
        assert torch.equal(one, two), name


def test_the_learning_rate_steps_with_rollouts(made):
    trainer = made(steps=4)
    trainer.train()
    assert trainer.state.global_step == 4
    assert logged(trainer, "learning_rate") == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])
    counts = {int(state["step"]) for state in trainer.optimizer.state.values()}
    assert counts == {4 * 2 * 2}  # rollouts x passes x minibatches


def test_the_value_has_a_learning_rate_of_its_own(made):
    section = PPO(max_new_tokens=4, ppo_epochs=1, value_learning_rate=0.5)
    trainer = made(section, steps=1, lr_scheduler_type="constant")
    trainer.train()
    rates = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    for name, parameter in trainer.model.named_parameters():
        assert rates[id(parameter)] == (0.5 if name.startswith("value_head") else 1e-3), name


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_the_reference_is_the_model_that_training_started_from(made, adapter):
    trainer = made(adapter=adapter, steps=2)
    start = copy.deepcopy(trainer.model.policy)
    trainer.train()
    assert (trainer.reference is None) == (adapter == "lora")
    rollout = trainer._rollout([0, 1, 2])
    reference, _ = trainer._score_tokens(rollout)
    for n, (prompt, answer) in enumerate(zip(rollout.prompts, rollout.answers, strict=True)):
        for model, table in ((start, reference), (trainer.model.policy, rollout.logprobs)):
            with torch.no_grad():
                logits = model.eval()(input_ids=torch.tensor([prompt + answer])).logits[0]
            for place, token in enumerate(answer):
                expected = torch.log_softmax(logits[len(prompt) + place - 1], -1)[token]
                assert float(table[n, place]) == pytest.approx(float(expected), abs=1e-5)


def test_a_shared_reference_copies_trained_weights_only(made):
    trainer = made(adapter="freeze")
    policy = dict(trainer.model.policy.named_parameters())
    for name, parameter in trainer.reference.named_parameters():
        assert (parameter is policy[name]) == (not policy[name].requires_grad), name


def test_values_are_of_the_state_before_the_token(made):
    trainer = made()
    torch.nn.init.normal_(trainer.model.value_head.weight)
    rollout = trainer._rollout([0, 1])
    for n, (prompt, answer) in enumerate(zip(rollout.prompts, rollout.answers, strict=True)):
        for place in range(len(answer)):
            ids = torch.tensor([prompt + answer[:place]])  # without the token itself
            with torch.no_grad():
                hidden = trainer.model.policy.model(input_ids=ids).last_hidden_state[0, -1]
                expected = trainer.model.value_head(hidden)
            assert float(rollout.values[n, place]) == pytest.approx(float(expected), abs=1e-4)


def test_the_stop_token_is_an_action_and_a_cut_answer_has_none(made):
    trainer = made(PPO(max_new_tokens=40, missing_eos_penalty=2.0))
    rollout = trainer._rollout(list(range(12)))
    ends = [bool(answer) and answer[-1] in trainer.stop_ids for answer in rollout.answers]
    assert True in ends
    assert False in ends
    assert all(not set(answer[:-1]) & set(trainer.stop_ids) for answer in rollout.answers)
    assert all(len(a) == 40 for a, end in zip(rollout.answers, ends, strict=True) if not end)


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_chunks_and_recomputing_change_nothing(made, adapter, monkeypatch):
    """Whole logits, chunks of them computed twice, and gradient checkpointing give the same gradients."""
    found = {}
    for kind in ("whole", "chunks", "recomputed", "caps"):
        trainer = made(PPO(max_new_tokens=6, entropy_coefficient=0.1), adapter=adapter, run=kind)
        torch.manual_seed(1)
        torch.nn.init.normal_(trainer.model.value_head.weight)
        for name, p in trainer.model.policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1)
        if kind == "chunks":
            monkeypatch.setattr(ppo, "LOGITS", 3 * 320)
        else:
            monkeypatch.undo()
        if kind == "recomputed":
            trainer.model.activation_checkpointing_enable()
        if kind == "caps":
            ppo._language_model(trainer.model.policy)._logits_are_head_of_trunk = False
        trainer.model.train()
        rollout = trainer._rollout(list(range(6)))
        trainer._backward(trainer.model, rollout, [0, 2, 3, 5], is_first=True)
        found[kind] = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    assert any(float(g.abs().max()) > 1e-4 for n, g in found["whole"].items() if n.startswith("policy."))
    for kind in ("chunks", "recomputed", "caps"):
        assert found[kind].keys() == found["whole"].keys(), kind
        for name, gradient in found["whole"].items():
            assert torch.allclose(found[kind][name], gradient, atol=1e-6), (kind, name)


def test_minibatches_of_any_micro_batch_have_one_gradient(made):
    found = []
    for micro, accumulation in ((1, 6), (4, 1), (6, 1)):
        trainer = made(
            run=f"micro{micro}", per_device_train_batch_size=micro, gradient_accumulation_steps=accumulation
        )
        trainer.model.train()
        rollout = trainer._rollout(list(range(6)))
        trainer._backward(trainer.model, rollout, list(range(6)), is_first=True)
        found.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))
    assert torch.allclose(found[0], found[1], atol=1e-6)
    assert torch.allclose(found[0], found[2], atol=1e-6)


def test_models_that_cap_their_logits_are_found(tiny_model_folder):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=320, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.05, pad_token_id=0,
    )  # fmt: skip
    assert not ppo.is_parted(Gemma2ForCausalLM(config))
    assert ppo.is_parted(models.load_model(str(tiny_model_folder)))


def test_capped_logits_are_read_off_the_fast_forward_as_the_model_gives_them():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    from tunesmith.forward import TRUNK, Trunk

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=320, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.5, pad_token_id=0,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    fast = copy.deepcopy(model)
    setattr(fast, TRUNK, Trunk(fast, pytest.fail))
    ids = torch.randint(3, 320, (3, 12))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    acted = (torch.arange(12) >= 4) & (mask == 1)
    found = []
    for each in (model, fast):
        hidden, logits = ppo.states(each, ids, mask, acted)
        assert (logits is None) == (each is fast)
        logs, entropies = ppo.token_logprobs(each, hidden, logits, ids, acted, 0.7, entropy=True)
        (logs.sum() + 0.1 * entropies.sum()).backward()
        found.append((logs, entropies, *(p.grad for p in each.parameters())))
    for ours, wanted in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_dropout_is_switched_off_and_said(made):
    trainer = made(adapter="lora")
    rates = {m.p for m in trainer.model.modules() if isinstance(m, torch.nn.Dropout)}
    assert rates == {0.0}
    said = {e["name"]: e for e in trainer.run_folder.events() if e["kind"] == "decision"}
    assert said["dropout"]["value"] == 0
    assert "0.1" in said["dropout"]["reason"]


def test_a_random_forward_pass_is_warned_of(made):
    trainer = made(steps=1)
    for layer in trainer.model.policy.model.layers:
        layer.mlp.register_forward_hook(
            lambda module, given, output: torch.nn.functional.dropout(output, 0.5, module.training)
        )
    for p in trainer.model.policy.parameters():
        p.data *= 3
    trainer.train()
    warned = [e["message"] for e in trainer.run_folder.events() if e["kind"] == "warning"]
    assert len(warned) == 1
    assert "other probabilities" in warned[0]


def test_validation_is_the_mean_reward_of_greedy_answers(made):
    trainer = made()
    metrics = trainer.evaluate()
    answers = trainer._answers([list(a.input_ids) for a in trainer.asked[:3]], 0.0, 0)
    assert metrics["eval_reward"] == pytest.approx(sum(len(a.text) for a in answers) / 30)
    assert metrics["eval_completions/mean_length"] == pytest.approx(sum(len(a.ids) for a in answers) / 3)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_critic_starts_from_a_reward_model(made, tiny_model_folder, tmp_path, adapter):
    import peft
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(5)
    judge = AutoModelForSequenceClassification.from_pretrained(tiny_model_folder, num_labels=1)
    if adapter:
        config = peft.LoraConfig(
            task_type="SEQ_CLS", init_lora_weights=False, target_modules=["q_proj", "v_proj"]
        )
        judge = peft.get_peft_model(judge, config)
    judge.save_pretrained(tmp_path / "judge")
    models.load_tokenizer(str(tiny_model_folder)).save_pretrained(tmp_path / "judge")
    section = PPO(max_new_tokens=4, ppo_epochs=1, value="critic", critic=str(tmp_path / "judge"))
    trainer = made(section, adapter="lora", steps=1)
    rollout = trainer._rollout([0])
    with torch.no_grad():
        scored = judge.eval()(input_ids=torch.tensor([rollout.prompts[0]])).logits
    assert float(rollout.values[0, 0]) == pytest.approx(float(scored), abs=1e-5)
    before = parameters(trainer)
    trainer.train()
    after = parameters(trainer)
    assert any(not torch.equal(before[n], after[n]) for n in before if n.startswith("critic.layers.0"))
    assert not torch.equal(before["value_head.weight"], after["value_head.weight"])
    saved = load_file(trainer.run_folder.checkpoints / "checkpoint-step-1" / "value.safetensors")
    assert "value_head.weight" in saved
    assert any(name.startswith("critic.") for name in saved)


def test_a_critic_of_another_vocabulary_is_refused(made, tiny_t5_folder):
    with pytest.raises(ModelError, match="reads other tokens"):
        made(PPO(value="critic", critic=str(tiny_t5_folder)))


def test_a_quantized_policy_passes_the_trainers_checks(made, monkeypatch):
    """Trainer refuses a quantized model without adapter; that is not said of the module around ours."""
    monkeypatch.setattr("transformers.LlamaForCausalLM.is_quantized", True, raising=False)
    made(adapter="lora", steps=1).train()


def test_gradient_checkpointing_is_on_for_policy_and_critic_and_learns_the_same(made):
    found = {}
    for is_on in (False, True):
        section = PPO(max_new_tokens=4, ppo_epochs=1, value="critic")
        trainer = made(section, adapter="lora", run=f"{is_on}", steps=2, gradient_checkpointing=is_on)
        trainer.train()
        for part in (ppo.policy_trunk(trainer.model.policy), trainer.model.critic):
            assert part.is_activation_checkpointing == is_on
        found[is_on] = parameters(trainer)
    for name, weight in found[False].items():
        assert torch.allclose(weight, found[True][name], atol=1e-5), name


@pytest.fixture
def recipe(tiny_model_folder, question_file, tmp_path, monkeypatch):
    """Two steps on forty questions, rewarded by a function of the user's own."""
    (tmp_path / "own_rewards.py").write_text(
        "def length(prompt, completion, reference):\n"
        "    return min(len(completion), 20) / 20\n"
        "def fails(prompt, completion, reference):\n"
        "    if prompt.row.number % 2:\n"
        "        raise KeyError('no such thing')\n"
        "    return 0.0\n"
    )
    monkeypatch.chdir(tmp_path)

    def make(rewards, **training):
        return compose(
            {
                "output_dir": str(tmp_path / "runs"),
                "model": {"base": str(tiny_model_folder)},
                "method": {"kind": "ppo", "rewards": rewards, "max_new_tokens": 8, "num_minibatches": 2},
                "adapter": {"kind": "lora", "rank": 4},
                "data": {"dataset": str(question_file), "max_length": 64},
                "training": {
                    "max_steps": 2, "per_device_train_batch_size": 4, "warmup_steps": 0, "learning_rate": 1e-2,
                    "eval_steps": 1, "save_steps": 1, "logging_steps": 1, **training,
                },
                "evaluation": {"max_new_tokens": 6, "resamples": 200},
            }
        ).recipe  # fmt: skip

    return make


def test_a_whole_run_leaves_a_plain_adapter_and_its_measures(recipe):
    run = Run(
        api.train(
            recipe(["own_rewards:length", {"kind": "metric", "name": "length_match", "weight": 0.5}])
        ).run
    )
    assert run.state() == "done"
    assert not list(run.final_model.glob("value*"))
    assert all(".lora_" in name for name in load_file(run.final_model / "adapter_model.safetensors"))
    events = run.events()
    step = next(e for e in events if e["kind"] == "step")
    for name in ("reward", "kl", "rewards/length/mean", "rewards/length_match/std", "explained_variance"):
        assert math.isfinite(step["measures"][name]), name
    means = step["measures"]
    assert means["reward"] == pytest.approx(
        means["rewards/length/mean"] + 0.5 * means["rewards/length_match/mean"], abs=1e-5
    )
    evaluations = [e for e in events if e["kind"] == "evaluation"]
    assert [e["loss"] for e in evaluations] == [-e["measures"]["reward"] for e in evaluations]
    best = run.read("best_model/best_model_info.json")
    assert best["eval_loss"] == min(e["loss"] for e in evaluations)


def test_a_reward_that_raises_names_itself_and_the_row(recipe, question_file):
    with pytest.raises(RunError, match=rf"own_rewards:fails.*{question_file.name}:\d*[13579]\b"):
        api.train(recipe("own_rewards:fails"))


def test_a_critic_without_effect_is_refused():
    with pytest.raises(RecipeError, match="no effect"):
        compose({"method": {"kind": "ppo", "critic": "tiny"}})
