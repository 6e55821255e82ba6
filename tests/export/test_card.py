"""The model card: what it tells of where a model comes from, and what it does not tell of this machine."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import taught
import yaml
from huggingface_hub import constants

from tunesmith.compose import compose
from tunesmith.export.card import write_card, write_made_card
from tunesmith.training.run import Run, create


def made(tmp_path, **layers) -> Run:
    run = create(compose({"output_dir": str(tmp_path / "runs"), **layers}).recipe)
    run.final_model.mkdir()
    (run.final_model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "x"}))
    return run


def test_the_card_has_the_lineage_and_no_folder_of_this_machine(tmp_path, question_file):
    data = {"dataset": str(question_file)}
    first = made(tmp_path, name="first", model={"base": "me/llama"}, data=data, adapter={"kind": "lora"})
    merged = first.path / "merged_model"
    merged.mkdir()
    (merged / "README.md").write_text("---\nlicense: mit\nbase_model: me/llama\n---\n# merged\n")
    for base in (first.path, first.final_model, merged):
        own = made(
            tmp_path,
            name=f"second-{base.name}",
            model={"base": str(base)},
            data=data,
            method={"kind": "dpo", "reference_model": str(tmp_path / "reference")},
            adapter={"kind": "lora"},
            tracking={"project": "a-project-of-ours"},
        )
        own.event(
            "warning",
            message=f"read {tmp_path}/rows/some.jsonl, which is old; 3 rows/s and tokens/step stay; and "
            f"file://{tmp_path}/rows/other.jsonl, https://example.org{tmp_path.parent}/x",
        )
        write_card(own, [])
        card = (own.final_model / "README.md").read_text()
        assert str(tmp_path) not in card
        assert f"and other.jsonl, https://example.org{tmp_path.parent}/x" in card
        assert "read some.jsonl, which is old; 3 rows/s and tokens/step stay" in card
        assert "reference_model: reference" in card
        assert "a-project-of-ours" not in card
    assert "Base model `merged_model`, itself made from `me/llama`" in card
    assert "under `mit`" in card
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "me/llama"
    card = (tmp_path / "runs/second-first/final_model/README.md").read_text()
    assert "Base model `first`, itself made from `me/llama`, method `dpo`" in card


@pytest.fixture
def hub_s_cache(tmp_path, monkeypatch):
    """Where the Hub's client keeps what it fetched: here the card of a data set."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    place = tmp_path / "hub" / "datasets--me--rows"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("abc")
    (place / "snapshots" / "abc").mkdir(parents=True)
    (place / "snapshots" / "abc" / "README.md").write_text("---\nlicense:\n- cc-by-4.0\n- mit\n---\n")


def test_the_card_has_the_licence_of_each_data_set_or_says_that_none_is_stated(
    tmp_path, question_file, hub_s_cache
):
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: own-terms\n---\n")
    mix = [{"dataset": name} for name in ("example:support", str(folder), str(question_file))]
    write_card(run := made(tmp_path, name="mixed", data={"dataset": "me/rows", "mix": mix}), [])
    card = (run.final_model / "README.md").read_text().split("## Licence")[1].split("##")[0]
    assert "The data set `rows` is under `cc-by-4.0 and mit`." in card
    assert "The data set `example:support` is under `apache-2.0`." in card
    assert "The data set `own` is under `own-terms`." in card
    assert f"The licence of `{question_file.stem}` is not stated." in card


def used(card: str, folder) -> None:
    """Run the code of a card as it stands."""
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(code.replace('"PATH"', repr(str(folder))).replace("FOLDER", str(folder)), {})


def test_the_code_of_a_card_asks_the_model(taught_model, tmp_path, question_file, capsys):
    folder = shutil.copytree(taught_model, tmp_path / "merged")
    write_made_card(folder, None, "me/llama", [], [], kind="causal")
    used((folder / "README.md").read_text(), folder)
    assert capsys.readouterr().out == f"{taught.ANSWER}\n"

    import peft
    from transformers import AutoModelForCausalLM

    run = made(tmp_path, name="own", model={"base": str(taught_model)}, data={"dataset": str(question_file)},
               adapter={"kind": "lora"})  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(taught_model)
    peft.get_peft_model(model, peft.LoraConfig(r=2)).save_pretrained(run.final_model)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(taught_model / name, run.final_model)
    write_card(run, [])
    card = (run.final_model / "README.md").read_text()
    used(card, run.final_model)
    assert capsys.readouterr().out == f"{taught.ANSWER}\n"
    assert "is no model of the Hub" in card
