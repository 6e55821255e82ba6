"""Uploading a finished model to the Hugging Face Hub, and fetching one from there.

    files to upload -> looked through for secrets and for what was trained on -> repository -> files -> the card, last

A repository with a card is whole. An upload that was cut off goes on where it was: what the Hub has is not sent again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from glob import escape
from pathlib import Path
from typing import Any

from tunesmith.errors import RunError, TunesmithError, closest
from tunesmith.export import scan
from tunesmith.recipe import Export
from tunesmith.training.lineage import CARRIED, FACTS, run_behind
from tunesmith.training.run import Run, find_runs, is_run, open_run

CARD = "README.md"

LEFT = (CARRIED, "*.bin", "*.pt", "*.pth", "*.pkl", "*.py", ".*", "*.tmp", FACTS)
"""What is not uploaded: marks by which anybody could ask whether a row was trained on, pickles, code, and facts with
the way to the run's folder."""

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
    """Secrets and rows that were trained on, found in what would be sent; archives and tables, which no search sees
    into."""
    notes: tuple[str, ...]
    unread: tuple[str, ...] = ()
    """Files that are sent and could not be looked through, with the reason."""
    knows_rows: bool = True
    """Whether what was trained on is known, and was looked for."""

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(size for _, size in self.files)

    def as_dict(self) -> dict[str, Any]:
        """The plan as `--json` prints it; it ends with exit code 1 where something speaks against it."""
        found = {**asdict(self), "folder": str(self.folder), "size": self.size}
        return {**found, **({"exit_code": 1} if self.findings else {})}


