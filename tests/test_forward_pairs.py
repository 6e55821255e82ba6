"""The fast forward of encoder-decoders against the stock one: transformers' logits and torch's cross-entropy."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from tunesmith.forward import pairs
from tunesmith.methods.seq2seq import token_mean

VOCABULARY = 97
T5 = {
    "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 2,
    "num_heads": 4, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
BART = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 3, "decoder_layers": 2, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "pad_token_id": 1,
    "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2, "max_position_embeddings": 256,
}  # fmt: skip
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
KINDS = {
    "t5": lambda dropout: T5ForConditionalGeneration(T5Config(**T5, dropout_rate=dropout)),
    "t5 1.1": lambda dropout: T5ForConditionalGeneration(T5Config(**T5, **GATED, dropout_rate=dropout)),
    "mt5": lambda dropout: MT5ForConditionalGeneration(MT5Config(**T5, dropout_rate=dropout)),
    "bart": lambda dropout: BartForConditionalGeneration(BartConfig(**BART, dropout=dropout)),
}


def made(kind: str, *, dropout: float = 0.0):
    """A tiny model with random weights, in float32."""
    torch.manual_seed(0)
    model = KINDS[kind](dropout)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
        if kind == "bart":
            model.final_logits_bias.normal_()
    return model.train()


def batch(model, sources=(50, 7, 1, 9, 133), targets=(9, 20, 1, 3, 40)) -> dict[str, Tensor]:
    """Random pairs, padded beyond the longest; of one pair no answer has labels, of another one a token has none."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.full((len(sources), max(sources) + 3), model.config.pad_token_id)
    mask, labels = torch.zeros_like(ids), torch.full((len(targets), max(targets) + 3), -100)
    for row, (read, written) in enumerate(zip(sources, targets, strict=True)):
        ids[row, :read] = torch.randint(3, VOCABULARY, (read,), generator=draw)
        mask[row, :read] = 1
        labels[row, :written] = torch.randint(3, VOCABULARY, (written,), generator=draw)
    shifted = model.prepare_decoder_input_ids_from_labels(labels)
    if len(sources) > 3:
        labels[0, 1], labels[3] = -100, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "decoder_input_ids": shifted}


def stock_loss(model, inputs: dict[str, Tensor]) -> Tensor:
    logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), inputs["labels"].flatten(), ignore_index=-100
    )


def quick(model, **options):
    """The model with our forward; refuses to fall back."""

    def refuse(why: str) -> None:
        raise AssertionError(why)

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    pairs.quicken(inner, token_mean, say=refuse, **options)
    return model


