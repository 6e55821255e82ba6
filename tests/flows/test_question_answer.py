"""The Hamilton module of questions and answers: its nodes, both configurations, splits, scores, errors, drawing."""

from __future__ import annotations

import copy
import hashlib
import inspect
import itertools
import json
import logging
import random
import re
import runpy
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
from encoder_decoders import save, t5_config, t5_tokenizer
from question_files import KEYS, flow, questions, write

from tunesmith import flows
from tunesmith.errors import DataError, MissingExtra, ModelError, OutOfResources, RecipeError, RunError
from tunesmith.flows import question_answer as qa

COMMON = """raw_dataset train_set validation_set hold_out_set tokenizer tokenized_inputs input_lengths
max_source_lengths tokenized_targets target_lengths max_target_lengths tokenized_train tokenized_validation
tokenized_hold_out saved_datasets lora_config device base_model data_collator peft_model_id training_args trainer
save_best_models peft_config metric finetuned_model finetuned_model_on_validation_set validation_predictions
validation_references validation_set_metrics training_and_validation_set_metrics hold_out_set_predictions""".split()  # noqa: SIM905 - a table to read
TRAINING = ["fitted_and_evaluated_trainer", "fit_trainer", "fit_trainer_eval_metrics"]
ADDED = ["hold_out_set_references", "hold_out_set_rows", "hold_out_set_metrics", "remarks"]

INPUTS = {
    "input_text_key": "question", "output_text_key": "reply", "random_state": 42, "train_size": 0.95,
    "validation_size": 0.8, "load_in_8bit": False, "label_pad_token_id": -100, "pad_to_multiple_of": 8,
    "per_device_eval_batch_size": 8, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
    "num_train_epochs": 2,
}  # fmt: skip


def nodes(start: str | None) -> set[str]:
    return {v.name for v in flow(start).list_available_variables() if not v.is_external_input}


def upstream(start: str, *names: str) -> set[str]:
    return {v.name for v in flow(start).what_is_upstream_of(*names)}


# Nodes, inputs, defaults


def test_the_nodes_are_those_of_the_seed_and_five_more():
    assert len(COMMON) + len(TRAINING) == 35
    assert nodes("base") == {*COMMON, *TRAINING, *ADDED, "fit_trainer_training_metrics"}
    assert nodes(None) == nodes("base")
    assert nodes("presaved") == {*COMMON, "fit_tokenizer", "fit_trainer_eval_metrics", *ADDED}


def test_inputs_have_the_defaults_of_the_seed():
    inputs = qa._inputs()
    assert {name: inputs[name][1] for name in INPUTS} == INPUTS
    assert inputs["data_path"] == (str, inspect.Parameter.empty)
    outside = {v.name for v in flow().list_available_variables() if v.is_external_input}
    assert outside - {"start"} == inputs.keys()


def test_settings_of_training_and_adapter():
    config = qa.lora_config()
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (16, 32, 0.2, "none")
    assert config.target_modules == {"q", "v"}
    assert config.task_type == "SEQ_2_SEQ_LM"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        args = qa.training_args("folder", torch.device("cpu"))
    assert [
        str(w.message) for w in caught if issubclass(w.category, DeprecationWarning | FutureWarning)
    ] == []
    assert args.output_dir == "folder"
    assert args.learning_rate == 1e-3
    assert (args.eval_strategy, args.save_strategy, args.logging_strategy) == ("epoch", "epoch", "epoch")
    assert args.auto_find_batch_size
    assert args.load_best_model_at_end
    assert args.metric_for_best_model == "eval_loss"
    assert args.report_to == []


def test_the_model_has_two_names_and_a_default():
    assert qa.peft_model_id(model_id="google/flan-t5-small") == "hamilton-google-flan-t5-small-peft"
    assert qa.peft_model_id(model_id_tokenizer="google/flan-t5-small") == "hamilton-google-flan-t5-small-peft"
    assert qa.peft_model_id("a/b", "a/b") == "hamilton-a-b-peft"
    assert qa.peft_model_id() == "hamilton-google-mt5-small-peft"
    with pytest.raises(RecipeError, match="two names of one input"):
        qa.peft_model_id("a/b", "a/c")


def test_the_documented_name_gives_the_same_tokenizer(t5_folder):
    one = qa.tokenizer(model_id=str(t5_folder))
    other = flow().execute(["tokenizer"], inputs={"model_id_tokenizer": str(t5_folder)})["tokenizer"]
    assert one.get_vocab() == other.get_vocab()


# Splits


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (388, (368, 16, 4)),
        (100, (95, 4, 1)),
        (41, (38, 2, 1)),
        (21, (19, 1, 1)),
        (20, (18, 1, 1)),
        (3, (1, 1, 1)),
    ],
)
def test_splits(rows, expected, tmp_path):
    found = flow().execute(
        ["train_set", "validation_set", "hold_out_set"],
        inputs={"data_path": str(write(tmp_path / "q.json", questions(rows))), **KEYS},
    )
    assert tuple(len(found[name]) for name in ("train_set", "validation_set", "hold_out_set")) == expected
    together = [(q, a) for split in found.values() for q, a in zip(split["input_text"], split["output_text"])]
    assert sorted(together) == sorted((r["question"], r["gpt4_replies_target"]) for r in questions(rows))
    said = "the shares alone would give" in found["train_set"].info.description
    assert said == (rows < 21)


@pytest.mark.parametrize("rows", [21, 33, 57, 123, 400, 999])
def test_split_sizes_are_those_of_train_test_split(rows, tmp_path):
    from datasets import Dataset

    found = qa.raw_dataset(str(write(tmp_path / "q.json", questions(rows))), **KEYS)
    first = Dataset.from_dict({"x": range(rows)}).train_test_split(train_size=0.95)
    second = first["test"].train_test_split(train_size=0.8)
    assert [len(found[n]) for n in found] == [len(first["train"]), len(second["test"]), len(second["train"])]


def test_splits_depend_on_the_seed_alone(tmp_path):
    path = str(write(tmp_path / "q.json", questions(41)))
    again = [
        qa.raw_dataset(path, **KEYS, random_state=seed)["validation_set"]["input_text"] for seed in (1, 1, 2)
    ]
    assert again[0] == again[1] != again[2]


def test_rows_that_ask_the_same_share_a_split(tmp_path):
    rows = [{"question": f"what is {n % 10}", "reply": f"it is {n}"} for n in range(60)]
    found = qa.raw_dataset(str(write(tmp_path / "q.json", rows)), train_size=0.5, validation_size=0.5)
    asked = [set(split["input_text"]) for split in found.values()]
    assert sum(len(a) for a in asked) == 10
    assert [len(split) for split in found.values()] == [36, 12, 12]


