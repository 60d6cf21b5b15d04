"""Measures how fast this project is on this machine."""

from __future__ import annotations

from launch.engine import subcommands
from launch.lab.benchmark import fid, loading, page, parts, steps

if __name__ == "__main__":
  kinds = {"steps": steps, "loading": loading, "fid": fid, "parts": parts, "page": page}
  subcommands.run(
    __doc__,
    {
      name: subcommands.Subcommand(
        kind.__doc__ or "",
        kind.main,
        kind.define_flags,
        getattr(kind, "CONFIG", None),
        several=kind is not page,  # which runs jobs
      )
      for name, kind in kinds.items()
    },
  )
