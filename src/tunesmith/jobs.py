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
from tunesmith.training.continuing import check_continued, differences
from tunesmith.training.run import anchored, check_free, folder_name, is_run, open_run

NOTICE = 120
"""Seconds before the end of its time at which SLURM tells a job; it may use all but ten of them."""
PORTS = (10_000, 20_000)
"""The first of the ports at which the nodes of a SLURM job meet, and how many there are: below those that systems give
away by themselves. Each job has its own, since jobs share nodes."""
HEAD = 6379
"""Where the head of a cluster of Ray is reached."""
RECIPE = "recipe.yaml"
MOUNT = "/etc/tunesmith"
"""Folder of the recipe in a pod."""


SCRIPT, MANIFEST, CLUSTER, ON_HEAD = "job.sbatch", "trainjob.yaml", "cluster.yaml", "job.sh"
FILES = (RECIPE, SCRIPT, MANIFEST, CLUSTER, ON_HEAD)
"""Names of the files of a job; each launcher writes some of them."""
FROM = {
    "slurm": "the job's folder, in which it is submitted",
    "kubernetes": "the image's working folder",
    "ray": "the home folder of the head",
}
"""Where a job's processes begin, from which relative paths count."""


@dataclass(frozen=True)
class Job:
    """Files of a job by their names, and the command that submits them from their folder."""

    files: dict[str, str]
    submit: str
    notes: tuple[str, ...] = ()
    """What has to be so on the cluster and cannot be seen from here."""


def job(recipe: Recipe, folder: Path, *, resume: str | None = None) -> Job:
    """The files that run a recipe as its launch section says, which lie in `folder` when they are submitted.

    With `resume` `latest` they only go on with a run. Raises RecipeError for another checkpoint, where a step cannot be
    dealt to so many processes, or nothing is to be submitted, and RunError where the run's folder is here and another
    run's, or a finished one's.
    """
    launch.check(recipe.training, launch.processes(recipe.launch))
    made = _made(recipe, folder, resumes=resume is not None)
    if resume not in (None, "latest"):
        run = _run_of(recipe)
        raise RecipeError(
            "A job goes on from the newest whole checkpoint of its run.",
            found=f"--resume {resume}, to which a job would go back each time that its cluster starts it again",
            fix=f"Give --resume latest. To go back once, start `tunesmith resume {run} --checkpoint {resume}` on the "
            "nodes by hand (docs/clusters.md).",
        )
    return replace(made, notes=(*_continued(recipe, resumes=resume is not None), *_elsewhere(recipe)))


def _run_of(recipe: Recipe) -> str:
    """The run's folder as the job's processes see it."""
    section = recipe.launch
    if isinstance(section, Kubernetes):
        return f"{section.folder}/{folder_name(recipe)}"
    return str(Path(recipe.output_dir).expanduser().absolute() / folder_name(recipe))


def _made(recipe: Recipe, folder: Path, *, resumes: bool) -> Job:
    section = recipe.launch
    inner, shared = anchored(recipe), str(Path(recipe.output_dir).expanduser().absolute())
    place = folder.absolute() / RECIPE
    if isinstance(section, Ray) and section.nodes:
        there = section.model_copy(update={"address": "auto", "nodes": [], "user": None, "setup": []})
        inner = inner.model_copy(update={"output_dir": shared, "launch": there})
        files = {
            RECIPE: as_yaml(inner),
            CLUSTER: _cluster(section),
            ON_HEAD: _on_head(section, inner, _steps(inner, str(place), "", resumes=resumes)),
        }
        command = f"bash {shlex.quote(str(place.with_name(ON_HEAD)))}"
        return Job(files, f"ray up --yes {CLUSTER} && ray exec {CLUSTER} {shlex.quote(command)}")
    inner = inner.model_copy(update={"launch": Local()})
    match section:
        case Slurm():
            inner = inner.model_copy(update={"output_dir": shared})
            script = _script(section, inner, _steps(inner, str(place), resumes=resumes))
            return Job({RECIPE: as_yaml(inner), SCRIPT: script}, f"sbatch {SCRIPT}")
        case Kubernetes():
            inner = inner.model_copy(update={"output_dir": section.folder})
            steps = _steps(inner, f"{MOUNT}/{RECIPE}", resumes=resumes)
            return Job({MANIFEST: _manifest(section, inner, steps)}, f"kubectl apply -f {MANIFEST}")
        case _:
            raise RecipeError(
                f"launch.kind {section.kind} runs here; there is nothing to submit.",
                fix="Choose --launch slurm, --launch kubernetes, or --launch ray with launch.nodes.",
            )