def test_short_questions_that_differ_in_a_word_are_different(tmp_path):
    found = qa.raw_dataset(str(write(tmp_path / "q.json", questions(388))), **KEYS)
    assert "nearly the same" not in found["train_set"].info.description


def spelled(base: list[str]) -> list[dict[str, str]]:
    """Each question in four spellings, with an answer of its own."""
    ways = (str, str.upper, lambda q: q + "?", lambda q: f" {q.capitalize()} !")
    return [
        {"question": way(question), "reply": f"{n} {place}"}
        for place, question in enumerate(base)
        for n, way in enumerate(ways)
    ]


FORM = "what should anybody do where the old printer of the office on the first floor shows us error {}"


@pytest.mark.parametrize(
    "base",
    [
        [f"what is {n}" for n in range(60)],
        [FORM.format(n) for n in range(60)],  # near-duplicates all of them, in too large a cluster
        [f"{'. '.join('abcdefgh'[n % 8] * n for n in range(k, k + 3))}" for k in range(1, 40)],
    ],
)
@pytest.mark.parametrize("seed", [1, 2])
def test_questions_that_differ_by_case_or_a_sign_share_a_split(base, seed, tmp_path):
    rows = spelled(base)
    random.Random(seed).shuffle(rows)
    path = str(write(tmp_path / "q.json", rows))
    found = qa.raw_dataset(path, train_size=0.7, validation_size=0.5, random_state=seed)
    asked = [
        {" ".join(re.findall(r"\w+", q.lower())) for q in split["input_text"]} for split in found.values()
    ]
    assert [len(a) > 3 for a in asked] == [True] * 3
    for one, other in itertools.combinations(asked, 2):
        assert not one & other


def test_near_duplicates_share_a_split(tmp_path):
    """A word changed in a long question, or a long answer to two questions."""
    draw = random.Random(0)
    words = [f"w{n}" for n in range(500)]
    rows = []
    for n in range(40):
        question, answer = (draw.choices(words, k=80) for _ in range(2))
        changed = [*question[:-1], "otherwise"]
        rows += [
            {"question": " ".join(q), "reply": " ".join(draw.choices(words, k=80))}
            for q in (question, changed)
        ]
        rows += [{"question": f"{ask} {n}", "reply": " ".join(answer * 2)} for ask in ("who", "when")]
    found = qa.raw_dataset(str(write(tmp_path / "q.json", rows)), train_size=0.6, validation_size=0.5)
    assert [len(split) for split in found.values()] == [96, 32, 32]
    splits = [dict(zip(s["input_text"], s["output_text"])) for s in found.values()]
    for one, other in itertools.combinations(splits, 2):
        assert not {q[:40] for q in one if q[0] == "w" and q[1].isdigit()} & {q[:40] for q in other}
        assert not set(one.values()) & set(other.values())
    description = found["train_set"].info.description
    assert "nearly the same as an earlier question, and in its split: 80 questions" in description


def test_questions_of_one_form_are_not_kept_in_one_split(tmp_path):
    rows = [{"question": FORM.format(n), "reply": f"{n}"} for n in range(388)]
    found = qa.raw_dataset(str(write(tmp_path / "q.json", rows)))
    assert [len(found[name]) for name in ("train_set", "validation_set", "hold_out_set")] == [368, 16, 4]
    assert "nearly the same as more than 32 others" in found["train_set"].info.description


def test_groups_larger_than_a_split_leave_none_empty(tmp_path):
    rows = [{"question": f"what is {n % 4}", "reply": f"it is {n}"} for n in range(40)]
    found = qa.raw_dataset(str(write(tmp_path / "q.json", rows)))
    assert [len(split) for split in found.values()] == [20, 10, 10]
    assert "the shares alone would give 38/1/1" in found["train_set"].info.description


@pytest.mark.parametrize(("held_out", "low"), [(1, "21%"), (4, "51%"), (29, "88%"), (30, None)])
def test_few_held_out_rows_are_cautioned(held_out, low, trained, caplog):
    """The lower end for n of n is n / (n + z²), by Wilson's formula."""
    several = trained.found["hold_out_set"].select([0] * held_out)
    tokenized = trained.found["tokenized_validation"].select([0] * held_out)
    changed = {"hold_out_set": several, "tokenized_hold_out": tokenized, "max_new_tokens": 1}
    found = flow("presaved").execute(
        ["hold_out_set_predictions", "remarks"],
        inputs=trained.inputs,
        overrides={"peft_model_id": str(trained.adapter), **changed},
    )
    assert len(found["hold_out_set_predictions"]) == held_out
    said = [remark for remark in found["remarks"] if "held-out row" in remark]
    assert [remark in caplog.text for remark in said] == [True] * (low is not None)
    if low:
        assert low == f"{held_out / (held_out + 1.959964**2):.0%}"
        assert f"as low as {low}" in said[0]


def test_the_caution_is_kept_with_the_held_out_rows(trained):
    assert "1 held-out row can prove little" in trained.found["hold_out_set"].info.description
    assert any("1 held-out row can prove little" in remark for remark in trained.found["remarks"])


def test_rows_that_cannot_be_used_are_counted(tmp_path):
    rows = [*questions(25), {"question": "", "gpt4_replies_target": "x"}, {"question": "x"}]
    found = qa.raw_dataset(str(write(tmp_path / "q.json", rows)), **KEYS)
    description = found["train_set"].info.description
    assert "25 rows" in description
    assert "1 dropped: empty question (row 26)" in description
    assert "1 dropped: no value for gpt4_replies_target (row 27)" in description


@pytest.mark.parametrize(
    ("rows", "changes", "expected"),
    [
        (questions(2), {}, "each of the three splits needs one"),
        (questions(9), {"input_text_key": "qestion"}, r"gpt4_replies_target[^\0]*did you mean 'question'"),
        (
            questions(9),
            {"input_text_key": "qestion", "output_text_key": "x"},
            r"has the key 'qestion' \(input_text_key\), nor the key 'x' \(output_text_key\)\.[^\0]*"
            r"the keys question, gpt4_replies_target[^\0]*output_text_key: one of question, gpt4_replies_target",
        ),
        ([{**r, "empty": None} for r in questions(9)], {"output_text_key": "empty"}, "empty in every row"),
        (questions(9), {"train_size": 1.0}, "between 0 and 1"),
        (questions(1) * 9, {}, "9 rows, 1 different question\n"),
        (spelled(["what is one", "who are you"]), {"output_text_key": "reply"}, "2 different questions"),
    ],
)
def test_rows_that_make_no_splits(rows, changes, expected, tmp_path):
    path = str(write(tmp_path / "q.json", rows))
    with pytest.raises(DataError, match=expected):
        flow().execute(["train_set"], inputs={"data_path": path, **KEYS, **changes})


