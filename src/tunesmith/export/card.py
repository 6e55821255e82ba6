"""The model card: what a finished model was made from, what it scored, and what it should not be trusted with."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
import yaml

from tunesmith.data.templates import end_of_turn_ids
from tunesmith.errors import TunesmithError
from tunesmith.evaluation.compare import Comparison, amount, methods, remarks, sentence, table
from tunesmith.evaluation.leakage import Copied
from tunesmith.evaluation.metrics import METRICS
from tunesmith.evaluation.report import engine_checks, how_answered, parts_tables
from tunesmith.evaluation.rows import read_rows
from tunesmith.models import AUTO, TOKENIZER_FILES, Kind, load_tokenizer
from tunesmith.training.run import Run, dataset_name, dataset_names, is_run, write_whole

CARD = """\
---
{{ front_matter }}---

# {{ name }}

{{ verdict }}
{% for remark in remarks -%}
{{ remark }}
{% endfor %}
{% if lines -%}
| {{ header | join(" | ") }} |
|{{ " --- |" * (header | length) }}
{% for line in lines -%}
| {{ line | join(" | ") }} |
{% endfor %}
{{ method }}

{% endif -%}
{% for line in proof -%}
- {{ line }}
{% endfor %}
{% for title, part, others in parts -%}
### {{ title }}

| {{ part | join(" | ") }} |
|{{ " --- |" * (part | length) }}
{% for line in others -%}
| {{ line | join(" | ") }} |
{% endfor %}
{% endfor -%}
{% if parts -%}
These are for looking where to look next: their p values are adjusted for their number (Holm).

{% endif -%}
## Data

Fine-tuned on {{ datasets }} for the task `{{ recipe.task }}`: {{ rows.rows_in }} rows in, {{ rows.train }} trained, \
{{ rows.validation }} for choosing the checkpoint, {{ rows.held_out }} held out{{ " for the scores above" if lines }}, \
{{ rows.dropped }} dropped{% if rows.truncated %}, {{ rows.truncated }} truncated{% endif %}.
The held-out rows were chosen by content hash and took no part in training or checkpoint choice.

## How it was made

Base model `{{ base }}`{{ origin }}, method `{{ recipe.method.kind }}`, adapter `{{ recipe.adapter.kind }}`, \
{{ training.steps }} steps, {{ training.tokens }} tokens, {{ training.seconds }} seconds; \
the weights are those of step {{ training.step_of_final_model }}.
{% for line in merged -%}
{{ line }}
{% endfor %}
```yaml
{{ recipe_yaml }}```

## Use

{% if adapter -%}
```python
from peft import AutoPeftModelFor{{ auto }}
from transformers import AutoTokenizer

model = AutoPeftModelFor{{ auto }}.from_pretrained("PATH"{{ labels }})
tokenizer = AutoTokenizer.from_pretrained("PATH")
{{ asking -}}
```
{%- else -%}
```python
from transformers import AutoModelFor{{ auto }}, AutoTokenizer

model = AutoModelFor{{ auto }}.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
{{ asking -}}
```
{%- endif %}

{% if unplaced -%}
The base `{{ base }}` is no model of the Hub: write where yours is into `adapter_config.json`, as \
`base_model_name_or_path`, or use the merged model.

{% endif -%}
{% if recipe.method.kind == "reward" -%}
It is a reward model: the one logit of `tokenizer.apply_chat_template(MESSAGES, return_dict=True, \
return_tensors="pt")`, a conversation that ends with the answer, is the answer's score. Scores compare answers to one \
question; the probability that one is better than another is the sigmoid of their difference.\
{% if adapter %} Several at a time need `model.config.pad_token_id = tokenizer.pad_token_id`.{% endif %}
{%- elif recipe.method.kind == "seq2seq" -%}
How an input is written is stored with the tokenizer as its chat template: `tokenizer.apply_chat_template([{"role": \
"user", "content": TEXT}])` gives the encoder's input.{% if recipe.method.source_prefix %} It begins with \
`{{ recipe.method.source_prefix }}`.{% endif %}
{%- else -%}
The chat template is stored with the tokenizer; prompts rendered with another one are not what was measured.
{%- endif %}

## Licence

{{ licence }}

## Limits

