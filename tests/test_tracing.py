"""Hollow numbers: what they count is what real ones take."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tunesmith import tracing
from tunesmith.forward import head
from tunesmith.tracing import counting


def test_products_and_blocks_are_counted_as_by_hand():
    one = torch.empty(64, 32, device="meta", requires_grad=True)
    two = torch.empty(32, 8, device="meta", requires_grad=True)
    given = torch.empty(100, 64, device="meta")
    with counting(vocabulary=8) as count:
        assert count.known([one, two, given]) == 4 * (64 * 32 + 32 * 8 + 100 * 64)
        count.restart()
        loss = (given @ one).relu().matmul(two).sum()
        forward, _ = count.live()
        loss.backward()
    # forward two products; backward both gradients of the second and one of the first, whose input needs none
    assert sum(flops for flops, _ in count.costs) == 2 * (100 * 64 * 32) * 2 + 2 * (100 * 32 * 8) * 3
    # the first product until its relu is there, both of them; what relu keeps is its own output
    assert forward == 4 * 2 * 100 * 32
    count.tag([one.grad, two.grad], "gradients")
    assert count.live(count.clock)[1]["gradients"] == 4 * (64 * 32 + 32 * 8)


def test_what_real_labels_select_is_known():
    hidden = torch.empty(2, 5, 16, device="meta")
    labels = torch.tensor([[-100, -100, 3, 4, -100], [-100, 7, -100, -100, -100]])
    with counting(vocabulary=9):
        chosen = hidden[labels != -100]
        places = (labels != -100).nonzero(as_tuple=True)
        assert hidden[places].shape == chosen.shape == (3, 16)
        assert labels.to(hidden.device)[0, 2].item() == 3  # token ids stay real wherever they are sent
        assert torch.arange(4, device=hidden.device).tolist() == [0, 1, 2, 3]


@pytest.fixture
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=500, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip

    def made(device: str):
        with torch.device(device):
            return LlamaForCausalLM(config)

    return made


def test_a_steps_peak_is_what_torchs_profiler_sees_of_a_real_one(llama):
    ids = torch.randint(0, 500, (4, 200))
    mask = torch.ones_like(ids)
    mask[0, 120:] = 0
    given = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    real = llama("cpu")
    real(**given).loss.backward()  # first steps hold more
    real.zero_grad(set_to_none=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        real(**given).loss.backward()
    held = most = 0
    events = profile.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)

    model = llama("meta")
    with counting(vocabulary=500) as count:
        count.known([*model.parameters(), *model.buffers()])
        model(**given).loss.backward()
    # what a kernel holds within itself is not seen
    assert 0.94 * most < count.live()[0] < 1.01 * most


def test_layers_that_are_computed_again_hold_less_and_compute_more(llama):
    ids = torch.randint(0, 500, (4, 200))
    found = {}
    for again in (False, True):
        model = llama("meta").train()
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with counting(vocabulary=500) as count:
            count.known([*model.parameters(), *model.buffers()])
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found[again] = count.live()[0], sum(flops for flops, _ in count.costs)
    assert found[True][0] < 0.75 * found[False][0]
    assert 1.1 < found[True][1] / found[False][1] < 4 / 3


@pytest.mark.parametrize("again", [False, True])
def test_what_is_remembered_of_operations_changes_no_figure(llama, again, monkeypatch):
    """Asked anew for each operation, torch gives the same blocks, at the same times, and the same costs."""
    ids = torch.randint(0, 500, (2, 60))

    def traced(model):
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with counting(vocabulary=500) as count:
            count.known([*model.parameters(), *model.buffers()])
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        strides = [p.grad.stride() for p in model.parameters()]
        return count.blocks(), count.costs, count.live(), strides

    monkeypatch.setattr(tracing, "_FORMS", {})
    first, second = (traced(llama("meta").train()) for _ in range(2))
    remembered = sum(forms is not None for forms in tracing._FORMS.values())
    monkeypatch.setattr(tracing, "_makes_anew", lambda func: False)
    assert first == second == traced(llama("meta").train())
    assert remembered > 20


def head_of_a_step(device):
    hidden = torch.ones(40, 16, device=device, requires_grad=True)
    weight = torch.ones(300, 16, device=device, requires_grad=True)
    found = head.read(hidden, weight, None, torch.arange(40), head.Reading(alike=True))
    (-found.log_probs.sum() / 40).backward()


def test_a_hollow_head_under_autocast_takes_what_a_real_one_takes():
    found, own = {}, head._type
    for device, autocast in (("cpu", None), ("meta", torch.bfloat16)):
        real = torch.autocast("cpu", torch.bfloat16, enabled=device == "cpu")
        with counting(vocabulary=300, autocast=autocast) as count, real:
            head_of_a_step(device)
        found[device] = count.live()[0]
    assert found["meta"] == pytest.approx(found["cpu"], rel=0.03)
    assert head._type is own


def attention_of_a_step(device, dropout):
    torch.manual_seed(0)
    states = torch.ones(1, 4, 50, 16, device=device, requires_grad=True)
    one = states * 1.0
    torch.nn.functional.scaled_dot_product_attention(one, one, one, dropout_p=dropout).sum().backward()


@pytest.mark.parametrize(
    "work",
    [head_of_a_step, partial(attention_of_a_step, dropout=0.1), partial(attention_of_a_step, dropout=0.0)],
    ids=["head", "attention with dropout", "attention"],
)
def test_hollow_numbers_take_the_ways_that_real_ones_take(work):
    found = {}
    for device in ("cpu", "meta"):
        with counting(vocabulary=300) as count:
            work(device)
        found[device] = count.live()[0]
    assert found["meta"] == pytest.approx(found["cpu"], rel=0.03)


def test_packed_weights_give_the_type_that_bitsandbytes_gives():
    """What is computed in bfloat16 goes on in the type of a base whose norms are float32."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    plain = torch.nn.Linear(64, 32, bias=False, dtype=torch.bfloat16)
    real = bitsandbytes.nn.Linear4bit(64, 32, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    real.weight = bitsandbytes.nn.Params4bit(plain.weight.data, requires_grad=False, quant_type="nf4")
    hollow = tracing.FourBit(plain.to("meta"), double=True)
    for dtype in (torch.float32, torch.bfloat16):
        given = torch.ones(3, 64, dtype=dtype)
        assert hollow(given.to("meta")).dtype == real.to("cpu")(given).dtype == dtype
