"""A folder that runs elsewhere: a model with all that serving it takes, proven over HTTP before it is handed out.

    adapter -> whole weights -> served here, asked held-out questions -> parity.json
            -> wheel, pins, containers, page, smoke test -> hashes of it all -> renamed

The folder needs no index that knows tunesmith. A folder under the name that was asked for has passed; one that has not
is kept with the ending `.failed`.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith import models
from tunesmith.data import pairs, templates
from tunesmith.data.examples import Message, Prompt, Unusable
from tunesmith.data.templates import end_of_turn_ids
from tunesmith.errors import ModelError, TunesmithError, nearest
from tunesmith.evaluation.report import told_in_report
from tunesmith.export import artefact, merge, parity, publish, wheel
from tunesmith.export.card import terms_of
from tunesmith.export.parity import NEW_TOKENS, TOLERANCES, VERDICT, Answered, Held, Parity
from tunesmith.generation import context_length, decoded
from tunesmith.serving import demo as page
from tunesmith.serving import smoke_test
from tunesmith.training.lineage import CARRIED, FACTS
from tunesmith.training.run import Run, dataset_name, unwritable, write_whole

if TYPE_CHECKING:
    from tunesmith.serving.models import Loaded

MANIFEST = "manifest.json"
TEMPLATES = Path(__file__).with_name("bundle")
DEMOS = ("auto", "chat", "sql")
"""What the page of a folder is; `auto` is `sql` where the questions are about a schema."""

VLLM = "v0.33.0"
"""Tag of vLLM's image in compose.yaml."""

GRADIO = "gradio>=6.31,<7"
"""What the page needs, where gradio is not installed here and its own needs cannot be pinned."""

ENDPOINT = "served endpoint"
"""What is served, as its verdict names it."""

PATIENCE = 3600.0
"""Seconds for each answer in the proof: a large model on a CPU writes slowly."""

KEY = "TUNESMITH_PROOF_TOKEN"
"""Environment variable of this process with the token of the server that is asked for the proof."""

SQL_FORM = {"user": "{schema}\n\n{question}"}
"""How the format `sql` puts a question about a schema."""


@dataclass(frozen=True)
class Deployment:
    """A deployment folder and the verdict on what it serves."""

    folder: Path
    name: str
    """Under which the model is served."""
    files: int
    size: int
    """In bytes."""
    dtype: str
    merged: Parity
    """Of the weights, against base and adapter."""
    served: Parity
    """Of the endpoint, against the run's own model; where it was not asked, `unproven` in it says why."""
    demo: str
    vllm: str | None
    """Why compose.yaml has no vLLM; None where it has."""
    notes: tuple[str, ...]
    findings: tuple[str, ...] = ()
    """Secrets and rows that were trained on, found in its files."""
    despite: bool = False
    """Whether it is made in spite of them."""

    @property
    def passed(self) -> bool | None:
        """Whether it answers as the model does and holds nothing that it should not; None where nothing is wrong but
        it was not asked, as `served.unproven` says."""
        proven = (self.merged.passed, self.served.passed)
        if False in proven or (self.findings and not self.despite):
            return False
        return None if None in proven else True

    def as_dict(self) -> dict[str, Any]:
        """The result as `--json` prints it; it ends with exit code 1 where the verdict is bad. A folder that was not
        asked was still made as asked for, and nothing was found wrong: exit code 0 and `passed: null`."""
        return {
            **asdict(self),
            "folder": str(self.folder),
            "merged": self.merged.as_dict(),
            "served": self.served.as_dict(),
            "passed": self.passed,
            "unproven": self.served.unproven if self.passed is None else None,
            **({"exit_code": 1} if self.passed is False else {}),
        }


