"""A head that is read by pieces of the vocabulary: the numbers of the stock path."""

from __future__ import annotations

import copy

import pytest
import test_forward
import test_forward_pairs
import torch
from test_forward import FIELDS, assert_same, batch, made

from tunesmith import forward
from tunesmith.forward import head


@pytest.fixture
def in_pieces(monkeypatch):
    """The vocabulary is gone through by some forty words at a time."""
    monkeypatch.setattr(head, "CACHED", 4 * 40 * 40)


@pytest.mark.parametrize("family", sorted(forward.COVERED))
def test_losses_and_gradients_are_the_stock_ones(family, in_pieces):
    assert_same(made(family), batch([61, 7, 1, 2, 33]))


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_and_those_of_encoder_decoders(kind, in_pieces):
    test_forward_pairs.test_loss_and_gradients_are_the_stock_ones(kind, True)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_all_that_is_told_of_a_label_by_pieces(softcap, in_pieces):
    test_forward.test_all_that_is_told_of_a_label_is_what_trl_tells(softcap)


@pytest.mark.parametrize(("alike", "kept"), [(True, 2**27), (False, 2**27), (False, 0)])
def test_labels_that_weigh_differently_by_pieces(alike, kept, monkeypatch):
    monkeypatch.setattr(head, "CACHED", 4 * 256 * 7)  # 50 words by 7, the last piece of one
    test_forward.test_a_head_whose_labels_weigh_differently(alike, kept, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_the_first_of_equal_logits_counts_whatever_its_piece(dtype, monkeypatch):
    torch.manual_seed(0)
    # Whole numbers, so that many are equal and all are exact.
    hidden = torch.randint(-2, 3, (40, 4)).to(dtype)
    table = torch.randint(-2, 3, (60, 4)).to(dtype)
    best = (hidden.float() @ table.float().T).argmax(1)
    targets = torch.where(torch.arange(40) % 2 == 0, best, (best + 1) % 60)
    reading = head.Reading(outputs=FIELDS)
    whole = head.read(hidden, table, None, targets, reading)
    monkeypatch.setattr(head, "CACHED", 4 * 40 * 7)
    pieces = head.read(hidden, table, None, targets, reading)
    assert pieces.is_top1.tolist() == (targets == best).tolist() == whole.is_top1.tolist()
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one, other)


def test_logits_far_below_the_largest_of_another_piece(monkeypatch):
    """Their masses are no numbers of float32 beside it, and their entropy has no logarithm."""
    monkeypatch.setattr(head, "CACHED", 4 * 3 * 2)
    hidden = torch.tensor([[1.0], [-1.0], [0.0]]).requires_grad_()
    table = torch.tensor([[300.0], [299.0], [0.0], [-300.0], [-299.5]]).requires_grad_()
    targets = torch.tensor([1, 4, 2])
    reading = head.Reading(outputs=("log_probs", "entropy"))
    found = head.read(hidden, table, None, targets, reading)
    (found.log_probs.sum() + found.entropy.sum()).backward()
    got = [hidden.grad, table.grad]
    exact = [t.detach().double().requires_grad_() for t in (hidden, table)]
    logs = (exact[0] @ exact[1].T).log_softmax(1)
    wanted = logs.gather(1, targets[:, None]).sum() - (logs.exp() * logs).sum()
    wanted.backward()
    torch.testing.assert_close(found.log_probs.sum() + found.entropy.sum(), wanted.float())
    for one, other in zip(got, exact, strict=True):
        torch.testing.assert_close(one, other.grad.float(), rtol=1e-4, atol=1e-4)  # of logits of 300


def test_words_that_are_ruled_out(monkeypatch):
    """By a bias of minus infinity, all of a piece or its first."""
    torch.manual_seed(0)
    monkeypatch.setattr(head, "CACHED", 4 * 6 * 3)
    hidden, table = torch.randn(6, 4, requires_grad=True), torch.randn(12, 4, requires_grad=True)
    bias = torch.zeros(12)
    bias[[3, 4, 5, 9]] = -torch.inf
    targets = torch.tensor([0, 1, 2, 6, 10, 11])
    found = head.read(hidden, table, bias, targets, head.Reading(alike=True)).log_probs
    found.sum().backward()
    got = [hidden.grad, table.grad]
    exact = [t.detach().clone().requires_grad_() for t in (hidden, table)]
    wanted = (exact[0] @ exact[1].T + bias).log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    wanted.sum().backward()
    torch.testing.assert_close(found, wanted)
    for one, other in zip(got, exact, strict=True):
        torch.testing.assert_close(one, other.grad)


def sure_of(labels: torch.Tensor, table: torch.Tensor, sure: float) -> torch.Tensor:
    """States whose label has this probability each."""
    states = torch.randn(len(labels), table.shape[1], generator=torch.Generator().manual_seed(1))
    low, high = torch.zeros(len(labels), 1), torch.full((len(labels), 1), 400.0)
    for _ in range(60):
        middle = (low + high) / 2
        logits = (states + middle * table[labels]) @ table.T
        enough = logits.double().softmax(1).gather(1, labels[:, None]) >= sure
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return states + high * table[labels]


