"""Generate: pictures of some classes, shown while they are denoised."""

from __future__ import annotations

import random
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr
from PIL import Image

from launch.studio.content import SOLVERS, Studio, settings
from launch.studio.parts import QUIET, Controls, tile, tiles, told
from vavae_jax.common.keys import LAST_SEED

HELP = """
Pictures follow what you change. *Guidance* says how strictly they keep to their class (1: not at
all), from a time between 0, noise, and 1, the picture. More *steps* are slower and more exact. The
address of the page has all settings: share it.
"""
FRAMES = 12
# Of the address, in the order of the controls. A class is there once for each that is chosen.
NAMES = ("class", "guidance", "interval", "solver", "steps", "seed")
# Reads the address, where it has a setting; a control that it does not name stays as it is.
READ = """(...given) => {
  const link = new URLSearchParams(location.search);
  return NAMES.map((name, i) => !link.has(name) ? given[i] : name == "class" ? link.getAll(name)
    : name == "solver" ? link.get(name) : Number(link.get(name)));
}"""
WRITE = """(...given) => {
  const link = new URLSearchParams(location.search);
  NAMES.forEach((name, i) => {
    link.delete(name);
    [given[i]].flat().forEach((value) => link.append(name, value));
  });
  history.replaceState(null, "", "?" + link);
  return given;
}"""


def with_names(script: str) -> str:
  """A script of the page with the names of the address."""
  return script.replace("NAMES", str(list(NAMES)))


def frames(
  studio: Studio, classes: Sequence[str], *controls: Any, seed: int
) -> Iterator[list[Image.Image]]:
  """The pictures as the model expects them on their way; `controls` are those of `settings`."""
  labels = studio.labels(classes)
  return studio.model.watch(labels, seed=seed, shown=FRAMES, **settings(*controls))


def command(studio: Studio, classes: Sequence[str], *controls: Any, seed: int) -> tuple[str, str]:
  """(the command, the Python) that give the same pictures."""
  chosen = settings(*controls)
  labels = ",".join(str(label) for label in studio.labels(classes)[: len(classes) or None])
  own = studio.model.settings()
  if own.mode == "ODE":
    del chosen["mode"]
  named = {"guidance": "cfg_scale", "interval_start": "cfg_interval_start", "steps": "num_steps"}
  flags = {
    "workdir": studio.source,
    "output": "samples.npz",
    "num_samples": studio.num,
    "labels": labels if classes else "balanced",
    "seed": seed,
  } | {named.get(name, name): value for name, value in chosen.items()}
  words = [f"--{name}={shlex.quote(str(value))}" for name, value in flags.items()]
  given = "".join(f", {name}={value!r}" for name, value in chosen.items())
  names = studio.classes()
  listed: list[Any] = [names[label] for label in studio.labels(classes)]
  if not studio.model.class_names:
    listed = [int(name) for name in listed]
  script = (
    "from lightningdit_jax import Pipeline\n\n"
    f"pipe = Pipeline.load({studio.source!r})\n"
    f"pictures = pipe.sample(\n  {listed!r},\n  seed={seed}{given},\n)\n"
  )
  return " \\\n  ".join(["vavae sample", *words]), script


def shown(pictures: Sequence[Image.Image], labels: Sequence[int], studio: Studio, note: str) -> str:
  """Pictures with the names of their classes."""
  names = studio.classes()
  return tiles(
    (tile(x, names[label]) for x, label in zip(pictures, labels, strict=True)),
    note,
  )


def controls_of(studio: Studio) -> Controls:
  """Gradio's controls in the order of `NAMES`, as the model brings its settings; not yet placed."""
  own = studio.model.settings()
  hidden: dict[str, Any] = {"render": False}
  names, solver = studio.classes(), own.method if own.method in SOLVERS else SOLVERS[0]
  return [
    gr.Dropdown(names, value=[], multiselect=True, label="Classes (none: all)", **hidden),
    gr.Slider(1, max(15.0, own.cfg_scale), own.cfg_scale, step=0.1, label="Guidance", **hidden),
    gr.Slider(0, 1, own.cfg_interval_start, step=0.01, label="Guided from time", **hidden),
    gr.Dropdown(SOLVERS, value=solver, label="Solver", **hidden),
    gr.Slider(2, max(100, own.num_steps), own.num_steps, step=1, label="Steps", **hidden),
    gr.Number(0, label="Seed", precision=0, minimum=0, maximum=LAST_SEED, **hidden),
  ]


def build(studio: Studio, page: gr.Blocks, tab: gr.Tab, controls: Controls) -> None:
  """The tab."""

  @told
  def draw(classes: list[str], *rest: Any) -> Iterator[str]:
    *controls, seed = rest
    labels = studio.labels(classes)
    for count, pictures in enumerate(frames(studio, classes, *controls, seed=seed), 1):
      done = min(round(100 * count / FRAMES), 100)
      yield shown(pictures, labels, studio, f"denoising, {done} %")
    yield shown(pictures, labels, studio, "done")

  @told
  def recipe(classes: list[str], *rest: Any) -> tuple[str, str]:
    *controls, seed = rest
    return command(studio, classes, *controls, seed=seed)

  with gr.Row(elem_classes="pictures-first"):
    with gr.Column(scale=1, min_width=280):
      another = gr.Button("Another seed", variant="primary")
      for control in controls:
        control.render()
      gr.Markdown(HELP)
    with gr.Column(scale=2, min_width=320):
      pictures = gr.HTML(elem_id="generated")
      with gr.Accordion("Show me the command and the Python", open=False):
        shell = gr.Code(language="shell", label="Command", interactive=False)
        python = gr.Code(language="python", label="Python", interactive=False)
  changed = [control.input for control in controls]
  gr.on(changed, draw, controls, pictures, **QUIET)
  gr.on(changed, recipe, controls, [shell, python], js=with_names(WRITE), **QUIET)
  drawn = another.click(lambda: random.randrange(LAST_SEED), None, controls[-1], **QUIET)
  drawn.then(draw, controls, pictures, **QUIET)
  drawn.then(recipe, controls, [shell, python], js=with_names(WRITE), **QUIET)
  read = page.load(None, controls, controls, js=with_names(READ))
  read.then(draw, controls, pictures, **QUIET)
  read.then(recipe, controls, [shell, python], **QUIET)
