"""A region of a Markdown page that a command rewrites; the rest of the page is written by hand."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from vavae_jax.common.errors import InputError
from vavae_jax.common.files import atomic_file


class Region(NamedTuple):
  """The text between the lines `begin` and `end` of a page; `heading` is that of a new page."""

  begin: str
  end: str
  heading: str

  def check(self, page: Path) -> None:
    """Raises InputError if the page cannot be written; to be called before the results are made."""
    if page.is_dir():
      raise InputError(f"--page is {page}, a folder; give the name of a file in it.")
    self._around(page)
    page.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(page.parent, os.W_OK):
      raise InputError(f"--page is {page}, in a folder that cannot be written to.")

  def write(self, page: Path, lines: Sequence[str]) -> None:
    """Replaces the lines of the region, or writes a new page; InputError without such a region."""
    before, after = self._around(page)
    page.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(page) as file:
      file.write((before + "\n".join([self.begin, "", *lines, self.end]) + after).encode())

  def _around(self, page: Path) -> tuple[str, str]:
    """The text before and after the region."""
    if not page.is_file():
      return f"# {self.heading}\n\n", "\n"
    text = page.read_text()
    begin, end = self.begin, self.end
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
      raise InputError(
        f"{page} has no place for results: a line {begin} and below it a line {end}."
      )
    return text.partition(begin)[0], text.partition(end)[2]


def beside(page: Path, name: str) -> Path:
  """The path of a picture of a page."""
  return page.with_name(f"{page.stem}_{name}.png")


def picture(path: Path | None, caption: str) -> list[str]:
  """The lines that show a picture; none without one."""
  return [f"![{caption}]({path.name})", "", f"*{caption}.*", ""] if path else []


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
  """The lines of a table of texts; all columns but the first are aligned as numbers."""
  lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
  return [f"| {' | '.join(line)} |" for line in lines]
