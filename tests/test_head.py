"""A head that is read by pieces of the vocabulary: the numbers of the stock path."""

from __future__ import annotations

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
