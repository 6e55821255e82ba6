"""Rows that join and leave a batch are answered as each one is alone."""

from __future__ import annotations

import threading
import time

import pytest
import torch
import transformers

from tunesmith.data.templates import end_of_turn_ids
from tunesmith.generation import decoded, generate, pick, stream
from tunesmith.serving import batching
from tunesmith.serving.batching import Ask, Batcher, Row, Text

SIZES = {
    "vocab_size": 320, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 256, "pad_token_id": 2, "eos_token_id": 1,
}  # fmt: skip
MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "window": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**SIZES, sliding_window=6, head_dim=8)
    ),
    "window and whole": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**SIZES, sliding_window=6, head_dim=8)
    ),
    "learned positions": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=320, n_embd=16, n_layer=2, n_head=2, n_positions=256)
    ),
}
PROMPTS = [[5 + (7 * n + 3 * i) % 300 for i in range(1 + (n * 5) % 23)] for n in range(12)]


def made(name: str):
    torch.manual_seed(3)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


class Kept:
    """A row's pieces, and when they are whole."""

    def __init__(self, tokenizer, **ask) -> None:
        self.pieces, self.whole = [], threading.Event()
        self.row = Row(Ask(**{"max_new_tokens": 20, "stop_ids": (1,)} | ask), self.told, tokenizer)

    def told(self, piece) -> None:
        self.pieces.append(piece)
        if piece.ending:
            self.whole.set()

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)


def answered(model, rows: list[Kept], *, apart: float = 0.0, max_rows: int = 5, adapters=()) -> Batcher:
    batcher = Batcher(model, max_rows=max_rows, adapters=adapters)
    batcher.start()
    try:
        for kept in rows:
            batcher.submit(kept.row)
            time.sleep(apart)
        assert all(kept.whole.wait(30) for kept in rows)
    finally:
        batcher.stop()
    return batcher


