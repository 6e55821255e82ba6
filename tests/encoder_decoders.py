"""Encoder-decoder models of a few thousand parameters with tokenizers trained here: T5, mT5 and BART in small."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

WORDS = "what is the color of one two three red blue green question answer hello yes no list user assistant"

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789:,.?'\"-</>▁"


def t5_tokenizer(texts: Sequence[str] = (WORDS,)):
    """Unigram pieces with </s> behind every text and <pad> as number 0, as T5 has it: the words of these texts
    by frequency, and single letters. (Training a Unigram model gives other pieces every time.)"""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Counter(word for text in texts for word in text.split())
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces = [(f"▁{word}", math.log(count / words.total())) for word, count in sorted(words.items())]
    letters = [(letter, -20.0) for letter in LETTERS if f"▁{letter}" not in words]
    tokenizer = Tokenizer(models.Unigram([*special, *pieces, *letters], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def bart_tokenizer():
    """Byte-level pieces between <s> and </s>, as BART has it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([WORDS] * 5, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def t5_config(vocab_size: int, *, multilingual: bool = False, **changes):
    """A T5 in small; the multilingual one has mT5's gated layers and a head of its own."""
    from transformers import MT5Config, T5Config

    size = {
        "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2,
        "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    if multilingual:
        size |= {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    return (MT5Config if multilingual else T5Config)(vocab_size=vocab_size, **(size | changes))


def save(family: str, folder: Path) -> Path:
    """A model of a family (t5, mt5, bart) with its tokenizer as a folder that plain transformers load."""
    import torch
    from transformers import (
        BartConfig,
        BartForConditionalGeneration,
        MT5ForConditionalGeneration,
        T5ForConditionalGeneration,
    )

    torch.manual_seed(0)
    if family == "bart":
        tokenizer = bart_tokenizer()
        model = BartForConditionalGeneration(
            BartConfig(
                vocab_size=len(tokenizer), d_model=16, encoder_layers=2, decoder_layers=2,
                encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
                max_position_embeddings=128, bos_token_id=0, pad_token_id=1, eos_token_id=2,
                decoder_start_token_id=2, forced_eos_token_id=None,
                dropout=0.0, init_std=0.3,
            )
        )  # fmt: skip
    else:
        tokenizer = t5_tokenizer()
        config = t5_config(len(tokenizer), multilingual=family == "mt5")
        model = (MT5ForConditionalGeneration if family == "mt5" else T5ForConditionalGeneration)(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
