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
  """The text without control characters; names in files come from strangers."""
  return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
