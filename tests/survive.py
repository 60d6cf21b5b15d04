"""Faults that real runs meet, applied to real processes, and whether the run survives.

  python -m tests.survive --kills=30 --output=survived.json

Every scenario ends by training on undisturbed; "survived" says that the final parameters, average
and momentum and the metrics are then those of a run that met no fault, bit for bit. The run is the
toy task in the project's loop. docs/reliability.md has the table.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from launch.engine import console, processes
from launch.engine.checkpoint import Checkpoints, survey
from launch.engine.circumstances import circumstances
from launch.engine.writers import read_metrics
from tests import toy_task
from tests.conftest import repeatable_metrics, start_job
from vavae_jax.common import manifest, mesh
from vavae_jax.common.files import write_json

TOY = "tests.toy_task"
MAKING = threading.Lock()  # an undisturbed run
LIMIT = 120.0  # seconds until a process that should end is said to hang
# One process that died is noticed by a missed heartbeat, and jax takes a while to give up.
NOTICED_WITHIN = processes.HEARTBEAT_SECONDS + 30.0


@dataclasses.dataclass
class Outcome:
  """What a scenario came to.

  Attributes:
    fault: what was done, for the table.
    times: how often.
    survived: whether the run then ended as if nothing had been.
    told: what was seen, measured or said.
  """

  fault: str
  times: int
  survived: bool
  told: str


@dataclasses.dataclass
class Toy:
  """A run of the toy task in a folder of its own, started as often as it takes.

  Attributes:
    workdir: its workdir.
    environment: of its processes.
    seconds: a step's.
    settings: KEY=VALUE of its configuration.
    save_every: steps between checkpoints.
  """

  workdir: Path
  environment: Mapping[str, str]
  seconds: float = 0.0
  settings: str = "evaluate_every_steps=5,log_every_steps=3"
  save_every: int = 10

  def undisturbed(self, count: int = 1) -> Toy:
    """The same training without a fault, made once for all scenarios of a folder."""
    home = self.workdir.parents[1] / "undisturbed" / f"{self.settings} {count}"
    other = dataclasses.replace(self, workdir=home)
    with MAKING:
      if not home.exists():
        other.finish(count)
    return other

  def start(self, count: int = 1, seconds: float | None = None) -> list[subprocess.Popen]:
    """Processes that train on."""
    pause = self.seconds if seconds is None else seconds
    words = (TOY, self.workdir, pause, self.save_every, self.settings)
    return start_job(words, self.environment, count)

  def finish(self, count: int = 1) -> str:
    """Trains to the end; what was printed."""
    printed = [ended(process) for process in self.start(count, seconds=0.0)]
    assert all(code == 0 for code, _ in printed), printed
    return printed[0][1]

  def steps(self) -> int:
    """The last step in the metrics."""
    return max((line["step"] for line in read_metrics(self.workdir)), default=0)

  def wait_for(self, what: Callable[[], Any], running: Sequence[subprocess.Popen]) -> None:
    """Returns when there is something; a run that ends before it is an error."""
    began = time.monotonic()
    while not what():
      gone = next((process for process in running if process.poll() is not None), None)
      assert gone is None, f"ended too early: {gone and gone.communicate()[0]}"
      assert time.monotonic() - began < LIMIT, "nothing happened"
      time.sleep(0.002)

  def same_as(self, other: Toy) -> bool:
    """Whether both ended with the same bits and tell the same story."""
    mine, theirs = final_state(self.workdir), final_state(other.workdir)
    equal = jax.tree.map(lambda a, b: np.array_equal(a, b, equal_nan=True), mine, theirs)
    same_story = repeatable_metrics(self.workdir) == repeatable_metrics(other.workdir)
    return all(jax.tree.leaves(equal)) and same_story


def ended(process: subprocess.Popen, limit: float = LIMIT) -> tuple[int, str]:
  """(exit code, what was printed) of a process; AssertionError where it does not end in time."""
  try:
    printed, _ = process.communicate(timeout=limit)
  except subprocess.TimeoutExpired:
    process.kill()
    printed, _ = process.communicate()
    raise AssertionError(f"still running after {limit:g} s: {printed}") from None
  return process.returncode, printed


def final_state(workdir: Path) -> toy_task.State:
  """The newest checkpoint of a toy run."""
  config = toy_task.config(**json.loads((workdir / "config.json").read_text()))
  abstract = jax.eval_shape(functools.partial(toy_task.init_state, config), jax.random.key(0))
  everywhere = mesh.replicated(mesh.local_mesh())
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), abstract
  )
  checkpoints = Checkpoints(workdir, keep=1000)
  step = checkpoints.sound_step()
  assert step is not None
  return checkpoints.restore(step, like)[0]


def checkpoint_folders(workdir: Path) -> list[Path]:
  """The finished checkpoints, oldest first."""
  found = (workdir / "checkpoints").glob("*")
  return sorted((path for path in found if path.name.isdigit()), key=lambda path: int(path.name))


def _sign_of(phase: str, workdir: Path, step: int) -> Callable[[], Any]:
  """What tells that a run, which began at `step`, is in a phase."""
  signs: dict[str, Callable[[], Any]] = {
    "start-up": lambda: True,
    "a step": lambda: Toy(workdir, {}).steps() > step,
    "a save": lambda: _unfinished(workdir),
    "an evaluation": (workdir / "evaluating").exists,
  }
  return signs[phase]


def _unfinished(workdir: Path) -> list[Path]:
  return list((workdir / "checkpoints").glob("*tmp*"))


def killed(folder: Path, environment: Mapping[str, str], kills: int, seed: int = 0) -> Outcome:
  """SIGKILL at random moments of start-up, steps, saves and evaluations in turn."""
  draw = np.random.default_rng(seed)
  settings = f"{Toy.settings},num_steps=600,width=20000"
  run = Toy(folder / "killed0", environment, seconds=0.01, settings=settings)
  whole = run.undisturbed()
  moments: Counter[str] = Counter()
  lost: list[int] = []
  while sum(moments.values()) < kills:
    phase = ("start-up", "a step", "a save", "an evaluation")[sum(moments.values()) % 4]
    (run.workdir / "evaluating").unlink(missing_ok=True)
    for left in _unfinished(run.workdir):  # of the last kill; it is no sign of a new save
      shutil.rmtree(left)
    sign = _sign_of(phase, run.workdir, run.steps())
    (process,) = run.start()
    try:
      run.wait_for(sign, [process])
      time.sleep(draw.uniform(0, {"start-up": 5.0, "a step": 0.5}.get(phase, 0.04)))
    except AssertionError:
      assert process.returncode == 0, process.communicate()
    process.kill()
    process.communicate()
    if process.returncode != -signal.SIGKILL:  # it had ended: another run takes the next kill
      if not run.same_as(whole):
        return Outcome("SIGKILL", sum(moments.values()), False, f"{run.workdir} ended otherwise")
      run = dataclasses.replace(run, workdir=folder / f"killed{sum(moments.values())}")
      continue
    moments[phase] += 1
    newest = [int(path.name) for path in checkpoint_folders(run.workdir)]
    lost.append(run.steps() - max(newest, default=0))
  run.finish()
  told = ", ".join(f"{count} in {phase}" for phase, count in moments.items())
  told += f"; lost at most {max(lost)} steps with a checkpoint every {run.save_every}"
  return Outcome("SIGKILL at random moments", kills, run.same_as(whole), told)


def terminated(folder: Path, environment: Mapping[str, str], count: int) -> Outcome:
  """SIGTERM to one process of a job."""
  seconds = 0.5
  settings = f"{Toy.settings},num_steps=40"
  run = Toy(folder / "run", environment, seconds, settings, save_every=1000)
  whole = run.undisturbed(count)
  running = run.start(count)
  run.wait_for(lambda: run.steps() >= 6, running)
  at, began = run.steps(), time.monotonic()
  running[-1].send_signal(signal.SIGTERM)
  codes = {ended(process)[0] for process in running}
  took = time.monotonic() - began
  (saved,) = (int(path.name) for path in checkpoint_folders(run.workdir))
  run.finish(count)
  told = (
    f"steps of {seconds} s: saved after step {saved}, signalled at the end of step {at}, all gone "
    f"after {took:.1f} s, exit code {', '.join(map(str, codes))}"
  )
  # The metrics are read a step late and written every third; several agree on one step more than
  # that under way at most.
  in_time = saved <= at + 4 + (count > 1)
  survived = codes == {128 + signal.SIGTERM} and in_time and run.same_as(whole)
  return Outcome(f"SIGTERM to one of {count}", 1, survived, told)


def one_killed(folder: Path, environment: Mapping[str, str]) -> Outcome:
  """SIGKILL to one of two processes: the other must end, with an error."""
  settings = f"{Toy.settings},num_steps=40"
  run = Toy(folder / "run", environment, 0.2, settings)
  whole = run.undisturbed(2)
  told = []
  for victim in (1, 0):
    running = run.start(2)
    before = run.steps()
    run.wait_for(lambda before=before: run.steps() > before + 2, running)
    began = time.monotonic()
    running[victim].kill()
    code, _ = ended(running[1 - victim], NOTICED_WITHIN)
    told.append(f"without process {victim} the other ended after {time.monotonic() - began:.1f} s")
    running[victim].communicate()
    assert code != 0
  run.finish(2)
  return Outcome("SIGKILL to one of two", 2, run.same_as(whole), "; ".join(told))


def flip_a_bit(path: Path) -> None:
  """In the middle of a file."""
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def _empty(path: Path) -> None:
  step = next(p for p in path.parents if p.parent.name == "checkpoints")
  shutil.rmtree(step)
  step.mkdir()


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
  "a flipped bit": (flip_a_bit, "other bytes than were written"),
  "a truncated file": (lambda path: os.truncate(path, 3), "has 3 bytes instead of"),
  "a missing file": (lambda path: path.unlink(), "is missing"),
  "a file too many": (lambda path: path.with_name("x").touch(), "does not belong there"),
  "an empty folder": (_empty, f"no {manifest.MANIFEST}, so it was never whole"),
}


def largest_file(folder: Path) -> Path:
  """Where damage hurts."""
  return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def damaged(folder: Path, environment: Mapping[str, str], kind: str) -> Outcome:
  """Damage to the newest checkpoint of a run that stopped half-way."""
  apply, message = DAMAGES[kind]
  run = Toy(folder / "run", environment, settings=f"{Toy.settings},num_steps=40")
  whole = run.undisturbed()
  run.settings = f"{Toy.settings},num_steps=20"
  run.finish()
  apply(largest_file(checkpoint_folders(run.workdir)[-1] / "params"))
  run.settings = whole.settings
  printed = run.finish()
  line = next((line for line in printed.splitlines() if message in line), "")
  survived = bool(line) and run.same_as(whole)
  return Outcome(f"{kind} in the newest checkpoint", 1, survived, "reported; 10 steps lost")


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
  """A file system of that size."""
  folder.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
  subprocess.run(mount, check=True, capture_output=True)
  try:
    yield folder
  finally:
    subprocess.run(["umount", str(folder)], check=True)


def disk_full(folder: Path, environment: Mapping[str, str], mounted: bool) -> Outcome:
  """No room for the third checkpoint: a file system of 24 MB, or files that may not grow."""
  settings = f"{Toy.settings},num_steps=40,width=100000"
  run = Toy(folder / "run", environment, 0.1, settings)
  whole = run.undisturbed()
  with small_disk(folder / "small", "24m") if mounted else contextlib.nullcontext(folder) as place:
    run.workdir = place / "run"
    (process,) = run.start()
    run.wait_for(lambda: len(checkpoint_folders(run.workdir)) == 2, [process])
    ballast = place / "ballast"
    if mounted:
      ballast.write_bytes(bytes(shutil.disk_usage(place).free - 2**20))
    else:
      resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2**20, 2**20))
    code, printed = ended(process)
    last = printed.strip().splitlines()[-1]
    sound = [one.name for one in survey(run.workdir) if not one.wrong]
    ballast.unlink(missing_ok=True)
    run.finish()
    survived = code == 2 and "then resume with" in last and len(sound) == 2 and run.same_as(whole)
  where = "of a file system of 24 MB" if mounted else "(a limit on the size of files)"
  told = f"exit code {code}, one line; checkpoints of steps {', '.join(sound)} sound"
  return Outcome(f"disk full in a save {where}", 1, survived, told)


def worker_killed(folder: Path, environment: Mapping[str, str]) -> Outcome:
  """SIGKILL to the process that loads batches."""
  settings = f"{Toy.settings},num_steps=40,workers=1"
  run = Toy(folder / "run", environment, 0.2, settings)
  whole = run.undisturbed()
  (process,) = run.start()
  run.wait_for(lambda: run.steps() >= 12, [process])
  began = time.monotonic()
  (worker,) = workers_of(process.pid)
  os.kill(worker, signal.SIGKILL)
  code, printed = ended(process)
  took = time.monotonic() - began
  run.finish()
  line = next((line for line in printed.splitlines() if line.startswith("error: ")), "")
  told = f"exit code {code} after {took:.1f} s: {line[:70]}"
  survived = code == 2 and "process that loads batches died" in line and run.same_as(whole)
  return Outcome("SIGKILL to a data worker", 1, survived, told)


def workers_of(pid: int) -> list[int]:
  """The processes that load data for this one: its children that run grain's worker."""
  threads = Path(f"/proc/{pid}/task").glob("*/children")
  children = [int(child) for thread in threads for child in thread.read_text().split()]
  return [c for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]


