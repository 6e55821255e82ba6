"""How the workbench looks: one accent, system fonts, light and dark; every colour of text has at least 4.5:1.

Nothing is fetched from elsewhere: no font, no picture, no script.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

PINE = {
    "c50": "#eef7f4", "c100": "#d5ebe4", "c200": "#aed8cb", "c300": "#7cbfac", "c400": "#4aa28b",
    "c500": "#23836d", "c600": "#126a57", "c700": "#0e5647", "c800": "#0d453a", "c900": "#0b3930", "c950": "#05201b",
}  # fmt: skip
STONE = {
    "c50": "#fafaf8", "c100": "#f3f3f0", "c200": "#e4e4df", "c300": "#cfcfc8", "c400": "#9b9b93",
    "c500": "#6b6b64", "c600": "#53534d", "c700": "#3e3e39", "c800": "#282825", "c900": "#1c1c1a", "c950": "#131311",
}  # fmt: skip
SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Liberation Sans", "DejaVu Sans", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "Liberation Mono", "monospace")


def theme() -> Any:
    """Gradio's theme in our colours."""
    from gradio.themes import Base, Color
    from gradio.themes.utils import sizes

    return Base(
        primary_hue=Color(name="pine", **PINE),
        secondary_hue=Color(name="pine", **PINE),
        neutral_hue=Color(name="stone", **STONE),
        font=SANS,
        font_mono=MONO,
        radius_size=sizes.radius_sm,
        spacing_size=sizes.spacing_md,
        text_size=sizes.text_md,
    ).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        body_text_color="*neutral_900",
        body_text_color_dark="*neutral_100",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        background_fill_primary="white",
        background_fill_primary_dark="*neutral_900",
        background_fill_secondary="*neutral_100",
        background_fill_secondary_dark="*neutral_800",
        border_color_primary="*neutral_300",
        border_color_primary_dark="*neutral_700",
        block_background_fill="white",
        block_background_fill_dark="*neutral_900",
        block_border_width="1px",
        block_shadow="none",
        block_label_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_200",
        block_title_text_color="*neutral_800",
        block_title_text_color_dark="*neutral_100",
        block_title_text_weight="600",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        input_border_width="1px",
        button_border_width="1px",
        button_border_width_dark="1px",
        button_large_text_weight="600",
        button_medium_text_weight="600",
        input_background_fill="white",
        input_background_fill_dark="*neutral_950",
        input_border_color="*neutral_400",
        input_border_color_dark="*neutral_600",
        input_border_color_focus="*primary_600",
        input_border_color_focus_dark="*primary_300",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_500",
        button_primary_text_color="white",
        button_primary_text_color_dark="white",
        button_secondary_background_fill="white",
        button_secondary_background_fill_dark="*neutral_800",
        button_secondary_border_color="*neutral_300",
        button_secondary_border_color_dark="*neutral_600",
        button_secondary_text_color="*neutral_900",
        button_secondary_text_color_dark="*neutral_100",
        link_text_color="*primary_700",
        link_text_color_dark="*primary_300",
        link_text_color_hover="*primary_800",
        link_text_color_hover_dark="*primary_200",
        link_text_color_visited="*primary_700",
        link_text_color_visited_dark="*primary_300",
        link_text_color_active="*primary_800",
        link_text_color_active_dark="*primary_200",
        color_accent_soft="*primary_50",
        color_accent_soft_dark="*primary_950",
        checkbox_background_color_selected="*primary_600",
        checkbox_background_color_selected_dark="*primary_600",
        slider_color="*primary_600",
        slider_color_dark="*primary_400",
        stat_background_fill="*primary_300",
        table_even_background_fill="white",
        table_even_background_fill_dark="*neutral_900",
        table_odd_background_fill="*neutral_50",
        table_odd_background_fill_dark="*neutral_950",
    )


INK = "#7a7a73"
"""Of a plot's text where the page's own colour does not reach it."""
LINES = "rgba(125,125,118,.25)"
SERIES = ("#1f7fb8", "#c9651a", "#23836d", "#8250df", "#c2255c", "#7d8590", "#0b7285", "#936900")
"""Colours of curves and bars, to be told apart on light and dark ground."""


