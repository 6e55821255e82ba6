"""Every engine gives what the model gives alone; answers keep their order, and are kept when the process dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from counting import PROMPTS, STOP, TOKENIZER, counting_llama
from transformers import GenerationConfig

from tunesmith import engines
from tunesmith.engines import Asked, Source, paged
from tunesmith.engines.check import NEAR_TIE, chosen, read_alone
from tunesmith.errors import OutOfResources, RecipeError
from tunesmith.generation import Generated, cut, generate


@pytest.fixture(scope="module")
def llama():
    return counting_llama()


@pytest.fixture(scope="module")
def alone(llama):
    """The reference: each prompt by itself."""
    return [generate(llama, TOKENIZER, [p], max_new_tokens=20, stop_ids=[STOP])[0] for p in PROMPTS]


def source(model, **fields):
    found = Source("base", TOKENIZER, lambda: model, **fields)
    assert found.model is model
    return found


def asked(prompts=PROMPTS, **fields):
    return Asked(prompts, **{"max_new_tokens": 20, "stop_ids": [STOP]} | fields)


def answered(model, engine, prompts=PROMPTS, **fields):
    return engines.answers(source(model), asked(prompts, **fields), engine=engine)[0]


@pytest.mark.parametrize(
    ("engine", "attention"), [("padded", "sdpa"), ("padded", "eager"), ("paged", "sdpa"), ("paged", "eager")]
)
def test_every_engine_gives_each_token_that_the_model_gives_alone(llama, alone, engine, attention):
    """Mixed lengths, and padding is the end-of-text token: TOKENIZER has none of its own."""
    llama.set_attn_implementation(attention)
    try:
        assert answered(llama, engine) == alone
        assert llama.config._attn_implementation == attention, "put back as it was"
    finally:
        llama.set_attn_implementation("sdpa")
    assert len({answer.ids for answer in alone}) > 4, "the answers differ, so that equality says something"
    assert {answer.finish_reason for answer in alone} == {"stop", "length"}


@pytest.mark.parametrize("engine", ["padded", "paged"])
def test_order_copies_and_a_longest_neighbour_change_no_answer(llama, alone, engine):
    order = [3, 1, 4, 0, 5, 8, 2, 6, 7]
    others = [*(PROMPTS[n] for n in order), PROMPTS[2], [1] * 55, [2] * 80]
    found = answered(llama, engine, others)
    assert found[:9] == [alone[n] for n in order]
    assert found[9] == alone[2]
    assert len(found[10].ids) <= 20
    assert found[11] == Generated((), "", "length"), "a prompt as long as the context leaves no room"


def wrong(model, how):
    """Answers of a batch with one of the two classical bugs."""
    width = max(map(len, PROMPTS))
    pads = [[STOP] * (width - len(p)) for p in PROMPTS]
    right = how == "right padding"
    rows = [p + pad if right else pad + p for p, pad in zip(PROMPTS, pads)]
    masks = [[1] * len(p) + [0] * len(pad) if right else [1] * width for p, pad in zip(PROMPTS, pads)]
    output = model.generate(
        input_ids=torch.tensor(rows),
        attention_mask=torch.tensor(masks),
        generation_config=GenerationConfig(max_new_tokens=20, eos_token_id=STOP, pad_token_id=STOP),
    )
    return [cut(line, [STOP], TOKENIZER) for line in output[:, width:].tolist()]


def reads(model, answers, prompts=PROMPTS, limit=None):
    return read_alone(model, TOKENIZER, prompts, answers, stop_ids=[STOP], max_new_tokens=20, limit=limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("engine", ["padded", "paged"])
def test_in_reduced_precision_every_divergence_is_a_near_tie(llama, engine, dtype):
    reduced = counting_llama().to(dtype)
    answers = answered(reduced, engine)
    assert {read.verdict for read in reads(reduced, answers)} <= {"equal", "near tie"}
    # and under the same model in full precision
    whole = counting_llama()
    whole.load_state_dict({name: value.float() for name, value in reduced.state_dict().items()})
    assert {read.verdict for read in reads(whole, answers, limit=NEAR_TIE)} <= {"equal", "near tie"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["mask missing", "right padding"])
def test_negative_control_the_check_catches_both_classical_bugs(llama, how, dtype):
    model = counting_llama().to(dtype)
    found = reads(model, wrong(model, how))
    bad = [read for read in found if read.verdict == "different"]
    assert len(bad) >= 3
    assert all(read.gap > 0.1 and read.at is not None for read in bad)
    longest = max(range(len(PROMPTS)), key=lambda n: len(PROMPTS[n]))
    assert found[longest].verdict != "different", "the longest row has no padding, and is right in both"


def with_cache(model, cache):
    """All prompts in one batch, padded on the left and masked, under another cache than the engines'."""
    width = max(map(len, PROMPTS))
    output = model.generate(
        input_ids=torch.tensor([[STOP] * (width - len(p)) + p for p in PROMPTS]),
        attention_mask=torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS]),
        generation_config=GenerationConfig(
            max_new_tokens=20, eos_token_id=STOP, pad_token_id=STOP, cache_implementation=cache,
            disable_compile=True,
        ),
    )  # fmt: skip
    return [cut(line, [STOP], TOKENIZER) for line in output[:, width:].tolist()]


