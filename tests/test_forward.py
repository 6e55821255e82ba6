"""The fast forward against the stock one: transformers' own forward, its logits and torch's cross-entropy."""

from __future__ import annotations

import copy
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from tunesmith import forward
from tunesmith.forward import tree

VOCABULARY = 97
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4200,
    "pad_token_id": 0,
    "attention_dropout": 0.0,
}


def made(family: str, *, scores: bool = False, **changes):
    """A tiny model of a family with random weights, in float32; one that gives texts a score where asked for."""
    import transformers as hf

    torch.manual_seed(0)
    width = {"head_dim": 8, "query_pre_attn_scalar": 8}
    caps = {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 2.0}
    layers = ["sliding_attention", "full_attention", "sliding_attention"]

    def seeing(tie_word_embeddings: bool = True, **text):
        """The configuration of a model that sees pictures too, of which the same text is asked."""
        sees = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 5, "num_attention_heads": 1}
        sees |= {"image_size": 28, "patch_size": 14}
        return hf.Gemma3Config(
            text_config=text,
            vision_config=sees,
            mm_tokens_per_image=1,
            tie_word_embeddings=tie_word_embeddings,
        )

    classes = {
        "llama": (hf.LlamaConfig, hf.LlamaForCausalLM, {}),
        "mistral": (hf.MistralConfig, hf.MistralForCausalLM, {"sliding_window": 20}),
        "qwen2": (
            hf.Qwen2Config,
            hf.Qwen2ForCausalLM,
            {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
        ),
        "qwen3": (hf.Qwen3Config, hf.Qwen3ForCausalLM, {"head_dim": 16}),
        "gemma": (hf.GemmaConfig, hf.GemmaForCausalLM, {"head_dim": 8}),
        "gemma2": (
            hf.Gemma2Config,
            hf.Gemma2ForCausalLM,
            {**width, "sliding_window": 20, "layer_types": layers, **caps},
        ),
        "gemma3": (
            seeing,
            hf.Gemma3ForConditionalGeneration,
            {**width, "sliding_window": 20, "layer_types": layers},
        ),
        "gemma3_text": (
            hf.Gemma3TextConfig,
            hf.Gemma3ForCausalLM,
            {**width, "sliding_window": 20, "layer_types": layers},
        ),
        "phi3": (
            hf.Phi3Config,
            hf.Phi3ForCausalLM,
            {"sliding_window": 20, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2},
        ),
        "gpt2": (
            hf.GPT2Config,
            hf.GPT2LMHeadModel,
            {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "n_positions": 4200},
        ),
    }  # fmt: skip
    config, model, own = classes[family]
    settings = config(**{**SMALL, **own, **changes})
    if scores:
        settings.num_labels = 1
        built = hf.AutoModelForSequenceClassification.from_config(settings)
    else:
        built = model(settings)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(0, 0.1)
    assert built.config.model_type == family
    return built.train()


def batch(
    lengths: list[int], *, labelled: float = 0.4, left: bool = False, seed: int = 0
) -> dict[str, Tensor]:
    """Rows of random tokens, padded; the last share of each has labels, and a few tokens elsewhere."""
    draw = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, length in enumerate(lengths):
        place = slice(width - length, width) if left else slice(0, length)
        ids[row, place] = torch.randint(3, VOCABULARY, (length,), generator=draw)
        mask[row, place] = 1
        chosen = torch.rand(length, generator=draw) < 0.1
        chosen[int(length * (1 - labelled)) :] = True
        labels[row, place] = torch.where(chosen, ids[row, place], -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def stock_loss(model, inputs: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy over the labels, by transformers' forward and torch's own function."""
    logits = model(**{k: v for k, v in inputs.items() if k != "labels"}, use_cache=False).logits
    labels = inputs["labels"][:, 1:]
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100
    )


def quick(model, **options):
    """The model with TRL's head, and ours in its place; refuses to fall back."""
    quicken(model, **options)
    return model


def quicken(model, **options) -> forward.Trunk:
    """The same; gives the trunk."""
    from trl.trainer.utils import add_fused_lm_head

    def refuse(why: str) -> None:
        raise AssertionError(why)

    outputs = options.pop("outputs", ("log_probs", "entropy", "is_top1"))
    add_fused_lm_head(model, outputs=outputs, **options)
    return forward.quicken(model, alike=True, say=refuse)


def assert_same_gradients(expected: dict[str, Tensor], got: dict[str, Tensor]) -> None:
    """They agree to 1e-5 of the largest of their tensor."""
    assert expected.keys() == got.keys()
    for name, gradient in expected.items():
        assert (got[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max() + 1e-9, name


def gradients(model) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same(model, inputs: dict[str, Tensor], *, fast=None) -> None:
    """Losses agree to 1e-6 of their size, gradients to 1e-5 of the largest of theirs."""
    fast = fast or quick(copy.deepcopy(model))
    wanted = stock_loss(model, inputs)
    wanted.backward()
    found = fast(**inputs, fused_lm_head=True)
    found.loss.backward()
    assert found.loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert_same_gradients(gradients(model), gradients(fast))


@pytest.mark.parametrize("family", sorted(forward.COVERED))
def test_loss_and_gradients_are_the_stock_ones(family):
    # Longer than the window, shorter, of one token and of two.
    assert_same(made(family), batch([61, 7, 1, 2, 33]))


SINGLE = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "layer_types": ["sliding_attention"],
}
"""One layer, for what is asked of every family."""


def single(family: str, **changes):
    """A model of one layer of a family."""
    own = SINGLE if "gemma" in family else {n: v for n, v in SINGLE.items() if n != "layer_types"}
    windows = {"max_window_layers": 0} if family == "qwen2" else {}
    return made(family, **{**own, **windows, **changes})


@pytest.mark.parametrize("family", sorted(forward.COVERED))
def test_the_other_kind_of_head(family):
    """Tied where the kind's own is not, and untied where it is."""
    tied = single(family).config.tie_word_embeddings
    model = single(family, tie_word_embeddings=not tied)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) != tied
    assert_same(model, batch([61, 7, 2, 33]))


def test_positions_by_length():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert_same(made("llama", rope_parameters=rope, max_position_embeddings=40), batch([61, 7, 2, 33]))


def shared(prompts: list[int], answers: list[list[int]], seed: int = 0) -> dict[str, Tensor]:
    """A batch of answers to some prompts, the prompts of its rows alike where they are the same one's."""
    draw = torch.Generator().manual_seed(seed)
    rows, marks = [], []
    for length, of_prompt in zip(prompts, answers, strict=True):
        prompt = torch.randint(3, VOCABULARY, (length,), generator=draw)
        for size in of_prompt:
            answer = torch.randint(3, VOCABULARY, (size,), generator=draw)
            rows.append(torch.cat([prompt, answer]))
            marks.append(torch.cat([torch.full((length,), -100), answer]))
    order = torch.randperm(len(rows), generator=draw).tolist()
    padded = torch.nn.utils.rnn.pad_sequence

    def stacked(parts: list[Tensor], fill: int) -> Tensor:
        return padded([parts[n] for n in order], batch_first=True, padding_value=fill)

    masks = stacked([torch.ones_like(row) for row in rows], 0)
    return {"input_ids": stacked(rows, 0), "attention_mask": masks, "labels": stacked(marks, -100)}


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "mistral"])
def test_shared_prompts_are_computed_once_and_nothing_changes(family):
    inputs = shared([50, 35], [[9, 1, 40], [5, 5]])
    # A row that ends within another one's prompt, and two rows that are the same.
    inputs = {name: torch.cat([value, value[:1]]) for name, value in inputs.items()}
    inputs["attention_mask"][-1, 30:] = 0
    inputs["labels"][-1] = -100
    inputs["labels"][-1, 20:30] = inputs["input_ids"][-1, 20:30]
    assert_same(made(family), inputs)


def test_how_much_is_shared():
    inputs = shared([50, 35], [[9, 1, 40], [5, 5]])
    rows = forward.rows_of(
        inputs["input_ids"], inputs["attention_mask"], None, forward.labelled(inputs["labels"])
    )
    together = forward.layout(rows, share=True, device="cpu")
    apart = forward.layout(rows, share=False, device="cpu")
    # The last token of a row predicts nothing.
    assert apart.ids.shape[1] == 50 * 3 + 9 + 1 + 40 + 35 * 2 + 5 * 2 - 5
    assert together.ids.shape[1] == apart.ids.shape[1] - 2 * 50 - 35
    assert len(together.pieces) == 6  # nothing is left of the answer of one token


@pytest.mark.parametrize("seed", range(20))
def test_pieces_are_long_enough_and_rows_put_together_from_them_are_the_rows(seed):
    """Rows that leave one another at any place, some of them another one's beginning, or the same."""
    draw = np.random.default_rng(seed)
    texts = [draw.integers(3, 6, 60)]
    for _ in range(12):
        old = texts[draw.integers(len(texts))]
        cut = draw.integers(0, len(old) + 1)
        texts.append(np.concatenate([old[:cut], draw.integers(3, 6, draw.integers(0, 40))]))
    texts = [text for text in texts if len(text) > 1]
    rows = [tree.Row(text, 0, np.arange(len(text)), np.arange(len(text))) for text in texts]
    found = forward.layout(rows, share=True, device="cpu")
    begins = np.cumsum([0, *(piece.length for piece in found.pieces)])
    ids = found.ids[0].numpy()
    outputs = np.arange(len(found.kept)) if found.outputs is None else found.outputs.numpy()
    # Every row's tokens are found where it says they are, in a piece and those on its way.
    in_order = sorted(range(len(texts)), key=lambda n: texts[n].astype(">u4").tobytes())
    where = np.split(found.kept.numpy()[outputs], np.cumsum([len(texts[n]) for n in in_order])[:-1])
    for places, number in zip(where, in_order, strict=True):
        assert np.array_equal(ids[places], texts[number])
        used = np.unique(np.searchsorted(begins, places, side="right") - 1)
        assert {*used} == {used[-1], *found.pieces[used[-1]].way} or len(used) == 1
    inner = {n for piece in found.pieces for n in piece.way}
    assert all(found.pieces[n].length >= tree.LEAST for n in inner)
    # As much is shared as can be, but for less than a piece at each place where rows part.
    unique = {text[: size + 1].tobytes() for text in texts for size in range(len(text))}
    assert len(unique) <= len(ids) <= len(unique) + (tree.LEAST - 1) * (len(texts) - 1)


def test_what_is_not_needed_is_not_computed():
    """Shared beginnings but once, tokens after the last label nowhere, and in the last layer labelled ones alone."""
    inputs = shared([50, 35], [[9, 1, 40], [5, 5]])
    inputs["input_ids"] = torch.nn.functional.pad(inputs["input_ids"], (0, 7), value=5)
    inputs["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 7))
    inputs["labels"] = torch.nn.functional.pad(inputs["labels"], (0, 7), value=-100)
    ends = inputs["attention_mask"].sum(1).tolist()
    for row, end in enumerate(ends):  # a turn that nobody learns from follows
        inputs["attention_mask"][row, end : end + 7] = 1
    fast = quick(made("llama"))
    layers, seen = forward.decoder_layers(fast), {}
    for name, part in {
        "first": layers[0].mlp,
        "last": layers[-1].mlp,
        "reads": layers[-1].input_layernorm,
    }.items():
        part.register_forward_pre_hook(
            lambda _, given, name=name: seen.update({name: seen.get(name, 0) + given[0].shape[:-1].numel()})
        )
    fast(**inputs, fused_lm_head=True).loss.backward()
    # The last token of a row predicts nothing.
    assert seen["first"] == 50 * 3 + 9 + 1 + 40 + 35 * 2 + 5 * 2 - 5 - 2 * 50 - 35
    assert seen["reads"] == seen["first"]
    # Each answer's tokens are predicted from the token before; of those of one prompt the first from the same one.
    assert seen["last"] <= 9 + 1 + 40 + 5 * 2


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, "the head has an adapter"),
        ({"trainable_token_indices": [3, 5]}, "the head is a TrainableTokensWrapper"),
        ({"modules_to_save": ["lm_head"]}, None),
        ({}, None),
    ],
)
def test_heads_that_are_no_product_take_the_stock_path(settings, why):
    from types import SimpleNamespace

    from peft import LoraConfig, get_peft_model
    from trl.trainer.utils import add_fused_lm_head

    adapted = get_peft_model(
        made("llama", tie_word_embeddings=True), LoraConfig(**{"target_modules": ["q_proj"], **settings})
    )
    model = adapted.get_base_model()
    add_fused_lm_head(model, outputs=("log_probs",))
    trainer = SimpleNamespace(
        model=adapted,
        is_fsdp_enabled=False,
        is_deepspeed_enabled=False,
        args=SimpleNamespace(neftune_noise_alpha=None),
    )
    said = forward.uncovered(trainer, model)
    assert (said is None) == (why is None)
    assert (said or "").startswith(why or "")


