"""Splits made by hand for tests of what follows them."""

from __future__ import annotations

import numpy as np

from tunesmith.data import Part, Reasons, Splits
from tunesmith.data.examples import Conversation, Text
from tunesmith.data.formats import FORMATS, Detection
from tunesmith.data.sources import in_memory


def splits_of(*examples, fates=None):
    """The examples as rows of a source `x`, all of them trained unless `fates` says otherwise."""
    rows = [
        {"text": e.text}
        if isinstance(e, Text)
        else {"messages": [{"role": m.role, "content": m.content} for m in e.messages]}
        for e in examples
        if isinstance(e, Text | Conversation)
    ]
    detection = Detection((FORMATS["messages"], FORMATS["text"]), "made by hand")
    return Splits(
        parts=(Part(in_memory("x", rows), detection),),
        fates=np.array(fates or [0] * len(rows), dtype=np.int8),
        copies=np.ones(len(rows), dtype=np.int32),
        reasons=Reasons(len(rows)),
    )