def test_a_static_cache_gives_the_same_tokens_and_in_bfloat16_near_ties_below_a_tenth(llama, alone):
    assert with_cache(llama, "static") == alone == with_cache(llama, "dynamic")
    reduced = counting_llama().to(torch.bfloat16)
    whole = counting_llama()
    whole.load_state_dict({name: value.float() for name, value in reduced.state_dict().items()})
    found = reads(whole, with_cache(reduced, "static"), limit=NEAR_TIE)
    assert {read.verdict for read in found} <= {"equal", "near tie"}
    assert NEAR_TIE == 0.1
    assert max((read.gap or 0.0 for read in found), default=0.0) < NEAR_TIE


@pytest.mark.parametrize(("gap", "verdict"), [(0.09, "near tie"), (0.12, "different")])
def test_the_limit_of_a_near_tie_is_a_tenth_of_a_nat(llama, alone, gap, verdict):
    """The likeliest token is made less likely than the one of the answer, by just so much."""
    [answer] = [alone[0]]
    with torch.no_grad():
        logits = llama(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].float()
    first, second = logits.topk(2)[1].tolist()
    moved = counting_llama()
    moved.lm_head.bias = torch.nn.Parameter(torch.zeros(logits.numel()))
    with torch.no_grad():
        moved.lm_head.bias[second] = logits[first] - logits[second] + gap
    one = Generated((answer.ids[0],), TOKENIZER.decode(answer.ids[:1]), "length")
    [read] = read_alone(
        moved, TOKENIZER, PROMPTS[:1], [one], stop_ids=[STOP], max_new_tokens=1, limit=NEAR_TIE
    )
    assert (read.verdict, read.gap) == (verdict, pytest.approx(gap, abs=1e-3))


def test_the_check_catches_answers_that_are_not_the_model_s(llama, alone):
    swapped = [alone[2], *alone[1:2], alone[0], *alone[3:]]
    assert [read.verdict for read in reads(llama, swapped)[:3]] == ["different", "equal", "different"]
    short = [Generated(alone[0].ids[:5], TOKENIZER.decode(alone[0].ids[:5]), "length")]
    assert "before the limit" in reads(llama, short, PROMPTS[:1])[0].why
    other = [Generated(alone[0].ids, "another text", alone[0].finish_reason)]
    assert "text" in reads(llama, other, PROMPTS[:1])[0].why
    sampled = generate(llama, TOKENIZER, PROMPTS, max_new_tokens=20, stop_ids=[STOP], temperature=3.0)
    assert sum(read.verdict == "different" for read in reads(llama, sampled)) > 5


def test_the_checked_items_are_chosen_by_their_prompts():
    first = [PROMPTS[n] for n in chosen(PROMPTS, 3)]
    turned = PROMPTS[::-1]
    assert sorted(first) == sorted(turned[n] for n in chosen(turned, 3))
    assert chosen(PROMPTS, 100) == list(range(len(PROMPTS)))


# What the paged engine must not swallow


