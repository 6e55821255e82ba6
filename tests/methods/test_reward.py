"""Reward models: the loss by hand, scores under padding and plain reloading, what is measured, what is refused."""

from __future__ import annotations

import importlib.util
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr

from tunesmith import api, dataflow, generation, models, scoring
from tunesmith.compose import compose, overlaid
from tunesmith.data.examples import Message
from tunesmith.errors import ModelError, RecipeError, TunesmithError
from tunesmith.evaluation.lengths import length_bias
from tunesmith.evaluation.rows import read_rows
from tunesmith.methods import METHODS
from tunesmith.training.fit import arguments
from tunesmith.training.run import Run

COLORS = ("red", "blue", "green", "one", "two", "three", "yes", "no")


def pair(n: int) -> dict[str, Any]:
    return {
        "prompt": f"what is the count of {n}",
        "chosen": f"{COLORS[n % 8]} {n}" * (1 + n % 2),
        "rejected": f"no {COLORS[(n + 1) % 8]} rows" + " yes" * (n % 3),
    }


@pytest.fixture
def recipe(tiny_model_folder, tmp_path):
    """A recipe of two steps on pairs, with changes; `row` makes the pairs."""

    def make(row=pair, count=40, **changes: Any):
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps(row(n)) + "\n" for n in range(count)), encoding="utf-8")
        layer = {
            "output_dir": str(tmp_path / "runs"),
            "model": {"base": str(tiny_model_folder)},
            "method": {"kind": "reward"},
            "data": {"dataset": str(path), "max_length": 96, "held_out": 0.3},
            "training": {
                "max_steps": 2, "per_device_train_batch_size": 4, "warmup_steps": 0, "learning_rate": 1e-2,
                "eval_steps": 2, "save_steps": 2, "logging_steps": 1, "scheduler": "linear",
            },
            "evaluation": {"resamples": 200},
        }  # fmt: skip
        return compose(overlaid(layer, changes)).recipe

    return make


@pytest.fixture
def built(tmp_path):
    """A trainer of ours that has not started, its weights moved so that scores differ, with its encodings and run."""

    def build(recipe) -> tuple[Any, Any, Run]:
        encodings = dataflow.encodings(recipe, dataflow.splits(recipe))
        plan = dataflow.plan(recipe, encodings, None, dataflow.asked(recipe, encodings))
        tokenizer, _ = dataflow._tokenizer(recipe)
        model = models.attach(models.load_model(recipe.model.base, head="score"), recipe.adapter)
        models.set_stop_tokens(model, tokenizer)
        noise = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=noise)
        run = Run(tmp_path / "built")
        run.path.mkdir(exist_ok=True)
        trainer = METHODS["reward"].build(
            recipe.method,
            model=model,
            tokenizer=tokenizer,
            train=encodings.train,
            validation=encodings.validation,
            arguments=arguments(plan, recipe.training, recipe.tracking, name="built", staging=tmp_path / "s"),
            run=run,
            keep=2,
        )
        trainer.model.eval()
        return trainer, encodings, run

    return build


def loss_of(trainer: Any, numbers: range) -> float:
    batch = trainer.data_collator([{"part": "train", "pair": n} for n in numbers])
    with torch.no_grad():
        return float(trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch)))


def score_by_hand(model: Any, ids: Any) -> float:
    """The trunk's last hidden state at the last token, times the head, one text at a time."""
    with torch.no_grad():
        states = model.model(input_ids=torch.tensor([list(ids)])).last_hidden_state[0]
        return float(states[-1].double() @ model.score.weight[0].double())


