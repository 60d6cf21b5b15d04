"""The one exception type for input that a person can correct.

Commands catch it and print its message without a traceback; anything else that escapes is a bug
and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping

LONGEST = 4_000  # message


class InputError(ValueError):
  """What was given cannot be used: the message names it, what is needed, and what to do."""

  def __init__(self, message: str):
    if len(message) > LONGEST:  # somebody gave a text of any length
      message = f"{message[: LONGEST // 2]} ... {message[-LONGEST // 2 :]}"
    super().__init__(printable(message))


@contextlib.contextmanager
def naming(names: Mapping[str, str]) -> Iterator[None]:
  """InputErrors of this block name settings as who gave them knows them; see `renamed`."""
  try:
    yield
  except InputError as error:
    error.args = (renamed(str(error), names), *error.args[1:])
    raise


def renamed(text: str, names: Mapping[str, str]) -> str:
  """A message where keys and flags have other names, such as {"config.sample.": "--"}.

  A name that ends in a dot stands for all that begin so; what is renamed already stays.
  """

  def new(found: re.Match[str]) -> str:
    old = found[0] if found[0] in names else found[0].removeprefix("--")
    dashes = "--" if old != found[0] and not names[old].startswith("--") else ""
    return dashes + names[old]

  def pattern(old: str) -> str:
    done = re.escape(names[old].removeprefix(old)) if names[old].startswith(old) else r"json\b"
    dashes = "" if old.startswith("--") else "(?:--)?"
    return f"{dashes}{re.escape(old)}" + (rf"(?!json\b|{done})" if old[-1] == "." else r"(?!\w)")

  longest_first = sorted(names, key=len, reverse=True)
  return re.sub(rf"(?<![\w./-])(?:{'|'.join(map(pattern, longest_first))})", new, text)


def printable(text: str) -> str:
  r"""The text in one line, with control characters and bytes that are none as in "a\nb\xff"; names
  come from strangers and from other systems.
  """
  return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
  if "\udc80" <= character <= "\udcff":  # a byte of a name that is not UTF-8, as Python has it
    return f"\\x{ord(character) - 0xDC00:02x}"
  return ascii(character)[1:-1]