# Tokens


def test_lengths_are_percentiles_and_a_cut_answer_teaches_no_end(t5_folder, tmp_path):
    rows = questions(60)
    long = "red blue green " * 12
    for row in rows[:3]:
        row["gpt4_replies_target"] = long + row["gpt4_replies_target"]
    path = str(write(tmp_path / "q.json", rows))
    found = flow().execute(
        [
            "target_lengths", "max_target_lengths", "input_lengths", "max_source_lengths", "tokenized_train",
            "train_set", "tokenizer",
        ],
        inputs={"data_path": path, "model_id": str(t5_folder), **KEYS},
    )  # fmt: skip
    for lengths, longest in (
        ("target_lengths", "max_target_lengths"),
        ("input_lengths", "max_source_lengths"),
    ):
        ordered = sorted(found[lengths])
        at = 0.95 * (len(ordered) - 1)
        low, part = ordered[int(at)], at - int(at)
        assert found[longest] == int(low + part * (ordered[min(int(at) + 1, len(ordered) - 1)] - low))
    end = found["tokenizer"].eos_token_id
    labels = found["tokenized_train"]["labels"]
    assert max(map(len, labels)) == found["max_target_lengths"]
    long_ones = [len(text) > 100 for text in found["train_set"]["output_text"]]
    assert [row.count(end) for row in labels] == [0 if cut else 1 for cut in long_ones]
    assert all(row[-1] == end for row, cut in zip(labels, long_ones) if not cut)
    assert all(ids[-1] == end for ids in found["tokenized_train"]["input_ids"])
    assert (
        f"{sum(long_ones)} answers to {found['max_target_lengths']}"
        in found["tokenized_train"].info.description
    )
    assert found["tokenized_train"].column_names == ["input_ids", "attention_mask", "labels"]


def test_lengths_come_from_all_rows_but_the_held_out_ones(t5_folder, tmp_path):
    path = str(write(tmp_path / "q.json", questions(60)))
    found = flow().execute(
        ["train_set", "validation_set", "input_lengths", "target_lengths"],
        inputs={"data_path": path, "model_id": str(t5_folder), **KEYS},
    )
    tokenizer = t5_tokenizer()
    for lengths, column in (("input_lengths", "input_text"), ("target_lengths", "output_text")):
        of_both = [*found["train_set"][column], *found["validation_set"][column]]
        assert found[lengths] == [len(tokenizer(text).input_ids) for text in of_both]


def test_the_share_that_is_not_cut_is_the_engine_s(monkeypatch):
    from tunesmith.data import pairs

    lengths = list(range(101))
    assert qa.max_source_lengths(lengths) == qa.max_target_lengths(lengths) == 95
    monkeypatch.setattr(pairs, "PERCENTILE", 40)
    assert qa.max_source_lengths(lengths) == qa.max_target_lengths(lengths) == 40


def test_text_that_looks_like_a_special_token_stays_text(t5_folder, tmp_path):
    rows = [{"question": f"what is </s> {n}", "reply": f"it is </s> {n}"} for n in range(9)]
    found = flow().execute(
        ["tokenized_train", "tokenizer"],
        inputs={"data_path": str(write(tmp_path / "q.json", rows)), "model_id": str(t5_folder)},
    )
    end = found["tokenizer"].eos_token_id
    for row in found["tokenized_train"]:
        assert row["input_ids"].count(end) == row["labels"].count(end) == 1


def test_saved_datasets(t5_folder, tmp_path):
    from datasets import load_from_disk

    found = flow().execute(
        ["saved_datasets", "tokenized_hold_out"],
        inputs={
            "data_path": str(write(tmp_path / "q.json", questions(41))),
            "model_id": str(t5_folder),
            "data_dir": str(tmp_path / "data"),
            **KEYS,
        },
    )
    names = {"train": 38, "validation": 2, "inference": 1}
    assert found["saved_datasets"] == {name: str(tmp_path / "data" / name) for name in names}
    assert {name: len(load_from_disk(path)) for name, path in found["saved_datasets"].items()} == names
    assert load_from_disk(found["saved_datasets"]["inference"])[:] == found["tokenized_hold_out"][:]


# The two configurations


def test_a_base_run_gives_the_four_outputs(trained):
    found = trained.found
    assert found["save_best_models"] == {
        "name": "save_best_models", "status": "success", "peft_model_id": str(trained.adapter),
    }  # fmt: skip
    [(question, prediction)] = found["hold_out_set_predictions"]
    assert question == found["hold_out_set"]["input_text"][0]
    assert isinstance(prediction, str)
    assert {
        "train_loss",
        "train_runtime",
        "eval_loss",
        "eval_runtime",
        "epoch",
        "rouge1",
        "rougeLsum",
    } <= found["training_and_validation_set_metrics"].keys()
    assert "rogue1" not in found["training_and_validation_set_metrics"]
    validation = found["finetuned_model_on_validation_set"]
    assert validation.keys() == {"validation_predictions", "validation_references"}
    assert validation["validation_references"] == found["validation_set"]["output_text"][:]
    assert found["remarks"][0] == "41 rows: 38 trained, 2 for validation, 1 held out"


def test_training_lowers_the_loss_and_keeps_the_best_epoch(trained):
    model = copy.deepcopy(trained.found["finetuned_model"])
    collate = qa._collator(qa.tokenizer(trained.inputs["model_id"]), model, -100, 8)
    batch = collate(list(trained.found["tokenized_validation"]))
    with torch.no_grad():
        tuned = float(model(**batch).loss)
        with model.disable_adapter():
            base = float(model(**batch).loss)
    assert tuned < base
    assert tuned == pytest.approx(trained.found["training_and_validation_set_metrics"]["eval_loss"], rel=1e-5)
    history = [e["eval_loss"] for e in trained.found["fit_trainer"].state.log_history if "eval_loss" in e]
    assert trained.found["training_and_validation_set_metrics"]["eval_loss"] == pytest.approx(min(history))