def prepare(
    source: Path,
    folder: Path,
    *,
    name: str,
    run: Run | None,
    dtype: str = "auto",
    max_shard: int = merge.MAX_SHARD,
    space: bool = False,
    demo: str = "auto",
    check: str = "auto",
    held: Callable[[Any, Any], Held],
    trained: Iterable[str] | None,
    despite: bool = False,
    progress: Callable[[str, str, str], None],
    counted_on: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Deployment:
    """Make a deployment folder of an adapter's folder or one of whole weights, and prove what it serves.

    `trained` are the texts that the model learned from, which are looked for in the files; where one is found, or a
    secret, the folder has failed, unless `despite`. `check` is `auto`, which asks the served model where it fits into
    memory, or `files`, which does not. Raises ModelError for a model that answers nothing and for a merge that fails,
    and MissingExtra where a package of the server is not installed here.
    """
    if demo not in DEMOS:
        raise TunesmithError(f"There is no page '{demo}'.", fix=nearest(demo, DEMOS))
    if check not in ("auto", "files"):
        raise TunesmithError(
            f"A deployment is not tried by '{check}'.", fix=nearest(check, ("auto", "files"))
        )
    merge.free_place(folder, option="--output-dir")
    models.check_writes(str(source))
    server_pins = wheel.pins()
    demo_pins, notes = _demo_pins()
    staging = folder.with_name(f".{folder.name}.tmp")
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        made = _weights(
            source, staging, folder, dtype=dtype, max_shard=max_shard, run=run, held=held,
            progress=progress, counted_on=counted_on,
        )  # fmt: skip
        notes += made.notes
        packed = staging / "model"
        tokenizer = models.load_tokenizer(str(packed))
        notes += _settled(packed, end_of_turn_ids(tokenizer))
        refused = _vllm_refuses(packed)
        progress(
            "vLLM", "in compose.yaml" if refused is None else "left out", refused or "it answers as measured"
        )
        try:
            proof = _proven(
                source, packed, name, run=run, stored=made.quant, check=check, demo=demo, held=held,
                progress=progress, counted_on=counted_on,
            )  # fmt: skip
        except ModelError as error:
            kept = merge.put_in_place(staging, folder, passed=False)
            fix = f"{error.fix or ''} The weights are kept in {kept / 'model'}.".strip()
            raise ModelError(error.problem, found=error.found, fix=fix) from None
        notes += proof.notes
        write_whole(staging / VERDICT, json.dumps(proof.served.as_dict(), indent=1))
        facts = {
            "name": name,
            "made_by": f"tunesmith {wheel.version()}",
            "kind": models.kind(str(packed)),
            **_origin(source, packed, run),
            "dtype": made.quant,
            "demo": proof.demo,
            "probes": proof.probes,
            "proof": {
                "merged": made.parity.sentences(),
                "served": proof.served.sentences(),
            },
        }
        _write_files(
            staging, facts, server_pins=server_pins, demo_pins=demo_pins, space=space,
            vllm=None if refused else _vllm_command(name, made.quant), no_vllm=refused, notes=notes,
        )  # fmt: skip
        # The manifest has texts as well: it is looked through with the rest, and gets its hashes after that.
        write_whole(staging / MANIFEST, json.dumps(facts, indent=1, ensure_ascii=False))
        findings, more = _findings(staging, trained, proof.demo)
        notes += more
        (staging / MANIFEST).unlink()
        names = sorted(p.relative_to(staging).as_posix() for p in staging.rglob("*") if p.is_file())
        files: dict[str, dict[str, Any]] = {
            file: {"bytes": (staging / file).stat().st_size, "sha256": smoke_test.sha256(staging / file)}
            for file in names
        }
        write_whole(staging / MANIFEST, json.dumps({**facts, "files": files}, indent=1, ensure_ascii=False))
        result = Deployment(
            folder=folder,
            name=name,
            files=len(files) + 1,
            size=sum(file["bytes"] for file in files.values()),
            dtype=made.quant,
            merged=made.parity,
            served=proof.served,
            demo=proof.demo["kind"],
            vllm=refused,
            notes=tuple(notes),
            findings=tuple(findings),
            despite=despite,
        )
        final = merge.put_in_place(staging, folder, passed=result.passed is not False)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    if run and (why := unwritable(run.path)):
        progress("run", "does not keep the verdict", why)
    elif run:
        write_whole(run.path / "exports" / "served" / VERDICT, json.dumps(proof.served.as_dict(), indent=1))
        told_in_report(run, progress)
    return replace(result, folder=final)


def _weights(
    source: Path,
    staging: Path,
    folder: Path,
    *,
    dtype: str,
    max_shard: int,
    run: Run | None,
    held: Callable[[Any, Any], Held],
    progress: Callable[[str, str, str], None],
    counted_on: Callable[[str, int, int], None],
) -> artefact.Exported:
    """Whole weights in the staging folder, without what is not handed out."""
    quants = {stored: quant for quant, stored in artefact.STORED.items()}
    if dtype not in quants:
        raise TunesmithError(f"Weights are not stored as '{dtype}'.", fix=nearest(dtype, quants))
    packed = staging / "model"
    try:
        made = artefact.export_weights(
            source, packed, quant=quants[dtype], run=run, max_shard=max_shard, held=held,
            progress=progress, counted=counted_on,
        )  # fmt: skip
    except ModelError as error:
        bad = packed.with_name("model.failed")
        if not bad.is_dir():
            raise
        kept = merge.put_in_place(bad, folder, passed=False)
        raise ModelError(
            error.problem, found=error.found, fix=f"The weights are kept in {kept} to look at."
        ) from None
    # By the first anybody could ask whether a row was trained on; the second has the way to the run.
    for name in (CARRIED, FACTS):
        (packed / name).unlink(missing_ok=True)
    return made


def _settled(packed: Path, stop_ids: Sequence[int]) -> list[str]:
    """Write generation_config.json so that other servers end answers where the template does and draw them as they were
    measured; what was taken out of it, in words."""
    file = packed / "generation_config.json"
    said = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    kept = {
        key: value
        for key, value in said.items()
        if key.endswith("_token_id") or key in ("transformers_version", "_from_model_config")
    }
    kept["eos_token_id"] = list(stop_ids)
    write_whole(file, json.dumps(kept, indent=2) + "\n")
    if left := sorted(key for key in said if key not in kept):
        return [f"generation_config.json lost {', '.join(left)}, which neither training nor tests used"]
    return []


def _vllm_refuses(packed: Path) -> str | None:
    from tunesmith.serving.server import Where, vllm_refuses

    return vllm_refuses(str(packed), {"model": packed}, Where())


def _vllm_command(name: str, dtype: str) -> list[str]:
    """Arguments of vLLM's image, whose token is in its environment."""
    return [
        "--model", "/model", "--served-model-name", name, "--dtype", dtype, "--max-num-seqs", "64",
        "--override-generation-config", json.dumps({"temperature": 0.0}),
    ]  # fmt: skip


@dataclass(frozen=True)
class _Proof:
    served: Parity
    probes: list[dict[str, Any]]
    demo: dict[str, Any]
    notes: list[str]


def _proven(
    source: Path,
    packed: Path,
    name: str,
    *,
    run: Run | None,
    stored: str,
    check: str,
    demo: str,
    held: Callable[[Any, Any], Held],
    progress: Callable[[str, str, str], None],
    counted_on: Callable[[str, int, int], None],
) -> _Proof:
    """Serve the packed model, ask it what is held out, and write down what it answers to some questions that ship."""
    skeleton, tokenizer = models.outline(str(packed)), models.load_tokenizer(str(packed))
    models.settle_template(tokenizer, is_pair=skeleton.config.is_encoder_decoder)
    is_pair = bool(skeleton.config.is_encoder_decoder)

    def unasked(asked: Held, why: str) -> Parity:
        return parity.unasked(
            ENDPOINT, asked.questions, tokenizer, is_pair=is_pair, read_by="", quant=stored,
            unproven=f"it was not asked over HTTP: {why}; run smoke_test.py where it is served",
        )  # fmt: skip

    size = 4 * sum(p.numel() for p in skeleton.parameters())
    room = parity.room_for(size, size)
    if check == "files" or not room.suffices:
        why = "as asked for" if check == "files" else f"it takes {room}"
        progress("served", "not asked", why)
        asked = held(skeleton, tokenizer)
        kind = _demo(asked, demo)
        probes = _probes(kind, tokenizer, None, is_pair=is_pair, stored=stored)
        served = unasked(asked, why)
        return _Proof(served, probes, kind, [f"unproven: {served.unproven}", *kind.pop("notes")])
    with _served(packed, name) as (url, loaded):
        model, computed = merge.reference_of(source, run)
        own = models.load_tokenizer(str(source if models.has_tokenizer(source) else packed))
        models.settle_template(own, is_pair=model.config.is_encoder_decoder)
        asked = held(model, own)
        context = None if model.config.is_encoder_decoder else loaded.context
        reader = parity.server_reader(url, name, own, api_key_env=KEY, length=context, timeout=PATIENCE)
        if all(question.prompt and question.prompt.tools for question in asked.questions):
            served = unasked(asked, "all held-out questions offer tools, which a server is not asked")
        else:
            served = parity.verdict(
                model,
                own,
                replace(reader, name=f"tunesmith serve over HTTP, {parity.transformers_version()}"),
                asked,
                artefact=ENDPOINT,
                quant=stored,
                context=context,
                reference=computed,
                progress=lambda done: counted_on("served", done, len(asked.questions)),
            )
        del model
    kind = _demo(asked, demo)
    probes = _probes(
        kind, tokenizer, loaded.model, is_pair=loaded.model.config.is_encoder_decoder, stored=stored
    )
    unproven = [f"unproven: {served.unproven}"] if served.unproven else []
    return _Proof(served, probes, kind, [*unproven, *kind.pop("notes")])


@contextmanager
def _served(packed: Path, name: str) -> Iterator[tuple[str, Loaded]]:
    """The server on this machine at a free port, with a token that this process alone knows."""
    from tunesmith.serving.limits import Limits
    from tunesmith.serving.server import Where, running

    token = secrets.token_urlsafe(32)
    os.environ[KEY] = token
    roomy = Limits(prompt_tokens=10**6, max_tokens=10**6, body_bytes=10**8)
    try:
        with running(str(packed), {name: packed}, Where(port=0, token=token), roomy) as found:
            yield found
    finally:
        os.environ.pop(KEY, None)


def _demo(asked: Held, wanted: str) -> dict[str, Any]:
    """What the page asks for, and how it puts that; `notes` of what was not certain."""
    prompts = [question.prompt for question in asked.questions if question.prompt]
    form, why = form_of(prompts)
    if wanted == "chat" or (wanted == "auto" and form is None and why is None):
        about = "Answers as it was measured: the likeliest token each time."
        begun = {p.messages[0].content if p.messages[0].role == "system" else "" for p in prompts}
        if len(begun) == 1 and (system := begun.pop()):
            return {"kind": "chat", "about": about, "system": system, "notes": []}
        differing = (
            ["rows begin with different system texts, and the page gives none"] if len(begun) > 1 else []
        )
        return {"kind": "chat", "about": about, "notes": differing}
    about = "Give the tables of a database and a question about them."
    if form is None:
        return {
            "kind": "sql", "form": SQL_FORM, "about": about,
            "notes": [f"the page puts a schema, an empty line and the question: {why or 'no row shows another way'}"],
        }  # fmt: skip
    return {"kind": "sql", "form": form, "about": about, "notes": []}


def form_of(prompts: Sequence[Prompt]) -> tuple[dict[str, str] | None, str | None]:
    """How questions about a schema are put in held-out rows: by role a text with `{schema}` and `{question}` in it.

    None where fewer than half of the rows hold a schema, or, with the reason, where they put it in different ways or
    do not show what of a row is its question.
    """
    found = [split for prompt in prompts if (split := _with_schema(prompt))]
    if not found or 2 * len(found) < len(prompts):
        return None, None
    before, behind = {s[0] for s in found}, [s[1] for s in found]
    if len(before) > 1:
        return None, f"rows put it in {len(before)} different ways"
    if len(set(behind)) < 2:
        return None, "that of one row alone would hold its question"
    system, opening, is_in_system = next(iter(before))
    head, tail = _common_lines(behind)
    user = f"{head}{{question}}{tail}"
    form = {"user": user if is_in_system else f"{opening}{{schema}}{user}"}
    return ({"system": system, **form} if system else form), None


def _with_schema(prompt: Prompt) -> tuple[tuple[str, str, bool], str] | None:
    """A question taken apart: the system's text and what stands before the schema, and what stands behind it."""
    roles = [m.role for m in prompt.messages]
    if roles not in (["user"], ["system", "user"]):
        return None
    system = prompt.messages[0].content if len(roles) == 2 else ""
    user = prompt.messages[-1].content
    for text, is_system in ((system, True), (user, False)):
        if place := _schema_in(text, prompt.checks):
            begin, end = place
            if is_system:
                return (f"{text[:begin]}{{schema}}{text[end:]}", "", True), user
            return (system, text[:begin], False), text[end:]
    return None


def _schema_in(text: str, checks: Mapping[str, Any]) -> tuple[int, int] | None:
    """Where a schema stands: that of the row's own column, or the statements that create tables."""
    for name in ("schema", "context"):
        known = str(checks.get(name) or "").strip()
        if known and (at := text.find(known)) >= 0:
            return at, at + len(known)
    statement = r"CREATE\s+TABLE\b[^;]*?\((?:[^()]|\([^()]*\))*\)(?:\s*;)?"
    if hit := re.search(rf"{statement}(?:\s*{statement})*", text, re.IGNORECASE):
        return hit.start(), hit.end()
    return None


def _common_lines(texts: Sequence[str]) -> tuple[str, str]:
    """What all texts begin and end with, up to an end of line: words in common are no part of a form."""
    head, tail = _common_start(texts), _common_start([text[::-1] for text in texts])[::-1]
    head = head[: head.rfind("\n") + 1]
    at = tail.find("\n")
    tail = tail[at:] if at >= 0 else ""
    return head, "" if len(head) + len(tail) > min(map(len, texts)) else tail


def _common_start(texts: Sequence[str]) -> str:
    # What the first and the last of them in order have in common, all between them have.
    one, other = min(texts), max(texts)
    return one[: next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))]


