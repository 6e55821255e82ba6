"""Uploading a finished model to the Hugging Face Hub, and fetching one from there.

    files to upload -> looked through for secrets and for what was trained on -> repository -> files -> the card, last

A repository with a card is whole. An upload that was cut off goes on where it was: what the Hub has is not sent again.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from tunesmith.errors import TunesmithError, counted
from tunesmith.evaluation.unseen import CARRIED

CARD = "README.md"

LEFT = (CARRIED, "*.bin", "*.pt", "*.pth", "*.pkl", "*.py", ".*", "*.tmp", "merge.json")
"""What is not uploaded: marks by which anybody could ask whether a row was trained on, pickles, code, and facts with
the way to the run's folder."""

TEXT = {".json", ".jsonl", ".md", ".txt", ".yaml", ".yml", ".jinja", ".csv", ".tsv", ""}
"""Suffixes of files that are read; weights hold no text but their header."""

VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt")
"""Not looked through for rows: they hold every word. Secrets are looked for."""

LARGEST_TEXT = 50_000_000

SECRETS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{20,}",
    "an OpenAI or Anthropic key": r"\bsk-[A-Za-z0-9_-]{20,}",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,})",
    "an AWS key": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a Google key": r"\bAIza[A-Za-z0-9_-]{35}",
    "a Slack token": r"\bxox[abprs]-[A-Za-z0-9-]{10,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password in an address": r"\b[a-z][a-z0-9+.-]*://[^/\s:@]+:[^/\s:@]+@[\w.-]+",
    "a named secret": r"(?i)\b(?:api[_-]?key|secret[_-]?key|access[_-]?token|auth[_-]?token|password)\b[\"']?"
    r"\s*[:=]\s*[\"'][^\"'\s]{12,}[\"']",
}
"""What is taken for a secret, and how it looks."""

SHORTEST_ROW = 40
"""Letters of a trained text from which on finding it in a file means something."""

ATTEMPTS = 3
"""Of the whole upload, each of whose requests huggingface_hub repeats by itself."""


