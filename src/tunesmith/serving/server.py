"""Starting a server: its token, where it listens, and vLLM's own server where that is installed and fits."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith import launch
from tunesmith.errors import MissingExtra, ModelError, OutOfResources, RecipeError, nearest
from tunesmith.http import is_loopback, no_secret, secret

if TYPE_CHECKING:
    from tunesmith.serving.batching import Batcher
    from tunesmith.serving.limits import Limits
    from tunesmith.serving.models import Loaded

ENGINES = ("auto", "transformers", "vllm")
SHORTEST = 16
"""Characters of a token that is given."""
PACKAGES = ("fastapi", "uvicorn", "prometheus_client")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Where:
    """Address, who may ask, and by which engine."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one."""
    token: str | None = None
    hosts: frozenset[str] = frozenset()
    engine: str = "auto"
    dtype: str = "float32"
    device: str = "cpu"
    temperature: float = 0.0


def token_from(env: str | None, *, without: bool, host: str) -> tuple[str | None, bool]:
    """The token, and whether it was made here and is to be shown. Raises RecipeError for one that protects nothing."""
    if without:
        if env is not None:
            raise RecipeError("--no-token and --token-env exclude each other.", fix="Leave one of them out.")
        if not is_loopback(host):
            raise RecipeError(
                f"Without a token everybody who reaches {host} could ask.",
                fix="Leave --no-token out, or use --host 127.0.0.1.",
            )
        return None, False
    if env is None:
        return secrets.token_urlsafe(32), True
    given = secret(env) or ""
    if len(given) < SHORTEST or not given.isascii() or not given.isprintable() or " " in given:
        raise RecipeError(
            f"The environment variable {env} holds no token.",
            found=f"{len(given)} characters" if given else no_secret(env),
            fix=f"Put at least {SHORTEST} letters and digits there, without spaces.",
        )
    return given, False


HOSTS = "TUNESMITH_ALLOWED_HOSTS"
"""Environment variable with further names under which a server is reached, for containers and behind proxies."""


def hosts_from(host: str, allowed: Sequence[str]) -> frozenset[str]:
    """Names that a Host header may have: the address, those that were given, and those of the environment.

    Raises RecipeError for one that is no name, such as an address with `https://`, or a `*`, which would let every page
    in.
    """
    given = [*allowed, *os.environ.get(HOSTS, "").replace(",", " ").split()]
    for name in given:
        if not HOST_NAME.fullmatch(name):
            raise RecipeError(
                f"'{name}' is no name under which a server is reached.",
                found=f"--allowed-host, or the environment variable {HOSTS}",
                fix="Give the name alone, such as models.example.org: no https://, no port, no path and no *.",
            )
    return frozenset(name.lower() for name in (host, *given))


HOST_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?")


def limited(given: Mapping[str, int]) -> Limits:
    """The limits with some set. Raises RecipeError for one that lets nothing through."""
    from tunesmith.serving.limits import Limits

    for name, value in given.items():
        if value < (0 if name == "queue" else 1):
            raise RecipeError(
                f"--{name.replace('_', '-')} {value} lets nothing through.", fix="Give a larger one."
            )
    return Limits(**given)


def check_engine(engine: str) -> None:
    """Raises before any work for an unknown engine or missing packages."""
    if engine not in ENGINES:
        raise RecipeError(f"There is no engine '{engine}' to serve with.", fix=nearest(engine, ENGINES))
    if engine == "vllm":
        if importlib.util.find_spec("vllm") is None:
            raise MissingExtra("vllm", "--engine vllm")
        return
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(package, "tunesmith serve", install="'tunesmith[serve]'")


