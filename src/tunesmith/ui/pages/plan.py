"""The Plan page."""

from __future__ import annotations

import gradio as gr

from tunesmith.ui.shared import Shared, empty


def build(shared: Shared) -> None:
    """Fill the tab."""
    gr.HTML(empty("Nothing here yet.", "This page is being written."), elem_id="plan-empty")
