"""The training loop on a toy task: resume, signals, losses that are not finite, refusals."""

from __future__ import annotations

import functools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import FrozenConfigDict

import configs.base
from launch.engine import flops, hardware, log, loop, step, watchdog
from launch.engine.checkpoint import Checkpoints
from launch.engine.writers import read_metrics
from lightningdit_jax import training
from tests import toy_task
from tests.conftest import ROOT
from tests.conftest import repeatable_metrics as lines
from vavae_jax.common import functional
from vavae_jax.common.checkpoints import restore_item
from vavae_jax.common.errors import InputError


def run(workdir, more_evaluators=None, with_changes=False, **changes):
  config = toy_task.config(evaluate_every_steps=3, **changes)
  ready = loop.Prepared(config, more_evaluators or {}, {})
  return loop.run(toy_task, config, workdir, prepare=lambda: ready, with_changes=with_changes)


def assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


class Crash(Exception):
  pass


def crash_at(step, name="crash", every=1):
  def evaluate(state):
    if int(state.step) == step:
      raise Crash
    return {"mean": float(state.ema["0.8"]["w"].mean())} if name == "toy" else {}

  return {name: (every, evaluate)}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("undisturbed")
  return run(workdir), lines(workdir)


@pytest.mark.parametrize("step", [3, 7, 12])
def test_a_run_that_crashed_resumes_to_the_same_bits(tmp_path, undisturbed, step):
  state, told = undisturbed
  with pytest.raises(Crash):
    run(tmp_path, crash_at(step))
  assert_same(run(tmp_path), state)
  assert lines(tmp_path) == told


@pytest.mark.parametrize("step", [6, 12])
def test_an_evaluator_that_fails_costs_no_step_and_runs_on_resume(tmp_path, undisturbed, step):
  """Step 12 is the last, so there is nothing to train any more."""
  with pytest.raises(Crash):
    run(tmp_path, crash_at(step, "toy", 3), save_every_steps=6)
  assert Checkpoints(tmp_path).sound_step() == step
  assert_same(run(tmp_path, save_every_steps=6), undisturbed[0])
  assert lines(tmp_path) == undisturbed[1]


def test_compiling_and_evaluating_do_not_count_as_training(tmp_path, monkeypatch):
  clock = [0.0]

  def monotonic():
    clock[0] += 1.0
    return clock[0]

  def slow(_state):
    clock[0] += 1000.0
    return {}

  monkeypatch.setattr(log, "time", SimpleNamespace(monotonic=monotonic))
  run(tmp_path, {"slow": (1, slow)}, num_steps=4, log_every_steps=1)
  told = [line for line in read_metrics(tmp_path) if "loss" in line]
  assert ["steps_per_second" in line for line in told] == [False, True, True, True]
  assert min(line["steps_per_second"] for line in told[1:]) > 0.05


def test_a_run_made_longer_equals_one_that_was_long(tmp_path, undisturbed):
  run(tmp_path, num_steps=8)
  assert_same(run(tmp_path), undisturbed[0])


@pytest.mark.parametrize(
  ("changes", "kept"),
  [
    ({"keep_best": "judge/error"}, ["12", "6"]),
    ({"keep_best": "-judge/error"}, ["12", "3"]),
    ({"keep_every_steps": 5}, ["10", "12", "5"]),
    ({"keep_best": "judge/error", "keep_every_steps": 10}, ["10", "12", "6"]),
  ],
)
def test_what_is_to_be_kept_is_saved_whenever_else_saves_come(tmp_path, changes, kept):
  """Evaluations come after 3, 6, 9 and 12 steps, other saves after 4, 8 and 12."""
  judge = {
    "judge": (3, lambda state: {"error": abs(int(state.step) - 7) + 2 * (int(state.step) == 3)})
  }
  run(tmp_path, judge, keep_checkpoints=1, **changes)
  assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == kept


def test_metrics_after_the_restored_step_are_dropped(tmp_path):
  with pytest.raises(Crash):
    run(tmp_path, crash_at(7))
  assert lines(tmp_path)[-1]["step"] == 6  # written, but the checkpoint is of step 4
  with pytest.raises(Crash):
    run(tmp_path, crash_at(5))
  assert [line["step"] for line in lines(tmp_path)] == [2, 3, 4]


