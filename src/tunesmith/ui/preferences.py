"""What people preferred in a chat, as pairs that a DPO run learns from."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tunesmith.errors import InputError

NAME = "preferences.jsonl"


def keep(
    folder: Path,
    *,
    prompt: Sequence[Mapping[str, str]],
    chosen: str,
    rejected: str,
    models: tuple[str, str],
) -> Path:
    """Append a pair to the folder's file: the conversation so far, the better answer, the worse one, who gave them.

    Raises InputError where there is nothing to prefer: equal answers, or an empty one that won.
    """
    from filelock import FileLock

    if chosen.split() == rejected.split():
        raise InputError("Both answers are the same.", fix="Ask something else, or raise the temperature.")
    if not chosen.strip() or not rejected.strip():
        raise InputError("One of the answers is empty.", fix="A pair needs two answers.")
    line = json.dumps(
        {
            "prompt": [{"role": turn["role"], "content": turn["content"]} for turn in prompt],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
            "chosen_model": models[0],
            "rejected_model": models[1],
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
    )
    path = folder / NAME
    with FileLock(folder / f".{NAME}.lock"):
        path.touch()
        with path.open("r+b") as file:
            # Half a pair that a kill or a full disk left would keep the whole file from being read.
            file.truncate(_whole(file.read()))
            file.seek(0, os.SEEK_END)
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    return path


def _whole(content: bytes) -> int:
    """Bytes up to the end of the last whole line."""
    return content.rfind(b"\n") + 1


def count(folder: Path) -> int:
    """How many pairs were kept."""
    try:
        return sum(1 for line in (folder / NAME).read_bytes().split(b"\n") if line.strip())
    except OSError:
        return 0
