"""docs/configuration.md: `python -m configs.page > docs/configuration.md`."""

from collections.abc import Iterator, Mapping
from typing import Any

from configs import base
from vavae_jax.common.keys import Key


def page() -> str:
  """The keys of all trainings, then what each has beside them."""
  tables = {task: dict(_flat(table)) for task, table in base.KEYS.items()}
  first, *others = tables.values()
  shared = {name: key for name, key in first.items() if all(key == t.get(name) for t in others)}
  lines = [
    "# Configuration keys",
    "",
    "Made by `python -m configs.page > docs/configuration.md`. Every key can be set with",
    "`--config.KEY=VALUE`; an impossible value is refused before anything starts. The recipes in",
    "`configs/` change the defaults.",
  ]
  for title, table in {"all trainings": shared, **tables}.items():
    lines += ["", f"## {title.capitalize()}", "", "| key | default | possible | meaning |"]
    lines += ["|---|---|---|---|"]
    for name, key in table.items():
      if table is shared or name not in shared:
        cells = (f"`{name}`", f"`{key.default!r}`", key.needed().partition(" ")[2], key.text)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
  return "\n".join(lines)


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Key]]:
  for name, key in table.items():
    yield from [(prefix + name, key)] if isinstance(key, Key) else _flat(key, f"{prefix}{name}.")


if __name__ == "__main__":
  print(page())