def test_the_paged_engine_asks_for_all_it_wants_and_looks_at_every_result(llama, monkeypatch):
    owner = type(llama)
    real, seen = owner.init_continuous_batching, {}

    def watched(self, settings, how, hints):
        seen.update(settings=settings, how=how)
        manager = real(self, settings, how, hints)
        if seen.get("damage"):
            manager.get_result = lambda timeout, inner=manager.get_result: seen["damage"](
                inner(timeout=timeout)
            )
        return manager

    monkeypatch.setattr(owner, "init_continuous_batching", watched)
    answered(llama, "paged", PROMPTS[:2])
    assert seen["settings"].max_new_tokens == 20
    assert seen["settings"].eos_token_id == [STOP]
    assert seen["how"].auto_switch_to_flash is False
    assert seen["how"].drop_unsupported_processors is False

    def failing(result):
        if result is not None and result.is_finished():
            result.error = "no room in the cache"
        return result

    seen["damage"] = failing
    with pytest.raises(OutOfResources, match="no room in the cache"):
        answered(llama, "paged", PROMPTS[:2])

    def foreign(result):
        if result is not None:
            result.prompt_ids = [1, 2, 3]
        return result

    seen["damage"] = foreign
    with pytest.raises(Exception, match="other tokens"):
        answered(llama, "paged", PROMPTS[:1])


def test_a_dying_paged_engine_is_no_shorter_answer(llama, monkeypatch):
    inner = llama.model.layers[0].forward
    calls = []

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) > 5:
            raise RuntimeError("the device is gone")
        return inner(*args, **kwargs)

    monkeypatch.setattr(llama.model.layers[0], "forward", dies)
    with pytest.raises(OutOfResources, match="paged engine"):
        answered(llama, "paged")


def test_what_cannot_be_paged_is_refused_and_with_auto_padded_aloud(llama, alone, monkeypatch):
    monkeypatch.setattr(paged, "refused", lambda model: "it is strange")
    with pytest.raises(RecipeError, match="it is strange"):
        answered(llama, "paged")
    said = []
    found, settings = engines.answers(source(llama, device="cuda"), asked(), engine="auto", say=said.append)
    assert (found, settings["engine"]) == (alone, "padded")
    assert "it is strange" in said[0]
    with pytest.raises(RecipeError, match="padded"):
        engines.chosen("paddedd", "cpu")
    assert (engines.chosen("auto", "cpu"), engines.chosen("auto", "cuda")) == ("padded", "paged")


def test_an_adapter_is_used_by_every_engine_and_off_it_is_the_base(llama, alone):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    settings = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, r=4)
    tuned = get_peft_model(counting_llama(), settings).eval()
    padded = answered(tuned, "padded")
    assert answered(tuned, "paged") == padded != alone
    with tuned.disable_adapter():
        assert answered(tuned, "padded") == answered(tuned, "paged") == alone
    assert {read.verdict for read in reads(tuned, padded)} == {"equal"}
    merged = tuned.merge_and_unload()
    assert {read.verdict for read in reads(merged, padded)} <= {"equal", "near tie"}


@pytest.mark.parametrize("engine", ["padded", "paged"])
def test_drawn_answers_follow_their_seed(llama, engine):
    draw = {"temperature": 2.0, "stop_ids": []}
    before = torch.get_rng_state()
    one = answered(llama, engine, seed=1, **draw)
    assert one == answered(llama, engine, seed=1, **draw) != answered(llama, engine, seed=2, **draw)
    assert torch.equal(torch.get_rng_state(), before)


# Resuming


