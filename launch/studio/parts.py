"""What the tabs share: the models and data of a page, pieces of HTML, errors as messages."""

from __future__ import annotations

import base64
import contextlib
import functools
import inspect
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from launch.studio.content import turn
from vavae_jax.common.errors import InputError
from vavae_jax.data.images import center_crop
from vavae_jax.data.sources.base import decode

_SMALLEST = 256  # pixels of what is saved as an animation
# Of a listener that shows its own progress; of several changes meanwhile the last one counts.
QUIET: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last"}
Controls = Sequence[Any]  # of the tab Generate; the settings of other tabs too


def told(function: Callable[..., Any]) -> Callable[..., Any]:
  """A listener's function, one computation at a time, with errors of input as messages."""

  @functools.wraps(function)
  def once(*arguments: Any) -> Any:
    with turn, _shown():
      return function(*arguments)

  @functools.wraps(function)
  def steps(*arguments: Any) -> Any:
    results, end = function(*arguments), object()
    while True:
      with turn, _shown():  # not while the browser takes what was computed
        if (result := next(results, end)) is end:
          return
      yield result

  return steps if inspect.isgeneratorfunction(function) else once


@contextlib.contextmanager
def _shown() -> Iterator[None]:
  """Raises errors of input as Gradio shows them."""
  try:
    yield
  except InputError as error:
    raise gr.Error(escape(str(error)), print_exception=False, title="Not possible") from error


def opened(upload: Any, size: int) -> Image.Image:
  """A picture that somebody dropped, cropped to a square as for a training.

  Args:
    upload: what Gradio's image gives without its own reading, a file's "path" and "orig_name".
    size: pixels of each side.

  Raises:
    InputError: there is none, or the file is no picture.
  """
  if not upload:
    raise InputError("Drop a picture first.")
  given = upload if isinstance(upload, dict) else upload.model_dump()
  name = given.get("orig_name") or "the file"
  return Image.fromarray(center_crop(decode(Path(given["path"]).read_bytes(), name), size))


def png(picture: Image.Image | np.ndarray) -> bytes:
  """A picture as a file."""
  image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
  buffer = io.BytesIO()
  image.save(buffer, "PNG", compress_level=1)  # many a second
  return buffer.getvalue()


def uri(data: bytes, kind: str = "png") -> str:
  """A picture's file as a data URI."""
  return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def tile(picture: Image.Image | np.ndarray, caption: str = "", kind: str = "") -> str:
  """A picture over its caption."""
  text = escape(caption)
  return (
    f'<figure class="tile {kind}"><img src="{uri(png(picture))}" alt="{text}">'
    f"<figcaption>{text}</figcaption></figure>"
  )


def tiles(pieces: Iterable[str], note: str = "") -> str:
  """Pieces in rows that fit the width, with a line below."""
  return f'<div class="tiles">{"".join(pieces)}</div><p class="note">{escape(note)}</p>'


def animation(pictures: Sequence[Image.Image], seconds: float = 0.12) -> bytes:
  """Pictures one after the other, there and back for ever, as a WebP file."""
  side = max(pictures[0].size)
  size = [x * -(-_SMALLEST // side) for x in pictures[0].size]
  first, *rest = [x.resize(size, Image.Resampling.BICUBIC) for x in [*pictures, *pictures[-2:0:-1]]]
  buffer = io.BytesIO()
  options = {"save_all": True, "append_images": rest, "duration": int(1000 * seconds), "loop": 0}
  first.save(buffer, "WEBP", **options)
  return buffer.getvalue()


def saved(name: str, data: bytes, text: str) -> str:
  """A link that saves a file."""
  address = uri(data, name.rpartition(".")[2])
  return f'<a class="save" download="{name}" href="{address}">{escape(text)}</a>'