def test_a_run_goes_on_with_changes_that_leave_its_arrays(tmp_path):
  run(tmp_path, num_steps=4)
  changes = {"seed": 5, "batch_size": 8}
  with pytest.raises(InputError, match=r"batch_size: 4 there, 8 now.*--resume_with_changes"):
    run(tmp_path, **changes)
  with pytest.raises(InputError, match="does not fit with the changes of batch_size, seed, width"):
    run(tmp_path, with_changes=True, width=6, **changes)
  assert run(tmp_path, with_changes=True, **changes).step == 12
  noted = [json.loads(line) for line in (tmp_path / "changes.jsonl").read_text().splitlines()]
  assert noted == [
    {"step": 4, "key": "config.batch_size", "old": 4, "new": 8},
    {"step": 4, "key": "config.seed", "old": 3, "new": 5},
  ]
  run(tmp_path, **changes)  # it is the workdir's configuration now


def test_while_a_new_phase_compiles_the_steps_before_can_be_saved(tmp_path, monkeypatch):
  """By the watchdog, since a compilation cannot be left."""
  prepare = step.Step.prepare

  def compile_long(self, phase, *arguments):
    prepare(self, phase, *arguments)
    if phase == "late":
      watchdog.unsaved._save()
      raise Crash

  monkeypatch.setattr(step.Step, "prepare", compile_long)
  with pytest.raises(Crash):
    run(tmp_path)
  assert watchdog.unsaved._save is None
  assert Checkpoints(tmp_path).sound_step() == 6


def test_another_seed_trains_otherwise(tmp_path, undisturbed):
  assert not np.array_equal(run(tmp_path, seed=4).params["w"], undisturbed[0].params["w"])


def test_stop_keeps_the_last_checkpoint(tmp_path):
  with pytest.raises(FloatingPointError, match=r"grad_norm is nan.* at step 8.*resume_with_change"):
    run(tmp_path, bad_step=8)  # a step that is to be saved
  assert Checkpoints(tmp_path).sound_step() == 4


@pytest.mark.parametrize(("step", "saved"), [(3, "there is no checkpoint yet"), (5, "is step 4")])
def test_a_state_that_is_not_finite_is_not_saved_even_by_a_signal(tmp_path, step, saved):
  """Its loss and gradients are."""

  def phase(config, now):
    if now == step:
      signal.raise_signal(signal.SIGTERM)
    return toy_task.phase(config, now)

  task = SimpleNamespace(**{**vars(toy_task), "phase": phase})
  with pytest.raises(log.NotFinite, match=rf"state are not finite at step {step}; .*{saved}"):
    loop.run(task, toy_task.config(bad_update=step), tmp_path)
  assert Checkpoints(tmp_path).sound_step() == (None if step == 3 else 4)


@pytest.mark.parametrize("name", ["cpu", "tpu"])
@pytest.mark.parametrize("place", ["params", "ema", "momentum", ""])
def test_every_array_of_a_state_is_checked(monkeypatch, name, place):
  monkeypatch.setattr(functional, "platform", lambda: name)
  state = toy_task.init_state(toy_task.config(), jax.random.key(0))
  if place:
    broken = jax.tree.map(lambda x: x.at[1, 2].set(jnp.inf), getattr(state, place))
    state = state.replace(**{place: broken})
  flags = jax.tree.leaves(functional.finite_state(state))
  assert all(flags) == (not place)
  assert len(flags) == {"cpu": 3, "tpu": 1}[name]


def test_a_state_that_is_not_finite_is_skipped(tmp_path):
  before = run(tmp_path / "before", num_steps=8)
  state = run(tmp_path / "skip", num_steps=9, bad_update=9, non_finite="skip")
  assert_same(state.replace(step=before.step), before)


def test_a_checkpoint_that_is_not_finite_is_refused(tmp_path, monkeypatch):
  """One of an older version, which saved it."""
  monkeypatch.setattr(log.Log, "flush", lambda self: None)
  run(tmp_path, num_steps=4, bad_update=4)
  monkeypatch.undo()
  with pytest.raises(InputError, match=r"4 has numbers that are not finite, in .ema\['0.8'\]"):
    run(tmp_path, bad_update=4)
  state = toy_task.init_state(toy_task.config(), jax.random.key(0))
  with pytest.raises(InputError, match=r"ema_0\.8 of the checkpoint .* not finite"):
    restore_item(tmp_path, "ema_0.8", state.ema["0.8"])


