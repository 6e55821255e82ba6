"""`tunesmith generate`: every row of a set is answered or told why not, in its place."""

from __future__ import annotations

import json

import pytest

from tunesmith import api, engines
from tunesmith.errors import DataError, RunError, TunesmithError


@pytest.fixture
def prompt_file(tmp_path):
    rows = [{"prompt": f"what is the count of {n % 4}"} for n in range(9)]
    rows[3] = {"prompt": ""}
    rows[6] = {"other": "no question"}
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_each_row_has_a_line_and_a_killed_command_goes_on(
    tiny_model_folder, prompt_file, tmp_path, monkeypatch
):
    settings = {"evaluation": {"max_new_tokens": 4}}
    whole = api.generate(tiny_model_folder, str(prompt_file), tmp_path / "whole.jsonl", settings=settings)
    assert (whole.rows, whole.answered, sum(whole.refused.values())) == (9, 7, 2)
    found = lines(whole.file)
    assert [line["row"].rpartition(":")[2] for line in found] == [str(n) for n in range(1, 10)]
    assert ["error" in line for line in found] == [n in (3, 6) for n in range(9)]
    assert found[0]["completion"] == found[4]["completion"] == found[8]["completion"]
    one = "".join(
        api.chat(tiny_model_folder, [{"role": "user", "content": "what is the count of 1"}], max_new_tokens=4)
    )
    assert found[1]["completion"] == one

    asked: list[int] = []
    padded = engines.ENGINES["padded"]

    def killed(source, given, finished, say):
        asked.append(len(given.prompts))

        def first_two(number, answer):
            finished(number, answer)
            if len(asked) == 1 and number == 1:
                raise KeyboardInterrupt

        padded(source, given, first_two if len(asked) == 1 else finished, say)

    monkeypatch.setitem(engines.ENGINES, "padded", killed)
    again = tmp_path / "again.jsonl"
    with pytest.raises(KeyboardInterrupt):
        api.generate(tiny_model_folder, str(prompt_file), again, settings=settings)
    assert not again.exists()
    api.generate(tiny_model_folder, str(prompt_file), again, settings=settings)
    assert lines(again) == found
    assert asked[0] == 7
    assert asked[1] < 7
    assert not list(tmp_path.glob(".answers-*"))


def test_nothing_is_written_over_and_a_set_without_questions_is_refused(
    tiny_model_folder, prompt_file, tmp_path
):
    there = tmp_path / "there.jsonl"
    there.write_text("mine")
    with pytest.raises(RunError, match="there already"):
        api.generate(tiny_model_folder, str(prompt_file), there)
    assert there.read_text() == "mine"
    prompt_file.write_text('{"prompt": ""}\n{"prompt": " "}\n')
    with pytest.raises(DataError, match="can be asked"):
        api.generate(tiny_model_folder, str(prompt_file), tmp_path / "none.jsonl")
    with pytest.raises(TunesmithError, match="greedy"):
        api.generate(
            tiny_model_folder,
            str(prompt_file),
            tmp_path / "x.jsonl",
            settings={"evaluation": {"attempts": 2}},
        )


def test_the_column_that_asks_may_have_a_name_of_its_own(tiny_model_folder, tmp_path):
    file = tmp_path / "asked.jsonl"
    file.write_text('{"frage": "what is the count of 1"}\n{"andere": "no question"}\n')
    settings = {"data": {"input_text_key": "frage"}, "evaluation": {"max_new_tokens": 2}}
    found = api.generate(tiny_model_folder, str(file), tmp_path / "a.jsonl", settings=settings)
    assert (found.rows, found.answered) == (2, 1)
    assert lines(found.file)[0]["prompt"] == "what is the count of 1"
    settings["data"]["input_text_key"] = "fragen"
    with pytest.raises(DataError, match="has no column fragen"):
        api.generate(tiny_model_folder, str(file), tmp_path / "b.jsonl", settings=settings)
