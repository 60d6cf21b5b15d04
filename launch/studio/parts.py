"""What the tabs share: pieces of HTML, pictures from files, errors as messages."""

from __future__ import annotations

import base64
import functools
import inspect
import io
from collections.abc import Callable, Iterable, Sequence
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

# Of a listener that shows its own progress; of several changes meanwhile the last one counts.
QUIET: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last"}
# Of one that takes seconds before there is anything to see.
WAITING: dict[str, Any] = {**QUIET, "show_progress": "minimal"}
Controls = Sequence[Any]  # of the tab Generate; the settings of other tabs too


def told(function: Callable[..., Any]) -> Callable[..., Any]:
  """A listener's function, one computation at a time, with errors of input as messages."""

  def alone(work: Callable[..., Any], *arguments: Any) -> Any:
    try:
      with turn:
        return work(*arguments)
    except InputError as error:
      raise gr.Error(escape(str(error)), print_exception=False, title="Not possible") from error

  @functools.wraps(function)
  def once(*arguments: Any) -> Any:
    return alone(function, *arguments)

  @functools.wraps(function)
  def steps(*arguments: Any) -> Any:
    results, end = function(*arguments), object()
    while (result := alone(next, results, end)) is not end:
      yield result  # the browser takes it while others compute

  return steps if inspect.isgeneratorfunction(function) else once


def sides() -> tuple[gr.Column, gr.Column]:
  """Two columns of a row: what is asked, and what is shown."""
  with gr.Row(elem_classes="sides"):
    return gr.Column(scale=1, min_width=280), gr.Column(scale=2, min_width=320)


def opened(upload: dict[str, Any], size: int) -> Image.Image:
  """A picture that somebody dropped, cropped to a square as for a training.

  Args:
    upload: what Gradio's image gives without its own reading, a file's "path" and "orig_name".
    size: pixels of each side.

  InputError where the file is no picture.
  """
  data, name = Path(upload["path"]).read_bytes(), upload.get("orig_name") or "the file"
  return Image.fromarray(center_crop(decode(data, name), size))


def uri(picture: Image.Image | np.ndarray, kind: str = "PNG", **options: Any) -> str:
  """A picture's file as a data URI."""
  image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
  buffer = io.BytesIO()
  image.save(buffer, kind, **options)
  return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def tile(picture: Image.Image | np.ndarray, caption: str = "", kind: str = "") -> str:
  """A picture over its caption."""
  address, text = uri(picture, compress_level=1), escape(caption)  # many a second
  return (
    f'<figure class="tile {kind}"><img src="{address}" alt="{text}">'
    f"<figcaption>{text}</figcaption></figure>"
  )


def tiles(pieces: Iterable[str], note: str = "", kind: str = "") -> str:
  """Pieces in rows that fit the width, with a line below."""
  return f'<div class="tiles {kind}">{"".join(pieces)}</div><p class="note">{escape(note)}</p>'