@pytest.mark.parametrize("window", [None, 20, 120])
@pytest.mark.parametrize("trimmed", [False, True])
def test_what_sees_what(window, trimmed, monkeypatch):
    """The tree's masks, drawn out, against rows that are compared one by one."""
    monkeypatch.setattr(tree, "QUERIES", 40)
    inputs = shared([100, 40], [[7, 53], [3, 3, 10]], seed=3)
    rows = forward.rows_of(
        inputs["input_ids"], inputs["attention_mask"], None, forward.labelled(inputs["labels"])
    )
    found = forward.layout(rows, share=True, device="cpu")
    begins = torch.tensor([0, *found.lengths]).cumsum(0).tolist()
    tokens = found.kept.tolist() if trimmed else list(range(found.ids.shape[1]))
    drawn: list[list[int]] = []
    for block in found.blocks(window, trimmed):
        way = [token for n in block.pieces for token in range(begins[n], begins[n + 1])][
            block.low : block.high
        ]
        mask = block.mask
        if block.whole:
            mask = torch.ones(block.queries, block.queries, dtype=torch.bool).tril()
        for query in range(block.queries):
            drawn.append([t for n, t in enumerate(way) if mask is None or mask[query, n]])
    assert len(drawn) == len(tokens)
    # Of a token the way is the longest list whose tokens lead up to it: those of one of the rows.
    positions, ids = found.positions[0].tolist(), found.ids[0].tolist()
    for token, sees in zip(tokens, drawn, strict=True):
        assert sees[-1] == token
        assert [positions[t] for t in sees] == list(
            range(max(positions[token] - (window or 10**9) + 1, 0), positions[token] + 1)
        )
        own = [ids[t] for t in sees]
        assert any(row.ids[: positions[token] + 1].tolist()[-len(own) :] == own for row in rows)


