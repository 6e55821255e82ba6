"""Files with which a cluster runs a recipe: a batch script for SLURM, a TrainJob of Kubeflow Trainer for Kubernetes.

They start the same program by torchrun on every node. What is submitted again goes on with the run that is there.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tunesmith import launch
from tunesmith.compose import as_yaml
from tunesmith.errors import RecipeError
from tunesmith.recipe import Kubernetes, Local, Recipe, Slurm
from tunesmith.training.run import anchored, folder_name

NOTICE = 120
"""Seconds before the end of its time at which SLURM tells a job; it may use all but ten of them."""
PORT = 29500
"""Where the nodes of a SLURM job meet, on the first of them."""
RECIPE = "recipe.yaml"
MOUNT = "/etc/tunesmith"
"""Folder of the recipe in a pod."""


@dataclass(frozen=True)
class Job:
    """Files of a job by their names, and the command that submits them from their folder."""

    files: dict[str, str]
    submit: str


def job(recipe: Recipe, folder: Path) -> Job:
    """The files that run a recipe as its launch section says, which lie in `folder` when they are submitted.

    Raises RecipeError where a step cannot be dealt to so many processes, or nothing is to be submitted.
    """
    section = recipe.launch
    launch.check(recipe.training, launch.processes(section))
    inner = anchored(recipe).model_copy(update={"launch": Local()})
    match section:
        case Slurm():
            inner = inner.model_copy(
                update={"output_dir": str(Path(recipe.output_dir).expanduser().absolute())}
            )
            place = folder.absolute() / RECIPE
            return Job(
                {RECIPE: as_yaml(inner), "job.sbatch": _script(section, inner, place)}, "sbatch job.sbatch"
            )
        case Kubernetes():
            inner = inner.model_copy(update={"output_dir": section.folder})
            return Job({"trainjob.yaml": _manifest(section, inner)}, "kubectl apply -f trainjob.yaml")
        case _:
            raise RecipeError(
                f"launch.kind {section.kind} runs here; there is nothing to submit.",
                fix="Choose --launch slurm or --launch kubernetes.",
            )


def _steps(run: str, recipe: str) -> str:
    """The arguments of tunesmith in shell: those of a new run, or of one that is there already."""
    run, recipe = shlex.quote(run), shlex.quote(recipe)
    return f"if [ -f {run}/recipe.yaml ]; then steps=(resume {run}); else steps=(train {recipe} --launch local); fi"


def _script(section: Slurm, recipe: Recipe, place: Path) -> str:
    run = str(Path(recipe.output_dir) / folder_name(recipe))
    asked = {
        "job-name": folder_name(recipe),
        "nodes": section.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": section.processes_per_node,
        "time": section.time,
        "partition": section.partition,
        "account": section.account,
        "output": "%x-%j.log",
        "signal": f"TERM@{NOTICE}",
    }
    lines = ["#!/bin/bash"]
    lines += [f"#SBATCH --{name}={value}" for name, value in asked.items() if value is not None]
    lines += ["#SBATCH --requeue", "", "set -euo pipefail", *section.setup]
    lines += [
        f"export TUNESMITH_CACHE={shlex.quote(str(Path(recipe.output_dir) / '.cache'))}",
        _steps(run, str(place)),
        'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)',
        "exec srun torchrun \\",
        f'    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node {section.processes_per_node} --max-restarts 0 \\',
        # torchrun kills what has not ended so many seconds after SIGTERM, by default 30.
        f"    --shutdown-timeout {NOTICE - 10} \\",
        f'    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first:{PORT}" \\',
        '    -m tunesmith "${steps[@]}"',
    ]
    return "\n".join(lines) + "\n"


def _manifest(section: Kubernetes, recipe: Recipe) -> str:
    name = _label(folder_name(recipe))
    run = f"{section.folder}/{folder_name(recipe)}"
    command = f'{_steps(run, f"{MOUNT}/{RECIPE}")}\nexec torchrun -m tunesmith "${{steps[@]}}"\n'
    where = {"name": name, "namespace": section.namespace}
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": where,
        "data": {RECIPE: as_yaml(recipe)},
    }
    volumes = [
        {"name": "recipe", "configMap": {"name": name}},
        {"name": "runs", "persistentVolumeClaim": {"claimName": section.claim}},
    ]
    mounts = [
        {"name": "recipe", "mountPath": MOUNT, "readOnly": True},
        {"name": "runs", "mountPath": section.folder},
    ]
    pod = {"volumes": volumes, "containers": [{"name": "node", "volumeMounts": mounts}]}
    jobs = [{"name": "node", "template": {"spec": {"template": {"spec": pod}}}}]
    trainer: dict[str, Any] = {
        "image": section.image,
        "command": ["bash", "-c"],
        "args": [command],
        "numNodes": section.nodes,
        "numProcPerNode": section.processes_per_node,
        "resourcesPerNode": {"limits": {section.device: section.processes_per_node}},
        "env": [{"name": "TUNESMITH_CACHE", "value": f"{section.folder}/.cache"}],
    }
    train_job = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": where,
        "spec": {
            "runtimeRef": {"name": section.runtime},
            "trainer": trainer,
            "runtimePatches": [
                {
                    "manager": "tunesmith.io/train",
                    "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": jobs}}},
                }
            ],
        },
    }
    parts = [yaml.safe_dump(part, sort_keys=False, allow_unicode=True) for part in (config, train_job)]
    return "---\n".join(parts)


def _label(name: str) -> str:
    """A name as Kubernetes takes it: 63 small letters, digits and dashes, the first one a letter."""
    label = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:55].strip("-")
    return label if re.match(r"[a-z]", label) else f"run-{label}".strip("-")
