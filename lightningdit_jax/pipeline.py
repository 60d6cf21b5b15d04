"""A trained model for use from Python: class names in, pictures out.

  pipe = Pipeline.load("model/")              # a model folder, USER/NAME on the hub, or a workdir
  pictures = pipe.sample(["animals", 3], num=4, seed=0, guidance=3.0, steps=50)

A solver on a grid runs step by step, so that steps, shift, seed and a guidance that is on change
without compiling anew; it can be watched on its way. Sample i of a call is that of index i in
`launch.sample` with the same seed and settings.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict, FrozenConfigDict
from PIL import Image
from rich.progress import Progress

from lightningdit_jax import (
  checks,
  flow_map,
  internal_guidance,
  routing,
  sampling,
  solvers,
  training,
  transport,
)
from lightningdit_jax.model import build_model
from lightningdit_jax.options import Options
from lightningdit_jax.store import latents
from lightningdit_jax.store.fetching import open_store
from lightningdit_jax.store.space import NOTE, Space, check_classes, find_tokenizer, label_of
from vavae_jax import folder
from vavae_jax.common import functional, keys, mesh
from vavae_jax.common.batches import as_fits
from vavae_jax.common.checkpoints import load_weights
from vavae_jax.common.errors import InputError, naming
from vavae_jax.common.files import at_home
from vavae_jax.common.keys import DTYPES, LAST_SEED, Key
from vavae_jax.tokenizer import Tokenizer

# The diffusion model's section of a model folder: keys of its training that say how it is used.
SETTINGS: dict[str, Any] = {
  "model": keys.of(Options),
  "transport": checks.TRANSPORT,
  "route": routing.ROUTE,
  "sample": checks.SAMPLE,
  "published": checks.PUBLISHED,
  "latents": {
    "latent_norm": Key(True, text="Latents are normalised by mean and deviation."),
    "latent_multiplier": Key(1.0, "(0, 1e6]"),
    "sha256": Key("", text="Which latents it was trained on."),
  },
  "dtype": Key("bfloat16", DTYPES, "Of matrix products in training."),
}
_SHOWN = 12  # points of a trajectory
_GIVEN = dict.fromkeys(("num", "count", "shown"), Key(1, keys.COUNT))
_GIVEN["seed"] = Key(0, f"[0, {LAST_SEED}]")
# What a training's `config.sample` calls our arguments.
_OURS = {"guidance": "cfg_scale", "steps": "num_steps", "interval_start": "cfg_interval_start"}


class Pipeline:
  """A diffusion model with its tokenizer.

  Attributes:
    config: the keys of `SETTINGS`, as a training's configuration has them.
    tokenizer: decodes what is sampled.
    class_names: of the labels; empty where nobody named them.
  """

  def __init__(
    self,
    config: FrozenConfigDict,
    params: Any,
    tokenizer: Tokenizer,
    space: Space,
    origin: dict[str, Any] | None = None,
  ):
    """`params` are LightningDiT's nested dicts of arrays, `origin` as in `folder.Part`."""
    self.config, self.params, self.tokenizer = folder.frozen(SETTINGS, config), params, tokenizer
    self.space, self.class_names = space, space.class_names
    self.origin = origin or {"sha256": functional.fingerprint(params)}
    channels = (self.config.model.in_channels, tokenizer.channels, space.mean.size)
    if len({*channels}) > 1:
      raise InputError(
        "The diffusion model is of latents of {} channels, the tokenizer of {}, their statistics "
        "of {}: these parts are not of one model.".format(*channels)
      )
    self._devices = mesh.local_mesh()
    self._placed = jax.device_put(params, mesh.replicated(self._devices))

  @classmethod
  def load(
    cls,
    source: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] = "",
    step: int | None = None,
    ema: float | None = None,
  ) -> Pipeline:
    """The model of a model folder, by its path or USER/NAME on the hub, or of a workdir.

    Args:
      tokenizer: folder or workdir of a workdir's tokenizer, where it is not at its place any more.
      step: of a workdir's checkpoint; the newest if None.
      ema: decay of a workdir's average, 0: none; the first if None.

    Raises:
      InputError: there is none, it is damaged, or of an unknown version.
    """
    path = folder.find(source)
    if folder.is_model(path):
      part, whole = folder.load(path, "diffusion", SETTINGS, build_model, step, ema)
      config, space = FrozenConfigDict(ConfigDict(part.settings)), Space.of_folder(path, whole)
      own = find_tokenizer(
        space.tokenizer if tokenizer else {},
        lambda place, _: Tokenizer.load(place),
        of=str(path),
        given=os.fspath(tokenizer) or str(path),
      )
      return cls(config, part.params, own, space, part.origin)
    config = folder.workdir_config(path, "diffusion")
    params, step, ema = load_weights(path, config, training.init_state, step, ema)
    noted = path / NOTE
    if noted.is_file():
      space = Space.read(noted)
    else:
      space = Space.of(open_store(config.latents.path, config.latents.cache))
    own = find_tokenizer(
      space.tokenizer,
      lambda place, step: Tokenizer.load(place, step=step),
      of=str(path),
      given=os.fspath(tokenizer) or config.tokenizer,
      workdir=path,
    )
    origin = {"step": step, "ema": ema, "sha256": functional.fingerprint(params)}
    return cls(config, params, own, space, origin)

  def save(
    self,
    path: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    files: dict[str, bytes] | None = None,
  ) -> None:
    """Writes a model folder; `dtype`, "float32" or "bfloat16", is of the weights on disk."""
    part = folder.Part(self.config.to_dict(), self.params, self.origin)
    folder.save(
      Path(at_home(os.fspath(path))),
      {"tokenizer": self.tokenizer.part, "diffusion": part},
      dtype=dtype,
      about={"class_names": list(self.class_names)},
      statistics={"mean": self.space.mean, "std": self.space.std},
      files=files,
    )

  def sample(
    self,
    classes: str | int | Sequence[str | int],
    *,
    num: int = 1,
    seed: int = 0,
    noise: np.ndarray | None = None,
    guide: Pipeline | None = None,
    trajectory: bool = False,
    progress: bool = True,
    **settings: Any,
  ) -> Any:
    """Pictures of classes.

    Args:
      classes: one or a list, names or numbers; each gives `num` pictures, one class after the
        other.
      num: pictures of each class.
      seed: of the noise; a picture is a function of seed, place in the list, class and settings.
      noise: float32 [N, h, w, Z], what the pictures begin with, instead of a seed's; see `noise`.
      guide: a weaker model of the same latents to be guided away from, for autoguidance.
      trajectory: also what the model expects on its way.
      progress: show a bar.
      **settings: `guidance` (1: none), `interval_start` (no guidance where t is smaller), `steps`
        (points of the grid), and the other keys of `config.sample`, such as method,
        timestep_shift, cfg_channels and batch_size; what is not given is as the model brings it.

    Returns:
      PIL pictures; with `trajectory` a list for each, whose last picture is the sample.

    Raises:
      InputError: unknown classes or settings, or settings that the model cannot have.
    """
    chosen, batch = self._prepared(classes, num, seed, noise, guide, settings)
    with Progress(disable=not progress, transient=True) as bar:
      task = bar.add_task("sample", total=None)

      def run(batch: dict[str, jax.Array]) -> list[jax.Array]:
        way = self._expected if trajectory else self._way
        kept: deque[jax.Array] = deque(maxlen=None if trajectory else 1)
        for latent in way(chosen, seed, batch, guide):
          kept.append(latent)
          bar.update(task, advance=1)
        return [*kept]

      points = as_fits(run, batch, chosen.batch_size, self._devices)
      frames = [self._decoded(latent) for latent in points]
    return [list(way) for way in zip(*frames, strict=True)] if trajectory else frames[0]

  def watch(
    self,
    classes: str | int | Sequence[str | int],
    *,
    num: int = 1,
    seed: int = 0,
    noise: np.ndarray | None = None,
    guide: Pipeline | None = None,
    shown: int = _SHOWN,
    **settings: Any,
  ) -> Iterator[list[Image.Image]]:
    """The pictures as the model expects them at `shown` points of their way, the samples last.

    All run in one batch, whatever `batch_size` is; other arguments and errors are as of `sample`,
    for a solver on a grid.
    """
    keys.check(_GIVEN, {"shown": (shown := _plain(shown))})
    chosen, batch = self._prepared(classes, num, seed, noise, guide, settings)
    total = len(batch["label"])
    rows = np.resize(np.arange(total), mesh.round_up(total, self._devices))
    whole = mesh.to_global({k: x[rows] for k, x in batch.items()}, self._devices)
    points = self._expected(chosen, seed, whole, guide, shown)
    while True:
      with jax.set_mesh(self._devices):  # not around `yield`: who watches may have another mesh
        expected = next(points, None)
      if expected is None:
        return
      yield self._decoded(np.asarray(expected)[:total])

  def noise(self, seed: int, count: int = 1) -> np.ndarray:
    """What the samples of a seed begin with, float32 [count, h, w, Z], standard normal."""
    keys.check(_GIVEN, {"seed": (seed := _plain(seed)), "count": (count := _plain(count))})
    return np.asarray(_noise(self._shape, np.uint32(seed), np.arange(count, dtype=np.int32)))

  def _prepared(
    self,
    classes: str | int | Sequence[str | int],
    num: int,
    seed: int,
    noise: np.ndarray | None,
    guide: Pipeline | None,
    settings: dict[str, Any],
  ) -> tuple[FrozenConfigDict, dict[str, np.ndarray]]:
    """The checked settings, and arrays of all samples: "index", "label" and perhaps "noise"."""
    keys.check(_GIVEN, {"num": (num := _plain(num)), "seed": _plain(seed)})
    chosen, count = self.settings(guide, **settings), self.config.model.num_classes
    check_classes(self.class_names, count, "What the model was trained on")
    several = [classes] if isinstance(classes, str) or not np.iterable(classes) else classes
    labels = [label_of(given, self.class_names, count) for given in several]
    label_N = np.repeat(np.array(labels, np.int32), num)
    if not len(label_N):
      raise InputError("There are no classes to sample; give a list such as [0, 1].")
    batch = {"index": np.arange(len(label_N), dtype=np.int32), "label": label_N}
    if noise is not None:
      noise = keys.floats(noise, "noise")
      if noise.shape != (wanted := (len(label_N), *self._shape)):
        raise InputError(f"noise is {noise.shape}; these samples need {wanted}.")
      if not _is_on_grid(chosen):
        raise InputError("noise is for a solver on a grid; give another method than dopri5.")
      if not np.isfinite(noise).all():
        raise InputError("noise has numbers that are not finite.")
      batch["noise"] = noise
    return chosen, batch

  @property
  def _shape(self) -> tuple[int, int, int]:
    model = self.config.model
    return model.input_size, model.input_size, model.in_channels

  def _grid(self, chosen: FrozenConfigDict) -> np.ndarray:
    path = self.config.transport
    ends = transport.interval(path.path_type, path.prediction, path.sample_eps)
    return sampling.time_grid(chosen.num_steps, chosen.timestep_shift, ends)

  def _way(
    self,
    chosen: FrozenConfigDict,
    seed: int,
    batch: dict[str, jax.Array],
    guide: Pipeline | None,
  ) -> Iterator[jax.Array]:
    """Normalised latents at each point of the grid; of other solvers the last ones alone."""
    models = (self, guide) if guide else (self,)
    configs, params = tuple(x.config for x in models), tuple(x._placed for x in models)
    if not _is_on_grid(chosen):
      settings = (configs, chosen, params, np.uint32(seed))
      yield _all_at_once(*settings, batch["index"], batch["label"])
      return
    shares = (chosen.routed, chosen.guide_routed)
    static = (configs, chosen.dtype, chosen.method, chosen.cfg_channels, shares)
    guidance = sampling.numbers_of(chosen)
    x = batch.get("noise")
    if x is None:
      x = _noise(self._shape, np.uint32(seed), batch["index"])
    yield x
    for ends in itertools.pairwise(self._grid(chosen)):
      before, each = x, (batch["label"], batch["index"], np.uint32(seed))
      x = _advance(*static, params, x, np.array(ends), *each, guidance)
      before.block_until_ready()  # so that the host is never more than a step ahead
      yield x

  def _expected(
    self,
    chosen: FrozenConfigDict,
    seed: int,
    batch: dict[str, jax.Array],
    guide: Pipeline | None,
    shown: int = _SHOWN,
  ) -> Iterator[jax.Array]:
    """What the model expects at `shown` points of the way, normalised latents; the samples last."""
    if not _is_on_grid(chosen):
      raise InputError("A trajectory is of a solver on a grid; give another method than dopri5.")
    grid = self._grid(chosen)
    kept = {round(i) for i in np.linspace(0, len(grid) - 1, shown + 1)[1:]}
    before = None
    for place, x in enumerate(self._way(chosen, seed, batch, guide)):
      if place in kept and before is not None:
        t, later = grid[place - 1 : place + 1]
        yield x + (x - before) * ((grid[-1] - later) / (later - t))
      before = x

  def _decoded(self, normalised_NhwZ: np.ndarray) -> list[Image.Image]:
    if not np.isfinite(normalised_NhwZ).all():
      raise InputError(
        "Samples have numbers that are not finite; change guidance or solver, or give "
        'dtype="float32".'
      )
    mean, std = latents.statistics(self.space, latent_norm=self.config.latents.latent_norm)
    multiplier = self.config.latents.latent_multiplier
    return self.tokenizer.decode(latents.denormalise(normalised_NhwZ, mean, std, multiplier))

  def settings(self, guide: Pipeline | None = None, **changes: Any) -> FrozenConfigDict:
    """The model's `config.sample` with changes by our names or its own; errors as of `sample`."""
    if not isinstance(guide, Pipeline | None):
      raise InputError(f"guide is {guide!r}; give a Pipeline, as of Pipeline.load.")
    if twice := [ours for ours, name in _OURS.items() if {ours, name} <= changes.keys()]:
      raise InputError(f"{twice[0]} is {_OURS[twice[0]]} by another name; give one of them.")
    named = {_OURS.get(name, name): value for name, value in changes.items()}
    if unknown := sorted(named.keys() - checks.SAMPLE.keys()):
      known = ", ".join(sorted({*_OURS, *checks.SAMPLE} - {*_OURS.values()}))
      raise InputError(f"{unknown[0]} is no setting of sampling; they are {known}.")
    plain = {k: _plain(v) for k, v in named.items() if v is not None}
    chosen = checks.changed(self.config.sample, **plain)
    given = {_OURS[name]: name for name in changes if name in _OURS}
    names = {f"config.sample.{name}": own for name, own in given.items()}
    with naming(names | {"config.sample.": ""}):
      checks.check_sampling(chosen, self.config, guide.config if guide else None)
      if guide:
        checks.check_guide(self.config, guide.config, chosen)
    return chosen


