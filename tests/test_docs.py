"""Commands in the documents exist, with their options and configuration keys."""

from __future__ import annotations

import importlib
import io
import json
import re
import runpy
import shlex
import subprocess
import sys
import tarfile

import numpy as np
import pytest

import launch.__main__
from configs import base, quickstart
from configs.lab import beyond, dilemma, training
from configs.page import page as page_of_keys
from launch.__main__ import COMMANDS
from launch.engine.configuration import flat, resolve
from tests.conftest import ROOT
from vavae_jax.data import sources

LAB = ROOT / "launch" / "lab" / "README.md"
PAGES = [ROOT / "README.md", LAB, *sorted((ROOT / "docs").rglob("*.md"))]
# Where none is given.
OWN_CONFIG = {
  "launch.lab.dilemma": "configs/lab/dilemma.py",
  "launch.lab.beyond": "configs/lab/beyond.py",
  "launch.lab.benchmark page": "configs/lab/speed.py",
  "launch.lab.equivalence training": "configs/lab/training.py",
}
COMMAND = re.compile(r"(?:-m|--|sbatch) (launch\.(?:[^`&\n\\]|\\\n)*)")
SHORT = re.compile(r"^vavae ([a-z]+)", re.MULTILINE)
WITH_SUBCOMMANDS = ("launch.evaluate", "launch.lab.benchmark", "launch.lab.equivalence")
# Prints what each command's --help says, from forks of one process that has imported jax.
HELP = """
import json, os, runpy, sys, warnings
import flax.nnx, grain, launch.restore, ml_collections.config_flags, optax
warnings.simplefilter("ignore")
for command in json.load(sys.stdin):
  print("COMMAND", command, flush=True)
  child = os.fork()
  if not child:
    module, *rest = command.split()
    sys.argv = [module, *rest, "--help"]
    try:
      runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
      sys.stdout.flush()
      os._exit(0)
  os.waitpid(child, 0)
"""


def commands() -> list[tuple[str, str, list[str]]]:
  """(page, command with its subcommand, options) of each command in the pages."""
  found = []
  for page in PAGES:
    for match in COMMAND.finditer(SHORT.sub("-m launch.\\1", page.read_text())):
      line = match[1].replace("\\\n", " ")
      # A command within quotes, as a launcher takes it, ends with the second quote.
      module, *options = shlex.split(line.rstrip('"') if line.count('"') % 2 else line, True)
      module = COMMANDS.get(module.removeprefix("launch."), module)
      if options and re.fullmatch(r"[a-z]+", options[0]) and module in WITH_SUBCOMMANDS:
        module = f"{module} {options.pop(0)}"
      found.append((str(page.relative_to(ROOT)), module, options))
  return found


@pytest.fixture(scope="module")
def known() -> dict[str, set[str]]:
  """{command: its flags, as its own --help lists them}."""
  names = sorted({command for _, command, _ in commands()})
  output = subprocess.run(
    [sys.executable, "-c", HELP],
    cwd=ROOT,
    input=json.dumps(names),
    text=True,
    capture_output=True,
    check=True,
  ).stdout
  parts = re.split(r"^COMMAND (.*)$", output, flags=re.MULTILINE)[1:]
  return {
    name: set(re.findall(r"^  --(?:\[no\])?(\w+)", text, re.MULTILINE))
    for name, text in zip(parts[::2], parts[1::2], strict=True)
  }


