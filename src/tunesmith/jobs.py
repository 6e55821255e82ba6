"""Files with which a cluster runs a recipe: a batch script for SLURM, a TrainJob of Kubeflow Trainer for Kubernetes, a
cluster of Ray and what its head is to do.

They start the same program, by torchrun on every node or on the workers of Ray. What is submitted again goes on with
the run that is there.
"""

from __future__ import annotations

import getpass
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from tunesmith import launch, models
from tunesmith.compose import as_yaml
from tunesmith.data import remote
from tunesmith.data.sources import OTHER_FILES
from tunesmith.errors import RecipeError
from tunesmith.recipe import Kubernetes, Local, Ray, Recipe, Slurm
from tunesmith.training.continuing import differences
from tunesmith.training.run import anchored, check_free, folder_name, is_run, open_run

NOTICE = 120
"""Seconds before the end of its time at which SLURM tells a job; it may use all but ten of them."""
PORT = 29500
"""Where the nodes of a SLURM job meet, on the first of them."""
HEAD = 6379
"""Where the head of a cluster of Ray is reached."""
RECIPE = "recipe.yaml"
MOUNT = "/etc/tunesmith"
"""Folder of the recipe in a pod."""


@dataclass(frozen=True)
class Job:
    """Files of a job by their names, and the command that submits them from their folder."""

    files: dict[str, str]
    submit: str
    notes: tuple[str, ...] = ()
    """What has to be so on the cluster and cannot be seen from here."""


def job(recipe: Recipe, folder: Path) -> Job:
    """The files that run a recipe as its launch section says, which lie in `folder` when they are submitted.

    Raises RecipeError where a step cannot be dealt to so many processes, or nothing is to be submitted, and RunError
    where the run's folder is here and another run's, or a finished one's.
    """
    launch.check(recipe.training, launch.processes(recipe.launch))
    made = _made(recipe, folder)
    return replace(made, notes=(*_continued(recipe), *_elsewhere(recipe)))


def _made(recipe: Recipe, folder: Path) -> Job:
    section = recipe.launch
    inner, shared = anchored(recipe), str(Path(recipe.output_dir).expanduser().absolute())
    place = folder.absolute() / RECIPE
    if isinstance(section, Ray) and section.nodes:
        there = section.model_copy(update={"address": "auto", "nodes": [], "user": None, "setup": []})
        inner = inner.model_copy(update={"output_dir": shared, "launch": there})
        files = {
            RECIPE: as_yaml(inner),
            "cluster.yaml": _cluster(section),
            "job.sh": _on_head(section, inner, place),
        }
        command = f"bash {shlex.quote(str(place.with_name('job.sh')))}"
        return Job(files, f"ray up --yes cluster.yaml && ray exec cluster.yaml {shlex.quote(command)}")
    inner = inner.model_copy(update={"launch": Local()})
    match section:
        case Slurm():
            inner = inner.model_copy(update={"output_dir": shared})
            return Job(
                {RECIPE: as_yaml(inner), "job.sbatch": _script(section, inner, place)}, "sbatch job.sbatch"
            )
        case Kubernetes():
            inner = inner.model_copy(update={"output_dir": section.folder})
            return Job({"trainjob.yaml": _manifest(section, inner)}, "kubectl apply -f trainjob.yaml")
        case _:
            raise RecipeError(
                f"launch.kind {section.kind} runs here; there is nothing to submit.",
                fix="Choose --launch slurm, --launch kubernetes, or --launch ray with launch.nodes.",
            )


def _continued(recipe: Recipe) -> list[str]:
    """What is to be said of a run whose folder is here already, with which the job goes on.

    Raises RunError where it is finished, or was started with another recipe.
    """
    run = Path(recipe.output_dir).expanduser() / folder_name(recipe)
    if isinstance(recipe.launch, Kubernetes) or not is_run(run):  # of the first the runs are on the claim
        return []
    found = open_run(run)
    changed = differences(anchored(found.recipe()), anchored(recipe))
    if found.state() == "done" or changed:
        check_free(run, found="; ".join(changed) or None)
    return [f"the job continues the run {run}, which is there already, in state '{found.state()}'"]


def _elsewhere(recipe: Recipe) -> list[str]:
    """Files and folders of the recipe that the nodes may not see, each in a sentence."""
    there = "in the image or on the claim" if isinstance(recipe.launch, Kubernetes) else "on the cluster"
    named = {"The base model": recipe.model.base, "The data set": recipe.data.dataset}
    named |= {f"The data set {n} of the mix": part.dataset for n, part in enumerate(recipe.data.mix, 1)}
    if (template := recipe.model.chat_template) and Path(template).suffix in {".jinja", ".j2"}:
        named["The chat template"] = template
    said = []
    for what, name in named.items():
        path = Path(name).expanduser()
        if name == "tiny" or name.startswith("example:") or remote.is_url(name):
            continue
        if path.exists():
            if isinstance(recipe.launch, Kubernetes):
                said.append(
                    f"{what} {path.absolute()} lies on this machine; it must be {there}, at the same path"
                )
        elif what == "The chat template" or Path(name).suffix.lower() in OTHER_FILES or models.is_path(name):
            said.append(f"{what} {name} is not found here; it must be there {there}, at this path")
        else:
            said.append(f"{what} {name} is no file or folder here; the nodes take it for an id of the Hub")
    return said


def _steps(run: str, recipe: str, more: str = " --launch local") -> str:
    """The arguments of tunesmith in shell: those of a new run, or of one that is there already."""
    run, recipe = shlex.quote(run), shlex.quote(recipe)
    return f"if [ -f {run}/recipe.yaml ]; then steps=(resume {run}); else steps=(train {recipe}{more}); fi"


def _cluster(section: Ray) -> str:
    """Ray's own description of a cluster of machines that are there; whoever has no token may run nothing on it."""

    def started(how: str) -> list[str]:
        ray = f"RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 ray start {how}"
        return [" && ".join([*section.setup, command]) for command in ("ray stop", ray)]

    head, *others = section.nodes
    found = {
        "cluster_name": "tunesmith",
        "provider": {"type": "local", "head_ip": head, "worker_ips": others},
        "auth": {"ssh_user": section.user or getpass.getuser()},
        "max_workers": len(others),
        "head_start_ray_commands": started(
            f"--head --port={HEAD} --include-dashboard=false --autoscaling-config=~/ray_bootstrap_config.yaml"
        ),
        "worker_start_ray_commands": started(f"--address=$RAY_HEAD_IP:{HEAD}"),
    }
    return yaml.safe_dump(found, sort_keys=False, allow_unicode=True, width=200)


def _on_head(section: Ray, recipe: Recipe, place: Path) -> str:
    """What the head does: the command, with the token that its Ray asks for."""
    lines = ["#!/bin/bash", "set -euo pipefail", *section.setup, "export RAY_AUTH_MODE=token"]
    lines += [
        f"export TUNESMITH_CACHE={shlex.quote(str(Path(recipe.output_dir) / '.cache'))}",
        _steps(str(Path(recipe.output_dir) / folder_name(recipe)), str(place), ""),
        'exec tunesmith "${steps[@]}"',
    ]
    return "\n".join(lines) + "\n"


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
    lines += [
        f"#SBATCH --{name}={shlex.quote(str(value))}" for name, value in asked.items() if value is not None
    ]
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
