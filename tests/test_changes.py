"""Which pictures are held out, and what happens to a training whose pictures change."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ml_collections import ConfigDict, FrozenConfigDict
from PIL import Image

from configs import base, quickstart
from launch import encode, restore
from launch.engine import configuration, loop
from launch.engine.checkpoint import read_config
from launch.evaluation import pictures as picture_sets
from launch.prepare import prepare
from launch.train import train
from vavae_jax.common.errors import InputError
from vavae_jax.data import changes, selection, sources


def data(source: str, **changes) -> FrozenConfigDict:
  config = base.tokenizer().data
  config.update({"source": source, "held_out": 0.3, **changes})
  return FrozenConfigDict(config)


@pytest.fixture
def folder(tmp_path) -> Path:
  for i in range(40):
    add(tmp_path / "set", f"{i:02}")
  return tmp_path / "set"


def add(folder: Path, name: str, size: int = 4) -> None:
  (folder / "a").mkdir(parents=True, exist_ok=True)
  Image.new("RGB", (size, size)).save(folder / "a" / f"{name}.bmp")


def names(source: sources.Source, indices: np.ndarray) -> set[str]:
  return {source.keys()[i] for i in indices}


@pytest.mark.parametrize("rule", ["name", "position"])
def test_a_split_is_seeded_disjoint_and_whole(rule):
  source = sources.open_source("embedded:emoji")
  train, rest = selection.split(source, data("embedded:emoji", split=rule))
  assert sorted([*train, *rest]) == list(range(1852))
  assert len(rest) == pytest.approx(0.3 * 1852, rel=0.1)
  other = selection.split(source, data("embedded:emoji", split=rule, split_seed=1))
  assert 0.2 < np.isin(other[1], rest).mean() < 0.4


def test_published_numbers_keep_their_held_out_pictures():
  held_out = selection.share(FrozenConfigDict(quickstart.tokenizer().data), held_out=True)
  assert (len(held_out), *held_out[:5]) == (185, 12, 53, 68, 72, 77)


@pytest.mark.parametrize("held_out", [0.0, 0.3])
@pytest.mark.parametrize("valid", ["", "embedded:emoji"])
def test_a_training_is_judged_by_pictures_of_all_classes(held_out, valid):
  """Which come one after the other in a source."""
  config = base.tokenizer()
  config.data.update(source="embedded:emoji", held_out=held_out, valid_source=valid)
  source, chosen = selection.evaluation_pictures(FrozenConfigDict(config))
  labels = {source.encoded(int(i))[1] for i in chosen}
  assert (len(chosen), labels) == (64, {*range(len(source.class_names))})


def test_added_and_removed_pictures_move_no_other(folder):
  before = [names(s, i) for s in [sources.open_source(f"folder:{folder}")]
            for i in selection.split(s, data(f"folder:{folder}"))]  # fmt: skip
  add(folder, "055")
  (folder / "a" / "39.bmp").unlink()
  source = sources.open_source(f"folder:{folder}")
  after = [names(source, i) for i in selection.split(source, data(f"folder:{folder}"))]
  assert not before[0] & after[1]
  assert not before[1] & after[0]


def test_a_share_of_no_pictures_is_refused(folder):
  source, given = sources.open_source(f"folder:{folder}"), data(f"folder:{folder}", held_out=1e-9)
  with pytest.raises(InputError, match=r"held_out is 1e-09, which holds out none of the 40"):
    selection.split(source, given)


CHANGES = {
  "2 added": lambda folder: (add(folder, "055"), add(folder, "06x")),
  "1 removed": lambda folder: (folder / "a" / "39.bmp").unlink(),
  "1 of another size": lambda folder: add(folder, "05", size=5),
  "1 added, 1 removed": lambda folder: (folder / "a" / "00.bmp").rename(folder / "a" / "zz.bmp"),
}


def begin(folder: Path, workdir: Path, *, with_changes: bool = False, **changes) -> ConfigDict:
  """Trains zero steps."""
  config = base.tokenizer()
  given = {"source": f"folder:{folder}", "valid_source": f"folder:{folder}", **changes}
  config.data = ConfigDict(data(**given))
  config.num_steps = config.batch_size = 4
  selection.opened.cache_clear()  # as in a process of its own
  selection._training_pictures.cache_clear()
  train(config, workdir, with_changes=with_changes)
  return config


@pytest.fixture(autouse=True)
def no_steps(monkeypatch):
  """Of the loop, what it does to a workdir before it trains."""

  def run(task, config, workdir, *, prepare, with_changes, **others):
    configuration.check_workdir(workdir, config, with_changes=with_changes)
    configuration.claim_workdir(workdir, config, prepare().notes)

  monkeypatch.setattr(loop, "run", run)


@pytest.mark.parametrize("found", CHANGES)
def test_a_change_is_refused_or_counted(found, folder, tmp_path, capsys):
  workdir = tmp_path / "run"
  begin(folder, workdir)
  begin(folder, workdir)
  CHANGES[found](folder)
  with pytest.raises(InputError, match=f"notes: {found}. Bring those back, or .*changed=allow"):
    begin(folder, workdir)
  begin(folder, workdir, changed="allow")
  assert f"warning: folder:{folder} has other pictures" in (said := capsys.readouterr().err)
  assert f"notes: {found}." in said
  begin(folder, workdir)
  assert not capsys.readouterr().err


def test_pictures_that_move_by_position_are_counted(folder, tmp_path):
  begin(folder, tmp_path / "run", split="position")
  add(folder, "000")
  with pytest.raises(
    InputError, match=r"1 added, \d+ moved from the held-out ones to training, \d+ moved from tr"
  ):
    begin(folder, tmp_path / "run")


def test_pictures_that_a_changed_key_moves_are_counted(folder, tmp_path, capsys):
  workdir = tmp_path / "run"
  begin(folder, workdir)
  with pytest.raises(InputError, match=r"config\.data\.held_out: 0\.3 there, 0\.6 now"):
    begin(folder, workdir, held_out=0.6)
  assert not capsys.readouterr().err
  for changed in ({"held_out": 0.6}, {"held_out": 0.6, "split_seed": 1}):
    begin(folder, workdir, with_changes=True, **changed)
    said = capsys.readouterr().err
    assert re.search(r"warning: .*notes: (.*, )?\d+ moved from training to the held-out ones", said)
    begin(folder, workdir, with_changes=True, **changed)
    assert not capsys.readouterr().err
  prepare(f"folder:{folder}", tmp_path / "prepared")
  begin(
    folder, workdir, with_changes=True, source=f"arrayrecord:{tmp_path / 'prepared'}", **changed
  )
  assert "notes: the same names" in capsys.readouterr().err
  begin(folder, workdir, with_changes=True, **changed)
  add(folder.with_name("other"), "00")
  with pytest.raises(InputError, match=r"config\.data\.source"):
    begin(folder.with_name("other"), workdir, held_out=0.0)
  begin(folder.with_name("other"), workdir, with_changes=True, held_out=0.0)
  assert "notes: 39 removed" in capsys.readouterr().err


def test_of_records_without_names_it_is_said_that_they_may_have_moved(tmp_path):
  picture = io.BytesIO()
  Image.new("RGB", (4, 4)).save(picture, "BMP")
  for count in (5, 6):
    rows = [{"image": picture.getvalue()}] * count
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    selection.opened.cache_clear()
    given = data(f"hf:{tmp_path}", held_out=0.0)
    if count == 5:
      (tmp_path / changes.NOTE).write_text(json.dumps(changes.check(tmp_path, given)))
  with pytest.raises(InputError, match=r"1 added, and others may have moved .* by their positions"):
    changes.check(tmp_path, given)


def test_evaluations_and_encodings_refuse_other_pictures(folder, tmp_path):
  workdir = tmp_path / "run"
  config = begin(folder, workdir)
  trained = restore.Trained(workdir, FrozenConfigDict(config), step=1, params={})
  assert len(picture_sets.own_pictures(trained, held_out=True))
  add(folder, "055")
  selection.opened.cache_clear()
  for use in (
    lambda: picture_sets.own_pictures(trained, held_out=True),
    lambda: encode.encode(trained, tmp_path / "latents"),
  ):
    with pytest.raises(InputError, match="notes: 1 added"):
      use()


def test_a_workdir_from_before_there_was_a_choice_keeps_its_split(folder, tmp_path):
  workdir = tmp_path / "run"
  begin(folder, workdir, split="position")
  path = workdir / "config.json"
  noted = json.loads(path.read_text())
  del noted["data"]["split"], noted["data"]["changed"]
  path.write_text(json.dumps(noted))
  (workdir / changes.NOTE).unlink()
  assert read_config(workdir)["data"]["split"] == "position"
  begin(folder, workdir)
  assert json.loads(path.read_text())["data"]["split"] == "position"
  with pytest.raises(InputError, match=r"config\.data\.split: 'position' there, 'name' now"):
    begin(folder, workdir, split="name")


def test_the_note_is_small_and_its_damage_is_named(folder, tmp_path):
  begin(folder, tmp_path)
  note = json.loads((tmp_path / changes.NOTE).read_text())
  assert len(note["source"]["each"]) < 11 * 40
  note["source"].update(each="?", listing="")
  (tmp_path / changes.NOTE).write_text(json.dumps(note))
  with pytest.raises(InputError, match=r"pictures\.json notes, .* damaged"):
    begin(folder, tmp_path)


def test_a_note_without_its_pictures_is_damaged(tmp_path):
  (tmp_path / changes.NOTE).write_text("{}")
  with pytest.raises(InputError, match=r"pictures\.json is damaged \(source: missing"):
    changes.check(tmp_path, FrozenConfigDict(quickstart.tokenizer(tiny=True)).data)