{% if lines -%}
- The scores hold for data like the held-out rows; other tasks, languages and topics were not measured.
{% endif -%}
- Nothing was measured about safety or bias{% if not forgotten %}, or what the base model lost elsewhere{% endif %}.
- One training run: the interval covers the choice of questions, not the luck of the seed.
{% for note in notes -%}
- {{ note }}
{% endfor %}
Made with [tunesmith](https://github.com/tunesmith/tunesmith) {{ version }}.
"""


ASKING = {
    "causal": """
ids = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)
answer = model.generate(**ids, max_new_tokens=256, do_sample=False%s)[0]
print(tokenizer.decode(answer[ids["input_ids"].shape[1] :], skip_special_tokens=True))
""",
    "seq2seq": """
ids = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Hello"}], return_tensors="pt", return_dict=True
)
answer = model.generate(**ids, max_new_tokens=256, do_sample=False%s)[0]
print(tokenizer.decode(answer, skip_special_tokens=True))
""",
    "reward": "",
}
"""How a model of a kind is asked, greedily, as it was measured."""


MERGED_CARD = """\
---
{{ front_matter }}---

# {{ name }}

{% for line in merged -%}
{{ line }}
{% endfor %}
What the adapter was trained on and how it scored is not known here.

## Use

```python
from transformers import AutoModelFor{{ auto }}, AutoTokenizer

model = AutoModelFor{{ auto }}.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
{{ asking -}}
```

## Licence

{{ licence }}

## Limits

