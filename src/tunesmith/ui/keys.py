"""Which keys of the server's environment a user's settings may name, and where each of them may be sent."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from tunesmith.errors import RecipeError

PROVIDERS = {
    "ANTHROPIC_API_KEY": "api.anthropic.com", "DEEPSEEK_API_KEY": "api.deepseek.com",
    "FIREWORKS_API_KEY": "api.fireworks.ai", "GEMINI_API_KEY": "generativelanguage.googleapis.com",
    "GROQ_API_KEY": "api.groq.com", "MISTRAL_API_KEY": "api.mistral.ai", "OPENAI_API_KEY": "api.openai.com",
    "OPENROUTER_API_KEY": "openrouter.ai", "TOGETHER_API_KEY": "api.together.xyz", "XAI_API_KEY": "api.x.ai",
}  # fmt: skip
"""The variables that providers' own programs read, each with the only host that is sent its value."""
ENTRY = re.compile(r"([A-Za-z_]\w*)=([a-z0-9.:\[\]-]+)", re.ASCII)


def allowed(given: Sequence[str]) -> dict[str, str]:
    """Hosts by variable: the providers', and what `--key-env NAME=HOST` adds. Raises RecipeError for what is none."""
    hosts = dict(PROVIDERS)
    for entry in given:
        found = ENTRY.fullmatch(entry.strip())
        if found is None:
            raise RecipeError(
                "--key-env takes a variable's name and the host that may be sent its value.",
                found=repr(entry[:80]),
                fix="Write --key-env JUDGE_KEY=judge.example; several are given one by one.",
            )
        hosts[found[1]] = found[2]
    return hosts


def refusal(name: str, address: str | None, hosts: Mapping[str, str]) -> str | None:
    """Why a user's settings may not have the variable's value sent to this address; None where they may."""
    if name not in hosts:
        return (
            f"The server's variable {name[:60]} may not be named here. Those that may: {', '.join(sorted(hosts))}; "
            "`tunesmith web --key-env NAME=HOST` adds one."
        )
    try:
        host = urlsplit(address or "").hostname
    except ValueError:
        host = None
    if host != hosts[name].strip("[]"):
        return f"The value of {name} is sent to {hosts[name]} only, and the address is {str(address)[:80]}."
    return None
