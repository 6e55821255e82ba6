"""Which keys of the server's environment a user's settings may name, and where each of them may be sent."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from tunesmith.errors import RecipeError
from tunesmith.http import is_loopback

PROVIDERS = {
    "ANTHROPIC_API_KEY": "api.anthropic.com", "DEEPSEEK_API_KEY": "api.deepseek.com",
    "FIREWORKS_API_KEY": "api.fireworks.ai", "GEMINI_API_KEY": "generativelanguage.googleapis.com",
    "GROQ_API_KEY": "api.groq.com", "MISTRAL_API_KEY": "api.mistral.ai", "OPENAI_API_KEY": "api.openai.com",
    "OPENROUTER_API_KEY": "openrouter.ai", "TOGETHER_API_KEY": "api.together.xyz", "XAI_API_KEY": "api.x.ai",
}  # fmt: skip
"""The variables that providers' own programs read, each with the only host that is sent its value."""
HTTPS = 443
"""The port of a host that is named without one."""
ENTRY = re.compile(r"([A-Za-z_]\w*)=(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(?::([0-9]{1,5}))?", re.ASCII)
LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


def allowed(given: Sequence[str]) -> dict[str, str]:
    """`HOST` or `HOST:PORT` by variable: the providers', and what `--key-env NAME=HOST[:PORT]` adds.

    Raises RecipeError for what is none, and for this machine without a port: any user's program may listen at another.
    """
    hosts = dict(PROVIDERS)
    for entry in given:
        found = ENTRY.fullmatch(entry.strip())
        host = found[2].lower() if found else ""
        port = int(found[3]) if found and found[3] else None
        if found is None or not _is_host(host.strip("[]")) or (port is not None and not 0 < port < 65536):
            raise RecipeError(
                "--key-env takes a variable's name and the host that may be sent its value.",
                found=repr(entry[:80]),
                fix="Write --key-env JUDGE_KEY=judge.example, or judge.example:8443; several are given one by one.",
            )
        if port is None and is_loopback(host.strip("[]")):
            raise RecipeError(
                "A key for this machine is sent to one port, and none is named.",
                found=repr(entry[:80]),
                fix=f"Write --key-env {found[1]}={host}:8000, with the port at which the judge listens.",
            )
        hosts[found[1]] = host if port in (None, HTTPS) else f"{host}:{port}"
    return hosts


def refusal(name: str, address: str | None, hosts: Mapping[str, str]) -> str | None:
    """Why a user's settings may not have the variable's value sent to this address; None where they may."""
    if name not in hosts:
        return (
            f"The server's variable {name[:60]} may not be named here. Those that may: {', '.join(sorted(hosts))}; "
            "`tunesmith web --key-env NAME=HOST` adds one."
        )
    if _asked(address or "") != _asked(f"https://{hosts[name]}"):
        return f"The value of {name} is sent to {hosts[name]} only, and the address is {str(address)[:80]}."
    return None


def _asked(address: str) -> tuple[str, int] | None:
    """Host and port that an address asks; None for what programs may read in different ways."""
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        return None
    usual = {"https": HTTPS, "http": 80}.get(parts.scheme)
    if not host or usual is None or "@" in parts.netloc or not _is_host(host):
        return None
    return host, usual if port is None else port


def _is_host(text: str) -> bool:
    """Whether a text is an address, or a name of labels, of which the last is no number."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        labels = text.split(".")
        return all(map(LABEL.fullmatch, labels)) and not labels[-1].isdigit()
    return True