def test_a_model_that_is_trained_again():
    model = made("llama")
    assert_same(model, batch([20, 7]), fast=quick(quick(copy.deepcopy(model))))


def test_rows_with_padding_on_the_left():
    inputs = batch([61, 7, 33], left=True)
    inputs["labels"][1, : 61 - 7 + 1] = -100  # what padding predicts
    inputs["labels"][2, : 61 - 33 + 1] = -100
    assert_same(made("llama"), inputs)


def test_what_is_not_understood_takes_the_stock_path_and_is_said():
    from trl.trainer.utils import add_fused_lm_head

    said = []
    model = made("llama")
    add_fused_lm_head(model)
    forward.quicken(model, alike=True, say=said.append)
    inputs = batch([20, 7])
    wanted = stock_loss(model, inputs)
    holes = {**inputs, "attention_mask": inputs["attention_mask"].clone()}
    holes["attention_mask"][0, 5] = 0
    for given in (holes, {**inputs, "inputs_embeds": None, "output_attentions": True}):
        assert torch.isfinite(model(**given, fused_lm_head=True).loss)
    assert model(**given, fused_lm_head=True).loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert said == [
        "the mask of a batch has holes, or a label follows padding",
        "a batch brings output_attentions",
    ]


def test_packed_rows_are_rows_of_their_own():
    from tunesmith.data.packing import packed_batch

    inputs = batch([20, 9, 30, 4])
    rows = []
    for ids, mask, labels in zip(*inputs.values(), strict=True):
        size = int(mask.sum())
        rows.append((ids[:size].tolist(), labels[:size].tolist()))
    model = made("qwen2")
    packed = packed_batch([rows[:2], rows[2:]], 0)
    fast = quick(copy.deepcopy(model))
    assert fast(**packed, fused_lm_head=True).loss.item() == pytest.approx(
        stock_loss(model, inputs).item(), rel=1e-6
    )


