"""The page: its tabs, its looks, and the server, which asks nothing of any other host."""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import fastapi
import gradio as gr
import uvicorn

from launch.studio import between, compare, generate, reconstruct, space, training
from launch.studio.parts import Studio
from lightningdit_jax.pipeline import Pipeline
from lightningdit_jax.store.latents import LatentStore
from vavae_jax import folder
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import place

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


def open_studio(
  model: str,
  *,
  tokenizer: str = "",
  latents: str = "",
  workdirs: Sequence[Path] = (),
  second: str = "",
  num: int = 12,
  is_local: bool = True,
) -> Studio:
  """Loads what a page is about; the arguments are the command's, errors as of `Pipeline.load`.

  A model that is a workdir brings its latents and itself to follow, where it is not told.
  """
  for workdir in workdirs:
    if not workdir.is_dir():
      raise InputError(f"--workdir={workdir} does not exist.")
  pipe = Pipeline.load(model, tokenizer=tokenizer) if model else None
  if pipe and not folder.is_model(path := folder.find(model)):
    latents = latents or folder.workdir_config(path, "diffusion").latents.path
    workdirs = workdirs or [path, *_made_by(pipe)]
    latents = latents if Path(latents).exists() else ""  # gone since, as a tab then says
  store = LatentStore(place(latents)) if latents else None
  if pipe and store and store.shape[-1] != pipe.tokenizer.channels:
    raise InputError(
      f"The latents of {latents} have {store.shape[-1]} channels, those of the model "
      f"{pipe.tokenizer.channels}: they are of another tokenizer. Give --latents=STORE of this one."
    )
  return Studio(model, pipe, second, store, workdirs, num, is_local)


def _made_by(pipe: Pipeline) -> list[Path]:
  """The workdir of a model's tokenizer, where it is still there."""
  path = Path(pipe.space.tokenizer.get("workdir", ""))
  return [path] if (path / "metrics.jsonl").is_file() else []


def compose(studio: Studio) -> gr.Blocks:
  """All tabs; one that lacks its data says which flag gives them."""
  with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as page:
    about = f"<small>{escape(studio.source)}</small>" if studio.source else ""
    gr.HTML(f"<h1>{TITLE} {about}</h1>")
    controls = generate.controls_of(studio) if studio.pipe else []
    with gr.Tabs(elem_id="tabs") as tabs:
      for name, module, needs in _TABS:
        with gr.Tab(name, id=name) as tab:
          lacking = [_NEEDS[need] for need in needs if not has(studio, need)]
          if lacking:
            gr.Markdown(f"This tab needs {', and '.join(lacking)}.", elem_classes="lacking")
          else:
            module.build(studio, page, tab, controls)
        tab.select(None, js=_WRITE_TAB.replace("NAME", name))
    page.load(_opened, None, tabs, show_progress="hidden")
  return page


def has(studio: Studio, need: str) -> bool:
  """Whether a page has what a tab needs."""
  value = getattr(studio, need)
  return bool(value) if need == "workdirs" else value is not None


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


def is_local(host: str) -> bool:
  """Whether nobody but this machine can reach an address; InputError if it is none."""
  try:
    return all(ipaddress.ip_address(x[4][0]).is_loopback for x in socket.getaddrinfo(host, None))
  except OSError as error:
    raise InputError(f"--host={host} is no address of this machine ({error}).") from error


def listen(host: str, port: int) -> socket.socket:
  """A socket at an address, the port 0 for any that is free; InputError where there is none."""
  family = socket.AF_INET6 if ":" in host else socket.AF_INET
  try:
    return socket.create_server((host, port), family=family)
  except OSError as error:
    raise InputError(
      f"--host={host} --port={port} cannot be used ({error}); give another port, or 0 for any."
    ) from error


def serve(studio: Studio, listening: socket.socket) -> uvicorn.Server:
  """The server of a page, which `run(sockets=[listening])` starts; it compiles meanwhile."""
  host, port = listening.getsockname()[:2]
  app = application(studio, host, port)
  if studio.pipe:
    threading.Thread(target=generate.warm_up, args=[studio], daemon=True).start()
  return uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