def _plain(value: Any) -> Any:
  """Python's number for NumPy's or jax's."""
  return value.item() if hasattr(value, "item") and not np.ndim(value) else value


def _is_on_grid(settings: FrozenConfigDict) -> bool:
  """Whether the solver takes steps of the host's choice, the same for all samples."""
  return settings.mode == "ODE" and settings.method in solvers.TABLEAUX


@functools.partial(jax.jit, static_argnums=0)
def _noise(shape: tuple[int, ...], seed: jax.Array, index_B: jax.Array) -> jax.Array:
  return sampling.noise_of(seed, index_B, shape)


@functools.partial(jax.jit, static_argnums=range(5))
def _advance(
  configs: tuple[FrozenConfigDict, ...],
  dtype: str,
  method: str,
  channels: int,
  shares: tuple[float, float],
  params: tuple[Any, ...],
  x_BhwZ: jax.Array,
  ends: jax.Array,
  label_B: jax.Array,
  index_B: jax.Array,
  seed: jax.Array,
  guidance: dict[str, jax.Array],
) -> jax.Array:
  """One step of a solver, from the time ends[0] to ends[1], with the guidance that is on.

  `configs` and `params` are of the model and, where there is one, of its guide.
  """
  model, *guides = (
    (config, nnx.merge(functional.graph_of(build_model(config, dtype)), each))
    for config, each in zip(configs, params, strict=True)
  )
  guide, config = guides[0] if guides else None, configs[0]
  towards, away = routing.for_sampling(model, guide, shares, seed, index_B)
  internal = guidance.get("internal_scale", 1.0), guidance.get("internal_until", 1.0)
  path, prediction = config.transport.path_type, config.transport.prediction

  def velocity(x: jax.Array, t: jax.Array, end: jax.Array | None = None) -> jax.Array:
    predict = sampling.guided(
      internal_guidance.extrapolated(flow_map.towards(towards, end), *internal),
      label_B,
      config.model.num_classes,
      cfg_scale=guidance.get("cfg_scale", 1.0),
      cfg_interval_start=guidance.get("cfg_interval_start", 0.0),
      cfg_channels=channels,
      guide=flow_map.towards(away, end),
    )
    return transport.to_velocity(predict(x, t), x, t, path, prediction)

  return solvers.integrate(velocity, x_BhwZ, ends, method, 0.0, 0.0)


@functools.partial(jax.jit, static_argnums=range(2))
def _all_at_once(
  configs: tuple[FrozenConfigDict, ...],
  settings: FrozenConfigDict,
  params: tuple[Any, ...],
  seed: jax.Array,
  index_B: jax.Array,
  label_B: jax.Array,
) -> jax.Array:
  model, *guides = zip(configs, params, strict=True)
  guide = guides[0] if guides else None
  return sampling.sample_latents(*model, index_B, label_B, seed=seed, sample=settings, guide=guide)
