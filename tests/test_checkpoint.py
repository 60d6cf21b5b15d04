"""Checkpoints restore the saved bits, in parts too; an incomplete one does not count."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from launch.engine.checkpoint import Checkpoints, read_config, survey
from tests import toy_task
from tests.survive import DAMAGES, flip_a_bit, largest_file
from vavae_jax import update
from vavae_jax.common import mesh
from vavae_jax.common.checkpoints import restore_item
from vavae_jax.common.errors import InputError

SETTINGS = toy_task.config()


def make_state(step=1, *, size=5, ema=True):
  params = {"w": jnp.arange(3.0 * size).reshape(3, size) + step, "b": {"c": jnp.ones(7)}}
  average = {"0.8": jax.tree.map(lambda x: x / 2, params)} if ema else {}
  return toy_task.State(jnp.int32(step), params, average, jax.tree.map(jnp.zeros_like, params))


def like(tree):
  everywhere = mesh.replicated(mesh.make_mesh())
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), tree)


def save(workdir, *states, keep=2, **settings):
  checkpoints = Checkpoints(workdir, keep=keep, **settings)
  for state in states:
    checkpoints.save(state, SETTINGS.to_dict())
  checkpoints.close()


def assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("ema", [True, False])
def test_restored_state_is_the_saved_one(tmp_path, ema):
  state = make_state(ema=ema)
  save(tmp_path, state)
  restored, _ = Checkpoints(tmp_path).restore(1, like(state))
  assert set(restored.ema) == ({"0.8"} if ema else set())
  assert_same(restored, state)


def test_a_clipped_trainings_checkpoint_of_earlier_versions_is_read(tmp_path):
  """A tokenizer's, which has two optimizers."""
  params = {"w": jnp.ones((3, 5))}
  moments = optax.adamw(1e-3).init(params)
  state = update.State(jnp.int32(1), params, {}, moments, params, {}, moments)
  chained = (optax.EmptyState(), moments)
  save(tmp_path, dataclasses.replace(state, optimizer=chained, discriminator_optimizer=chained))
  restored, _ = Checkpoints(tmp_path).restore(1, like(state))
  assert_same(restored, state)


def test_a_checkpoint_is_of_its_step_though_the_next_one_reuses_the_memory(tmp_path):
  state = make_state(size=2**20)
  expected = np.array(state.params["w"])
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(state, SETTINGS.to_dict())
  overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
  for _ in range(3):
    state = overwrite(state)
  jax.block_until_ready(state)
  checkpoints.close()
  params, _ = restore_item(tmp_path, "params", like(state.params))
  np.testing.assert_array_equal(params["w"], expected)


def test_ema_and_params_restore_alone(tmp_path):
  state = make_state(4)
  save(tmp_path, make_state(2), state)
  for item, tree in (("params", state.params), ("ema_0.8", state.ema["0.8"])):
    restored, step = restore_item(tmp_path, item, like(tree))
    assert step == 4
    assert_same(restored, tree)
  restored, step = restore_item(tmp_path, "params", like(state.params), step=2)
  assert step == 2
  assert_same(restored, make_state(2).params)


def test_only_the_latest_stay(tmp_path):
  save(tmp_path, *(make_state(i) for i in (1, 2, 3)), keep=2)
  assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]


def test_every_so_many_and_the_best_stay_too(tmp_path):
  def best(steps):
    return 5 if 5 in steps else None

  save(tmp_path, *(make_state(i) for i in range(1, 10)), keep=1, keep_every=4, best=best)
  assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"4", "5", "8", "9"}


# What a shell, a library or a URL would take for something else than a name.
NAMES = ["lr[1e-4]", "a*b?", "{a}", "a%20b#", "~", "a b\nc", "-a", "\N{LATIN SMALL LETTER E}" * 255]


@pytest.mark.parametrize("name", NAMES)
def test_a_workdir_of_any_name_is_saved_and_restored_and_its_neighbours_stay(tmp_path, name):
  near = [tmp_path / each / "checkpoints" / "9.orbax-checkpoint-tmp" for each in ("lr1", "ab")]
  for folder in near:
    folder.mkdir(parents=True)
  save(tmp_path / name, *(make_state(step) for step in (2, 3, 4)))
  assert Checkpoints(tmp_path / name).sound_step() == 4
  assert_same(Checkpoints(tmp_path / name).restore(4, like(make_state()))[0], make_state(4))
  assert all(folder.is_dir() for folder in near)


@pytest.mark.parametrize("name", [b"\xff", b"a\\b", b"gs:"])
def test_a_workdir_that_the_library_cannot_name_is_refused_at_once(tmp_path, name):
  with pytest.raises(InputError, match="cannot hold checkpoints"):
    Checkpoints(tmp_path / os.fsdecode(name))


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used(tmp_path, capsys, kind):
  apply, message = DAMAGES[kind]
  save(tmp_path, make_state(2), make_state(4))
  apply(largest_file(tmp_path / "checkpoints" / "4" / "params"))
  restored, step = restore_item(tmp_path, "params", like(make_state().params))
  assert step == 2
  assert_same(restored, make_state(2).params)
  checkpoints = Checkpoints(tmp_path)
  assert checkpoints.sound_step() == 2
  assert capsys.readouterr().out.count(message) == 2
  # What is left of it is kept, and the step can be saved again.
  assert (tmp_path / "checkpoints" / "damaged-4").is_dir()
  checkpoints.save(make_state(4), SETTINGS.to_dict())
  checkpoints.close()
  assert Checkpoints(tmp_path).sound_step() == 4