def test_what_is_saved_is_the_trained_adapter(trained):
    from safetensors.torch import load_file

    weights = load_file(trained.adapter / "adapter_model.safetensors")
    assert all(name.rpartition(".lora_")[0].endswith((".q", ".v")) for name in weights)
    raised = [value for name, value in weights.items() if "lora_B" in name]
    assert raised
    assert all(value.abs().sum() > 0 for value in raised)  # an untrained adapter's are all zeros
    live = trained.found["finetuned_model"].state_dict()
    for name, value in weights.items():
        assert torch.equal(live[name.replace(".weight", ".default.weight")], value)
    assert {"save_best_models", "hold_out_set_predictions"} <= {
        v.name for v in flow().what_is_downstream_of("fitted_and_evaluated_trainer")
    }
    assert not {"model.safetensors", "README.md"} & {p.name for p in trained.adapter.iterdir()}


def test_outputs_can_be_asked_for_in_any_order(trained, tmp_path):
    backwards = flow().execute(
        ["training_and_validation_set_metrics", "finetuned_model_on_validation_set", "hold_out_set_predictions",
         "save_best_models"],
        inputs=trained.inputs,
        overrides={"peft_model_id": str(tmp_path / "adapter")},
    )  # fmt: skip
    name = "adapter_model.safetensors"
    assert (tmp_path / "adapter" / name).read_bytes() == (trained.adapter / name).read_bytes()
    assert backwards["hold_out_set_predictions"] == trained.found["hold_out_set_predictions"]
    alone = flow().execute(
        ["save_best_models"], inputs=trained.inputs, overrides={"peft_model_id": str(tmp_path / "alone")}
    )
    assert alone["save_best_models"]["status"] == "success"
    assert (tmp_path / "alone" / name).read_bytes() == (trained.adapter / name).read_bytes()


