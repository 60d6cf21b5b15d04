"""Generate: pictures of some classes, shown while they are denoised."""

from __future__ import annotations

import random
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr
from PIL import Image

from launch.studio.content import Studio, settings, solver_of, solvers_of
from launch.studio.parts import QUIET, Controls, sides, tile, tiles, told
from lightningdit_jax.store.space import as_labels
from vavae_jax.common.keys import LAST_SEED

HELP = """
Pictures follow what you change. *Guidance* says how strictly they keep to their class (1: not at
all), from a time between 0, noise, and 1, the picture. More *steps* are slower and more exact. The
address of the page has all settings: share it.
"""
FRAMES = 12
# Of the address, in the order of the controls. A class is there once for each that is chosen.
NAMES = ["class", "guidance", "interval", "solver", "steps", "seed"]
# Reads the address, where it has a setting; a control that it does not name stays as it is.
READ = f"""(...given) => {{
  const link = new URLSearchParams(location.search);
  return {NAMES}.map((name, i) => !link.has(name) ? given[i] : name == "class" ? link.getAll(name)
    : name == "solver" ? link.get(name) : Number(link.get(name)));
}}"""
WRITE = f"""(...given) => {{
  const link = new URLSearchParams(location.search);
  {NAMES}.forEach((name, i) => {{
    link.delete(name);
    [given[i]].flat().forEach((value) => link.append(name, value));
  }});
  history.replaceState(null, "", "?" + link);
  return given;
}}"""


def frames(
  studio: Studio, classes: Sequence[str], *controls: Any, seed: int
) -> Iterator[list[Image.Image]]:
  """The pictures as the model expects them on their way; `controls` are those of `settings`."""
  pipe, labels = studio.model, studio.labels(classes)
  noise = pipe.noise(seed, studio.num)
  return pipe.watch(labels, seed=seed, noise=noise, shown=FRAMES, **settings(*controls))


def command(studio: Studio, classes: Sequence[str], *controls: Any, seed: int) -> tuple[str, str]:
  """(the command, the Python) that give the same pictures."""
  pipe, chosen, labels = studio.model, settings(*controls), studio.labels(classes)
  if pipe.settings().mode == "ODE":
    del chosen["mode"]
  listed = [studio.classes[label] for label in labels] if pipe.class_names else labels
  moved = {"tokenizer": studio.tokenizer} if studio.tokenizer else {}
  of_model, of_samples = (
    "".join(f", {name}={value!r}" for name, value in given.items()) for given in (moved, chosen)
  )
  script = (
    "from lightningdit_jax import Pipeline\n\n"
    f"pipe = Pipeline.load({studio.source!r}{of_model})\n"
    f"pictures = pipe.sample(\n  {listed},\n  seed={seed}{of_samples},\n)\n"
  )
  named = {"guidance": "cfg_scale", "interval_start": "cfg_interval_start", "steps": "num_steps"}
  flags = {
    "workdir": studio.source,
    **moved,
    "output": "samples.npz",
    "num_samples": studio.num,
    "labels": as_labels(listed[: len(classes)]) or "balanced",
    "seed": seed,
    **{named.get(name, name): value for name, value in chosen.items()},
  }
  words = [f"--{name}={shlex.quote(str(value))}" for name, value in flags.items()]
  return " \\\n  ".join(["vavae sample", *words]), script


def controls_of(studio: Studio) -> Controls:
  """Gradio's controls in the order of `NAMES`, as the model brings its settings; not yet placed."""
  own = studio.model.settings()
  hidden: dict[str, Any] = {"render": False}
  return [
    gr.Dropdown(studio.classes, value=[], multiselect=True, label="Classes (none: all)", **hidden),
    gr.Slider(1, max(15.0, own.cfg_scale), own.cfg_scale, step=0.1, label="Guidance", **hidden),
    gr.Slider(0, 1, own.cfg_interval_start, step=0.01, label="Guided from time", **hidden),
    gr.Dropdown(solvers_of(studio.model), value=solver_of(studio.model), label="Solver", **hidden),
    gr.Slider(2, max(100, own.num_steps), own.num_steps, step=1, label="Steps", **hidden),
    gr.Number(0, label="Seed", precision=0, minimum=0, maximum=LAST_SEED, **hidden),
  ]


def build(studio: Studio, page: gr.Blocks, tab: gr.Tab, controls: Controls) -> None:
  """The tab."""

  @told
  def draw(classes: list[str], *rest: Any) -> Iterator[tuple[Any, ...]]:
    *controls, seed = rest
    recipe = command(studio, classes, *controls, seed=seed)
    captions = [studio.classes[label] for label in studio.labels(classes)]
    for count, pictures in enumerate(frames(studio, classes, *controls, seed=seed), 1):
      pieces = [tile(x, text) for x, text in zip(pictures, captions, strict=True)]
      yield tiles(pieces, f"denoising, {min(round(100 * count / FRAMES), 100)} %"), *recipe
    yield tiles(pieces, "done"), *recipe

  asked, shown = sides()
  with asked:
    another = gr.Button("Another seed", variant="primary")
    for control in controls:
      control.render()
    gr.Markdown(HELP)
  with shown:
    pictures = gr.HTML(elem_id="generated")
    with gr.Accordion("Show me the command and the Python", open=False):
      code: dict[str, Any] = {"interactive": False, "wrap_lines": True}
      shell = gr.Code(language="shell", label="Command", **code)
      python = gr.Code(language="python", label="Python", **code)
  drawn: dict[str, Any] = {
    **{"fn": draw, "inputs": controls, "outputs": [pictures, shell, python], "js": WRITE},
    **QUIET,
  }
  gr.on([control.input for control in controls], **drawn)
  seed = another.click(lambda: random.randrange(LAST_SEED), None, controls[-1], **QUIET)
  seed.then(**drawn)
  page.load(None, controls, controls, js=READ).then(**drawn)
