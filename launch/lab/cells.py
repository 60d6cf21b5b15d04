r"""Latents of published tokenizers: how they are spread, and how fast a small flow learns them.

  DEMOS=LIGHTNINGDIT/tools/latent_demos
  python -m launch.lab.cells --latents=plain:$DEMOS/latents_cache_f16d32.pt \
    --latents=DINOv2:$DEMOS/latents_cache_f16d32_vfdinov2.pt \
    --workdir=runs/cells --page=docs/lab/cells.md

Each --latents is NAME: and what launch.evaluate latents takes; a checkout of hustvl/LightningDiT
has the two above, 10,000 normalised cells of each tokenizer. Of each the figures of launch.evaluate
latents are made, over --runs t-SNEs. Then a small network (residual, --width wide) learns single
cells by the recipe's transport, times, losses and sampler, for --seeds seeds, and its samples are
compared with cells that were held out: Frechet distance, energy distance, and the share of samples
and cells whose nearest neighbour is of their own kind. A fitted Gaussian and training cells stand
beside it as controls. Single cells are no pictures: nothing here says how pictures look.

What is done is kept in --workdir, and the same command goes on; the page has tables and pictures.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from flax import nnx
from PIL import Image

from launch.engine import command_line, console
from launch.engine.circumstances import circumstances, whole_command
from launch.engine.ownership import owned
from launch.evaluation import space
from launch.evaluation.cells import Cells, open_cells
from launch.evaluation.output import Output
from launch.lab.markdown import Region, beside, picture, table
from launch.report import plots
from lightningdit_jax import sampling, transport
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import atomic_file, place, read_note, write_json
from vavae_jax.common.keys import LAST_SEED
from vavae_jax.metrics.distribution import Gaussian
from vavae_jax.metrics.energy import energy_distance, told_apart

REGION = Region(
  "<!-- cells: written by launch.lab.cells -->", "<!-- end of the cells -->", "Published latents"
)
STEPS = (250, 500, 1000, 2000, 4000, 8000)  # after which samples are drawn
HELD_OUT = 0.2  # share of the cells
BATCH = 256
LEARNING_RATE = 1e-3
DECAY = 0.995  # of the average that is sampled, less in the first 1,790 steps
MAPS = 0.75  # side of the page's maps, of those that launch.evaluate draws
GRID = 50  # points of the Euler solver, shifted as in the recipe
FIGURES = {"frechet": "Frechet distance", "energy": "energy distance", "told": "told apart"}
# Density CV, Gini and normalised entropy in the paper's table 6, f16d32.
PAPER = {"plain": (0.263, 0.145, 0.995), "DINOv2": (0.178, 0.096, 0.998)}
Results = dict[str, Any]


class Settings(NamedTuple):
  """How much is done."""

  runs: int = 10  # of t-SNE
  seeds: int = 3  # of the flow
  seed: int = 0  # the first
  width: int = 256  # of the flow


class Flow(nnx.Module):
  """The velocity [B,1,1,Z] of single cells: three residual layers on the cell and its time."""

  def __init__(self, channels: int, width: int, rngs: nnx.Rngs):
    self.enter = nnx.Linear(channels, width, rngs=rngs)
    self.time = nnx.Linear(64, width, rngs=rngs)
    self.layers = nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(3)])
    self.leave = nnx.Linear(width, channels, kernel_init=nnx.initializers.zeros, rngs=rngs)

  def __call__(self, x: jax.Array, t_B: jax.Array) -> jax.Array:
    """The velocity at x [B,1,1,Z] and times t_B."""
    angle = 1000 * t_B[:, None] * jnp.exp(-jnp.arange(32) * np.log(1e4) / 32)
    time = self.time(jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1))
    hidden = self.enter(x[:, 0, 0]) + time
    for layer in self.layers:
      hidden = hidden + layer(nnx.silu(hidden)) + time
    return self.leave(nnx.silu(hidden))[:, None, None]


def learn(train: np.ndarray, held: np.ndarray, width: int, seed: int) -> list[Results]:
  """Trains on cells [n,Z]; figures of as many samples as there are held-out cells, after STEPS."""
  data = jnp.asarray(train)[:, None, None]
  graph, params = nnx.split(Flow(train.shape[1], width, nnx.Rngs(seed)))
  optimizer = optax.adamw(LEARNING_RATE, weight_decay=0)
  state = (params, jax.tree.map(jnp.copy, params), optimizer.init(params))

  def loss(params: Any, key: jax.Array) -> jax.Array:
    which, times, noises = jax.random.split(key, 3)
    latent = data[jax.random.randint(which, (BATCH,), 0, len(data))]
    noise = jax.random.normal(noises, latent.shape)
    t_B = transport.sample_time(times, BATCH)
    predicted = nnx.merge(graph, params)(transport.interpolate(latent, noise, t_B), t_B)
    found = transport.losses(predicted, latent, noise, t_B)
    return jnp.mean(found["mse"] + found["cosine"])

  def step(state: Any, number: jax.Array) -> tuple[Any, None]:
    params, average, moments = state
    key = jax.random.fold_in(jax.random.key(seed), number)
    change, moments = optimizer.update(jax.grad(loss)(params, key), moments, params)
    params = optax.apply_updates(params, change)
    decay = jnp.minimum(DECAY, (1 + number) / (10 + number))  # 0.995**250 is 29 % initial weights
    average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)
    return (params, average, moments), None

  @functools.partial(jax.jit, static_argnames="count", donate_argnums=0)
  def advance(state: Any, begun: int, count: int) -> Any:
    return jax.lax.scan(step, state, begun + jnp.arange(count))[0]

  @jax.jit
  def draw(params: Any, key: jax.Array) -> jax.Array:
    flow = nnx.merge(graph, params)
    noise = jax.random.normal(key, (len(held), 1, 1, held.shape[1]))
    velocity = lambda x, t: flow(x, jnp.broadcast_to(t, len(x)))  # noqa: E731
    return sampling.sample_ode(velocity, noise, num_steps=GRID)[:, 0, 0]

  done, found = 0, []
  for steps in STEPS:
    for begun in range(done, steps, STEPS[0]):
      state = advance(state, begun, STEPS[0])
    done = steps
    found.append(
      {"steps": steps, **compared(np.asarray(draw(state[1], jax.random.key(seed))), held)}
    )
  return found


def compared(samples: np.ndarray, held: np.ndarray) -> dict[str, float]:
  """Figures of samples [n,Z] beside held-out cells [n,Z]."""
  reference = Gaussian(held.mean(0, np.float64), np.cov(held.T.astype(np.float64)))
  found = reference.distance(samples.mean(0, np.float64), np.cov(samples.T.astype(np.float64)))
  return {
    "frechet": found.distance,
    "energy": energy_distance(samples, held),
    "told": told_apart(samples, held),
  }


def examine(name: str, cells: Cells, workdir: Path, settings: Settings) -> Results:
  """All results of one tokenizer's cells, those kept in `workdir` and new ones, which are kept."""
  values, _ = cells.draw(10_000, 0)
  held, train = np.split(values, [round(HELD_OUT * len(values))])
  latents = workdir / f"{name}-latents"
  maps = latents.with_name(f"{latents.name}.png")

  def kept(part: str, make: Any, *files: Path, **by: Any) -> Any:
    """What a run before made of the same cells by the same settings, with `files` beside it, else
    what is made now.
    """
    path, about = workdir / f"{name}-{part}.json", {"sha256": cells.about["sha256"], **by}
    if (
      all(x.is_file() for x in (path, *files))
      and (note := read_note(path, about=dict))["about"] == about
    ):
      return note["found"]
    found = make()
    write_json(path, {"about": about, "found": found})
    return found

  def spread() -> Results:
    output = Output(latents, "latents")
    space.evaluate(cells, output, runs=settings.runs, seed=settings.seed)
    return read_note(output.json, figures=dict)

  def controls() -> Results:
    draw = np.random.default_rng(settings.seed)
    fitted = draw.multivariate_normal(train.mean(0), np.cov(train.T), len(held)).astype(np.float32)
    return {
      "a fitted Gaussian": compared(fitted, held),
      "training cells": compared(train[: len(held)], held),
    }

  seeds, width = range(settings.seed, settings.seed + settings.seeds), settings.width
  return {
    "spread": kept("spread", spread, maps, runs=settings.runs, seed=settings.seed),
    "maps": maps,
    "controls": kept("controls", controls, seed=settings.seed),
    "learned": [
      kept(f"learned-{seed}", functools.partial(learn, train, held, width, seed), width=width)
      for seed in console.tracked(seeds, f"trainings on {name}", len(seeds))
    ],
    "held_out": len(held),
  }


