"""What `on_ray` takes of Ray, done in this process by one worker after the other: for tests where Ray is not installed.

That Ray itself does so, with workers that are killed, is what the other tests of `on_ray` show.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


class RayError(Exception):
    """Of Ray itself."""


class WorkersFailed(Exception):
    """What a trainer raises whose workers have failed too often."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.worker_failures = {0: error}


class Actor:
    """An object of which each method has a `remote`."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self.held, name))


class Group:
    """The workers: one."""

    def execute_single(self, number: int, work: Callable[..., Any], *given: Any) -> Any:
        return work(*given)

    def execute(self, work: Callable[..., Any], *given: Any) -> list[Any]:
        return [work(*given)]


class TorchTrainer:
    """Starts the worker again after an error, as often as is allowed."""

    def __init__(self, work, *, train_loop_config, torch_config, scaling_config, run_config) -> None:
        assert scaling_config.num_workers == 1, "the one that there is"
        self.work, self.config = work, train_loop_config
        self.torch, self.allowed = torch_config, run_config.failure_config.max_failures

    def fit(self) -> Any:
        failed = 0
        while True:
            before = dict(os.environ)
            try:
                self.torch.backend_cls().on_start(Group(), self.torch)
                return SimpleNamespace(return_value=self.work(self.config))
            except Exception as error:
                failed += 1
                if failed > self.allowed:
                    raise WorkersFailed(error) from None
            finally:
                end_worker(before)


def end_worker(before: dict[str, str]) -> None:
    """What ends with a worker's process: its environment, and its part in a process group."""
    from torch import distributed

    from tunesmith import ranks

    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
    if distributed.is_initialized():
        distributed.destroy_process_group()
    ranks._forget_state()


class Rows:
    """Rows that are answered in batches; the last batch first, and once more, as where a worker is replaced."""

    def __init__(self, rows: list[dict[str, Any]], **sizes: Any) -> None:
        self.rows = rows

    def map_batches(self, kind, *, fn_constructor_args, batch_size, **where: Any) -> Rows:
        worker, found = kind(*fn_constructor_args), []
        batches = [self.rows[n : n + batch_size] for n in range(0, len(self.rows), batch_size)]
        for batch in [*reversed(batches), batches[-1]]:
            answered = worker({name: [row[name] for row in batch] for name in batch[0]})
            found += [dict(zip(answered, row, strict=True)) for row in zip(*answered.values(), strict=True)]
        return Rows(found)

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


class Backend:
    """Of Ray Train."""


class TorchConfig:
    """Of Ray Train."""


class Callback:
    """Of Ray Tune."""


class Stopper:
    """Of Ray Tune."""


class Context:
    """Of Ray Train, in the one worker."""

    def get_world_rank(self) -> int:
        return 0

    def get_world_size(self) -> int:
        return 1

    get_local_rank, get_local_world_size = get_world_rank, get_world_size


def named(**given: Any) -> SimpleNamespace:
    return SimpleNamespace(**given)


def installed(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Have `import ray` find this; gives what each start of it was told, with the token of that moment."""
    starts: list[dict[str, Any]] = []

    def init(**given: Any) -> None:
        starts.append(
            {**given, **{name: os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}}
        )

    nothing = lambda *given: None  # noqa: E731
    contents: dict[str, dict[str, Any]] = {
        "ray": {
            "init": init, "shutdown": nothing, "is_initialized": lambda: False, "get": lambda value: value,
            "cluster_resources": lambda: {"CPU": 2}, "get_runtime_context": lambda: named(get_node_id=lambda: "here"),
            "remote": lambda **where: lambda kind: named(remote=lambda *given: Actor(kind(*given))),
        },
        "ray._raylet": {
            "Config": named(initialize=nothing),
            "AuthenticationTokenLoader": named(instance=lambda: named(reset_cache=nothing)),
        },
        "ray.exceptions": {"RayError": RayError},
        "ray.train": {"FailureConfig": named, "RunConfig": named, "ScalingConfig": named, "get_context": Context},
        "ray.train.torch": {"TorchTrainer": TorchTrainer, "TorchConfig": TorchConfig},
        "ray.train.backend": {"Backend": Backend},
        "ray.util": {"get_node_ip_address": lambda: "127.0.0.1"},
        "ray.util.scheduling_strategies": {"NodeAffinitySchedulingStrategy": lambda node, soft: None},
        "ray.data": {
            "from_items": Rows, "ActorPoolStrategy": named,
            "DataContext": named(get_current=lambda: named(execution_options=named())),
        },
        "ray.tune": {"Callback": Callback, "Stopper": Stopper, "report": nothing},
    }  # fmt: skip
    for name, content in contents.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], own, module)
    return starts
