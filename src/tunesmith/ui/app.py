"""The workbench as an ASGI application: Gradio's blocks inside the walls of `security`."""

from __future__ import annotations

import os
from typing import Any

# Gradio asks a server for its newest version unless this is set before it is imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr

from tunesmith.ui.pages import PAGES
from tunesmith.ui.shared import Shared


def blocks() -> Any:
    """All pages, one tab each."""
    with gr.Blocks(title="tunesmith", analytics_enabled=False, fill_width=True) as made:
        recipe, run = gr.State({}), gr.State(None)
        with gr.Tabs(elem_id="pages") as tabs:
            shared = Shared(recipe=recipe, run=run, tabs=tabs)
            for page in PAGES:
                name = page.name.lower()
                with gr.Tab(page.name, id=name, elem_id=f"page-{name}"):
                    page.build(shared)
    return made