def _continued(recipe: Recipe, *, resumes: bool) -> list[str]:
    """What is to be said of a run with which the job goes on: one whose folder is here already, or is to be there.

    Raises RunError where it is finished, or was started with another recipe.
    """
    run, section = Path(recipe.output_dir).expanduser() / folder_name(recipe), recipe.launch
    if is_run(run) and not isinstance(section, Kubernetes):  # of which the runs are on the claim
        found = open_run(run)
        if resumes:
            check_continued(found, anchored(recipe))
        elif (changed := differences(anchored(found.recipe()), anchored(recipe))) or found.state() == "done":
            check_free(run, found="; ".join(changed) or None)
        return [f"the job continues the run {run}, which is there already, in state '{found.state()}'"]
    if not resumes:
        return []
    place = section.storage if isinstance(section, Ray) else None
    where = f"there or in {place}" if place else "there"
    return [f"the job continues the run {_run_of(recipe)}, which is not seen from here and has to be {where}"]


def _elsewhere(recipe: Recipe) -> list[str]:
    """Files and folders of the recipe that the nodes may not see, each in a sentence."""
    on_claim = isinstance(recipe.launch, Kubernetes)
    there = "in the image or on the claim" if on_claim else "on the cluster"
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
            if on_claim:
                said.append(
                    f"{what} {path.absolute()} lies on this machine; it must be {there}, at the same path"
                )
        elif what == "The chat template" or Path(name).suffix.lower() in OTHER_FILES or models.is_path(name):
            said.append(f"{what} {name} is not found here; it must be there {there}, at this path")
            if not path.is_absolute():
                said[-1] += (
                    f"; it is relative and counts there from {FROM[recipe.launch.kind]}: write it in full"
                )
        else:
            said.append(f"{what} {name} is no file or folder here; the nodes take it for an id of the Hub")
    return said


def _steps(inner: Recipe, place: str, more: str = " --launch local", *, resumes: bool) -> str:
    """The arguments of tunesmith in shell, the recipe being at its place: those of a new run, or of one that is there
    already; with `resumes` of the latter only."""
    run, recipe = shlex.quote(f"{inner.output_dir}/{folder_name(inner)}"), shlex.quote(place)
    if resumes:
        return f"steps=(train {recipe}{more} --resume latest)"
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


def _on_head(section: Ray, recipe: Recipe, steps: str) -> str:
    """What the head does: the command, with the token that its Ray asks for."""
    lines = ["#!/bin/bash", "set -euo pipefail", *section.setup, "export RAY_AUTH_MODE=token"]
    lines += [
        f"export TUNESMITH_CACHE={shlex.quote(str(Path(recipe.output_dir) / '.cache'))}",
        steps,
        'exec tunesmith "${steps[@]}"',
    ]
    return "\n".join(lines) + "\n"


def _script(section: Slurm, recipe: Recipe, steps: str) -> str:
    first, number = PORTS
    asked = {
        "job-name": folder_name(recipe),
        "nodes": section.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": section.processes_per_node,
        "time": section.time,
        "partition": section.partition,
        "account": section.account,
        "output": "%x-%j.log",
        "open-mode": "append",  # a job that is put back into the queue would begin its log anew
        "signal": f"TERM@{NOTICE}",
    }
    lines = ["#!/bin/bash"]
    lines += [
        f"#SBATCH --{name}={shlex.quote(str(value))}" for name, value in asked.items() if value is not None
    ]
    lines += ["#SBATCH --requeue", "", "set -euo pipefail", *section.setup]
    lines += [
        f"export TUNESMITH_CACHE={shlex.quote(str(Path(recipe.output_dir) / '.cache'))}",
        steps,
        'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)',
        f"port=$(({first} + SLURM_JOB_ID % {number}))",
        "exec srun torchrun \\",
        f'    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node {section.processes_per_node} --max-restarts 0 \\',
        # torchrun kills what has not ended so many seconds after SIGTERM, by default 30.
        f"    --shutdown-timeout {NOTICE - 10} \\",
        '    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first:$port" \\',
        '    -m tunesmith "${steps[@]}"',
    ]
    return "\n".join(lines) + "\n"


def _manifest(section: Kubernetes, recipe: Recipe, steps: str) -> str:
    name = _label(folder_name(recipe))
    command = f'{steps}\nexec torchrun -m tunesmith "${{steps[@]}}"\n'
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