@pytest.mark.parametrize("words", [2000, 300], ids=["whole", "in pieces"])
@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_sure_labels_in_half_precision(dtype, mixed, alike, words, monkeypatch):
    """Of a label with p = 0.999 the two sides of onehot - p all but cancel, and a model that learns comes to that: they
    are as exact as those of a stock head, against the same numbers in float64."""
    draw = torch.Generator().manual_seed(0)
    monkeypatch.setattr(head, "CACHED", 4 * 32 * words)
    table = torch.randn(2000, 64, generator=draw) * 0.1
    labels = torch.randint(0, 2000, (32,), generator=draw)
    for sure in (0.3, 0.6, 0.99, 0.999):
        states = sure_of(labels, table, sure)
        given = (states, table) if mixed else (states.to(dtype), table.to(dtype))

        def gradients(loss, as_given=given):
            leaves = [tensor.clone().requires_grad_() for tensor in as_given]
            with torch.autocast("cpu", dtype, enabled=mixed):
                found = loss(*leaves)
            found.backward()
            return [leaf.grad.double() for leaf in leaves]

        exact = [tensor.to(dtype).double().requires_grad_() for tensor in given]
        (-(exact[0] @ exact[1].T).log_softmax(1).gather(1, labels[:, None]).mean()).backward()
        stock = gradients(lambda h, w: torch.nn.functional.cross_entropy((h @ w.T).float(), labels))
        reading = head.Reading(alike=alike)
        ours = gradients(lambda h, w, r=reading: -head.read(h, w, None, labels, r).log_probs.mean())
        for mine, its, wanted in zip(ours, stock, exact, strict=True):
            error, usual = ((found - wanted.grad).norm() / wanted.grad.norm() for found in (mine, its))
            assert error <= 1.5 * usual + 0.002, (sure, error, usual)


def test_a_model_that_has_learned_its_rows_learns_on_as_the_stock_one_in_bfloat16():
    model, inputs = made("llama"), batch([20, 12, 9])
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        loss = test_forward.stock_loss(model, inputs)
        loss.backward()
        optimizer.step()
    assert loss < 0.02
    optimizer.zero_grad(set_to_none=True)
    fast = test_forward.quick(copy.deepcopy(model))
    test_forward.stock_loss(model, inputs).backward()
    exact = test_forward.gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        usual, ours = test_forward.stock_loss(model, inputs), fast(**inputs, fused_lm_head=True).loss
    usual.backward()
    ours.backward()
    errors = []
    for found in (test_forward.gradients(fast), test_forward.gradients(model)):
        apart = torch.cat([(found[name] - wanted).flatten() for name, wanted in exact.items()])
        errors.append(apart.norm() / torch.cat([wanted.flatten() for wanted in exact.values()]).norm())
    assert errors[0] <= 1.5 * errors[1] + 0.002


def small(dtype: torch.dtype = torch.float32) -> tuple[list[torch.Tensor], torch.Tensor]:
    """States, table, bias; labels."""
    draw = torch.Generator().manual_seed(0)
    sizes = ((6, 8), (20, 8), (20,))
    return [torch.randn(size, generator=draw).to(dtype).requires_grad_() for size in sizes], torch.arange(6)


@pytest.mark.parametrize("alike", [True, False])
def test_several_backward_passes_through_one_graph(alike):
    given, labels = small()
    again = [tensor.detach().clone().requires_grad_() for tensor in given]
    # Where somebody else sees to what is kept, nobody sees whether it was written into.
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, lambda kept: kept):
        found = 0.5 * head.read(*given, labels, head.Reading(alike=alike)).log_probs.mean()
    first = torch.autograd.grad(found, given, retain_graph=True)
    copies = [tensor.clone() for tensor in first]
    found.backward(retain_graph=True)
    found.backward()
    logits = torch.nn.functional.linear(*again)
    (2 * 0.5 * logits.log_softmax(1).gather(1, labels[:, None]).mean()).backward()
    for one, copied, got, wanted in zip(first, copies, given, again, strict=True):
        assert torch.equal(one, copied)
        torch.testing.assert_close(got.grad, wanted.grad)
        torch.testing.assert_close(one, wanted.grad / 2)


@pytest.mark.parametrize("alike", [True, False])
def test_second_derivatives_are_refused(alike):
    given, labels = small()
    found = head.read(*given, labels, head.Reading(alike=alike)).log_probs.sum()
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(found, given, create_graph=True)


@pytest.mark.parametrize("alike", [True, False])
def test_a_scaled_loss_does_not_leave_float16(alike):
    given, labels = small(torch.float16)
    weights = torch.linspace(500, 1000, len(labels))
    (head.read(*given, labels, head.Reading(alike=alike)).log_probs * weights).sum().backward()
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    logs = torch.nn.functional.linear(*exact).log_softmax(1)
    (logs.gather(1, labels[:, None]).squeeze(1) * weights).sum().backward()
    for got, wanted in zip(given, exact, strict=True):
        assert (got.grad - wanted.grad).norm() <= 0.01 * wanted.grad.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_entropy_alone_as_the_loss(dtype):
    given, labels = small(dtype)
    head.read(*given, labels, head.Reading(outputs=("log_probs", "entropy"))).entropy.sum().backward()
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    logs = torch.nn.functional.linear(*exact).log_softmax(1)
    (-(logs.exp() * logs).sum()).backward()
    for got, wanted in zip(given, exact, strict=True):
        assert (got.grad - wanted.grad).norm() <= (
            1e-5 if dtype == torch.float32 else 0.02
        ) * wanted.grad.norm()