def test_answers_are_kept_and_taken_up_where_it_stopped(llama, alone, tmp_path, tiny_model_folder):
    known = {"base": str(tiny_model_folder)}
    prompts = [*PROMPTS, PROMPTS[0]]

    class Enough(KeyboardInterrupt):
        pass

    def stop(done):
        if done >= 4:
            raise Enough

    few = asked(prompts, batch_tokens=1)
    with pytest.raises(Enough):
        engines.answers(source(llama, **known), few, folder=tmp_path, progress=stop)
    [file] = tmp_path.iterdir()
    assert len(file.read_text().splitlines()) == 4
    with file.open("a") as out:
        out.write('{"prompt": "cut off by a ki')
    told = []
    found, settings = engines.answers(source(llama, **known), few, folder=tmp_path, progress=told.append)
    assert told[0] == 4, "nothing is asked twice"
    assert found == [*alone, alone[0]]
    assert settings == {"max_new_tokens": 20, "temperature": 0.0, "seed": 0, "engine": "padded"}
    assert len(file.read_text().splitlines()) == len(prompts)
    assert all(json.loads(line) for line in file.read_text().splitlines())

    def never():
        raise AssertionError("the model is not needed")

    again = Source(
        "base",
        TOKENIZER,
        never,
        **known,
    )
    assert engines.answers(again, few, folder=tmp_path)[0] == found
    # Another setting or another model has another file.
    engines.answers(source(llama, **known), asked(prompts, max_new_tokens=3), folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    os.utime(tiny_model_folder / "model.safetensors")
    engines.answers(source(llama, **known), few, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    engines.forget(tmp_path)
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
from tunesmith import engines
from tunesmith.engines import Asked, Source
from tunesmith import models
folder, kept = sys.argv[1:]
tokenizer = models.load_tokenizer(folder)
source = Source("base", tokenizer, lambda: models.load_model(folder), folder)
def die(done):
    if done >= 5: os.kill(os.getpid(), signal.SIGKILL)
prompts = [[10 + n, 11, 12] for n in range(12)]
from pathlib import Path
engines.answers(source, Asked(prompts, 4, [1], batch_tokens=1), folder=Path(kept), progress=die)
"""


@pytest.mark.thorough
def test_after_kill_9_nothing_is_answered_again(tiny_model_folder, tiny_tokenizer, tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tiny_model_folder), str(tmp_path)])
    assert done.returncode == -signal.SIGKILL
    from tunesmith import models

    prompts = [[10 + n, 11, 12] for n in range(12)]
    model = models.load_model(str(tiny_model_folder))
    known = Source("base", tiny_tokenizer, lambda: model, str(tiny_model_folder))
    told = []
    few = Asked(prompts, 4, [1], batch_tokens=1)
    found, _ = engines.answers(known, few, folder=tmp_path, progress=told.append)
    assert told[0] == 5
    assert found == generate(model, tiny_tokenizer, prompts, max_new_tokens=4, stop_ids=[1])


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_answers_of_encoder_decoders_are_read_again_as_well(kind, tmp_path):
    import encoder_decoders

    from tunesmith import models

    folder = str(encoder_decoders.save(kind, tmp_path))
    tokenizer, model = models.load_tokenizer(folder), models.load_model(folder)
    prompts = [[5, 6, 7, 8, 9, 10, 11], [9, 8, 7], [20, 21, 22, 23]]
    stops = [tokenizer.eos_token_id]
    known = Source("base", tokenizer, lambda: model)
    few = Asked(prompts, 8, stops)
    found, _ = engines.answers(known, few)
    told = read_alone(model, tokenizer, prompts, found, stop_ids=stops, max_new_tokens=8)
    assert {read.verdict for read in told} <= {"equal", "near tie"}
    drawn = generate(model, tokenizer, prompts, max_new_tokens=8, stop_ids=stops, temperature=5.0)
    told = read_alone(model, tokenizer, prompts, drawn, stop_ids=stops, max_new_tokens=8)
    assert {read.verdict for read in told} == {"different"}
    with pytest.raises(RecipeError, match="encoder-decoder"):
        engines.answers(known, few, engine="paged")


def test_drawn_answers_that_go_on_are_not_drawn_again(tiny_model_folder, tiny_tokenizer, tmp_path):
    """Copies of a question: those that are left after a stop must not repeat those that are there."""
    from tunesmith import models

    prompt = tiny_tokenizer("what is the", add_special_tokens=False).input_ids
    asked = Asked([prompt] * 6, 12, [], temperature=3.0, seed=4)

    def source():
        model = models.load_model(str(tiny_model_folder))
        return Source("tuned", tiny_tokenizer, lambda: model, base=str(tiny_model_folder))

    class Stopped(Exception):
        pass

    def stop(done):
        if done == 3:
            raise Stopped

    with pytest.raises(Stopped):
        engines.answers(source(), asked, folder=tmp_path, progress=stop)
    found, _ = engines.answers(source(), asked, folder=tmp_path)
    whole, _ = engines.answers(source(), asked)
    assert len({answer.ids for answer in whole}) == 6
    assert len({answer.ids for answer in found}) == 6
    assert found[:3] == whole[:3], "what was kept stays"
