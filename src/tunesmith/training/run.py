"""The run folder: the one thing that passes between a running job and whoever watches it.

    recipe.yaml  environment.json  ledger.jsonl  plan.json  events.jsonl
    checkpoints/checkpoint-step-N/   best_model/   final_model/
    evaluation/ (rows.jsonl, scores.json, comparison.json)   report.html   status.json (written last)
    merged_base/ (only where a tuned run was the base: the weights the new adapter rests on)
    merged_model/ (by `tunesmith merge`)

Everything is written under a temporary name, flushed, then renamed; `events.jsonl` only grows. One
writer per run, by lock. What a run holds of somebody's data is theirs: its folder is open to its owner alone.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from tunesmith.compose import as_yaml, read_layer, validated
from tunesmith.errors import RunError, TunesmithError, closest
from tunesmith.libraries import loading
from tunesmith.recipe import Data, Recipe

State = Literal["done", "failed", "interrupted"]
Watch = Callable[[Mapping[str, Any]], None]
"""Called with every event while the run goes on, and with `progress` events, which are not kept."""

EVENTS = "events.jsonl"
"""File of a run's events, which are only ever added to."""

SEAL = "plan_sha256"
"""Field of plan.json: the hash of all others."""

LOOKING = 1.0
"""Seconds that a writer waits for a lock that may be held by one who only looks whether it is."""

SAMPLE_TEXT = 2000
"""Characters of a question or an answer that an event keeps."""

SAMPLE_TOKENS = 64
"""Longest answer of a sample, in tokens: enough to read along, without making a validation long."""

OF_STEPS = ("step", "evaluation", "sample", "checkpoint")
"""Kinds of events that a step causes each time it is taken."""

RECORDED_PACKAGES = (
    "tunesmith", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "numpy",
)  # fmt: skip


def _silent(event: Mapping[str, Any]) -> None:
    """Watch nothing."""


def counting(watch: Watch) -> Callable[[str, float, float], None]:
    """Tells a watcher how far a stage is: its name, what is done and of how much."""
    return lambda stage, done, total: watch(
        {"kind": "progress", "stage": stage, "done": done, "total": total}
    )


def deciding(watch: Watch) -> Callable[[str, Any, str], None]:
    """Tells a watcher decisions: a name, a value and the reason."""
    return lambda name, value, reason: watch(
        {"kind": "decision", "name": name, "value": value, "reason": reason}
    )


def warning(watch: Watch) -> Callable[[str], None]:
    """Tells a watcher what somebody should know of."""
    return lambda message: watch({"kind": "warning", "message": message})


