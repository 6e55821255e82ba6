"""Products by oneDNN, and a head that is read by pieces of the vocabulary: the numbers of the stock path."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import test_forward
import test_forward_pairs
import torch
from test_forward import FIELDS, assert_same, batch, made, quicken
from torch import nn

from tunesmith import forward
from tunesmith.forward import head, products

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


@pytest.fixture
def counted(monkeypatch):
    """Every product that may be is taken by oneDNN, whatever its size and the processor; how many were."""
    found = []
    product = products.product

    def counting(*args):
        found.append(args[0].shape)
        return product(*args)

    monkeypatch.setattr(products, "is_faster", lambda: True)
    monkeypatch.setattr(products, "LEAST", 1)
    monkeypatch.setattr(products, "NARROW", 0)
    for module in (products, head):
        monkeypatch.setattr(module, "product", counting)
    return found


@pytest.fixture
def in_pieces(monkeypatch):
    """The vocabulary is gone through by some forty words at a time."""
    monkeypatch.setattr(head, "CACHED", 4 * 40 * 40)


@pytest.mark.parametrize("family", sorted(forward.COVERED))
def test_losses_and_gradients_are_the_stock_ones(family, counted, in_pieces):
    assert_same(made(family), batch([61, 7, 1, 2, 33]))
    assert len(counted) > 30


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi3"])
def test_so_they_are_with_adapters(family, counted):
    test_forward.test_adapters(family, {})
    assert counted


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_and_those_of_encoder_decoders(kind, counted, in_pieces):
    test_forward_pairs.test_loss_and_gradients_are_the_stock_ones(kind, True)
    assert counted


def test_frozen_layers_are_kept_to_the_bit(counted):
    test_forward.test_outputs_of_frozen_layers_are_kept_to_the_bit("llama")
    assert counted


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


def test_what_is_left_to_torch(counted):
    states, layer = torch.randn(40, 8), nn.Linear(8, 8)
    assert products.takes(states, layer.weight)
    assert not products.takes(states.half(), layer.weight)
    assert not products.takes(states.double(), layer.weight.double())
    assert not products.takes(states, layer.weight.half())
    assert not products.takes(states.to("meta"), layer.weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert not products.takes(states, layer.weight)

    class Packed(torch.Tensor):
        """As a quantised weight is."""

    assert not products.takes(states, layer.weight.detach().as_subclass(Packed))


def test_it_is_taken_on_request_alone(monkeypatch):
    known = products.is_faster.__wrapped__
    monkeypatch.delenv(products.ASKED, raising=False)
    assert not known()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert not known()
    monkeypatch.setenv(products.ASKED, "1")
    for name in products.KEPT:
        monkeypatch.setenv(name, "8")
    assert known()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not known()


def test_small_products_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(products, "is_faster", lambda: True)
    wide = torch.randn(128, 128)
    assert products.takes(torch.randn(2, 16, 128), wide)
    assert not products.takes(torch.randn(1, 31, 128), wide)
    assert not products.takes(torch.randn(40, 128), torch.randn(64, 128))
    monkeypatch.setattr(products, "is_faster", lambda: False)
    assert not products.takes(torch.randn(40, 128), wide)
    assert products.quicken(nn.Sequential(nn.Linear(8, 8))) == []


def test_a_model_gets_its_own_layers_back(counted):
    class Own(nn.Linear):
        """As an adapter's layer is, or a quantised one."""

    model = nn.Sequential(nn.Linear(8, 8), Own(8, 8), nn.Linear(8, 8))
    model[2].forward = given = model[2].forward  # somebody else's
    changed = products.quicken(model)
    assert len(changed) == 1
    states = torch.randn(40, 8)
    torch.testing.assert_close(model(states), copy.deepcopy(model)(states))
    assert counted
    for one in changed:
        one.remove()
    assert "forward" not in vars(model[0])
    assert model[2].forward == given


def test_a_second_quickening_is_no_second_layer(counted):
    model = made("llama")
    quicken(model)
    forwards = [vars(m)["forward"] for m in model.modules() if type(m) is nn.Linear and "forward" in vars(m)]
    quicken(model)
    assert len(forwards) == 3 * 7
    for module in model.base_model.modules():
        if type(module) is nn.Linear:
            assert module.forward.args[1] == type(module).forward.__get__(module)


GROWTH = """
import json, os
os.environ["TUNESMITH_ONEDNN"] = "1"
import torch
from tunesmith.forward import products
products.is_faster()
def held():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
weight, states = torch.randn(512, 512), torch.randn(1400, 512)
for rows in range(1150, 1200):
    products.product(states[:rows], weight)
before = held()
for rows in range(1200, 1400):
    products.product(states[:rows], weight)
print(json.dumps(held() - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_batches_of_ever_other_lengths_take_no_more_memory():
    """500 MB without a limit to the shapes that oneDNN keeps ready."""
    ran = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout) < 80
