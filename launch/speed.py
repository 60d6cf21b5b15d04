r"""How far every hot path is from what this machine allows, and from the reference, on one page.

  python -m launch.speed --config=configs/speed.py:gpu --workdir=runs/speed \
    --reference=LIGHTNINGDIT --taming=TAMING --torch_python=PYTHON --update=docs/baseline.json

Runs launch.benchmark for each measurement of configs/speed.py (gpu, cpu or tiny), one after the
other, and writes speed.md with a table of paths (ceilings, ours, the reference's, ratio, gap), and
plots of images/s over batch size, model, resolution and devices. --reference is a checkout of
hustvl/LightningDiT and --taming one of CompVis/taming-transformers, for an interpreter with torch;
without them there is no reference beside ours. Stopped at any point, the same command goes on where
it was; what failed is told at the end, and the page has the rest. --compare ends with exit code 2
where a ratio is worse than in a stored baseline. Other work on the machine spoils the numbers.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from configs import speed
from launch import baseline, pages, plots
from launch.engine import configuration, console
from launch.engine.circumstances import own_command, processor
from launch.experiment.jobs import Job, run

CONFIG = f"{speed.__file__}:cpu"
REGION = pages.Region(
  "<!-- speed: written by launch.speed -->", "<!-- end of speed -->", "Speed beside the limits"
)
PLOTS = {
  "batch": "batch size",
  "model": "model",
  "resolution": "pixels a side",
  "devices": "devices",
}
HEADER = (
  *("path", "dtype", "attention", "batch", "TFLOP an image", "GiB at least", "images/s"),
  *("TFLOP/s", "of a product's rate", "of the ceiling", "gap", "GiB of memory"),
  *("reference, images/s", "times the reference"),
)
NOTES = (
  "TFLOP by count: of a training step the model's alone, of sampling without the halves that "
  "guidance leaves out. GiB at least are arguments and results, each once. The ceiling is products "
  "at the rate of one large product, or those bytes at the rate of one large copy, whichever takes "
  "longer, both measured in the same process; the gap is how many times as long ours takes. "
  "Samples are latents; a picture takes a decoding, too: images/s of both are 1 / (1 / a + 1 / b). "
  "The reference took turns with ours on the same device, on random data of the same shapes."
)
Row = dict[str, Any]


def jobs_of(config: ConfigDict, workdir: Path, beside: Sequence[str]) -> list[Job]:
  """A job for each measurement.

  Args:
    config: of `configs/speed.py`.
    workdir: where results go.
    beside: what launch.benchmark is told of the reference; empty without one.
  """
  jobs = []
  for each in config.measurements:
    name = each["name"]
    output = workdir / "results" / f"{name}.json"
    words = ["launch.benchmark", *each["flags"], f"--output={output}"]
    if each["devices"]:
      words.append(f"--devices={each['devices']}")
    if each["reference"]:
      words += beside
    jobs.append(Job(name, tuple(words), output, content=json.dumps(each["flags"])))
  return jobs


def write_page(config: ConfigDict, workdir: Path, page: Path, command: str) -> None:
  """Writes what has been measured; pictures go beside the page."""
  results, missing = [], []
  rows: dict[str, list[tuple[str, Row]]] = {}
  for each in config.measurements:
    path = workdir / "results" / f"{each['name']}.json"
    if not path.is_file():
      missing.append(each["name"])
      continue
    results.append(json.loads(path.read_text()))
    rows.setdefault(each["group"], []).extend((each["label"], x) for x in results[-1]["rows"])
  fitting = {
    name: [(label, row) for label, row in rows.get(name, []) if not row.get("out_of_memory")]
    for name in PLOTS
  }
  growth = {name: found for name, found in fitting.items() if found}
  drawn = _draw(growth, pages.beside(page, "growth")) if growth else None
  text = [
    *_made(results, command),
    *pages.table(HEADER, [_cells(label, row) for label, row in rows.get("paths", [])]),
    "",
    NOTES,
    "",
    *pages.picture(drawn, "How images/s grow; below, the share of a product's rate"),
  ]
  if missing:
    text += [f"Not measured, or failed: {', '.join(missing)}.", ""]
  REGION.write(page, text)


def _made(results: Sequence[Row], command: str) -> list[str]:
  """Command, machine and ceilings."""

  def told(name: str) -> str:
    return ", ".join(sorted({str(result[name]) for result in results}))

  def span(values: Sequence[float], unit: str) -> str:
    ends = [f"{x:.3g}" for x in (min(values), max(values))]
    return f"{' to '.join(dict.fromkeys(ends))} {unit}"

  if not results:
    return []
  rates: dict[str, list[float]] = {}
  for result in results:
    for dtype, rate in result["matmul_tflops_per_second"].items():
      rates.setdefault(dtype, []).append(rate)
  products = ", ".join(f"{span(x, 'TFLOP/s')} in {dtype}" for dtype, x in rates.items())
  copies = span([result["copy_gib_per_second"] for result in results], "GiB/s")
  torch = sorted({row["torch"] for result in results for row in result["rows"] if "torch" in row})
  versions = f"jax {told('jax')}" + (f", torch {', '.join(torch)}" if torch else "")
  return [
    *("```", command, "```", ""),
    f"Commit {told('commit')}, {told('date')}; {told('device')}, {processor()}; {versions}. "
    f"Ceilings of a device: a product {products}; a copy {copies}.",
    "",
  ]


def _cells(label: str, row: Row) -> list[str]:
  """A row of the table of paths."""
  if row.get("out_of_memory"):
    named = (row.get(name, "") for name in ("dtype", "attention", "batch_size"))
    return [label, *map(str, named), *["out of memory"] * (len(HEADER) - 4)]
  work = row.get("model_tflops_per_second")
  ceiling = row.get("share_of_ceiling")
  theirs = "out of memory" if row.get("torch_out_of_memory") else ""
  return [
    label,
    row.get("dtype", ""),
    row.get("attention", ""),
    str(row["batch_size"]),
    _number(work / row["images_per_second"] if work else None),
    _number(row.get("least_gib")),
    _number(row["images_per_second"]),
    _number(work),
    _share(row.get("share_of_matmul")),
    _share(ceiling),
    _number(1 / ceiling if ceiling else None),
    _number(row.get("program_gib")),
    theirs or _number(row.get("torch_images_per_second")),
    _number(row.get("times_torch")),
  ]


def _number(value: float | None) -> str:
  return "" if value is None else console.number(value)


def _share(value: float | None) -> str:
  return "" if value is None else f"{value:.0%}"


def _draw(growth: dict[str, list[tuple[str, Row]]], path: Path) -> Path:
  """Images/s and the share of a product's rate, a column for each plot."""
  figure, axes = plots.panels(2, len(growth), size=(3.6 * len(growth), 6))
  for (name, rows), column in zip(growth.items(), axes.T, strict=True):
    series: dict[str, list[tuple[Any, Row]]] = {}
    for label, row in rows:
      key, x = (label, row["batch_size"]) if name == "batch" else ("", label)
      series.setdefault(key, []).append((x, row))
    for key, points in series.items():
      places = [x for x, _ in points]
      for axis, figures in zip(column, ("images_per_second", "share_of_matmul"), strict=True):
        axis.plot(places, [row[figures] for _, row in points], "o-", label=key)
    top, bottom = column
    top.set(title=f"over {PLOTS[name]}", ylabel="images/s", yscale="log", ylim=_decades(rows))
    bottom.set(xlabel=PLOTS[name], ylabel="share of a product's rate", ylim=(0, 1))
    for axis in column:
      axis.grid(alpha=0.3, which="both")
      if name == "batch":
        axis.set_xscale("log", base=2)
        axis.legend()
  return plots.save(figure, path)