@pytest.mark.parametrize("centering", [0.0, 0.25])
@pytest.mark.parametrize("margin", ["without", "auto", "none"])
def test_the_loss_is_bradley_and_terrys_by_hand(recipe, built, margin, centering):
    def row(n: int) -> dict[str, Any]:
        return pair(n) | ({} if margin == "without" else {"margin": 0.3 * (n % 4)})

    method = {"centering": centering} | ({} if margin == "without" else {"margin": margin})
    trainer, encodings, run = built(recipe(row, method=method))
    numbers, total = range(5), 0.0
    for n in numbers:
        better, worse = (
            score_by_hand(trainer.model, encodings.train[2 * n + side].input_ids) for side in (0, 1)
        )
        asked = 0.3 * (encodings.train.rows[2 * n] % 4) if margin == "auto" else 0.0
        total += math.log1p(math.exp(-(better - worse - asked))) + centering * (better + worse) ** 2
        assert abs(better - worse) > 1e-3
    assert loss_of(trainer, numbers) == pytest.approx(total / 5, abs=1e-5)
    said = [event["value"] for event in run.events() if event.get("name") == "margin"]
    assert said == {"without": [], "auto": ["0 to 0.9"], "none": ["none"]}[margin]


def test_the_loss_is_trls_own_from_the_same_texts(recipe, built, tmp_path):
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    trainer, encodings, _ = built(recipe())
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    asked = [rows[encodings.train.rows[2 * n]] for n in range(4)]
    talks = [
        {
            side: [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row[side]},
            ]
            for side in ("chosen", "rejected")
        }
        for row in asked
    ]
    theirs = RewardTrainer(
        model=trainer.model,
        args=RewardConfig(str(tmp_path / "trl"), report_to=[], use_cpu=True, bf16=False),
        processing_class=trainer.processing_class,
        train_dataset=Dataset.from_list(talks),
    )
    theirs.model.eval()
    batch = theirs._prepare_inputs(theirs.data_collator(list(theirs.train_dataset)))
    ours = trainer.data_collator([{"part": "train", "pair": n} for n in range(4)])
    assert torch.equal(batch["input_ids"], ours["input_ids"])
    with torch.no_grad():
        assert float(theirs.compute_loss(theirs.model, batch)) == pytest.approx(
            loss_of(trainer, range(4)), abs=1e-6
        )


def test_swapping_the_answers_turns_loss_and_ranking_round(recipe, built):
    def swapped(n: int) -> dict[str, Any]:
        row = pair(n)
        return row | {"chosen": row["rejected"], "rejected": row["chosen"]}

    one, _, _ = built(recipe())
    batch = one.data_collator([{"part": "train", "pair": 0}])
    with torch.no_grad():
        difference = float(torch.sub(*one.model(**batch).logits[:, 0]))
    assert loss_of(one, range(1)) == pytest.approx(math.log1p(math.exp(-difference)), abs=1e-5)

    # The same rows the other way round, scored by the same model
    found = []
    for row in (pair, swapped):
        made = recipe(row, data={"validation": 0.0, "held_out": 0.95})
        splits = dataflow.splits(made)
        encodings = dataflow.encodings(made, splits)
        items = dataflow.items(made, dataflow.asked(made, encodings))
        rows = dataflow.evaluation.evaluate(
            one.model, one.processing_class, items, name="base", metrics=dataflow.metrics(made, items)
        )
        found.append({row.prompt_text: row for row in rows})
    shared = found[0].keys() & found[1].keys()
    assert len(shared) > 20
    for question in shared:
        a, b = found[0][question], found[1][question]
        assert (a.score, a.rejected_score) == pytest.approx((b.rejected_score, b.score), abs=1e-6)
        assert a.scores["ranking_accuracy"] + b.scores["ranking_accuracy"] == 1.0
        margin = a.score - a.rejected_score
        assert a.scores["ranking_log_loss"] == pytest.approx(-math.log(1 / (1 + math.exp(-margin))), abs=1e-6)
        assert (a.reference, a.rejected) == (b.rejected, b.reference)


def test_training_starts_from_a_head_that_prefers_nothing(recipe):
    run = Run(api.train(recipe(training={"max_steps": 1})).run)
    [first] = [event for event in run.events() if event["kind"] == "step"]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    rows = [row for row in read_rows(run.evaluation / "rows.jsonl") if row.model == "base"]
    assert {row.scores["ranking_accuracy"] for row in rows} == {0.5}
    assert {row.score for row in rows} == {0.0}


