"""Losses of the preference methods: against TRL's own path from text, and against the formulas of the papers."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid

from tunesmith import api, dataflow, models
from tunesmith.compose import compose, overlaid
from tunesmith.data.preferences import prompt_length
from tunesmith.data.templates import IGNORED
from tunesmith.errors import DataError, ModelError, RecipeError
from tunesmith.methods import METHODS
from tunesmith.plan import Plan
from tunesmith.training.fit import arguments
from tunesmith.training.run import Run

COLORS = ("red", "blue", "green", "one", "two", "three", "yes", "no")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("judged")
    pairs = [
        {
            "prompt": f"what is the count of {n}",
            "chosen": f"{COLORS[n % 8]} {n}" * (1 + n % 2),
            "rejected": f"no {COLORS[(n + 1) % 8]} rows" + " yes" * (n % 3),
        }
        for n in range(30)
    ]
    ratings = [
        {"prompt": row["prompt"], "completion": row["chosen" if n % 3 else "rejected"], "label": n % 3 > 0}
        for n, row in enumerate(pairs)
    ]
    made = {}
    for name, rows in (("pairs", pairs), ("ratings", ratings)):
        made[name] = folder / f"{name}.jsonl"
        made[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


@pytest.fixture
def recipe(tiny_model_folder, files, tmp_path):
    def make(kind: str, *, rows: str = "pairs", **changes: Any):
        layer = {
            "output_dir": str(tmp_path / "runs"),
            "model": {"base": str(tiny_model_folder)},
            "method": {"kind": kind},
            "data": {"dataset": str(files[rows]), "max_length": 96},
            "training": {
                "max_steps": 2, "per_device_train_batch_size": 4, "warmup_steps": 0, "learning_rate": 1e-2,
                "eval_steps": 2, "save_steps": 2, "logging_steps": 1,
            },
            "evaluation": {"skip": True},
        }  # fmt: skip
        return compose(overlaid(layer, changes)).recipe

    return make


@pytest.fixture
def built(tmp_path):
    """A trainer of ours that has not started, with its model, encodings and run."""

    def build(recipe) -> tuple[Any, Any, Run]:
        splits = dataflow.splits(recipe)
        encodings = dataflow.encodings(recipe, splits)
        plan: Plan = dataflow.plan(recipe, encodings, None, dataflow.asked(recipe, encodings))
        tokenizer, _ = dataflow._tokenizer(recipe)
        torch.manual_seed(0)
        model = models.attach(models.load_model(recipe.model.base), recipe.adapter)
        run = Run(tmp_path / "built")
        run.path.mkdir(exist_ok=True)
        trainer = METHODS[recipe.method.kind].build(
            recipe.method,
            model=model,
            tokenizer=tokenizer,
            train=encodings.train,
            validation=encodings.validation,
            arguments=arguments(
                plan, recipe.training, recipe.tracking, name="built", staging=tmp_path / ".staging"
            ),
            run=run,
            keep=2,
        )
        return trainer, encodings, run

    return build


def moved(model: Any, size: float = 0.05) -> Any:
    """The model with noise on what is trained, so that it differs from its reference."""
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=noise)
    return model.eval()


def likelihoods(model: Any, encoding: Any) -> torch.Tensor:
    """Log-probability of each judged token, one sequence at a time, by softmax over all logits."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([encoding.input_ids])).logits[0].double()
    found = [
        logits[place - 1].log_softmax(-1)[token]
        for place, (token, label) in enumerate(zip(encoding.input_ids, encoding.labels, strict=True))
        if label != IGNORED
    ]
    return torch.stack(found)


def loss_of(trainer: Any, rows: list[dict[str, Any]]) -> float:
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    with torch.no_grad():
        return float(trainer.compute_loss(trainer.model, batch))


