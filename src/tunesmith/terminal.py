"""What is written to a terminal: rich's console, in which the text of strangers moves no cursor and hides nothing."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console as _Console
from rich.segment import Segment

_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Characters that a terminal obeys instead of showing them, and those that turn the direction of what follows."""


def inert(text: str) -> str:
    """A text as a terminal may show it: commands are pictures of themselves, one character each."""
    return _COMMANDS.sub(lambda found: _pictured(found[0]), text)


def _pictured(sign: str) -> str:
    number = ord(sign)
    return chr(0x2400 + number) if number < 0x20 else "\u2421" if number == 0x7F else "\ufffd"


def json_line(content: Any) -> str:
    """One line of JSON for stdout; in ASCII where that is a terminal, which obeys characters that JSON leaves as they
    are, and where the content holds half a character, as names of columns may."""
    line = json.dumps(content, ensure_ascii=False, default=str)
    if not sys.stdout.isatty():
        try:
            line.encode()
        except UnicodeEncodeError:
            pass
        else:
            return line
    return json.dumps(content, default=str)


class Console(_Console):
    """rich's console, whose own commands (styles, cursors of progress bars) stay, and those in texts do not."""

    def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
        """What is to be written, piece by piece."""
        for segment in super().render(renderable, options):
            if segment.control or not _COMMANDS.search(segment.text):
                yield segment
            else:
                yield Segment(inert(segment.text), segment.style)