@pytest.mark.parametrize(
  ("command", "options"),
  [pytest.param(*rest, id=f"{page}: {' '.join(rest[0:1])}") for page, *rest in commands()],
)
def test_commands_of_the_documents_can_be_given(command, options, known):
  assert known[command], f"{command} has no --help"
  given = dict(word.removeprefix("--").partition("=")[::2] for word in options if word[0] == "-")
  config = None
  if path := given.get("config", OWN_CONFIG.get(command)):
    if path.isupper():
      path = "configs/lightningdit.py"
    name, _, argument = path.removesuffix(".py").partition(".py:")
    arguments = [argument] if argument else []
    config = importlib.import_module(name.replace("/", ".")).get_config(*arguments)
  for option in given:
    if option.startswith("config."):
      assert config is not None
      assert option.removeprefix("config.") in dict(flat(config.to_dict())), option
    else:
      assert option in known[command] | {"config", "help"}, option
  if config is not None and "task" in config:
    resolve(config, base.KEYS[config.task])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_shell_reads_the_commands_of_the_documents(page):
  """Of blocks without a language, and of words that begin as options do."""
  block = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
  text = page.read_text()
  lines = [content for language, content in block.findall(text) if not language]
  lines += re.findall(r"`((?:--|python -m )[^`\n]*)`", block.sub("", text))
  done = subprocess.run(["bash", "-n"], input="\n".join(lines), text=True, capture_output=True)
  assert done.returncode == 0, done.stderr


def test_the_recipes_of_the_documents_take_their_arguments():
  """In tables and sentences too."""
  for page in PAGES:
    for path, argument in re.findall(r"configs/([\w/]+)\.py:([\w,./-]*\w)", page.read_text()):
      module = importlib.import_module(f"configs.{path.replace('/', '.')}")
      assert module.get_config(argument), page


def test_the_one_name_of_all_commands_takes_those_of_the_readme(monkeypatch):
  rows = re.findall(r"^\| (`launch\.[^|]*) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
  names = [name.removeprefix("launch.lab.") for row in rows for name in re.findall("`(.*?)`", row)]
  run = []
  monkeypatch.setattr(runpy, "run_module", lambda module, **_: run.append(module))
  for name in names:
    monkeypatch.setattr(sys, "argv", ["vavae", name.removeprefix("launch.")])
    launch.__main__.main()
  assert sorted(run) == sorted(COMMANDS.values())


def test_the_readme_is_short_and_counts_its_reading_path():
  text = (ROOT / "README.md").read_text()
  assert len(text.splitlines()) <= 150
  count, files = re.search(r"([\d,]+) lines in this order: (.*?)\n\n", text, re.DOTALL).groups()
  lines = sum(len((ROOT / path).read_text().splitlines()) for path in re.findall(r"`(.*?)`", files))
  assert lines <= int(count.replace(",", "")) <= 4_700


def test_functions_that_the_readme_names_are_where_it_says():
  found = re.findall(r"`(\w+)` in \[([\w/.]+)\]", (ROOT / "README.md").read_text())
  assert len(found) == 3
  for name, path in found:
    assert f"\ndef {name}(" in (ROOT / path).read_text(), f"{path} has no {name}"


def test_the_keys_in_the_documents_exist():
  """In sentences too, as `config.KEY`, `config.SECTION` or `config.SECTION.KEY`."""
  tables = list(base.KEYS.values())
  tables += [quickstart.pipeline().to_dict()]
  tables += [module.experiment().to_dict() for module in (beyond, dilemma, training)]
  known = {"json"}  # a workdir's file
  for name in (name for table in tables for name, _ in flat(table)):
    parts = name.split(".")
    known |= {".".join(parts[: i + 1]) for i in range(len(parts))}
  added = {"docs/extending.md": {"loss.l2_weight", "model.use_layer_scale"}}
  for page in [*PAGES, *(ROOT / "docs" / "notebooks").glob("*.ipynb")]:
    name = str(page.relative_to(ROOT))
    keys = set(re.findall(r"\bconfig((?:\.[a-z_]\w*)+)", page.read_text()))
    assert {key[1:] for key in keys} <= known | added.get(name, set()), name


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


def test_the_page_of_all_keys_is_that_of_the_table():
  written = (ROOT / "docs" / "configuration.md").read_text()
  assert written == page_of_keys() + "\n", "python -m configs.page > docs/configuration.md"