def state(folder: Path) -> dict[str, tuple[str, int]]:
    return {
        str(p): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns)
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.mark.parametrize("backwards", [False, True])
def test_presaved_measures_the_same_model_and_writes_nothing(trained, backwards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = state(trained.adapter)
    wanted = [*qa.SUGGESTED_OUTPUTS, "hold_out_set_rows", "finetuned_model"][:: -1 if backwards else 1]
    inputs = {name: value for name, value in trained.inputs.items() if name != "model_id"}
    found = flow("presaved").execute(wanted, inputs=inputs, overrides={"peft_model_id": str(trained.adapter)})
    assert state(trained.adapter) == before
    assert list(tmp_path.iterdir()) == []
    assert found["save_best_models"]["status"] == "unchanged"
    for name in ("hold_out_set_predictions", "finetuned_model_on_validation_set", "hold_out_set_rows"):
        assert found[name] == trained.found[name]
    then, now = (
        trained.found["training_and_validation_set_metrics"],
        found["training_and_validation_set_metrics"],
    )
    assert now["eval_loss"] == pytest.approx(then["eval_loss"], rel=1e-5)
    assert {k: now[k] for k in qa.ROUGE} == {k: then[k] for k in qa.ROUGE}
    assert not any(name.startswith("train_") or name == "epoch" for name in now)
    batch = {"input_ids": torch.tensor([[5, 6, 7, 1]]), "labels": torch.tensor([[8, 9, 1]])}
    with torch.no_grad():
        one, other = trained.found["finetuned_model"](**batch), found["finetuned_model"](**batch)
    assert torch.equal(one.logits, other.logits)


@pytest.mark.parametrize("node", ["fit_trainer", "save_best_models"])
def test_another_base_run_never_writes_over_an_adapter(node, trained, tmp_path):
    adapter = shutil.copytree(trained.adapter, tmp_path / "adapter")
    before = state(adapter)
    changes = {"peft_model_id": str(adapter)}
    if node == "save_best_models":  # the folder was filled while this one trained
        changes["fit_trainer"] = trained.found["fit_trainer"]
    with pytest.raises(RunError, match=r"holds an adapter already[^\0]*another folder"):
        flow().execute([node], inputs={**trained.inputs, "random_state": 7}, overrides=changes)
    assert state(adapter) == before


def test_what_else_lies_in_the_folder_stays(trained, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/notes.txt").write_text("mine")
    flow().execute(
        ["save_best_models"],
        inputs={**trained.inputs, "num_train_epochs": 1},
        overrides={"peft_model_id": str(tmp_path / "adapter")},
    )
    assert (tmp_path / "adapter/notes.txt").read_text() == "mine"
    assert not list(tmp_path.glob("adapter/.saving-*"))


@pytest.mark.parametrize("start", ["base", "presaved"])
def test_the_validation_loss_is_the_same_at_every_batch_size(start, trained, tmp_path):
    """Nats per label, answers of 1 to 40 words, against plain row-by-row arithmetic."""
    words = ("red", "blue", "green", "one", "two")
    rows = [
        {"question": f"what is {n}", "reply": " ".join(words[(n + i) % 5] for i in range(1 + n % 4 * 13))}
        for n in range(40)
    ]
    inputs = {
        "data_path": str(write(tmp_path / "q.json", rows)), "model_id": trained.inputs["model_id"],
        "train_size": 0.2, "validation_size": 0.95, "num_train_epochs": 1,
    }  # fmt: skip
    found = {
        size: flow(start).execute(
            ["fit_trainer_eval_metrics", "tokenized_validation", "finetuned_model"],
            inputs={**inputs, "per_device_eval_batch_size": size},
            overrides={"peft_model_id": str(tmp_path / f"{size}" if start == "base" else trained.adapter)},
        )
        for size in (1, 64)
    }
    losses = [found[size]["fit_trainer_eval_metrics"]["eval_loss"] for size in (1, 64)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    each = []
    with torch.no_grad():
        for row in found[64]["tokenized_validation"]:
            wanted = torch.tensor([row["labels"]])
            logits = found[64]["finetuned_model"](
                input_ids=torch.tensor([row["input_ids"]]), labels=wanted
            ).logits
            each.append(-logits[0].double().log_softmax(-1).gather(1, wanted[0][:, None])[:, 0])
    assert losses[1] == pytest.approx(float(torch.cat(each).mean()), rel=1e-5)
    assert losses[1] != pytest.approx(float(torch.stack([e.mean() for e in each]).mean()), rel=1e-3)


def test_an_old_fashioned_driver_runs_it_too(trained, tmp_path):
    from hamilton import base, driver

    old = driver.Driver({"start": "presaved"}, qa, adapter=base.DefaultAdapter())
    found = old.execute(
        ["hold_out_set_predictions"], inputs=trained.inputs, overrides={"peft_model_id": str(trained.adapter)}
    )
    assert found["hold_out_set_predictions"] == trained.found["hold_out_set_predictions"]


@pytest.mark.parametrize("known", [True, False])
def test_presaved_says_where_it_measures_on_learned_questions(known, trained, tmp_path):
    adapter = shutil.copytree(trained.adapter, tmp_path / "adapter")
    if not known:
        (adapter / qa.LEARNED).unlink()

    def remarks(**changes) -> list[str]:
        inputs = {**trained.inputs, **changes}
        return flow("presaved").execute(
            ["remarks"], inputs=inputs, overrides={"peft_model_id": str(adapter)}
        )["remarks"]

    assert any("not known what the adapter was trained on" in said for said in remarks()) is not known
    assert not any("were trained" in said or "were validated" in said for said in remarks())
    for changes in ({"random_state": 1}, {"random_state": 1, "data_path": respelled(trained, tmp_path)}):
        assert any("of the validation questions, or nearly" in said for said in remarks(**changes)) is known


def respelled(trained, folder: Path) -> str:
    """The same questions in capitals and with a question mark."""
    rows = json.loads(Path(trained.inputs["data_path"]).read_text())
    return str(
        write(folder / "respelled.json", [{**r, "question": f"{r['question'].upper()}?"} for r in rows])
    )


def test_questions_that_chose_the_epoch_prove_nothing_either(trained):
    held_out = trained.found["validation_set"]
    found = flow("presaved").execute(
        ["remarks"],
        inputs=trained.inputs,
        overrides={"peft_model_id": str(trained.adapter), "hold_out_set": held_out},
    )["remarks"]
    assert any("2 of the hold-out questions, or nearly the same, were validated" in said for said in found)
    assert not any("were trained" in said for said in found)


def test_a_question_that_is_nearly_a_learned_one_is_counted():
    from datasets import Dataset

    learned = qa._marks("train", Dataset.from_dict({"input_text": [FORM.format(n) for n in range(50)]}))
    asked = ["how are you", FORM.format(49).upper() + "?", FORM.format("x")]
    assert qa._known(Dataset.from_dict({"input_text": asked[:1]}), learned, "train") == 0
    assert qa._known(Dataset.from_dict({"input_text": asked[:2]}), learned, "train") == 1
    few = qa._marks("train", Dataset.from_dict({"input_text": [FORM.format(1)]}))
    assert qa._known(Dataset.from_dict({"input_text": asked}), few, "train") == 2


def test_presaved_finds_the_folder_of_the_model(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained.adapter, tmp_path / qa.peft_model_id(trained.inputs["model_id"]))
    found = flow("presaved").execute(["hold_out_set_predictions"], inputs=trained.inputs)
    assert found["hold_out_set_predictions"] == trained.found["hold_out_set_predictions"]


def test_the_folder_s_name_is_that_of_the_model_however_its_path_is_spelled(trained, monkeypatch):
    folder = Path(trained.inputs["model_id"])
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    spellings = [str(folder), f"{folder}/", "./t5", "t5", "t5/", f"../{folder.parent.name}/t5", "~/t5"]
    assert {qa.peft_model_id(name) for name in spellings} == {"hamilton-t5-peft"}
    assert qa.peft_model_id("./gone/t5") == "hamilton-t5-peft"


@pytest.mark.parametrize("name", ["model_id", "model_id_tokenizer"])
def test_presaved_refuses_another_model_than_the_adapter_s(name, trained, tmp_path, monkeypatch):
    def found(model: str):
        return flow("presaved").execute(
            ["peft_config"], inputs={name: model}, overrides={"peft_model_id": str(trained.adapter)}
        )["peft_config"]

    folder = Path(trained.inputs["model_id"])
    other = shutil.copytree(folder, tmp_path / "t5")
    for model in (str(other), "google/flan-t5-small", "./nothing"):
        with pytest.raises(ModelError, match=rf"another model[^\0]*{re.escape(model)}[^\0]*{folder}"):
            found(model)
    monkeypatch.chdir(folder.parent)
    for model in (str(folder), "./t5", "t5"):
        assert found(model).base_model_name_or_path == str(folder)


def test_what_depends_on_what():
    training = {*TRAINING[:2], "trainer", "training_args", "base_model", "fit_trainer_training_metrics"}
    assert not upstream("presaved", *qa.SUGGESTED_OUTPUTS, *ADDED) & training
    assert "fitted_and_evaluated_trainer" in upstream("base", "save_best_models")
    learned = upstream("base", "finetuned_model", "fit_trainer", "save_best_models")
    assert not learned & {"hold_out_set", "tokenized_hold_out"}


@pytest.mark.parametrize(
    ("content", "said"), [("{", "is damaged"), ("{}", "damaged|does not say which model")]
)
def test_a_damaged_adapter_config_is_named(content, said, tmp_path):
    for name in qa.ADAPTER:
        (tmp_path / name).write_text(content)
    with pytest.raises(ModelError, match=said) as caught:
        qa.peft_config(str(tmp_path))
    assert "adapter_config.json" in str(caught.value)


def test_a_presaved_adapter_without_a_tokenizer_takes_that_of_its_base(trained, tmp_path):
    bare = tmp_path / "adapter"
    bare.mkdir()
    for name in qa.ADAPTER:
        shutil.copy(trained.adapter / name, bare)
    found = flow("presaved").execute(
        ["hold_out_set_predictions"], inputs=trained.inputs, overrides={"peft_model_id": str(bare)}
    )
    assert found["hold_out_set_predictions"] == trained.found["hold_out_set_predictions"]


def test_the_saved_adapter_is_a_model_of_the_workbench(trained):
    from tunesmith.data import pairs
    from tunesmith.data.examples import Message
    from tunesmith.models import load_tokenizer

    tokenizer = load_tokenizer(str(trained.adapter))
    for row, text in zip(
        trained.found["tokenized_validation"], trained.found["validation_set"]["input_text"]
    ):
        assert pairs.prompt_ids((Message("user", text),), tokenizer) == row["input_ids"]


# Answers and scores


def test_answers_are_greedy_and_those_of_single_questions(trained):
    model, rows = trained.found["finetuned_model"], list(trained.found["tokenized_validation"])
    tokenizer = qa.tokenizer(trained.inputs["model_id"])
    alone = [
        model.generate(
            input_ids=torch.tensor([row["input_ids"]]),
            attention_mask=torch.tensor([row["attention_mask"]]),
            max_new_tokens=6,
            do_sample=False,
        )
        for row in rows
    ]
    texts = [tokenizer.decode(ids[0], skip_special_tokens=True) for ids in alone]
    assert trained.found["finetuned_model_on_validation_set"]["validation_predictions"] == texts


def test_answers_are_made_in_batches_on_the_device_that_is_asked_for(trained, monkeypatch):
    moved, batches = [], []
    model = copy.deepcopy(trained.found["finetuned_model"])
    generate = type(model).generate

    def counted(self, **options):
        batches.append(len(options["input_ids"]))
        return generate(self, **options)

    monkeypatch.setattr(type(model), "generate", counted)
    monkeypatch.setattr(model, "to", lambda device: moved.append(device) or model)
    qa.hold_out_set_predictions(
        trained.found["tokenized_validation"],
        model,
        qa.tokenizer(trained.inputs["model_id"]),
        torch.device("cpu"),
        trained.found["validation_set"],
        max_new_tokens=2,
    )
    assert moved == [torch.device("cpu")]
    assert batches == [2]


def test_rouge_is_that_of_rouge_score():
    from rouge_score.rouge_scorer import RougeScorer

    predictions, references = (
        ["the red lamps run", "blue\nand green"],
        ["a red lamp ran", "blue\ngreen and red"],
    )
    found = qa.validation_set_metrics(predictions, references, qa.metric())
    scorer = RougeScorer(list(found), use_stemmer=True)
    each = [scorer.score(r, p) for p, r in zip(predictions, references)]
    assert list(found) == ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    for name, value in found.items():
        assert value == pytest.approx(50 * sum(scores[name].fmeasure for scores in each))
    assert 0 < found["rouge2"] < found["rouge1"] < 100


def test_hold_out_rows_have_references_and_scores(trained):
    [row] = trained.found["hold_out_set_rows"]
    [(question, prediction)] = trained.found["hold_out_set_predictions"]
    assert (row["question"], row["prediction"]) == (question, prediction)
    assert row["reference"] == trained.found["hold_out_set"]["output_text"][0]
    rows = qa.hold_out_set_rows([("q", "red 7"), ("q", "blue")], ["red 7", "green"], qa.metric())
    assert [row["rouge1"] for row in rows] == [100, 0]
    assert qa.hold_out_set_metrics(rows)["rouge1"] == 50


def test_references_are_whole_and_answers_in_other_scripts_are_remarked(t5_folder, trained, tmp_path):
    rows = questions(41)
    for row in rows:
        row["gpt4_replies_target"] = "красный " * (1 + len(row["question"]) % 5)
    inputs = {**trained.inputs, "data_path": str(write(tmp_path / "q.json", rows)), "max_new_tokens": 2}
    found = flow("presaved").execute(
        ["validation_references", "validation_set", "hold_out_set_references", "hold_out_set", "remarks"],
        inputs=inputs,
        overrides={"peft_model_id": str(trained.adapter)},
    )
    assert found["validation_references"] == found["validation_set"]["output_text"][:]
    assert found["hold_out_set_references"] == found["hold_out_set"]["output_text"][:]
    assert any("letters a to z" in remark for remark in found["remarks"])


@pytest.mark.thorough
def test_a_tuned_model_answers_questions_it_has_not_seen(tmp_path):
    """A T5 that writes words down in order (seldom backwards) learns to write them backwards when it is asked."""
    from transformers import DataCollatorForSeq2Seq, T5ForConditionalGeneration

    words = ["red", "blue", "green", "one", "two", "three", "hello", "yes"]
    draw = random.Random(0)
    lists = list(itertools.product(words, repeat=3))
    draw.shuffle(lists)
    tokenizer = t5_tokenizer()
    torch.manual_seed(0)
    size = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_heads": 4, "dropout_rate": 0.0}
    model = T5ForConditionalGeneration(t5_config(len(tokenizer), **size))
    optimizer, collate = (
        torch.optim.AdamW(model.parameters(), 2e-3),
        DataCollatorForSeq2Seq(tokenizer, model=model),
    )
    for _ in range(600):
        rows = []
        for _ in range(32):
            asked, back = draw.choice(lists[:300]), draw.random() < 0.25
            text = f"{'question' if back else 'answer'} {' '.join(asked)}"
            told = tokenizer(" ".join(asked[::-1] if back else asked)).input_ids
            rows.append({"input_ids": tokenizer(text).input_ids, "labels": told})
        model(**collate(rows)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [
        {"question": f"what is {' '.join(asked)}", "reply": " ".join(asked[::-1])} for asked in lists[:388]
    ]
    inputs = {
        "data_path": str(write(tmp_path / "q.json", rows)), "model_id": str(tmp_path / "base"), "max_new_tokens": 16,
        "num_train_epochs": 5, "train_size": 0.8, "validation_size": 0.5,
    }  # fmt: skip
    folder = {"peft_model_id": str(tmp_path / "adapter")}
    found = flow().execute(
        [
            "save_best_models",
            "hold_out_set_rows",
            "hold_out_set_metrics",
            "finetuned_model",
            "tokenized_hold_out",
        ],
        inputs=inputs,
        overrides=folder,
    )
    references = [row["reference"] for row in found["hold_out_set_rows"]]
    with found["finetuned_model"].disable_adapter():
        before = qa._answers(
            found["tokenized_hold_out"], found["finetuned_model"], tokenizer, torch.device("cpu"), 16
        )
    base = sum(b == r for b, r in zip(before, references)) / len(references)
    tuned = sum(row["prediction"] == row["reference"] for row in found["hold_out_set_rows"]) / len(references)
    assert len(references) == 39
    assert base < 0.6
    assert tuned > 0.9
    assert found["hold_out_set_metrics"]["rouge2"] > 90
    again = flow("presaved").execute(["hold_out_set_rows", "remarks"], inputs=inputs, overrides=folder)
    assert again["hold_out_set_rows"] == found["hold_out_set_rows"]
    assert not any("were trained" in said for said in again["remarks"])
    print(f"held-out exact match {base:.1%} before, {tuned:.1%} after, n={len(references)}")


# Models that do not fit


@pytest.fixture
def bert(tmp_path, tiny_tokenizer) -> Path:
    from transformers import BertConfig, BertForMaskedLM

    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForMaskedLM(BertConfig(vocab_size=320, **size)).save_pretrained(tmp_path / "bert")
    tiny_tokenizer.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.mark.parametrize("node", ["tokenizer", "base_model"])
def test_a_causal_model_is_named_as_such(node, tiny_model_folder):
    with pytest.raises(ModelError, match=r"causal language model[^\0]*encoder-decoder[^\0]*method sft"):
        flow().execute([node], inputs={"model_id": str(tiny_model_folder)})


@pytest.mark.parametrize("node", ["tokenizer", "base_model"])
def test_an_encoder_only_model_is_refused(node, bert):
    with pytest.raises(ModelError, match="encoder-only"):
        flow().execute([node], inputs={"model_id": str(bert)})


def test_other_families_get_the_adapter_on_their_own_projections(tmp_path):
    folder = save("bart", tmp_path / "bart")
    model = flow().execute(["base_model"], inputs={"model_id": str(folder)})["base_model"]
    adapted = {
        name.split(".lora_A")[0].rpartition(".")[2] for name, _ in model.named_modules() if ".lora_A." in name
    }
    assert adapted == {"q_proj", "v_proj"}
    assert model.config.use_cache is False


@pytest.mark.parametrize("family", ["bart", "mt5"])
def test_other_families_go_both_ways(family, tmp_path):
    inputs = {
        "data_path": str(write(tmp_path / "q.json", questions(24))),
        "model_id": str(save(family, tmp_path / family)),
        "num_train_epochs": 1,
        "max_new_tokens": 200,
        **KEYS,
    }
    folder = {"peft_model_id": str(tmp_path / "adapter")}
    found, again = (
        flow(start).execute(list(qa.SUGGESTED_OUTPUTS), inputs=inputs, overrides=folder)
        for start in ("base", "presaved")
    )
    assert found["hold_out_set_predictions"] == again["hold_out_set_predictions"]
    losses = [part["training_and_validation_set_metrics"]["eval_loss"] for part in (found, again)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_seed_draws_the_adapter_s_start(t5_folder):
    def start(seed: int) -> torch.Tensor:
        model = flow().execute(["base_model"], inputs={"model_id": str(t5_folder), "random_state": seed})
        return next(v for n, v in model["base_model"].named_parameters() if "lora_A" in n)

    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        (None, "no such folder here"),
        ([], "an empty folder"),
        (["adapter_config.json"], r"adapter_model\.safetensors missing"),
        (
            ["adapter_model.safetensors", "tokenizer.json"],
            r"adapter_config\.json missing[^\0]*tokenizer\.json",
        ),
    ],
)
def test_a_folder_without_an_adapter_says_what_is_missing(present, expected, trained, tmp_path):
    folder = tmp_path / "adapter"
    if present is not None:
        folder.mkdir()
        for name in present:
            shutil.copy(trained.adapter / name, folder)
    with pytest.raises(ModelError, match=expected):
        flow("presaved").execute(
            list(qa.SUGGESTED_OUTPUTS), inputs=trained.inputs, overrides={"peft_model_id": str(folder)}
        )


def test_an_unknown_configuration_is_an_error():
    for build in (flow, flows.driver):
        with pytest.raises(RecipeError, match="Did you mean 'presaved'"):
            build("pre-saved")


@pytest.mark.parametrize("start", ["base", "presaved"])
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"inputs": {"num_epochs": 3}}, r"no input 'num_epochs'[^\0]*Did you mean 'num_train_epochs'"),
        ({"inputs": {"peft_model_id": "x"}}, r"no input 'peft_model_id'[^\0]*overrides=\{'peft_model_id'"),
        ({"inputs": {"lora_confg": 1}}, "'lora_config', which is an override"),
        ({"inputs": {"zzzzz": 1}}, "docs/flows.md"),
        ({"overrides": {"pef_model_id": "x"}}, r"no override 'pef_model_id'[^\0]*'peft_model_id'"),
    ],
)
def test_our_driver_refuses_names_that_the_flow_does_not_have(start, given, expected):
    with pytest.raises(RecipeError, match=expected):
        flows.driver(start).execute(["device"], **given)
    assert flow(start).execute(["device"], **given)["device"], "plain Hamilton passes over them"