def nan_batch(folder: Path, environment: Mapping[str, str], non_finite: str) -> Outcome:
  """A batch of NaN: skipped and counted, also over a SIGTERM; or the end, with nothing saved."""
  settings = f"{Toy.settings},num_steps=40,nan_batch=14,non_finite={non_finite}"
  run = Toy(folder / "nan", environment, 0.2, settings, save_every=5)
  (process,) = run.start()
  if non_finite == "skip":
    run.wait_for(lambda: run.steps() >= 15, [process])
    process.send_signal(signal.SIGTERM)
  code, printed = ended(process)
  if non_finite == "skip":
    run.finish()
    survived = code == 128 + signal.SIGTERM and run.same_as(run.undisturbed())
    counted = [line["skipped_steps"] for line in read_metrics(run.workdir) if "loss" in line][-1]
    survived, told = survived and counted == 1, f"{counted:.0f} step counted, also after SIGTERM"
  else:
    last = printed.strip().splitlines()[-1]
    survived, told = code == 2 and "at step 15" in last, f"ended: {last[:90]}"
  steps = [int(path.name) for path in checkpoint_folders(run.workdir)]
  finite = all(np.isfinite(x).all() for x in jax.tree.leaves(final_state(run.workdir)))
  survived = survived and finite and steps[-1] == (40 if non_finite == "skip" else 10)
  told += f"; the newest checkpoint, of step {steps[-1]}, is finite"
  return Outcome(f'a NaN batch, config.non_finite="{non_finite}"', 1, survived, told)