def test_skip_leaves_all_but_the_count(tmp_path):
  before = run(tmp_path / "before", num_steps=8)
  state = run(tmp_path / "skip", num_steps=9, bad_step=9, non_finite="skip")
  assert int(state.step) == 9
  assert_same(state.replace(step=before.step), before)
  last = [line for line in lines(tmp_path / "skip") if "skipped_steps" in line][-1]
  assert last == {"step": 9, "skipped_steps": 1}  # no metric of a step that did nothing


def test_skipped_steps_are_counted_over_a_resume_and_bounded(tmp_path):
  settings = {"bad_step": 3, "bad_steps": 2, "non_finite": "skip"}
  run(tmp_path / "two", num_steps=8, **settings)
  run(tmp_path / "two", num_steps=12, **settings)
  told = [line["skipped_steps"] for line in lines(tmp_path / "two") if "skipped_steps" in line]
  assert told == [0, 2, 2, 2, 2, 2]
  with pytest.raises(FloatingPointError, match=r"3 steps in a row .* until step 5"):
    run(tmp_path / "three", **(settings | {"bad_steps": 3}))


def test_flops_are_counted_and_compared_with_what_the_device_can(tmp_path, monkeypatch):
  monkeypatch.setitem(hardware.PEAK_FLOPS, jax.devices()[0].device_kind, 1e6)
  run(tmp_path, num_steps=2)
  (line,) = [line for line in read_metrics(tmp_path) if "mfu" in line]
  flops = 2 * 2 * 4 * 3 * 5 * line["steps_per_second"]  # x @ w, and its gradient for w
  assert line["model_tflops_per_second"] == pytest.approx(flops / 1e12)
  assert line["mfu"] == pytest.approx(flops / 1e6 / jax.device_count())


def test_the_step_is_compiled_once_a_phase_and_another_time_is_said(tmp_path, capsys, caplog):
  chex.clear_trace_counter()
  once = chex.assert_max_traces(n=2)(toy_task.train_step)
  config = toy_task.config()
  with jax.log_compiles():
    loop.run(SimpleNamespace(**{**vars(toy_task), "train_step": once}), config, tmp_path / "once")
  assert caplog.text.count("Finished XLA compilation of jit(_guarded)") == 2
  assert "traced and compiled again" not in capsys.readouterr().out

  def data(*arguments):
    batches = iter(toy_task.train_data(*arguments))
    return ({"x": x["x"].astype("float16" if n == 3 else "float32")} for n, x in enumerate(batches))

  loop.run(SimpleNamespace(**{**vars(toy_task), "train_data": data}), config, tmp_path / "again")
  assert capsys.readouterr().out.count("traced and compiled again") == 1


@pytest.mark.parametrize("policy", ["full", "dots"])
def test_recomputation_does_not_count_as_work_of_the_model(policy):
  def flops_of(config):
    config = FrozenConfigDict(config)
    jitted = step.jit_step(training.train_step, config, None)
    init = functools.partial(training.init_state, config)
    batch = {
      "latent": jax.ShapeDtypeStruct((8, 4, 4, 3), jnp.float32),
      "label": jax.ShapeDtypeStruct((8,), jnp.int32),
    }
    key = jax.random.key(0)
    traced = jitted.trace("uniform", jax.eval_shape(init, key), {}, batch, key)
    return flops.count(traced.jaxpr)

  config = configs.base.diffusion()
  sizes = {"input_size": 4, "in_channels": 3, "hidden_size": 24, "num_heads": 2, "depth": 2}
  config.model.update(sizes | {"num_classes": 5, "remat_policy": policy})
  plain = flops_of(config)
  config.model.use_checkpoint = True
  assert (flops_of(config) > 1.2 * plain) == (policy == "full")
  assert flops_of(step.without_recomputation(FrozenConfigDict(config))) == plain
  # Forward, and backward twice that, of 16 tokens: 4 D^2 of attention, 3 D (8/3 D) of the MLP.
  products = 8 * 16 * 2 * (4 * 24**2 + 3 * 24 * 64)
  assert plain == pytest.approx(6 * products, rel=0.3)


def test_norms_of_the_weights_and_their_average_are_logged(tmp_path):
  state = run(tmp_path, num_steps=5)
  told = [line for line in read_metrics(tmp_path) if "loss" in line]
  assert [line["step"] for line in told if "ema_0.8_norm" in line] == [2, 4, 5]
  assert told[-1]["param_norm"] == pytest.approx(np.linalg.norm(state.params["w"]))
  assert told[-1]["ema_0.8_norm"] == pytest.approx(np.linalg.norm(state.ema["0.8"]["w"]))


