"""The former names of commands: each leads to one that exists."""

from __future__ import annotations

import ast
import importlib.util

import pytest

from tests.conftest import ROOT

MOVED = sorted((ROOT / "launch" / "lab" / "moved").glob("*.py"))


@pytest.mark.parametrize("path", MOVED, ids=lambda path: path.stem)
def test_a_former_name_leads_to_a_command(path):
  (call,) = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
  old, new = (argument.value for argument in call.args)
  assert old == f"launch.{path.stem}"
  module = new.split()[0]
  spec = importlib.util.find_spec(module)
  assert spec
  if spec.submodule_search_locations:
    assert importlib.util.find_spec(f"{module}.__main__")


def test_a_former_name_says_where_it_went_and_works(command):
  done = command("launch.compile", "--help")
  assert "launch.compile moved: use python -m launch.lab.plan." in done.stderr
  assert "--topology" in done.stdout