def lines_of(found: dict[str, Results], page: Path, settings: Settings) -> list[str]:
  """The text of the page's region, and its pictures beside the page."""
  about = circumstances()
  first = next(iter(found.values()))
  return [
    f"Commit {about['commit']}, {about['date']}: `{whole_command(('page',))}`.",
    "",
    f"Figures of `launch.evaluate latents`, mean ± deviation of {settings.runs} t-SNEs; below "
    "them the paper's table 6, the mean of 10.",
    "",
    *table(
      (
        "tokenizer",
        "density CV",
        "Gini",
        "normalised entropy",
        "effective dimensions",
        "largest correlation",
        "energy distance from normal",
      ),
      [row for name, results in found.items() for row in _spread_rows(name, results["spread"])],
    ),
    "",
    *(line for name, results in found.items() for line in _maps(name, results["maps"], page)),
    *picture(_draw(found, beside(page, "learned")), "Distance of samples from held-out cells"),
    f"Samples of the small flow beside {first['held_out']:,} held-out cells, mean of "
    f"{settings.seeds} seeds and their range; told apart is 0.5 where samples and cells are alike.",
    "",
    *table(("", *(f"{name}, {text}" for text in FIGURES.values() for name in found)), _rows(found)),
    "",
  ]


def _maps(name: str, path: Path, page: Path) -> list[str]:
  """The picture that launch.evaluate latents drew, in 256 colours: a quarter of the bytes."""
  target = beside(page, f"latents_{name}")
  with Image.open(path) as image, atomic_file(target) as file:
    small = image.convert("RGB").resize([round(MAPS * side) for side in image.size])
    # The usual median cut gives dark red and yellow, which are rare here, to their neighbours.
    small.quantize(256, Image.Quantize.MAXCOVERAGE).save(file, "PNG", optimize=True)
  return picture(
    target,
    f"{name}: cells by the first t-SNE with their density; mean and deviation of the channels as "
    "published; their correlations; signal to noise over t, where t = 0 is noise",
  )