@pytest.mark.thorough
@pytest.mark.parametrize("family", sorted(forward.COVERED))
def test_long_rows(family):
    changes = {} if family in ("gpt2", "llama", "qwen3", "gemma") else {"sliding_window": 300}
    assert_same(made(family, **changes), batch([4096, 700, 1]))


def test_a_long_row():
    assert_same(made("mistral", sliding_window=100, num_hidden_layers=2), batch([1100, 700, 1]))


def test_a_row_of_4096_tokens():
    """The other kinds have theirs in `make thorough`."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    assert_same(made("llama", **sizes, intermediate_size=16), batch([4096]))


@pytest.mark.parametrize("family", sorted(forward.COVERED))
@pytest.mark.parametrize("changes", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_adapters(family, changes):
    from peft import LoraConfig, get_peft_model

    model = single(family)
    names = ["c_attn", "c_proj", "c_fc"] if family == "gpt2" else "all-linear"
    config = LoraConfig(r=4, target_modules=names, init_lora_weights=False, task_type="CAUSAL_LM", **changes)
    wrapped = get_peft_model(model, config)
    fast = copy.deepcopy(wrapped)
    quick(fast.get_base_model())
    assert_same(wrapped, batch([30, 7, 2, 18]), fast=fast)


@pytest.mark.parametrize("family", sorted(forward.COVERED))
def test_quantized_weights(tmp_path, family):
    """An adapter on weights of four bits, which the stock path and ours unpack alike."""
    from tunesmith.models import attach, load_model
    from tunesmith.recipe import QLoRA

    single(family).save_pretrained(tmp_path)
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        packed = attach(load_model(str(tmp_path), quantize=QLoRA()), QLoRA(rank=4, dropout=0)).train()
        kinds = {type(getattr(module, "base_layer", None)).__name__ for module in packed.modules()}
        assert "Linear4bit" in kinds
        with torch.no_grad():
            for parameter in packed.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0, 0.1)
        models.append(packed)
    quick(models[1].get_base_model())
    assert_same(models[0], batch([30, 7, 2, 18]), fast=models[1])


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
@pytest.mark.parametrize("head", [True, False])
def test_frozen_layers_have_no_graph(head, family):
    from tunesmith.models import freeze

    model = made(family, tie_word_embeddings=False)
    freeze(model, 0.7)
    model.get_output_embeddings().requires_grad_(head)
    fast = quick(copy.deepcopy(model))
    graphs = []
    for layer in forward.decoder_layers(fast):
        layer.register_forward_hook(lambda *given: graphs.append(given[-1].requires_grad))
    assert_same(model, batch([30, 7, 2, 18]), fast=fast)
    assert graphs == [False, False, True]


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "llama"])
def test_outputs_of_frozen_layers_are_kept_to_the_bit(family):
    """Other batches, later epochs, and rows that no room was left for have the same numbers."""
    from tunesmith.models import freeze

    model = made(family)
    freeze(model, 0.7)
    fast = copy.deepcopy(model)
    trunk, full = quicken(fast), []
    assert trunk.keep_frozen(most=2**20, full=full.append) == 2
    below = forward.decoder_layers(fast)[0].mlp
    runs = []
    below.register_forward_hook(lambda *given: runs.append(1))
    inputs = shared([50], [[9, 1, 40]])
    assert_same(model, inputs, fast=fast)
    first = len(runs)
    assert first == 3
    assert not full
    wanted = fast(**inputs, fused_lm_head=True)
    wanted.loss.backward()
    expected = gradients(fast)
    assert len(runs) == first  # from memory
    trunk.frozen._states.clear()
    trunk.frozen.most = 0
    for _ in range(2):
        found = fast(**inputs, fused_lm_head=True)
        found.loss.backward()
        assert torch.equal(found.log_probs, wanted.log_probs)
        got = gradients(fast)
        assert all(torch.equal(got[name], gradient) for name, gradient in expected.items())
    assert full == [0]
    assert len(runs) == first + 6
    # Other rows beside them: what is kept of a row does not depend on its batch.
    trunk.frozen.most = 2**20
    fast(**{name: value[:1] for name, value in inputs.items()}, fused_lm_head=True)
    alone = next(iter(trunk.frozen._states.values()))
    trunk.frozen._states.clear()
    fast(**inputs, fused_lm_head=True)
    assert any(torch.equal(alone, states) for states in trunk.frozen._states.values())


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, "the embeddings are trained"),
        ({"lora": True}, "an adapter sits in layer 1"),
        ({"frozen": True, "attention_dropout": 0.1}, "the attention of layer 1 has dropout"),
    ],
)
def test_outputs_that_change_are_not_kept(changes, why):
    from peft import LoraConfig, get_peft_model

    from tunesmith.errors import RecipeError
    from tunesmith.models import freeze

    model = made("llama", **{n: v for n, v in changes.items() if n not in ("lora", "frozen")})
    if changes.get("frozen"):
        freeze(model, 0.7)
    if changes.get("lora"):
        model = get_peft_model(model, LoraConfig(target_modules="all-linear")).get_base_model()
    with pytest.raises(RecipeError, match=why):
        quicken(model).keep_frozen(most=1, full=print)


def kept_with(ratio: float) -> int:
    """Tensors that a step keeps for the backward pass with this share of six layers frozen; what is frozen has neither
    a graph nor gradients."""
    from tunesmith.models import freeze

    model, has_graph, kept = made("llama", tie_word_embeddings=True, num_hidden_layers=6), [], []
    if ratio:
        freeze(model, ratio)
    fast = quick(model)
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, output: has_graph.append(output.requires_grad))

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with mock.patch.object(forward.activations, "keeping", return_value=hooks):
        fast(**batch([30, 7, 2, 18]), fused_lm_head=True).loss.backward()
    frozen = int(6 * ratio)
    assert has_graph == [False] * frozen + [True] * (6 - frozen)
    assert (model.get_input_embeddings().weight.grad is None) == bool(ratio)
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    return len(kept)


def test_frozen_layers_keep_nothing_for_the_backward_pass():
    # Four of six layers are frozen: what is kept is in proportion to the layers that are trained.
    assert kept_with(0.7) < 0.45 * kept_with(0.0)


def test_gradient_checkpointing():
    model = made("gemma2")
    fast = copy.deepcopy(model)
    fast.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    layers, runs = forward.decoder_layers(fast), []
    for number, layer in enumerate(layers):
        layer.mlp.register_forward_hook(lambda *given, number=number: runs.append(number))
    assert_same(model, shared([50], [[9, 1, 40]]), fast=quick(fast))
    # The last one, run on few tokens, is the first that the backward pass asks for: it is not run again.
    assert sorted(runs) == [0, 0, 1, 1, 2]
    assert all(layer.gradient_checkpointing for layer in layers)


@pytest.mark.slow
@pytest.mark.parametrize("family", [pytest.param("gemma2", marks=pytest.mark.thorough), "gpt2", "llama"])
def test_compiled_layers_are_the_same_for_all_lengths(family):
    from torch._dynamo.utils import counters

    from tunesmith.forward import compiling

    if why := compiling.missing(torch.device("cpu")):
        pytest.skip(why)
    model = made(family)
    fast = quick(copy.deepcopy(model))
    undo = compiling.compile_layers(fast)
    counters.clear()
    assert_same(model, batch([61, 7, 1, 2, 33]), fast=fast)
    compiled = counters["stats"]["unique_graphs"]
    assert compiled > 0
    for lengths in ([20, 9], [5], [100, 3, 8], [30, 30]):
        assert_same(model, batch(lengths), fast=fast)
    assert counters["stats"]["unique_graphs"] == compiled
    for handle in undo:
        handle.remove()
    assert "forward" not in vars(forward.decoder_layers(fast)[0])


def test_only_rows_go_through_compiled_layers(monkeypatch):
    """Answers are written with a cache, whose lengths grow token by token, and by other models in the same process."""
    from transformers import AttentionInterface

    from tunesmith.forward import attention, compiling

    compiled = []

    def compile(function, **options):
        def run(*args, **kwargs):
            compiled.append(kwargs["rows"])
            return function(*args, **kwargs)

        return run

    monkeypatch.setattr(torch, "compile", compile)
    model = quick(made("llama"))
    undo = compiling.compile_layers(model)
    inputs = batch([9, 5])
    model.eval().generate(inputs["input_ids"], max_new_tokens=3, do_sample=False)
    assert not compiled
    model(**inputs, fused_lm_head=True)
    assert len(compiled) == 2  # the last layer is run in two parts, and stays as it is
    assert AttentionInterface()[attention.NAME] is attention.rows_attention
    for handle in undo:
        handle.remove()
    model(**inputs, fused_lm_head=True)
    assert len(compiled) == 2


def test_a_missing_compiler_costs_one_sentence(monkeypatch):
    from tunesmith.forward import compiling

    def broken(*args, **kwargs):
        raise RuntimeError("\nNo working C++ compiler found in path\nSet TORCH_LOGS for more")

    monkeypatch.setattr(torch, "compile", broken)
    assert compiling.missing(torch.device("cpu")) == "No working C++ compiler found in path"


FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_all_that_is_told_of_a_label_is_what_trl_tells(softcap):
    """And with weights of one's own on log-probabilities and entropies, as policy gradients have them."""
    from trl.trainer.utils import add_fused_lm_head

    model = made("gemma2", final_logit_softcapping=softcap)
    theirs = copy.deepcopy(model)
    add_fused_lm_head(theirs, temperature=0.7, outputs=FIELDS)
    fast = quick(model, temperature=0.7, outputs=FIELDS)
    inputs = batch([30, 7, 2, 18])
    weights = torch.randn(2, 4, 29)
    losses = []
    for asked in (theirs, fast):
        found = asked(**inputs, fused_lm_head=True)
        ((found.log_probs * weights[0]).sum() + (found.entropy * weights[1]).sum()).backward()
        losses.append(found)
    for name in FIELDS:
        torch.testing.assert_close(getattr(losses[1], name), getattr(losses[0], name), rtol=1e-4, atol=1e-5)
    assert torch.equal(losses[1].label_mask, losses[0].label_mask)
    assert_same_gradients(gradients(theirs), gradients(fast))


