"""Files with which a cluster runs a recipe, checked by what reads them: bash, SLURM's options, Kubeflow's models of its
kinds, Ray's schema; and the guides that show them."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from tunesmith import api
from tunesmith.cli import app
from tunesmith.compose import compose
from tunesmith.errors import RecipeError, RunError
from tunesmith.on_ray import cluster as cluster_of
from tunesmith.recipe import Recipe
from tunesmith.training.run import create

SLURM = {
    "kind": "slurm", "nodes": 2, "processes_per_node": 4, "time": "01:00:00", "partition": "gpu",
    "setup": ["source env/bin/activate"],
}  # fmt: skip
KUBERNETES = {"kind": "kubernetes", "nodes": 2, "processes_per_node": 4, "image": "registry/tunesmith:1"}

TRAIN_JOB = {
    "runtimeRef": {"name": str},
    "trainer": {
        "image": str, "command": [str], "args": [str], "numNodes": int, "numProcPerNode": int,
        "resourcesPerNode": {"limits": dict}, "env": [{"name": str, "value": str}],
    },
    "runtimePatches": [{"manager": str, "trainingRuntimeSpec": {"template": dict}}],
}  # fmt: skip
"""The fields of a TrainJob (trainer.kubeflow.org/v1alpha1, Kubeflow Trainer 2.2) that a job of ours may have."""


GUIDES = (Path(__file__).parents[1] / "docs/clusters.md").read_text(encoding="utf-8")
SBATCH = {
    "account", "array", "begin", "chdir", "comment", "constraint", "cpus-per-task", "deadline", "dependency", "error",
    "exclude", "exclusive", "export", "gpus", "gpus-per-node", "gpus-per-task", "gres", "hold", "input", "job-name",
    "licenses", "mail-type", "mail-user", "mem", "mem-per-cpu", "mem-per-gpu", "nice", "no-requeue", "nodelist",
    "nodes", "ntasks", "ntasks-per-node", "open-mode", "output", "partition", "priority", "qos", "requeue",
    "reservation", "signal", "switches", "time", "time-min", "wait", "wckey",
}  # fmt: skip
"""Options of sbatch that its manual has, of those that a batch script may need (SLURM 22.05)."""


def fits(value, shape) -> bool:
    if isinstance(shape, type):
        return isinstance(value, shape)
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(part, shape[0]) for part in value)
    return isinstance(value, dict) and all(
        name in shape and fits(v, shape[name]) for name, v in value.items()
    )


@pytest.fixture
def asked(tmp_path):
    def made(section, **more):
        training = {"gradient_accumulation_steps": 8, "per_device_train_batch_size": 2}
        where = {"name": "A run_1", "output_dir": str(tmp_path / "my runs")}
        return compose({**where, "launch": section, "training": training, **more}).recipe

    return made


def in_bash(text: str) -> None:
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_batch_script_is_bash_and_asks_for_what_the_recipe_says(asked, tmp_path):
    made = api.job(asked(SLURM), tmp_path / "job")
    script = made.files["job.sbatch"]
    in_bash(script)
    assert script.startswith("#!/bin/bash\n#SBATCH ")
    # sbatch parts words at blanks, and knows quotes.
    words = [shlex.split(line.removeprefix("#SBATCH ")) for line in script.splitlines() if "#SBATCH" in line]
    assert [len(line) for line in words] == [1] * len(words)
    assert ["--job-name=A run_1"] in words
    for line in (
        "--nodes=2",
        "--gpus-per-node=4",
        "--ntasks-per-node=1",
        "--time=01:00:00",
        "--partition=gpu",
    ):
        assert f"#SBATCH {line}\n" in script
    assert "account" not in script
    assert set(re.findall(r"^#SBATCH --([a-z-]+)", script, re.MULTILINE)) <= SBATCH
    assert "source env/bin/activate\n" in script
    assert '--nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node 4' in script
    assert made.submit == "sbatch job.sbatch"
    inner = Recipe.model_validate(yaml.safe_load(made.files["recipe.yaml"]))
    assert inner.launch.kind == "local", "the nodes train"


def test_a_batch_script_starts_a_run_and_goes_on_with_one_that_is_there(asked, tmp_path):
    """With programs that say what they were called with in the place of SLURM's and torch's."""
    recipe = asked({**SLURM, "setup": []})
    (tmp_path / "bin").mkdir()
    for name, text in {"scontrol": "echo node7; echo node8", "srun": 'printf "%s\\n" "$@"'}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    given = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "5"}
    environment = {**os.environ, **given, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}

    def called(resume=None, **more) -> list[str]:
        text = api.job(recipe, tmp_path / "a job", resume=resume).files["job.sbatch"]
        done = subprocess.run(
            ["bash"], input=text, capture_output=True, text=True, env=environment | more, check=True
        )
        return done.stdout.splitlines()

    def endpoint(words: list[str]) -> str:
        return words[words.index("--rdzv-endpoint") + 1]

    words = called()
    assert words[0] == "torchrun"
    assert endpoint(words) == "node7:10005"
    assert endpoint(called(SLURM_JOB_ID="4294901759")) == "node7:11759", "two jobs of a node do not meet"
    starts = ["train", str(tmp_path / "a job" / "recipe.yaml"), "--launch", "local"]
    assert words[-4:] == starts
    run = tmp_path / "my runs" / "A run_1"
    run.mkdir(parents=True)
    (run / "recipe.yaml").touch()
    assert called()[-2:] == ["resume", str(run)]
    assert called("latest")[-6:] == [*starts, "--resume", "latest"]


def test_a_train_job_has_the_fields_of_its_kind_and_a_recipe_that_trains_in_the_pods(asked, tmp_path):
    made = api.job(asked(KUBERNETES), tmp_path)
    config, job = yaml.safe_load_all(made.files["trainjob.yaml"])
    assert (config["apiVersion"], config["kind"]) == ("v1", "ConfigMap")
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert job["metadata"] == config["metadata"] == {"name": "a-run-1", "namespace": "default"}
    assert fits(job["spec"], TRAIN_JOB)
    trainer = job["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 4)
    assert trainer["resourcesPerNode"] == {"limits": {"nvidia.com/gpu": 4}}
    in_bash(trainer["args"][0])
    assert "exec torchrun -m tunesmith" in trainer["args"][0]
    [patch] = job["spec"]["runtimePatches"]
    [node] = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    mounted = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounted.keys() == {volume["name"] for volume in pod["volumes"]}
    inner = Recipe.model_validate(yaml.safe_load(config["data"]["recipe.yaml"]))
    assert (inner.launch.kind, inner.output_dir) == ("local", mounted["runs"])


def test_a_train_job_is_one_to_kubeflow_itself(asked, tmp_path):
    """Its models leave out what they do not know, so that what comes back has to be what was given."""
    kinds = pytest.importorskip("kubeflow_trainer_api.models")
    config, job = yaml.safe_load_all(api.job(asked(KUBERNETES), tmp_path).files["trainjob.yaml"])
    for given, kind in ((config, kinds.IoK8sApiCoreV1ConfigMap), (job, kinds.TrainerV1alpha1TrainJob)):
        assert kind.from_dict(given).to_dict() == given
    job["spec"]["trainer"]["numProcPerNodes"] = 8
    assert kinds.TrainerV1alpha1TrainJob.from_dict(job).to_dict() != job, "a field that there is not is found"
    job["spec"]["trainer"]["numNodes"] = "two"
    with pytest.raises(ValueError, match="numNodes"):
        kinds.TrainerV1alpha1TrainJob.from_dict(job)


def blocks(language: str) -> list[str]:
    """What the guides show in a language, in their order."""
    return re.findall(rf"```{language}\n(.*?)```", GUIDES, re.DOTALL)


def test_the_guides_show_what_is_written():
    recipe, slurm, kubernetes, manifest, ray, cluster = blocks("yaml")
    script, on_head = blocks("bash")
    folder = Path("/shared/runs/chat.job")
    of_slurm, of_kubernetes, of_ray = (
        api.job(compose({**yaml.safe_load(recipe), **yaml.safe_load(more)}).recipe, folder)
        for more in (slurm, kubernetes, ray)
    )
    assert of_slurm.files["job.sbatch"] == script
    assert of_kubernetes.files["trainjob.yaml"].split("---\n")[1] == manifest
    assert (of_ray.files["cluster.yaml"], of_ray.files["job.sh"]) == (cluster, on_head)
    for made in (of_slurm, of_kubernetes, of_ray):
        assert f"cd {folder} && {made.submit}\n" in GUIDES


def test_the_cluster_of_the_guide_is_one_to_ray_itself():
    ray = pytest.importorskip("ray.autoscaler._private.util")
    filled = ray.prepare_config(yaml.safe_load(blocks("yaml")[-1]))
    ray.validate_config(filled)
    with pytest.raises(Exception, match="cluster_names"):
        ray.validate_config({**filled, "cluster_names": "x"})


def test_a_cluster_of_ray_asks_for_a_token_and_its_head_starts_a_run_or_goes_on_with_it(asked, tmp_path):
    section = {
        "kind": "ray",
        "workers": 4,
        "nodes": ["n0", "n1"],
        "user": "me",
        "setup": ["true || . 'my env'"],
    }
    recipe = asked(section)
    made = api.job(recipe, tmp_path / "a job")
    cluster = yaml.safe_load(made.files["cluster.yaml"])
    assert cluster["provider"] == {"type": "local", "head_ip": "n0", "worker_ips": ["n1"]}
    assert cluster["auth"] == {"ssh_user": "me"}
    for role in ("head", "worker"):
        stop, start = cluster[f"{role}_start_ray_commands"]
        assert stop == f"{section['setup'][0]} && ray stop"
        assert "RAY_AUTH_MODE=token" in start
    inner = Recipe.model_validate(yaml.safe_load(made.files["recipe.yaml"])).launch
    assert (inner.workers, inner.address, inner.nodes, inner.setup) == (4, "auto", [], [])
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/tunesmith").write_text('#!/bin/bash\necho "$RAY_AUTH_MODE"; printf "%s\\n" "$@"\n')
    (tmp_path / "bin/tunesmith").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}

    def called() -> list[str]:
        text = made.files["job.sh"]
        done = subprocess.run(
            ["bash"], input=text, capture_output=True, text=True, env=environment, check=True
        )
        return done.stdout.splitlines()

    assert called() == ["token", "train", str(tmp_path / "a job/recipe.yaml")]
    run = tmp_path / "my runs" / "A run_1"
    run.mkdir(parents=True)
    (run / "recipe.yaml").touch()
    assert called() == ["token", "resume", str(run)]
    with pytest.raises(RecipeError, match="is run by a cluster"):
        api.train(recipe)
    with (
        pytest.raises(RecipeError, match=r"launch\.nodes are for"),
        cluster_of(recipe.launch, needed_for="a sweep"),
    ):
        pass


@pytest.mark.parametrize(
    ("name", "label"), [("Chat_Data", "chat-data"), ("7b", "run-7b"), ("x" * 90, "x" * 55), ("é", "run")]
)
def test_names_of_runs_become_names_of_the_cluster(name, label):
    from tunesmith.jobs import _label

    assert _label(name) == label


def test_a_step_has_to_fit_the_processes_of_the_cluster(asked, tmp_path):
    with pytest.raises(RecipeError, match="16 rows cannot be dealt evenly to 24 processes"):
        api.job(asked({**SLURM, "nodes": 6}), tmp_path)
    with pytest.raises(RecipeError, match="nothing to submit"):
        api.job(asked({"kind": "local"}), tmp_path)
    with pytest.raises(RecipeError, match="is run by a cluster"):
        api.train(asked(SLURM))


def test_the_command_shows_or_writes_the_files(asked, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        yaml.safe_dump({"name": "a", "output_dir": str(tmp_path), "launch": {**SLURM, "nodes": 1}})
    )
    shown = CliRunner().invoke(app, ["train", str(recipe), "--dry-run", "--json"])
    assert shown.exit_code == 0, shown.output
    payload = json.loads(shown.stdout.strip().splitlines()[-1])
    assert payload["written"] is False
    assert not (tmp_path / "a.job").exists()
    assert CliRunner().invoke(app, ["train", str(recipe)]).exit_code == 0
    assert (tmp_path / "a.job" / "job.sbatch").read_text() == payload["files"]["job.sbatch"]
    other = CliRunner().invoke(app, ["train", str(recipe), "--launch", "kubernetes", "--json"])
    notes = json.loads(other.stdout.strip().splitlines()[-1])["notes"]
    assert any(note.startswith("recipe.yaml, job.sbatch in ") for note in notes), notes
    assert (tmp_path / "a.job" / "job.sbatch").is_file(), "a job in the queue may still want it"
    refused = CliRunner().invoke(app, ["train", str(recipe), "--dry-run", "--launch", "local"])
    assert refused.exit_code == 1


@pytest.mark.parametrize("time", ["90", "90:00", "12:00:00", "1-12", "1-12:30", "1-12:30:00", "UNLIMITED"])
def test_a_time_of_slurm_is_taken_as_it_is_written(asked, time):
    assert asked({**SLURM, "time": time}).launch.time == time


@pytest.mark.parametrize("time", ["12h", "1-", "12:99:00", "1:2:3:4", "", 43200])
def test_what_is_no_time_of_slurm_is_refused_here_and_not_by_sbatch(asked, time):
    with pytest.raises(RecipeError, match="HH:MM:SS"):
        asked({**SLURM, "time": time})


def test_what_the_nodes_may_not_see_is_told(asked, tmp_path):
    here = tmp_path / "here.jsonl"
    here.touch()
    away = {"model": {"base": "/cluster/model"}, "data": {"dataset": str(tmp_path / "away.jsonl")}}
    model, data = api.job(asked(SLURM, **away), tmp_path).notes
    assert (
        model
        == "The base model /cluster/model is not found here; it must be there on the cluster, at this path"
    )
    assert "away.jsonl is not found here" in data
    for section, whence in ((SLURM, "the job's folder"), (KUBERNETES, "the image's working folder")):
        [said] = api.job(asked(section, data={"dataset": "data/away.jsonl"}), tmp_path).notes
        assert re.search(rf"data/away.jsonl is not found here.*relative.*{whence}", said)
    ours = {"model": {"base": "tiny"}, "data": {"dataset": str(here)}}
    assert api.job(asked(SLURM, **ours), tmp_path).notes == ()
    [said] = api.job(asked(KUBERNETES, **ours), tmp_path).notes
    assert (
        said
        == f"The data set {here} lies on this machine; it must be in the image or on the claim, at the same path"
    )
    [said] = api.job(asked(SLURM, **ours | {"model": {"base": "no/such"}}), tmp_path).notes
    assert "no/such is no file or folder here" in said


def test_a_job_goes_on_with_its_own_run_only(asked, tmp_path):
    ours = {"model": {"base": "tiny"}, "data": {"dataset": "example:support"}}
    run = create(asked({"kind": "local"}, **ours))
    [said] = api.job(asked(SLURM, **ours), tmp_path).notes
    assert said.startswith(f"the job continues the run {run.path}")
    with pytest.raises(RunError, match=r"(?s)another run's.*data.dataset was.*another --name"):
        api.job(asked(SLURM, **ours | {"data": {"dataset": "example:tone"}}), tmp_path)
    run.write("status.json", {"state": "done"})
    with pytest.raises(RunError, match=r"(?s)another run's.*'done'"):
        api.job(asked(SLURM, **ours), tmp_path)


def test_a_job_that_resumes_goes_on_with_a_run_only_and_not_with_a_checkpoint_by_name(asked, tmp_path):
    on_ray = {"kind": "ray", "workers": 4, "nodes": ["n0", "n1"], "storage": "s3://bucket/runs"}
    for section, file, place in (
        (KUBERNETES, "trainjob.yaml", "/runs/A run_1, which is not seen from here and has to be there"),
        (
            on_ray,
            "job.sh",
            "my runs/A run_1, which is not seen from here and has to be there or in s3://bucket/runs",
        ),
    ):
        made = api.job(asked(section), tmp_path, resume="latest")
        assert re.search(r"steps=\(train \S+( --launch local)? --resume latest\)", made.files[file])
        assert "steps=(resume" not in made.files[file]
        [said] = [note for note in made.notes if "the job continues" in note]
        assert place in said
    ours = {"model": {"base": "tiny"}, "data": {"dataset": "example:support"}}
    run = create(asked({"kind": "local"}, **ours))
    [said] = api.job(asked(SLURM, **ours), tmp_path, resume="latest").notes
    assert said.startswith(f"the job continues the run {run.path}, which is there already")
    with pytest.raises(RunError, match="recipe differs"):
        api.job(asked(SLURM, **ours, task="chat"), tmp_path, resume="latest")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump(asked(SLURM, **ours).model_dump(mode="json")))
    refused = CliRunner().invoke(app, ["train", str(recipe), "--resume", "checkpoint-step-4"])
    assert refused.exit_code == 1
    assert "--checkpoint checkpoint-step-4" in " ".join(refused.stderr.split())
    assert not (tmp_path / "my runs/A run_1.job").exists()
    done = CliRunner().invoke(app, ["train", str(recipe), "--resume", "latest"])
    assert done.exit_code == 0, done.output
    assert "--resume latest)" in (tmp_path / "my runs/A run_1.job/job.sbatch").read_text()
    run.write("status.json", {"state": "done"})
    with pytest.raises(RunError, match="nothing to resume"):
        api.job(asked(SLURM, **ours), tmp_path, resume="latest")


def test_a_run_of_a_cluster_s_processes_does_not_go_on_in_one_by_itself(asked):
    """As where torchrun started it by hand, its recipe being one for SLURM."""
    run = create(asked(SLURM, model={"base": "tiny"}, data={"dataset": "example:support"})).path
    with pytest.raises(RecipeError, match="not one of its nodes") as error:
        api.resume(run)
    assert "--processes N goes on here" in error.value.fix


def test_a_sweep_of_a_cluster_s_recipe_is_refused_before_any_trial(asked, tmp_path):
    with pytest.raises(RecipeError, match="not one of its nodes"):
        api.sweep(asked(SLURM), ["training.learning_rate=loguniform(1e-4,1e-2)"])
    assert not (tmp_path / "my runs").exists()


def test_replaced_job_files_are_told_and_the_command_is_quoted(tmp_path):
    where = {"name": "my run", "output_dir": str(tmp_path), "launch": {**SLURM, "nodes": 1}}
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump(where))

    def written(*more: str):
        done = CliRunner().invoke(app, ["train", str(recipe), *more])
        assert done.exit_code == 0, done.output
        return " ".join(done.stdout.split()), " ".join(done.stderr.split())

    first, again, other = written(), written(), written("--set", "launch.time=1-0")
    assert f"cd '{tmp_path}/my run.job' && sbatch job.sbatch" in first[0]
    assert "replaced" not in first[1] + again[1]
    assert "were replaced: job.sbatch" in other[1]
