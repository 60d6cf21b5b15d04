r"""Makes a published number, and checks before that whatever could keep it from coming out.

  python -m launch.reproduce
  python -m launch.reproduce fid2.11 --reference=VIRTUAL_imagenet256_labeled.npz --check
  python -m launch.reproduce fid2.11 --workdir=runs/fid2.11 --inception=data/inception.pth
  python -m launch.reproduce fid2.11 --workdir=runs/own --train --pictures=folder:IMAGENET

Without a name it lists the numbers, and what each needs that is not here. With a name it finds all
that the number depends on (weights of the hub are fetched) and names what is missing, with where it
is published and which flag takes it; it compares hashes, configurations and contents, and says of
each what it found and whether that is right. --check ends here. Then come the stages: samples and
FID, or with --train latents, training, samples and FID; of a tokenizer rFID, or training and rFID.
Stopped at any point, the same command goes on. In the end the figures stand beside the published
ones, and in WORKDIR/reproduce.json with hashes, settings, versions, devices and seeds, to attach to
a report.

Sampler, grid, guidance, labels and count are the record's and no flags. --set changes by what means
it is computed: --set=accumulate_steps=16 --set=sample.batch_size=32, or --set=mesh.data=1
--set=mesh.fsdp=-1; without --train only keys of sample. docs/reproduce.md lists the numbers, their
times, and what to do when one does not come out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from absl import flags

from launch.engine import configuration, console, processes
from launch.engine.circumstances import circumstances
from launch.engine.ownership import owned
from launch.reproduce import estimates, stages
from launch.reproduce.checks import check
from launch.reproduce.given import Given
from launch.reproduce.needs import needs
from launch.reproduce.records import RECORDS, Record
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import local_place, read_note, write_json
from vavae_jax.common.keys import LAST_SEED

NOTE, RESULT = "number.json", "reproduce.json"


def reproduce(
  name: str,
  record: Record,
  given: Given,
  workdir: Path,
  *,
  only_check: bool = False,
  topology: str = "",
  plan: bool = True,
) -> dict[str, float]:
  """Checks a number, estimates its time, and makes it; the arguments are the command's.

  Returns the figures; of several processes the first has them. InputError: something is missing or
  wrong, or `workdir` is another number's.
  """
  with contextlib.ExitStack() as stack:
    stack.enter_context(owned(workdir))
    note = {"name": name, "train": given.train, "seed": given.seed}
    if (workdir / NOTE).exists():
      configuration.check_begun(workdir, read_note(workdir / NOTE), note)
    checked = check(record, given, workdir)
    if plan:
      estimates.show(record, given, workdir, topology)
    if only_check:
      return {}
    processes.first_does(lambda: write_json(workdir / NOTE, note))
    if given.train and record.recipe and not given.latents:
      stack.enter_context(owned(workdir / "latents"))
    for output in ("samples", stages.kind(record)):
      stack.enter_context(owned(workdir / output, beside=True))
    figures, more = stages.run(record, given, checked, workdir)
  if jax.process_index():
    return {}
  pairs = {key: {"here": figures.get(key), "published": x} for key, x in record.figures.items()}
  config = checked.config.to_dict() if checked.config else None
  about = {"record": dataclasses.asdict(record), "config": config, "checks": checked.rows}
  result = {**note, "figures": pairs, "allowed": given.allow, **about, **more}
  write_json(workdir / RESULT, result | {"run": circumstances()})
  return figures


def show_all() -> None:
  """The table of numbers."""
  rows = []
  for name, record in RECORDS.items():
    figure, value = record.figure
    given = Given(train=bool(record.recipe) and not record.weights.address)
    lacks = [flag for flag, need in needs(record, given).items() if not need.find(fetch=False)]
    training = ["--train"] if given.train else []
    rows.append((name, f"{figure} {value:g}", " ".join(training + lacks)))
  header = ("name", "published", "needs, and is not here")
  console.table("Published numbers", header, rows)
  console.say("Flags of these names take what is not here; what the hub has is fetched.")
  console.say("--train: of these no weights are published.")


def show_result(
  name: str, record: Record, given: Given, workdir: Path, figures: Mapping[str, float]
) -> None:
  """The figures of a number beside the published ones, and the command that exports its model."""
  shown = [
    (k, f"{figures[k]:.4g}" if k in figures else "-", f"{x:g}") for k, x in record.figures.items()
  ]
  console.table(f"{name}, to attach: {workdir / RESULT}", ("figure", "here", "published"), shown)
  part, kind = "diffusion" if record.recipe else "tokenizer", stages.kind(record)
  made = {
    name: workdir / name if (workdir / name).exists() else getattr(given, name)
    for name in ("tokenizer", "diffusion")
  }
  words = [f"--workdir={made[part]}", f"--output={workdir / 'model'}"]
  words += [f"--tokenizer={made['tokenizer']}"] if record.recipe else []
  console.say_next("export", *words, f"--evaluations={workdir / kind}.json")


def main(*words: str) -> None:
  if not words:
    own = flags.FLAGS.get_key_flags_for_module("__main__")
    if flagged := [flag.name for flag in own if flag.present]:
      raise InputError(
        f"--{flagged[0]} is for a number: give its NAME, one of those without a flag."
      )
    show_all()
    return
  name = words[0]
  if name not in RECORDS:
    lower = {x.lower(): x for x in RECORDS}
    near = [x for x, one in RECORDS.items() if name.lower() == one.source.replace(" ", "")]
    near = near or [lower[x] for x in difflib.get_close_matches(name.lower(), lower, 3)]
    raise InputError(
      f"There is no number {name!r}; did you mean {', '.join(near or [*RECORDS][:6])}? Without a "
      "name all are listed."
    )
  if FLAGS.topology and not FLAGS.plan:
    raise InputError("--topology is for the estimates, which --noplan leaves out; leave out one.")
  record, workdir = RECORDS[name], local_place(FLAGS.workdir or f"runs/{name.replace('/', '_')}")
  values: dict[str, Any] = {
    field.name: FLAGS[field.name].value for field in dataclasses.fields(Given)
  }
  given = Given(**values | {key: tuple(values[key]) for key in ("set", "allow")})
  rows = [("figures", ", ".join(f"{key} {value:g}" for key, value in record.figures.items()))]
  rows += [("source", f"arXiv 2501.01423, {record.source}"), ("tokenizer", record.tokenizer.name)]
  rows += stages.settings(record)
  console.table(
    f"{name}: {record.what}", ("", ""), [*rows, *([("note", record.note)] if record.note else [])]
  )
  figures = reproduce(
    *(name, record, given, workdir),
    only_check=FLAGS.check,
    topology=FLAGS.topology,
    plan=FLAGS.plan,
  )
  if FLAGS.check or not figures:
    console.say("No check refuses the number.")
    return
  show_result(name, record, given, workdir, figures)


FLAGS = flags.FLAGS
_DEFINE: dict[str, Any] = {  # by the type of a field of `Given`
  "str": flags.DEFINE_string,
  "bool": flags.DEFINE_boolean,
  "int": functools.partial(flags.DEFINE_integer, lower_bound=0, upper_bound=LAST_SEED),
  "tuple[str, ...]": flags.DEFINE_multi_string,
}

if __name__ == "__main__":
  flags.DEFINE_string("workdir", "", "Folder for everything; runs/NAME if not given.")
  for field in dataclasses.fields(Given):
    _DEFINE[str(field.type)](field.name, field.default, field.metadata["text"])
  flags.DEFINE_boolean("check", False, "Only check, and show the estimates.")
  flags.DEFINE_boolean("plan", True, "Estimate time and memory by launch.lab.plan, once.")
  flags.DEFINE_string("topology", "", "Estimate for these devices, such as v6e:4x4 or h200:8.")
  console.run_command(main, arguments=1, several=True)