@pytest.mark.parametrize("name", MODELS)
def test_rows_that_come_and_go_are_answered_as_alone(name, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(batching, "PART", 5)  # longer prompts are read while others are answered
    model = made(name)
    rows = [Kept(tiny_tokenizer, prompt=tuple(p), max_new_tokens=8 + n) for n, p in enumerate(PROMPTS)]
    batcher = answered(model, rows, apart=0.003)
    alone = [
        generate(model, tiny_tokenizer, [p], max_new_tokens=8 + n, stop_ids=[1])[0]
        for n, p in enumerate(PROMPTS)
    ]
    assert [tuple(kept.row.ids) for kept in rows] == [answer.ids for answer in alone]
    assert [kept.text for kept in rows] == [answer.text for answer in alone]
    assert [kept.pieces[-1].ending for kept in rows] == [answer.finish_reason for answer in alone]
    assert batcher.alone is None
    assert batcher.steps < 0.8 * sum(len(kept.row.ids) for kept in rows)


def test_who_is_answered_gets_a_token_in_every_round_in_which_others_join(tiny_tokenizer, monkeypatch):
    batcher = Batcher(made("llama"), max_rows=8)
    monkeypatch.setattr(Batcher, "is_alive", True)
    long = Kept(tiny_tokenizer, prompt=tuple(PROMPTS[0]), stop_ids=(), max_new_tokens=100)
    written = []
    with torch.inference_mode():
        for kept in [long, *(Kept(tiny_tokenizer, prompt=tuple(p), stop_ids=()) for p in PROMPTS[1:6])]:
            batcher.submit(kept.row)
            assert batcher._next()
            written.append(len(long.row.ids))
    assert written == [*range(written[0], written[0] + 6)]


def test_an_encoder_decoder_model_is_stepped_row_by_row(tiny_t5_folder):
    from tunesmith.models import load_model, load_tokenizer

    model, tokenizer = load_model(str(tiny_t5_folder)), load_tokenizer(str(tiny_t5_folder))
    prompts = [tokenizer(text).input_ids for text in ("one two", "what is the count of rows", "red")]
    ends = end_of_turn_ids(tokenizer)
    rows = [Kept(tokenizer, prompt=tuple(p), stop_ids=ends, max_new_tokens=8) for p in prompts]
    assert answered(model, rows).alone == "it is an encoder-decoder model"
    alone = [generate(model, tokenizer, [p], max_new_tokens=8, stop_ids=ends)[0] for p in prompts]
    assert [tuple(kept.row.ids) for kept in rows] == [answer.ids for answer in alone]


def test_what_is_drawn_hangs_on_the_seed_and_not_on_who_is_beside(tiny_tokenizer):
    model = made("llama")
    rows = [
        Kept(tiny_tokenizer, prompt=tuple(p), temperature=0.9, top_p=0.8, seed=n)
        for n, p in enumerate(PROMPTS[:4])
    ]
    rows.append(Kept(tiny_tokenizer, prompt=tuple(PROMPTS[0]), temperature=0.9, top_p=0.8, seed=99))
    answered(model, rows)
    for n, kept in enumerate(rows[:4]):
        pieces = stream(
            model,
            tiny_tokenizer,
            PROMPTS[n],
            max_new_tokens=20,
            stop_ids=[1],
            temperature=0.9,
            top_p=0.8,
            seed=n,
        )
        assert kept.text == "".join(pieces)
    assert rows[4].row.ids != rows[0].row.ids


def test_a_row_that_is_left_gets_no_further_step_and_the_others_go_on(tiny_tokenizer):
    model = made("llama")
    long, left = (Kept(tiny_tokenizer, prompt=tuple(p), stop_ids=(), max_new_tokens=120) for p in PROMPTS[:2])
    waits = Kept(tiny_tokenizer, prompt=(7, 8), stop_ids=())
    batcher = Batcher(model, max_rows=2)
    batcher.start()
    for kept in (long, left, waits):
        batcher.submit(kept.row)
    while not left.row.ids:
        time.sleep(0.001)
    batcher.leave(left.row)
    batcher.leave(waits.row)
    assert left.whole.wait(0.5)
    assert waits.whole.wait(5)
    written = len(left.row.ids)
    assert long.whole.wait(20)
    batcher.stop()
    assert left.pieces[-1].ending == waits.pieces[-1].ending == "left"
    assert len(left.row.ids) == written < 120
    [alone] = generate(model, tiny_tokenizer, [PROMPTS[0]], max_new_tokens=120, stop_ids=[])
    assert tuple(long.row.ids) == alone.ids


def test_a_step_that_fails_is_told_and_later_ones_are_answered(tiny_tokenizer):
    model = made("llama")
    broken, forward = threading.Event(), model.model.forward

    def sometimes(*given, **named):
        if broken.is_set():
            broken.clear()
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return forward(*given, **named)

    model.model.forward = sometimes
    broken.set()
    first, second = Kept(tiny_tokenizer, prompt=(7, 8)), Kept(tiny_tokenizer, prompt=(7, 8))
    batcher = Batcher(model, max_rows=2)
    batcher.start()
    batcher.submit(first.row)
    assert first.whole.wait(10)
    batcher.submit(second.row)
    assert second.whole.wait(10)
    batcher.stop()
    assert first.pieces[-1].ending == "failed"
    assert "out of memory" in first.pieces[-1].problem
    assert second.row.ids


def test_what_one_request_asks_for_fails_no_other(tiny_tokenizer):
    """Values that are 0 in float32 are answered; an answer that cannot be written fails alone."""
    model = made("llama")
    beside = [
        Kept(tiny_tokenizer, prompt=tuple(p), temperature=t, seed=3, stop_ids=())
        for p, t in zip(PROMPTS, (0.0, 0.7, 0.9))
    ]
    cold = Kept(tiny_tokenizer, prompt=tuple(PROMPTS[0]), temperature=1e-50, seed=3, stop_ids=())
    narrow = Kept(tiny_tokenizer, prompt=tuple(PROMPTS[0]), temperature=2.0, top_p=1e-50, seed=3, stop_ids=())
    unwritten, unended = Kept(None, prompt=(7, 8)), Kept(tiny_tokenizer, prompt=(7, 8), stop_ids=())
    unended.row.text.end = None  # an error as it ends
    answered(model, [*beside, cold, narrow, unwritten, unended], max_rows=7)
    assert cold.row.ids == narrow.row.ids == beside[0].row.ids
    for n, kept in enumerate(beside):
        alone = stream(
            model, tiny_tokenizer, PROMPTS[n], max_new_tokens=20, stop_ids=[], temperature=kept.row.ask.temperature,
            seed=3,
        )  # fmt: skip
        assert (kept.text, kept.pieces[-1].ending) == ("".join(alone), "length")
    assert unwritten.pieces[-1].ending == unended.pieces[-1].ending == "failed"


def test_what_is_no_number_is_not_drawn_from():
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match="not numbers"):
        pick(torch.tensor([0.0, float("nan")]), 1.0, 1.0, generator)
    assert pick(torch.tensor([-3e38, 3e38]), 1e-5, 1e-50, generator) == 1


