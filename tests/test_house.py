"""Rules of the house, read from the sources by `ast`: nothing is imported."""

from __future__ import annotations

import ast
import configparser
import functools
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

FLOORS = ("vavae_jax", "lightningdit_jax", "launch")  # each imports itself and those before it
LONGEST_FUNCTION = 80  # lines of code, without its docstring


def name_of(path: Path) -> str:
  parts = path.relative_to(ROOT).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def modules() -> dict[str, ast.Module]:
  """{dotted name: parsed file} of the packages, the commands, the recipes and the tests."""
  folders = (*FLOORS, "configs", "tests")
  paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
  return {name_of(path): ast.parse(path.read_text(), str(path)) for path in paths}


def statements(tree: ast.AST) -> Iterator[ast.stmt]:
  """All statements below a node; far fewer than `ast.walk` visits."""
  for field in ("body", "orelse", "handlers", "finalbody", "cases"):
    for node in getattr(tree, field, ()):
      yield node
      yield from statements(node)


@functools.cache
def imports(name: str) -> frozenset[str]:
  """The project's modules that a module imports, inside of functions too."""
  found = set()
  for node in statements(modules()[name]):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{name} has a relative import"
      for alias in node.names:
        inner = f"{node.module}.{alias.name}"
        found.add(inner if inner in modules() else node.module)
  return frozenset(found & modules().keys())


def within(name: str, package: str) -> bool:
  return name == package or name.startswith(f"{package}.")


def breaches(importer, forbidden) -> list[str]:
  """`A -> B` for each import by a module for which `importer` of one for which `forbidden`."""
  return [
    f"{name} -> {other}"
    for name in sorted(filter(importer, modules()))
    for other in sorted(filter(forbidden, imports(name)))
  ]


def test_nothing_outside_the_lab_imports_it():
  # The makers of the reference cases run the PyTorch reference, which the lab does too.
  lab = ("launch.lab", "tests.lab", "tests.reference")
  assert not breaches(
    lambda name: not any(within(name, room) for room in lab),
    lambda other: within(other, "launch.lab") or within(other, "tests.lab"),
  )
  assert not breaches(
    lambda name: within(name, "configs") and not within(name, "configs.lab"),
    lambda other: within(other, "configs.lab"),
  )


def test_the_engine_imports_no_model():
  assert not breaches(
    lambda name: within(name, "launch.engine"),
    lambda other: (
      not within(other, "launch.engine")
      and not within(other, "vavae_jax.common")
      and other not in ("launch", "vavae_jax")
    ),
  )


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_run_downwards(floor):
  below = FLOORS[: FLOORS.index(floor) + 1]
  # The recipes are data: the commands may read them, the packages may not.
  allowed = (*below, "configs") if floor == "launch" else below
  assert not breaches(
    lambda name: within(name, floor),
    lambda other: not any(within(other, package) for package in allowed),
  )


def test_recipes_import_only_recipes_and_the_packages():
  assert not breaches(
    lambda name: within(name, "configs"),
    lambda other: within(other, "launch") or within(other, "tests"),
  )


def test_no_cycle_of_files():
  """Nor of imports that a function makes when it is called."""
  graph = {name: imports(name) - {name} for name in modules()}
  try:
    TopologicalSorter(graph).prepare()
  except CycleError as error:
    pytest.fail(" -> ".join(error.args[1]))


def test_commands_are_few():
  assert len(list((ROOT / "launch").glob("*.py"))) <= 14


def lines_of_code(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
  """Lines from `def` to the end, without the docstring."""
  lines = function.end_lineno - function.lineno + 1
  if ast.get_docstring(function) is not None:
    lines -= function.body[0].end_lineno - function.body[0].lineno + 1
  return lines


def test_functions_are_short():
  long = [
    f"{name}.{node.name}: {lines_of_code(node)} lines"
    for name, tree in modules().items()
    if not within(name, "tests")
    for node in statements(tree)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    and lines_of_code(node) > LONGEST_FUNCTION
  ]
  assert not long


def test_every_output_that_a_flag_names_is_a_place():
  """Of a bucket's address `Path` would make a folder "gs:"."""
  wrong = []
  for path in (ROOT / "launch").rglob("*.py"):
    source, in_lab = path.read_text(), path.is_relative_to(ROOT / "launch" / "lab")
    for flag in re.findall(r'DEFINE_string\(\s*"(output|page|update|workdir)"', source):
      is_output = flag != "workdir" or in_lab  # of other commands it is an input, or tested
      if is_output and f"place(FLAGS.{flag}" not in source:
        wrong.append(f"{path.relative_to(ROOT)}: --{flag}")
  assert not wrong


LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
  """A heading's anchor as GitHub makes it."""
  headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
  return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_of_the_documents_lead_somewhere():
  pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "launch").rglob("*.md")]
  wrong = []
  for page in pages:
    for link in LINK.findall(page.read_text()):
      path, _, anchor = link.partition("#")
      if "://" in link:
        continue
      target = page.parent / path if path else page
      if not target.exists() or (anchor and anchor not in anchors(target)):
        wrong.append(f"{page.relative_to(ROOT)}: {link}")
  assert not wrong


def test_every_mark_is_borne_by_a_test():
  settings = configparser.ConfigParser()
  settings.read(ROOT / "setup.cfg")
  declared = {line.partition(":")[0] for line in settings["tool:pytest"]["markers"].split("\n")}
  sources = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py")]
  borne = {name for source in sources for name in re.findall(r"pytest\.mark\.(\w+)", source)}
  assert declared - {""} <= borne
