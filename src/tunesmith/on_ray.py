"""A run, the trials of a sweep and the answers to prompts on the workers of Ray.

    start:   TorchTrainer -> workers -> api.carry_out_job, as in every other launcher
    trials:  Tuner with ASHA -> workers -> api.train, one trial each
    answers: Ray Data -> workers with a model each -> engines' own answers, by number

Ray places the workers, replaces those that are lost, and carries words; what is computed is what one process computes.
A Ray of this machine's own takes commands with this process's token only, reports nothing home, and ends with it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from tunesmith import launch, ranks
from tunesmith.errors import (
    TERMINATED,
    Interrupted,
    MissingExtra,
    RecipeError,
    RunError,
    Terminated,
    TunesmithError,
    as_facts,
    is_lost_peer,
    of_facts,
)
from tunesmith.recipe import Ray, Shards

if TYPE_CHECKING:
    from tunesmith.engines import Asked, Finished, Say, Source
    from tunesmith.training.storage import Storage

Watch = Callable[[Mapping[str, Any]], None]

OBJECTS = 256 * 2**20
"""Bytes of shared memory of a Ray of this machine's own, which carries words and prompts only."""
LOOK = 0.2
"""Seconds between two looks at what the workers say."""
SEEN = 30.0
"""Seconds in which a file of the first worker is to be seen on other nodes: shared folders may lag."""
LOSSES = (
    "RayActorError", "NodeDiedError", "WorkerCrashedError", "OutOfMemoryError", "WorkerHealthCheckFailedError",
    "WorkerHealthCheckTimeoutError", "PreemptionError", "WorkerLost",
)  # fmt: skip
"""Errors, by their names, with which Ray says that a worker or its node is gone. What goes wrong inside of one is told
in other ways."""
HANDED_ON = ("TUNESMITH_CACHE", "HF_HUB_OFFLINE", "OMP_NUM_THREADS")
"""Variables of this process that workers elsewhere get; keys and tokens are not among them."""


@functools.cache
def _token() -> str:
    """What a Ray of this process's own asks for; Ray reads it once."""
    return secrets.token_hex(32)