def terminated_in_evaluation(
  folder: Path, environment: Mapping[str, str], endless: bool
) -> Outcome:
  """SIGTERM while an evaluation runs, which takes 15 s, or does not end and is one call of XLA."""
  settings = f"{Toy.settings},num_steps=10"
  variables = {**environment, **({"TOY_EVALUATES_FOR_EVER": "1"} if endless else {})}
  run = Toy(folder / "run", variables, 0.1 if endless else 3.0, settings, save_every=1000)
  (process,) = run.start()
  run.wait_for((run.workdir / "evaluating").exists, [process])
  time.sleep(0.5)  # until it computes
  began = time.monotonic()
  process.send_signal(signal.SIGTERM)
  code, printed = ended(process)
  took = time.monotonic() - began
  (saved,) = (int(path.name) for path in checkpoint_folders(run.workdir))
  run.environment = environment
  run.finish()
  what = "one computation without an end" if endless else "an evaluation of 15 s"
  told = f"{what} ended after {took:.1f} s, saved after step {saved}"
  survived = code == 128 + signal.SIGTERM and took < 10 and saved == 5
  survived = survived and "stopped; resume with" in printed and run.same_as(run.undisturbed())
  fault = f"SIGTERM in an evaluation{', which XLA computes' if endless else ''}"
  return Outcome(fault, 1, survived, told)