@pytest.mark.parametrize("output", ["/dev/full", "a pipe that nobody reads", "closed", "ASCII"])
def test_a_training_goes_on_when_nobody_can_read_its_output(tmp_path, environment, output):
  words = [sys.executable, "-m", "tests.toy_task", str(tmp_path / "\N{SNOWMAN}"), "0", "10"]
  if output == "closed":
    words = ["sh", "-c", f"exec {shlex.join(words)} >&- 2>&-"]
  with open(output if output == "/dev/full" else os.devnull, "w") as stream:
    process = subprocess.Popen(
      words,
      cwd=ROOT,
      env=environment | {"PYTHONIOENCODING": "ascii"},
      stdout=subprocess.PIPE if "pipe" in output else stream,
      stderr=stream,
    )
    if process.stdout:
      process.stdout.close()
    assert process.wait(timeout=100) == 0
  assert read_metrics(tmp_path / "\N{SNOWMAN}")[-1]["step"] == 40


def test_initial_weights_are_for_a_run_without_a_checkpoint(tmp_path):
  asked = []

  def initial_weights():
    asked.append(True)
    return lambda state: state.replace(params=jax.tree.map(jax.numpy.zeros_like, state.params))

  def begin(num_steps):
    config = toy_task.config(num_steps=num_steps)
    return loop.run(toy_task, config, tmp_path / "run", initial_weights=initial_weights)

  begin(4)
  state = begin(8)
  assert asked == [True]
  other = loop.run(toy_task, toy_task.config(num_steps=8), tmp_path / "other")
  assert not np.array_equal(state.params["w"], other.params["w"])


def test_workdir_of_another_configuration_is_refused_by_the_key(tmp_path):
  run(tmp_path, num_steps=2)
  kept = (tmp_path / "config.json").read_bytes(), (tmp_path / "metrics.jsonl").read_bytes()
  with pytest.raises(InputError, match=r"config\.seed: 3 there, 5 now"):
    run(tmp_path, num_steps=2, seed=5)
  assert kept == (
    (tmp_path / "config.json").read_bytes(),
    (tmp_path / "metrics.jsonl").read_bytes(),
  )


@pytest.mark.parametrize(
  "line", [b"5", b"{}", b'{"step": "x"}', b'{"step": 2, "loss": "x"}', b"\xff"]
)
def test_a_damaged_line_of_the_metrics_is_named(tmp_path, line):
  (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b"\n")
  with pytest.raises(InputError, match=r"metrics\.jsonl, line 2, is damaged"):
    read_metrics(tmp_path)


def test_metrics_that_an_editor_saved_are_read(tmp_path):
  lines = b'\xef\xbb\xbf{"step": 1, "loss": 2}\r\n{"step": 2, "loss": NaN}\r\n'
  (tmp_path / "metrics.jsonl").write_bytes(lines)
  assert read_metrics(tmp_path) == [{"step": 1, "loss": 2}, {"step": 2, "loss": None}]


def test_too_little_disk_space_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
  with pytest.raises(InputError, match="MiB free"):
    run(tmp_path)
  # Nor does a smaller model in the same workdir meet the configuration of this one.
  assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"batch_size": 0}, "batch_size is 0"),
    ({"mesh": {"data": 3, "fsdp": 5}}, "data=3 x fsdp=5"),
  ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_written(tmp_path, changes, named):
  with pytest.raises(InputError, match=named):
    run(tmp_path / "new", **changes)
  assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_tells_how_to_go_on(tmp_path, environment, number):
  # No checkpoint is due before the end.
  words = ["-m", "tests.toy_task", str(tmp_path / "stopped"), "0.1", "100"]
  process = subprocess.Popen(
    [sys.executable, *words], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
  )
  while process.poll() is None and not read_metrics(tmp_path / "stopped"):
    time.sleep(0.02)
  process.send_signal(number)
  _, told = process.communicate(timeout=60)
  assert process.returncode == 128 + number
  assert "Traceback" not in told
  command = told.strip().splitlines()[-1].removeprefix("stopped; resume with: ")
  assert shlex.split(command) == ["cd", str(ROOT), "&&", sys.executable, *words]
  stopped = Checkpoints(tmp_path / "stopped").sound_step()
  assert stopped is not None
  assert 2 <= stopped < 40
  # In place of the command, which waits: the same task at full speed.
  resumed = loop.run(toy_task, toy_task.config(num_steps=40), tmp_path / "stopped")
  assert_same(resumed, loop.run(toy_task, toy_task.config(num_steps=40), tmp_path / "whole"))