@dataclass(frozen=True)
class Plan:
    """What an upload would send, and what speaks against it."""

    repository: str
    private: bool
    folder: Path
    files: tuple[tuple[str, int], ...]
    """Name and bytes."""
    left: tuple[str, ...]
    """Files of the folder that are not sent."""
    findings: tuple[str, ...]
    """Secrets and rows that were trained on, found in what would be sent."""
    notes: tuple[str, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(size for _, size in self.files)

    def as_dict(self) -> dict[str, Any]:
        """The plan as `--json` prints it; it ends with exit code 1 where something speaks against it."""
        found = {**asdict(self), "folder": str(self.folder), "size": self.size}
        return {**found, **({"exit_code": 1} if self.findings else {})}


def planned(folder: Path, repository: str, *, private: bool, trained: Iterable[str] | None = None) -> Plan:
    """What would be uploaded. `trained` are the texts that were trained on, None where they are not known.

    Raises TunesmithError for a name that no repository can have.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise TunesmithError(
            f"'{repository}' is no name of a repository.", found=str(error)[:200], fix="Give owner/name."
        ) from None
    every = sorted(p for p in folder.rglob("*") if p.is_file())
    names = [p.relative_to(folder).as_posix() for p in every]
    sent = [(p, n) for p, n in zip(every, names, strict=True) if not _is_left(n)]
    notes = []
    texts = {name: text for path, name in sent if (text := _text(path)) is not None}
    findings = [found for name, text in texts.items() for found in _secrets(name, text)]
    if trained is None:
        notes.append("what was trained on is not here, so it was not looked for in the files")
    else:
        findings += _rows(texts, trained)
    home = str(Path.home())
    if told := [
        name for name, text in texts.items() if home in text or '"base_model_name_or_path": "/' in text
    ]:
        notes.append(
            f"{', '.join(told)} name{'s' if len(told) == 1 else ''} a folder of this machine, which nobody else has: "
            "push the merged model, or train on a model of the Hub"
        )
    if CARD not in names:
        notes.append("there is no model card in the folder")
    return Plan(
        repository=repository,
        private=private,
        folder=folder,
        files=tuple((name, path.stat().st_size) for path, name in sent),
        left=tuple(name for name in names if _is_left(name)),
        findings=tuple(findings),
        notes=tuple(notes),
    )


def _is_left(name: str) -> bool:
    return any(fnmatch(part, pattern) for pattern in LEFT for part in name.split("/"))


def _text(path: Path) -> str | None:
    """The text of a file, or the header of a file of weights, whose metadata can hold anything."""
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            return file.read(min(size, LARGEST_TEXT)).decode("utf-8", "replace")
    if path.suffix.lower() not in TEXT or path.stat().st_size > LARGEST_TEXT:
        return None
    return path.read_text(encoding="utf-8", errors="replace")


def _secrets(name: str, text: str) -> list[str]:
    """What looks like a secret, with its line and never its text."""
    found = []
    for what, pattern in SECRETS.items():
        if hit := re.search(pattern, text):
            found.append(f"{name}, line {text.count(chr(10), 0, hit.start()) + 1}: {what}")
    return found


def _rows(texts: dict[str, str], trained: Iterable[str]) -> list[str]:
    """Files that hold texts that were trained on."""
    searched = {n: _unescaped(t) for n, t in texts.items() if Path(n).name not in VOCABULARIES}
    counts = dict.fromkeys(searched, 0)
    for row in {_unescaped(text) for text in trained}:
        if len(row) >= SHORTEST_ROW:
            for name, text in searched.items():
                counts[name] += row in text
    return [f"{name}: {counted(n, 'text')} that the model was trained on" for name, n in counts.items() if n]


def _unescaped(text: str) -> str:
    """A text as JSON and YAML would have it read, white space aside."""
    plain = re.sub(r"\\u([0-9a-fA-F]{4})", lambda found: chr(int(found[1], 16)), text)
    for escape, meant in (("\\n", " "), ("\\r", " "), ("\\t", " "), ('\\"', '"'), ("\\\\", "\\")):
        plain = plain.replace(escape, meant)
    return " ".join(plain.split())


def publish(
    folder: Path,
    repository: str,
    *,
    private: bool,
    token: str | None = None,
    create: bool = True,
    trained: Iterable[str] | None = None,
    despite: bool = False,
    told: Callable[[str, str, str], None] = lambda name, value, reason: None,
) -> str:
    """Create the repository where it is missing, upload the model's folder, and give its address.

    Nothing is sent where a secret or a text of `trained` is found in it, unless `despite`. Without `token` it is the
    Hub client's own (login or HF_TOKEN); it is never stored or shown here. With `create` false the repository has to be
    there. An upload that fails on the way is tried again, `ATTEMPTS` times, and can be called again later: what has
    arrived is not sent twice. Raises TunesmithError with the Hub's answer where all fails; the local model stays as it
    is.
    """
    plan = planned(folder, repository, private=private, trained=trained)
    if plan.findings and not despite:
        raise TunesmithError(
            f"{repository} was not uploaded: what would be sent holds what should not be sent.",
            found="; ".join(plan.findings),
            fix="Take it out, or, where this is no secret and no private text, upload it with --despite-findings.",
        )
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = HfApi(token=token or None)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            if create:
                api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(
                folder_path=folder,
                repo_id=repository,
                commit_message="Upload by tunesmith",
                ignore_patterns=[*LEFT, CARD],
            )
            if (folder / CARD).is_file():
                text = (folder / CARD).read_text(encoding="utf-8").replace('"PATH"', f'"{repository}"')
                api.upload_file(
                    path_or_fileobj=text.encode(),
                    path_in_repo=CARD,
                    repo_id=repository,
                    commit_message="Model card by tunesmith",
                )
            return f"{api.endpoint}/{repository}"
        except (HfHubHTTPError, LocalTokenNotFoundError, OSError, ValueError, RuntimeError) as error:
            if attempt < ATTEMPTS and _may_pass(error):
                told("upload", f"attempt {attempt + 1} of {ATTEMPTS}", _said(error, token))
                time.sleep(attempt)
                continue
            mend = (
                "Log in with `hf auth login`, check the name, and upload again with `tunesmith push`: what has "
                "arrived is not sent again."
            )
            if not create:
                mend = "Create the repository first (create_new=True), log in with `hf auth login`, or check the name."
            raise TunesmithError(
                f"The model was not uploaded to {repository}; it is whole in {folder}.",
                found=_said(error, token),
                fix=mend,
            ) from None
    raise AssertionError("every attempt returns or raises")


def _said(error: Exception, token: str | None) -> str:
    """The error's first line without tokens: some clients quote the header that they could not send."""
    from huggingface_hub import get_token

    said = next(iter(str(error).splitlines()), "")
    for known in (token, get_token()):
        said = said.replace(known, "***") if known else said
    return f"{type(error).__name__}: {said[:300]}"


def _may_pass(error: Exception) -> bool:
    """Whether another attempt may go better: no answer, or one of the server's own troubles."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    if isinstance(error, HfHubHTTPError):
        return error.response is not None and (
            error.response.status_code >= 500 or error.response.status_code == 429
        )
    return not isinstance(error, ValueError | LocalTokenNotFoundError)


def fetch(repository: str, folder: Path, *, revision: str | None = None, token: str | None = None) -> Path:
    """Download a model's weights, settings, tokenizer and card, never code or pickles, to a folder that is not there.

    Cut off, it goes on where it was. Raises TunesmithError with the Hub's answer.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    from tunesmith.models import WANTED
    from tunesmith.untrusted import check_folder

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise TunesmithError(f"{folder} is there already.", fix="Give another --output.")
    staging = folder.with_name(f".{folder.name}.tmp")
    try:
        snapshot_download(
            repository, revision=revision, local_dir=staging, token=token or None, allow_patterns=list(WANTED)
        )
    except Exception as error:  # the network's many ways to fail come as many types
        unreached = isinstance(error, LocalEntryNotFoundError | OSError) and not isinstance(
            error, HfHubHTTPError
        )
        mend = (
            "Mend the way to it (HF_ENDPOINT, HTTPS_PROXY)"
            if unreached
            else "Check the name and `hf auth login`"
        )
        raise TunesmithError(
            f"{repository} was not fetched" + (": the Hub could not be reached." if unreached else "."),
            found=_said(error, token),
            fix=f"{mend}, and fetch again: what has arrived is kept.",
        ) from None
    check_folder(staging)
    if not any((staging / name).is_file() for name in ("config.json", "adapter_config.json")):
        held: Sequence[str] = sorted(p.name for p in staging.iterdir() if not p.name.startswith("."))
        raise TunesmithError(
            f"{repository} holds no model.", found=", ".join(held[:8]) or "no file that is read here"
        )
    if folder.is_dir():
        folder.rmdir()
    staging.rename(folder)
    return folder