def plain_layout(height: int) -> dict[str, Any]:
    """What the layouts of all plots have in common.

    The margins hold what most axes have written at them: a plot whose margins have to grow is drawn twice.
    """
    axis = {"gridcolor": LINES, "zerolinecolor": LINES, "automargin": True}
    return {
        "height": height,
        "margin": {"t": 44, "r": 16, "b": 46, "l": 60}, "font": {"color": INK, "size": 12, "family": ", ".join(SANS)},
        "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "xaxis": dict(axis), "yaxis": dict(axis),
        "hovermode": "closest",
    }  # fmt: skip


def plot_title(text: str) -> dict[str, Any]:
    """A plot's title, where all have it."""
    return {"text": text, "x": 0, "pad": {"l": 12}, "font": {"size": 14}}


HEADER = """<div class="ts-header"><span class="ts-mark" aria-hidden="true"></span>
<h1>tunesmith</h1><p>Fine-tune on your own examples, and prove that it got better.</p>OUT</div>"""
SIGN_OUT = (
    '<form method="post" action="/logout"><button type="submit" class="ts-out">Sign out</button></form>'
)

CSS = """
.gradio-container { --ts-good: #126a57; --ts-warn: #8a5a00; --ts-bad: #a32a1f; --ts-note: #31577e; }
.dark .gradio-container, .gradio-container.dark, .dark { --ts-good: #7cbfac; --ts-warn: #e3b25c; --ts-bad: #f0a196;
  --ts-note: #9dc1e6; }
.gradio-container { max-width: 1360px !important; width: 100% !important; margin: 0 auto !important;
  padding: 0 clamp(8px, 2vw, 20px) 48px !important; box-sizing: border-box; }
.gradio-container > .main { padding-inline: clamp(0px, (100vw - 640px) / 10, 32px) !important; }
.gradio-container .html-container { padding: 0 !important; }
.gradio-container .gr-group, .gradio-container .gr-group > .styler, .gradio-container .styler {
  background: var(--block-background-fill) !important; }
.gradio-container .label-wrap > span:first-child { font-weight: 600; }
.gradio-container button.lg { font-size: 0.95rem; padding: 7px 18px; }
.gradio-container .row > button.lg { flex: 0 1 auto !important; min-width: min(100%, 170px) !important;
  align-self: end; }
.gradio-container .row:has(> .block, > .form) > button.lg { margin-bottom: 10px; }
#ship-ways { align-items: stretch !important; }
#ship-ways > div { display: flex; flex-direction: column; }
#ship-ways > div > button { margin-top: auto; flex-grow: 0; align-self: flex-start; width: auto; min-width: 170px; }
#recipe-aside .row > button.lg { min-width: 120px !important; }
@media (min-width: 1000px) { #recipe-aside { position: sticky; top: 12px; align-self: flex-start; } }

/* Tables: the page's own letters, columns that wrap, nothing of a table without rows. */
.gradio-container .block:has(> .table-container.no-rows),
.gradio-container .ts-with-table:has(.table-container.no-rows) { display: none !important; }
.gradio-container .table-wrap { --df-max-col-width: 360px !important; }
.gradio-container .table-wrap, .gradio-container .table-wrap * {
  font-family: var(--font) !important; font-size: 0.88rem; overflow-wrap: anywhere; }
.gradio-container .table-wrap th * { overflow-wrap: normal; word-break: normal; }
.gradio-container .table-wrap th span { font-weight: 600; color: var(--body-text-color-subdued); }
.gradio-container .table-wrap .cell-menu-button, .gradio-container .table-wrap .selection-button { display: none; }
.gradio-container .table-container .label p { font-size: 0.85rem; color: var(--body-text-color-subdued); }

/* Gradio leaves a list open that the Tab key has left. */
.gradio-container .block:not(:focus-within) ul[role=listbox] { display: none !important; }

/* Commands to copy look like commands, and stay away until there is one; so do parts that wait for a choice. */
.gradio-container [id$=-command] textarea { font-family: var(--font-mono) !important; font-size: 0.85rem;
  background: var(--background-fill-secondary); border-color: var(--border-color-primary); }
.gradio-container :is([id$=-command], .ts-late) textarea { field-sizing: content; height: auto !important;
  max-height: 20rem; }
.gradio-container .ts-late:has(textarea:placeholder-shown),
.gradio-container .form:has(> .ts-late:only-child textarea:placeholder-shown),
[id$=-told]:not(:has(.ts-box)), #page-evaluate:not(:has(#evaluate-count p)) #evaluate-every,
#page-runs:has(#runs-about .ts-empty) #runs-work { display: none !important; }
#train-plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)); gap: 12px; }
.gradio-container .block:has(.js-plotly-plot) { padding: 4px 8px 10px !important; }
.gradio-container .js-plotly-plot text { fill: var(--body-text-color) !important; }
.gradio-container .js-plotly-plot .hoverlayer text { fill: #fff !important; }
.gradio-container .js-plotly-plot .hoverlayer path { fill: #282825 !important; stroke: #9b9b93 !important; }
.gradio-container .js-plotly-plot .modebar { display: none; }
.gradio-container .block:has([aria-label="Empty value"]) { display: none; }
.gradio-container .cm-line, .gradio-container .cm-line span { color: var(--body-text-color) !important; }
/* What Gradio lays over a place for files that refused one says only "Error". */
.gradio-container .block:has(.upload-container) .wrap:has(> .error) { display: none; }
.ts-refused { border: 1px solid var(--border-color-primary); border-left: 4px solid var(--ts-bad); border-radius: 4px;
  padding: 10px 14px; margin: 0; background: var(--background-fill-primary); overflow-wrap: anywhere; }
.ts-fault { border-left: 3px solid var(--ts-bad) !important; }
@media (min-width: 1000px) {
  [id^=recipe-section-] .form { display: grid !important; grid-template-columns: 1fr 1fr; align-items: stretch;
    background: var(--block-background-fill); }
}
.ts-header { display: flex; align-items: baseline; gap: 10px; padding: 18px 0 4px; flex-wrap: wrap; }
.ts-header h1 { font-size: 1.3rem; font-weight: 650; letter-spacing: -0.01em; margin: 0; }
.ts-header p { margin: 0; color: var(--body-text-color-subdued); font-size: 0.92rem; }
.ts-header form { margin-left: auto; }
.ts-mark { width: 12px; height: 12px; border-radius: 3px; background: var(--primary-600); transform: rotate(45deg);
  display: inline-block; }
.ts-out { border: 1px solid var(--border-color-primary); border-radius: 4px; padding: 4px 12px; cursor: pointer; }

.ts-box { border: 1px solid var(--border-color-primary); border-left: 4px solid var(--ts-note); border-radius: 4px;
  padding: 12px 16px; background: var(--background-fill-primary); overflow-wrap: anywhere; }
.ts-box strong { display: block; font-weight: 600; }
.ts-box p { margin: 6px 0 0; white-space: pre-wrap; color: var(--body-text-color); }
.ts-box.ts-problem { border-left-color: var(--ts-bad); }
.ts-box.ts-problem strong { color: var(--ts-bad); }
.ts-box.ts-good { border-left-color: var(--ts-good); }
.ts-box.ts-good strong { color: var(--ts-good); }
.ts-box.ts-warn { border-left-color: var(--ts-warn); }
.ts-box.ts-warn strong { color: var(--ts-warn); }
.ts-box.ts-empty { border: 1px dashed var(--border-color-primary); text-align: center; padding: 28px 16px; }
.ts-box.ts-empty p { color: var(--body-text-color-subdued); }
.ts-box.ts-busy { border-left-color: var(--primary-600); }
.ts-box.ts-busy strong { font-weight: 500; }
.ts-box.ts-busy i { display: block; height: 3px; margin-top: 10px; border-radius: 2px; overflow: hidden;
  background: linear-gradient(90deg, transparent, var(--primary-600), transparent) 0 0 / 40% 100% no-repeat,
  var(--border-color-primary); animation: ts-moves 1.6s linear infinite; }
@keyframes ts-moves { from { background-position: -60% 0, 0 0; } to { background-position: 160% 0, 0 0; } }
.ts-box + .ts-box { margin-top: 8px; }
.ts-parts { display: flex; flex-wrap: wrap; gap: 4px 20px; list-style: none !important; margin: 4px 0 0;
  padding: 0 !important; font-size: 0.9rem; }
.ts-parts li { list-style: none !important; margin: 0; white-space: nowrap; }
.ts-parts i { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 6px; }
.ts-quiet { color: var(--body-text-color-subdued); }
.ts-number { font-variant-numeric: tabular-nums; }

.ts-status { border: 1px solid var(--border-color-primary); border-radius: 4px; padding: 12px 16px;
  background: var(--background-fill-primary); }
.ts-status strong { font-weight: 600; }
.ts-status progress { display: block; appearance: none; width: 100%; height: 8px; margin: 8px 0; border: 0;
  border-radius: 4px; overflow: hidden; background: var(--border-color-primary); }
.ts-status progress::-webkit-progress-bar { background: var(--border-color-primary); }
.ts-status progress::-webkit-progress-value { background: var(--primary-600); }
.ts-status progress::-moz-progress-bar { background: var(--primary-600); }
.ts-status dl { display: flex; flex-wrap: wrap; gap: 8px 28px; margin: 6px 0 0; }
.ts-status dt { font-size: 0.8rem; color: var(--body-text-color-subdued); }
.ts-status dd { margin: 0; font-variant-numeric: tabular-nums; }
.ts-box pre { margin: 8px 0 0; white-space: pre-wrap; font-size: 0.85rem; max-height: 320px; overflow-y: auto; }
.ts-talk { display: flex; flex-direction: column; gap: 10px; }
.ts-turn, .ts-answer { border: 1px solid var(--border-color-primary); border-radius: 4px; padding: 8px 14px;
  background: var(--background-fill-primary); overflow-wrap: anywhere; }
.ts-turn.ts-user { background: var(--color-accent-soft); align-self: flex-end; max-width: 85%; }
.ts-turn span, .ts-answer span { font-size: 0.8rem; color: var(--body-text-color-subdued); }
.ts-turn p, .ts-answer p { margin: 2px 0 0; white-space: pre-wrap; color: var(--body-text-color); }
.ts-both { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 280px), 1fr)); gap: 10px; }

.gradio-container :is(button, a, input, select, textarea, summary, [role=tab], [tabindex]):focus-visible {
  outline: 2px solid var(--primary-500) !important; outline-offset: 2px; }
.gradio-container button[role=tab] { font-size: 0.98rem; color: var(--body-text-color-subdued); }
.gradio-container button[role=tab][aria-selected=true] { color: var(--body-text-color); font-weight: 600; }
.gradio-container pre, .gradio-container code { overflow-wrap: anywhere; }
footer, #apart { display: none !important; }

/* In a media query Gradio puts its own container before every selector, so none here begins with it. */
@media (max-width: 640px) {
  .ts-header p { display: none; }
  .row { flex-wrap: wrap; }
  .row > * { min-width: min(100%, 260px) !important; }
  button.lg { min-height: 40px; }
  .row > button.lg { flex: 1 1 auto !important; margin-bottom: 0 !important; }
  .form { flex-direction: column !important; }
  .form > .block { min-width: 100% !important; }
  button[role=tab] { padding: 0 8px; font-size: 0.92rem; }
  .table-container { overflow-x: auto; }
  /* Of an answer's line its number, its question and both answers, 71 % of the columns; a touch shows all of it. */
  #evaluate-answers .table-container { overflow-x: hidden; }
  #evaluate-answers .table-wrap { min-width: 141%; }
  #evaluate-answers .header-table { width: auto !important; min-width: 0 !important; align-self: flex-start; }
  #evaluate-answers tr > :nth-child(2n+3), #evaluate-answers .virtual-row > :nth-child(2n+3) { display: none; }
  #evaluate-answers .first-column { padding-inline: 3px !important; }
  .table-container .header-row { flex-wrap: wrap; height: auto; }
  .table-container .header-row .label { min-width: 12rem; }
}
@media (prefers-reduced-motion: reduce) {
  * { animation-duration: 0.01ms !important; transition-duration: 0.01ms !important; }
}
"""

