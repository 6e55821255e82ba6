"""Gradients of a table that is read from and multiplied with: those of autograd, without a second table."""

from __future__ import annotations

import copy

import pytest
import torch
from test_forward import batch, gradients, made, quick, stock_loss
from torch.utils._python_dispatch import TorchDispatchMode

from tunesmith import forward
from tunesmith.forward import lookup


class Dense(TorchDispatchMode):
    """Counts the gradients that autograd makes for whole tables."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket is torch.ops.aten.embedding_dense_backward
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", sorted(forward.COVERED))
def test_tied_tables_have_the_stock_gradient_of_one_table(family):
    stock = made(family, tie_word_embeddings=True)
    fast = quick(copy.deepcopy(stock))
    # The token of padding stands in the text as well, where autograd leaves its vector's gradient out.
    inputs = batch([30, 7, 2, 18])
    inputs["input_ids"][0, 3] = 0
    for _ in range(2):  # with what is there already, as in steps of several passes
        stock_loss(stock, inputs).backward()
        with Dense() as dense:
            fast(**inputs, fused_lm_head=True).loss.backward()
        tables = 0 if family != "gpt2" else 1  # of positions
        assert dense.count == tables
    name = next(name for name, p in fast.named_parameters() if p is fast.get_input_embeddings().weight)
    expected, found = gradients(stock)[name], gradients(fast)[name]
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    # Without what comes of the lookups it is another one.
    stock.zero_grad()
    stock.get_input_embeddings().register_forward_hook(lambda _, given, vectors: vectors.detach())
    for _ in range(2):
        stock_loss(stock, inputs).backward()
    assert (found - gradients(stock)[name]).abs().max() > 0.01 * expected.abs().max()


def test_a_pass_without_the_head_has_its_gradient():
    model = made("llama", tie_word_embeddings=True)
    [restore] = lookup.join(model)
    model.base_model(torch.tensor([[5, 6, 6]]), use_cache=False).last_hidden_state.square().sum().backward()
    found = gradients(model)["model.embed_tokens.weight"]
    restore.remove()
    model.base_model(torch.tensor([[5, 6, 6]]), use_cache=False).last_hidden_state.square().sum().backward()
    expected = gradients(model)["model.embed_tokens.weight"]
    assert set(expected.abs().sum(1).nonzero().flatten().tolist()) == {5, 6}
    torch.testing.assert_close(found, expected)


def test_other_tables_stay_as_they_are():
    assert not lookup.join(made("llama", tie_word_embeddings=False))
    tied = made("llama", tie_word_embeddings=True)
    assert not lookup.join(tied.bfloat16())


def test_beside_other_processes_autograd_does_it():
    """Also beside none: what gathers the gradients takes them while the backward pass is under way."""
    model = made("llama", tie_word_embeddings=True)
    assert lookup.join(model)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        fast = torch.nn.parallel.DistributedDataParallel(model)
        with Dense() as dense:
            fast(torch.tensor([[5, 6, 6]])).logits.square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert dense.count == 1
    found = gradients(model)["model.embed_tokens.weight"]
    stock = made("llama", tie_word_embeddings=True)
    stock(torch.tensor([[5, 6, 6]])).logits.square().sum().backward()
    torch.testing.assert_close(found, gradients(stock)["model.embed_tokens.weight"])


def test_who_asks_for_the_gradient_gets_all_of_it():
    model = made("llama", tie_word_embeddings=True)
    weight, words = model.get_input_embeddings().weight, torch.tensor([[5, 6, 6]])
    norm = model.base_model.norm.weight

    def loss():
        return model(words).logits.square().sum()

    [expected] = torch.autograd.grad(loss(), [weight])
    assert lookup.join(model)
    [found] = torch.autograd.grad(loss(), [weight])
    torch.testing.assert_close(found, expected)
    loss().backward(inputs=[norm])
    assert weight.grad is None
    seen = []
    handle = weight.register_hook(seen.append)
    loss().backward()
    handle.remove()
    torch.testing.assert_close(seen[0], expected)
    torch.testing.assert_close(weight.grad, expected)


def test_who_looks_at_the_gradient_sees_all_of_it_whenever_they_come():
    """A hook that is put on the table after the forward pass."""
    from torch.autograd.graph import register_multi_grad_hook

    stock = made("llama", tie_word_embeddings=True)
    inputs = batch([30, 7])
    stock_loss(stock, inputs).backward()
    expected = gradients(stock)["model.embed_tokens.weight"]
    fast = quick(copy.deepcopy(stock))
    table = fast.get_input_embeddings().weight
    seen = []
    putting = (
        lambda: table.register_hook(lambda given: seen.append(given.clone())),
        lambda: table.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad.clone())),
    )
    for put in putting:
        loss = fast(**inputs, fused_lm_head=True).loss
        handle = put()
        loss.backward()
        handle.remove()
        for found in (gradients(fast)["model.embed_tokens.weight"], seen[-1]):
            assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert len(seen) == 2
    loss = fast(**inputs, fused_lm_head=True).loss
    handle = register_multi_grad_hook([table], lambda given: seen.append(given[0].clone()))
    loss.backward()
    assert (
        gradients(fast)["model.embed_tokens.weight"] - expected
    ).abs().max() <= 1e-5 * expected.abs().max()