def stalled(folder: Path, environment: Mapping[str, str], number: int, count: int = 1) -> Outcome:
  """A signal to the first of `count` processes, while the last waits for data that never come."""
  size = toy_task.config().batch_size
  position = 5 * size + size * (count - 1) // count
  run = Toy(folder / "run", {**environment, "TOY_STALLS_AT": str(position)}, save_every=1000)
  running = run.start(count)
  for line in running[-1].stdout or ():
    if "waiting for random vectors" in line:
      break
  began = time.monotonic()
  running[0].send_signal(number)
  ends = [ended(process) for process in running]
  took = time.monotonic() - began
  saved = [path.name for path in checkpoint_folders(run.workdir)]
  told = f"ended after {took:.1f} s, saved after step {', '.join(saved) or 'none'}"
  # Of several processes, seconds pass until the other batch is given up.
  survived = took < (10 if count == 1 else 15) and {code for code, _ in ends} == {128 + number}
  undisturbed = Toy(run.workdir, environment, save_every=run.save_every)
  undisturbed.finish()
  if count == 1:
    survived = survived and saved == ["5"] and undisturbed.same_as(undisturbed.undisturbed())
  else:  # the others had begun steps 6 and 7
    twice = ends[-1][1].count("its last batch serves again") == 2
    survived = survived and saved == ["7"] and twice
    told += ", in two steps of which the one that stalled took its batch of step 5 again"
  to = "" if count == 1 else f" to one of {count}"
  name = f"{signal.Signals(number).name}{to} while data stall"
  return Outcome(name, 1, survived, told)