def test_who_leaves_between_getting_a_place_and_a_batch_is_not_stepped(tiny_tokenizer, monkeypatch):
    batcher = Batcher(made("llama"), max_rows=2)
    kept = Kept(tiny_tokenizer, prompt=(7, 8))
    monkeypatch.setattr(Batcher, "is_alive", True)
    batcher.submit(kept.row)
    drop = batcher._drop_left
    monkeypatch.setattr(batcher, "_drop_left", lambda: (batcher.leave(kept.row), drop()))
    with torch.inference_mode():
        assert batcher._next()
    assert [piece.ending for piece in kept.pieces] == ["left"]
    assert (batcher.steps, batcher.running) == (0, 0)


def out_of_memory_at(monkeypatch, where, name: str, call: int) -> None:
    """Have the given call of a function find no memory, and no other."""
    calls, own = [], getattr(where, name)

    def counted(*given, **named):
        calls.append(1)
        if len(calls) == call:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return own(*given, **named)

    monkeypatch.setattr(where, name, counted)


@pytest.mark.parametrize(
    "call", [1, 3, 7, 9]
)  # of the mask, of the first layer, of the second layer's keys and values
def test_memory_that_ends_as_batches_join_fails_those_who_join_and_nobody_else(
    call, tiny_tokenizer, monkeypatch
):
    model = made("llama")
    runs, joins, later = (
        Kept(tiny_tokenizer, prompt=tuple(PROMPTS[n]), stop_ids=(), max_new_tokens=200) for n in (0, 3, 0)
    )
    batcher = Batcher(model, max_rows=3)
    batcher.start()
    batcher.submit(runs.row)
    while not runs.row.ids:
        time.sleep(0.001)
    out_of_memory_at(monkeypatch, torch.nn.functional, "pad", call)
    batcher.submit(joins.row)
    assert joins.whole.wait(10)
    assert joins.pieces[-1].ending == "failed"
    assert "out of memory" in joins.pieces[-1].problem
    assert runs.whole.wait(10)
    batcher.submit(later.row)
    assert later.whole.wait(10)
    batcher.stop()
    [alone] = generate(model, tiny_tokenizer, [PROMPTS[0]], max_new_tokens=200, stop_ids=[])
    assert tuple(runs.row.ids) == tuple(later.row.ids) == alone.ids


@pytest.mark.parametrize("name", ["_padded", "_seeded", "_keep"])
def test_memory_that_ends_between_two_steps_is_told_to_its_rows(name, tiny_tokenizer, monkeypatch):
    """As a prompt is laid out, as its dice are made, and as a row that a client has left is taken out of its batch."""
    batcher = Batcher(made("llama"), max_rows=3)
    fails, leaves, later = (
        Kept(tiny_tokenizer, prompt=(7, 8 + n), stop_ids=(), max_new_tokens=90 + 100 * (n < 2))
        for n in range(3)
    )
    if name == "_keep":
        own = batcher._keep

        def keep(batch, lines):
            if leaves.row.left and not fails.row.ended:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return own(batch, lines)

        monkeypatch.setattr(batcher, "_keep", keep)
        batcher._waiting.append(leaves.row)  # before the start, so that both are in one batch
    else:
        out_of_memory_at(monkeypatch, batcher, name, 1)
    batcher._waiting.append(fails.row)
    batcher.start()
    if name == "_keep":
        while not leaves.row.ids:
            time.sleep(0.001)
        batcher.leave(leaves.row)
    assert fails.whole.wait(10)
    assert fails.pieces[-1].ending == "failed"
    assert "out of memory" in fails.pieces[-1].problem
    batcher.submit(later.row)
    assert later.whole.wait(10)
    assert later.pieces[-1].ending == "length"
    batcher.stop()