def _read_token_anew() -> None:
    """Have Ray, which looks once and keeps what it found, look at the environment again."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@contextlib.contextmanager
def cluster(section: Ray | Shards, *, needed_for: str) -> Iterator[Any]:
    """Ray, started on this machine or joined at its address; what was started ends with the block.

    Raises MissingExtra without Ray, and TunesmithError where a cluster does not answer.
    """
    if getattr(section, "nodes", None):
        raise RecipeError(
            "launch.nodes are for `tunesmith train`, which writes the files of their cluster.",
            fix="On one of its nodes give launch.address auto instead of them.",
        )
    if importlib.util.find_spec("ray") is None:
        raise MissingExtra("ray", needed_for, install="'tunesmith[ray]'")
    given = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_V2_ENABLED": "1",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_AIR_NEW_OUTPUT": "0",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # how a trial ended has no metric
    }
    if section.address is None:
        # Whoever reaches a Ray may run anything on it.
        given |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _token()}
    with launch.environment(given):
        import ray

        if ray.is_initialized():  # in a program that has its own
            yield ray
            return
        _read_token_anew()
        try:
            _join(ray, section)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise TunesmithError(
                f"Ray at {section.address} does not answer." if section.address else "Ray did not start.",
                found=str(error).strip().splitlines()[0][:300],
                fix="`ray status` on a node says whether it runs; without an address Ray is started here."
                if section.address
                else "`ray start --head` on this machine says more.",
            ) from None
        try:
            yield ray
        finally:
            ray.shutdown()


def _join(ray: Any, section: Ray | Shards) -> None:
    quiet = {"configure_logging": False, "log_to_driver": False}
    if section.address:
        handed = {name: os.environ[name] for name in HANDED_ON if name in os.environ}
        ray.init(address=section.address, runtime_env={"env_vars": handed}, **quiet)
        return
    ray.init(
        address="local",  # whatever RAY_ADDRESS says
        # One more for Ray's own tasks, which are few.
        num_cpus=max(os.cpu_count() or 1, section.workers * section.cpus_per_worker) + 1,
        include_dashboard=getattr(section, "dashboard", False),
        dashboard_host="127.0.0.1",
        object_store_memory=OBJECTS,
        **quiet,
    )


def _gpus(ray: Any, section: Ray | Shards, watch: Watch) -> int:
    """GPUs that each worker takes. Says where a cluster has less than is asked for, so that it is waited for."""
    has = ray.cluster_resources()
    gpus = int(section.device == "gpu" or (section.device == "auto" and has.get("GPU", 0) >= 1))
    wanted = {"CPU": section.workers * section.cpus_per_worker, "GPU": section.workers * gpus}
    short = {name: number for name, number in wanted.items() if has.get(name, 0) < number}
    if short and section.address is None:
        raise TunesmithError(
            f"This machine is too small for {section.workers} workers.",
            found=", ".join(f"{n} {name} asked for, {has.get(name, 0):g} there" for name, n in short.items()),
            fix="Lower the number of workers, or name a cluster's address.",
        )
    if short:
        told = ", ".join(f"{n} {name}, of which it has {has.get(name, 0):g} now" for name, n in short.items())
        watch({"kind": "warning", "message": f"The workers wait for the cluster to have {told}."})
    return gpus


# A run


class _Words:
    """What passes between the command and its workers, kept by Ray: events one way, a wish to stop the other."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.starts = 0
        self.stops = self.has_saved = self.has_stored = False
        self.fault: dict[str, Any] | None = None

    def begin(self) -> dict[str, Any]:
        """How often the first worker has begun, whether those before have saved a checkpoint, and copied one to the
        second place, and what ended them."""
        self.starts += 1
        saved = {"has_saved": self.has_saved, "has_stored": self.has_stored}
        return {"starts": self.starts, **saved, "fault": self.fault}

    def tell(self, event: dict[str, Any]) -> None:
        """An event of the run."""
        self.events.append(event)
        self.has_saved = self.has_saved or event["kind"] == "checkpoint"
        self.has_stored = self.has_stored or event["kind"] == "stored"

    def blame(self, fault: dict[str, Any]) -> None:
        """A worker's own error, which would come again; the first one counts."""
        self.fault = self.fault or fault

    def blamed(self) -> dict[str, Any] | None:
        """What was said so."""
        return self.fault

    def take(self) -> list[dict[str, Any]]:
        """The events since the last time."""
        taken, self.events = self.events, []
        return taken

    def ask_to_stop(self) -> None:
        """Have the workers stop after their step."""
        self.stops = True

    def is_asked_to_stop(self) -> bool:
        """Whether they are to."""
        return self.stops


def start(job: Mapping[str, Any], section: Ray, watch: Watch) -> dict[str, Any]:
    """Have the workers of Ray do a job, as `launch.start` has processes of this machine do it, and give what the first
    of them came to. A lost worker is replaced as often as `max_failures` says, and the run goes on from its last
    checkpoint.

    Raises the error with which a worker has ended, RunError where workers were lost too often or `launch.storage` holds
    another run, and RuntimeError with the worker's own words for a bug.
    """
    _check_places(job, section)
    with cluster(section, needed_for="launch.kind=ray") as ray:
        from ray.exceptions import RayError
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        gpus = _gpus(ray, section, watch)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        words = ray.remote(num_cpus=0, scheduling_strategy=here)(_Words).remote()
        notes = _notes(Path(job["recipe"]["output_dir"]))
        trainer = TorchTrainer(
            _work,
            train_loop_config={"job": dict(job), "words": words, "notes": str(notes)},
            torch_config=_meeting(gpus),
            scaling_config=ScalingConfig(
                num_workers=section.workers,
                use_gpu=bool(gpus),
                resources_per_worker={"CPU": section.cpus_per_worker, **({"GPU": 1} if gpus else {})},
            ),
            run_config=RunConfig(
                name=notes.name,
                storage_path=str(notes.parent),
                failure_config=FailureConfig(max_failures=section.max_failures),
            ),
        )
        ended: dict[str, Any] = {}
        is_heard = True

        def fit() -> None:
            try:
                ended["value"] = trainer.fit().return_value
            except BaseException as error:
                ended["error"] = error

        def hear() -> None:
            nonlocal is_heard
            try:
                for event in ray.get(words.take.remote()) if is_heard else ():
                    watch(event)
            except RayError as error:
                is_heard = False
                message = f"What the workers say is not heard any more; the run goes on: {_last_line(error)}"
                watch({"kind": "warning", "message": message})

        thread = threading.Thread(target=fit, daemon=True)
        try:
            with _asking(words) as (look, asked):
                thread.start()
                while thread.is_alive():
                    look()
                    hear()
                    thread.join(LOOK)
                hear()
            with contextlib.suppress(RayError):
                ended["fault"] = ray.get(words.blamed.remote())
        finally:
            _remove(notes)
    try:
        return _came_to(ended, section)
    except Interrupted as error:
        if asked and asked[0] == signal.SIGTERM:
            error.exit_code = TERMINATED
        raise


