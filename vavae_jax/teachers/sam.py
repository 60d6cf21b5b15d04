"""SAM's image encoder, frozen: a vision transformer with windows, and a neck to 256 features.

Notable: most blocks attend within windows of 14 x 14 cells, for which the grid is padded with zeros
that take part in the attention; a few blocks attend everywhere. Relative positions along each axis
add to the attention's logits. SAM was made for 1024 pixels: at other sizes its positions, absolute
and relative, are resampled. Blocks differ in their tables, so they are a list and not a scan. The
norms' epsilon is that of segment-anything and transformers, 1e-6; timm's blocks have 1e-5.

Source: Kirillov et al. 2023, arXiv 2304.02643; facebookresearch/segment-anything
modeling/image_encoder.py; timm's vision_transformer_sam.py for other sizes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from vavae_jax.common.convolution import convolve
from vavae_jax.teachers import names
from vavae_jax.teachers.family import Family, Variant, published
from vavae_jax.teachers.layers import (
  IMAGENET,
  SIZES,
  Attention,
  Layers,
  Mlp,
  Statistics,
  grid_of,
  normalized,
  resample_positions,
)
from vavae_jax.teachers.names import Naming

_EPSILON = 1e-6

_OTHER_PARTS = (r"prompt_encoder\.", r"mask_decoder\.", r"shared_image_embedding\.")
_TIMM = Naming(
  renamed={
    "embedding.patch.": "patch_embed.proj.",
    "embedding.": "",
    "layers.": "blocks.",
    "neck.conv1.": "neck.0.",
    "neck.norm1.": "neck.1.",
    "neck.conv2.": "neck.2.",
    "neck.norm2.": "neck.3.",
  }
)
_FACEBOOK = Naming(
  renamed={**_TIMM.renamed, "mlp.fc1.": "mlp.lin1.", "mlp.fc2.": "mlp.lin2."},
  prefix="image_encoder.",
  aside=_OTHER_PARTS,
)
_TRANSFORMERS = Naming(
  renamed={
    "embedding.patch.": "patch_embed.projection.",
    "embedding.": "",
    "norm1.": "layer_norm1.",
    "norm2.": "layer_norm2.",
    "mlp.fc1.": "mlp.lin1.",
    "mlp.fc2.": "mlp.lin2.",
  },
  prefix="vision_encoder.",
  aside=_OTHER_PARTS,
)

FEATURES = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """The arguments of `SamEncoder`; `vit.Options` explains the others."""

  hidden_size: int
  depth: int
  num_heads: int
  global_blocks: tuple[int, ...]  # that attend everywhere, counted from 0
  mlp_size: int | None = None
  grid_size: int = 64  # rows and columns of the position embedding
  window_size: int = 14  # rows and columns of a window
  feature_size: int = FEATURES
  statistics: Statistics | None = None


class SamEncoder(nnx.Module):
  """The image encoder; its features lie on a grid of 16 pixels.

  Keyword arguments are the fields of `Options`; matrices multiply in `dtype`.
  """

  stride = 16

  def __init__(self, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs, **options: Any):
    o = Options(**options)
    self.feature_size, self.statistics, self.dtype = o.feature_size, o.statistics, dtype
    layers = Layers(_EPSILON, dtype, rngs)
    self.embedding = _Embedding(self.stride, o.hidden_size, o.grid_size, layers)
    windows = [None if i in o.global_blocks else o.window_size for i in range(o.depth)]
    self.layers = nnx.List(Block(o, window, layers) for window in windows)
    self.neck = _Neck(o.hidden_size, o.feature_size, layers)

  def __call__(self, image_BHWC: jax.Array) -> jax.Array:
    """RGB images [B,H,W,3] in [-1,1] -> features [B,h,w,F] of dtype `dtype`, h = H/16 and w = W/16.

    InputError if H or W is no multiple of 16.
    """
    grid_of(image_BHWC, self.stride)
    x_BhwD = self.embedding(normalized(image_BHWC, self.statistics))
    for layer in self.layers:
      x_BhwD = layer(x_BhwD)
    return self.neck(x_BhwD).astype(self.dtype)


class _Embedding(nnx.Module):
  """Images -> tokens with positions on a grid, float32."""

  def __init__(self, patch_size: int, hidden_size: int, grid_size: int, layers: Layers):
    self.patch = layers.patches(patch_size, hidden_size)
    self.pos_embed = layers.table(1, grid_size, grid_size, hidden_size)

  def __call__(self, image_BHWC: jax.Array) -> jax.Array:
    x_BhwD = self.patch(image_BHWC).astype(jnp.float32)
    _, h, w, _ = x_BhwD.shape
    return x_BhwD + resample_positions(jnp.asarray(self.pos_embed[...]), h, w)


class Block(nnx.Module):
  """Attention, in windows or everywhere, and MLP, each normed before."""

  def __init__(self, options: Options, window_size: int | None, layers: Layers):
    width, size = options.hidden_size, window_size or options.grid_size
    self.window_size = window_size
    self.norm1 = layers.norm(width)
    self.attn = _GridAttention(width, options.num_heads, size, layers)
    self.norm2 = layers.norm(width)
    self.mlp = Mlp(width, options.mlp_size or 4 * width, "gelu", layers)

  def __call__(self, x_BhwD: jax.Array) -> jax.Array:
    y_BhwD = self.norm1(x_BhwD)
    if self.window_size is None:
      y_BhwD = self.attn(y_BhwD)
    else:
      y_BhwD = self._in_windows(y_BhwD, self.window_size)
    x_BhwD = x_BhwD + y_BhwD
    return x_BhwD + self.mlp(self.norm2(x_BhwD))

  def _in_windows(self, x_BhwD: jax.Array, size: int) -> jax.Array:
    _, h, w, _ = x_BhwD.shape
    rows, columns = -(-h // size), -(-w // size)
    padding = ((0, 0), (0, rows * size - h), (0, columns * size - w), (0, 0))
    x_BhwD = jnp.pad(x_BhwD, padding)
    # R and S count the windows, h and w the cells of one.
    windows = rearrange(x_BhwD, "B (R h) (S w) D -> (B R S) h w D", h=size, w=size)
    y_BhwD = rearrange(self.attn(windows), "(B R S) h w D -> B (R h) (S w) D", R=rows, S=columns)
    return y_BhwD[:, :h, :w]


class _GridAttention(Attention):
  """Self-attention on a grid; queries also meet a vector for each distance along each axis."""

  def __init__(self, hidden_size: int, num_heads: int, size: int, layers: Layers):
    super().__init__(hidden_size, num_heads, layers)
    self.rel_pos_h = layers.table(2 * size - 1, hidden_size // num_heads)
    self.rel_pos_w = layers.table(2 * size - 1, hidden_size // num_heads)

  def __call__(self, x_BhwD: jax.Array) -> jax.Array:
    _, h, w, _ = x_BhwD.shape
    q_BNKE, k_BNKE, v_BNKE = self.heads(rearrange(x_BhwD, "B h w D -> B (h w) D"))
    q_BhwKE = rearrange(q_BNKE, "B (h w) K E -> B h w K E", h=h)
    # i and j are the key's row and column. Logits are float32, and so is what is added to them.
    rows_hiE = _distances(self.rel_pos_h, h).astype(q_BhwKE.dtype)
    columns_wjE = _distances(self.rel_pos_w, w).astype(q_BhwKE.dtype)
    by_row, by_column = (
      jnp.einsum(formula, q_BhwKE, vectors, preferred_element_type=jnp.float32)
      for formula, vectors in (("BhwKE,hiE->BKhwi", rows_hiE), ("BhwKE,wjE->BKhwj", columns_wjE))
    )
    bias = by_row[..., :, None] + by_column[..., None, :]
    bias_BKNM = rearrange(bias, "B K h w i j -> B K (h w) (i j)")
    y_BNKE = jax.nn.dot_product_attention(
      q_BNKE, k_BNKE, v_BNKE, bias=bias_BKNM, implementation="xla"
    )
    return rearrange(self.merged(y_BNKE), "B (h w) D -> B h w D", h=h)


def _distances(table: nnx.Param, size: int) -> jax.Array:
  """A vector for each query and key along an axis of `size` cells: [size, size, E], float32."""
  table_DE = jnp.asarray(table[...])
  if len(table_DE) != 2 * size - 1:
    shape = (2 * size - 1, table_DE.shape[1])
    table_DE = jax.image.resize(table_DE, shape, "linear", antialias=False)
  cell = jnp.arange(size)
  return table_DE[cell[:, None] - cell[None, :] + size - 1]


class _Neck(nnx.Module):
  """Width -> features: two convolutions, each normed after."""

  def __init__(self, hidden_size: int, feature_size: int, layers: Layers):
    options: Any = {"use_bias": False, "dtype": layers.dtype, "rngs": layers.rngs}
    self.conv1 = nnx.Conv(hidden_size, feature_size, (1, 1), **options)
    self.norm1 = layers.norm(feature_size)
    options["conv_general_dilated"] = convolve
    self.conv2 = nnx.Conv(feature_size, feature_size, (3, 3), **options)
    self.norm2 = layers.norm(feature_size)

  def __call__(self, x_BhwD: jax.Array) -> jax.Array:
    return self.norm2(self.conv2(self.norm1(self.conv1(x_BhwD))))


def _variant(word: str, global_blocks: tuple[int, ...], file: str) -> Variant:
  timm = f"samvit_{word}_patch16"
  files = published(
    f"{timm}.sa1b", f"facebook/sam-vit-{word}", f"{file} of facebookresearch/segment-anything"
  )
  return Variant(SIZES[word] | {"global_blocks": global_blocks}, FEATURES, files, timm)


_VARIANTS = {
  "sam_vitb16": _variant("base", (2, 5, 8, 11), "sam_vit_b_01ec64.pth"),
  "sam_vitl16": _variant("large", (5, 11, 17, 23), "sam_vit_l_0b3195.pth"),
}
FAMILY = Family(
  variants=_VARIANTS,
  module=SamEncoder,
  statistics=IMAGENET,
  namings=lambda size: (_TIMM, _FACEBOOK, _TRANSFORMERS),
  recognise=names.by_patches(_VARIANTS, ("rel_pos_h",)),
  compared=((Block, "Block"),),
)