def texts(encodings: Any, tokenizer: Any, numbers: range) -> list[tuple[str, str]]:
    """Prompt and answer of encodings as text, without the end-of-turn token, which TRL adds itself."""
    found = []
    for number in numbers:
        encoding = encodings[number]
        at = prompt_length(encoding)
        answer = [label for label in encoding.labels if label != IGNORED]
        found.append(
            (
                tokenizer.decode(encoding.input_ids[:at]),
                tokenizer.decode(answer).removesuffix(tokenizer.eos_token),
            )
        )
    return found


SETTINGS: dict[str, dict[str, Any]] = {
    "dpo": {"kind": "dpo"},
    "dpo beta": {"kind": "dpo", "beta": 0.5},
    "ipo": {"kind": "dpo", "loss": "ipo"},
    "hinge": {"kind": "dpo", "loss": "hinge"},
    "robust": {"kind": "dpo", "loss": "robust"},
    "robust 0.3": {"kind": "dpo", "loss": "robust", "label_smoothing": 0.3},
    "exo_pair": {"kind": "dpo", "loss": "exo_pair"},
    "nca_pair": {"kind": "dpo", "loss": "nca_pair"},
    "sppo_hard": {"kind": "dpo", "loss": "sppo_hard"},
    "aot": {"kind": "dpo", "loss": "aot"},
    "apo_zero": {"kind": "dpo", "loss": "apo_zero"},
    "discopop": {"kind": "dpo", "loss": "discopop"},
    "rpo": {"kind": "dpo", "sft_weight": 0.7},
    "forward_kl": {"kind": "dpo", "f_divergence": "forward_kl"},
    "js": {"kind": "dpo", "f_divergence": "js_divergence"},
    "alpha": {"kind": "dpo", "f_divergence": "alpha_divergence", "divergence_alpha": 0.3},
    "kto": {"kind": "kto"},
    "kto weights": {"kind": "kto", "beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 1.1},
    "apo_zero_unpaired": {"kind": "kto", "loss": "apo_zero_unpaired"},
    "orpo": {"kind": "orpo", "beta": 0.2},
    "cpo": {"kind": "cpo"},
    "cpo hinge": {"kind": "cpo", "loss": "hinge", "sft_weight": 0.0},
    "cpo ipo": {"kind": "cpo", "loss": "ipo"},
    "cpo smoothing": {"kind": "cpo", "label_smoothing": 0.2},
    "simpo": {"kind": "simpo"},
    "simpo gamma": {"kind": "simpo", "beta": 2.5, "gamma": 1.4, "sft_weight": 0.1},
}


def theirs(section: Any, model: Any, reference: Any, rows: list[dict[str, Any]], tokenizer: Any, place: Path):
    """TRL's own trainer, from text, with the same settings as they are called there."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    common: dict[str, Any] = {
        "output_dir": str(place), "per_device_train_batch_size": 4, "report_to": "none", "use_cpu": True,
        "bf16": False, "gradient_checkpointing": False, "beta": section.beta,
    }  # fmt: skip
    given = {
        "model": model,
        "processing_class": tokenizer,
        "train_dataset": Dataset.from_list(rows),
    }
    kind = section.kind
    if kind == "dpo":
        smoothing = section.label_smoothing
        if smoothing is None:
            smoothing = {"robust": 0.1, "exo_pair": 0.001}.get(section.loss, 0.0)
        is_rpo = section.sft_weight > 0
        args = DPOConfig(
            **common,
            loss_type=[section.loss, "sft"] if is_rpo else section.loss,
            loss_weights=[1.0, section.sft_weight] if is_rpo else None,
            label_smoothing=smoothing,
            f_divergence_type=section.f_divergence,
            f_alpha_divergence_coef=section.divergence_alpha or 0.5,
        )
        return DPOTrainer(ref_model=reference, args=args, **given)
    if kind == "kto":
        args = KTOConfig(
            **common,
            loss_type=section.loss,
            desirable_weight=section.desirable_weight or 1.0,
            undesirable_weight=section.undesirable_weight or 1.0,
        )
        return KTOTrainer(ref_model=reference, args=args, **given)
    if kind == "orpo":
        return ORPOTrainer(args=ORPOConfig(**common), **given)
    own = (
        {"loss_type": "simpo", "simpo_gamma": section.gamma}
        if kind == "simpo"
        else {"loss_type": section.loss}
    )
    args = CPOConfig(**common, **own, cpo_alpha=section.sft_weight, label_smoothing=section.label_smoothing)
    return CPOTrainer(args=args, **given)


@pytest.mark.parametrize("name", SETTINGS)
def test_losses_equal_those_of_trl_from_text(recipe, built, name, tmp_path, tiny_model_folder):
    section = SETTINGS[name]
    ours, encodings, _ = built(recipe(section["kind"], method=section))
    tokenizer = models.load_tokenizer(str(tiny_model_folder))
    section = recipe(section["kind"], method=section).method
    moved(ours.model)
    policy = moved(models.load_model(str(tiny_model_folder)))
    reference = models.load_model(str(tiny_model_folder)).requires_grad_(False)
    if section.kind == "kto":
        judged = texts(encodings.train, tokenizer, range(4))
        rows = [
            {"prompt": prompt, "completion": answer, "label": encodings.train[n].good}
            for n, (prompt, answer) in enumerate(judged)
        ]
        numbers = [{"part": "train", "row": n} for n in range(4)]
    else:
        judged = texts(encodings.train, tokenizer, range(8))
        rows = [
            {"prompt": judged[n][0], "chosen": judged[n][1], "rejected": judged[n + 1][1]}
            for n in range(0, 8, 2)
        ]
        numbers = [{"part": "train", "pair": n} for n in range(4)]
    other = theirs(section, policy, reference, rows, tokenizer, tmp_path / "trl")
    batch = other.data_collator([other.train_dataset[n] for n in range(4)])
    mine = ours.data_collator(numbers)
    for key in ("input_ids", "attention_mask", "completion_mask", "KL_input_ids", "label"):
        if key in batch and key in mine:
            assert torch.equal(batch[key], mine[key]), key
    other.model.eval()
    with torch.no_grad():
        expected = float(other.compute_loss(other.model, other._prepare_inputs(batch)))
    assert loss_of(ours, numbers) == pytest.approx(expected, abs=1e-5)
    assert math.isfinite(expected)


def sides_of(model: Any, encodings: Any, count: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [
        (likelihoods(model, encodings[2 * n]), likelihoods(model, encodings[2 * n + 1])) for n in range(count)
    ]


@pytest.mark.parametrize(
    "name",
    ["dpo beta", "ipo", "hinge", "robust 0.3", "exo_pair", "js", "rpo", "orpo", "cpo", "cpo smoothing",
     "simpo gamma"],
)  # fmt: skip
def test_losses_equal_the_formulas_of_the_papers(recipe, built, name, tiny_model_folder):
    given = SETTINGS[name]
    wanted = recipe(given["kind"], method=given)
    section = wanted.method
    ours, encodings, _ = built(wanted)
    policy = moved(ours.model)
    before = models.load_model(str(tiny_model_folder)).eval()
    now, then = sides_of(policy, encodings.train), sides_of(before, encodings.train)
    # h: how much likelier than under the reference the better answer became than the worse one
    h = torch.stack(
        [
            (c.sum() - rc.sum()) - (r.sum() - rr.sum())
            for (c, r), (rc, rr) in zip(now, then, strict=True)
        ]
    )  # fmt: skip
    beta = section.beta
    nll = -torch.cat([c for c, _ in now]).mean()
    sums = torch.stack([c.sum() - r.sum() for c, r in now])
    means = [(c.mean(), r.mean()) for c, r in now]
    if name == "dpo beta":  # arXiv 2305.18290, equation 7
        expected = -logsigmoid(beta * h).mean()
    elif name == "ipo":  # arXiv 2310.12036, equation 17, per token
        per_token = torch.stack(
            [
                (c - rc).mean() - (r - rr).mean()
                for (c, r), (rc, rr) in zip(now, then, strict=True)
            ]
        )  # fmt: skip
        expected = ((per_token - 1 / (2 * beta)) ** 2).mean()
    elif name == "hinge":
        expected = (1 - beta * h).clamp(min=0).mean()
    elif name == "robust 0.3":  # arXiv 2403.00409
        e = 0.3
        expected = ((-(1 - e) * logsigmoid(beta * h) + e * logsigmoid(-beta * h)) / (1 - 2 * e)).mean()
    elif name == "exo_pair":  # arXiv 2402.00856: KL of the policy's preference from the smoothed labels
        q = torch.sigmoid(beta * h)
        expected = (q * (q.log() - math.log(1 - 1e-3)) + (1 - q) * ((1 - q).log() - math.log(1e-3))).mean()
    elif name == "js":  # arXiv 2309.16240, table 1: f'(u) = log(2u / (1 + u))

        def f(u):
            return torch.log(2 * u / (1 + u))

        deltas = [
            f((c.sum() - rc.sum()).exp()) - f((r.sum() - rr.sum()).exp())
            for (c, r), (rc, rr) in zip(now, then, strict=True)
        ]
        expected = -logsigmoid(beta * torch.stack(deltas)).mean()
    elif name == "rpo":
        expected = -logsigmoid(beta * h).mean() + 0.7 * nll
    elif name == "orpo":  # arXiv 2403.07691, equations 4, 6 and 7; the imitation loss covers the prompt too
        odds = torch.stack(
            [
                (c - torch.log1p(-c.exp())) - (r - torch.log1p(-r.exp()))
                for c, r in means
            ]
        )  # fmt: skip
        whole = []
        for n in range(4):
            encoding = encodings.train[2 * n]
            end = max(place for place, label in enumerate(encoding.labels) if label != IGNORED) + 1
            from tunesmith.data.templates import Encoding

            ids = encoding.input_ids[:end]
            whole.append(likelihoods(policy, Encoding(ids, (IGNORED, *ids[1:]))))
        expected = -torch.cat(whole).mean() - beta * logsigmoid(odds).mean()
    elif name == "cpo":  # arXiv 2401.08417, equation 5
        expected = -logsigmoid(beta * sums).mean() + nll
    elif name == "cpo smoothing":
        expected = -(0.8 * logsigmoid(beta * sums) + 0.2 * logsigmoid(-beta * sums)).mean() + nll
    else:  # arXiv 2405.14734, equation 6
        margins = torch.stack([c - r for c, r in means])
        expected = -logsigmoid(beta * margins - section.gamma).mean() + 0.1 * nll
    numbers = [{"part": "train", "pair": n} for n in range(4)]
    assert loss_of(ours, numbers) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("data", ["pairs", "ratings"])
def test_the_loss_of_kto_is_that_of_the_paper(recipe, built, data, tiny_model_folder):
    """arXiv 2402.01306, equations 7 and 8: the KL from answers to other prompts, not below 0."""
    from tunesmith.data.templates import Encoding

    wanted = recipe("kto", rows=data, method={"beta": 0.4})
    ours, encodings, run = built(wanted)
    policy = moved(ours.model, 0.2)
    before = models.load_model(str(tiny_model_folder)).eval()
    train = encodings.train
    chosen = list(range(5))
    own, shifted = [], []
    for place, n in enumerate(chosen):
        other, mine = train[chosen[place - 1]], train[n]
        at, start = prompt_length(mine), prompt_length(other)
        swapped = Encoding(
            mine.input_ids[:at] + other.input_ids[start:], mine.labels[:at] + other.labels[start:]
        )
        own.append(likelihoods(policy, mine).sum() - likelihoods(before, mine).sum())
        shifted.append(likelihoods(policy, swapped).sum() - likelihoods(before, swapped).sum())
    kl = torch.stack(shifted).mean().clamp(min=0)
    good = sum(train.good)
    bad = len(train) - good
    weight_good, weight_bad = (1.0, 1.0)
    if good < bad:
        weight_good = bad / good
    elif good > 4 / 3 * bad:
        weight_bad = good / bad
    losses = [
        weight_good * (1 - torch.sigmoid(0.4 * (ratio - kl)))
        if train[n].good
        else weight_bad * (1 - torch.sigmoid(0.4 * (kl - ratio)))
        for n, ratio in zip(chosen, own, strict=True)
    ]
    rows = [{"part": "train", "row": n} for n in chosen]
    assert loss_of(ours, rows) == pytest.approx(float(torch.stack(losses).mean()), abs=1e-5)
    said = next(e for e in run.events() if e.get("name") == "weights")
    assert said["reason"].startswith(f"{good} good and {bad} bad answers")


def test_an_answer_alone_in_its_batch_takes_the_next_one_for_the_kl(recipe, built):
    ours, encodings, _ = built(recipe("kto"))
    [row] = [{"part": "train", "row": len(encodings.train) - 1}]
    batch = ours.data_collator([row])
    first = encodings.train[0]
    answer = [label for label in first.labels if label != IGNORED]
    kept = batch["KL_completion_mask"][0].bool()
    assert batch["KL_input_ids"][0][kept].tolist() == answer


@pytest.mark.parametrize("kind", ["dpo", "kto"])
@pytest.mark.parametrize(
    ("adapter", "where", "kept"),
    [
        ({"kind": "full"}, "auto", "copy"),
        ({"kind": "full"}, "precomputed", "precomputed"),
        ({"kind": "freeze"}, "copy", "copy"),
        ({"kind": "lora", "rank": 4}, "auto", "adapter_off"),
        ({"kind": "lora", "rank": 4}, "precomputed", "precomputed"),
        ({"kind": "lora", "rank": 4, "dora": True}, "auto", "adapter_off"),
        ({"kind": "lora", "rank": 4, "init": "pissa"}, "auto", "precomputed"),
        ({"kind": "lora", "rank": 4, "init": "olora"}, "auto", "precomputed"),
        ({"kind": "lora", "rank": 4, "modules_to_save": ["lm_head"]}, "adapter_off", "adapter_off"),
    ],
)
def test_the_reference_is_the_model_before_training(recipe, built, kind, adapter, where, kept):
    """However it is kept, the margin before the first step is zero, and stays measured against that model."""
    wanted = recipe(kind, adapter=adapter, method={"reference": where})
    ours, encodings, run = built(wanted)
    assert [e["value"] for e in run.events() if e.get("name") == "reference"][-1] == kept
    assert set(getattr(ours.model, "peft_config", {"default": 0})) == {"default"}
    column = "pair" if kind == "dpo" else "row"
    rows = [ours.train_dataset[n] for n in range(4)]
    assert set(rows[0]) - {"part", column} == (
        set()
        if kept != "precomputed"
        else {"ref_chosen_logps", "ref_rejected_logps"}
        if kind == "dpo"
        else {"ref_logps", "ref_KL_logps"}
    )
    start = math.log(2) if kind == "dpo" else 0.5
    assert loss_of(ours, rows) == pytest.approx(start, abs=1e-5)

    policy = moved(ours.model)
    if kind == "dpo":
        before = models.load_model(wanted.model.base).eval()
        now, then = (
            [(likelihoods(m, encodings.train[2 * r["pair"]]), likelihoods(m, encodings.train[2 * r["pair"] + 1]))
             for r in rows]
            for m in (policy, before)
        )  # fmt: skip
        h = torch.stack(
            [(c.sum() - rc.sum()) - (r.sum() - rr.sum()) for (c, r), (rc, rr) in zip(now, then, strict=True)]
        )
        assert loss_of(ours, rows) == pytest.approx(float(-logsigmoid(0.1 * h).mean()), abs=1e-5)


def test_another_model_can_be_the_reference(recipe, built, tiny_model_folder, tmp_path, tiny_tokenizer):
    other = moved(models.load_model(str(tiny_model_folder)))
    other.save_pretrained(tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    for adapter in ({"kind": "full"}, {"kind": "lora", "rank": 4}):
        for where in ("auto", "precomputed"):
            wanted = recipe(
                "dpo",
                adapter=adapter,
                method={"reference_model": str(tmp_path / "other"), "reference": where},
            )
            ours, encodings, _ = built(wanted)
            rows = [ours.train_dataset[n] for n in range(4)]
            now = sides_of(ours.model.eval(), encodings.train)
            then = sides_of(other, encodings.train)
            h = torch.stack(
                [
                    (c.sum() - rc.sum()) - (r.sum() - rr.sum())
                    for (c, r), (rc, rr) in zip(now, then, strict=True)
                ]
            )
            assert loss_of(ours, rows) == pytest.approx(float(-logsigmoid(0.1 * h).mean()), abs=1e-5)
    api.train(recipe("dpo", method={"reference_model": str(tmp_path / "other")}))


def test_a_reference_of_another_vocabulary_is_refused(recipe, tmp_path, tiny_model_folder, tiny_tokenizer):
    from copy import deepcopy

    tokenizer = deepcopy(tiny_tokenizer)
    tokenizer.add_tokens(["another"])
    model = models.load_model(str(tiny_model_folder))
    model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    wanted = recipe("dpo", method={"reference_model": str(tmp_path / "other")})
    with pytest.raises(ModelError, match="another vocabulary"):
        api.train(wanted)
    assert not Path(wanted.output_dir).exists() or not list(Path(wanted.output_dir).iterdir())


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("dpo", {"adapter": {"kind": "lora"}, "method": {"reference": "copy"}}, "needless"),
        ("dpo", {"method": {"reference": "adapter_off"}}, "needs an adapter"),
        ("kto", {"adapter": {"kind": "lora", "bias": "all"}}, "bias"),
        (
            "dpo",
            {"adapter": {"kind": "lora", "init": "pissa"}, "method": {"reference": "adapter_off"}},
            "pissa",
        ),
        ("kto", {"training": {"per_device_train_batch_size": 1}}, "at least 2"),
        ("dpo", {"data": {"packing": True}}, "packing"),
    ],
)
def test_what_cannot_be_carried_out_is_refused_when_it_is_composed(recipe, kind, changes, said):
    with pytest.raises(RecipeError, match=said):
        recipe(kind, **changes)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"kind": "dpo", "label_smoothing": 0.1}, "label_smoothing has no effect with the loss sigmoid"),
        ({"kind": "dpo", "loss": "exo_pair", "label_smoothing": 0.0}, "above 0"),
        ({"kind": "dpo", "divergence_alpha": 0.5}, "divergence_alpha has no effect"),
        ({"kind": "dpo", "loss": "nca_pair", "f_divergence": "forward_kl"}, "has no f_divergence"),
        ({"kind": "cpo", "loss": "ipo", "label_smoothing": 0.1}, "no effect with the loss ipo"),
        (
            {"kind": "dpo", "reference_model": "tiny", "reference": "copy"},
            "no effect beside a reference_model",
        ),
        ({"kind": "simpo", "reference": "copy"}, "belongs to dpo and kto"),
    ],
)
def test_a_field_without_effect_is_an_error(recipe, section, said):
    with pytest.raises(RecipeError, match=said):
        recipe(section["kind"], method=section)


def test_data_without_what_the_method_learns_from_says_so(recipe, question_file, files):
    with pytest.raises(DataError, match="None of the 40 rows") as error:
        api.plan(recipe("dpo").model_copy(
            update={"data": recipe("dpo").data.model_copy(update={"dataset": str(question_file)})}
        ))  # fmt: skip
    assert "no pair of a better and a worse answer" in error.value.found
    with pytest.raises(DataError) as error:
        api.plan(recipe("dpo", rows="ratings"))
    assert "the method kto learns from ratings" in error.value.found


def test_ratings_of_one_kind_are_refused(recipe, files, tmp_path):
    rows = [json.loads(line) for line in files["ratings"].read_text().splitlines()]
    path = tmp_path / "good.jsonl"
    path.write_text("".join(json.dumps({**row, "label": True}) + "\n" for row in rows))
    wanted = recipe("kto", rows="ratings")
    wanted = wanted.model_copy(update={"data": wanted.data.model_copy(update={"dataset": str(path)})})
    with pytest.raises(DataError, match="training answers are good"):
        api.train(wanted)


def test_validation_loss_is_the_mean_over_pairs_whatever_the_batches(recipe, built):
    losses = []
    for size in (1, 2, 3):
        wanted = recipe("dpo", training={"per_device_eval_batch_size": size})
        ours, _, _ = built(wanted)
        moved(ours.model)
        losses.append(ours.evaluate()["eval_loss"])
        each = [loss_of(ours, [ours.eval_dataset[n]]) for n in range(len(ours.eval_dataset))]
        assert losses[-1] == pytest.approx(sum(each) / len(each), abs=1e-5)


@pytest.mark.parametrize(("kind", "full", "adapter"), [("dpo", 1e-6, 1e-5), ("orpo", 8e-6, 5e-5)])
def test_a_method_brings_its_learning_rate(kind, full, adapter):
    assert compose({"method": {"kind": kind}}).recipe.training.learning_rate == full
    tuned = {"method": {"kind": kind}, "adapter": {"kind": "lora"}}
    assert compose(tuned).recipe.training.learning_rate == adapter
    assert compose({**tuned, "training": {"learning_rate": 3e-4}}).recipe.training.learning_rate == 3e-4
    assert compose(tuned, preset="high_quality").recipe.training.learning_rate == 5e-6
    assert compose({"adapter": {"kind": "lora"}}).recipe.training.learning_rate == 2e-5


def test_the_plan_says_where_length_alone_could_be_learned(recipe, tmp_path):
    for word, one, other in (("longer", " rows" * 9, ""), ("shorter", "", " rows" * 9)):
        rows = [
            {"prompt": f"what is {n}", "chosen": f"red {n}{one}", "rejected": f"blue {n}{other}"}
            for n in range(30)
        ]
        path = tmp_path / f"{word}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        wanted = recipe("dpo", data={"dataset": str(path), "held_out": 0.2})
        plan, _ = api.plan(wanted)
        [said] = [d.reason + d.value for d in plan.decisions if "length alone" in str(d.value)]
        assert f"the better answer is the {word} one in 100% of the pairs" in said
    plan, _ = api.plan(recipe("dpo"))
    assert not [d for d in plan.decisions if "length alone" in str(d.value)]


def test_pairs_that_go_wrong_are_watched():
    from tunesmith.training.watching import good_lost, not_told_apart

    falling = [{"rewards/chosen": -n / 4, "rewards/rejected": -n / 3} for n in range(9)]
    assert "less likely as well: against the reference their reward has fallen to -1.62" in good_lost(falling)
    assert good_lost(falling[:1]) is None
    both = [{"rewards/chosen": -4.0, "rewards/rejected": -9.0}] * 9
    assert "fallen to -4.00" in good_lost(both), "forty nats are lost, whatever became of the worse answers"
    assert good_lost([{"rewards/chosen": -0.1, "rewards/rejected": -n / 1.0} for n in range(9)]) is None
    assert good_lost([{**m, "nll_loss": 1.0} for m in falling]) is None  # no reference: always below zero
    flat = [{"rewards/accuracies": 0.5, "rewards/margins": -0.01}] * 25
    assert "in 50% of the pairs only" in not_told_apart(flat)
    assert not_told_apart(flat[:15]) is None
    assert not_told_apart([{"rewards/accuracies": 0.8, "rewards/margins": 0.4}] * 25) is None
    assert "in 40% of the pairs only" in not_told_apart(
        [{"accuracy": 0.4, "margin": -0.1}] * 25
    )  # reward models
    assert "no more than the worse one" in not_told_apart([{"rewards/margins": -0.1}] * 25)  # KTO


def test_what_kto_compares_an_answer_with_is_no_longer_than_the_rows(tiny_tokenizer):
    from tunesmith.methods.kto import collator

    rows = {0: ([1] * 90 + [2] * 6, [-100] * 90 + [2] * 6), 1: ([3] * 6 + [4] * 80, [-100] * 6 + [4] * 80)}
    collate = collator(lambda part, row: rows[row], {"train": [True, False]}, tiny_tokenizer, limit=96)
    batch = collate([{"part": "train", "row": 0}, {"part": "train", "row": 1}])
    assert batch["KL_input_ids"].shape == (2, 96)
    assert batch["KL_input_ids"][0].tolist() == [1] * 90 + [4] * 6
    assert batch["KL_input_ids"][1, :12].tolist() == [3] * 6 + [2] * 6


@pytest.mark.parametrize("choice", ["fast", "stock"])
def test_likelihoods_of_the_reference_are_worked_out_by_the_same_forward(recipe, choice, monkeypatch):
    from tunesmith import forward

    answered, told = [], []
    plain_read, plain_lent = forward.read, forward.lent

    def read(*given):
        answered.append(given)
        return plain_read(*given)

    @contextmanager
    def lent(*given):
        with plain_lent(*given):
            yield
        told.append(len(answered))

    monkeypatch.setattr(forward, "read", read)
    monkeypatch.setattr(forward, "lent", lent)
    made = recipe(
        "dpo", method={"kind": "dpo", "reference": "precomputed"}, evaluation={"skip": True},
        training={
            "max_steps": 1, "per_device_train_batch_size": 4, "warmup_steps": 0, "forward": choice,
        },
    )  # fmt: skip
    api.train(made)
    assert bool(told) == (choice == "fast")
    assert all(told)


@pytest.mark.parametrize("where", ["auto", "precomputed"])
def test_a_reference_that_is_not_covered_takes_the_stock_path_and_is_said(recipe, other_kind, where):
    losses, method = [], {"kind": "dpo", "reference_model": str(other_kind), "reference": where}
    for choice in ("fast", "stock") if where == "auto" else ("fast",):
        made = recipe(
            "dpo", name=f"{where}-{choice}", method=method,
            training={"max_steps": 1, "forward": choice, "batches": "shuffled"},
        )  # fmt: skip
        events = Run(api.train(made).run).events()
        told = {e["name"]: e for e in events if e["kind"] == "decision"}
        assert told["forward"]["value"] == choice
        if choice == "fast":
            said = told["forward of the reference"]
            assert (said["value"], said["reason"]) == ("stock", "models of the kind olmo are not covered")
        losses.append([e["loss"] for e in events if e["kind"] == "step"])
    assert losses[0] == pytest.approx(losses[-1], rel=1e-5)


@pytest.mark.parametrize("kind", ["dpo", "kto"])
@pytest.mark.parametrize("choice", ["stock", "fast"])
def test_a_plan_works_no_likelihoods_of_a_reference_out(recipe, monkeypatch, kind, choice):
    """They would take a pass over all rows."""
    from trl.trainer import dpo_trainer

    monkeypatch.setattr(
        dpo_trainer.DPOTrainer, "compute_ref_log_probs", lambda *given: pytest.fail("worked out")
    )
    made = recipe(kind, method={"kind": kind, "reference": "precomputed"}, training={"forward": choice})
    plan, _ = api.plan(made, measured=True)
    assert plan.estimate.seconds_per_step > 0, plan.estimate.notes


def test_batches_whose_likelihoods_the_stock_path_works_out_are_said(recipe, monkeypatch):
    from tunesmith import forward

    plain = forward.rows_of

    def holes(*given, **options):
        return plain(*given, **options) if torch.is_grad_enabled() else None

    monkeypatch.setattr(forward, "rows_of", holes)
    made = recipe("dpo", method={"kind": "dpo", "reference": "precomputed"}, training={"max_steps": 1})
    told = [e for e in Run(api.train(made).run).events() if e["kind"] == "warning" and e.get("step") == 0]
    assert [
        e for e in told if "stock forward was taken for a batch" in e["message"] and "holes" in e["message"]
    ]