def _probes(
    demo: Mapping[str, Any], tokenizer: Any, model: Any, *, is_pair: bool, stored: str
) -> list[dict[str, Any]]:
    """Questions that ship, none of them a row of anybody's, with what the packed model makes of them.

    `sure` is how far every precision down to bfloat16's gives the same answer: up to the first token that is preferred
    by less than that precision's tolerance.
    """
    form = pairs if is_pair else templates
    asked = [[{"role": "user", "content": text}] for text in merge.PROMPTS]
    if demo["kind"] == "sql":
        asked.insert(0, page.sql_messages(demo["form"], page.SCHEMA, page.QUESTION))
    limit = context_length(model) if model is not None else None
    found = []
    for messages in asked:
        try:
            ids = list(form.prompt_ids(tuple(Message(m["role"], m["content"]) for m in messages), tokenizer))
        except Unusable:
            continue
        if limit is not None and len(ids) + NEW_TOKENS > limit:
            continue
        answer = sure = None
        if model is not None:
            [written] = parity.answered(model, tokenizer, [ids])
            answer = decoded(written.ids, tokenizer)
            certain = decoded(written.ids[: sure_tokens(written, stored)], tokenizer)
            sure = certain.rstrip("\ufffd") if answer.startswith(certain.rstrip("\ufffd")) else ""
        found.append(
            {"messages": messages, "prompt_tokens": len(ids), "max_tokens": NEW_TOKENS, "answer": answer, "sure": sure}
        )  # fmt: skip
    if not found:
        raise ModelError(
            "The chat template takes none of the questions that the folder is tried with.",
            fix="Serve the model with `tunesmith serve`, or give it a template that takes a lone question.",
        )
    return found


