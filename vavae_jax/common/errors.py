"""The one exception type for input that a person can correct.

Commands catch it and print its message without a traceback; anything else that escapes is a bug
and keeps its traceback.
"""

LONGEST = 4_000  # message


class InputError(ValueError):
  """What was given cannot be used: the message names it, what is needed, and what to do."""

  def __init__(self, message: str):
    if len(message) > LONGEST:  # somebody gave a text of any length
      message = f"{message[: LONGEST // 2]} ... {message[-LONGEST // 2 :]}"
    super().__init__(printable(message))


def printable(text: str) -> str:
  r"""The text in one line, with control characters and bytes that are none as in "a\nb\xff"; names
  come from strangers and from other systems.
  """
  return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
  if "\udc80" <= character <= "\udcff":  # a byte of a name that is not UTF-8, as Python has it
    return f"\\x{ord(character) - 0xDC00:02x}"
  return ascii(character)[1:-1]
