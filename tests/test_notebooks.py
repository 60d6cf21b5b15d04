"""The notebooks run, on the session's tiny pipeline instead of a training of minutes."""

from __future__ import annotations

import ast
import configparser
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from launch.__main__ import COMMANDS
from launch.quickstart import EMOJI_RUN
from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def code_of(path) -> list[tuple[str, list[str]]]:
  """(source, tags) of each cell of code."""
  cells = json.loads(path.read_text())["cells"]
  assert all(cell.get("outputs", []) == [] for cell in cells)
  code = [cell for cell in cells if cell["cell_type"] == "code"]
  assert all(cell["execution_count"] is None for cell in code)
  return [("".join(cell["source"]), cell["metadata"].get("tags", [])) for cell in code]


def run(source: str, names: dict) -> object:
  """Runs a cell and returns what it shows."""
  *body, last = ast.parse(source).body
  if not isinstance(last, ast.Expr):
    body, last = [*body, last], None
  exec(compile(ast.Module(body, []), "cell", "exec"), names)
  return eval(compile(ast.Expression(last.value), "cell", "eval"), names) if last else None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, pipeline, pictures, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  extras = configparser.ConfigParser()
  extras.read(ROOT / "setup.cfg")
  names, shown = {}, []
  for source, tags in code_of(path):
    if "install" in tags:
      # From the checkout: what an index has under the project's name would be somebody else's.
      (extra,) = re.findall(r"pip install -q \"?\{CHECKOUT\}(?:\[(\w+)\])?", source)
      assert extra in {"", *extras["options.extras_require"]}
    elif "checkout" in tags:
      continue  # has a test of its own
    elif source.startswith("!"):
      program, command, *flags = shlex.split(source[1:])
      module = ROOT / f"{COMMANDS[command].replace('.', '/')}.py"
      assert program == "vavae"
      for flag in flags:
        assert f'"{flag.partition("=")[0].removeprefix("--")}"' in module.read_text()
    else:
      shown.append(run(source, names))
    if "parameters" in tags:
      names.update(PICTURES=str(pictures), WORKDIR=str(pipeline))
  seen = [picture for picture in shown if isinstance(picture, Image.Image)]
  assert len(seen) >= 5
  assert all(min(picture.size) >= 96 for picture in seen)


def test_a_notebook_finds_its_checkout_or_clones_it(tmp_path, monkeypatch):
  (source,) = (source for source, tags in code_of(NOTEBOOKS[1]) if "checkout" in tags)
  monkeypatch.chdir(NOTEBOOKS[1].parent)
  run(source, found := {})
  assert Path(found["CHECKOUT"]).resolve() == ROOT

  monkeypatch.chdir(tmp_path)  # as Colab opens it
  with pytest.raises(ValueError, match="set REPOSITORY above"):
    run(source, {})
  copy = tmp_path / "copy"
  copy.mkdir()
  (copy / "setup.cfg").write_text("here")
  git = ("git", "-C", str(copy), "-c", "user.name=x", "-c", "user.email=x@x")
  for words in (("init", "-q"), ("add", "."), ("commit", "-qm", "one")):
    subprocess.run([*git, *words], check=True)
  source = source.replace('REPOSITORY = ""', f'REPOSITORY = "{copy.as_uri()}"')
  for _ in range(2):  # a session that starts again has it already
    run(source, cloned := {})
  assert (tmp_path / cloned["CHECKOUT"] / "setup.cfg").read_text() == "here"
  assert cloned["CHECKOUT"].startswith("./")  # else pip asks an index for that package


def test_the_quickstarts_workdir_is_found_from_where_jupyter_starts():
  (source,) = (source for source, tags in code_of(NOTEBOOKS[0]) if "parameters" in tags)
  run(source, names := {})
  assert (NOTEBOOKS[0].parent / names["WORKDIR"]).resolve() == ROOT / EMOJI_RUN


def test_there_are_two():
  assert [path.stem for path in NOTEBOOKS] == ["inside_va_vae", "your_pictures"]