@pytest.mark.parametrize("left", [False, True], ids=["padded right", "padded left"])
@pytest.mark.parametrize("family", sorted(forward.COVERED))
def test_scores_and_their_gradients_are_the_stock_ones(family, left):
    """What a reward model gives answers to the same prompts, longer than the window, shorter, and of one token."""

    def refuse(why: str) -> None:
        raise AssertionError(why)

    model = made(family, scores=True)
    fast = copy.deepcopy(model)
    forward.score_quickly(fast, say=refuse)
    inputs = shared([40, 1, 0], [[21, 3], [6, 1], [1, 18]])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    if left:
        shifts = (ids.shape[1] - mask.sum(1)).tolist()
        ids, mask = (
            torch.stack([row.roll(n) for row, n in zip(value, shifts, strict=True)]) for value in (ids, mask)
        )
    found = []
    # A weight for each, so that nothing cancels out.
    weights = torch.linspace(0.5, 2, len(ids))
    for each in (model, fast):
        scores = each(input_ids=ids, attention_mask=mask).logits[:, 0]
        loss = (torch.nn.functional.softplus(-scores) * weights).mean()
        loss.backward()
        found.append((loss.item(), scores.detach()))
    (wanted, expected), (got, ours) = found
    assert len(expected.unique()) == len(ids)
    assert got == pytest.approx(wanted, rel=1e-6)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6 * expected.abs().max().item())
    assert_same_gradients(gradients(model), gradients(fast))