def assert_same(model, inputs: dict[str, Tensor], fast) -> None:
    """Losses agree to 1e-6 of their size, gradients to 1e-5 of the largest of theirs."""
    wanted = stock_loss(model, inputs)
    wanted.backward()
    found = fast(**inputs, fused_lm_head=True).loss
    found.backward()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    for (name, theirs), (_, ours) in zip(model.named_parameters(), fast.named_parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if theirs.grad is not None:
            assert (ours.grad - theirs.grad).abs().max() <= 1e-5 * theirs.grad.abs().max() + 1e-9, name


@pytest.mark.parametrize("unpadded", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_the_stock_ones(kind, unpadded):
    model = made(kind)
    assert_same(model, batch(model), quick(copy.deepcopy(model), unpadded=unpadded))


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_adapters_frozen_layers_and_checkpointing(kind):
    from peft import LoraConfig, get_peft_model

    from tunesmith.models import freeze

    model = made(kind)
    names = ["q", "v", "wo"] if kind == "t5" else ["q_proj", "v_proj", "fc1"]
    lora = LoraConfig(r=4, target_modules=names, init_lora_weights=False, task_type="SEQ_2_SEQ_LM")
    wrapped = get_peft_model(copy.deepcopy(model), lora)
    assert_same(wrapped, batch(model), quick(copy.deepcopy(wrapped)))
    # A model that was trained before, layers run again in the backward pass, and some that are not trained.
    fast = quick(copy.deepcopy(model))
    fast.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for each in (model, quick(fast)):
        freeze(each, 0.5)
    assert_same(model, batch(model), fast)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_frozen_layers_that_read_have_no_graph(kind):
    """Nor what comes before them: BART's words, positions and the norm of their sum."""
    from tunesmith.models import freeze, layer_stacks

    model = made(kind)
    freeze(model, 0.5)
    reading, _ = layer_stacks(model)
    graphs = []
    for layer in reading:
        layer.register_forward_hook(
            lambda *given: graphs.append(
                (given[-1][0] if isinstance(given[-1], tuple) else given[-1]).requires_grad
            )
        )
    quick(model)(**batch(model), fused_lm_head=True)
    half = len(reading) // 2
    assert graphs == [False] * half + [True] * (len(reading) - half)


@pytest.mark.parametrize("unpadded", [True, False])
def test_padding_and_labels_behind_the_last_are_not_computed(unpadded):
    model = quick(made("t5"), unpadded=unpadded)
    seen = {}
    for name, half in (("read", model.get_encoder()), ("written", model.get_decoder())):
        half.block[0].register_forward_pre_hook(
            lambda module, args, name=name: seen.update({name: args[0].shape[:2]})
        )
    scored = []
    model.get_output_embeddings().register_forward_pre_hook(lambda module, args: scored.append(args))
    model(**batch(model), fused_lm_head=True)
    # Of the row without labels nothing is computed either.
    assert seen["read"] == ((1, 50 + 7 + 1 + 133) if unpadded else (4, 133))
    assert seen["written"] == ((1, 9 + 20 + 1 + 40) if unpadded else (4, 40))
    assert not scored


def test_dropout_draws_and_validation_does_not():
    model = quick(made("t5", dropout=0.3))
    inputs = batch(model)
    losses = [model(**inputs, fused_lm_head=True).loss.item() for _ in range(2)]
    assert losses[0] != losses[1]
    model.eval()
    assert model(**inputs, fused_lm_head=True).loss.item() == pytest.approx(stock_loss(model, inputs).item())


def test_the_loss_is_shared_out_over_the_whole_step():
    """Three times as many labels in the step: a third of the loss."""
    model = quick(made("bart"))
    inputs = batch(model)
    own = int((inputs["labels"] != -100).sum())
    alone = model(**inputs, fused_lm_head=True).loss
    assert model(**inputs, fused_lm_head=True, num_items_in_batch=3 * own).loss.item() == pytest.approx(
        alone.item() / 3
    )


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"decoder_attention_mask": torch.ones(2, 8)}, "decoder_attention_mask"),
        ({"attention_mask": torch.tensor([[0, 1, 1, 1, 1], [1, 1, 0, 1, 1]])}, "holes"),
        ({"labels": torch.full((2, 8), -100)}, "no label"),
    ],
    ids=["unknown input", "holes", "no label"],
)
def test_what_is_not_understood_takes_the_stock_path_and_is_said_once(change, why):
    model, said = made("t5"), []
    inputs = {**batch(model, (2, 2), (5, 3)), **change}
    wanted = token_mean(model(**{k: v for k, v in inputs.items() if k != "labels"}), inputs["labels"], 7)
    pairs.quicken(model, token_mean, say=said.append)
    for _ in range(2):
        found = model(**inputs, fused_lm_head=True, num_items_in_batch=7).loss
        assert found.item() == pytest.approx(wanted.item(), nan_ok=True)
    assert len(said) == 1
    assert why in said[0]


def test_who_asks_for_logits_gets_the_models_own():
    model = made("bart")
    inputs = batch(model)
    wanted = model(**inputs)
    found = quick(model)(**inputs)
    assert torch.equal(found.logits, wanted.logits)
    assert found.loss == wanted.loss
