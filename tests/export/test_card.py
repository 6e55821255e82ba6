"""The model card: what it tells of where a model comes from, and what it does not tell of this machine."""

from __future__ import annotations

import json
import re
import shutil

import taught
import yaml

from tunesmith.compose import compose
from tunesmith.export.card import write_card, write_merged_card
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


def used(card: str, folder) -> None:
    """Run the code of a card as it stands."""
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(code.replace('"PATH"', repr(str(folder))), {})


def test_the_code_of_a_card_asks_the_model(taught_model, tmp_path, question_file, capsys):
    folder = shutil.copytree(taught_model, tmp_path / "merged")
    write_merged_card(folder, None, "me/llama", [], [], kind="causal")
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