ENDS = (
    "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% else %}\n{% endif %}"
    "{% endfor %}"
)
"""A template whose conversations end with the end-of-text token and nothing behind it."""


def gpt2_folder(place: Path) -> Path:
    """A GPT-2 whose end-of-text token, the only special one, pads as well."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers import models as kinds
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    tokenizer = Tokenizer(kinds.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["what is the count"], trainer)
    end = "<|endoftext|>"
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, bos_token=end, unk_token=end)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(whole), n_embd=16, n_layer=2, n_head=2, n_positions=128)
    whole.chat_template = ENDS
    GPT2LMHeadModel(config).save_pretrained(place)
    whole.save_pretrained(place)
    return place


@pytest.fixture
def bases(tiny_model_folder, tiny_tokenizer, tmp_path):
    """The tiny model with three ways of padding: a token of its own, the end token while another is free, and the
    end token that is the only special one."""
    from transformers import AutoTokenizer

    found = {"own": tiny_model_folder, "none free": gpt2_folder(tmp_path / "gpt2")}
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = ENDS
    models.load_model(str(tiny_model_folder)).save_pretrained(tmp_path / "ends")
    tokenizer.save_pretrained(tmp_path / "ends")
    return {**found, "end token": tmp_path / "ends"}


@pytest.mark.parametrize("padding", ["own", "end token", "none free"])
@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_plain_transformers_give_the_same_scores_whatever_pads(recipe, bases, adapter, padding):
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    result = api.train(
        recipe(
            model={"base": str(bases[padding])}, adapter={"kind": adapter}, training={"learning_rate": 5e-2}
        )
    )
    run = Run(result.run)
    rows = [row for row in read_rows(run.evaluation / "rows.jsonl") if row.model == "tuned"]
    assert len({row.score for row in rows}) > 3

    tokenizer = AutoTokenizer.from_pretrained(run.final_model)
    if adapter == "full":
        model = AutoModelForSequenceClassification.from_pretrained(run.final_model)
    else:
        model = AutoPeftModelForSequenceClassification.from_pretrained(run.final_model, num_labels=1)
    model.eval()
    model.config.pad_token_id = tokenizer.pad_token_id
    talks = [
        [{"role": "user", "content": row.prompt_text}, {"role": "assistant", "content": answer}]
        for row in rows
        for answer in (row.reference, row.rejected)
    ]
    wanted = [score for row in rows for score in (row.score, row.rejected_score)]
    batch = tokenizer.apply_chat_template(talks, padding=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        together = model(**batch).logits[:, 0].tolist()
        alone = [
            float(model(**tokenizer.apply_chat_template(talk, return_dict=True, return_tensors="pt")).logits)
            for talk in talks
        ]
    assert together == pytest.approx(wanted, abs=1e-5)
    assert alone == pytest.approx(wanted, abs=1e-5)

    # Ours, from the folder and from the run
    reward = scoring.load(run.final_model)
    given = reward.scores(
        [[Message("user", talk[0]["content"])] for talk in talks], [talk[1]["content"] for talk in talks]
    )
    assert given == pytest.approx(wanted, abs=1e-6)

    # The score is read at the very last token, the end token included, wherever another one can pad.
    inner = model.get_base_model() if adapter == "lora" else model
    ids = [list(tokenizer.apply_chat_template(talk, return_dict=True)["input_ids"]) for talk in talks[:4]]
    trunk = inner.base_model
    head = inner.score
    for text, score in zip(ids, wanted, strict=False):
        last = -2 if padding == "none free" else -1
        assert (text[-1] == tokenizer.eos_token_id) == (padding != "own")
        with torch.no_grad():
            state = trunk(input_ids=torch.tensor([text])).last_hidden_state[:, last]
            assert float(head(state)) == pytest.approx(score, abs=1e-5)
    notes = " ".join(str(event.get("value")) for event in run.events())
    assert {
        "own": "<|pad|> pads.",
        "end token": "since <|im_end|> ends",
        "none free": "no other special token",
    }[padding] in notes


def test_padding_does_not_change_a_score(tiny_model_folder, tiny_tokenizer):
    torch.manual_seed(0)
    model = models.load_model(str(tiny_model_folder), head="score").eval()
    torch.nn.init.normal_(model.score.weight)
    texts = [
        [random.Random(n).randrange(3, 300) for _ in range(length)]
        for n, length in enumerate((2, 40, 7, 300, 1))
    ]
    alone = [scoring.scores(model, tiny_tokenizer, [text])[0] for text in texts]
    assert scoring.scores(model, tiny_tokenizer, texts, batch_tokens=10_000) == pytest.approx(alone, abs=1e-6)
    assert alone == pytest.approx([score_by_hand(model, text) for text in texts], abs=1e-6)
    with pytest.raises(ValueError, match="text 1"):
        scoring.scores(model, tiny_tokenizer, [[5], []])


@pytest.mark.parametrize(
    ("before", "adapter"),
    [
        ("lora", "lora"),
        pytest.param("full", "full", marks=pytest.mark.thorough),
        pytest.param("full", "lora", marks=pytest.mark.thorough),
        pytest.param("lora", "full", marks=pytest.mark.thorough),
    ],
)
def test_a_tuned_model_becomes_a_reward_model_and_that_one_is_trained_on(recipe, before, adapter):
    tuned = Run(api.train(recipe(name="sft", method={"kind": "sft"}, adapter={"kind": before})).run)
    made = Run(api.train(recipe(name="rm", model={"base": str(tuned.path)}, adapter={"kind": adapter})).run)
    assert models.kind(str(made.path)) == "reward"
    ours = models.load_model(str(made.path))
    heads = [p for n, p in ours.state_dict().items() if ".score." in f".{n}" and "original_module" not in n]
    assert len(heads) == 1
    assert float(heads[0].abs().sum()) > 0

    # With its own head at zero the trunk is the tuned model's, not the base's.
    start = models.load_model(str(tuned.path), head="score").eval()
    causal = models.load_model(str(tuned.path)).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        states = [
            (m.get_base_model() if hasattr(m, "get_base_model") else m).model(input_ids=ids).last_hidden_state
            for m in (start, causal)
        ]
        assert torch.equal(*states)
        assert float(start(input_ids=ids[:1]).logits.abs().sum()) == 0.0

    again = api.train(recipe(name="again", model={"base": str(made.path)}, adapter={"kind": adapter}))
    rows = read_rows(Run(again.run).evaluation / "rows.jsonl")
    before_rows = [row for row in read_rows(made.evaluation / "rows.jsonl") if row.model == "tuned"]
    assert [row.score for row in rows if row.model == "base"] == pytest.approx(
        [row.score for row in before_rows], abs=1e-5
    )


def test_evaluate_and_compare_measure_it_again(recipe, tmp_path):
    made = recipe(training={"learning_rate": 5e-2, "max_steps": 6})
    result = api.train(made)
    run = Run(result.run)
    primary = result.primary
    assert primary.metric == "ranking_accuracy"
    assert (primary.base, [c.metric for c in result.comparisons][1]) == (0.5, "ranking_log_loss")

    again = api.evaluate(run.path)
    assert again.scores["ranking_accuracy"]["value"] == primary.tuned
    told: list[dict[str, Any]] = []
    other = api.compare(made.model.base, run.path, watch=told.append)
    assert (other.primary.base, other.primary.tuned) == (primary.base, primary.tuned)
    assert any("gets the head that training begins with" in str(event.get("message")) for event in told)

    [shown] = [entry for entry in api.show("model", str(run.final_model)) if entry["name"] == "kind"]
    assert shown["about"].startswith("reward")

    # A folder is known for what it is without its run.
    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps(pair(n)) + "\n" for n in range(100, 130)), encoding="utf-8"
    )
    alone = api.evaluate(run.final_model, dataset=str(tmp_path / "pairs.jsonl"), output=tmp_path / "out")
    assert alone.scores["ranking_accuracy"]["n"] == 30

    page, card = ((run.path / name).read_text() for name in ("report.html", "final_model/README.md"))
    for text in ("ranking accuracy", "ranking log loss"):
        assert text in page
        assert text in card
    assert "for this answer" in page
    assert "AutoModelForSequenceClassification" in card


def test_what_writes_nothing_is_not_asked(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run(api.train(recipe()).run)
    where = str(run.final_model)
    with pytest.raises(ModelError, match="is a reward model: it gives answers a score and writes none"):
        list(api.chat(where, [{"role": "user", "content": "hello"}]))
    model, tokenizer = models.load_model(where), models.load_tokenizer(where)
    with pytest.raises(ModelError, match="is a reward model"):
        generation.generate(model, tokenizer, [[5]], max_new_tokens=2, stop_ids=[1])
    with pytest.raises(ModelError, match="is a reward model"):
        next(generation.stream(model, tokenizer, [5], max_new_tokens=2, stop_ids=[1]))
    with pytest.raises(RecipeError, match="'exact_match' does not fit a reward model"):
        api.evaluate(run.path, metrics=["exact_match"])
    with pytest.raises(RecipeError, match="'exact_match' does not fit a reward model"):
        api.plan(recipe(evaluation={"metrics": ["exact_match"]}))
    with pytest.raises(RecipeError, match="'ranking_accuracy' needs a reward model"):
        api.plan(recipe(method={"kind": "dpo"}, evaluation={"metrics": ["ranking_accuracy"]}))
    with pytest.raises(ModelError, match="is a reward model, and the method 'sft' trains causal"):
        api.plan(recipe(model={"base": where}, method={"kind": "sft"}))


def test_bases_that_cannot_give_scores_are_refused(recipe, tiny_t5_folder, tiny_model_folder, tmp_path):
    with pytest.raises(ModelError, match="makes a reward model of a causal one"):
        api.plan(recipe(model={"base": str(tiny_t5_folder)}))
    with pytest.raises(ModelError, match="is no reward model"):
        scoring.load(tiny_model_folder)

    from transformers import AutoModelForSequenceClassification, GraniteConfig, GraniteForCausalLM

    config = GraniteConfig(
        vocab_size=320, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    GraniteForCausalLM(config).save_pretrained(tmp_path / "granite")
    models.load_tokenizer(str(tiny_model_folder)).save_pretrained(tmp_path / "granite")
    with pytest.raises(ModelError, match="transformers has no granite that gives scores"):
        api.plan(recipe(model={"base": str(tmp_path / "granite")}))

    sorter = AutoModelForSequenceClassification.from_pretrained(tiny_model_folder, num_labels=3)
    sorter.save_pretrained(tmp_path / "sorter")
    with pytest.raises(ModelError, match="3 classes"):
        models.kind(str(tmp_path / "sorter"))


def test_an_adapter_is_merged_and_checked_by_its_scores(recipe, tmp_path):
    from transformers import AutoModelForSequenceClassification

    run = Run(api.train(recipe(adapter={"kind": "lora"}, training={"learning_rate": 5e-2})).run)
    merged = api.merge(run.path, output=tmp_path / "merged")
    assert merged.check.passed
    assert merged.check.of_scores
    assert "of a score" in merged.check.sentence()
    text = [5, 9, 40, 41]
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    ours = scoring.load(run.path)
    with torch.no_grad():
        score = float(plain(input_ids=torch.tensor([text])).logits)
    assert score == pytest.approx(scoring.scores(ours.model, ours.tokenizer, [text])[0], abs=1e-5)
    assert score != 0.0
    assert "AutoModelForSequenceClassification" in (tmp_path / "merged" / "README.md").read_text()
    again = api.compare(run.path, tmp_path / "merged").primary
    assert (again.n > 0, again.difference) == (True, 0.0)


def test_a_margin_that_is_no_number_drops_its_pair(recipe):
    said = {3: "much", 4: -1, 5: "0.5", 6: None, 7: "nan"}

    def row(n: int) -> dict[str, Any]:
        return pair(n) | {"margin": said.get(n, 1.0)}

    _, rows = api.plan(recipe(row))
    assert sorted(rows["dropped"]) == [
        "the column margin is no number of at least 0: '-1'",
        "the column margin is no number of at least 0: 'much'",
        "the column margin is no number of at least 0: 'nan'",
    ]
    # Other methods have no use for it, and drop nothing.
    assert not api.plan(recipe(row, method={"kind": "dpo"}))[1]["dropped"]


def test_scores_that_follow_length_are_said(recipe, monkeypatch):
    run = Run(api.train(recipe()).run)
    rows = [row for row in read_rows(run.evaluation / "rows.jsonl") if row.model == "tuned"]
    from dataclasses import replace

    from tunesmith.evaluation.compare import compare

    noise = random.Random(0)
    longer = [
        replace(r, score=r.tokens + noise.random(), rejected_score=r.rejected_tokens + noise.random())
        for r in rows
    ]
    bias = length_bias(longer)
    values = [v for r in longer for v in (r.score, r.rejected_score)]
    lengths = [v for r in longer for v in (r.tokens, r.rejected_tokens)]
    assert bias.correlation == pytest.approx(spearmanr(values, lengths).statistic)
    assert bias.is_strong
    assert bias.longer_better == bias.right_longer == sum(r.tokens > r.rejected_tokens for r in rows) > 0
    assert bias.right_shorter == 0
    base = [replace(r, model="base") for r in rows]
    [primary] = [c for c in compare(base, longer, metrics=["ranking_accuracy"], resamples=50) if c.primary]
    assert any("rise with an answer's length" in remark for remark in primary.remarks)

    flat = [replace(r, score=noise.random(), rejected_score=noise.random()) for r in rows]
    assert not length_bias(flat).is_strong
    assert length_bias([replace(r, score=1.0, rejected_score=1.0) for r in rows]) is None
    assert length_bias(rows[:3]) is None
    kept = [event for event in run.events() if event.get("name") == "scores and lengths"]
    assert len(kept) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reward", pytest.param("reward, lora", marks=pytest.mark.thorough)])
def test_it_learns_to_rank_pairs_that_it_has_not_seen(tmp_path, name):
    """From knowing nothing to at least 90 % of the held-out pairs, on the shipped model and data."""
    path = Path(__file__).parents[2] / "benchmarks" / "methods_learn.py"
    spec = importlib.util.spec_from_file_location("methods_learn", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.learned(name, folder=tmp_path, with_kl=False)
    assert found["metric"] == "ranking_accuracy"
    assert found["n"] >= 50
    assert found["before"] == 0.5
    assert found["after"] >= 0.9
    assert found["interval"][0] > 0.3


def test_unusable_words_of_a_template_reach_the_caller(recipe):
    run = Run(api.train(recipe()).run)
    reward = scoring.load(run.path)
    reward.tokenizer.chat_template = "{{ raise_exception('no such talk') }}"
    with pytest.raises((TunesmithError, scoring.Unusable), match="no such talk"):
        reward.scores([[Message("user", "hello")]], ["red"])


@pytest.mark.parametrize("padding", ["own", "end token"])
@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_a_run_s_folder_is_a_reward_for_reinforcement_learning(recipe, bases, adapter, padding):
    from tunesmith.data.examples import Prompt, Row
    from tunesmith.methods import rewards
    from tunesmith.recipe import ModelReward

    base = bases[padding]
    run = Run(
        api.train(
            recipe(model={"base": str(base)}, adapter={"kind": adapter}, training={"learning_rate": 5e-2})
        ).run
    )
    rows = [row for row in read_rows(run.evaluation / "rows.jsonl") if row.model == "tuned"]
    prompts = [
        Prompt((Message("user", row.prompt_text),), row.reference, Row("pairs", n))
        for n, row in enumerate(rows)
    ]
    made = rewards.resolve(
        [ModelReward(model=str(run.path), weight=2.0)],
        prompts=prompts,
        tokenizer=models.load_tokenizer(str(base)),
    )
    scored = rewards.total(made, prompts, [row.rejected for row in rows])
    [column] = scored.columns.values()
    assert column == pytest.approx([row.rejected_score for row in rows], abs=1e-6)
    assert scored.totals == pytest.approx([2 * score for score in column])
    assert len(set(column)) > 3