def test_a_fault_that_is_of_no_row_is_told_to_all_and_to_the_server(tiny_tokenizer, monkeypatch):
    batcher, told = Batcher(made("llama"), max_rows=2), threading.Event()
    batcher.on_fault = told.set
    rows = [Kept(tiny_tokenizer, prompt=(7, n), stop_ids=(), max_new_tokens=9_000) for n in range(5)]
    batcher.start()
    batcher.submit(rows[0].row)
    while not rows[0].row.ids:
        time.sleep(0.001)

    def broken() -> None:
        raise KeyError("a mistake of ours")

    with batcher._news:  # so that all of them are there in the round that fails: running, coming and waiting
        for kept in rows[1:]:
            batcher._waiting.append(kept.row)
        monkeypatch.setattr(batcher, "_drop_left", broken)
    assert told.wait(5)
    assert [kept.pieces[-1].ending for kept in rows] == ["failed"] * 5
    assert not batcher.is_alive
    assert "a mistake of ours" in batcher.fault


def test_a_device_that_is_lost_ends_the_thread(tiny_tokenizer):
    model, told = made("llama"), threading.Event()

    def lost(*given, **named):
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    model.model.forward = lost
    batcher, kept = Batcher(model, max_rows=1), Kept(tiny_tokenizer, prompt=(7, 8))
    batcher.on_fault = told.set
    batcher.start()
    batcher.submit(kept.row)
    assert told.wait(10)
    assert kept.pieces[-1].ending == "failed"
    assert "device-side assert" in batcher.fault


def test_stopping_tells_those_who_wait(tiny_tokenizer):
    batcher = Batcher(made("llama"), max_rows=1)
    rows = [Kept(tiny_tokenizer, prompt=(7, 8), stop_ids=(), max_new_tokens=10_000) for _ in range(2)]
    batcher.start()
    for kept in rows:
        batcher.submit(kept.row)
    batcher.stop()
    assert [kept.pieces[-1].ending for kept in rows] == ["failed", "failed"]
    with pytest.raises(RuntimeError):
        batcher.submit(Kept(tiny_tokenizer, prompt=(7,)).row)


@pytest.mark.parametrize(
    "text", ["one two three", "a ü €  𝄞𝄞 b", "\n\n  x\ufffdy", "the end<|im_start|> and on", "e\u0301🏳️‍🌈"]
)
def test_pieces_of_a_text_join_to_the_whole(text, tiny_tokenizer):
    ids = tiny_tokenizer(text).input_ids
    for cut in (0, 1):  # the last character may be half
        given = ids[: len(ids) - cut]
        growing = Text(tiny_tokenizer, ())
        pieces = [growing.add(given[: n + 1])[0] for n in range(len(given))]
        assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text
        assert "".join(pieces) + growing.end(given)[0] == decoded(given, tiny_tokenizer)


def test_a_text_ends_before_its_stop_however_it_is_cut_into_tokens(tiny_tokenizer):
    ids = tiny_tokenizer("count; one two;; three").input_ids
    growing, told, met = Text(tiny_tokenizer, (";;", "zebra")), [], None
    for n in range(len(ids)):
        piece, met = growing.add(ids[: n + 1])
        told.append(piece)
        if met:
            break
    assert ("".join(told), met) == ("count; one two", ";;")
    held = Text(tiny_tokenizer, ("two!",))
    short = tiny_tokenizer("one two").input_ids
    assert "".join(held.add(short[: n + 1])[0] for n in range(len(short))) != "one two"
    assert held.end(short)[0].endswith("two")