def test_our_driver_takes_every_input_and_node(trained):
    found = flows.driver("presaved").execute(
        ["hold_out_set_predictions"], inputs=trained.inputs, overrides={"peft_model_id": str(trained.adapter)}
    )
    assert found["hold_out_set_predictions"] == trained.found["hold_out_set_predictions"]
    everything = dict.fromkeys(qa._inputs(), 1)
    assert flows.driver().execute(["max_new_tokens"], inputs=everything) == {"max_new_tokens": 1}
    assert flows.driver().execute(["device"], overrides=dict.fromkeys(nodes("base"), 2)) == {"device": 2}
    assert (
        not flows.driver()
        .execute(["peft_model_id"], overrides={"model_id": "a/b"})["peft_model_id"]
        .count("mt5")
    )


def test_hamilton_adds_no_traceback_to_errors_of_ours(caplog):
    caplog.set_level(logging.INFO, logger="hamilton")  # `api` switches its messages off for its own driver
    for build in (flow, flows.driver):
        with pytest.raises(RecipeError):
            build().execute(["peft_model_id"], inputs={"model_id": "a", "model_id_tokenizer": "b"})
        with pytest.raises(RecipeError):
            build("pre-saved")
    assert caplog.text == ""
    with pytest.raises(TypeError):
        flow().execute(["max_source_lengths"], overrides={"input_lengths": ["a"]})
    assert "encountered an error" in caplog.text, "a bug's traceback stays"