_NAMES = """
new MutationObserver(() => document.querySelectorAll("input[title]:not([aria-label])").forEach(
  (field) => field.setAttribute("aria-label", field.title))).observe(
  document.documentElement, {childList: true, subtree: true});"""
"""Fields of Gradio's that have a tooltip only get it as their name."""
_FITTED = """
addEventListener("click", (event) => event.target.closest?.("[role=tab]")
  && setTimeout(() => dispatchEvent(new Event("resize")), 100));"""
"""A plot follows the window's width only while it is shown: one that comes into sight is told of it."""
_REFUSED = """
{
  const told = "p.ts-refused";
  let zone = null;
  const used = (event) => {
    if (event.type === "change" && event.target.type !== "file") return;
    zone = event.target.closest?.(".block:has(.upload-container)") ?? null;
    zone?.parentNode.querySelector(told)?.remove();
  };
  addEventListener("change", used, true);
  addEventListener("drop", used, true);
  const inWords = (said) => {
    const sent = said.match(/^HTTP \\d+: (\\{.*\\})$/s);
    try { if (sent) return JSON.parse(sent[1]).detail; } catch {}
    if (said.startsWith("File(s) exceed")) return said + ". TOO_LARGE";
    return said.startsWith("Invalid file type") ? said + " Convert it, or choose another file." : null;
  };
  new MutationObserver(() => document.querySelectorAll("[data-testid=toast-text]").forEach((toast) => {
    const words = inWords(toast.textContent.trim());
    if (words === null || toast.dataset.told) return;
    toast.dataset.told = "yes";
    toast.textContent = words;
    if (!zone) return;
    zone.parentNode.querySelector(told)?.remove();
    const box = document.createElement("p");
    box.className = "ts-refused";
    box.setAttribute("role", "alert");
    box.textContent = words;
    zone.after(box);
  })).observe(document.documentElement, {childList: true, subtree: true});
}""".replace("TOO_LARGE", "Upload a part of it, or put it into the workspace's folder uploads on the server.")
"""Gradio tells for ten seconds, as it came from the server, why an upload was refused. In plain words it stays below
the place for files until the next one is chosen."""
_EARLY = """
addEventListener("load", () => {
  const ahead = document.createElement("link");
  ahead.rel = "modulepreload";
  ahead.href = "PLOTLY";
  document.head.append(ahead);
  const idle = window.requestIdleCallback ?? setTimeout;
  const later = () => document.querySelector("[role=tab]") ? idle(() => import("PLOTLY")) : setTimeout(later, 100);
  later();
});"""
"""Gradio fetches Plotly's 4.6 MB when the first plot is shown. So they are fetched with the page, and run once its tabs
are there and nothing else is to do."""