- Nothing was measured here but that it answers as base and adapter do.
{% for note in notes -%}
- {{ note }}
{% endfor %}
Made with [tunesmith](https://github.com/tunesmith/tunesmith) {{ version }}.
"""


@cache
def _compiled(template: str) -> jinja2.Template:
    """A card's template, compiled once in a process."""
    made: jinja2.Template = jinja2.Template(template, keep_trailing_newline=True)
    return made


def write_card(run: Run, comparisons: Sequence[Comparison]) -> None:
    """Write `README.md` into the run's final model, from the run folder alone.

    Folders of this machine are shortened to their names: a card travels with the model.
    """
    adapter = (run.final_model / "adapter_config.json").exists()
    text = _card(run, run.final_model, comparisons, adapter=adapter)
    write_whole(run.final_model / "README.md", _without_places(text))


def write_merged_card(
    folder: Path, run: Run | None, base: str, merged: Sequence[str], notes: Sequence[str], *, kind: Kind
) -> None:
    """Write `README.md` into a folder of merged weights: the run's card, where there is a run, and what was
    merged and how it was checked."""
    if run:
        kept = (run.read("evaluation/comparison.json") or {}).get("comparisons", [])
        compared = [Comparison(**c) for c in kept]
        text = _card(run, folder, compared, adapter=False, merged=merged, notes=notes)
    else:
        facts: dict[str, Any] = {"tags": ["tunesmith"], "library_name": "transformers"}
        terms, files = _terms(folder, base)
        facts |= terms
        text = _compiled(MERGED_CARD).render(
            front_matter=yaml.safe_dump({**facts, **_base_fact(base)}, sort_keys=False),
            name=folder.name.removeprefix(".").removesuffix(".tmp"),
            merged=merged,
            notes=notes,
            auto=AUTO[kind],
            asking=_asking(kind, None),
            licence=_licence(base, terms, files),
            version=metadata.version("tunesmith"),
        )
    write_whole(folder / "README.md", _without_places(text))


_PLACE = re.compile(
    r"(?:(?<![\w-])file://(?:localhost)?|(?<![\w:/.~<>-]))(/[^\s/\"'`,;:()<>|]+)(?:/[^\s/\"'`,;:()<>|]+)*/([^\s/\"'`,;:()<>|]*[^\s/\"'`,;:()<>|.])"
)


def _without_places(text: str) -> str:
    """A card without the way to this machine's folders and files, which a recipe, a warning or a note may have."""
    return _PLACE.sub(lambda hit: hit[2] if Path(hit[1]).is_dir() else hit[0], text)


LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
"""Files of a model's folder that say under what terms it may be used."""


def copy_licences(source: Path, folder: Path) -> None:
    """Copy a base's licence files, which many licences ask for, and keep what its model card says of its licence."""
    for pattern in LICENCES:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copy2(file, folder / file.name)
    if terms := terms_of(source):
        write_whole(folder / TERMS, json.dumps(terms, indent=1))


TERMS = "base_terms.json"
"""The licence in a base's model card, which travels with what is made from it."""


def terms_of(folder: Path) -> dict[str, str]:
    """`license` and its kin, as a folder's model card has them; empty where it says nothing."""
    try:
        if (folder / TERMS).is_file():
            said = json.loads((folder / TERMS).read_text(encoding="utf-8"))
        else:
            _, front, _ = (folder / "README.md").read_text(encoding="utf-8").split("---", 2)
            said = yaml.safe_load(front)
        names = ("license", "license_name", "license_link")
        return {name: str(said[name]) for name in names if said.get(name)}
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return {}


def _licence(base: str, terms: dict[str, str], files: Sequence[str]) -> str:
    """What is known of the terms under which a base may be passed on."""
    copied = f" Its {' and '.join(f'`{name}`' for name in files)} lie beside this card." if files else ""
    if not terms:
        return (
            f"The model card of the base `{base}` names no licence here.{copied} These weights are made from it: look "
            "up its terms, and those of the data, before you pass them on."
        )
    named = terms.get("license_name") or terms.get("license", "")
    link = f" ({terms['license_link']})" if terms.get("license_link") else ""
    return (
        f"The base `{base}` is under `{named}`{link}, and these weights are made from it.{copied} The terms of the "
        "data are not known here."
    )


def _terms(folder: Path, base: str) -> tuple[dict[str, str], list[str]]:
    """The base's terms and the licence files in a folder; those of the base itself where it is on this machine."""
    files = sorted(file.name for pattern in LICENCES for file in folder.glob(pattern))
    terms = terms_of(folder) if (folder / TERMS).is_file() else {}
    if not terms and Path(base).expanduser().is_dir():
        place = Path(base).expanduser()
        terms = terms_of(place / "final_model" if (place / "final_model").is_dir() else place)
    return terms, files


def _lineage(base: str) -> list[str]:
    """A base, what that was made from, and so on, as folders of this machine say: Hub ids, names of folders."""
    found: list[str] = []
    place: str | None = base
    while place and len(found) < LONGEST_LINEAGE:
        is_here = Path(place).expanduser().is_dir()
        found.append(place if not is_here and _base_fact(place) else dataset_name(place))
        place = _made_from(Path(place).expanduser()) if is_here else None
    return found


def _made_from(folder: Path) -> str | None:
    """The base of a run, of an adapter, or of a model whose card names it."""
    try:
        if is_run(folder):
            return Run(folder).recipe().model.base
        if (folder / "adapter_config.json").is_file():
            said = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
            return str(said["base_model_name_or_path"])
        _, front, _ = (folder / "README.md").read_text(encoding="utf-8").split("---", 2)
        base = yaml.safe_load(front).get("base_model")
        return str(base[0] if isinstance(base, list) else base) if base else None
    except (OSError, ValueError, KeyError, IndexError, AttributeError, yaml.YAMLError, TunesmithError):
        return None  # what cannot be read tells nothing


LONGEST_LINEAGE = 8
"""Models that a card follows back: more are a circle."""


def _base_fact(base: str) -> dict[str, str]:
    """A Hub id for the front matter; nothing for a folder."""
    is_id = base.count("/") == 1 and not base.startswith((".", "/", "~"))
    return {"base_model": base} if is_id else {}


def _card(
    run: Run,
    folder: Path,
    comparisons: Sequence[Comparison],
    *,
    adapter: bool,
    merged: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> str:
    recipe = run.recipe()
    kinds: dict[str, Kind] = {"seq2seq": "seq2seq", "reward": "reward"}
    plan = run.read("plan.json") or {}
    header, *lines = table(comparisons) if comparisons else [["metric", "value"]]
    primary = next((c for c in comparisons if c.primary), None)
    warnings = [event["message"] for event in run.events() if event["kind"] == "warning"]
    base, *origins = _lineage(recipe.model.base)
    facts: dict[str, Any] = {"tags": ["tunesmith", recipe.method.kind, recipe.task]}
    if adapter:
        facts |= {"library_name": "peft"}
    facts |= next(filter(None, map(_base_fact, (base, *origins))), {})
    terms, files = _terms(folder, recipe.model.base)
    facts |= terms
    kind = kinds.get(recipe.method.kind, "causal")
    text: str = _compiled(CARD).render(
        front_matter=yaml.safe_dump(facts, sort_keys=False),
        name=run.path.name,
        verdict=sentence(primary) if primary else "No held-out answers were compared.",
        remarks=remarks(comparisons),
        header=header,
        lines=[_cells(line) for line in lines],
        method=methods(comparisons),
        base=base,
        origin="".join(f", itself made from `{one}`" for one in origins),
        datasets=" and ".join(f"`{name}`" for name in dataset_names(recipe.data)),
        recipe=recipe,
        rows=plan.get("rows", {}),
        training=run.read("training.json") or {},
        recipe_yaml=yaml.safe_dump(_shareable(recipe.model_dump(mode="json"), base=base), sort_keys=False),
        adapter=adapter,
        auto=AUTO[kind],
        asking=_asking(kind, folder if adapter else None),
        unplaced=adapter and not _base_fact(base),
        proof=_proof(run, primary),
        parts=_parts(run),
        labels=", num_labels=1" if recipe.method.kind == "reward" else "",
        notes=[*notes, *warnings],
        forgotten=(run.read("evaluation/forgetting.json") or {}).get("sentence"),
        merged=merged,
        licence=_licence(base, terms, files),
        version=(run.read("environment.json") or {"packages": {}})["packages"].get("tunesmith", ""),
    )
    return text


def _asking(kind: Kind, adapter: Path | None) -> str:
    """Code that asks a model; of an adapter, which has no file that says so, with the tokens that end an answer."""
    ends = ""
    if kind == "causal" and adapter and any((adapter / name).is_file() for name in TOKENIZER_FILES):
        ends = f", eos_token_id={list(end_of_turn_ids(load_tokenizer(str(adapter))))}"
    asking = ASKING[kind]
    return asking % ends if "%s" in asking else asking


def _cells(line: Sequence[str]) -> list[str]:
    return [" ".join(cell.replace("|", "\\|").split()) for cell in line]


def _parts(run: Run) -> list[tuple[str, list[str], list[list[str]]]]:
    """The primary metric by category and by length: a title, the header and the lines of each table."""
    found = []
    for title, lines in parts_tables(run, []):
        label = METRICS[lines[0][1].metric].label
        header = [label, "n", "base", "tuned", "difference", "verdict"]
        found.append(
            (title, header, [_cells([name, str(c.n), *cells, c.verdict]) for name, c, cells in lines])
        )
    return found


def _proof(run: Run, primary: Comparison | None) -> list[str]:
    """What else bears on the verdict: won and lost questions, what could have been found, and leakage."""
    found = []
    if primary and primary.n:
        found.append(
            f"Of {primary.n} questions {primary.wins} are better with the tuned model, {primary.losses} worse, "
            f"{primary.ties} alike."
        )
        if primary.detectable is not None:
            least = amount(primary.detectable, METRICS[primary.metric])
            found.append(f"True differences from {least} on are found 4 times in 5.")
    file = run.evaluation / "rows.jsonl"
    if how := how_answered(read_rows(file)) if file.is_file() else "":
        found.append(f"Base and tuned model answered the same questions, {how}, along the same code path.")
    found += [
        f"Engine check of {check['model']} ({check['engine']}): {check['sentence']}."
        for check in engine_checks(run, [])
    ]
    if forgotten := (run.read("evaluation/forgetting.json") or {}).get("sentence"):
        found.append(f"Forgetting: {forgotten}")
    leakage = run.read("evaluation/leakage.json") or {}
    if said := leakage.get("remark"):
        found.append(said)
    copied = leakage.get("copied") or {}
    if tuned := copied.get("tuned"):
        found.append(
            f"{tuned['copies']} of {tuned['answers']} answers are copied from training answers for half or more "
            f"(references: {copied['references']['copies']} of {copied['references']['answers']})."
        )
        if limit := Copied(**tuned).limit():
            found.append(f"{limit[:1].upper()}{limit[1:]}.")
    found += [f"Leakage: {note}." for note in leakage.get("notes", ())]
    return found


def _shareable(recipe: dict[str, Any], *, base: str) -> dict[str, Any]:
    """The recipe without this machine's folders, and without where it ran and who was told: that is no one else's."""
    data, template = recipe["data"], recipe["model"]["chat_template"]
    return {
        **{key: value for key, value in recipe.items() if key not in ("output_dir", "launch", "tracking")},
        "model": {
            **recipe["model"],
            "base": base,
            "chat_template": Path(template).name if template else None,
        },
        "data": {
            **data,
            "dataset": _short(data["dataset"]),
            "mix": [{**part, "dataset": _short(part["dataset"])} for part in data["mix"]],
        },
    }


def _short(dataset: str) -> str:
    return dataset if dataset.startswith("example:") else dataset_name(dataset)
