"""A recipe's rows read and tokenized ahead of a training: by several processes, on several nodes, into the cache.

fates of all rows (each node) -> pieces of token ids (a share for each node and process) -> joined (whoever ends last)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

from tunesmith import data, models
from tunesmith.data import shares
from tunesmith.data.shares import Pieces
from tunesmith.methods import METHODS, preferred, sft
from tunesmith.recipe import Recipe

IN_PIECES = (sft.encoded, preferred.encoded, preferred.encoded_pairs)
"""How methods tokenize whose rows are independent of one another; others are done by one process."""


def prepare(
    recipe: Recipe, *, processes: int, share: tuple[int, int], watch: Callable[[int, int], None]
) -> dict[str, Any]:
    """Make the pieces of a share, and join them when all are there; what was made, what is missing, what came out."""
    started = time.perf_counter()
    splits = _splits(recipe)
    pieces = _pieces(recipe, splits)
    made = missing = 0
    if pieces and not data.is_joined(pieces):
        try:
            made = shares.shared_out(pieces, make, recipe, processes=processes, share=share, watch=watch)
        finally:
            _read.cache_clear()  # which closes the files
        missing = sum(not pieces.has(begin) for begin, _ in pieces.ranges())
        if missing and data.is_joined(pieces):  # by another node, meanwhile
            missing = 0
    told: dict[str, Any] = {
        "rows": len(splits.fates),
        "pieces": len(pieces.ranges()) if pieces else 1,
        "made": made,
        "missing": missing,
        "joined": share[1] == 1 or not missing,  # what one process alone leaves out, joining does
    }
    if told["joined"]:
        section = METHODS[recipe.method.kind]
        found = section.encoded(splits, _tokenizer(recipe), recipe.data, recipe.method)
        told |= {
            "missing": 0,
            "counts": found.ledger.counts(),
            "dropped": found.ledger.reasons(),
            "tokens": int(found.train.lengths.sum()),
            "fingerprint": found.fingerprint,
            "notes": list(found.notes),
        }
    return {**told, "seconds": round(time.perf_counter() - started, 1)}


def make(recipe: Recipe, begin: int, end: int) -> bool:
    """Tokenize one piece, in whatever process; what it needs of the recipe is read once in each."""
    splits, tokenizer, pieces, readings = _read(recipe.model_dump_json())
    return data.encode_piece(
        pieces,
        begin,
        end,
        splits,
        tokenizer,
        data=recipe.data,
        loss_on=_loss_on(recipe),
        readings=readings,
    )


@cache
def _read(content: str) -> tuple[data.Splits, Any, Pieces, data.Readings]:
    recipe = Recipe.model_validate_json(content)
    splits = _splits(recipe)  # which the cache has
    pieces = _pieces(recipe, splits)
    assert pieces, "only methods that tokenize in pieces are asked"
    return splits, _tokenizer(recipe), pieces, {}


def _splits(recipe: Recipe) -> data.Splits:
    method = METHODS[recipe.method.kind]
    return data.prepare(recipe.data, method.adapt, method.remarks)


def _tokenizer(recipe: Recipe) -> Any:
    tokenizer = models.load_tokenizer(recipe.model.base, revision=recipe.model.revision)
    METHODS[recipe.method.kind].template(tokenizer, recipe.model.chat_template, recipe.method)
    return tokenizer


def _loss_on(recipe: Recipe) -> Any:
    return getattr(recipe.method, "loss_on", "answers")


def _pieces(recipe: Recipe, splits: data.Splits) -> Pieces | None:
    if METHODS[recipe.method.kind].encoded not in IN_PIECES:
        return None
    return data.in_pieces(splits, _tokenizer(recipe), data=recipe.data, loss_on=_loss_on(recipe))