@dataclass(frozen=True)
class Run:
    """A run folder, and who watches it."""

    path: Path
    watch: Watch = field(default=_silent, compare=False)
    is_read_only: bool = False
    """Whether nothing is written: another process writes this run."""

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def staging(self) -> Path:
        """Folder in which checkpoints are written before they get their name."""
        return self.path / ".staging"

    @property
    def best_model(self) -> Path:
        """Folder of the model with the lowest validation loss."""
        return self.path / "best_model"

    @property
    def final_model(self) -> Path:
        """Folder of the finished model."""
        return self.path / "final_model"

    @property
    def is_whole(self) -> bool:
        """Whether the finished model is there and needs no base: there is no adapter to be merged."""
        return self.final_model.is_dir() and not (self.final_model / "adapter_config.json").is_file()

    @property
    def evaluation(self) -> Path:
        """Folder of rows, scores and comparison."""
        return self.path / "evaluation"

    def event(self, kind: str, *, step: int | None = None, **fields: Any) -> None:
        """Append one event to events.jsonl and tell the watcher."""
        if self.is_read_only:
            return
        event = {"time": round(time.time(), 3), "kind": kind, "step": step, **fields}
        line = json.dumps(event, ensure_ascii=False, default=str) + "\n"
        with open(self.path / EVENTS, "ab+", opener=_as_open_as(self.path)) as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a line that a kill or a full disk cut off
                    line = "\n" + line
            file.write(line.encode("utf-8", errors="replace"))
        self.watch(event)

    def progress(self, stage: str, done: float, total: float, **fields: Any) -> None:
        """Tell the watcher how far a stage is; nothing is kept."""
        if self.is_read_only:
            return
        self.watch({"kind": "progress", "stage": stage, "done": done, "total": total, **fields})

    def events(self) -> list[dict[str, Any]]:
        """All events so far. Lines cut off by a crash, or that are no event, are left out, and so is what was written
        of steps that a continued run has taken once more."""
        file = self.path / EVENTS
        events: list[dict[str, Any]] = []
        content = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
        for line in content.split("\n"):
            with contextlib.suppress(ValueError, RecursionError):
                event = json.loads(line)
                if isinstance(event, dict) and isinstance(event.get("step"), int | float | None):
                    events.append(event)
        return without_retaken(events)

    def write(self, name: str, content: str | Mapping[str, Any]) -> Path:
        """Write a file of the run in one piece: temporary name, flush, rename."""
        if self.is_read_only:
            return self.path / name
        text = (
            content
            if isinstance(content, str)
            else json.dumps(content, indent=1, ensure_ascii=False, default=str)
        )
        return write_whole(self.path / name, text)

    def write_plan(self, facts: Mapping[str, Any]) -> Path:
        """Write plan.json with its own hash, by which an edited one is known."""
        content = {name: value for name, value in facts.items() if name != SEAL}
        return self.write("plan.json", {**content, SEAL: _hash_of(content)})

    def write_lines(self, name: str, lines: Iterable[str]) -> Path:
        """Write a file of the run line by line, in one piece all the same."""
        return write_whole(self.path / name, (line + "\n" for line in lines))

    def read(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the run, or None where it is not there (yet). Raises RunError where it holds no object."""
        file = self.path / name
        if not file.exists():
            return None
        try:
            content: Any = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise RunError(f"{file} is damaged.", found=str(error), fix="Restore it or delete it.") from None
        if not isinstance(content, dict):
            raise RunError(
                f"{file} is damaged.", found="JSON that is no object", fix="Restore it or delete it."
            )
        return content

    def recipe(self) -> Recipe:
        """The recipe the run was started with."""
        return validated(read_layer(self.path / "recipe.yaml"))

    def input_length(self) -> int | None:
        """Most tokens of an input that an encoder-decoder model was trained to read; None where it is not known."""
        match (self.read("plan.json") or {}).get("lengths"):
            case [int(longest), *_]:
                return longest
        return None

    def finish(self, state: State, **fields: Any) -> None:
        """Write status.json, the file that is written last, and the closing event."""
        self.event("state", state=state, **fields)
        self.write("status.json", {"state": state, "time": round(time.time(), 3), **fields})

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run as its only writer. Raises RunError naming the process that holds it."""
        from filelock import FileLock, Timeout

        lock, holder = FileLock(self.path / ".lock"), self.path / ".holder"
        try:
            lock.acquire(timeout=LOOKING, poll_interval=0.05)
        except Timeout:
            raise RunError(
                f"The run {self.path} is being written.",
                found=self.holder(),
                fix="Wait for it, or give this run another --name.",
            ) from None
        except OSError as error:
            raise RunError(
                f"The run {self.path} cannot be written.",
                found=error.strerror,
                fix="Make its folder writable, or copy it to where there is room; a copy continues as well.",
            ) from None
        try:
            since = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime())
            write_whole(holder, f"process {os.getpid()} on {platform.node()}, since {since}")
            yield
        finally:
            holder.unlink(missing_ok=True)
            close_to_others(self.path)
            lock.release()

    def holder(self) -> str:
        """Which process on which machine writes this run, and since when, for a run that one writes."""
        with contextlib.suppress(OSError):
            if who := (self.path / ".holder").read_text(encoding="utf-8"):
                return who
        return "another process"

    def unfinished(self) -> RunError:
        """That there is no final model yet, and how to get one, for whoever wants to use it."""
        state = self.state()
        fix = {
            "running": "Wait for it",
            "done": "Its folder final_model is gone: put it back, or train again",
        }.get(state, f"`tunesmith resume {self.path}`")
        if self.best_model.is_dir():
            fix += f", or use its best model so far: {self.best_model}"
        said = {
            "interrupted": "it was interrupted",
            "died": "it ended without a word, as where it was killed",
            "failed": "it failed",
            "running": "it is running",
        }.get(state, f"state '{state}'")
        return RunError(f"The run {self.path} has no final model.", found=said, fix=f"{fix}.")

    def is_locked(self) -> bool:
        """Whether a process writes this run now."""
        from filelock import FileLock, Timeout

        if not (self.path / ".holder").exists():
            return False
        try:
            with FileLock(self.path / ".lock", timeout=0):
                return False
        except Timeout:
            return True
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES):
                raise
            return self._is_locked_elsewhere()

    def _is_locked_elsewhere(self) -> bool:
        """Of a folder that this process may read only: whether another one holds it."""
        import fcntl

        try:
            with (self.path / ".lock").open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # not even to be read, or never held
            return False
        return False

    def state(self) -> str:
        """`running`, `done`, `failed`, `interrupted`, or `died` for a run that ended without a word."""
        if self.is_locked():
            return "running"
        status = self.read("status.json")
        return str(status.get("state", "died")) if status else "died"


