"""LoRA's layers that add in place: PEFT's numbers and gradients, and PEFT's own way wherever there is more to do."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tunesmith.forward import adapters


class Two(nn.Module):
    """A layer that is fed by another one, so that gradients go through."""

    def __init__(self, bias):
        super().__init__()
        self.first, self.second = nn.Linear(12, 20, bias=bias), nn.Linear(20, 6, bias=bias)

    def forward(self, states):
        return self.second(torch.tanh(self.first(states)))


def made(*, bias=False, **changes):
    torch.manual_seed(0)
    config = LoraConfig(
        r=3, lora_alpha=7, target_modules=["first", "second"], init_lora_weights=False, **changes
    )
    return get_peft_model(Two(bias), config)


def states(dtype=torch.float32, *shape):
    return torch.randn(*(shape or (2, 5)), 12, dtype=dtype, generator=torch.Generator().manual_seed(1))


def taken(model, given, needs=False):
    """Output, and gradients of what is trained and of the states."""
    given = given.clone().requires_grad_(needs)
    torch.manual_seed(2)  # of dropout
    found = model(given)
    (found.float() * torch.arange(1, found.numel() + 1).view(found.shape).cos()).sum().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return found.detach(), trained | ({"states": given.grad} if needs else {})


@pytest.fixture
def spied(monkeypatch):
    calls = []
    inner = adapters._Adapted.apply
    monkeypatch.setattr(adapters._Adapted, "apply", lambda *given: calls.append(given) or inner(*given))
    return calls


@pytest.mark.parametrize("needs", [False, True])
@pytest.mark.parametrize("shape", [(2, 5), (7,), (1, 1, 3)], ids=str)
@pytest.mark.parametrize(
    "changes", [{}, {"bias": True}, {"lora_dropout": 0.4}, {"use_rslora": True}], ids=str
)
def test_outputs_and_gradients_are_those_of_peft(changes, shape, needs, spied):
    if changes.get("bias"):
        changes = {}
        theirs = made(bias=True)
    else:
        theirs = made(**changes)
    ours = copy.deepcopy(theirs)
    handles = adapters.add_in_place(ours)
    assert len(handles) == 2
    (wanted, slopes), (found, gradients) = (
        taken(m, states(torch.float32, *shape), needs) for m in (theirs, ours)
    )
    assert len(spied) == 2
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert gradients.keys() == slopes.keys()
    assert len(slopes) == 4 + needs
    for name, slope in slopes.items():
        torch.testing.assert_close(gradients[name], slope, rtol=1e-5, atol=1e-5, msg=name)
    for handle in handles:
        handle.remove()
    taken(ours, states())
    assert len(spied) == 2


def test_gradients_are_those_of_differences(spied):
    """Against the function itself, in double precision."""
    model = made(bias=True).double()
    adapters.add_in_place(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    given = states(torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda *inputs: model(inputs[0]), (given, *trained))
    assert spied


def _two(model):
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])


def _trained_base(model):
    for name in ("first", "second"):
        getattr(model.base_model.model, name).base_layer.weight.requires_grad_(True)


def _watched(model):
    for name in ("first", "second"):
        getattr(model.base_model.model, name).base_layer.register_forward_hook(lambda *given: None)


MORE = {
    "two adapters": _two, "trained base": _trained_base, "hooks": _watched,
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
    "another type": lambda model: [p.double() for n, p in model.named_modules() if n.endswith(("lora_A", "lora_B"))],
}  # fmt: skip


@pytest.mark.parametrize("more", MORE)
def test_what_is_more_than_one_plain_adapter_goes_peft_s_way(more, spied):
    theirs = made()
    MORE[more](theirs)
    ours = copy.deepcopy(theirs)
    assert len(adapters.add_in_place(ours)) == 2
    given = states().requires_grad_()
    torch.testing.assert_close(ours(given), theirs(given), rtol=0, atol=0)
    assert not spied


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_variants_go_peft_s_way(changes, spied):
    theirs = made(bias=True, **changes)
    ours = copy.deepcopy(theirs)
    adapters.add_in_place(ours)
    torch.testing.assert_close(ours(states()), theirs(states()), rtol=0, atol=0)
    assert not spied


def test_merged_weights_and_passes_without_gradients_go_peft_s_way(spied):
    model = made()
    adapters.add_in_place(model)
    with torch.no_grad():
        model(states())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(states())
    before = model(states())
    assert len(spied) == 2
    model.merge_adapter()
    torch.testing.assert_close(model(states()), before, rtol=1e-5, atol=1e-5)
    assert len(spied) == 2


def test_there_are_no_second_derivatives_in_silence():
    model = made()
    adapters.add_in_place(model)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(model(states()).sum(), list(model.parameters())[1], create_graph=True)


def test_a_forward_that_somebody_else_has_replaced_stays():
    model = made()
    layer = model.base_model.model.first
    layer.forward = lambda given: given.new_ones(2, 5, 20)
    assert len(adapters.add_in_place(model)) == 1
    assert layer(states()).eq(1).all()