@functools.cache
def head() -> str:
    """What the pages have in their head beside Gradio's own."""
    import gradio

    assets = Path(gradio.__file__).parent / "templates" / "frontend" / "assets"
    # None where another version of Gradio names it otherwise: plots are there then all the same, later.
    plotly = [f"/assets/{found.name}" for found in assets.glob("PlotlyPlot-*.js")]
    return f"<script>{_NAMES}{_FITTED}{_REFUSED}{''.join(_EARLY.replace('PLOTLY', at) for at in plotly)}\n</script>"


_PLAIN = """<style nonce="NONCE">
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; margin: 0;
  min-height: 100vh; display: grid; place-items: center; background: #fafaf8; color: #1c1c1a; }
main { width: min(22rem, calc(100vw - 3rem)); }
h1 { font-size: 1.3rem; margin: 0 0 1rem; }
label { display: block; margin: 0.8rem 0 0.2rem; font-weight: 600; font-size: 0.92rem; }
input { width: 100%; box-sizing: border-box; font: inherit; padding: 0.5rem 0.6rem; border: 1px solid #6b6b64;
  border-radius: 4px; background: #fff; color: inherit; }
button { margin-top: 1.2rem; font: inherit; font-weight: 600; width: 100%; padding: 0.55rem; border: 0;
  border-radius: 4px;
  background: #126a57; color: #fff; cursor: pointer; }
:focus-visible { outline: 2px solid #23836d; outline-offset: 2px; }
p[role=alert] { border-left: 4px solid #a32a1f; padding: 0.2rem 0.8rem; margin: 0 0 1rem; }
@media (prefers-color-scheme: dark) { body { background: #131311; color: #f3f3f0; } input { background: #1c1c1a; }
  p[role=alert] { border-color: #f0a196; } }
</style>"""

LOGIN = f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>tunesmith: sign in</title>
<meta name="viewport" content="width=device-width, initial-scale=1">{_PLAIN}</head><body><main><h1>tunesmith</h1>ALERT
<form method="post" action="/login">
<label for="name">Name</label><input id="name" name="name" autocomplete="username" required autofocus maxlength="32">
<label for="password">Password</label>
<input id="password" name="password" type="password" autocomplete="current-password" required maxlength="200">
<button type="submit">Sign in</button></form></main></body></html>"""
"""The page that asks for name and password; NONCE and ALERT are put in."""

CLOSED_PAGE = f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>tunesmith</title>
<meta name="viewport" content="width=device-width, initial-scale=1">{_PLAIN}</head><body><main><h1>tunesmith</h1>
<p>SAID</p></main></body></html>"""
"""The page for somebody without a token; NONCE and SAID are put in."""