def test_8_bit_needs_a_gpu_and_goes_through_bitsandbytes(t5_folder, monkeypatch):
    import importlib.util

    import transformers

    with pytest.raises(OutOfResources, match="CUDA"):
        flow().execute(
            ["base_model"],
            inputs={"model_id": str(t5_folder), "load_in_8bit": True},
            overrides={"device": torch.device("cpu")},
        )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"tunesmith\[qlora\]"):
        qa._eight_bit(str(t5_folder), torch.device("cuda"))
    asked = {}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(
        transformers.AutoModelForSeq2SeqLM, "from_pretrained", lambda name, **options: asked.update(options)
    )
    qa._eight_bit(str(t5_folder), torch.device("cuda"))
    assert asked.pop("quantization_config").load_in_8bit
    assert asked == {"device_map": {"": 0}, "trust_remote_code": False, "use_safetensors": True}


def test_padding_is_never_trained(t5_folder):
    with pytest.raises(RecipeError, match="would train the padding"):
        flow().execute(["data_collator"], inputs={"model_id": str(t5_folder), "label_pad_token_id": 0})


@pytest.mark.parametrize(
    ("name", "node"),
    [
        ("num_train_epochs", "training_args"),
        ("per_device_train_batch_size", "training_args"),
        ("per_device_eval_batch_size", "training_args"),
        ("gradient_accumulation_steps", "training_args"),
        ("pad_to_multiple_of", "data_collator"),
        ("max_new_tokens", "hold_out_set_predictions"),
    ],
)
def test_numbers_that_leave_nothing_to_do(name, node, trained):
    start = "presaved" if node == "hold_out_set_predictions" else "base"
    with pytest.raises(RecipeError, match=f"{name} must be at least 1"):
        flow(start).execute(
            [node], inputs={**trained.inputs, name: 0}, overrides={"peft_model_id": str(trained.adapter)}
        )


