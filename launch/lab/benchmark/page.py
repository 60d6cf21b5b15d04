r"""How far every hot path is from what this machine allows, and from the reference, on one page.

  python -m launch.lab.benchmark page --config=configs/lab/speed.py:gpu --workdir=runs/speed \
    --reference=LIGHTNINGDIT --taming=TAMING --torch_python=PYTHON --update=docs/lab/baseline.json

Runs `benchmark steps` for each measurement of configs/lab/speed.py (gpu, cpu, tiny), one after the
other, and writes speed.md: a table of paths (ceilings, ours, the reference's, ratio, gap) and plots
of images/s over batch size, model, resolution and devices. --reference is a checkout of
hustvl/LightningDiT and --taming one of CompVis/taming-transformers, for an interpreter with torch;
without them PyTorch is not measured. The same command resumes a run that was stopped; measurements
that failed are named at the end, and the page has the others. --compare ends with exit code 2 where
a ratio is worse than in a stored baseline. Other work on the machine distorts the numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from configs.lab import speed
from launch.engine import command_line, configuration, console
from launch.engine.circumstances import commit, processor, whole_command
from launch.lab import markdown, reference
from launch.lab.benchmark import baseline
from launch.lab.benchmark.rows import Row
from launch.lab.benchmark.steps import SHOWN
from launch.lab.jobs import FailedError, Job, Record, backend, run
from launch.report import plots
from vavae_jax.common.errors import InputError

FLAGS = flags.FLAGS
CONFIG = f"{speed.__file__}:cpu"
REGION = markdown.Region(
  "<!-- speed: written by launch.lab.benchmark page -->",
  "<!-- end of speed -->",
  "Speed beside the limits",
)
PLOTS = {
  "batch": "batch size",
  "model": "model",
  "resolution": "pixels a side",
  "devices": "devices",
}
COLUMNS = (
  *("dtype", "attention", "batch_size", "tflop_per_image", "least_gib", "images_per_second"),
  *("model_tflops_per_second", "share_of_matmul", "share_of_ceiling", "gap", "program_gib"),
  *("torch_images_per_second", "times_torch"),
)
NOTES = (
  "TFLOP by count: of a diffusion model's training the model's alone, of a tokenizer's with all "
  "its networks, of sampling without the halves that guidance leaves out. GiB at least are "
  "arguments and results, each once. The ceiling is products at the rate of one large product, or "
  "those bytes at the rate of one large copy, whichever takes longer, both measured in the same "
  "process; the gap is how many times as long ours takes. Samples are latents. The reference took "
  "turns with ours on the same device, on random data of the same shapes."
)


def jobs_of(config: ConfigDict, workdir: Path, beside: Sequence[str]) -> list[Job]:
  """A job for each measurement; `beside` are the flags of `benchmark steps` for the reference."""
  jobs = []
  for each in config.measurements:
    output = workdir / "results" / f"{each['name']}.json"
    words = ["launch.lab.benchmark", "steps", *each["flags"], f"--output={output}"]
    if each["devices"]:
      words.append(f"--devices={each['devices']}")
    if each["reference"]:
      words += beside
    jobs.append(Job(each["name"], tuple(words), output, content=json.dumps(each["flags"])))
  return jobs


def results_of(jobs: Sequence[Job], workdir: Path) -> dict[str, Row]:
  """{name: what `benchmark steps` wrote} of the jobs that have ended."""
  record = Record(workdir, jobs)
  return {job.name: json.loads(job.output.read_text()) for job in jobs if record.is_done(job)}


def write_page(config: ConfigDict, results: dict[str, Row], page: Path, command: str) -> None:
  """Writes the region of the page, with its plots in a file beside it."""
  rows: dict[str, list[tuple[str, Row]]] = {}
  for each in config.measurements:
    measured = results.get(each["name"], {}).get("rows", [])
    rows.setdefault(each["group"], []).extend((each["label"], row) for row in measured)
  paths = rows.get("paths", [])
  fitting = {
    name: [(label, row) for label, row in rows.get(name, []) if not row.get("out_of_memory")]
    for name in PLOTS
  }
  growth = {name: found for name, found in fitting.items() if found}
  drawn = _draw(growth, markdown.beside(page, "growth")) if growth else None
  missing = [each["name"] for each in config.measurements if each["name"] not in results]
  text = [
    *_made(list(results.values()), command),
    *markdown.table(["path", *(SHOWN[name] for name in COLUMNS)], [_cells(*row) for row in paths]),
    "",
    NOTES,
    "",
    *_pictures(paths),
    *markdown.picture(drawn, "How images/s grow; below, the share of a product's rate"),
  ]
  if missing:
    text += [f"Not measured, or failed: {', '.join(missing)}.", ""]
  REGION.write(page, text)


def _pictures(paths: Sequence[tuple[str, Row]]) -> list[str]:
  """Sampling and decoding together, for the rows with the reference beside them."""
  whole = [(label, row) for label, row in paths if "times_torch" in row]
  decoding = next((row for _, row in whole if row["what"] == "decode"), None)
  sampling = [(label, row) for label, row in whole if row["what"] == "sample"]
  if decoding is None or not sampling:
    return []
  rows = []
  for label, row in sampling:
    ours, theirs = (
      1 / (1 / row[name] + 1 / decoding[name])
      for name in ("images_per_second", "torch_images_per_second")
    )
    rows.append([f"{label}, {row['dtype']}", *map(console.number, (ours, theirs, ours / theirs))])
  header = ("sampling and decoding", "images/s", "reference, images/s", "times the reference")
  return [*markdown.table(header, rows), ""]


def _made(results: Sequence[Row], command: str) -> list[str]:
  """Command, machine and ceilings."""

  def named(name: str) -> str:
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
  versions = f"jax {named('jax')}" + (f", torch {', '.join(torch)}" if torch else "")
  return [
    *("```", command, "```", ""),
    f"Commit {named('commit')}, {named('date')}; {named('device')}, {processor()}; {versions}. "
    f"Ceilings of a device: a product {products}; a copy {copies}.",
    "",
  ]


def _cells(label: str, row: Row) -> list[str]:
  """A row of the table of paths."""
  shown = dict(row)
  if work := row.get("model_tflops_per_second"):
    shown["tflop_per_image"] = work / row["images_per_second"]
  if row.get("share_of_ceiling"):
    shown["gap"] = 1 / row["share_of_ceiling"]
  for side in ("", "torch_"):
    if row.get(f"{side}out_of_memory"):
      shown[f"{side}images_per_second"] = "out of memory"
  return [label, *(_cell(name, shown.get(name, "")) for name in COLUMNS)]


def _cell(name: str, value: Any) -> str:
  if not isinstance(value, float):
    return str(value)
  return f"{value:.0%}" if name.startswith("share_") else console.number(value)


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
    values = [row["images_per_second"] for _, row in rows]
    limits = min(values) / 2, max(values) * 2  # so that a small change does not look large
    top.set(title=f"over {PLOTS[name]}", ylabel="images/s", yscale="log", ylim=limits)
    bottom.set(xlabel=PLOTS[name], ylabel="share of a product's rate", ylim=(0, 1))
    for axis in column:
      axis.grid(alpha=0.3, which="both")
      if name == "batch":
        axis.set_xscale("log", base=2)
        axis.legend()
  return plots.save(figure, path)


def _fitting(config: ConfigDict) -> ConfigDict:
  """The measurements that this machine has devices for; CPUs have virtual ones."""
  name, count = backend()
  if name == "cpu":
    return config
  kept = tuple(each for each in config.measurements if each["devices"] <= count)
  if left := [each["name"] for each in config.measurements if each not in kept]:
    console.say(f"left out, since there are {count} devices: {', '.join(left)}")
  return ConfigDict({"size": config.size, "measurements": kept})


def _beside(config: ConfigDict) -> list[str]:
  """Flags of `benchmark steps` that name the reference, which is checked here."""
  checkouts = reference.checkouts(compiled=False)
  if checkouts is None:
    console.say("no --reference: PyTorch is not measured")
    return []
  checkouts.check()
  checkouts.check_python()
  training = (f"--config={speed.TOKENIZER}", "--what=train")
  if any(x["reference"] and x["flags"][:2] == training for x in config.measurements):
    checkouts.check_taming()
  words = [f"--reference={checkouts.lightningdit.absolute()}"]
  if FLAGS.taming:
    words.append(f"--taming={Path(FLAGS.taming).absolute()}")
  return [*words, f"--torch_python={FLAGS.torch_python}"]


def _command() -> str:
  """The command as a page shows it, without the paths of this machine."""
  own = {"reference": "LIGHTNINGDIT", "taming": "TAMING", "torch_python": "PYTHON"}
  without = {*own, "workdir", "page", "page_only", "compare", "tolerance", "update"}
  given = [f"--{name}={word}" for name, word in own.items() if FLAGS[name].present]
  return " ".join([whole_command(without), "--workdir=runs/speed", *given])


def define_flags() -> None:
  configuration.define_flag("The measurements; configs/lab/speed.py:cpu if not given.")
  command_line.define_output("workdir", "runs/speed", "The folder for all results.")
  command_line.define_output("page", None, "The page; by default speed.md in the workdir.")
  flags.DEFINE_boolean("page_only", False, "Measure nothing; write the page of earlier results.")
  reference.define_flags()
  baseline.define_flags()


def _check_kept(workdir: Path, results: Mapping[str, Row]) -> None:
  """Raises InputError for results of other code than this, or of code that may be other code."""
  kept, now = {x["commit"] for x in results.values()}, commit()
  if not kept or (FLAGS.page_only and not FLAGS.compare):
    return
  changed = now == "unknown" or now.endswith("-dirty")
  if old := kept if changed else kept - {now}:
    why = ", of which nobody can say whether it is the same code" if changed else ""
    raise InputError(
      f"{workdir} has results of {', '.join(sorted(old))}, and this is {now}{why}; give a new "
      "--workdir to --compare or --update by this code."
    )


def main() -> None:
  jax.config.update("jax_platforms", "cpu")  # this process leaves the device to the measurements
  workdir = FLAGS.workdir.absolute()
  page = FLAGS.page or workdir / "speed.md"
  REGION.check(page)
  baseline.check_flags()
  config = _fitting(FLAGS.config)
  jobs = jobs_of(config, workdir, _beside(config))
  if FLAGS.compare or FLAGS.update:
    _check_kept(workdir, results_of(jobs, workdir))

  def write() -> None:
    write_page(config, results_of(jobs, workdir), page, _command())

  failure = None
  if FLAGS.page_only:
    write()
  else:
    try:
      run(jobs, workdir, 1, write=write)
    except FailedError as error:  # which stays so after the others are compared
      failure = error
  results = results_of(jobs, workdir)
  where = [("page", str(page)), ("results", str(workdir / "results"))]
  console.table("Speed", ("what", "where"), where)
  # Points of plots have the same names as rows of the table, and no reference beside them.
  paths = [x["name"] for x in config.measurements if x["group"] == "paths" and x["name"] in results]
  baseline.settle([row for name in paths for row in baseline.ratios_of(results[name])])
  if failure:
    raise failure
