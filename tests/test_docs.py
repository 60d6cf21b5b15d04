"""Commands in the documents exist, with their options and configuration keys."""

from __future__ import annotations

import importlib
import io
import re
import shlex
import tarfile

import numpy as np
import pytest

from configs import base
from launch.engine.configuration import flat, resolve
from tests.conftest import ROOT
from vavae_jax.data import sources

PAGES = (
  "README.md",
  *(
    f"docs/{name}.md"
    for name in ("tutorial", "tokenizer", "data", "evaluation", "lab/dilemma", "lab/performance")
  ),
)
# Where none is given.
OWN_CONFIG = {
  "launch.lab.dilemma": "configs/lab/dilemma.py",
  "launch.lab.benchmark page": "configs/lab/speed.py",
}
COMMAND = re.compile(r"^\s*(?:.*`)?(python -m launch\.(?:[^`\n\\]|\\\n)*)", re.MULTILINE)


def commands():
  for page in PAGES:
    for found in COMMAND.finditer((ROOT / page).read_text()):
      words = shlex.split(found.group(1).replace("\\\n", " "))
      yield pytest.param(words, id=f"{page}: {' '.join(words[2:5])}")


@pytest.mark.parametrize("words", commands())
def test_commands_of_the_documents_can_be_given(words):
  _, _, module, *options = words
  if module == "launch.lab.benchmark":
    module = f"{module} {options.pop(0)}"
  folder = ROOT / module.replace(".", "/").replace(" ", "/")
  source = (folder / "__main__.py" if folder.is_dir() else folder.with_suffix(".py")).read_text()
  known = set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', source))
  if module in ("launch.lab.benchmark steps", "launch.lab.benchmark page"):
    known |= {"reference", "taming", "torch_python", "compare", "tolerance", "update"}
  if module in ("launch.sample", "launch.evaluate"):
    known |= set(base.sample())
  given = dict(word.removeprefix("--").partition("=")[::2] for word in options if word[0] == "-")
  config = None
  if path := given.get("config", OWN_CONFIG.get(module)):
    name, _, argument = path.removesuffix(".py").partition(".py:")
    arguments = [argument] if argument else []
    config = importlib.import_module(name.replace("/", ".")).get_config(*arguments)
  for option in given:
    if option.startswith("config."):
      assert config is not None
      assert option.removeprefix("config.") in dict(flat(config.to_dict())), option
    else:
      assert option in known | {"config", "help", "trace", "trace_after", "trace_seconds"}, option
  if config is not None and "task" in config:
    resolve(config, getattr(base, config.task)())


def test_the_keys_in_the_tutorial_exist():
  text = (ROOT / "docs" / "tutorial.md").read_text()
  known = dict(flat(base.diffusion().to_dict()))
  keys = re.findall(r"--config\.([\w.]+)", text)
  assert len(keys) > 10
  assert set(keys) <= set(known)


def test_cifar10_becomes_zips_of_class_folders(tmp_path, monkeypatch):
  """By the lines of docs/data.md, from files as its own page offers them."""
  monkeypatch.chdir(tmp_path)
  draw = np.random.default_rng(0)
  records = draw.integers(0, 256, (2, 3, 3073), np.uint8)
  records[:, :, 0] = [[0, 1, 1], [1, 0, 1]]
  with tarfile.open("cifar-10-binary.tar.gz", "w:gz") as archive:
    for name, data in (
      ("batches.meta.txt", b"airplane\ncar\n\n"),
      ("data_batch_1.bin", records[0].tobytes()),
      ("test_batch.bin", records[1].tobytes()),
      ("readme.html", b"<html>"),
    ):
      member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
      member.size = len(data)
      archive.addfile(member, io.BytesIO(data))
  lines = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "data.md").read_text(), re.DOTALL)
  exec(lines[1], {})
  for split, one in zip(("train", "test"), records, strict=True):
    source = sources.open_source(f"zip:cifar10_{split}.zip")
    assert source.class_names == ["airplane", "car"]
    pictures = [source[i] for i in range(len(source))]
    found = {picture["image"].tobytes(): picture["label"] for picture in pictures}
    assert found == {
      record[1:].reshape(3, 32, 32).transpose(1, 2, 0).tobytes(): record[0] for record in one
    }