def orphaned(folder: Path, environment: Mapping[str, str]) -> Outcome:
  """Workers of a training that is killed."""
  run = Toy(folder / "run", environment, 0.2, f"{Toy.settings},workers=2", save_every=1000)
  (process,) = run.start()
  run.wait_for(lambda: run.steps() >= 3, [process])
  workers = [Path(f"/proc/{pid}") for pid in workers_of(process.pid)]
  began = time.monotonic()
  process.kill()
  process.wait()
  while time.monotonic() - began < LIMIT and any(worker.exists() for worker in workers):
    time.sleep(0.05)
  took = time.monotonic() - began
  told = f"{len(workers)} workers ended after {took:.1f} s"
  return Outcome("SIGKILL, and the workers end", 1, len(workers) == 2 and took < 10, told)


def scenarios(kills: int, mounted: bool) -> dict[str, Callable[..., Outcome]]:
  """All of them by name, each a function of a folder and an environment."""
  found: dict[str, Callable[..., Outcome]] = {
    "killed": functools.partial(killed, kills=kills),
    "terminated": functools.partial(terminated, count=1),
    "terminated_in_evaluation": functools.partial(terminated_in_evaluation, endless=False),
    "terminated_in_a_computation": functools.partial(terminated_in_evaluation, endless=True),
    "two_terminated": functools.partial(terminated, count=2),
    "one_of_two_killed": one_killed,
    **{kind.replace(" ", "_"): functools.partial(damaged, kind=kind) for kind in DAMAGES},
    "file_limit": functools.partial(disk_full, mounted=False),
    "worker_killed": worker_killed,
    "one_of_two_stalls": functools.partial(stalled, number=signal.SIGTERM, count=2),
    "hung_up_while_data_stall": functools.partial(stalled, number=signal.SIGHUP),
    "orphaned": orphaned,
    "nan_skipped": functools.partial(nan_batch, non_finite="skip"),
    "nan_stopped": functools.partial(nan_batch, non_finite="stop"),
  }
  if mounted:
    found["disk_full"] = functools.partial(disk_full, mounted=True)
  return found


def main() -> None:
  """The command."""
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    environment = {
      **os.environ,
      "JAX_PLATFORMS": "cpu",
      "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
    }
    outcomes = []
    for key, scenario in scenarios(FLAGS.kills, mounted=FLAGS.mount).items():
      if FLAGS.only and key not in FLAGS.only:
        continue
      (folder / key).mkdir()
      outcomes.append(scenario(folder / key, environment))
      console.say(str(outcomes[-1]))
  rows = [
    (one.fault, str(one.times), "yes" if one.survived else "NO", one.told) for one in outcomes
  ]
  console.table("Faults", ("fault", "times", "survived", "seen"), rows)
  if FLAGS.output:
    results = [dataclasses.asdict(one) for one in outcomes]
    write_json(Path(FLAGS.output), {**circumstances(), "outcomes": results})
    console.say(f"written to {FLAGS.output}")
  if not all(one.survived for one in outcomes):
    sys.exit(1)


FLAGS = flags.FLAGS

if __name__ == "__main__":
  flags.DEFINE_integer("kills", 30, "How many random kills.", lower_bound=1)
  flags.DEFINE_boolean("mount", False, "Fill a small tmpfs too, which takes the right to mount.")
  flags.DEFINE_list("only", [], "Names of scenarios; all if not given.")
  flags.DEFINE_string("output", "", "A JSON file for the results.")
  console.run_command(main)
