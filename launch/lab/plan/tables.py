"""Plans as tables on the terminal."""

from __future__ import annotations

from launch.engine import console
from launch.lab.plan.calibration import Held
from launch.lab.plan.planning import Plan, Settings
from launch.lab.plan.times import Chip, Times

SOURCES = ("source", "ms", "share", "roofline ms", "GiB", "TFLOP", "runs")
_PALLAS = (", Pallas, by its schedule", ", Pallas, as it declares")
OPERATIONS = ("operation", "ms", "roofline", "runs", "MiB", "GFLOP")


def _gib(size: float) -> str:
  return f"{size / 2**30:.2f}" if size else ""


def shown(settings: Settings) -> str:
  """Changes to a configuration as flags."""
  return " ".join(f"--config.{key}={value}" for key, value in settings.items()) or "as given"


def show(topology: str, what: str, found: list[Plan], chip: Chip, largest: int = 0) -> None:
  """Prints the plans of one configuration on one slice, and of the last where its time goes.

  That is by source and, of the `largest` operations, by operation.
  """
  chosen = found[-1]
  if len(found) > 1:
    tried = [
      (shown(p.settings), "yes" if p.fits else "no", _gib(p.needed), f"{p.compile_seconds:.0f}")
      for p in found
    ]
    console.table("Tried", ("settings", "fits", "GiB", "compiled in s"), tried)
  console.table(f"{what} on {topology}", ("", ""), _rows(chosen, chip))
  if chosen.sources:
    console.table("By source, estimated", SOURCES, _sources(chosen))
  if largest:
    console.table("By operation, estimated", OPERATIONS, _operations(chosen, chip, largest))
  if not chosen.fits and len(found) == 1:
    console.say("--search looks for settings that fit.")


def _rows(chosen: Plan, chip: Chip) -> list[tuple[str, str]]:
  verdict = "fits" if chosen.fits else "DOES NOT FIT"
  rows = [
    (
      "verdict",
      f"{verdict}, says the compiler; all parts {_gib(chosen.needed) or '?'} GiB, a device has "
      f"{_gib(chosen.available)}",
    ),
    ("settings", shown(chosen.settings)),
    ("mesh, data x fsdp", chosen.mesh),
  ]
  rows += [(f"  {name}", f"{_gib(size) or '0.00'} GiB") for name, size in chosen.parts.items()]
  rows += [
    (kind, f"{t.runs} runs of {t.ops} operations, {_gib(t.bytes)} GiB")
    for kind, t in chosen.traffic.items()
  ]
  work = f"{chosen.flops / 1e12:.2f} TFLOP a device and run"
  rows.append(("work", f"{work}, {chosen.computed / 1e12:.2f} with recomputation"))
  if chosen.operations:
    launched = sum(x.runs for x in chosen.operations)
    milliseconds = 1e3 * chosen.moved / chip.bandwidth
    text = f"{launched:,} runs move {_gib(chosen.moved)} GiB: {milliseconds:.1f} ms"
    rows.append(("operations", f"{text} at {chip.bandwidth / 1e12:g} TB/s"))
  if chosen.seconds:
    rows += _times(chosen, chosen.seconds)
  return [*rows, ("compiled in", f"{chosen.compile_seconds:.0f} s")]


def _times(chosen: Plan, seconds: Times) -> list[tuple[str, str]]:
  lines = {
    "compiler's estimate": seconds.compiler,
    "  Pallas kernels by their schedules": seconds.kernels,
    "  collectives at the links' rate": seconds.network,
    "roofline": seconds.roofline,
    "ideal": seconds.ideal,
  }
  rows = [(name, f"{1e3 * value:,.1f} ms") for name, value in lines.items() if value]
  if seconds.compiler:
    reached = f"estimated; {seconds.ideal / seconds.estimate:.0%} of the peak"
  else:
    reached = "at the most; the compiler for GPUs gives no estimate"
  return [
    *rows,
    ("images/s", f"{chosen.images_per_second:,.0f}, {reached}"),
    ("in total", f"{chosen.hours:,.2f} hours"),
  ]


def _sources(chosen: Plan) -> list[tuple[str, ...]]:
  whole = sum(part.seconds for part in chosen.sources)
  return [
    (
      part.group,
      f"{1e3 * part.seconds:,.2f}",
      f"{part.seconds / whole:.1%}",
      f"{1e3 * part.roofline:,.2f}",
      f"{part.bytes / 2**30:,.1f}",
      f"{part.flops / 1e12:.2f}",
      f"{part.runs:,}",
    )
    for part in chosen.sources
  ]


def _operations(chosen: Plan, chip: Chip, largest: int) -> list[tuple[str, ...]]:
  found = sorted(chosen.operations, key=lambda x: -x.runs * chip.seconds(x))
  return [
    (
      f"{x.group}: {x.source} ({x.name}{_PALLAS[x.cycles is None] if x.pallas else ''})",
      f"{1e3 * x.runs * chip.seconds(x):,.2f}",
      f"{1e3 * x.runs * chip.roofline(x):,.2f}",
      f"{x.runs:,}",
      f"{x.bytes / 2**20:,.1f}",
      f"{x.flops / 1e9:,.2f}",
    )
    for x in found[:largest]
  ]


def show_held(found: Held) -> None:
  """Prints a published rate beside the estimates."""
  rows = [
    ("published", f"{found.published:.0f}", "", found.address),
    ("by the compiler's cycles", f"{found.estimated:.0f}", f"{found.factor:.2f}", ""),
    ("by the roofline", f"{found.roofline:.0f}", f"{found.published / found.roofline:.2f}", ""),
  ]
  header = ("", "TFLOP/s of a device", "times as long", "")
  console.table(f"{found.name}, {found.topology}", header, rows)
