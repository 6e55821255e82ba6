"""lm-evaluation-harness as a suite: its tasks on our models, its samples as our rows (`pip install lm-eval`)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.errors import MissingExtra, TunesmithError, counted
from tunesmith.evaluation.rows import EvalRow, write_rows
from tunesmith.training.run import Watch, write_whole


def run(model: str | Path, tasks: str, output: Path, *, apart: bool = False, watch: Watch) -> dict[str, Any]:
    """Results of harness tasks, named with commas between them; rows and results are written to `output`, or where that
    has other ones and `apart` is given to the next free name.

    The model is loaded by us (safetensors, no remote code) and handed over, and asked through its chat template where
    it has one of its own; tasks that run generated code are not confirmed, so the harness refuses them. Raises
    MissingExtra where the harness is not installed, and TunesmithError for a task that it does not know or cannot load.
    """
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise TunesmithError("No task of the harness is named.", fix="Write --suite lm-eval:TASK,TASK.")
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "lm_eval":
            raise
        raise MissingExtra(
            "lm-eval", "A suite of lm-evaluation-harness", install="'tunesmith[lm-eval]'"
        ) from None
    from tunesmith import models
    from tunesmith.evaluation.judging.bench import ASKED, folder_for, source_of

    source = source_of(str(model))
    own = bool(models.load_tokenizer(str(model)).chat_template)
    facts = {
        "suite": f"lm-eval:{','.join(names)}",
        "model": [Path(str(model)).name, source.identity()],
        "chat_template": "applied" if own else "not applied",
    }
    output, _ = folder_for(output, facts, apart=apart, watch=watch)
    watch(
        {
            "kind": "decision",
            "name": "chat template",
            "value": facts["chat_template"],
            "reason": "the model has one of its own" if own else "the model has none",
        }
    )
    wrapped = HFLM(pretrained=source.model, tokenizer=source.tokenizer)
    watch({"kind": "progress", "stage": f"lm-eval {', '.join(names)}", "done": 0, "total": 1})
    try:
        found = lm_eval.simple_evaluate(
            model=wrapped,
            tasks=names,
            log_samples=True,
            confirm_run_unsafe_code=False,
            apply_chat_template=own,
        )
    except (KeyError, ValueError, OSError) as error:
        raise TunesmithError(
            f"lm-evaluation-harness cannot run {', '.join(names)}.",
            found=f"{type(error).__name__}: {error}".splitlines()[0][:300],
            fix="`lm-eval ls tasks` lists what there is; data sets are fetched from the Hub or its cache.",
        ) from error
    watch({"kind": "progress", "stage": f"lm-eval {', '.join(names)}", "done": 1, "total": 1})
    rows = rows_of(found, Path(str(model)).name)
    write_whole(output / ASKED, json.dumps(facts, indent=1))
    write_rows(output / "rows.jsonl", rows)
    results = {
        task: {name: value for name, value in values.items() if isinstance(value, int | float)}
        for task, values in found["results"].items()
    }
    record = {
        "suite": facts["suite"],
        "model": str(model),
        "sentence": f"{Path(str(model)).name} on {counted(len(rows), 'sample')} of {', '.join(names)}.",
        "chat_template": facts["chat_template"],
        "version": getattr(lm_eval, "__version__", None),
        "task_versions": found.get("versions", {}),
        "results": results,
        "rows": len(rows),
    }
    write_whole(output / "suite.json", json.dumps(record, indent=1, default=str))
    return {**record, "output": str(output)}


def rows_of(found: Mapping[str, Any], model: str) -> list[EvalRow]:
    """The harness's samples as rows: one per task, document and filter; items count through all tasks."""
    rows = []
    items: dict[tuple[str, Any], int] = {}
    for task, samples in found.get("samples", {}).items():
        filters = list(dict.fromkeys(sample.get("filter") for sample in samples))
        for sample in samples:
            item = items.setdefault((task, sample["doc_id"]), len(items))
            text = _asked(sample.get("arguments") or "")
            metrics = {name: sample[name] for name in sample.get("metrics", ()) if name in sample}
            answer = sample.get("filtered_resps")
            if isinstance(answer, list | tuple) and len(answer) == 1:
                [answer] = answer
            rows.append(
                EvalRow(
                    model=model,
                    item=item,
                    source_row=f"lm-eval:{task}:{sample['doc_id']}",
                    group=None,
                    turn=0,
                    sample=filters.index(sample.get("filter")),
                    prompt_sha256=hashlib.sha256(text.encode()).hexdigest(),
                    prompt_text=text,
                    reference=str(sample.get("target", "")),
                    output=answer if isinstance(answer, str) else json.dumps(answer, default=str),
                    finish_reason=None,
                    generation={"suite": "lm-eval", "task": task, "filter": sample.get("filter")},
                    scores={name: float(value) for name, value in metrics.items() if _is_score(value)},
                    nll=None,
                    tokens=None,
                    correct=None,
                    status="ok",
                    flags={
                        name: [json.dumps(value, default=str)]
                        for name, value in metrics.items()
                        if not _is_score(value)
                    },
                )
            )
    return rows


def _is_score(value: Any) -> bool:
    """Whether a metric of a sample is one number; parts of a perplexity, for instance, are several."""
    return isinstance(value, int | float) and math.isfinite(value)


def _asked(arguments: Any) -> str:
    """The text that a sample asks with; of several requests, as of choices, the one that they share."""
    try:
        texts = {request[0] for request in arguments}
    except (TypeError, LookupError):
        texts = set()
    [text] = texts if len(texts) == 1 else [None]
    return text if isinstance(text, str) else json.dumps(arguments, default=str)
