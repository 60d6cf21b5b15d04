"""`python -m tests.reproduced FILE WORKDIR` makes a number, whose record and flags FILE has."""

from __future__ import annotations

import pickle
from pathlib import Path

from launch.engine import console
from launch.reproduce.__main__ import reproduce


def main(file: str, workdir: str) -> None:
  record, given = pickle.loads(Path(file).read_bytes())
  reproduce("number", record, given, Path(workdir), plan=False)


if __name__ == "__main__":
  console.run_command(main, arguments=2, several=True)