def _check_places(job: Mapping[str, Any], section: Ray) -> None:
    """Raises RunError where the run's folder, as far as it is seen from here, or its second place is another run's,
    before anything is started."""
    from tunesmith import api
    from tunesmith.training.run import check_free

    path = api.run_folder(job)
    kept, is_new = _kept(section.storage, path), not job.get("resume") and "run" not in job
    if is_new:
        check_free(path)
    if kept and not is_new:
        kept.check(path)
    elif kept and kept.holds():
        raise RunError(
            f"{kept.url} holds a run's folder, and this is a new run.",
            fix="Give this run another --name or launch.storage, continue that one with --resume latest, or delete it.",
        )


def _notes(output_dir: Path) -> Path:
    """A new folder for the few notes that Ray keeps of its own, beside the runs while they train."""
    return output_dir.absolute() / ".ray" / secrets.token_hex(8)


def _remove(notes: Path) -> None:
    shutil.rmtree(notes, ignore_errors=True)
    with contextlib.suppress(OSError):  # another run's are there
        notes.parent.rmdir()


def _came_to(ended: Mapping[str, Any], section: Ray) -> dict[str, Any]:
    value = dict(ended.get("value") or {})
    if own := ended.get("fault") or value.get("error"):
        raise _error(own)
    if "error" not in ended:
        return dict(value["result"])
    error = ended["error"]
    failures: Mapping[int, BaseException] = getattr(error, "worker_failures", {})
    if not any(_is_loss(why) for why in (error, *failures.values())):
        raise error
    said = [f"worker {n}: {_last_line(why)}" for n, why in failures.items()] or [_last_line(error)]
    lost = RunError(
        f"Workers of Ray were lost, and {section.max_failures} replacements were not enough."
        if section.max_failures
        else "A worker of Ray was lost, and none is replaced (launch.max_failures 0).",
        found="; ".join(said),
        fix="`tunesmith resume` goes on from the last checkpoint; launch.max_failures allows more.",
    )
    lost.exit_code = 3
    raise lost


def _is_loss(error: BaseException) -> bool:
    return any(kind.__name__ in LOSSES for kind in type(error).__mro__)


def _last_line(error: Any) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


@contextlib.contextmanager
def _asking(words: Any) -> Iterator[tuple[Callable[[], None], list[int]]]:
    """The first Ctrl-C or SIGTERM asks the workers to stop after their step, the second ends them; gives what is to be
    called between looks, and the signals that came."""
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if asked:
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt
        asked.append(number)

    told: list[bool] = []

    def look() -> None:
        if asked and not told:
            told.append(True)
            words.ask_to_stop.remote()

    if threading.current_thread() is not threading.main_thread():
        yield look, asked
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield look, asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _meeting(gpus: int) -> Any:
    """How the workers, with so many GPUs each, find each other: Ray's settings for torch, with the meeting itself left
    to `ranks`, since only the steps are taken together."""
    from ray.train.backend import Backend
    from ray.train.torch import TorchConfig

    class Meeting(Backend):  # type: ignore[misc]
        share_cuda_visible_devices = True

        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            host, port = worker_group.execute_single(0, _free_port)
            worker_group.execute(_settle, host, port, gpus)

    class Settings(TorchConfig):  # type: ignore[misc]
        @property
        def backend_cls(self) -> type:
            return Meeting

    return Settings()


