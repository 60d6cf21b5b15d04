"""The protocol between the scripts beside this one and `torch_process.py`, which starts them."""

import json
import sys
from collections.abc import Callable
from typing import Any


def serve(begin: Callable[[Any], tuple[Any, Callable[[Any], Any] | None]]) -> None:
  """Answers each line of the standard input, a question in JSON, with a line of JSON.

  `begin` takes the first question, the job, and returns its answer, and the function that answers
  further questions, if there are any. What libraries print goes to the standard error.
  """
  answers, sys.stdout = sys.stdout, sys.stderr
  about, answer = begin(json.loads(sys.stdin.readline()))
  print(json.dumps(about), file=answers, flush=True)
  if answer:
    for line in sys.stdin:
      print(json.dumps(answer(json.loads(line))), file=answers, flush=True)