def check_repository(repository: str) -> None:
    """Raises TunesmithError for a name that no repository can have, or that does not say whose it is."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    found = None if "/" in repository else "a name without its owner"
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        found = str(error)[:200]
    if found:
        raise TunesmithError(
            f"'{repository}' is no name of a repository.", found=found, fix="Give owner/name."
        )


def planned(
    folder: Path,
    repository: str,
    *,
    private: bool,
    trained: Iterable[str] | None = None,
    known: Sequence[str] = (),
    vouched: Collection[str] = (),
) -> Plan:
    """What would be uploaded. `trained` are the texts that were trained on, None where they are not known. `known` are
    notes on the model, `vouched` names of archives whose content is known.

    Raises TunesmithError for a name that no repository can have.
    """
    check_repository(repository)
    every = sorted(p for p in folder.rglob("*") if p.is_file())
    names = [p.relative_to(folder).as_posix() for p in every]
    sent = [(p, n) for p, n in zip(every, names, strict=True) if not _is_left(n)]
    notes = list(known)
    found = scan.searched([(name, path) for path, name in sent], trained, str(Path.home()), vouched=vouched)
    if trained is None:
        notes.append("what was trained on is not here, so it was not looked for in the files")
    if found.homes:
        notes.append(
            f"{', '.join(found.homes)} name{'s' if len(found.homes) == 1 else ''} a folder of this machine, which "
            "nobody else has: push the merged model, or train on a model of the Hub"
        )
    if CARD not in names:
        notes.append("there is no model card in the folder")
    return Plan(
        repository=repository,
        private=private,
        folder=folder,
        files=tuple((name, path.stat().st_size) for path, name in sent),
        left=tuple(name for name in names if _is_left(name)),
        findings=found.findings,
        notes=tuple(notes),
        unread=found.unread,
        knows_rows=trained is not None,
    )


def upload_of(run: str | Path, repository: str | None) -> tuple[Path, str, Run | None, list[str]]:
    """The folder that is uploaded, where to, the run behind it, and what is to be known of it. Raises TunesmithError
    for one that did not pass its check."""
    from tunesmith.export import parity
    from tunesmith.models import check_as_written

    path = Path(run).expanduser()
    marks = ("config.json", "adapter_config.json", "*.gguf")
    if not is_run(path) and path.is_dir() and any(next(path.glob(mark), None) for mark in marks):
        behind = run_behind(path)
        folder = path
    elif (path.exists() or str(run) == "tiny") and not is_run(path):
        raise _not_pushed(path, marks)
    else:
        behind = open_run(run)
        folder = behind.final_model
        if not folder.is_dir():
            raise behind.unfinished()
    check_as_written(folder)
    known = []
    if any(part.endswith(".failed") for part in folder.resolve().parts):
        raise TunesmithError(
            f"{folder} did not pass its check.", found="its parity.json says why", fix="Push the adapter."
        )
    # Of a deployment the verdict lies beside `model`.
    for place in (folder, folder.resolve().parent):
        match parity.passed_in(place):
            case False:
                raise TunesmithError(
                    f"{folder} did not pass its check.",
                    found=f"passed: false in {place / parity.VERDICT}",
                    fix="Push the adapter, or make it anew.",
                )
            case None:
                known.append(
                    f"{place / parity.VERDICT} is no proof: the model was not asked, or it is damaged"
                )
    repository = repository or (behind.recipe().export.hub_model_id if behind else None)
    if not repository:
        raise TunesmithError("Where to upload is missing.", fix="Give --hub-model-id owner/name.")
    return folder, repository, behind, known


def _not_pushed(path: Path, marks: Sequence[str]) -> RunError:
    """What a file or folder is that cannot be pushed, and what in it, or around it, can be."""
    if not path.exists():
        return RunError(
            f"{path} is the model that ships with tunesmith, and nothing of yours to push.",
            fix="Name a run, or a folder with a model.",
        )
    within = path if path.is_dir() else path.parent
    folders = {file.parent for mark in marks for depth in ("", "*/") for file in within.glob(depth + mark)}
    folders |= {found.path for found in find_runs(within)} | ({within} if is_run(within) else set())
    held = sorted(map(str, folders))
    return RunError(
        f"{path} is a folder without a model, and not a run."
        if path.is_dir()
        else f"{path} is a file; runs and folders are pushed.",
        found=", ".join(sorted(p.name for p in path.iterdir())[:8]) or "an empty folder"
        if path.is_dir()
        else None,
        fix=f"There can be pushed: {', '.join(held[:8])}."
        if held
        else "Name a run, or a folder with config.json, adapter_config.json or a GGUF file.",
    )


def _is_left(name: str) -> bool:
    return any(fnmatch(part, pattern) for pattern in LEFT for part in name.split("/"))


def publish(
    folder: Path,
    repository: str,
    *,
    private: bool,
    token: str | None = None,
    create: bool = True,
    trained: Iterable[str] | None = None,
    despite: bool = False,
    known: Sequence[str] = (),
    told: Callable[[str, str, str], None] = lambda name, value, reason: None,
) -> str:
    """Create the repository where it is missing, upload the model's folder, and give its address.

    Nothing is sent where a secret or a text of `trained` is found in it, or an archive, unless `despite`. `known` are
    notes on the model. Without `token` it is the Hub client's own (login or HF_TOKEN); it is never stored or shown
    here. With `create` false the repository has to be there. An upload that fails on the way is tried again, `ATTEMPTS`
    times, and can be called again later: what has arrived is not sent twice. Raises TunesmithError with the Hub's
    answer where all fails, and where `private` is asked for and the repository is public; the local model stays as it
    is.
    """
    plan = planned(folder, repository, private=private, trained=trained, known=known)
    if plan.findings and not despite:
        raise TunesmithError(
            f"{repository} was not uploaded: what would be sent holds what should not be sent.",
            found="; ".join(plan.findings),
            fix="Take it out (unpack what is packed), or, where this is no secret and no private text, upload it with "
            "--despite-findings.",
        )
    for note in plan.notes:
        told("note", note, "as a dry run says as well")
    for name in plan.unread:
        told("not looked through", name, "what is compressed is sent unsearched")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError

    api = HfApi(token=token or None)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            if create:
                api.create_repo(repository, private=private, exist_ok=True)
            if private and api.repo_info(repository).private is False:
                raise TunesmithError(
                    f"{repository} was not uploaded: it is there already, and everybody can read it.",
                    found="a public repository, and --private, which is what is done unless --public is said",
                    fix="Add --public where everybody may have the model, or name another repository.",
                )
            api.upload_folder(
                folder_path=folder,
                repo_id=repository,
                commit_message="Upload by tunesmith",
                # Each by its name: patterns do not hold for folders in the folder as they do here.
                allow_patterns=[escape(name) for name, _ in plan.files if name != CARD],
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
        # HTTPError is what the Hub's client raises where nobody answers; of another kind than what the Hub answers.
        except (HTTPError, LocalTokenNotFoundError, OSError, ValueError, RuntimeError) as error:
            if attempt < ATTEMPTS and _may_pass(error):
                told("upload", f"attempt {attempt + 1} of {ATTEMPTS}", _said(error, token))
                time.sleep(attempt)
                continue
            unreached = _is_unreached(error)
            mend = (
                f"{_way(error)}, and" if unreached else "Log in with `hf auth login`, check the name, and"
            ) + " upload again with `tunesmith push`: what has arrived is not sent again."
            if not create and not unreached:
                mend = "Create the repository first (create_new=True), log in with `hf auth login`, or check the name."
            raise TunesmithError(
                f"The model was not uploaded to {repository}"
                + (": the Hub could not be reached" if unreached else "")
                + f"; it is whole in {folder}.",
                found=_said(error, token),
                fix=mend,
            ) from None
    raise AssertionError("every attempt returns or raises")


def publish_run(run: Run, section: Export) -> tuple[str | None, RunError | None]:
    """Upload a run that is done as its recipe says: its address, or why there is none. A hub that is down takes
    nothing of the run."""
    if not section.hub_model_id:
        return None, None
    try:
        address = publish(
            run.final_model,
            section.hub_model_id,
            private=section.hub_private,
            trained=scan.trained_texts(run),
        )
        run.event("decision", name="published", value=address, reason="push_to_hub")
    except Exception as error:
        problem = error.problem if isinstance(error, TunesmithError) else f"{type(error).__name__}: {error}"
        run.event("warning", message=f"The model was not published: {problem}")
        return None, RunError(
            f"The run {run.path} is done, but its model was not published.",
            found=problem,
            fix=f"tunesmith push {run.path}, when the Hub answers again.",
        )
    return address, None


def _is_unreached(error: Exception) -> bool:
    """Whether nobody answered, as against an answer that is a refusal."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError

    return isinstance(error, LocalEntryNotFoundError | OSError | HTTPError) and not isinstance(
        error, HfHubHTTPError
    )