def test_without_a_model_s_name_the_default_is_said(caplog):
    with pytest.raises(ModelError, match="google/mt5-small"):
        flow().execute(["tokenizer"])
    assert "No model is named by model_id: google/mt5-small is taken" in caplog.text


def test_named_splits_are_remarked(tmp_path):
    (tmp_path / "set").mkdir()
    for name, rows in (("train", questions(30)), ("test", questions(33)[30:])):
        write(tmp_path / "set" / f"{name}.json", rows)
    found = qa.raw_dataset(str(tmp_path / "set"), **KEYS)
    assert "draws its own splits all the same" in found["train_set"].info.description


def test_a_loss_that_is_no_number_stops_before_the_weights_change(t5_folder, tmp_path):
    from tunesmith.errors import TrainingDiverged

    broken = flow().execute(["base_model"], inputs={"model_id": str(t5_folder)})["base_model"]
    with torch.no_grad():
        broken.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(TrainingDiverged):
        flow().execute(
            ["fit_trainer"],
            inputs={
                "data_path": str(write(tmp_path / "q.json", questions(21))),
                "model_id": str(t5_folder),
                **KEYS,
            },
            overrides={"base_model": broken, "peft_model_id": str(tmp_path / "adapter")},
        )


# Drawing, the command, the page


@pytest.mark.parametrize("start", ["base", "presaved"])
def test_it_can_be_drawn(start):
    drawn = flow(start).display_all_functions(orient="TB", deduplicate_inputs=True)
    for name in nodes(start):
        assert re.search(rf"\b{name}\b", drawn.source), name
    assert "rankdir=TB" in drawn.source
    assert re.search(r"\bfit_trainer -> save_best_models\b", drawn.source) is not None or start == "presaved"


@pytest.mark.skipif(shutil.which("dot") is None, reason="graphviz's program dot is not installed")
def test_the_drawing_is_rendered(tmp_path):
    flow().display_all_functions(str(tmp_path / "dag.png"), orient="TB", deduplicate_inputs=True)
    assert (tmp_path / "dag.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_trains_and_measures(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = [
        "--data-path", trained.inputs["data_path"], "--model-id", trained.inputs["model_id"], "--input-text-key",
        "question", "--output-text-key", "gpt4_replies_target", "--max-new-tokens", "6", "--peft-model-id", "adapter",
    ]  # fmt: skip
    assert qa._main([*flags, "--num-train-epochs", "1"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert first.keys() == {*qa.SUGGESTED_OUTPUTS, "remarks"}
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert qa._main([*flags, "--start", "presaved", "--output", "hold_out_set_rows"]) == 0
    captured = capsys.readouterr()
    again = json.loads(captured.out)
    assert again.keys() == {"hold_out_set_rows", "remarks"}
    assert [[r["question"], r["prediction"]] for r in again["hold_out_set_rows"]] == first[
        "hold_out_set_predictions"
    ]
    assert "fine-tuning" in captured.err


def test_the_command_says_what_is_wrong(trained, capsys, monkeypatch, tmp_path):
    flags = ["--data-path", trained.inputs["data_path"], "--model-id", trained.inputs["model_id"]]
    assert qa._main([*flags, "--output", "hold_out_set_prediction"]) == 1
    assert "Did you mean 'hold_out_set_predictions'" in capsys.readouterr().err
    assert qa._main(flags) == 1
    assert "gpt4_replies_target" in capsys.readouterr().err
    assert qa._main([*flags, "--draw", str(tmp_path / "dag.pngg")]) == 1
    assert ".png, .svg, .pdf" in capsys.readouterr().err
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with monkeypatch.context() as stopped:
        stopped.setattr(qa, "_run", lambda given, inputs: (_ for _ in ()).throw(KeyboardInterrupt))
        assert qa._main(flags) == 130
    capsys.readouterr()
    assert qa._main([*flags, "--draw", str(tmp_path / "dag.png")]) == 1
    assert "graphviz" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")
def test_help_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["question_answer", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("tunesmith.flows.question_answer", run_name="__main__")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for name in qa._inputs():
        assert "--" + name.replace("_", "-") in shown


def test_a_json_list_of_objects_is_read_under_the_names_of_its_keys(tmp_path):
    """The page's layout, with keys of one's own: every pair arrives, and nothing else does."""
    rows = [{"ask": f"What is {n}?", "told": f"It is {n * n}.", "other": n} for n in range(12)]
    (tmp_path / "q.json").write_text(json.dumps(rows, indent=4))
    found = flow().execute(
        ["train_set", "validation_set", "hold_out_set"],
        inputs={"data_path": str(tmp_path / "q.json"), "input_text_key": "ask", "output_text_key": "told"},
    )
    assert all(split.column_names == ["input_text", "output_text"] for split in found.values())
    pairs = [(q, a) for split in found.values() for q, a in zip(split["input_text"], split["output_text"])]
    assert sorted(pairs) == sorted((row["ask"], row["told"]) for row in rows)


def test_training_moves_the_adapter_and_none_of_the_base(trained):
    model = trained.found["finetuned_model"]
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all(".lora_" in name for name in trainable)
    numbers = [(p.numel(), p.requires_grad) for p in model.parameters()]
    assert sum(n for n, is_trained in numbers if is_trained) < sum(n for n, _ in numbers)
    from transformers import AutoModelForSeq2SeqLM

    base = AutoModelForSeq2SeqLM.from_pretrained(trained.inputs["model_id"]).state_dict()
    kept = {
        name.replace(".base_layer", ""): value for name, value in model.get_base_model().state_dict().items()
    }
    assert all(torch.equal(kept[name].cpu(), value) for name, value in base.items())


def test_the_module_reads_top_to_bottom_as_it_runs():
    """A node of a base run stands below those that it needs."""
    variables = {v.name: v for v in flow().list_available_variables()}
    lines = {
        name: min(f.__code__.co_firstlineno for f in variable.originating_functions)
        for name, variable in variables.items()
        if variable.originating_functions and not variable.is_external_input
    }
    for name, line in lines.items():
        above = {v.name for v in flow().what_is_upstream_of(name)} & lines.keys()
        assert all(lines[other] <= line for other in above), name
