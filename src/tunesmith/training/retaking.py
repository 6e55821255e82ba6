"""A training that is taken back to its last checkpoint where memory runs out in what no step can take back by itself.

An update may be half made, a model half saved, a batch half put together (docs/decisions/0023)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith import ranks
from tunesmith.errors import lacked_memory
from tunesmith.training import checkpoints
from tunesmith.training.fit import Fit
from tunesmith.training.run import Run

TAKEN_BACK = 3
"""How often a run is taken back to its last checkpoint for want of memory; for the same step only once."""


@dataclass(frozen=True)
class Lacking:
    """A training that ended for want of memory."""

    step: int
    said: str
    checkpoint: Path | None
    """Where it can be taken up again."""


Attempt = Callable[[Path | None, int | None], Fit | Lacking]
"""One training from a checkpoint (None: from the start), by `attempted`, of a trainer that it makes. It may lack memory
in a step after its second argument; None: in none."""


def retaken(run: Run, checkpoint: Path | None, attempt: Attempt) -> tuple[Fit, bool]:
    """What a training came to that was begun again as often as it had to be, and whether it was made in one go."""
    failed = 0
    for left in reversed(range(TAKEN_BACK + 1)):
        found = attempt(checkpoint, failed if left and ranks.count() == 1 else None)
        if isinstance(found, Fit):
            return found, checkpoint is None
        failed = found.step
        # Out of the handler, so that nothing holds what was computed.
        checkpoints.free_memory()
        checkpoint = found.checkpoint
        value = f"taken back to {checkpoint.name if checkpoint else 'the start'}"
        reason = (
            f"memory ran out at step {found.step}, in what no step can take back by itself; everything was given back, "
            f"and the run goes on from there: {found.said}"
        )
        run.event("decision", step=found.step, name="memory", value=value, reason=reason)
    raise AssertionError("the last one may not fail")


def attempted(
    trainer: Any, work: Callable[[], Fit], checkpoint: Path | None, may_fail_after: int | None
) -> Fit | Lacking:
    """What a trainer's training came to; instead of memory that runs out in a step after `may_fail_after` it gives what
    is to be said."""
    try:
        return work()
    except Exception as error:
        step = trainer.state.global_step + 1
        if may_fail_after is None or step <= may_fail_after or not lacked_memory(error):
            raise
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    written = trainer.written
    last = written if written and checkpoints.problem(written) is None else checkpoint
    return Lacking(step, said, last)
