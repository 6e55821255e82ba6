"""The model card: what a finished model was made from, what it scored, and what it should not be trusted with."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
import yaml

from tunesmith.compose import loaded
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

{{ use }}

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


USE_OF_FOLDER = """\
```python
{% if adapter -%}
from peft import AutoPeftModelFor{{ auto }}
from transformers import AutoTokenizer

model = AutoPeftModelFor{{ auto }}.from_pretrained("PATH"{{ labels }})
{% else -%}
from transformers import AutoModelFor{{ auto }}, AutoTokenizer

model = AutoModelFor{{ auto }}.from_pretrained("PATH")
{% endif -%}
tokenizer = AutoTokenizer.from_pretrained("PATH")
{{ asking -}}
```

{% if unplaced -%}
The base `{{ unplaced }}` is no model of the Hub: write where yours is into `adapter_config.json`, as \
`base_model_name_or_path`, or use the merged model.

{% endif -%}
{% if kind == "reward" -%}
It is a reward model: the one logit of `tokenizer.apply_chat_template(MESSAGES, return_dict=True, \
return_tensors="pt")`, a conversation that ends with the answer, is the answer's score. Scores compare answers to one \
question; the probability that one is better than another is the sigmoid of their difference.\
{% if adapter %} Several at a time need `model.config.pad_token_id = tokenizer.pad_token_id`.{% endif %}
{%- elif kind == "seq2seq" -%}
How an input is written is stored with the tokenizer as its chat template: `tokenizer.apply_chat_template([{"role": \
"user", "content": TEXT}])` gives the encoder's input.{% if prefix %} It begins with `{{ prefix }}`.{% endif %}
{%- else -%}
The chat template is stored with the tokenizer; prompts rendered with another one are not what was measured.
{%- endif %}"""
"""How a folder for transformers or PEFT is used. `PATH` becomes the repository's name where it is pushed."""

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


USE_OF_GGUF = """\
{% if is_pair -%}
The file is for programs on llama.cpp that take encoder-decoder models. They have to be given what the chat template \
in the file writes, as it was measured.
{%- else -%}
```sh
ollama create {{ model }} -f Modelfile && ollama run {{ model }} "Hello"
```

```python
from llama_cpp import Llama

model = Llama("FOLDER/{{ file }}", n_ctx={{ context }}, verbose=False)
answer = model.create_chat_completion([{"role": "user", "content": "Hello"}], temperature=0, max_tokens=256)
print(answer["choices"][0]["message"]["content"])
```

`FOLDER` is where the file lies. Tokenizer and chat template are in it; prompts that are written otherwise are not \
what was measured.
{%- endif %}"""

USE_OF_ONNX = """\
```python
import numpy
import onnxruntime
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
graph = onnxruntime.InferenceSession("FOLDER/{{ file }}")
ids = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_dict=True
)["input_ids"]
answer = []
while len(answer) < 256 and (not answer or answer[-1] not in {{ stop_ids }}):
{%- if start is none %}
    [logits] = graph.run(None, {"input_ids": numpy.array([ids + answer])})
{%- else %}
    given = {"input_ids": numpy.array([ids]), "decoder_input_ids": numpy.array([[{{ start }}, *answer]])}
    [logits] = graph.run(None, given)
{%- endif %}
    answer.append(int(logits[0, -1].argmax()))
print(tokenizer.decode(answer, skip_special_tokens=True))
```

`FOLDER` is where these files lie. The chat template is stored with the tokenizer; prompts rendered with another one \
are not what was measured."""
"""How files for other programs are used."""


PLAIN_CARD = """\
---
{{ front_matter }}---

# {{ name }}

{% for line in merged -%}
{{ line }}
{% endfor %}
What it was trained on and how it scored is not known here.

## Use

{{ use }}

## Licence

{{ licence }}

## Limits

- Nothing was measured here but what was checked above.
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


def write_made_card(
    folder: Path,
    run: Run | None,
    base: str,
    made: Sequence[str],
    notes: Sequence[str],
    *,
    kind: Kind,
    use: str | None = None,
    tags: Sequence[str] = (),
) -> None:
    """Write `README.md` into a folder of what was made of a model, such as merged weights: the run's card, where there
    is a run, and `made`, which says what it is and how it was checked.

    `use` says how it is used, where it is no folder for transformers; `tags` are beside our own.
    """
    if run:
        kept = (run.read("evaluation/comparison.json") or {}).get("comparisons", [])
        compared = [Comparison(**c) for c in kept]
        text = _card(run, folder, compared, adapter=False, merged=made, notes=notes, use=use, tags=tags)
    else:
        facts: dict[str, Any] = {"tags": ["tunesmith", *tags]}
        if use is None:
            facts |= {"library_name": "transformers"}
        terms, files = _terms(folder, base)
        facts |= terms
        text = _compiled(PLAIN_CARD).render(
            front_matter=yaml.safe_dump({**facts, **_base_fact(base)}, sort_keys=False),
            name=folder.name.removeprefix(".").removesuffix(".tmp"),
            merged=made,
            notes=notes,
            use=use or use_of_folder(kind),
            licence=_licence(base, terms, files, []),
            version=metadata.version("tunesmith"),
        )
    write_whole(folder / "README.md", _without_places(text))


def use_of_folder(
    kind: Kind, *, adapter: Path | None = None, base: str = "", prefix: str | None = None
) -> str:
    """How whole weights are used, or an adapter's folder, of that base; `prefix` is what inputs begin with."""
    return _compiled(USE_OF_FOLDER).render(
        kind=kind,
        auto=AUTO[kind],
        adapter=adapter is not None,
        labels=", num_labels=1" if kind == "reward" else "",
        asking=_asking(kind, adapter),
        unplaced=base if adapter and not _base_fact(base) else None,
        prefix=prefix,
    )


