"""Generated chat rows and a tokenizer for them: what the data benchmarks measure on, the same on every machine.

Three turns of question and answer a row, 37 to 372 words of about a token each, word frequencies as in text (Zipf).
The tokenizer is a byte-level BPE of 8,000 tokens with ChatML's special tokens and Qwen 2.5's template as TRL ships it,
so that TRL recognizes it and takes its own training variant.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

WORDS = (
    "red", "blue", "green", "one", "two", "three", "count", "rows", "question", "answer", "yes", "no", "paris",
)  # fmt: skip
"""What short rows for the tiny model are made of."""

SYLLABLES = [
    "ka",
    "lo",
    "mi",
    "ter",
    "an",
    "ven",
    "so",
    "ri",
    "ple",
    "tan",
    "dor",
    "es",
    "ing",
    "tion",
    "al",
    "pre",
    "con",
    "de",
    "ma",
    "no",
    "str",
    "qu",
    "be",
    "th",
    "ou",
]


def rows(count: int, *, seed: int = 0) -> Iterator[dict[str, list[dict[str, str]]]]:
    """Conversations of three questions and three answers."""
    rng = random.Random(seed)
    vocabulary = sorted({"".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) for _ in range(6000)})
    rng.shuffle(vocabulary)
    pool = rng.choices(vocabulary, [1 / (rank + 1) for rank in range(len(vocabulary))], k=200_000)

    def text(words: int) -> str:
        start = rng.randrange(len(pool) - words)
        joined = " ".join(pool[start : start + words])
        return joined[:1].upper() + joined[1:] + rng.choice([".", "?", "!", " 42.", ":\n- one\n- two"])

    for _ in range(count):
        words = rng.randint(60, 600) * 0.62
        shares = [rng.random() + 0.2 for _ in range(6)]
        contents = [text(max(int(words * share / sum(shares)), 2)) for share in shares]
        yield {
            "messages": [
                {"role": "assistant" if number % 2 else "user", "content": content}
                for number, content in enumerate(contents)
            ]
        }


def write_rows(path: Path, *, count: int | None = None, size: float | None = None) -> int:
    """Write so many rows, or rows of so many bytes, as JSON Lines; the number of rows."""
    written = number = 0
    with path.open("w", encoding="utf-8") as file:
        for number, row in enumerate(rows(count or 10**9), 1):  # noqa: B007 - returned
            written += file.write(json.dumps(row) + "\n")
            if size is not None and written >= size:
                break
    return number


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML and nothing else: rows share no system prompt that nobody wrote."""


def write_tokenizer(folder: Path, template: str | None = None) -> Path:
    """Train and save the tokenizer, with this chat template in the place of Qwen 2.5's."""
    import trl
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8000,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((m["content"] for row in rows(3000) for m in row["messages"]), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.add_special_tokens({"extra_special_tokens": ["<|im_start|>"]})
    of_trl = Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja"
    fast.chat_template = template or of_trl.read_text(encoding="utf-8")
    fast.save_pretrained(folder)
    return folder
