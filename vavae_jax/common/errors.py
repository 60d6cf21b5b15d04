"""The one exception type for input that a person can correct.

Commands catch it and print its message without a traceback; anything else that escapes is a bug
and keeps its traceback.
"""


class InputError(ValueError):
  """What was given cannot be used: the message names it, what is needed, and what to do."""
