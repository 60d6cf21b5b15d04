"""A script with PyTorch in a process of its own: a line of JSON for each question and answer."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import IO, Any, Self, cast

from vavae_jax.common.errors import InputError

SCRIPTS = Path(__file__).parent / "torch"


class TorchProcess:
  """One of `SCRIPTS`, which computes only while a question, anything that JSON can hold, waits.

  Use it as a context manager, so that it ends with the work.

  Attributes:
    about: the answer to the job, which is the first question.
  """

  def __init__(self, python: str, script: Path, job: Any, needs: str):
    """Starts the script and waits until it has answered the job.

    Raises InputError, which says that `python` `needs` these modules, if there is no answer.
    """
    try:
      self._process = subprocess.Popen(
        [python, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
      )
    except OSError as error:
      raise InputError(f"--torch_python is {python}, which does not start: {error}.") from error
    self._advice = f"give --torch_python an interpreter with {needs}"
    self.about = self.ask(job)
    self._advice = "it answered before, so nothing is missing from its installation"

  def ask(self, question: Any) -> Any:
    """The answer to one question; InputError where the script has ended instead."""
    to, answers = cast(IO[str], self._process.stdin), cast(IO[str], self._process.stdout)
    try:
      print(json.dumps(question), file=to, flush=True)
      line = answers.readline()
    except BrokenPipeError:
      line = ""
    if not line:
      raise InputError(f"The PyTorch process ended (its message is above); {self._advice}.")
    return json.loads(line)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self._process.terminate()
    self._process.wait()