def use_of_gguf(file: str, *, context: int, is_pair: bool) -> str:
    """How a GGUF file is used, with as much context as its Modelfile gives it."""
    model = re.sub(r"[^a-z0-9]+", "-", file.removesuffix(".gguf").lower()).strip("-") or "model"
    return _compiled(USE_OF_GGUF).render(file=file, model=model, context=context, is_pair=is_pair)


def use_of_onnx(file: str, *, stop_ids: Sequence[int], start: int | None) -> str:
    """How a graph is used; `start` is the token that the decoder of an encoder-decoder model begins with."""
    return _compiled(USE_OF_ONNX).render(file=file, stop_ids=list(stop_ids), start=start)


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
    """`license` and its kin, as a folder's model or data card has them; empty where it says nothing."""
    try:
        if (folder / TERMS).is_file():
            said = json.loads((folder / TERMS).read_text(encoding="utf-8"))
        else:
            _, front, _ = (folder / "README.md").read_text(encoding="utf-8").split("---", 2)
            said = loaded(front)
        found = {name: said.get(name) for name in ("license", "license_name", "license_link")}
        # Of a data set it may be a list.
        return {
            name: " and ".join(map(str, value)) if isinstance(value, list) else str(value)
            for name, value in found.items()
            if value
        }
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return {}


def _terms_of_data(dataset: str, revision: str | None) -> dict[str, str]:
    """The terms of a data set, as its card says: of a folder the one in it, of the Hub's the one that was fetched."""
    if dataset.startswith("example:"):
        return {"license": "apache-2.0"}  # assets/README.md
    if Path(dataset).expanduser().is_dir():
        return terms_of(Path(dataset).expanduser())
    if not _base_fact(dataset):
        return {}
    from huggingface_hub import try_to_load_from_cache

    card = try_to_load_from_cache(dataset, "README.md", repo_type="dataset", revision=revision)
    return terms_of(Path(card).parent) if isinstance(card, str) else {}


def _named(terms: Mapping[str, str]) -> str:
    link = f" ({terms['license_link']})" if terms.get("license_link") else ""
    return f"`{terms.get('license_name') or terms.get('license', '')}`{link}"


def _licence(
    base: str, terms: Mapping[str, str], files: Sequence[str], data: Sequence[tuple[str, Mapping[str, str]]]
) -> str:
    """What is known of the terms of a base, and of data sets by their names; none where they are not known."""
    lie = "lies" if len(files) == 1 else "lie"
    copied = f" Its {' and '.join(f'`{name}`' for name in files)} {lie} beside this card." if files else ""
    known = f"is under {_named(terms)}" if terms else "names no licence that is known here"
    said = [f"The base `{base}` {known}, and these weights are made from it.{copied}"]
    said += [f"The data set `{name}` is under {_named(own)}." for name, own in data if own]
    silent = [f"`{name}`" for name, own in data if not own]
    if silent or not data:
        said.append(f"The licence of {' and '.join(silent) or 'the data'} is not stated.")
    if silent or not data or not terms:
        said.append("Look up what is not said here before you pass them on.")
    return " ".join(said)


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
        base = loaded(front).get("base_model")
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
    use: str | None = None,
    tags: Sequence[str] = (),
) -> str:
    recipe = run.recipe()
    kinds: dict[str, Kind] = {"seq2seq": "seq2seq", "reward": "reward"}
    plan = run.read("plan.json") or {}
    header, *lines = table(comparisons) if comparisons else [["metric", "value"]]
    primary = next((c for c in comparisons if c.primary), None)
    warnings = [event["message"] for event in run.events() if event["kind"] == "warning"]
    base, *origins = _lineage(recipe.model.base)
    facts: dict[str, Any] = {"tags": ["tunesmith", recipe.method.kind, recipe.task, *tags]}
    if adapter:
        facts |= {"library_name": "peft"}
    facts |= next(filter(None, map(_base_fact, (base, *origins))), {})
    terms, files = _terms(folder, recipe.model.base)
    facts |= terms
    kind = kinds.get(recipe.method.kind, "causal")
    sets = dict.fromkeys((part.dataset, part.revision) for part in (recipe.data, *recipe.data.mix))
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
        use=use
        or use_of_folder(
            kind,
            adapter=folder if adapter else None,
            base=base,
            prefix=getattr(recipe.method, "source_prefix", None),
        ),
        proof=_proof(run, primary),
        parts=_parts(run),
        notes=[*notes, *warnings],
        forgotten=(run.read("evaluation/forgetting.json") or {}).get("sentence"),
        merged=merged,
        licence=_licence(base, terms, files, [(_short(one[0]), _terms_of_data(*one)) for one in sets]),
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