def _spread_rows(name: str, spread: Results) -> list[tuple[str, ...]]:
  figures, deviations = spread["figures"], spread["standard_deviation_over_runs"]
  uniform = ("density_cv", "gini", "normalized_entropy")
  others = ("effective_dimensions", "largest_correlation", "energy_from_normal")
  digits = {"normalized_entropy": 4, "effective_dimensions": 1}
  rows = [
    (
      name,
      *(f"{figures[x]:.{digits.get(x, 3)}f} ± {deviations[x] or 0:.4f}" for x in uniform),
      *(f"{figures[x]:.{digits.get(x, 3)}f}" for x in others),
    )
  ]
  if name in PAPER:
    rows.append((f"{name}, paper", *(f"{x:g}" for x in PAPER[name]), "", "", ""))
  return rows


def _rows(found: dict[str, Results]) -> list[tuple[str, ...]]:
  rows = []
  for i, steps in enumerate(STEPS):
    cells = []
    for figure in FIGURES:
      for results in found.values():
        values = [run[i][figure] for run in results["learned"]]
        cells.append(f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
    rows.append((f"{steps:,} steps", *cells))
  for control in next(iter(found.values()))["controls"]:
    values = [x["controls"][control][figure] for figure in FIGURES for x in found.values()]
    rows.append((control, *(f"{value:.3f}" for value in values)))
  return rows


def _draw(found: dict[str, Results], path: Path) -> Path:
  figure, axes = plots.panels(1, len(FIGURES), size=(12, 4))
  for axis, (key, label) in zip(axes[0], FIGURES.items(), strict=True):
    for results in found.values():
      name = next(n for n, r in found.items() if r is results)
      values = np.array([[x[key] for x in run] for run in results["learned"]])
      (line,) = axis.plot(STEPS, values.mean(0), "o-", ms=3, label=name)
      axis.fill_between(STEPS, values.min(0), values.max(0), color=line.get_color(), alpha=0.2)
      level = results["controls"]["a fitted Gaussian"][key]
      axis.axhline(level, color=line.get_color(), linestyle=":", label=f"{name}, Gaussian")
    axis.set(title=label, xlabel="steps", xscale="log", ylim=(0, None))
    axis.set_xticks(STEPS, [f"{steps:,}" for steps in STEPS])
    axis.set_xticks([], minor=True)
  axes[0][0].legend()
  return plots.save(figure, path)


def main() -> None:
  given = [text.partition(":") for text in FLAGS.latents]
  names = [name for name, _, address in given if name and address]
  if len(names) < len(given) or len(set(names)) < len(names) or not all(map(str.isalnum, names)):
    raise InputError(
      f"--latents is {', '.join(FLAGS.latents)}; give NAME:ADDRESS, each with a name of its own, "
      "of letters and digits."
    )
  cells = {name: open_cells(address) for name, _, address in given}
  workdir = place(FLAGS.workdir)
  page = FLAGS.page or workdir / "cells.md"
  REGION.check(page)
  settings = Settings(FLAGS.runs, FLAGS.seeds, FLAGS.seed, FLAGS.width)
  with owned(workdir):
    found = {name: examine(name, each, workdir, settings) for name, each in cells.items()}
    REGION.write(page, lines_of(found, page, settings))
  pages = [(f"figures of {name}", str(workdir / f"{name}-latents.html")) for name in cells]
  console.table("Cells", ("what", "where"), [("page", str(page)), *pages])


FLAGS = flags.FLAGS

if __name__ == "__main__":
  flags.DEFINE_multi_string("latents", None, "NAME:ADDRESS of latents or cells.", required=True)
  flags.DEFINE_string("workdir", None, "Where results are kept.", required=True)
  command_line.define_output(
    "page", None, "A Markdown page for the results; WORKDIR/cells.md if none."
  )
  flags.DEFINE_integer("runs", Settings().runs, "Runs of t-SNE for each.", lower_bound=1)
  flags.DEFINE_integer("seeds", Settings().seeds, "Seeds of the small flow.", lower_bound=1)
  flags.DEFINE_integer("seed", Settings().seed, "The first seed.", 0, LAST_SEED - 1000)
  flags.DEFINE_integer("width", Settings().width, "Of the small flow.", lower_bound=8)
  console.run_command(main)