@pytest.mark.parametrize("name", [".DS_Store", ".nfs0000000001", "._params"])
def test_hidden_files_of_the_system_are_no_part_of_a_checkpoint(tmp_path, name):
  save(tmp_path, make_state(2), make_state(4))
  folder = tmp_path / "checkpoints"
  for place in (folder, folder / "4", folder / "4" / "params", folder / "4" / ".Trash"):
    place.mkdir(exist_ok=True)
    (place / name).write_bytes(b"foreign")
  assert Checkpoints(tmp_path).sound_step() == 4


def test_a_copied_checkpoint_is_not_taken_for_the_step_of_its_name(tmp_path, capsys):
  save(tmp_path, make_state(2), make_state(4))
  folder = tmp_path / "checkpoints"
  shutil.copytree(folder / "2", folder / "30")
  with pytest.raises(InputError, match="no other checkpoint"):
    restore_item(tmp_path, "params", like(make_state().params), step=30)
  assert Checkpoints(tmp_path).sound_step() == 4
  assert "step 30 is damaged (it is a copy of the checkpoint of step 2)" in capsys.readouterr().out
  # A manifest that was written before it had the step; the state has it too.
  shutil.copytree(folder / "2", folder / "40")
  noted = json.loads((folder / "40" / "manifest.json").read_text())
  (folder / "40" / "manifest.json").write_text(json.dumps({"files": noted["files"]}))
  with pytest.raises(InputError, match="40 holds the state of step 2"):
    Checkpoints(tmp_path).restore(40, like(make_state()))


@pytest.mark.parametrize("name", ["\N{SUPERSCRIPT TWO}", "007", "9 copy"])
def test_what_is_not_called_as_a_step_is_none(tmp_path, name):
  save(tmp_path, make_state(4))
  (tmp_path / "checkpoints" / name).mkdir()
  assert Checkpoints(tmp_path).sound_step() == 4
  (tmp_path / "checkpoints" / "9").write_text("a file")
  assert Checkpoints(tmp_path).sound_step() == 4


def test_a_damaged_checkpoint_that_was_asked_for_is_refused(tmp_path, capsys):
  save(tmp_path, make_state(2), make_state(4))
  flip_a_bit(largest_file(tmp_path / "checkpoints" / "4" / "params"))
  with pytest.raises(InputError, match="no other checkpoint that is sound"):
    restore_item(tmp_path, "params", like(make_state().params), step=4)
  assert "4 is damaged: params/" in capsys.readouterr().out


def test_an_average_restores_where_only_the_parameters_are_damaged(tmp_path):
  save(tmp_path, make_state(2), make_state(4))
  flip_a_bit(largest_file(tmp_path / "checkpoints" / "4" / "params"))
  assert restore_item(tmp_path, "ema_0.8", like(make_state().ema["0.8"]))[1] == 4


def test_a_training_does_not_begin_anew_when_all_its_checkpoints_are_damaged(tmp_path):
  save(tmp_path, make_state(2), make_state(4))
  for step in "24":
    flip_a_bit(largest_file(tmp_path / "checkpoints" / step / "params"))
  with pytest.raises(InputError, match=r"All checkpoints in .* are damaged"):
    Checkpoints(tmp_path).sound_step()


def test_the_survey_reads_every_checkpoint(tmp_path):
  save(tmp_path, make_state(2), make_state(4))
  flip_a_bit(largest_file(tmp_path / "checkpoints" / "2" / "training"))
  two, four = survey(tmp_path)
  assert (two.name, four.name) == ("2", "4")
  assert two.wrong.startswith("training/")
  assert not four.wrong
  assert set(four.items) == {"params", "ema_0.8", "training", "config", "log"}
  assert four.size > make_state().params["w"].nbytes


def test_a_link_in_a_checkpoint_is_not_followed(tmp_path):
  save(tmp_path, make_state(4))
  path = largest_file(tmp_path / "checkpoints" / "4" / "params")
  path.rename(tmp_path / "elsewhere")
  path.symlink_to(tmp_path / "elsewhere")
  with pytest.raises(InputError, match="is a link"):
    restore_item(tmp_path, "params", like(make_state().params))


def test_a_saved_step_is_not_overwritten(tmp_path):
  save(tmp_path, make_state(3))
  save(tmp_path, make_state(3).replace(params=make_state(9).params))
  params, _ = restore_item(tmp_path, "params", like(make_state().params))
  assert_same(params, make_state(3).params)


def test_no_checkpoint_is_an_input_error(tmp_path):
  with pytest.raises(InputError, match="holds no checkpoint"):
    restore_item(tmp_path, "params", {})
  save(tmp_path, make_state(3, ema=False))
  with pytest.raises(InputError, match=r"no checkpoint of step 2 \(there: \[3\]\)"):
    restore_item(tmp_path, "params", {}, step=2)
  with pytest.raises(InputError, match=r"has no ema_0\.8"):
    restore_item(tmp_path, "ema_0.8", {})


def test_half_a_checkpoint_is_ignored(tmp_path, command):
  save(tmp_path, make_state(3))
  done = command("tests.killed", "*/checkpoints/12", "tests.toy_task", tmp_path / "killed", 0, 4)
  assert done.returncode == -9
  names = [p.name for p in (tmp_path / "killed" / "checkpoints").iterdir()]
  assert any(name.startswith("12.") for name in names), names  # what the kill left
  assert Checkpoints(tmp_path / "killed").sound_step() == 8
  state = toy_task.init_state(SETTINGS, jax.random.key(0))
  assert restore_item(tmp_path / "killed", "params", like(state.params))[1] == 8


def test_a_folder_that_is_no_workdir_is_named(tmp_path):
  with pytest.raises(InputError, match=f"{tmp_path} is not a training's workdir"):
    read_config(tmp_path)