def is_edited(plan: Mapping[str, Any]) -> bool:
    """Whether the content of plan.json is another than was written. One of an older tunesmith does not say."""
    return SEAL in plan and plan[SEAL] != _hash_of({name: plan[name] for name in plan if name != SEAL})


def _hash_of(content: Mapping[str, Any]) -> str:
    """Hash of what JSON keeps of a content, whatever the order of its names."""
    kept = json.loads(json.dumps(content, default=str))
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def without_retaken(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Events without what was written of steps that a continued run has taken once more."""
    found: list[dict[str, Any]] = []
    for event in events:
        if event.get("kind") == "state" and event.get("state") == "training":
            done = event.get("step") or 0
            found = [e for e in found if e.get("kind") not in OF_STEPS or (e.get("step") or 0) <= done]
        found.append(event)
    return found


def write_whole(path: Path, text: str | Iterable[str]) -> Path:
    """Write a text file, whole or piece by piece, so that a reader sees the old or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", opener=_as_open_as(path.parent)) as file:
            file.writelines([text] if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)
    return path


def unwritable(folder: Path) -> str | None:
    """Why a folder, be it there or still to be made, cannot be written; None where it can. Nothing is made."""
    near = next(p for p in (folder.absolute(), *folder.absolute().parents) if os.path.exists(p))
    if not near.is_dir():
        return f"{near} is a file"
    if os.access(near, os.W_OK | os.X_OK):
        return None
    is_read_only = hasattr(os, "statvfs") and os.statvfs(near).f_flag & os.ST_RDONLY
    return f"{near} is on a disk that may only be read" if is_read_only else f"no right to write in {near}"


def check_writable(folder: Path, *, fix: str) -> Path:
    """The folder, where something can be written in it. Raises RunError otherwise, before anything is computed."""
    if why := unwritable(folder):
        raise RunError(f"{folder} cannot be written.", found=why, fix=fix)
    return folder


def _as_open_as(folder: Path) -> Callable[[str, int], int]:
    """Opens files that nobody may read who may not enter their folder."""
    mode = 0o666 & folder.stat().st_mode | 0o600
    return lambda path, flags: os.open(path, flags, mode)


def open_as_new(folder: Path) -> None:
    """Files in a folder may be read and written by whoever may do so with the folder, whatever library wrote them."""
    for place, _, names in os.walk(folder):
        mode = 0o666 & Path(place).stat().st_mode
        for path in (Path(place, name) for name in names):
            if not path.is_symlink():
                path.chmod(path.stat().st_mode & 0o777 | mode)


def close_to_others(folder: Path) -> None:
    """Nothing in a folder is more open than the folder itself, whatever library wrote it."""
    if not folder.is_dir():  # a run that was removed because it had not begun
        return
    most = folder.stat().st_mode & 0o777 | 0o700
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # gone, or another user's
            mode = path.lstat().st_mode
            if not stat.S_ISLNK(mode) and mode & 0o777 & ~most:
                path.chmod(mode & 0o777 & most)


def flush_folder(folder: Path) -> None:
    """Have the disk keep the names in a folder, as `os.fsync` does for a file's content."""
    if os.name == "nt":  # Windows has no way to flush a folder
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def folder_name(recipe: Recipe) -> str:
    """The run's folder: its name, or `<task>_<dataset>` with the file's stem, the Hub name's end or the example."""
    return recipe.name or f"{recipe.task}_{dataset_name(recipe.data.dataset)}"


def dataset_name(dataset: str) -> str:
    """A data set's short name: a file's stem, a folder's name, the end of a Hub id, an example's name."""
    path = Path(dataset.removeprefix("example:").rstrip("/"))
    stem = path.stem if path.suffix in {".json", ".jsonl", ".csv", ".parquet", ".txt"} else path.name
    return re.sub(r"[^\w.-]+", "-", stem) or "data"


def dataset_names(data: Data) -> list[str]:
    """The data sets of a recipe by their short names, all of a mix; of some that share one, their full names."""
    all_of_them = [data.dataset, *(part.dataset for part in data.mix)]
    short = [dataset_name(dataset) for dataset in all_of_them]
    unique = list(dict.fromkeys(all_of_them))
    if len({dataset_name(dataset) for dataset in unique}) == len(unique):
        return list(dict.fromkeys(short))
    return [_with_folder(dataset) for dataset in unique]


def _with_folder(dataset: str) -> str:
    """A short name behind the name of its folder, which is no secret of the machine."""
    folder = Path(dataset.removeprefix("example:")).parent.name
    return f"{folder}/{dataset_name(dataset)}" if folder else dataset_name(dataset)


def anchored(recipe: Recipe) -> Recipe:
    """The recipe with local files and folders by their full paths, so that it holds from everywhere.

    Names that stand for something else (`tiny`, `example:`, Hub ids) stay, and so does what is not there.
    """

    def full(name: str) -> str:
        path = Path(name).expanduser()
        return os.path.abspath(path) if path.exists() and name != "tiny" else name

    template = recipe.model.chat_template
    if template is not None and Path(template).suffix in {".jinja", ".j2"}:
        template = full(template)
    model = {"base": full(recipe.model.base), "chat_template": template}
    mix = [part.model_copy(update={"dataset": full(part.dataset)}) for part in recipe.data.mix]
    data = {"dataset": full(recipe.data.dataset), **({"mix": mix} if mix else {})}
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update=model),
            "data": recipe.data.model_copy(update=data),
        }
    )