def _free_port() -> tuple[str, int]:
    """The address of this worker's node, and a port that nobody listens on."""
    from ray.util import get_node_ip_address

    with socket.socket() as probe:
        probe.bind(("", 0))
        return get_node_ip_address(), probe.getsockname()[1]


def _settle(host: str, port: int, gpus: int) -> None:
    """What torchrun would set in a worker."""
    import ray.train

    _hide_gpus(gpus)
    context = ray.train.get_context()
    os.environ |= {
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
        "RANK": str(context.get_world_rank()),
        "WORLD_SIZE": str(context.get_world_size()),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        launch.JOB: "ray",
    }


def _hide_gpus(gpus: int) -> None:
    """Have a worker that was given no GPU see none, whatever its node has."""
    if not gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


class WorkerLost(Exception):
    """Ends a worker whose share cannot be finished, so that Ray ends the others as well and starts all of them anew."""


def _work(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a worker does: its share of the job. Gives the first worker's result or error.

    Raises WorkerLost where another worker is gone. Where this one has an error of its own while others may wait for it,
    it is noted with the command before: workers that are started after it give it back, and train nothing.
    """
    import ray

    from tunesmith import api, libraries
    from tunesmith.training.fit import quiet_libraries

    libraries.own_process()
    quiet_libraries()
    job, words = dict(config["job"]), config["words"]
    ranks.meet()
    if not ranks.is_first():
        try:
            _look_for_folder()
            api.assisted()
        except (Exception, SystemExit) as error:
            if isinstance(error, SystemExit) or is_lost_peer(error):
                raise WorkerLost("another worker is gone") from None
            ray.get(words.blame.remote(_facts(error)))
            raise WorkerLost(f"it has ended: {error}") from None
        return {}
    try:
        _show_folder(Path(config["notes"]))
        before = ray.get(words.begin.remote())
        return {"error": before["fault"]} if before["fault"] else {"result": _lead(job, words, before)}
    except Exception as error:
        if is_lost_peer(error) or (getattr(error, "is_lost", False) and not ranks.complaint(0.5)):
            raise WorkerLost("another worker is gone") from None
        if _is_awaited() and not isinstance(error, Interrupted) and not getattr(error, "is_lost", False):
            ray.get(words.blame.remote(_facts(error)))
            raise WorkerLost(f"it has ended: {error}") from None
        return {"error": _facts(error)}
    finally:
        ranks.dismiss()  # those who had nothing to do yet, and would wait for it


def _show_folder(notes: Path) -> None:
    """Have the workers of other nodes look, before anything is computed, whether they see the output folder. Where it
    cannot be written here, the run says so."""
    if ranks.on_this_machine() == ranks.count():
        return
    mark = notes / f"seen-{secrets.token_hex(4)}"
    try:
        notes.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError:
        ranks.tell("folder", None)
    else:
        ranks.tell("folder", str(mark))


def _look_for_folder() -> None:
    """Raises RunError in a worker on a node that does not see what the first worker has put into the output folder."""
    if ranks.on_this_machine() == ranks.count():
        return
    mark, end = ranks.hear("folder"), time.monotonic() + SEEN
    while mark and not Path(mark).exists():
        if time.monotonic() > end:
            raise RunError(
                "Workers of Ray on several nodes need an output folder that all of them see.",
                found=f"worker {ranks.number()} on {socket.gethostname()} does not see {Path(mark).parents[2]}, in "
                "which the first worker has written",
                fix="Put --output-dir and $TUNESMITH_CACHE into folders that all nodes share, which launch.storage "
                "does not replace; or take workers of one node only.",
            )
        time.sleep(LOOK)


def _is_awaited() -> bool:
    """Whether the steps have ended in the middle, so that other workers may wait for this one."""
    from torch import distributed

    return bool(distributed.is_available() and distributed.is_initialized())


def _facts(error: BaseException) -> dict[str, Any]:
    """An error as it goes to the command."""
    if isinstance(error, TunesmithError):
        return as_facts(error)
    return {"bug": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}


def _error(facts: Mapping[str, Any]) -> Exception:
    """The error of a worker that came as facts: one of ours, or a bug with the worker's own words."""
    if "bug" in facts:
        return RuntimeError(f"{facts['bug']}\n\nIn a worker of Ray:\n{facts['trace']}")
    return of_facts(dict(facts))


def _lead(job: dict[str, Any], words: Any, before: Mapping[str, Any]) -> dict[str, Any]:
    """The first worker's share: the whole run, but for what the others do of its steps."""
    from tunesmith import api
    from tunesmith.recipe import Recipe

    recipe = Recipe.model_validate(job["recipe"])
    assert isinstance(recipe.launch, Ray)
    path = api.run_folder(job)
    kept = _kept(recipe.launch.storage, path)
    is_over, is_own = threading.Event(), threading.Event()

    def told(event: Mapping[str, Any]) -> None:
        is_own.set()
        words.tell.remote(json.loads(json.dumps(event, default=str)))
        if kept and event["kind"] == "checkpoint":
            _keep(kept, path, told, step=event.get("step"))

    listening = threading.Thread(target=_listen, args=(words, is_over), daemon=True)
    listening.start()
    try:
        job = _going_on(job, path, kept, before, told)
        return api.carry_out_job(job, watch=told, at=lambda run: None)
    finally:
        if kept and is_own.is_set() and path.is_dir():  # and not the folder of another run, which was refused
            _keep(kept, path, told)
        is_over.set()


def _kept(url: str | None, path: Path) -> Storage | None:
    from tunesmith.training.storage import storage

    return storage(url, path.name) if url else None


def _keep(kept: Storage, path: Path, watch: Watch, *, step: int | None = None) -> None:
    """Copy the run's folder to its second place, after the checkpoint of a step or at the end. A place that does not
    answer is said, and the run goes on with what it has here."""
    from tunesmith.training.run import Run

    run, started = Run(path, watch), time.perf_counter()
    try:
        files, size = kept.push(path)
    except Exception as error:
        said = next(iter(str(error).strip().splitlines()), "")[:200]
        what = f"The checkpoint of step {step}" if step is not None else "The run's last state"
        run.event(
            "warning", step=step, message=f"{what} is not in {kept.url}: {type(error).__name__}: {said}"
        )
        return
    if step is None:
        return  # an event now would not be in the place
    seconds = round(time.perf_counter() - started, 3)
    run.event("stored", step=step, place=kept.url, files=files, bytes=size, seconds=seconds)


def _going_on(
    job: dict[str, Any], path: Path, kept: Storage | None, before: Mapping[str, Any], watch: Watch
) -> dict[str, Any]:
    """The job as it is done now: that of the recipe, or the run that workers before these have begun.

    Raises RunError where the run's second place is needed and does not answer, or holds another run.
    """
    from tunesmith.training.run import Run, is_run

    asked = job.get("checkpoint") or job.get("resume")
    has_saved = before["has_saved"]
    if kept and (before["starts"] > 1 or asked):
        try:
            step = kept.fetch(path)
        except TunesmithError:
            raise
        except Exception as error:
            said = f"{type(error).__name__}: {_last_line(error)}"
            if not is_run(path):
                raise RunError(
                    f"The run cannot be fetched from {kept.url}.",
                    found=said,
                    fix="Resume it when the place answers again.",
                ) from None
            Run(path, watch).event("warning", message=f"{kept.url} does not answer: {said}")
        else:
            if step is not None:
                has_saved = before["has_stored"]
                message = f"The run was fetched from {kept.url}, with its checkpoint of step {step}."
                Run(path, watch).event("decision", name="fetched", value=step, reason=message)
    if before["starts"] == 1 or not is_run(path):
        return job
    chosen = asked if asked and not has_saved else "latest"
    place = "its last checkpoint" if chosen == "latest" else f"{chosen}, as was asked"
    Run(path, watch).event(
        "warning",
        message=f"A worker was lost, and Ray started the workers again (start {before['starts']}); the run goes on "
        f"from {place}.",
    )
    return {"recipe": job["recipe"], "run": str(path), "checkpoint": chosen}


def _listen(words: Any, is_over: threading.Event) -> None:
    """Pass the command's wish to stop on to the training."""
    import ray

    while not is_over.wait(2 * LOOK):
        with contextlib.suppress(Exception):
            if ray.get(words.is_asked_to_stop.remote()):
                from tunesmith.training import callbacks

                if callbacks.ask_to_stop():
                    return


# Answers


class _Answering:
    """A worker of Ray Data with the model in its memory."""

    def __init__(
        self, load: Callable[[str], Any], tokenizer: Any, given: Mapping[str, Any], gpus: int
    ) -> None:
        from tunesmith import plan
        from tunesmith.training.fit import quiet_libraries

        quiet_libraries()
        _hide_gpus(gpus)
        self.model, self.tokenizer, self.given = load(plan.device()), tokenizer, dict(given)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Answers to a few prompts, each with its number."""
        from tunesmith.generation import generate

        prompts = [json.loads(ids) for ids in batch["prompt"]]
        found = generate(self.model, self.tokenizer, prompts, **self.given)
        return {
            "number": [int(number) for number in batch["number"]],
            "answer": [json.dumps(asdict(answer)) for answer in found],
        }


def answer(source: Source, asked: Asked, finished: Finished, say: Say) -> None:
    """Answer the prompts on the workers of Ray Data; `finished` gets each answer with its prompt's number, as shards
    are done. Each worker loads the model once, and answers as the padded engine does."""
    from tunesmith.generation import Generated

    if source.base is None:
        raise RecipeError(
            "Workers of Ray load a model from its folder, and this one exists in this process only.",
            fix="Use --set evaluation.engine=padded, or save the model first.",
        )
    if asked.temperature:
        raise RecipeError(
            "The engine 'ray' answers greedily: drawn answers would hang on how prompts are dealt to the workers.",
            found=f"temperature {asked.temperature}",
            fix="Use --attempts 1, or --set evaluation.engine=padded.",
        )
    section = source.shards
    source.let_go()
    with cluster(section, needed_for="evaluation.engine=ray") as ray:
        import ray.data as data

        gpus = _gpus(ray, section, lambda event: say(str(event["message"])))
        context = data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = False  # every answer has its number
        rows = [{"number": n, "prompt": json.dumps(list(ids))} for n, ids in enumerate(asked.prompts)]
        batch = max(1, min(section.batch, -(-len(rows) // section.workers)))
        given = {
            "max_new_tokens": asked.max_new_tokens,
            "stop_ids": list(asked.stop_ids),
            "batch_tokens": asked.batch_tokens,
            "seed": asked.seed,
        }
        shards = data.from_items(rows, override_num_blocks=max(section.workers, -(-len(rows) // batch)))
        answered = shards.map_batches(
            _Answering,
            fn_constructor_args=(source.load, source.tokenizer, given, gpus),
            batch_size=batch,
            compute=data.ActorPoolStrategy(size=section.workers),
            num_cpus=section.cpus_per_worker,
            num_gpus=gpus or None,
        )
        seen: set[int] = set()
        for row in answered.iter_rows():
            number, one = int(row["number"]), json.loads(row["answer"])
            if number in seen:  # of a shard that was begun again
                continue
            seen.add(number)
            one["ids"] = tuple(one["ids"])
            finished(number, Generated(**one))


# Trials


def _trial(config: Mapping[str, Any]) -> None:
    """One trial of a sweep on a worker: an ordinary run that tells Tune of each validation, and last how it ended, or
    what has gone wrong that is not its own."""
    from ray import tune

    from tunesmith import libraries
    from tunesmith.sweeps import trials
    from tunesmith.training.fit import quiet_libraries

    libraries.own_process()
    quiet_libraries()
    os.environ[launch.JOB] = "ray"
    _hide_gpus(config["gpus"])
    given = config["trial"]

    def report(step: int, value: float) -> None:
        tune.report({"step": step, "value": value})

    try:
        ended = trials.carried_out(given["number"], given["recipe"], report=report)
    except Exception as error:
        tune.report({"wrong": json.dumps(_facts(error))})
    else:
        tune.report({"ended": json.dumps(asdict(ended))})


def tried(
    asked: Sequence[Mapping[str, Any]],
    section: Ray,
    *,
    folder: Path,
    mode: str,
    patience: int,
    horizon: int | None,
    prunes: bool,
    record: Callable[[Mapping[str, Any]], None],
    told: Callable[[int, int, float], None],
    watch: Watch,
) -> None:
    """Train trials in parallel, `section.workers` at a time, and stop by ASHA those that lag behind at a validation.

    Each of `asked` has a number and a whole recipe. `record` is given what each came to as it ends, `told` number,
    step and value of each validation. `horizon` is the steps of the longest trial, None where it is not known,
    `patience` those that each one gets in any case; `mode` says whether the least value is the best one, `min`, or the
    greatest, `max`. An error that is not of a trial's values ends all trials, and is raised, a bug as RuntimeError.
    """
    with cluster(section, needed_for="tunesmith sweep --engine ray") as ray:
        from ray import tune

        gpus = _gpus(ray, section, watch)
        wrong: list[Exception] = []
        notes = _notes(folder)
        tuner = tune.Tuner(
            tune.with_resources(_trial, {"CPU": section.cpus_per_worker, "GPU": gpus}),
            param_space={"trial": tune.grid_search([dict(one) for one in asked]), "gpus": gpus},
            tune_config=tune.TuneConfig(
                scheduler=_scheduler(mode, patience, horizon) if prunes else None,
                max_concurrent_trials=section.workers,
                reuse_actors=False,
            ),
            run_config=tune.RunConfig(
                name=notes.name,
                storage_path=str(notes.parent),
                failure_config=tune.FailureConfig(max_failures=section.max_failures),
                callbacks=[_records(record, told, wrong)],
                stop=_until(wrong),
                verbose=0,
            ),
        )
        # It misses tables of its own, which are not written: `record` is told all.
        logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
        try:
            tuner.fit()
        finally:
            _remove(notes)
    if wrong:
        raise wrong[0]


def _scheduler(mode: str, patience: int, horizon: int | None) -> Any:
    """ASHA, which lets no trial of fewer steps than its first rung be an error, nor ends one for its length."""
    from ray.tune.schedulers import ASHAScheduler

    longest = (horizon or 10**9) + 1
    grace = min(patience, longest)
    return ASHAScheduler(time_attr="step", metric="value", mode=mode, max_t=longest, grace_period=grace)


def _records(
    record: Callable[[Mapping[str, Any]], None],
    told: Callable[[int, int, float], None],
    wrong: list[Exception],
) -> Any:
    """What Tune calls as trials go on: each is recorded at once when it ends. Of this process alone: in the notes that
    Tune pickles it stands without what it calls, which may be a terminal."""
    from ray import tune

    finished: set[int] = set()

    class Records(tune.Callback):  # type: ignore[misc]
        def on_trial_result(
            self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any
        ) -> None:
            number = int(trial.config["trial"]["number"])
            if said := result.get("wrong"):
                wrong.append(_error(json.loads(said)))
            elif said := result.get("ended"):
                finished.add(number)
                record(json.loads(said))
            elif result.get("value") is not None:
                told(number, int(result["step"]), float(result["value"]))

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            self._end(trial, "pruned", f"by ASHA, at step {trial.last_result.get('step')}")

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            self._end(
                trial, "failed", _last_line(trial.get_error() or trial.error_file or "it ended unheard")
            )

        def _end(self, trial: Any, state: str, reason: str) -> None:
            number = int(trial.config["trial"]["number"])
            if number not in finished and not wrong:
                finished.add(number)
                seconds = round((trial.last_result or {}).get("time_total_s", 0.0), 1)
                record({"number": number, "state": state, "reason": reason, "seconds": seconds})

        def __deepcopy__(self, memo: Any) -> Any:
            return self

        def __reduce__(self) -> Any:
            return tune.Callback, ()

    return Records()


def _until(wrong: list[Exception]) -> Any:
    """Ends all trials once something is wrong."""
    from ray import tune

    class Until(tune.Stopper):  # type: ignore[misc]
        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            return bool(wrong)

    return Until()
