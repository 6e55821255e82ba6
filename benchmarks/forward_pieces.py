"""What each piece of the fast forward gains: steps with all of them beside steps with one of them switched off.

One process, one model, the same batches in turns, so that the ratios hold on a machine that others use as well; forward
and backward pass without the optimizer. The line is of the whole beside the stock forward of transformers; pieces are
told on stderr and in `pieces`. Short chats for all but `sharing`, which has pairs with prompts three times as long as
their answers.

    python benchmarks/forward_pieces.py --shape 512x8
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import training

VOCABULARY = 32_768
Batch = dict[str, Any]


def batches(seed: int, *, pairs: bool) -> Batch:
    """Eight padded rows of random tokens: chats 40 % labelled, or four pairs that share their prompts."""
    import torch

    rng, draw = random.Random(seed), torch.Generator().manual_seed(seed)

    def tokens(count: float) -> Any:
        return torch.randint(3, VOCABULARY, (max(int(count), 1),), generator=draw)

    rows = []
    for _ in range(4 if pairs else 8):
        if pairs:
            size = min(max(rng.lognormvariate(math.log(60), 0.5), 12), 240)
            prompt = tokens(3 * size)
            rows += [(prompt, tokens(size)), (prompt, tokens(size * rng.uniform(0.8, 1.2)))]
        else:
            size = min(max(rng.lognormvariate(math.log(140), 0.8), 16), training.MAX_LENGTH)
            rows.append((tokens(size * (1 - training.LABELLED)), tokens(max(size * training.LABELLED, 2))))
    ids = [torch.cat(row) for row in rows]
    labels = [torch.cat([torch.full_like(row[0], -100), row[1]]) for row in rows]
    padded = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": padded(ids, batch_first=True),
        "attention_mask": padded([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": padded(labels, batch_first=True, padding_value=-100),
    }


def off(piece: str) -> contextlib.ExitStack:
    """Have the fast forward do without one of its pieces."""
    from tunesmith import forward
    from tunesmith.forward import head, tree

    stack = contextlib.ExitStack()

    def put(where: Any, name: str, value: Any) -> None:
        stack.enter_context(mock.patch.object(where, name, value))

    if piece == "sharing":
        put(tree, "LEAST", 10**9)
    elif piece == "last layer":
        put(forward, "WORTH", -1.0)
    elif piece == "chunks":
        put(head, "POSITIONS", 10**9)
        put(head, "BYTES", 2**40)
    elif piece == "pieces of the vocabulary":
        put(head, "CACHED", 2**40)
    elif piece == "gradient made ahead":
        put(head, "KEPT", 0)
    return stack


def paths(model: Any) -> dict[str, Callable[[Batch], Any]]:
    """A loss by each way, of one model's copies."""
    import torch
    from trl.trainer.utils import add_fused_lm_head

    from tunesmith import forward
    from tunesmith.forward import activations

    def fast(alike: bool = True) -> Any:
        made = copy.deepcopy(model)
        add_fused_lm_head(made)
        forward.quicken(made, alike=alike, say=lambda why: sys.exit(f"the stock path was taken: {why}"))
        return made

    ours, later, stock = fast(), fast(alike=False), copy.deepcopy(model)
    with mock.patch.object(activations, "keep_less", return_value=[]):
        keeping = fast()

    def without(piece: str, chosen: Any) -> Callable[[Batch], Any]:
        def loss(batch: Batch) -> Any:
            with off(piece):
                return chosen(**batch, fused_lm_head=True).loss

        return loss

    def everywhere(batch: Batch) -> Any:
        # Every position is asked, and the labels' alone count.
        ids, mask = batch["input_ids"], batch["attention_mask"]
        asked = torch.where(mask == 1, ids, -100)
        found = ours(input_ids=ids, attention_mask=mask, labels=asked, fused_lm_head=True)
        wanted = batch["labels"][:, 1:] != -100
        return -(found.log_probs * wanted).sum() / wanted.sum()

    def padded(batch: Batch) -> Any:
        # The model on padded rows under masks, and the same head at the labels.
        from tunesmith.forward.head import Reading, read
        from tunesmith.forward.tree import labelled

        states = stock.base_model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).last_hidden_state
        marks = labelled(batch["labels"])
        targets = batch["labels"][:, 1:][marks[:, :-1]]
        head = stock.get_output_embeddings()
        return -read(states[marks], head.weight, None, targets, Reading(alike=True)).log_probs.mean()

    def plain(batch: Batch) -> Any:
        logits = stock(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).logits
        return torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100
        )

    return {
        "ours": lambda batch: ours(**batch, fused_lm_head=True).loss,
        "stock": plain,
        "unpadding": padded,
        "head on labels": everywhere,
        "last layer": without("last layer", ours),
        "keeping less": lambda batch: keeping(**batch, fused_lm_head=True).loss,
        "chunks": without("chunks", ours),
        "pieces of the vocabulary": without("pieces of the vocabulary", ours),
        "gradient made ahead": without("gradient made ahead", later),
        "sharing": without("sharing", ours),
    }


def seconds(path: Callable[[Batch], Any], batch: Batch) -> tuple[float, float]:
    """Of a forward and a backward pass, and the loss."""
    started = time.perf_counter()
    loss = path(batch)
    loss.backward()
    return time.perf_counter() - started, float(loss.detach())


def turns(rounds: int, ways: dict[str, Callable[[Batch], Any]]) -> Iterator[dict[str, float]]:
    """Ratios to ours of every way, by turn; of sharing and the whole beside stock on their own batches."""
    for turn in range(rounds + 1):
        chats, pairs = batches(turn, pairs=False), batches(turn, pairs=True)
        base, loss = seconds(ways["ours"], chats)
        shared, of_pairs = seconds(ways["ours"], pairs)
        found = {}
        for name, way in ways.items():
            if name == "ours":
                continue
            took, got = seconds(way, pairs if name == "sharing" else chats)
            wanted = of_pairs if name == "sharing" else loss
            if abs(got - wanted) > 1e-5 * abs(wanted):
                sys.exit(f"the losses differ: {name} {got}, ours {wanted}")
            found[name] = took / (shared if name == "sharing" else base)
        if turn:  # the first is to get warm
            yield found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=training.SHAPES, default="256x4")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="one turn: that it works, not how fast it is")
    args = parser.parse_args()
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, tie_word_embeddings=True, max_position_embeddings=2 * training.MAX_LENGTH,
        **training.SHAPES[args.shape],
    )  # fmt: skip
    rounds = 1 if args.quick else args.rounds
    found = list(turns(rounds, paths(LlamaForCausalLM(config).train())))
    pieces = {name: round(statistics.median(turn[name] for turn in found), 2) for name in found[0]}
    for name, ratio in pieces.items():
        spread = [turn[name] for turn in found]
        print(
            f"{'all of it' if name == 'stock' else 'without ' + name}: {ratio:.2f} times the time "
            f"({min(spread):.2f} to {max(spread):.2f})",
            file=sys.stderr,
        )
    whole = pieces["stock"]
    print(
        json.dumps(
            {
                "name": f"forward_pieces, {args.shape}", "ours": 1.0, "peer": whole, "ratio": whole,
                "unit": "time of a step", "n": rounds,
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