def _way(error: Exception) -> str:
    """What to do about a Hub that is out of reach."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "Take HF_HUB_OFFLINE out of the environment"
    return "Mend the way to it (HF_ENDPOINT, HTTPS_PROXY)"


def _said(error: Exception, token: str | None) -> str:
    """The error's first line without tokens: some clients quote the header that they could not send."""
    from huggingface_hub import get_token

    said = next(iter(str(error).splitlines()), "")
    for known in (token, get_token()):
        said = said.replace(known, "***") if known else said
    return f"{type(error).__name__}: {said[:300]}"


def _may_pass(error: Exception) -> bool:
    """Whether another attempt may go better: no answer, or one of the server's own troubles."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        return error.response is not None and (
            error.response.status_code >= 500 or error.response.status_code == 429
        )
    return not isinstance(error, ValueError | LocalTokenNotFoundError | OfflineModeIsEnabled)


def repository_named(name: str, output_dir: Path) -> tuple[str, str | None]:
    """The repository that is meant, and why where a run is named: what that was pushed to last.

    Raises RunError for a run that was not pushed, and for a lone name, as no repository has it, that is nearly a run's.
    """
    run = _run_named(name, output_dir)
    if run is None:
        return name, None
    told = [e["value"] for e in run.events() if e["kind"] == "decision" and e["name"] == "published"]
    if not told:
        raise RunError(f"The run {run.path} was not pushed.", fix="Name the repository, owner/name.")
    places = list(dict.fromkeys("/".join(str(t).rstrip("/").split("/")[-2:]) for t in reversed(told)))
    repository, *others = places
    before = f", and before to {', '.join(others)}" if others else ""
    return repository, f"the run {run.path.name} was last pushed there{before}"


def _run_named(name: str, output_dir: Path) -> Run | None:
    """A run by its folder or by its name in an output folder; None for what is none, as a repository."""
    for place in (Path(name).expanduser(), output_dir / name):
        if is_run(place):
            return open_run(place)
    near = closest(name, [run.path.name for run in find_runs(output_dir)])
    if "/" not in name and near:
        raise RunError(f"There is no run {name} in {output_dir}.", fix=f"Did you mean '{near}'?")
    return None


def fetch(repository: str, folder: Path, *, revision: str | None = None, token: str | None = None) -> Path:
    """Download a model's weights, settings, tokenizer and card, never code or pickles, to a folder that is not there.

    Cut off, it goes on where it was. Raises TunesmithError with the Hub's answer.
    """
    from huggingface_hub import snapshot_download

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
        unreached = _is_unreached(error)
        raise TunesmithError(
            f"{repository} was not fetched" + (": the Hub could not be reached." if unreached else "."),
            found=_said(error, token),
            fix=f"{_way(error) if unreached else 'Check the name and `hf auth login`'}, and fetch again: what has "
            "arrived is kept.",
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
