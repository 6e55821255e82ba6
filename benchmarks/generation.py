"""Seconds to answer rows: tunesmith's evaluation and the same model asked one question after the other.

The rows are the shipped text-to-SQL examples, the model is the shipped tiny one, in float32, greedy. The peer is a
plain loop over `model.generate`, as one writes it down. Both give the same tokens, which is checked each time. Before
they are measured the model is trained for a few steps, so that answers end and differ. They take turns, the first of a
turn changes, and medians count. The last line is one JSON object: rows a second of both and their ratio. The exit
status is 1 below the bar, which holds up to `BAR_TOKENS` new tokens: of longer answers the few that run to the limit
end with few others.

    python benchmarks/generation.py --rows 500 --times 5
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tunesmith import api, dataflow, engines, models
from tunesmith.compose import compose
from tunesmith.data.splitting import HELD_OUT, TRAIN, VALIDATION
from tunesmith.data.templates import end_of_turn_ids
from tunesmith.evaluation import items

VARIANTS = [[], ["--max-new-tokens", "256"]]
BAR_TOKENS = 64
"""Up to so many new tokens the bar holds."""


def questions(count: int, tokenizer: Any, recipe: Any) -> tuple[list[tuple[int, ...]], dict[str, int]]:
    """So many prompts of the shipped examples, the held-out ones first, and how many rows of each part were taken."""
    splits = dataflow.splits(recipe)
    examples: list[Any] = []
    taken = {}
    for name, part in (("held-out", HELD_OUT), ("validation", VALIDATION), ("training", TRAIN)):
        own = [*splits.examples(part)][: count - len(examples)]
        examples += own
        taken[name] = len(own)
    if len(examples) < count:
        print(f"there are {len(examples)} rows, not {count}", file=sys.stderr)
    found = items(examples, tokenizer)
    return [item.prompt_ids for item in found if item.prompt and not item.error], taken


def one_by_one(
    model: Any, prompts: list[tuple[int, ...]], limit: int, stops: list[int]
) -> list[tuple[int, ...]]:
    """The peer: no batches, no padding."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        with torch.inference_mode():
            output = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False,
                eos_token_id=stops, pad_token_id=stops[0],
            )[0, len(prompt) :].tolist()  # fmt: skip
        end = next((n for n, token in enumerate(output) if token in stops), len(output))
        found.append(tuple(output[:end]))
    return found


def below(ratio: float, bar: float, max_new_tokens: int) -> bool:
    """Whether a ratio misses the bar, which longer answers have none of."""
    return max_new_tokens <= BAR_TOKENS and ratio < bar


def main() -> None:
    """Train a little, answer in both ways, compare, and print the ratio."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--times", type=int, default=5, help="turns")
    parser.add_argument("--steps", type=int, default=60, help="training before the measurement")
    parser.add_argument("--model", help="a model's folder, instead of training one")
    parser.add_argument("--engine", default="padded", choices=["padded", "paged"])
    parser.add_argument(
        "--bar", type=float, default=5.0, help=f"exit 1 below it, at up to {BAR_TOKENS} new tokens; 0: none"
    )
    args = parser.parse_args()
    if args.rows < 1:
        parser.error(f"--rows {args.rows}: at least one row has to be answered")
    if args.times < 1:
        parser.error(f"--times {args.times}: there has to be at least one turn")
    work = Path(tempfile.mkdtemp(prefix="generation-"))
    settings = {
        "output_dir": str(work), "name": "tuned", "evaluation": {"skip": True},
        "training": {"max_steps": args.steps},
    }  # fmt: skip
    recipe = compose(settings, preset="demo").recipe
    folder = args.model or str(api.train(recipe).run / "final_model")
    tokenizer = models.load_tokenizer(folder)
    model = models.load_model(folder).eval()
    prompts, taken = questions(args.rows, tokenizer, recipe)
    stops = end_of_turn_ids(tokenizer)
    source = engines.Source("tuned", tokenizer, lambda: model, folder)
    asked = engines.Asked(prompts, args.max_new_tokens, stops)

    def ours(turn: int) -> list[tuple[int, ...]]:
        # A folder for each turn: answers that are there already are not made again.
        made, _ = engines.answers(source, asked, engine=args.engine, folder=work / f"answers-{turn}")
        return [answer.ids for answer in made]

    def peer(turn: int) -> list[tuple[int, ...]]:
        return one_by_one(model, prompts, args.max_new_tokens, list(stops))

    ways: dict[str, Any] = {args.engine: ours, "one by one": peer}
    taken_by: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    first: list[tuple[int, ...]] | None = None
    for turn in range(args.times):
        for name, way in list(ways.items())[:: -1 if turn % 2 else 1]:
            started, cpu = time.perf_counter(), time.process_time()
            ids = way(turn)
            spent = time.perf_counter() - started, time.process_time() - cpu
            taken_by[name].append(spent)
            print(f"turn {turn + 1}, {name}: {spent[0]:.1f} s, {spent[1]:.1f} s of CPU", file=sys.stderr)
            first = first or ids
            if same := sum(mine != other for mine, other in zip(ids, first, strict=True)):
                raise SystemExit(f"{same} of {len(prompts)} answers differ")
    print(
        f"the same {len(prompts)} answers each time, {len(set(first or ()))} different ones", file=sys.stderr
    )
    (fast, fast_cpu), (slow, slow_cpu) = (
        tuple(map(statistics.median, zip(*spent, strict=True))) for spent in taken_by.values()
    )
    ratio = slow / fast
    pairs = [theirs[0] / mine[0] for mine, theirs in zip(*taken_by.values(), strict=True)]
    print(f"rows from {taken}; at most {args.max_new_tokens} new tokens", file=sys.stderr)
    # Other work on the machine changes it less.
    print(f"times one by one in CPU time: {slow_cpu / fast_cpu:.2f}, no bar", file=sys.stderr)
    print(f"times one by one, turn by turn: {min(pairs):.2f} to {max(pairs):.2f}, no bar", file=sys.stderr)
    print(
        json.dumps(
            {
                "name": f"generation, {args.engine} engine, {args.max_new_tokens} tokens",
                "ours": round(len(prompts) / fast, 2),
                "peer": round(len(prompts) / slow, 2),
                "ratio": round(ratio, 2),
                "unit": "rows/s",
                "n": args.times,
            }
        )
    )
    if below(ratio, args.bar, args.max_new_tokens):
        print(f"{ratio:.2f} times is below the bar of {args.bar:g}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
