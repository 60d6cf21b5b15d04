"""How the scripts beside this one talk with the process that started them (`torch_process.py`)."""

import json
import sys
from collections.abc import Callable
from typing import Any


def serve(begin: Callable[[Any], tuple[Any, Callable[[Any], Any] | None]]) -> None:
  """Answers each line of the standard input, a question in JSON, with a line of JSON.

  What libraries print goes to the standard error.

  Args:
    begin: takes the first question, the job; gives its answer, and the function that answers each
      further question, if there are any.
  """
  answers, sys.stdout = sys.stdout, sys.stderr
  about, answer = begin(json.loads(sys.stdin.readline()))
  print(json.dumps(about), file=answers, flush=True)
  if answer:
    for line in sys.stdin:
      print(json.dumps(answer(json.loads(line))), file=answers, flush=True)
