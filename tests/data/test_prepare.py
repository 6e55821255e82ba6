"""From files to token ids: nothing is lost, nothing leaks, the cache never lies, mixes and masks are as asked."""

from __future__ import annotations

import copy
import gc
import importlib.metadata
import json
import os
import pickle
import random
import re
import shutil
import sys
from collections import Counter
from dataclasses import replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunesmith import data
from tunesmith.data import cache
from tunesmith.data.examples import as_json, from_json
from tunesmith.data.splitting import DROPPED, HELD_OUT, TRAIN, VALIDATION, draw
from tunesmith.data.templates import IGNORED, encode
from tunesmith.errors import DataError
from tunesmith.recipe import Data


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def questions(count, start=0):
    words = ("red", "blue", "green", "one", "two", "three")
    return [
        {"prompt": f"what is number {n} of {words[n % 6]}", "response": f"{words[n % 5]} {n}"}
        for n in range(start, start + count)
    ]


def made(path, tokenizer, **options):
    settings = Data(dataset=path, **options)
    return data.encoded(data.prepare(settings), tokenizer, data=settings, loss_on="answers")


def answers(encodings, tokenizer):
    return [
        tokenizer.decode([i for i in e.labels if i != IGNORED]).removesuffix("<|im_end|>") for e in encodings
    ]


# rows


def test_what_the_caller_set_aside_from_garbage_collection_stays_aside():
    gc.freeze()
    before = gc.get_threshold()
    with data.rarely_collected():
        assert gc.get_threshold()[0] > before[0]
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() > 0