OF_NODE = re.compile(r"\.lock|\.holder|\..+\.\d+\.tmp")
"""Locks and half-written files, which are those of the machine that writes."""
OWN = re.compile(rf"{OF_NODE.pattern}|environment\.json|plan\.json")
"""Files of a run that was killed while its folder was made."""


def create(recipe: Recipe, *, watch: Watch = _silent) -> Run:
    """A new run folder with the resolved recipe and the environment. plan.json has the recipe from the beginning, so
    that an edited recipe.yaml is seen however early a run is killed.

    Raises RunError where the folder is another run's, or holds files that are not a run's.
    """
    path = Path(recipe.output_dir).expanduser() / folder_name(recipe)
    check_free(path, recipe=recipe)
    run = Run(path, watch)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        with run.lock():
            if is_run(path):  # another process came first
                return create(recipe, watch=watch)
            run.write("environment.json", environment())
            run.write_plan({"recipe": recipe.model_dump(mode="json")})
            run.write("recipe.yaml", as_yaml(recipe))
    except OSError as error:
        raise RunError(
            f"The run folder {path} cannot be made.", found=error.strerror, fix="Choose another --output-dir."
        ) from None
    return run


def check_free(path: Path, *, found: str | None = None, recipe: Recipe | None = None) -> None:
    """Raises RunError where a new run's folder is another run's, or holds files that are not a run's. `found` says what
    else tells that run from the new one, of `recipe`, which may be that run's own."""
    # Listed first: whoever makes a run there meanwhile may write its last file between the two looks.
    is_another = path.exists() and (
        not path.is_dir() or any(not OWN.fullmatch(p.name) for p in path.iterdir())
    )
    if is_run(path):
        run = Run(path)
        state = run.state()
        to_continue = {
            "done": "",
            "running": " wait for it,",
        }.get(state, f" continue that one with `tunesmith resume {path}`,")
        is_same = False
        if recipe is not None:
            with contextlib.suppress(TunesmithError, OSError):  # one that cannot be read is another's
                is_same = run.recipe() == recipe
        raise RunError(
            f"This run was started before: {path} has the same recipe."
            if is_same
            else f"The folder {path} is another run's.",
            found=f"a run in state '{state}'"
            + (f": {run.holder()}" if state == "running" else "")
            + (f"; {found}" if found else ""),
            fix=f"Give this run another --name,{to_continue} or delete that one.",
        )
    if is_another:
        raise RunError(f"The folder {path} is not empty and not a run.", fix="Give this run another --name.")