def sure_tokens(found: Answered, stored: str) -> int:
    """Tokens of a greedy answer before the first that a lower precision could choose otherwise."""
    limit = 2 * max(TOLERANCES["bfloat16"], TOLERANCES.get(stored, 0)) * float(found.logits.abs().max())
    start = len(found.logits) - len(found.ids) - 1
    for number in range(len(found.ids)):
        first, second = found.logits[start + number].topk(2).values.tolist()
        if first - second <= limit:
            return number
    return len(found.ids)


def _origin(source: Path, packed: Path, run: Run | None) -> dict[str, Any]:
    """What the model is, for people: base, task, method and scores of the run, and the base's licence."""
    facts: dict[str, Any] = {"licence": terms_of(packed)}
    if (source / "adapter_config.json").is_file():
        facts["base"] = dataset_name(models.base_of(source)[0])
    if run:
        recipe = run.recipe()
        scores = (run.read("evaluation/comparison.json") or {}).get("comparisons", [])
        facts |= {
            "run": run.path.name,
            "base": dataset_name(recipe.model.base),
            "task": recipe.task,
            "method": recipe.method.kind,
            "scores": [
                {key: one.get(key) for key in ("metric", "base", "tuned", "low", "high", "n", "verdict")}
                for one in scores
                if one.get("primary")
            ],
        }
    return facts


