"""tunesmith itself as a wheel, and the packages that its server needs with their versions.

A deployment folder has to run where no package index knows tunesmith, and be made where neither a build tool nor the
source is: the wheel is packed from the installed package, file by file, as PEP 427 has it.
"""

from __future__ import annotations

import base64
import hashlib
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path

from tunesmith.errors import MissingExtra

SERVING = (
    "torch", "transformers", "safetensors", "numpy", "pydantic", "typer", "rich", "pyyaml", "jinja2", "filelock",
    "fastapi", "uvicorn", "prometheus_client",
)  # fmt: skip
"""What `tunesmith serve` imports when it serves whole weights; training and evaluation need more."""

OF_TORCH = ("nvidia-", "triton", "cuda-")
"""Packages that torch itself pins, on some machines only."""

LEFT = ("assets/examples/", "assets/tiny/model.safetensors")
"""Parts of the package that no server needs: the data sets that ship, and the weights of the model that does."""

TIME = (2020, 1, 1, 0, 0, 0)
"""Of every file in the wheel, so that the same package gives the same bytes."""


def version() -> str:
    """tunesmith's own."""
    return metadata.version("tunesmith")


def write(folder: Path) -> Path:
    """Write the wheel into a folder and give its path. It installs without its dependencies, which `pins` names."""
    info = f"tunesmith-{version()}.dist-info"
    texts = {
        f"{info}/METADATA": metadata.distribution("tunesmith").read_text("METADATA")
        or f"Metadata-Version: 2.1\nName: tunesmith\nVersion: {version()}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tunesmith\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": "[console_scripts]\ntunesmith = tunesmith.cli:main\n",
    }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"tunesmith-{version()}-py3-none-any.whl"
    record = []
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in [*_package(), *((name, text.encode()) for name, text in texts.items())]:
            entry = zipfile.ZipInfo(name, TIME)
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(entry, content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            record.append(f"{name},sha256={digest},{len(content)}\n")
        entry = zipfile.ZipInfo(f"{info}/RECORD", TIME)
        entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
        archive.writestr(entry, "".join([*record, f"{info}/RECORD,,\n"]))
    return file


def _package() -> Iterator[tuple[str, bytes]]:
    """The package's files by their names in the wheel."""
    root = Path(__file__).resolve().parents[1]
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_file() and "__pycache__" not in path.parts and not name.startswith((*LEFT, ".")):
            yield f"tunesmith/{name}", path.read_bytes()


def pins(roots: Sequence[str] = SERVING) -> list[str]:
    """`name==version` of packages and all that they need here, in alphabetical order, versions as they are installed.

    Packages that only other systems need are not among them; pip finds these by itself. Raises MissingExtra for a root
    that is not installed.
    """
    found = {}
    for root in roots:
        if _installed(root) is None:
            raise MissingExtra(root, "A deployment folder", install="'tunesmith[serve]'")
    for name in _needed(roots):
        distribution = _installed(name)
        if distribution is not None:
            # What follows a plus sign names a build, of which another machine may need another.
            found[name] = f"{distribution.name}=={distribution.version.partition('+')[0]}"
    return [found[name] for name in sorted(found)]


def _needed(roots: Iterable[str]) -> list[str]:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    waiting = [(str(canonicalize_name(root)), frozenset[str]()) for root in roots]
    met: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in met or name.startswith(OF_TORCH):
            continue
        met.add((name, extras))
        distribution = _installed(name)
        for text in (distribution.requires or ()) if distribution else ():
            requirement = Requirement(text)
            asked = [{"extra": extra} for extra in extras] or [{"extra": ""}]
            if requirement.marker is None or any(requirement.marker.evaluate(extra) for extra in asked):
                waiting.append((str(canonicalize_name(requirement.name)), frozenset(requirement.extras)))
    return sorted({name for name, _ in met})


def _installed(name: str) -> metadata.Distribution | None:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None
