"""Starting the workbench: where it listens, who may sign in, and the address that it prints."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import MissingExtra, RecipeError
from tunesmith.http import is_loopback
from tunesmith.serving.server import announcing, configuration, listen, token_from

Say = Callable[[str], None]


@dataclass(frozen=True)
class Place:
    """Where the workbench listens, and who may come in."""

    workspace: Path
    host: str = "127.0.0.1"
    port: int = 7860
    """0 takes a free one."""
    token_env: str | None = None
    users: Path | None = None
    """File of accounts."""
    hosts: tuple[str, ...] = ()
    """Names in the Host header beside `localhost`, addresses and `host`."""
    keys: tuple[str, ...] = ()
    """`NAME=HOST` or `NAME=HOST:PORT`: further variables that users' settings may name as keys, and who may be sent
    them."""
    runs_code: bool = False
    """Whether users' recipes may have the code run that models write."""


def serve(place: Place, *, say: Say, ready: Say, recipe: Mapping[str, Any] | None = None) -> None:
    """Answer until Ctrl-C or SIGTERM; jobs go on. `say` is told decisions, `ready` the address once it answers."""
    for package in ("gradio", "fastapi", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(package, "tunesmith web", install="'tunesmith[web]'")
    from tunesmith.ui import accounts, keys

    hosts_of_keys = keys.allowed(place.keys)
    users = None
    if place.users is not None:
        users = accounts.read(place.users)
        inside = place.users.resolve().is_relative_to(place.workspace.resolve())
        if inside:
            raise RecipeError(
                "The file of accounts lies in the workspace, which its users can read.",
                found=str(place.users),
                fix="Move it to a folder of its own.",
            )
    elif not is_loopback(place.host):
        raise RecipeError(
            f"At {place.host} others reach the workbench, and it has no accounts.",
            fix="Give --users FILE (`tunesmith web --users FILE --add-user NAME` makes it), or use --host 127.0.0.1.",
        )
    token, is_new = token_from(place.token_env, without=False, host=place.host)
    assert token is not None
    if place.token_env:
        # Jobs inherit the environment; the token is none of theirs.
        os.environ.pop(place.token_env, None)
    listening = listen(place.host, place.port)  # before what takes seconds: a port in use shows at once
    from tunesmith.ui.app import create

    # What users write here is theirs alone.
    os.umask(0o077)
    port = int(listening.getsockname()[1])
    shown = f"[{place.host}]" if ":" in place.host else place.host
    address = f"http://{shown}:{port}/"
    if users is None and is_new:
        address += f"?token={token}"
    elif users is None:
        say(f"The address needs ?token= with the value of {place.token_env}.")
    if not is_loopback(place.host):
        say(
            "Passwords travel readable over http: put a proxy with TLS before it, and name it with --allowed-host."
        )
    names = frozenset(name.lower() for name in (place.host, *place.hosts))
    try:
        app = create(
            place.workspace,
            token,
            users,
            host=place.host,
            port=port,
            hosts=names,
            keys=hosts_of_keys,
            runs_code=place.runs_code,
            recipe=recipe,
        )
        config = configuration(app, patience=1)  # pages keep a connection open for news
        announcing(config, lambda: ready(address)).run(sockets=[listening])
    finally:
        listening.close()
