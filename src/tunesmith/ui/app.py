"""The workbench as an ASGI application: Gradio's blocks inside the walls of `security`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Gradio asks a server for its newest version unless this is set before it is imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
from fastapi import FastAPI

from tunesmith.ui import theme
from tunesmith.ui.accounts import Accounts
from tunesmith.ui.choosing import keep_in_step
from tunesmith.ui.keys import PROVIDERS
from tunesmith.ui.pages import PAGES
from tunesmith.ui.security import Access, Limits, Walls
from tunesmith.ui.shared import Shared

WORDS = {"common.complete": "Done"}
"""What Gradio reads aloud when something has ended and has no words for; by itself it says the key."""
KEPT = (600, 6 * 3600)
"""Seconds between two looks at what pages were sent, and after which it goes; uploads are in the workspace by then."""


def blocks(recipe: Mapping[str, Any] | None = None, *, signs_out: bool = False) -> Any:
    """All pages, one tab each. `recipe` is what a page that is opened starts from."""
    with gr.Blocks(title="tunesmith", analytics_enabled=False, fill_width=True, delete_cache=KEPT) as made:
        gr.HTML(theme.HEADER.replace("OUT", theme.SIGN_OUT if signs_out else ""), elem_id="header")
        chosen, run = gr.State(dict(recipe or {})), gr.State(None)
        plans = gr.State(0)
        apart = gr.Column(elem_id="apart")
        with gr.Tabs(elem_id="pages", overflow_behavior="wrap") as tabs:
            shared = Shared(recipe=chosen, run=run, plans=plans, apart=apart, tabs=tabs)
            made_tabs = []
            for page in PAGES:
                name = page.name.lower()
                with gr.Tab(page.name, id=name, elem_id=f"page-{name}") as tab:
                    page.build(shared)
                made_tabs.append(tab)
        keep_in_step(shared, made_tabs)
    return made


def create(
    workspace: Path,
    token: str,
    accounts: Accounts | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    hosts: frozenset[str] = frozenset(),
    limits: Limits | None = None,
    keys: Mapping[str, str] = PROVIDERS,
    runs_code: bool = False,
    recipe: Mapping[str, Any] | None = None,
) -> Walls:
    """The application for an ASGI server; one in a process, as Gradio has one folder for files in a process.

    With accounts the token opens nothing, and each user has a workspace below `workspace/users`.
    """
    limits = limits or Limits()
    workspace = workspace.resolve()
    workspace.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = workspace / ".gradio"
    # What earlier starts left: no page that is open now knows of it.
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(mode=0o700)
    os.environ["GRADIO_TEMP_DIR"] = str(temporary)
    made = blocks(recipe, signs_out=accounts is not None)
    # Events of one kind wait for one another by default, also those of two users.
    made.queue(default_concurrency_limit=4, max_size=100, api_open=False)
    # Gradio's generated pages of routes would load scripts from elsewhere.
    outer = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app = gr.mount_gradio_app(
        outer,
        made,
        path="/",
        server_name=host,
        server_port=port,
        footer_links=[],
        run_history=False,
        allowed_paths=[str(workspace)],
        show_error=False,
        max_file_size=limits.upload_bytes,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        i18n=gr.I18n(en=WORDS),
        theme=theme.theme(),
        css=theme.CSS,
    )
    # Without this a mounted app takes any path of the machine in a form that is sent to it for an uploaded file.
    made.has_launched = True
    return Walls(
        app,
        root=workspace,
        temporary=temporary,
        access=Access(token, accounts, hosts),
        limits=limits,
        keys=keys,
        runs_code=runs_code,
        cookie=f"tunesmith-{port}",
    )