def serve(
    base: str,
    folders: Mapping[str, Path],
    where: Where,
    limits: Limits,
    *,
    say: Say,
    ready: Say = lambda url: None,
) -> None:
    """Load and answer until Ctrl-C or SIGTERM. `say` is told decisions, `ready` the address once it answers."""
    from tunesmith.training.lineage import is_of_4_bits

    for name, folder in folders.items():
        if is_of_4_bits(folder):
            say(
                f"{name}: It was trained on a base packed into 4 bits and is served on the whole one, so answers can "
                "differ from those that were measured; what `tunesmith merge` makes of it does not."
            )
    if where.engine != "transformers" and importlib.util.find_spec("vllm") is not None:
        refused = vllm_refuses(base, folders, where)
        if refused is None and (where.engine == "vllm" or where.device == "cuda"):
            _vllm(base, folders, where, limits, say=say)
            return
        if where.engine == "vllm":
            raise ModelError(
                f"vLLM cannot serve this: {refused}.",
                fix="Merge the adapter first (`tunesmith merge`), or use --engine transformers.",
            )
        if where.device == "cuda":
            say(f"The engine is transformers, not vLLM: {refused}.")
    listening = listen(where.host, where.port)
    app, batcher, _ = _application(base, folders, where, limits, say)
    config = configuration(app)
    server = announcing(config, lambda: ready(_url(where.host, listening.getsockname()[1])))
    batcher.on_fault = partial(_ended, server)
    try:
        server.run(sockets=[listening])
    finally:
        listening.close()
        batcher.stop()
    if batcher.fault:
        raise OutOfResources("The server ended by itself.", found=batcher.fault, fix="Start it again.")


def _ended(server: Any) -> None:
    """Have a server end whose model answers no more, rather than live on and refuse: a supervisor starts it again."""
    server.should_exit = True


@contextmanager
def running(
    base: str, folders: Mapping[str, Path], where: Where, limits: Limits
) -> Iterator[tuple[str, Loaded]]:
    """The same server in a thread of this process for a while: its address, up to `/v1`, and what it has loaded."""
    import uvicorn

    listening = listen(where.host, where.port)
    app, batcher, loaded = _application(base, folders, where, limits, lambda sentence: None)
    server = uvicorn.Server(configuration(app))
    batcher.on_fault = partial(_ended, server)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        if not thread.is_alive():
            raise OutOfResources("The server did not start.", found=batcher.fault, fix="Try again.")
        yield _url(where.host, listening.getsockname()[1]), loaded
    finally:
        server.should_exit = True
        thread.join(30)
        listening.close()
        batcher.stop()


def _application(
    base: str, folders: Mapping[str, Path], where: Where, limits: Limits, say: Say
) -> tuple[Any, Batcher, Loaded]:
    from tunesmith.serving.app import Access, create
    from tunesmith.serving.batching import Batcher
    from tunesmith.serving.models import load

    loaded = load(base, folders, dtype=where.dtype, device=where.device)
    batcher = Batcher(loaded.model, max_rows=limits.concurrency, adapters=loaded.adapters)
    for served in loaded.by_name.values():
        say(f"{served.name}: {served.template}")
    if batcher.alone:
        say(f"Answers are written side by side, not in one batch: {batcher.alone}.")
    app = create(
        loaded,
        batcher,
        access=Access(where.token, where.hosts),
        limits=limits,
        temperature=where.temperature,
    )
    return app, batcher, loaded


def configuration(app: Any, *, patience: int = 10) -> Any:
    """How uvicorn serves an application of ours; at the end it waits `patience` seconds for open answers."""
    import uvicorn

    return uvicorn.Config(
        app,
        http="h11",  # whichever other parser is installed: the limit of headers below is this one's
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        timeout_keep_alive=15,
        timeout_graceful_shutdown=patience,
        h11_max_incomplete_event_size=65_536,
    )


def announcing(config: Any, told: Callable[[], None]) -> Any:
    """uvicorn's server, which says when it answers."""
    import uvicorn

    class Announcing(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets=sockets)
            if self.started:
                told()

    return Announcing(config)


def listen(host: str, port: int) -> Any:
    """A socket, before anything is loaded: an address in use shows at once. Raises RecipeError for one that is."""
    import socket

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named, as asyncio turns Nagle's algorithm off for sockets of this protocol only: else 40 ms for each answer.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except (OSError, OverflowError) as error:
        listening.close()
        raise RecipeError(
            f"The server cannot listen at {host}:{port}.",
            found=str(error),
            fix="Give another --port.",
        ) from None
    return listening


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


# vLLM's own server.