def discard(run: Run) -> None:
    """Remove a run that failed before it trained anything, so that a mended recipe finds its folder free."""
    shutil.rmtree(run.path)


MARKS = ("recipe.yaml", "environment.json")
"""Files by which a folder is known to be a run's."""


def is_run(path: Path) -> bool:
    """Whether a folder is a run's."""
    return all((path / name).is_file() for name in MARKS)


def open_run(path: str | Path, *, watch: Watch = _silent) -> Run:
    """An existing run. Raises RunError naming the runs nearby."""
    path = Path(path).expanduser()
    if is_run(path):
        return Run(path, watch)
    check_not_lost(path)
    near = {run.path.name: str(run.path) for run in find_runs(path.parent)} if path.parent.is_dir() else {}
    meant = closest(path.name, near)
    raise RunError(
        f"{path} is not a run.",
        found="a folder without recipe.yaml" if path.is_dir() else "no such folder",
        fix=f"Did you mean '{near[meant]}'?"
        if meant
        else "Runs there: " + ", ".join(sorted(near.values())[:8]) + "."
        if near
        else "`tunesmith runs` lists the runs of an output folder.",
    )


def check_not_lost(path: Path) -> None:
    """Raises RunError for the folder of a run that has lost what a run is known by."""
    lost = [name for name in MARKS if not (path / name).is_file()]
    if not lost or not (path / EVENTS).is_file():
        return
    is_kept = lost == ["recipe.yaml"] and (path / "plan.json").is_file()
    raise RunError(
        f"The run {path} is not whole.",
        found=f"no {' and no '.join(lost)}",
        fix="Put it back"
        + (": what the run was started with stands in its plan.json, under `recipe`." if is_kept else "."),
    )


def find_runs(output_dir: Path) -> list[Run]:
    """The runs in an output folder, oldest first."""
    folders = [path for path in output_dir.iterdir() if is_run(path)] if output_dir.is_dir() else []
    return [Run(path) for path in sorted(folders, key=lambda p: (p / "environment.json").stat().st_mtime)]


def environment() -> dict[str, Any]:
    """What the run's numbers may depend on besides the recipe: versions and device; no paths, no secrets."""
    versions = {}
    for package in RECORDED_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    with loading():
        import torch

    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cuda": torch.version.cuda,
        "packages": versions,
        "implementation": sys.implementation.name,
    }