@pytest.mark.parametrize(("alike", "kept"), [(True, 2**27), (False, 2**27), (False, 0)])
def test_a_head_whose_labels_weigh_differently(alike, kept, monkeypatch):
    """The gradient that was made ready for equal weights is not used for other ones; probabilities that were kept and
    such that are computed again give the same."""
    from tunesmith.forward import head
    from tunesmith.forward.head import Reading, read

    monkeypatch.setattr(head, "KEPT", kept)
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((600, 8), (50, 8), (50,)))
    targets, weights = torch.randint(50, (600,)), torch.rand(600)
    reading = Reading(temperature=1.3, scale=0.5, alike=alike)
    logs = read(hidden, weight, bias, targets, reading).log_probs
    (logs * weights).sum().backward()
    found = [t.grad.clone() for t in (hidden, weight, bias)]
    for tensor in (hidden, weight, bias):
        tensor.grad = None
    logits = (hidden @ weight.T + bias) * 0.5 / 1.3
    wanted = torch.log_softmax(logits, 1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(logs, wanted)
    (wanted * weights).sum().backward()
    for tensor, gradient in zip((hidden, weight, bias), found, strict=True):
        torch.testing.assert_close(gradient, tensor.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alike", [True, False])
def test_the_head_is_cast_once_in_mixed_precision(alike):
    """Not once for each chunk: it is the largest matrix of a model."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from tunesmith.forward.head import Reading, read

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default and args[0].shape == (50, 8):
                seen.append((args[0].dtype, kwargs["dtype"]))
            return function(*args, **(kwargs or {}))

    seen: list[tuple[torch.dtype, torch.dtype]] = []
    narrowed = (torch.float32, torch.bfloat16)
    hidden, weight = (torch.randn(*shape, requires_grad=True) for shape in ((600, 8), (50, 8)))
    with torch.autocast("cpu", torch.bfloat16), Casts():
        logs = read(hidden, weight, None, torch.randint(50, (600,)), Reading(alike=alike)).log_probs
    assert seen.count(narrowed) == 1
    with Casts():
        logs.sum().backward()
    assert seen.count(narrowed) <= (1 if alike else 2)


def test_the_head_takes_more_positions_at_a_time_on_a_gpu():
    """A hollow model, which is on no device, is read as on the one that it is planned for."""
    from tunesmith.forward.head import Reading, read
    from tunesmith.tracing import counting

    sizes = []
    for device in (None, "cpu", "cuda"):
        hidden, weight = torch.empty(3000, 8, device="meta"), torch.empty(50_000, 8, device="meta")
        targets = torch.empty(3000, dtype=torch.long, device="meta")
        products: list[int] = []

        class Products(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None, found=products):
                if function.overloadpacket is torch.ops.aten.mm:
                    found.append(len(args[0]))
                return function(*args, **(kwargs or {}))

        with counting(vocabulary=50_000), Products():
            read(hidden, weight, None, targets, Reading(device=device))
        sizes.append(max(products))
    assert sizes[0] == sizes[1] == 256
    assert 1024 < sizes[2] < 3000


def test_mixed_precision():
    """In 16 bits both ways of adding up round, and stay near the loss in 32."""
    from trl.trainer.utils import add_fused_lm_head

    model = made("gemma2")
    theirs = copy.deepcopy(model)
    add_fused_lm_head(theirs, outputs=("log_probs", "is_top1"))
    fast = quick(copy.deepcopy(model), outputs=("log_probs", "is_top1"))
    inputs = batch([30, 7, 2, 18])
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (each(**inputs, fused_lm_head=True) for each in (fast, theirs))
    for answer in (found, expected):
        answer.loss.backward()
    whole = stock_loss(model, inputs)
    whole.backward()
    assert abs(found.loss - whole) <= 2 * abs(expected.loss - whole) + 0.01 * whole
    exact, ours, other = gradients(model), gradients(fast), gradients(theirs)
    for name, gradient in exact.items():
        error, usual = (float((got[name] - gradient).norm()) for got in (ours, other))
        assert error <= 2 * usual + 0.02 * gradient.norm(), name