def vllm_refuses(base: str, folders: Mapping[str, Path], where: Where) -> str | None:
    """Why vLLM's server would answer otherwise than this model was trained and tested, in words; None if not."""
    from tunesmith import models
    from tunesmith.data.templates import end_of_turn_ids
    from tunesmith.engines.vllm import check_adapter

    if models.kind(base) != "causal":
        return "it serves causal models only"
    ends, template = set(), set()
    for name, folder in folders.items():
        if (folder / "adapter_config.json").is_file():
            try:
                check_adapter(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")), name)
            except RecipeError as error:
                return f"the adapter '{name}' has {error.found}"
        tokenizer = models.load_tokenizer(str(folder if models.has_tokenizer(folder) else base))
        if not tokenizer.chat_template:
            return f"'{name}' has no chat template of its own"
        template.add(str(tokenizer.chat_template))
        ends.add(end_of_turn_ids(tokenizer))
    if len(template) > 1 or len(ends) > 1:
        return "it has one chat template for all adapters, and theirs differ"
    # Its server ends answers where the base's generation_config.json says, and takes other settings from there too.
    try:
        own = json.loads((Path(base) / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        own = {}
    said = own.get("eos_token_id")
    if set(said if isinstance(said, list) else [said]) != set(next(iter(ends))):
        return "the base's generation_config.json does not end answers where the chat template ends a turn"
    neutral = {
        "top_k": (0, -1, None),
        "top_p": (1.0, None),
        "min_p": (0, None),
        "repetition_penalty": (1.0, None),
    }
    if drawn := [name for name, values in neutral.items() if own.get(name) not in values]:
        return f"the base's generation_config.json sets {', '.join(drawn)}, which training and tests did not"
    return None


def vllm_command(
    base: str, folders: Mapping[str, Path], where: Where, limits: Limits, template: Path
) -> list[str]:
    """The command of vLLM's server; the token is not in it, as every user of a machine can read commands."""
    adapters = {name: folder for name, folder in folders.items() if str(folder) != base}
    names = [name for name in folders if name not in adapters]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server",
        "--model", base, "--host", where.host, "--port", str(where.port), "--dtype", where.dtype,
        "--max-num-seqs", str(limits.concurrency), "--chat-template", str(template),
        "--disable-uvicorn-access-log",
        "--override-generation-config", json.dumps({"temperature": where.temperature}),
    ]  # fmt: skip
    command += ["--served-model-name", *names] if names else []
    if adapters:
        ranks = [
            json.loads((f / "adapter_config.json").read_text(encoding="utf-8"))["r"]
            for f in adapters.values()
        ]
        from tunesmith.engines.vllm import holding_rank

        command += [
            "--enable-lora",
            "--max-lora-rank",
            str(holding_rank(max(ranks))),
            "--max-loras",
            str(len(adapters)),
        ]
        command += ["--lora-modules", *(f"{name}={folder}" for name, folder in adapters.items())]
    return command


def _vllm(base: str, folders: Mapping[str, Path], where: Where, limits: Limits, *, say: Say) -> None:
    from tunesmith import models

    say(
        "The engine is vLLM's own server: it has no limits of queue, body, prompt and answer and does not check the "
        "Host header; --engine transformers does."
    )
    first = next(iter(folders.values()))
    tokenizer = models.load_tokenizer(str(first if models.has_tokenizer(first) else base))
    with launch.ended_by_sigterm(), tempfile.TemporaryDirectory(prefix="tunesmith-vllm-") as folder:
        template = Path(folder) / "chat_template.jinja"
        template.write_text(tokenizer.chat_template, encoding="utf-8")
        key = {"VLLM_API_KEY": where.token} if where.token else {}
        started = subprocess.Popen(
            vllm_command(base, folders, where, limits, template),
            env={**os.environ, "VLLM_NO_USAGE_STATS": "1", **key},
        )
        try:
            code = started.wait()
        finally:
            _end(started)
    if code:
        raise OutOfResources("vLLM's server ended.", found=f"exit code {code}", fix="Its messages are above.")


ENDING = 30.0
"""Seconds that vLLM's server has to end by itself once it is told to."""


def _end(started: subprocess.Popen[bytes]) -> None:
    """Leave no server behind, whatever else this process is told meanwhile."""
    if started.poll() is not None:
        return
    launch.ignore_sigterm()
    started.terminate()
    try:
        started.wait(ENDING)
    except subprocess.TimeoutExpired:
        started.kill()
        started.wait()
