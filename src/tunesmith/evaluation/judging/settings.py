"""Who judges: the settings that `--judge` takes, as a YAML file or, for a model on this machine, `local:MODEL`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from tunesmith.compose import check_passwords, read_layer
from tunesmith.errors import RecipeError, nearest
from tunesmith.recipe import Fraction, Section

ADDRESSES = {"openai": "https://api.openai.com/v1", "anthropic": "https://api.anthropic.com/v1"}


class Judge(Section):
    """A judge and what it may cost."""

    api: Literal["openai", "anthropic", "local"] = "openai"
    """How it is asked: an OpenAI-compatible endpoint, Anthropic's messages, or a model loaded here."""

    model: str
    """Name of the model as the endpoint knows it; of a local one its folder, run, Hub id, or `tiny`."""

    base_url: str | None = None
    """Address up to and without `/chat/completions` or `/messages`; by default that of the api's own company."""

    api_key_env: str | None = None
    """Name of the environment variable that holds the key. The key itself is never written anywhere."""

    temperature: NonNegativeFloat | None = 0.0
    """Temperature of the judge; null sends none, for models that take none."""

    max_tokens: PositiveInt = 1024
    """Longest reply."""

    max_tokens_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the endpoint calls it; OpenAI's reasoning models take the second name only."""

    prompts: str | None = None
    """File whose texts replace the shipped ones (docs/judge.md)."""

    repair: bool = True
    """Ask once more, for the verdict alone, where a reply has none."""

    recheck: Fraction = 0.0
    """Share of the judgments that are made twice, to see how often the judge agrees with itself."""

    concurrency: PositiveInt = 4
    """Calls under way at once."""

    timeout: PositiveFloat = 120.0
    """Seconds for a call."""

    retries: NonNegativeInt = 6
    """How often a call is repeated that failed."""

    backoff: NonNegativeFloat = 1.0
    """Seconds before the first repetition; each further one waits twice as long."""

    max_calls: PositiveInt | None = None
    """Calls that may be made at most, those of interrupted starts included."""

    max_cost: PositiveFloat | None = None
    """Money that may be spent at most, in the unit of the prices; needs both prices."""

    price_input: NonNegativeFloat | None = None
    """Price of a million tokens that the judge reads."""

    price_output: NonNegativeFloat | None = None
    """Price of a million tokens that it writes."""

    cache: str | None = None
    """File of replies that were paid for; by default `replies.jsonl` beside the judgments. One for several
    judgings saves what they share; budgets then count all of it."""

    batch_size: PositiveInt = Field(default=16)
    """Requests that a local judge answers at once."""

    @property
    def address(self) -> str | None:
        """Where it is asked, and where its key is sent; None for a model that is loaded here."""
        return None if self.api == "local" else self.base_url or ADDRESSES[self.api]


def load_judge(given: str | Path) -> Judge:
    """The settings of a YAML or JSON file, or of `local:MODEL`. Raises RecipeError naming every problem."""
    text = str(given)
    if text.startswith("local:"):
        return validated({"api": "local", "model": text.removeprefix("local:")}, text)
    layer = read_layer(Path(text).expanduser(), what="judge's settings", example="model: NAME")
    return validated(layer, text)


def validated(layer: Any, source: str) -> Judge:
    """Settings from a layer. Raises RecipeError naming every problem and the nearest name of an unknown field."""
    if not isinstance(layer, dict):
        raise RecipeError(
            f"The judge's settings {source} are not names with values.",
            found=repr(layer)[:80],
            fix="Write one `name: value` to a line, `model: NAME` at least (docs/judge.md).",
        )
    check_passwords(layer, f"{source}: ")
    if "api_key" in layer:
        raise RecipeError(
            "A key does not belong into a file.",
            fix="Put it into an environment variable and name that: api_key_env: JUDGE_KEY.",
        )
    try:
        judge = Judge.model_validate(layer)
    except ValidationError as error:
        problems = []
        for entry in error.errors():
            name = ".".join(map(str, entry["loc"]))
            if entry["type"] == "extra_forbidden":
                problems.append(f"There is no setting '{name}'. {nearest(name, Judge.model_fields)}")
            else:
                problems.append(f"{name}: {entry['msg']}")
        raise RecipeError(
            f"The judge's settings {source} do not fit.",
            found="; ".join(problems),
            fix="Change these settings; docs/judge.md has all of them.",
        ) from None
    if judge.max_cost is not None and (judge.price_input is None or judge.price_output is None):
        raise RecipeError(
            "A budget in money needs the judge's prices.",
            fix="Give price_input and price_output, per million tokens.",
        )
    return judge