def _decades(rows: Sequence[tuple[str, Row]]) -> tuple[float, float]:
  """Room around the numbers, so that a small change does not look like a large one."""
  values = [row["images_per_second"] for _, row in rows]
  return min(values) / 2, max(values) * 2


def main(argv: list[str]) -> None:
  """The command."""
  del argv
  jax.config.update("jax_platforms", "cpu")  # of this process; the measurements have the device
  config = FLAGS.config
  if config.get("size") != "tiny" and not FLAGS.reference:
    console.say("no --reference: there will be no PyTorch beside ours")
  beside = []
  if FLAGS.reference:
    for name in ("reference", "taming"):
      if value := FLAGS[name].value:
        beside.append(f"--{name}={Path(value).absolute()}")
    beside.append(f"--torch_python={FLAGS.torch_python}")
  workdir = Path(FLAGS.workdir).absolute()
  page = Path(FLAGS.page) if FLAGS.page else workdir / "speed.md"
  REGION.check(page)
  if FLAGS.compare:
    baseline.read(Path(FLAGS.compare))
  jobs = jobs_of(config, workdir, beside)
  write = functools.partial(write_page, config, workdir, page, own_command(("page", "page_only")))
  try:
    if not FLAGS.page_only:
      run(jobs, workdir, 1)
  finally:
    write()
  where = [("page", str(page)), ("results", str(workdir / "results"))]
  console.table("Speed", ("what", "where"), where)
  ratios = [row for job in jobs for row in _ratios(job)]
  if FLAGS.compare:
    baseline.check(ratios, Path(FLAGS.compare), FLAGS.tolerance)
  if FLAGS.update:
    baseline.update(Path(FLAGS.update), ratios)
    console.say(f"ratios kept in {FLAGS.update}")


def _ratios(job: Job) -> list[Row]:
  if not job.output.is_file():
    return []
  return baseline.ratios_of(json.loads(job.output.read_text()))


FLAGS = flags.FLAGS

if __name__ == "__main__":
  configuration.define_flag("The measurements; configs/speed.py:cpu if not given.")
  flags.DEFINE_string("workdir", "runs/speed", "Where everything is written.")
  flags.DEFINE_string("reference", "", "A checkout of hustvl/LightningDiT to compare with.")
  flags.DEFINE_string("taming", "", "One of CompVis/taming-transformers, to train a tokenizer.")
  flags.DEFINE_string("torch_python", sys.executable, "The interpreter that has PyTorch.")
  flags.DEFINE_string("page", "", "The page; speed.md in the workdir if not given.")
  flags.DEFINE_boolean("page_only", False, "Run nothing, write the page of what is there.")
  flags.DEFINE_string("compare", "", "A baseline of ratios, such as docs/baseline.json.")
  flags.DEFINE_float("tolerance", 0.15, "How much worse than the baseline a ratio may be.")
  flags.DEFINE_string("update", "", "A baseline to put these ratios into.")
  console.run_command(main, config=CONFIG)
