"""Where a run runs: in this process, started by hand or by `accelerate launch -m tunesmith`."""

from __future__ import annotations

import os

from tunesmith.errors import TunesmithError
from tunesmith.recipe import Training

WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables by which torchrun, accelerate and the MPI launchers tell how many processes they started."""

PRECISION = "ACCELERATE_MIXED_PRECISION"


def require_one_process() -> None:
    """Raises TunesmithError in one of several processes that were launched together.

    Each of them would write the same run folder, and every one would train on all examples.
    """
    for name in WORLD_SIZES:
        size = os.environ.get(name, "1")
        if size.isdigit() and int(size) > 1:
            raise TunesmithError(
                f"A run is written by one process, and {size} were launched together.",
                found=f"{name}={size}: every process would write the same run folder and train on all examples",
                fix="accelerate launch --num_processes 1 -m tunesmith ..., or python -m tunesmith ... For the "
                "same batch as on several devices raise --gradient-accumulation-steps.",
            )


def settle(training: Training) -> list[str]:
    """Let the recipe decide where the launcher's own settings say something else; what is to be said of it.

    Accelerate's configuration would otherwise change the precision of a run whose recipe and plan name
    another.
    """
    asked = os.environ.get(PRECISION, "no")
    if asked == training.mixed_precision or asked == "no":
        return []
    os.environ[PRECISION] = "no"  # the trainer sets it anew from the plan
    return [
        f"accelerate is set to mixed precision '{asked}', the recipe to '{training.mixed_precision}': the recipe "
        f"counts. Give --mixed-precision {asked} for the other."
    ]
