"""The model card: what it tells of where a model comes from, and what it does not tell of this machine."""

from __future__ import annotations

import json

import yaml

from tunesmith.compose import compose
from tunesmith.export.card import write_card
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
            "warning", message=f"read {tmp_path}/rows/some.jsonl, which is old; 3 rows/s and tokens/step stay"
        )
        write_card(own, [])
        card = (own.final_model / "README.md").read_text()
        assert str(tmp_path) not in card
        assert "read some.jsonl, which is old; 3 rows/s and tokens/step stay" in card
        assert "reference_model: reference" in card
        assert "a-project-of-ours" not in card
    assert "Base model `merged_model`, itself made from `me/llama`" in card
    assert "under `mit`" in card
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "me/llama"
    card = (tmp_path / "runs/second-first/final_model/README.md").read_text()
    assert "Base model `first`, itself made from `me/llama`, method `dpo`" in card
