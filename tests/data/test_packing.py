"""Packed examples train exactly as they do alone, in full blocks; models that mix them up are found out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data.packing import Packing, best_fit, isolates, pack, packed_batch, padded_share
from tunesmith.data.templates import IGNORED

PAD = 0
SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,  # attention of the usual 0.02 is too flat for a leak to show in the loss
}
WINDOW = 4  # shorter than most examples below, and than every block
BOTH = ("sdpa", "eager")
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
FAMILIES = {
    "Llama": (BOTH, {}),
    "Mistral": (BOTH, {"sliding_window": WINDOW}),
    "Qwen2": (BOTH, {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "Qwen3": (BOTH, {"head_dim": 8}),
    "Gemma2": (("eager",), {"head_dim": 8, "sliding_window": WINDOW}),
    "Gemma3Text": (
        BOTH,
        {"head_dim": 8, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "Phi3": (BOTH, {"sliding_window": WINDOW}),
    "GPT2": (BOTH, GPT),
    "GPTNeoX": (BOTH, {}),
    "GPTBigCode": (BOTH, GPT),
    "Mixtral": (BOTH, {"num_local_experts": 4}),
}
CASES = [(name, attention) for name, (kinds, _) in FAMILIES.items() for attention in kinds]
# These read position ids, or swallow them, but build no mask of them in the transformers of today.
OTHERS = {
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "Bloom": {"n_head": 4, "n_layer": 2},
    "Falcon": {},
    "GptOss": {"num_local_experts": 4, "head_dim": 8, "sliding_window": WINDOW},
    "Mamba": {"state_size": 4},
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
}
LENGTHS = (9, 6, 1, 7, 11)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small wait for a second thread far longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(name, attention="eager", **more):
    torch.manual_seed(0)
    settings_of = FAMILIES[name][1] if name in FAMILIES else OTHERS[name]
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **settings_of, **more})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    assert model.config._attn_implementation == attention
    return model.eval()


def examples():
    made = []
    for number, length in enumerate(LENGTHS):
        ids = [3 + (13 * number + 7 * place) % 90 for place in range(length)]
        labels = list(ids)  # the first one too: it must not be predicted from the example before
        if length > 4:
            labels[2] = labels[-2] = IGNORED
        made.append((ids, labels))
    return made


SHAPES = {
    "one block": ((range(5),), False),
    "two blocks": ((range(2), range(2, 5)), False),  # of 15 and 19 tokens, so one is padded
    "flattened": ((range(2), range(2, 5)), True),
}


def batch_of(shape):
    rows, flatten = SHAPES[shape]
    made = examples()
    return packed_batch([[made[row] for row in block] for block in rows], PAD, flatten=flatten)


def gradients(model):
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def alone(model):
    """Loss per label and its gradients with every example in a forward pass of its own."""
    total, count = torch.zeros(()), 0
    for ids, labels in examples():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
        wanted = torch.tensor(labels[1:], dtype=torch.long)
        total = total + torch.nn.functional.cross_entropy(
            logits, wanted, reduction="sum", ignore_index=IGNORED
        )
        count += int((wanted != IGNORED).sum())
    loss = total / count
    loss.backward()
    return loss.detach(), gradients(model)


def leaks(model, batch):
    """Whether the loss of a packed batch is another than that of its examples alone."""
    with torch.no_grad():
        loss = model(**batch, use_cache=False).loss
    return abs(float(loss - alone(model)[0])) > 1e-5


# --- blocks ---


@st.composite
def lengths_and_capacity(draw, most=60):
    capacity = draw(st.integers(1, 64))
    return draw(st.lists(st.integers(1, capacity), max_size=most)), capacity


def first_fit_decreasing(lengths, capacity):
    rooms = []
    for length in sorted(lengths, reverse=True):
        at = next((at for at, room in enumerate(rooms) if room >= length), None)
        if at is None:
            rooms.append(capacity - length)
        else:
            rooms[at] -= length
    return len(rooms)


@settings(max_examples=300, deadline=None)
@given(lengths_and_capacity())
def test_every_example_is_in_one_block_and_no_block_is_over_capacity(case):
    lengths, capacity = case
    blocks = best_fit(lengths, capacity)
    assert sorted(index for block in blocks for index in block) == list(range(len(lengths)))
    assert all(block == sorted(block) for block in blocks)
    assert blocks == sorted(blocks)
    filled = sorted(sum(lengths[index] for index in block) for block in blocks)
    assert not filled or filled[-1] <= capacity
    # No block was opened while another had room, so even the two emptiest do not go into one.
    assert len(filled) < 2 or filled[0] + filled[1] > capacity
    assert len(blocks) <= first_fit_decreasing(lengths, capacity) + 1
    assert best_fit(np.array(lengths, dtype=np.int32), capacity) == blocks


@settings(max_examples=15, deadline=None)
@given(lengths_and_capacity(most=200).filter(lambda case: case[0]))
def test_as_many_blocks_as_trl_makes(case):
    from datasets import Dataset
    from trl.data_utils import pack_dataset

    lengths, capacity = case
    rows = Dataset.from_dict({"input_ids": [[1] * length for length in lengths]})
    assert len(best_fit(lengths, capacity)) == len(pack_dataset(rows, capacity, strategy="bfd"))


def test_an_example_goes_into_the_fullest_block_with_room():
    # 7 and 5 open blocks; 3 fills up the first one though the second has more room.
    assert best_fit([3, 7, 5, 4], 10) == [[0, 1], [2, 3]]
    assert best_fit([2] * 7, 6) == [[0, 1, 2], [3, 4, 5], [6]]
    assert best_fit([], 10) == []


@pytest.mark.parametrize(
    ("lengths", "found"), [([3, 11], "example 1 has 11 tokens"), ([0, 3], "example 0 has no")]
)
def test_lengths_that_no_block_can_hold_are_refused(lengths, found):
    with pytest.raises(ValueError, match=found):
        best_fit(lengths, 10)


def test_padding_before_and_after():
    lengths = [8, 2, 5, 5, 4]
    assert padded_share(lengths, 2) == pytest.approx(1 - 24 / (16 + 10 + 4))
    assert padded_share(lengths, 1) == 0
    assert padded_share(lengths, 99) == pytest.approx(1 - 24 / 40)
    assert padded_share([], 2) == 0
    packing = pack(np.array(lengths), 10)
    assert packing == Packing(((0, 1), (2, 3), (4,)), capacity=10, tokens=24)
    assert packing.padded_share == pytest.approx(1 - 24 / 30)
    assert pack([], 10).padded_share == 0
    with pytest.raises(ValueError, match="at least 1 row"):
        padded_share(lengths, 0)


# --- batches ---


def test_a_batch_starts_over_at_every_example_and_in_the_padding():
    blocks = [[([5, 6, 7], [5, 6, 7]), ([8], [8]), ([9, 10], [IGNORED, 10])], [([11, 12], [11, 12])]]
    batch = packed_batch(blocks, pad_token_id=1)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7, 8, 9, 10], [11, 12, 1, 1, 1, 1]],
        "labels": [[-100, 6, 7, -100, -100, 10], [-100, 12, -100, -100, -100, -100]],
        "position_ids": [[0, 1, 2, 0, 0, 1], [0, 1, 0, 1, 2, 3]],
    }
    flat = packed_batch(blocks, pad_token_id=1, flatten=True)
    assert {name: tensor.tolist() for name, tensor in flat.items()} == {
        "input_ids": [[5, 6, 7, 8, 9, 10, 11, 12]],
        "labels": [[-100, 6, 7, -100, -100, 10, -100, 12]],
        "position_ids": [[0, 1, 2, 0, 0, 1, 0, 1]],
    }


def test_batches_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="2 input ids but 1 labels"):
        packed_batch([[([1, 2], [1])]], PAD)
    for nothing in ([], [[]], [[([], [])]]):
        with pytest.raises(ValueError, match="at least one example"):
            packed_batch(nothing, PAD)


# --- models ---


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "attention"), CASES)
def test_packed_examples_have_the_loss_and_gradients_they_have_alone(name, attention, shape):
    model = build(name, attention)
    expected_loss, expected = alone(model)
    loss = model(**batch_of(shape), use_cache=False).loss
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected_loss, rtol=2e-6, atol=0)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for weight, gradient in found.items():
        # Sums over tokens in another order: rounding is relative to the gradient's largest entries.
        tolerance = 1e-5 * float(expected[weight].abs().max()) + 1e-7
        torch.testing.assert_close(gradient, expected[weight], rtol=0, atol=tolerance, msg=weight)
    assert isolates(model)
    assert isolates(model.to(torch.bfloat16))


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_the_comparison_bites_when_positions_run_on(name, attention):
    batch = batch_of("two blocks")
    width = batch["input_ids"].shape[1]
    assert leaks(build(name, attention), {**batch, "position_ids": torch.arange(width).expand(2, -1)})


@pytest.mark.parametrize("name", OTHERS)
def test_the_check_agrees_with_the_loss(name):
    """Whichever way it is: a later transformers may keep the examples of these families apart."""
    model = build(name)
    leaking = leaks(model, batch_of("two blocks"))
    assert isolates(model) is not leaking
    assert isolates(model.to(torch.bfloat16)) is not leaking


class Deaf(transformers.LlamaForCausalLM):
    """A Llama that takes position ids and does not use them."""

    def forward(self, input_ids, position_ids=None, **kwargs):
        return super().forward(input_ids, **kwargs)


class Refusing(transformers.LlamaForCausalLM):
    """A Llama that has no position ids."""

    def forward(self, input_ids, use_cache=None):
        return super().forward(input_ids, use_cache=use_cache)


class RunningOn(transformers.GPT2LMHeadModel):
    """A GPT-2 that keeps examples apart by a mask of its own, but numbers the positions of a row throughout."""

    def forward(self, input_ids, position_ids=None, **kwargs):
        if position_ids is not None:
            example = (position_ids == 0).cumsum(-1)
            same = example[:, None, :, None] == example[:, None, None, :]
            kwargs["attention_mask"] = same & torch.ones(same.shape[-2:], dtype=torch.bool).tril()
        return super().forward(input_ids, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "kind"), [("Llama", Deaf), ("Llama", Refusing), ("GPT2", RunningOn)], ids=lambda of: str(of)
)
def test_models_that_mix_up_packed_examples_are_found_out(name, kind, dtype):
    model = kind(build(name, "sdpa").config).to(dtype)
    assert not isolates(model)


def test_a_model_whose_tokens_do_not_see_each_other_proves_nothing():
    model = build("Llama")
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    assert not isolates(model)


class Slight(transformers.LlamaForCausalLM):
    """A Llama into which a little of the token before leaks, as from a short convolution."""

    share = 0.0

    def forward(self, input_ids, **kwargs):
        embedded = self.get_input_embeddings()(input_ids)
        embedded[:, 1:] += self.share * embedded[:, :-1].clone()
        return super().forward(inputs_embeds=embedded, **kwargs)


@pytest.mark.parametrize(
    ("dtype", "share"), [(torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 3e-2)], ids=str
)
def test_a_leak_within_rounding_is_found(dtype, share):
    """With the usual small random weights, of which attention adds next to nothing to the logits."""
    config = build("Llama", "sdpa", initializer_range=0.02).config
    model = Slight(config).to(dtype)
    assert isolates(model)
    model.share = share
    assert not isolates(model)


def test_flash_attention_is_checked_in_one_row():
    """With sdpa under another name, as FlashAttention needs a GPU."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    transformers.AttentionInterface.register("flash_of_a_test", sdpa_attention_forward)
    transformers.AttentionMaskInterface.register("flash_of_a_test", sdpa_mask)
    shapes = []
    for kind in (transformers.LlamaForCausalLM, Deaf):
        model = kind(build("Llama", "sdpa").config)
        model.config._attn_implementation = "flash_of_a_test"
        model.get_input_embeddings().register_forward_hook(
            lambda module, inputs, output: shapes.append(tuple(output.shape[:2]))
        )
        assert isolates(model) is (kind is not Deaf)
    assert (1, 24) in shapes


def test_the_check_leaves_no_trace():
    model = build("GPT2", "sdpa").train()
    model.transformer.drop.eval()
    modes = [module.training for module in model.modules()]
    during = []

    def watch(module, inputs, output):
        torch.rand(1)  # as a model that draws numbers in eval mode too
        during.append((torch.is_grad_enabled(), model.training))

    model.register_forward_hook(watch)
    random = torch.get_rng_state()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    assert isolates(model)
    assert set(during) == {(False, False)}
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())
    assert torch.is_grad_enabled()


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
def test_adapters():
    from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model

    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", init_lora_weights=False)
    assert isolates(get_peft_model(build("Llama", "sdpa"), lora))
    # Prompt tuning drops position ids, prefix tuning needs the cache that turns packing off.
    for kind in (PromptTuningConfig, PrefixTuningConfig):
        adapter = kind(task_type="CAUSAL_LM", num_virtual_tokens=3)
        assert not isolates(get_peft_model(build("Llama", "sdpa"), adapter))
