"""A tiny Llama that was trained a little to count upward, with a tokenizer of numbers: answers that differ and end."""

import copy
from functools import cache

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY, STOP = 64, 0
PROMPTS = [
    [4, 5], [5], [*range(1, 30)], [7, 9, 11, 13], [*range(2, 20, 2)], [5], [3, 3, 3], [*range(20, 33)], [50, 51, 52],
]  # fmt: skip


class NumberTokenizer:
    """Token n is the word `tn`; there is no padding token."""

    pad_token_id = None

    def decode(self, ids, **options):
        return " ".join(f"t{i}" for i in ids)


TOKENIZER = NumberTokenizer()


def counting_llama():
    """A copy of its own."""
    return copy.deepcopy(_trained())


@cache
def _trained():
    """A tiny Llama, briefly trained to count upward in ones or twos and to stop after 60."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY, hidden_size=24, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=80,
                eos_token_id=None, bos_token_id=None, pad_token_id=None,
            )
        )  # fmt: skip
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for _ in range(80):
            start = torch.randint(1, 60, (16, 1))
            rows = start + torch.arange(24)[None] * torch.randint(1, 3, (16, 1))
            rows = torch.where(rows > 60, 0, rows)
            model(input_ids=rows, labels=rows).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()
