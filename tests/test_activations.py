"""What layers keep for their backward pass: less than autograd would, and nothing changes."""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref
from functools import partial

import pytest
import torch
from test_forward import SMALL, batch, made, quick
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tunesmith import forward
from tunesmith.forward import activations

TOKENS = 11
NODES = {"_NormBackward", "_GatedBackward", "_HeadBackward"}


def kept(model, ids: Tensor, *, sparing: bool) -> int:
    """Bytes of the numbers that a forward pass leaves for the backward pass, beside the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, Tensor] = {}

    def count(value: object) -> None:
        if isinstance(value, list | tuple):
            for part in value:
                count(part)
        elif isinstance(value, partial):
            count(value.args)
        elif hasattr(value, "saved_tensors"):
            count(value.saved_tensors)
        elif isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in weights:
            found[value.untyped_storage().data_ptr()] = value

    def pack(tensor: Tensor) -> object:
        packed = activations._pack(tensor) if sparing else (tensor.detach(), tensor._version)
        count(packed)
        return packed

    with saved_tensors_hooks(pack, activations._unpack):
        states = model.base_model(ids, use_cache=False).last_hidden_state
    assert states.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


def ids() -> Tensor:
    return torch.randint(3, SMALL["vocab_size"], (1, TOKENS), generator=torch.Generator().manual_seed(0))


def test_a_llama_keeps_neither_what_norms_and_gates_give_nor_what_they_go_through():
    stock = made("llama")
    lean = copy.deepcopy(stock)
    assert activations.keep_less(lean)
    layers, width, inner = (SMALL[name] for name in ("num_hidden_layers", "hidden_size", "intermediate_size"))
    # Of each layer the scaled input and the output of two norms, the activation of the gate and the product; the scaled
    # input of the last norm; and the inverse root mean square of every norm.
    spared = 4 * TOKENS * (layers * (4 * width + 2 * inner) + width + (2 * layers + 1))
    assert kept(stock, ids(), sparing=False) - kept(lean, ids(), sparing=True) == spared


def test_rows_keep_the_answers_of_the_attention_once():
    from tunesmith.forward.attention import rows_attention
    from tunesmith.forward.tree import layout, rows_of

    rows = rows_of(torch.full((2, 6), 5), None, None, torch.ones(2, 6, dtype=torch.bool), trim=True)
    plan = layout(rows, share=False, device=torch.device("cpu"))
    states = [torch.randn(1, 2, 12, 8, requires_grad=True) for _ in range(3)]
    module, weight = torch.nn.Module(), torch.randn(16, 16, requires_grad=True)
    results = []
    for hooks in (activations.keeping, contextlib.nullcontext):
        with hooks():
            answer, _ = rows_attention(module, *states, None, rows=plan)
            taken = (answer.flatten(2) @ weight).square().sum()
        alive = weakref.ref(answer.untyped_storage())
        del answer
        assert (alive() is None) is (hooks is activations.keeping)
        taken.backward()
        results.append([weight.grad.clone(), *(state.grad.clone() for state in states)])
        for leaf in (weight, *states):
            leaf.grad = None
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_what_is_remembered_is_forgotten_with_its_tensor_and_where_it_is_written_into():
    given = torch.randn(3, 4)
    tensor = given * 2
    activations.remember(tensor, lambda: given * 2)
    place = tensor.untyped_storage()._cdata
    packed = activations._pack(tensor[1:].t())
    assert callable(packed[0])
    assert torch.equal(activations._unpack(packed), tensor[1:].t())
    assert torch.equal(activations._pack(given)[0], given)
    tensor.mul_(2)
    assert torch.equal(activations._pack(tensor)[0], tensor)
    del tensor, packed
    assert place not in activations._ways


def test_layers_that_are_run_again_hold_nothing_of_their_norms_and_gates():
    from torch.utils.checkpoint import checkpoint

    model = made("llama")
    activations.keep_less(model)
    inside: list[weakref.ref] = []
    for layer in model.base_model.layers:
        layer.mlp.gate_proj.register_forward_hook(
            lambda *given: inside.append(weakref.ref(given[2].untyped_storage()))
        )
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    with activations.keeping():
        states = model.base_model(ids(), use_cache=False).last_hidden_state
    assert [ref() for ref in inside] == [None] * SMALL["num_hidden_layers"]
    states.square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    stock = made("llama")
    stock.base_model(ids(), use_cache=False).last_hidden_state.square().sum().backward()
    for name, parameter in stock.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-4)


def passes(model, kind: str) -> None:
    """A pass of a kind, as far as it goes."""
    from tunesmith.training.steps import parted

    inputs = batch([9, 5, 7, 3])
    if kind == "in parts":
        call = parted(model.forward, lambda size: 2)
        call(**inputs, fused_lm_head=True).log_probs.sum().backward()
        return
    if kind == "broken off":
        handle = model.base_model.layers[-1].mlp.down_proj.register_forward_hook(lambda *given: 1 / 0)
        with contextlib.suppress(ZeroDivisionError):  # without keeping the error, which holds the pass
            model(**inputs, fused_lm_head=True)
            raise AssertionError
        handle.remove()
        return
    loss = model(**inputs, fused_lm_head=True).loss
    if kind == "whole":
        loss.backward()
    elif kind == "broken off backwards":
        model.base_model.layers[-1].mlp.down_proj.weight.register_hook(lambda gradient: 1 / 0)
        with contextlib.suppress(ZeroDivisionError):
            loss.backward()
            raise AssertionError


@pytest.mark.parametrize("kind", ["whole", "forward alone", "broken off", "broken off backwards", "in parts"])
def test_passes_leave_nothing_behind(kind):
    """Nothing of a pass waits for the garbage collector, which may rest for long, or outlasts it. (Of one that broke
    off backwards torch holds the error until the next.)"""

    def nodes() -> int:
        return sum(type(one).__name__ in NODES for one in gc.get_objects())

    model = quick(made("llama", tie_word_embeddings=True))
    gc.collect()
    gc.disable()
    try:
        held = []
        for _ in range(4):
            passes(model, kind)
            model.base_model.layers[-1].mlp.down_proj.weight._backward_hooks = None
            held.append(nodes())
    finally:
        gc.enable()
    assert held[1:] == held[:1] * 3


def test_within_a_checkpoint_of_all_of_it_nothing_is_kept():
    from torch.utils.checkpoint import checkpoint

    model = quick(made("llama", tie_word_embeddings=True))
    inside: list[weakref.ref] = []
    for layer in model.base_model.layers:
        layer.mlp.gate_proj.register_forward_hook(
            lambda *given: inside.append(weakref.ref(given[2].untyped_storage()))
        )
    run = partial(model.forward, **batch([9, 5]), fused_lm_head=True)
    found = checkpoint(run, use_reentrant=False)
    assert inside
    assert all(ref() is None for ref in inside)
    found.loss.backward()


def test_what_is_written_into_before_it_is_needed_is_an_error():
    model = quick(made("llama", tie_word_embeddings=True))
    loss = model(**batch([9, 5]), fused_lm_head=True).loss
    with torch.no_grad():
        model.base_model.layers[0].mlp.gate_proj.weight.add_(0.5)
    with pytest.raises(RuntimeError, match="was written into"):
        loss.backward()


@pytest.mark.parametrize("family", sorted(forward.COVERED))
def test_every_family_keeps_less_and_computes_the_same(family):
    stock = made(family)
    lean = copy.deepcopy(stock)
    undo = activations.keep_less(lean.base_model)
    assert undo, "nothing of it was recognised"
    if family != "gemma3":  # whose text is beneath a model that sees
        assert kept(lean, ids(), sparing=True) < 0.75 * kept(stock, ids(), sparing=False)
    found = {}
    for name, model in (("stock", stock), ("lean", lean)):
        with activations.keeping():
            logits = model(ids(), use_cache=False).logits
        logits.square().mean().backward()
        found[name] = (logits, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    if family == "gpt2":  # whose activation torch computes in one step
        torch.testing.assert_close(found["lean"][0], found["stock"][0], rtol=1e-6, atol=1e-6)
    else:
        assert torch.equal(found["lean"][0], found["stock"][0])
    assert found["stock"][1].keys() == found["lean"][1].keys()
    for name, gradient in found["stock"][1].items():
        assert (found["lean"][1][name] - gradient).abs().max() <= 1e-5 * gradient.abs().max() + 1e-9, name
    with torch.no_grad():
        answer = lean(ids(), use_cache=False).logits
    for restore in undo:
        restore.remove()
    assert not any("forward" in vars(module) for module in lean.base_model.modules())
    torch.testing.assert_close(answer, lean(ids(), use_cache=False).logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["gemma2", "llama", "phi3"])
def test_half_precision(family):
    """Gradients are as near to those in float32 as the stock ones."""
    exact = made(family)
    stock, lean = (copy.deepcopy(exact).bfloat16() for _ in range(2))
    exact = copy.deepcopy(stock).float()
    activations.keep_less(lean)
    found = []
    for model in (exact, stock, lean):
        states = model.base_model(ids(), use_cache=False).last_hidden_state
        states.float().square().mean().backward()
        found.append(torch.cat([p.grad.float().flatten() for p in model.base_model.parameters()]))
    off, ours = ((gradient - found[0]).norm() / found[0].norm() for gradient in found[1:])
    assert 0 < ours < 1.2 * off


def test_frozen_weights_have_no_gradient_and_their_inputs_have():
    stock = made("llama")
    lean = copy.deepcopy(stock)
    activations.keep_less(lean)
    slopes = []
    for model in (stock, lean):
        model.requires_grad_(False)
        vectors = model.get_input_embeddings()(ids()).requires_grad_()
        model.base_model(inputs_embeds=vectors, use_cache=False).last_hidden_state.square().sum().backward()
        slopes.append(vectors.grad)
        assert all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-4, atol=1e-5)


def test_a_gate_is_a_tensor_to_all_else():
    model = made("llama")
    activations.keep_less(model)
    act = model.base_model.layers[0].mlp.act_fn
    given, through = torch.randn(2, 5, requires_grad=True), torch.randn(2, 5, requires_grad=True)
    silu = torch.nn.functional.silu(given)
    for waiting in (
        lambda: act(given) * through,
        lambda: through * act(given),
        lambda: torch.mul(act(given), through),
    ):
        assert torch.equal(waiting(), silu * through)
        assert type(waiting().grad_fn).__name__ == "_GatedBackward"
    assert torch.equal(act(given) * 2, silu * 2)
    assert torch.equal(act(given) * through[0], silu * through[0])  # broadcast, which is no gate
    assert torch.equal(torch.nn.functional.dropout(act(given), 0.5, training=False), silu)
    assert torch.equal(torch.cat([act(given), through]), torch.cat([silu, through]))
    assert act(given).shape == given.shape
    with torch.no_grad():
        assert isinstance(act(given), Tensor)


def test_what_somebody_else_has_replaced_stays():
    model = made("llama")
    norm = model.base_model.norm
    norm.forward = theirs = lambda states: states
    changed = activations.keep_less(model)
    assert norm.forward is theirs
    assert norm not in [restore.module for restore in changed]


def test_who_looks_at_a_gates_gradient_is_shown_it():
    stock = made("llama")
    lean = copy.deepcopy(stock)
    activations.keep_less(lean)
    seen = {"stock": [], "lean": []}
    for name, model in (("stock", stock), ("lean", lean)):
        for layer in model.model.layers:
            layer.mlp.act_fn.register_full_backward_hook(
                lambda module, given, out, name=name: seen[name].append(out[0])
            )
        model(ids()).logits.square().mean().backward()
    assert len(seen["lean"]) == len(seen["stock"]) > 0
    for one, other in zip(seen["lean"], seen["stock"], strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("part", ["model.norm.weight", "model.layers.0.mlp.gate_proj.weight"])
def test_second_derivatives_are_refused(part):
    model = made("llama")
    activations.keep_less(model)
    loss = model.base_model(ids(), use_cache=False).last_hidden_state.square().sum()
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(loss, dict(model.named_parameters())[part], create_graph=True)
