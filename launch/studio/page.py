"""The page: its tabs, its looks, and the server, which asks nothing of any other host."""

from __future__ import annotations

import socket
from html import escape
from pathlib import Path
from typing import Any

import fastapi
import gradio as gr
import uvicorn

from launch.studio import between, compare, generate, reconstruct, space, training
from launch.studio.content import Studio

TITLE = "VA-VAE studio"
_NEEDS = {
  "pipe": "a model: start the studio with `--model=MODEL`, a model folder, a workdir, or USER/NAME",
  "store": "latents: start the studio with `--latents=STORE`, a folder that `vavae encode` wrote",
  "workdirs": "a training: start the studio with `--workdir=WORKDIR`, which may be under way",
}
# name, module, what it needs
_TABS: tuple[tuple[str, Any, tuple[str, ...]], ...] = (
  ("Generate", generate, ("pipe",)),
  ("Reconstruct", reconstruct, ("pipe",)),
  ("Between", between, ("pipe",)),
  ("Latent space", space, ("pipe", "store")),
  ("Training", training, ("workdirs",)),
  ("Compare", compare, ("pipe",)),
)
_FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Arial", "sans-serif")
_MONO = ("ui-monospace", "Menlo", "Consolas", "monospace")
# The first time is the page's own choice of its first tab, before that of the address is taken.
_WRITE_TAB = """() => {
  const link = new URLSearchParams(location.search);
  if (!window.studioOpened && link.has("tab")) return void (window.studioOpened = true);
  link.set("tab", "NAME");
  history.replaceState(null, "", "?" + link);
}"""


def compose(studio: Studio) -> gr.Blocks:
  """All tabs; one that lacks its data says which flag gives them."""
  with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as page:
    about = f"<small>{escape(studio.source)}</small>" if studio.source else ""
    gr.HTML(f"<h1>{TITLE} {about}</h1>")
    controls = generate.controls_of(studio) if studio.pipe else []
    with gr.Tabs(elem_id="tabs") as tabs:
      for name, module, needs in _TABS:
        with gr.Tab(name, id=name) as tab:
          lacking = [_NEEDS[need] for need in needs if getattr(studio, need) in (None, (), [])]
          if lacking:
            gr.Markdown(f"This tab needs {', and '.join(lacking)}.", elem_classes="lacking")
          else:
            module.build(studio, page, tab, controls)
        tab.select(None, js=_WRITE_TAB.replace("NAME", name))
    page.load(_opened, None, tabs, show_progress="hidden")
  return page


def _opened(request: gr.Request) -> Any:
  """The tab that the address names."""
  name = request.query_params.get("tab")
  return gr.Tabs(selected=name) if name in [tab[0] for tab in _TABS] else gr.skip()


def application(studio: Studio, host: str, port: int) -> fastapi.FastAPI:
  """What serves the page."""
  return gr.mount_gradio_app(
    fastapi.FastAPI(),
    compose(studio),
    path="/",
    server_name=host,
    server_port=port,
    theme=gr.themes.Base(primary_hue="indigo", font=_FONT, font_mono=_MONO),
    css_paths=Path(__file__).parent / "studio.css",
    footer_links=[],
    run_history=False,
    mcp_server=False,
    ssr_mode=False,
    pwa=False,
    enable_monitoring=False,
    max_file_size="64mb",
  )


def serve(studio: Studio, listening: socket.socket) -> uvicorn.Server:
  """The server of a page, which `run(sockets=[listening])` starts."""
  host, port = listening.getsockname()[:2]
  app = application(studio, host, port)
  return uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