def test_every_row_is_in_the_ledger_and_every_trained_one_in_the_file(tmp_path, tiny_tokenizer):
    rows = questions(2500)
    rows[7]["response"] = ""
    encoded = made(jsonl(tmp_path / "a.jsonl", rows), tiny_tokenizer)
    entries = list(encoded.ledger.entries)
    assert [entry.row.number for entry in entries] == list(range(1, 2501))
    counts = encoded.ledger.counts()
    assert Counter(entry.fate for entry in entries) == {
        name: counts[name] for name in ("train", "validation", "held_out", "dropped")
    }
    assert (len(encoded.train), len(encoded.held_out)) == (counts["train"], counts["held_out"])
    assert counts["dropped"] == 1
    by_fate = [rows[e.row.number - 1]["response"] for e in entries if e.fate == "train"]
    assert answers(encoded.train, tiny_tokenizer) == by_fate
    assert [entries[n].row.number - 1 for n in encoded.train.rows] == encoded.train.rows.tolist()
    assert encoded.train.lengths.tolist() == [len(e.input_ids) for e in encoded.train]


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(100, 250), st.integers(1, 60), st.integers(0, 10**6))
def test_adding_rows_moves_none(tmp_path_factory, count, more, seed):
    """Not even near-duplicates, which join the split of an earlier row."""
    rng = random.Random(seed)
    folder = tmp_path_factory.mktemp("append")

    def changed(text):
        words = text.split()
        words[rng.randrange(len(words))] = f"changed{rng.randrange(9)}"
        return " ".join(words)

    texts = [" ".join(f"w{rng.randrange(500)}" for _ in range(40)) for _ in range(count)]
    texts += [changed(text) for text in rng.choices(texts, k=count // 3)]
    rng.shuffle(texts)
    extra = [changed(text) for text in rng.choices(texts, k=more)] + [f"a new text {n}" for n in range(more)]

    def split(texts):
        path = jsonl(folder / "a.jsonl", [{"text": text} for text in texts])
        return data.prepare(Data(dataset=path, cache=False))

    first = split(texts)
    assert any("nearly the same" in note for note in first.notes)
    assert {TRAIN, VALIDATION, HELD_OUT} <= set(first.fates.tolist())
    assert split(texts + extra).fates.tolist()[: len(texts)] == first.fates.tolist()


def test_near_duplicates_share_a_split(tmp_path):
    base = [" ".join(f"w{(n * 7 + k * k) % 97}" for k in range(60)) for n in range(120)]
    rows = [{"text": text} for text in base] + [{"text": text + " more"} for text in base]
    path = jsonl(tmp_path / "a.jsonl", rows)
    splits = data.prepare(Data(dataset=path, held_out=0.3, cache=False))
    fates = splits.fates
    pairs = [(fates[n], fates[n + 120]) for n in range(120)]
    assert all(a == b for a, b in pairs)
    assert {a for a, _ in pairs} == {TRAIN, VALIDATION, HELD_OUT}
    assert any("nearly the same" in note for note in splits.notes)
    apart = data.prepare(Data(dataset=path, held_out=0.3, near_duplicates="ignore", cache=False)).fates
    assert any(apart[n] != apart[n + 120] for n in range(120)), "negative control"


def test_one_text_for_all_rows_does_not_swallow_the_split(tmp_path):
    long = " ".join(f"word{k}" for k in range(400))
    rows = [{"prompt": f"{long} question {n}", "response": f"answer {n}"} for n in range(60)]
    splits = data.prepare(Data(dataset=jsonl(tmp_path / "a.jsonl", rows), cache=False))
    assert splits.count(TRAIN) > 30
    assert splits.count(HELD_OUT) > 0
    assert any("texts of one form" in note for note in splits.notes)


def test_training_rows_that_stand_in_a_named_split_are_dropped(tmp_path, tiny_tokenizer):
    folder = tmp_path / "set"
    jsonl(folder / "train.jsonl", questions(30))
    jsonl(folder / "test.jsonl", questions(3))
    encoded = made(str(folder), tiny_tokenizer, validation=0.0)
    assert encoded.ledger.counts()["train"] == 27
    assert encoded.ledger.reasons() == {
        "the same question stands in the source's validation or held-out split": 3
    }


# mixes


def mixed(tmp_path, **options):
    a = jsonl(tmp_path / "a.jsonl", questions(400))
    b = jsonl(tmp_path / "b.jsonl", questions(100, start=1000))
    first = {name: options.pop(name) for name in ("weight", "max_rows") if name in options}
    second = options.pop("second", {})
    return Data(
        dataset=a,
        mix=[{"dataset": b, **second}],
        held_out=0.0,
        validation=0.0,
        cache=False,
        **first,
        **options,
    )


def trained_by_source(splits):
    counts = Counter()
    for number, row, _ in splits.rows():
        if splits.fates[number] == TRAIN:
            counts[row.source] += int(splits.copies[number])
    return dict(counts)


def test_mixes(tmp_path):
    assert trained_by_source(data.prepare(mixed(tmp_path))) == {"a.jsonl": 400, "b.jsonl": 100}
    assert trained_by_source(data.prepare(mixed(tmp_path, second={"max_rows": 10}))) == {
        "a.jsonl": 400, "b.jsonl": 10,
    }  # fmt: skip
    # Equal weights without repetition: as many of the larger as there are of the smaller.
    equal = data.prepare(mixed(tmp_path, weight=1, second={"weight": 1}))
    assert trained_by_source(equal) == {"a.jsonl": 100, "b.jsonl": 100}
    assert (equal.fates == DROPPED).sum() == 300
    assert set(equal.reasons.counts()) == {"not drawn: num_samples and the mix's weights leave it out"}
    # A total above what the weights allow repeats rows, evenly.
    more = data.prepare(mixed(tmp_path, weight=1, second={"weight": 3}, num_samples=800))
    assert trained_by_source(more) == {"a.jsonl": 200, "b.jsonl": 600}
    assert set(more.copies[400:].tolist()) == {6}
    # A total without weights keeps the proportions.
    assert trained_by_source(data.prepare(mixed(tmp_path, num_samples=50))) == {"a.jsonl": 40, "b.jsonl": 10}


def test_what_is_drawn_is_reproducible_and_seeded(tmp_path):
    drawn = [
        data.prepare(mixed(tmp_path, num_samples=50, mix_seed=seed)).fates.tolist() for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


def test_repeated_rows_are_trained_as_often(tmp_path, tiny_tokenizer):
    settings = mixed(tmp_path, weight=1, second={"weight": 3}, num_samples=800)
    encoded = data.encoded(data.prepare(settings), tiny_tokenizer, data=settings, loss_on="answers")
    assert len(encoded.train) == 800
    assert encoded.ledger.counts()["train"] + encoded.ledger.counts()["dropped"] == 500
    assert {entry.copies for entry in encoded.ledger.entries if entry.row.source == "b.jsonl"} == {6}


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=200),
    st.lists(st.none() | st.floats(0.1, 9), min_size=3, max_size=3),
    st.none() | st.integers(1, 500),
)
def test_draws_meet_their_totals(parts, weights, total):
    keys = np.arange(len(parts), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    copies = draw(keys, np.array(parts, dtype=np.int8), weights=weights, total=total, seed=0)
    if any(weight is not None for weight in weights):
        if total is None:
            assert copies.max() == 1
        else:
            assert copies.sum() == total
            for part in set(parts):
                own = copies[np.array(parts) == part]
                assert own.max() - own.min() <= 1, "rows of one source are used equally often"
    else:
        assert copies.sum() == min(total or len(parts), len(parts))


def test_a_streamed_hub_set_is_read_once_and_no_further_than_asked(monkeypatch, tmp_path, tiny_tokenizer):
    import datasets

    sent = []

    def load(name, config, **options):
        assert options["streaming"]

        def rows():
            for n in range(10_000):
                sent.append(n)
                yield {"prompt": f"question {n}", "response": "red"}

        return datasets.IterableDatasetDict(train=datasets.IterableDataset.from_generator(rows))

    monkeypatch.setattr(datasets, "load_dataset", load)
    encoded = made("owner/set", tiny_tokenizer, streaming=True, max_rows=50, cache=False)
    assert encoded.ledger.counts()["rows_in"] == 50
    assert len(sent) <= 51
    with pytest.raises(DataError, match="for Hub data sets"):
        data.prepare(Data(dataset=jsonl(tmp_path / "a.jsonl", questions(3)), streaming=True))


# the cache


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells how much of a mapped file is in memory")
def test_what_was_read_of_the_tokens_is_handed_back(tmp_path, tiny_tokenizer):
    rows = jsonl(tmp_path / "rows.jsonl", questions(3000))
    encoded = data.encoded(
        data.prepare(Data(dataset=rows, cache=False)), tiny_tokenizer, data=Data(dataset=rows, cache=False),
        loss_on="answers",
    )  # fmt: skip
    train = encoded.train

    def held():
        is_ours, total = False, 0
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if "-" in line.split()[0]:
                is_ours = line.endswith(str(train.file))
            elif is_ours and line.startswith("Rss:"):
                total += int(line.split()[1])
        return total

    dataset = train.dataset()
    before = dataset[:]
    assert held() * 1024 > 0.9 * train.file.stat().st_size
    encoded.release()
    assert held() == 0
    assert dataset[:] == before
    assert list(pickle.loads(pickle.dumps(train))) == list(train)
    assert pickle.loads(pickle.dumps(dataset))[:] == before


def test_the_cache_is_used_and_never_stale(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    path = jsonl(tmp_path / "a.jsonl", questions(60))
    first = made(path, tiny_tokenizer)
    again = made(path, tiny_tokenizer)
    assert again.train.file == first.train.file
    assert any("used again" in note for note in again.notes)
    assert list(again.train) == list(first.train)
    assert list(again.held_out) == list(first.held_out)
    assert list(again.ledger.entries) == list(first.ledger.entries)
    assert again.proof == first.proof
    template = copy.deepcopy(tiny_tokenizer)
    template.chat_template = template.chat_template.replace("message.role", "message.role | upper")
    changes = {
        "template": lambda: made(path, template),
        "length": lambda: made(path, tiny_tokenizer, max_length=77),
        "rows": lambda: made(jsonl(tmp_path / "a.jsonl", questions(61)), tiny_tokenizer),
        "system": lambda: made(path, tiny_tokenizer, system_prompt="red"),
        "shares": lambda: made(path, tiny_tokenizer, held_out=0.4),
    }
    files = {first.train.file}
    for name, change in changes.items():
        changed = change()
        assert changed.train.file not in files, name
        files.add(changed.train.file)
    monkeypatch.setattr(
        cache, "key", lambda facts, before=cache.key: before([facts, "another version of the code"])
    )
    assert made(path, tiny_tokenizer).train.file not in files
    assert not list((tmp_path / "cache").rglob(".making-*")), "nothing half written is left"


def test_a_failed_preparation_leaves_nothing_in_the_cache(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    path = jsonl(tmp_path / "a.jsonl", questions(30))
    with pytest.raises(DataError, match="supervision proof"):
        made(path, tiny_tokenizer, max_length=8)
    kept = [folder.name for folder in (tmp_path / "cache" / "prepared").iterdir()]
    assert len(kept) == 1, "the split alone, which was right"


def test_the_cache_stays_below_its_limit(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "LIMIT", 1)
    made(jsonl(tmp_path / "a.jsonl", questions(30)), tiny_tokenizer)
    unused(tmp_path / "cache")
    made(jsonl(tmp_path / "b.jsonl", questions(31)), tiny_tokenizer)
    unused(tmp_path / "cache")
    made(jsonl(tmp_path / "c.jsonl", questions(32)), tiny_tokenizer)
    assert len(list((tmp_path / "cache" / "prepared").iterdir())) == 2, "the last one's split and tokens"


def unused(folder: Path) -> None:
    """As if nobody had used what is in the cache for two days."""
    for facts in folder.rglob(cache.FACTS):
        os.utime(facts, (0, facts.stat().st_mtime - 2 * 24 * 3600))


def test_what_a_training_uses_stays_in_the_cache_whatever_others_prepare(
    tmp_path, tiny_tokenizer, monkeypatch
):
    """It reads the held-out questions when it is done, after days."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "LIMIT", 1)
    monkeypatch.setattr(cache, "OFTEN", -1)
    used = made(jsonl(tmp_path / "a.jsonl", questions(60)), tiny_tokenizer)
    questioned = list(used.held_out)
    unused(tmp_path / "cache")
    used.release()  # as after each step
    made(jsonl(tmp_path / "b.jsonl", questions(31)), tiny_tokenizer)
    assert list(used.held_out) == questioned
    assert questioned


def test_stored_examples_are_what_they_were(tmp_path):
    rows = [
        {"messages": CALLING["messages"], "tools": CALLING["tools"], "tag": "x\ud800"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1}]},
        {"text": "once"},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "completion": "b", "label": False},
    ]
    for row in rows:
        [example] = data.prepare(Data(dataset=jsonl(tmp_path / "a.jsonl", [row]), cache=False)).train
        assert from_json(as_json(example)) == example


# masks


def masked(tokenizer, turns, loss_on="answers", **row):
    from tunesmith.data.examples import Row
    from tunesmith.data.formats import FORMATS

    example = FORMATS["messages"].convert({"messages": turns, **row}, Row("x", 1))
    encoding = encode(example, tokenizer, loss_on=loss_on)
    return tokenizer.decode([i for i in encoding.labels if i != IGNORED])


def turns(*weights):
    found = []
    for number, weight in enumerate(weights):
        found += [
            {"role": "user", "content": f"one {number}"},
            {"role": "assistant", "content": f"red {number}"},
        ]
        if weight is not None:
            found[-1][weight[0]] = weight[1]
    return found


@pytest.mark.parametrize(
    ("weights", "loss_on", "expected"),
    [
        ([None, None], "answers", "red 0<|im_end|>red 1<|im_end|>"),
        ([None, None], "last_answer", "red 1<|im_end|>"),
        ([("weight", 0), None], "answers", "red 1<|im_end|>"),
        ([None, ("weight", 0)], "answers", "red 0<|im_end|>"),
        ([("train", False), ("train", True)], "answers", "red 1<|im_end|>"),
        ([("weight", 1.0), None, None], "last_answer", "red 0<|im_end|>red 2<|im_end|>"),
    ],
)
def test_a_row_may_say_which_answers_are_trained(tiny_tokenizer, weights, loss_on, expected):
    assert masked(tiny_tokenizer, turns(*weights), loss_on) == expected


def test_weight_0_holds_for_the_whole_text_as_well(tiny_tokenizer):
    text = masked(tiny_tokenizer, turns(("weight", 0), None), "everything")
    assert "red 0" not in text
    assert "one 0" in text
    assert "red 1<|im_end|>" in text


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ([("weight", 0.5)], "neither 0 nor 1"),
        ([("weight", 0)], "every answer has weight 0"),
    ],
)
def test_weights_that_cannot_be_followed(tiny_tokenizer, weights, reason):
    from tunesmith.data.examples import Unusable

    with pytest.raises(Unusable, match=reason):
        masked(tiny_tokenizer, turns(*weights))


CALLING = {
    "tools": [
        {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "none": None}}},
    ],
    "messages": [
        {"role": "user", "content": "one and two"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": "<|im_end|>"}'}}
            ],
        },
        {"role": "tool", "name": "add", "tool_call_id": "1", "content": "3"},
        {"role": "assistant", "content": "three"},
    ],
}  # fmt: skip


@lru_cache
def calling_families():
    """Families whose template can be given tool calls, by name; a template that lists tools only is none."""
    from families import families

    return {f.name: f for f in families() if "tool_calls" in f.template and f.known}


@pytest.mark.parametrize("family", calling_families())
def test_tool_calls_and_results_are_rendered_by_the_template(family):
    from families import tokenizer_of

    from tunesmith.data.examples import Row, Unusable
    from tunesmith.data.formats import FORMATS
    from tunesmith.data.supervision import Proof
    from tunesmith.data.templates import encode_all, encoder, end_of_turn_ids, views

    tokenizer = tokenizer_of(calling_families()[family])
    context = encoder(tokenizer)
    calling = json.loads(
        json.dumps(CALLING).replace('{"type": "object"', '{"properties": {}, "type": "object"')
    )
    calling["tools"][0]["function"]["description"] = "adds"
    calling["messages"][2]["content"] = "fünf"
    example = FORMATS["messages"].convert(calling, Row("x", 1))
    if family == "deepseek_r1_distill":
        # It writes a call only where the message's content is none, and then fails for want of one.
        with pytest.raises(Unusable, match="does not write tool calls"):
            encode(example, tokenizer)
        return
    shown = views(example, context, "answers")
    encodings = encode_all(shown, tokenizer)
    assert not [reason for reason in encodings if isinstance(reason, Unusable)]
    arrays = [replace(e, input_ids=np.array(e.input_ids), labels=np.array(e.labels)) for e in encodings]
    proof = Proof(context, loss_on="answers", max_length=10_000, may_cut_answers=False, rows=len(shown))
    assert proof.check(range(len(shown)), shown, arrays) == [None] * len(shown)
    text = tokenizer.decode(encodings[-1].input_ids)
    assert "none" not in text, "keys without a value come from columnar files and are no part of a schema"
    assert "fünf" in text
    trained = "".join(tokenizer.decode([i for i in e.labels if i != IGNORED]) for e in encodings)
    stretches = [
        tokenizer.decode([i for i, _ in stretch])
        for e in encodings
        for is_trained, stretch in groupby(
            zip(e.input_ids, e.labels, strict=True), lambda pair: pair[1] != IGNORED
        )
        if is_trained
    ]
    assert sum("add" in stretch for stretch in stretches) == 1, "the call is trained, and once"
    assert trained.count("three") == 1
    assert re.search(r"\W?a\W+.{0,60}?1\b", trained, re.DOTALL)
    assert "'a': 1" not in trained, "arguments as JSON or in the family's own way, not as Python has them"
    assert "one and two" not in trained
    assert "fünf" not in trained
    for encoding in encodings:
        assert [i for i in encoding.labels if i != IGNORED][-1] in end_of_turn_ids(tokenizer)
    calm = json.loads(json.dumps(calling).replace("<|im_end|>", "x"))
    without = [
        i
        for view in views(FORMATS["messages"].convert(calm, Row("x", 1)), context, "answers")
        for i in encode(view, tokenizer).input_ids
    ]
    special = set(tokenizer.all_special_ids)
    ids = [i for encoding in encodings for i in encoding.input_ids]
    assert [i for i in ids if i in special] == [i for i in without if i in special]


TALK = "{% for m in messages %}<|im_start|>{{ m.role }}\nBODY<|im_end|>\n{% endfor %}" + (
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SCHEMAS = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
CALLS = "{% for c in m.tool_calls or () %}{{ c.function.name }}ARGS{% endfor %}"
AS_JSON = CALLS.replace("ARGS", "{{ c.function.arguments | tojson }}")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (SCHEMAS + TALK.replace("BODY", "{{ m.content }}"), "does not write tool calls"),
        (SCHEMAS + TALK.replace("BODY", "{{ m.content }}" + CALLS.replace("ARGS", "")), "does not write tool calls"),
        (
            SCHEMAS + TALK.replace("BODY", "{{ m.content }}{% if not m.content %}" + AS_JSON + "{% endif %}"),
            "does not write the call of add",
        ),
    ],
    ids=["schemas only", "names only", "calls beside words are lost"],
)  # fmt: skip
def test_a_tool_call_that_the_template_leaves_out_is_refused(tiny_tokenizer, template, reason):
    from tunesmith.data.examples import Unusable

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = template
    said = copy.deepcopy(CALLING)
    said["messages"][1]["content"] = "red"
    with pytest.raises(Unusable, match=reason):
        masked(tokenizer, said["messages"], tools=said["tools"])


def test_arguments_are_json_where_a_template_puts_them_as_they_are(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = SCHEMAS + TALK.replace(
        "BODY", "{{ m.content }}" + CALLS.replace("ARGS", "{{ c.function.arguments }}")
    )
    said = masked(tokenizer, CALLING["messages"], tools=CALLING["tools"])
    assert 'add{"a": 1, "b": "<|im_end|>"}<|im_end|>' in said


def test_tools_need_a_template_that_takes_them(tiny_tokenizer):
    from tunesmith.data.examples import Unusable

    with pytest.raises(Unusable, match="no place for tools"):
        masked(tiny_tokenizer, CALLING["messages"], tools=CALLING["tools"])


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_goes_where_the_template_wants_it(key):
    from families import families, tokenizer_of

    tokenizer = tokenizer_of(next(f for f in families() if f.name == "qwen3"))
    said = masked(
        tokenizer,
        [{"role": "user", "content": "one"}, {"role": "assistant", "content": "red", key: "it is blue"}],
    )
    assert said == "<think>\nit is blue\n</think>\n\nred<|im_end|>"


def test_reasoning_that_has_no_place_is_counted(tmp_path, tiny_tokenizer):
    rows = [
        {
            "messages": [
                {"role": "user", "content": str(n)},
                {"role": "assistant", "content": "red", "thinking": "hm"},
            ]
        }
        for n in range(9)
    ]
    encoded = made(jsonl(tmp_path / "a.jsonl", rows), tiny_tokenizer)
    assert any(
        "9 rows have reasoning, for which the chat template has no place" in note for note in encoded.notes
    )


# inspection


def test_inspect_shows_the_worst_rows_and_the_named_ones(tmp_path, tiny_tokenizer):
    from tunesmith.data.inspection import inspect_rows, write_page

    rows = questions(40)
    rows[4]["response"] = "red " * 200
    rows[9]["prompt"] = "what <b>&" + "blue " * 60
    rows[11]["response"] = ""
    splits = data.prepare(Data(dataset=jsonl(tmp_path / "a.jsonl", rows), cache=False))

    def look(**options):
        return inspect_rows(splits, tiny_tokenizer, max_length=100, loss_on="answers", **options)

    by_why = {seen.why: seen for seen in look(count=1)}
    assert by_why["longest, most truncated"].row.number == 5
    assert by_why["lowest trained share"].row.number == 10
    longest = by_why["longest, most truncated"]
    assert Counter(role for _, role in longest.pieces)["cut"] == longest.cut == longest.tokens - 100
    assert "".join(text for text, _ in longest.pieces).count("red") == 200
    named = look(rows=["12", "a.jsonl:3"])
    assert (named[0].row.number, named[0].fate, named[0].reason) == (12, "dropped", "empty answer")
    trained = "".join(text for text, role in named[1].pieces if role == "trained")
    assert trained == rows[2]["response"] + "<|im_end|>"
    with pytest.raises(DataError, match="no row 99"):
        look(rows=["99"])
    page = write_page(look(), tmp_path / "page.html", title="a <title>").read_text()
    assert "<b>" not in page
    assert page.count('class="trained"') > 3
    assert "a &lt;title&gt;" in page


def test_characters_of_several_tokens_are_shown_whole(tiny_tokenizer):
    from tunesmith.data.examples import Conversation, Message, Row
    from tunesmith.data.templates import shown

    text = "né 漢字 👩"
    encoding = encode(
        Conversation((Message("user", text), Message("assistant", text)), Row("x", 1)), tiny_tokenizer
    )
    pieces = shown(encoding, tiny_tokenizer)
    assert len(pieces) == len(encoding.input_ids)
    assert "".join(piece for piece, _ in pieces) == tiny_tokenizer.decode(encoding.input_ids)


def test_a_template_that_rewrites_earlier_answers_trains_each_of_them_once(tmp_path, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
        "<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
    )
    turns = [
        {"role": "assistant" if n % 2 else "user", "content": text}
        for n, text in enumerate(["what", "red", "and", "blue", "one", "green"])
    ]
    rows = [
        {"messages": turns},
        {"messages": turns[:2]},
        {"messages": [*turns[:3], {**turns[3], "weight": 0}, *turns[4:]]},
    ]
    path = jsonl(tmp_path / "chats.jsonl", rows)
    settings = Data(dataset=path, validation=0, held_out=0, near_duplicates="ignore")
    splits = data.prepare(settings)
    found = data.encoded(splits, tokenizer, data=settings, loss_on="answers")
    trained = [tokenizer.decode([i for i in e.labels if i != -100]) for e in found.train]
    assert trained == [f"{answer}<|im_end|>" for answer in ("red", "blue", "green", "red", "red", "green")]
    assert found.ledger.counts()["train"] == 3
    assert next(entry.tokens for entry in found.ledger.entries) == sum(
        len(e.input_ids) for e in found.train[:3]
    )
    assert "2 conversations are trained once for each question, as 5 examples" in " ".join(found.notes)
    assert not found.proof["breaches"]
    # Negative control: the last answer alone, where that is asked for.
    last = data.encoded(splits, tokenizer, data=settings, loss_on="last_answer")
    assert len(last.train) == 3


def test_a_cache_that_cannot_be_written_is_said_and_done_without(tmp_path, tiny_tokenizer, monkeypatch):
    path = jsonl(tmp_path / "rows.jsonl", questions(30))
    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    found = made(path, tiny_tokenizer)
    assert len(found.train) > 10
    assert "the cache cannot be written" in " ".join(found.notes)


def test_what_a_killed_process_left_is_cleared_away(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    old, fresh = (tmp_path / "cache/prepared" / name for name in (".making-old", ".making-fresh"))
    for folder in (old, fresh):
        folder.mkdir(parents=True)
    os.utime(old, (0, 0))
    made(jsonl(tmp_path / "rows.jsonl", questions(30)), tiny_tokenizer)
    assert not old.exists()
    assert fresh.exists()


def test_what_the_template_leaves_out_is_counted(tmp_path, tiny_tokenizer):
    rows = questions(9)
    encoded = made(jsonl(tmp_path / "a.jsonl", rows), tiny_tokenizer, system_prompt="Be brief.")
    assert not [note for note in encoded.notes if "no place" in note]
    tokenizer = copy.deepcopy(tiny_tokenizer)
    spoken = TALK.replace("BODY", "{{ m.content }}" + AS_JSON)
    tokenizer.chat_template = spoken.replace(
        "<|im_start|>{{", "{% if m.role in ('user', 'assistant') %}<|im_start|>{{"
    ).replace("<|im_end|>\n", "<|im_end|>\n{% endif %}")
    encoded = made(jsonl(tmp_path / "a.jsonl", rows), tokenizer, system_prompt="Be brief.")
    assert (
        "9 rows have a system message, for which the chat template has no place: it is left out"
        in encoded.notes
    )
    said = json.loads(json.dumps(CALLING).replace("<|im_end|>", "x"))
    chats = [
        {**said, "messages": [{"role": "user", "content": f"one and {n}"}, *said["messages"][1:]]}
        for n in range(9)
    ]
    encoded = made(jsonl(tmp_path / "b.jsonl", chats), tokenizer)
    for what in ("a tool's result", "schemas of tools"):
        assert (
            f"9 rows have {what}, for which the chat template has no place: it is left out" in encoded.notes
        )


def test_a_renamed_file_is_another_data_set(tmp_path):
    """Its name decides on how it is read, which split it is, and what the ledger says."""
    path = tmp_path / "rows.txt"
    path.write_text("".join(json.dumps(row) + "\n" for row in questions(40)))
    assert "'text'" in " ".join(data.prepare(Data(dataset=str(path))).notes)
    again = path.rename(tmp_path / "rows.jsonl")
    splits = data.prepare(Data(dataset=str(again)))
    assert "'prompt_response'" in " ".join(splits.notes)
    moved = again.rename(tmp_path / "moved.jsonl")
    entries = data.prepare(Data(dataset=str(moved))).ledger.entries
    assert {entry.row.source for entry in entries} == {"moved.jsonl"}


def test_a_renamed_split_of_a_folder_is_another_split(tmp_path):
    folder = tmp_path / "set"
    jsonl(folder / "train.jsonl", questions(60))
    jsonl(folder / "eval.jsonl", questions(30, start=100))
    options = {"dataset": str(folder), "validation": 0.0, "held_out": 0.0}
    assert data.prepare(Data(**options)).count(VALIDATION) == 30
    (folder / "eval.jsonl").rename(folder / "test.jsonl")
    assert data.prepare(Data(**options)).count(HELD_OUT) == 30


@pytest.mark.parametrize("changed", ["loss_on", "special tokens", "template", "library", "code"])
def test_the_cache_key_holds_what_tokens_depend_on(changed, tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    settings = Data(dataset=jsonl(tmp_path / "rows.jsonl", questions(40)))
    tokenizer, loss_on = copy.deepcopy(tiny_tokenizer), "answers"

    def used_again():
        made = data.encoded(data.prepare(settings), tokenizer, data=settings, loss_on=loss_on)
        return any("of an earlier run" in note for note in made.notes)

    assert not used_again()
    assert used_again()
    match changed:
        case "loss_on":
            loss_on = "everything"
        case "special tokens":
            tokenizer.add_special_tokens({"additional_special_tokens": ["red"]})
        case "template":
            tokenizer.chat_template += " "
        case "library":
            version = importlib.metadata.version
            monkeypatch.setattr(
                "importlib.metadata.version", lambda name: "0" if name == "tokenizers" else version(name)
            )
        case "code":
            copied = tmp_path / "data"
            shutil.copytree(Path(cache.__file__).parent, copied)
            shutil.copytree(Path(cache.__file__).parent.parent / "methods", tmp_path / "methods")
            (copied / "templates.py").write_text("# changed")
            monkeypatch.setattr(cache, "__file__", str(copied / "cache.py"))
    assert not used_again()


def test_what_is_drawn_of_one_set_does_not_depend_on_another(tmp_path):
    first, second = (
        jsonl(tmp_path / f"{name}.jsonl", questions(80, at)) for name, at in (("a", 0), ("b", 500))
    )

    def drawn(rows):
        jsonl(tmp_path / "a.jsonl", rows)
        splits = data.prepare(
            Data(
                dataset=first, weight=1, mix=[{"dataset": second, "weight": 1}], num_samples=60,
                validation=0, held_out=0, cache=False, near_duplicates="ignore",
            )
        )  # fmt: skip
        count = len(splits.fates) - 80
        return (splits.fates[count:] == TRAIN).tolist()

    before = drawn(questions(80))
    assert sum(before) == 30
    assert drawn(questions(81)) == before
    assert drawn(questions(80)[::-1]) == before


def test_rows_with_special_text_are_the_same_while_others_are_proven(tmp_path, tiny_tokenizer):
    """Tokenizing runs ahead in a thread while prompts are proven: neither may change the other's tokenizer."""
    end = tiny_tokenizer.eos_token
    rows = [
        {"prompt": f"what is {n} {end} of {n * 7}", "response": f"red {end} {n} blue"} for n in range(3000)
    ]
    settings = Data(
        dataset=jsonl(tmp_path / "rows.jsonl", rows),
        cache=False,
        validation=0,
        held_out=0,
        near_duplicates="ignore",
    )
    splits = data.prepare(settings)
    made = data.encoded(splits, tiny_tokenizer, data=settings, loss_on="answers")
    assert made.ledger.counts()["train"] == 3000
    specials = [sum(i == tiny_tokenizer.eos_token_id for i in row.input_ids) for row in made.train]
    assert set(specials) == {2}


def test_a_hundred_and_thirty_data_sets_are_a_mix(tmp_path):
    paths = [jsonl(tmp_path / f"{n}.jsonl", questions(2, start=10 * n)) for n in range(130)]
    splits = data.prepare(Data(dataset=paths[0], mix=[{"dataset": path} for path in paths[1:]], cache=False))
    assert len(splits.fates) == 260


# what a first user found


def test_inspect_proves_what_it_shows(tmp_path, tiny_tokenizer):
    from tunesmith.data.inspection import inspect_rows

    rows = questions(40)
    rows[4]["prompt"] = "what " * 200
    splits = data.prepare(
        Data(dataset=jsonl(tmp_path / "a.jsonl", rows), cache=False, validation=0, held_out=0)
    )

    def look(**options):
        [seen] = inspect_rows(
            splits, tiny_tokenizer, max_length=100, loss_on="answers", rows=["5"], **options
        )
        return seen.fate, seen.reason

    breach = "max_length 100 cuts away a whole answer"
    assert look() == ("train", f"fails the supervision proof, so nothing would be trained: {breach}")
    assert look(on_breach="drop") == ("dropped", breach)
    assert look(over_long="drop") == ("dropped", "longer than max_length 100 (over_long: drop)")
    [by_itself] = [
        seen
        for seen in inspect_rows(
            splits, tiny_tokenizer, max_length=100, loss_on="answers", count=1, on_breach="drop"
        )
        if seen.row.number == 5
    ]
    assert (by_itself.fate, by_itself.reason) == ("dropped", breach)
    with pytest.raises(DataError, match=r"There is no row 999(.|\n)*a.jsonl:1 to 40(.|\n)*number of a row"):
        inspect_rows(splits, tiny_tokenizer, max_length=100, loss_on="answers", rows=["999"])
    with pytest.raises(DataError, match=r"There is no row b.jsonl:3(.|\n)*Did you mean 'a.jsonl'"):
        inspect_rows(splits, tiny_tokenizer, max_length=100, loss_on="answers", rows=["b.jsonl:3"])


@pytest.mark.parametrize("cache", [False, True])
def test_rows_of_files_with_one_name_stay_apart(tmp_path, cache):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        jsonl(tmp_path / folder / "data.jsonl", questions(30, start=100 if folder == "b" else 0))
    settings = Data(
        dataset=str(tmp_path / "a/data.jsonl"), mix=[{"dataset": str(tmp_path / "b/data.jsonl")}], cache=cache
    )
    for _ in range(2):
        sources = Counter(entry.row.source for entry in data.prepare(settings).ledger.entries)
        assert sources == {"a/data.jsonl": 30, "b/data.jsonl": 30}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_samples": 4000}, "num_samples 4000 has no effect: there are"),
        ({"weight": 2}, "weight 2 has no effect: there is no data.mix"),
        ({"num_samples": 5}, None),
        ({"num_samples": 4000, "weight": 1}, None),
        ({}, None),
    ],
)
def test_fields_without_effect_are_said(tmp_path, options, said):
    path = jsonl(tmp_path / "a.jsonl", questions(40))
    found = [
        note for note in data.prepare(Data(dataset=path, cache=False, **options)).notes if "effect" in note
    ]
    assert [note.startswith(said) for note in found] == [True] if said else found == []


def test_a_missing_value_is_named_by_the_columns_that_are_there(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("question,answer\n" + "".join(f"what is {n},{n}\n" for n in range(8)) + "and now,\n")
    splits = data.prepare(Data(dataset=str(path), cache=False))
    assert set(splits.reasons.counts()) == {"no value for reply or answer or response"}


def test_copies_and_near_copies_are_counted_as_validate_counts_them(tmp_path):
    from tunesmith import api

    long = " ".join(f"word{n}" for n in range(90))
    rows = [*questions(30), {"prompt": long, "response": "yes"}, {"prompt": long, "response": "no"}]
    path = jsonl(tmp_path / "a.jsonl", [*rows, *rows[:3]])
    counts = api.validate(str(path)).counts
    notes = data.prepare(Data(dataset=path, cache=False)).notes
    assert counts["duplicate"] == 3
    assert "3 rows are the same as an earlier one" in notes
    verb = "row is" if counts["near_duplicate"] == 1 else "rows are"
    assert f"{counts['near_duplicate']} {verb} nearly the same as an earlier one" in notes


def test_inspect_says_why_no_row_can_be_shown(tmp_path, tiny_tokenizer):
    from tunesmith.data.inspection import inspect_rows

    tool = {"type": "function", "function": {"name": "f"}}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = jsonl(tmp_path / "a.jsonl", [{"messages": turns, "tools": [tool]}] * 3)
    splits = data.prepare(Data(dataset=path, cache=False, near_duplicates="ignore"))
    with pytest.raises(DataError, match=r"None of the 3 rows can be shown(.|\n)*3 × .*no place for tools"):
        inspect_rows(splits, tiny_tokenizer, max_length=100, loss_on="answers")