def _demo_pins() -> tuple[list[str], list[str]]:
    try:
        return wheel.pins(("gradio",)), []
    except TunesmithError:
        return [GRADIO], [
            "gradio is not installed here, so requirements-demo.txt does not pin what the page needs"
        ]


def _write_files(
    staging: Path,
    facts: Mapping[str, Any],
    *,
    server_pins: Sequence[str],
    demo_pins: Sequence[str],
    space: bool,
    vllm: Sequence[str] | None,
    no_vllm: str | None,
    notes: Sequence[str],
) -> None:
    """Everything of the folder but the weights and the manifest."""
    import jinja2
    import yaml

    made = wheel.write(staging / "wheels")
    name = str(facts["name"])
    image = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "model"
    front = {
        "title": name, "sdk": "docker", "app_port": 7860, "pinned": False,
        **{key: value for key, value in dict(facts["licence"]).items() if key == "license"},
    }  # fmt: skip
    about = (
        f"A model fine-tuned with tunesmith{' for the task ' + facts['task'] if facts.get('task') else ''}"
    )
    given = {
        "name": name,
        "shell_name": shlex.quote(name),
        "image": image,
        "python": f"{sys.version_info[0]}.{sys.version_info[1]}",
        "wheel": made.name,
        "space": space,
        "vllm": list(vllm) if vllm else None,
        "vllm_tag": VLLM,
        "no_vllm": no_vllm,
        "notes": notes,
        "front_matter": f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n" if space else "",
        "about": about + (f", from the base `{facts['base']}`." if facts.get("base") else "."),
        "question": facts["probes"][0]["messages"][-1]["content"],
        "proof": [line for lines in facts["proof"].values() for line in lines] or ["nothing; see the notes"],
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    for template in sorted(TEMPLATES.glob("*.jinja")):
        write_whole(
            staging / template.name.removesuffix(".jinja"),
            environment.get_template(template.name).render(given),
        )
    (staging / "start.sh").chmod(0o755)
    write_whole(staging / "requirements.txt", "\n".join(server_pins) + "\n")
    write_whole(staging / "requirements-demo.txt", "\n".join(demo_pins) + "\n")
    write_whole(staging / ".dockerignore", ".venv\n__pycache__\n")
    serving = Path(page.__file__).parent
    for file, to in (("demo.py", "demo.py"), ("smoke_test.py", "smoke_test.py"), ("space.py", "app.py")):
        if space or to != "app.py":
            shutil.copyfile(serving / file, staging / to)


def _findings(
    staging: Path, trained: Iterable[str] | None, demo: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
    """Secrets and texts that were trained on, in what is handed out; and what is to be known about the search."""
    notes = []
    system = demo.get("system") or dict(demo.get("form") or {}).get("system")
    if trained is not None and system:
        # Without it the page would ask otherwise than the model was trained to be asked.
        trained = [text for text in trained if text.strip() != system.strip()]
        notes.append("manifest.json has the system text of the rows, with which the page asks")
    # The wheel is tunesmith itself, as it is installed here.
    wheels = [file.relative_to(staging).as_posix() for file in staging.glob("wheels/*.whl")]
    plan = publish.planned(staging, "deployment/folder", private=True, trained=trained, vouched=wheels)
    unread = [f"not looked through: {line}" for line in plan.unread]
    return list(plan.findings), [*notes, *plan.notes, *unread]
