"""The arguments of LightningDiT and its published sizes, declared once: the configuration, the
converter and the comparison with the reference read them here."""

from __future__ import annotations

import dataclasses

from lightningdit_jax.dense import REMAT_POLICIES
from vavae_jax.common import keys
from vavae_jax.common.errors import InputError
from vavae_jax.common.keys import field

SIZES = {
  "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
  "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
  "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
  "1p0B": {"depth": 24, "hidden_size": 1536, "num_heads": 24},
  "1p6B": {"depth": 28, "hidden_size": 1792, "num_heads": 28},
}

# "LightningDiT-XL/1" -> arguments. The paper's L/1 is missing from the reference's list.
PRESETS: dict[str, dict[str, int]] = {
  f"LightningDiT-{name}/{patch_size}": {**size, "patch_size": patch_size}
  for name, size in SIZES.items()
  for patch_size in (1, 2)
}

ATTENTIONS = ("xla", "cudnn", "pallas")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """The arguments of `LightningDiT`; the defaults are XL/1 on the f16d32 tokenizer.

  `tensor` is the PyTorch name of a weight that exists exactly where the option is True. An option
  that `is_ours` changes how numbers are computed, not the numbers; the reference lacks it.
  InputError for values out of range, or sizes that do not divide.
  """

  input_size: int = field(
    16,
    "[1, 4096]",
    "Nominal height and width of the latent. Inputs may differ; PyTorch's files hold positions of "
    "this size.",
  )
  patch_size: int = field(1, "[1, 4096]", "A token is patch_size x patch_size latent cells.")
  in_channels: int = field(32, "[1, 65536]", "Latent channels Z.")
  hidden_size: int = field(1152, "[1, 65536]", "Width D.")
  depth: int = field(28, "[1, 1024]", "Number of blocks L.")
  num_heads: int = field(16, "[1, 1024]", "Attention heads K.")
  mlp_ratio: float = field(
    4.0, "(0, 64]", "The MLP's width in units of D, before SwiGLU's factor 2/3."
  )
  class_dropout_prob: float = field(
    0.1,
    "[0, 1]",
    "Above 0, the label table has a row for the null label. Training drops this share of the "
    "labels.",
  )
  num_classes: int = field(
    1000, "[1, 1e7]", "Labels are 0 .. num_classes-1, and num_classes is the null label."
  )
  learn_sigma: bool = field(
    False, "", "The head also predicts a variance, unused as in the reference."
  )
  early_head: int = field(
    0,
    "[0, 1023]",
    "Blocks before a second final layer, which Internal Guidance trains and samples with; 0: none.",
  )
  dmf_depth: int = field(
    0,
    "[0, 1023]",
    "Blocks that see the time at which a step begins, where the others see that at which it ends: "
    "a flow map, for few steps (Decoupled MeanFlow). 0: a flow, with one time.",
  )
  position_scale: float = field(
    1.0,
    "[0, 1]",
    "Of the fixed position embedding, which the optimizer of Internal Guidance's authors decays.",
  )
  use_qknorm: bool = field(
    False,
    "",
    "Norm queries and keys, which prevents NaN in long bfloat16 runs.",
    tensor="blocks.0.attn.q_norm.weight",
  )
  use_swiglu: bool = field(True, "", "False: an MLP with GELU.", tensor="blocks.0.mlp.w12.weight")
  use_rope: bool = field(
    True, "", "Rotary positions, besides the fixed embedding.", tensor="feat_rope.freqs_cos"
  )
  use_rmsnorm: bool = field(True, "", "False: LayerNorm.", tensor="blocks.0.norm1.weight")
  wo_shift: bool = field(False, "", "Blocks are modulated by scale and gate only.")
  use_checkpoint: bool = field(
    False,
    "",
    "Recompute blocks in the backward pass: less memory, up to a third more work.",
    is_ours=True,
  )
  remat_policy: str = field(
    "auto",
    ("auto", *REMAT_POLICIES),
    'What use_checkpoint keeps of a block: "full" nothing, "attended" the attention\'s result, '
    '"dense" the products with its weights, "dots" the attention\'s products too, "costly" all but '
    'cheap elementwise work, as without use_checkpoint. "auto": "full"; trainings on TPUs, where '
    'memory is slower than arithmetic, take "attended" even without use_checkpoint.',
    is_ours=True,
  )
  attention: str = field(
    "xla",
    ("auto", *ATTENTIONS),
    '"cudnn": NVIDIA GPUs in bfloat16. "pallas": TPUs in bfloat16, one kernel for norms, rotation '
    'and attention; a grid that it cannot take runs by "xla". "auto": on GPUs training measures, '
    'on TPUs "pallas" where it can; the model itself takes "xla".',
    is_ours=True,
  )
  reduce_dtype: str = field(
    "compute", ("compute", "float32"), "Of matrices' gradients that devices add up.", is_ours=True
  )
  scan_unroll: int = field(
    1,
    "[0, 1024]",
    "Blocks per step of the scan. More compile longer; on CPUs models of a small width run a "
    "quarter faster with all, B/1 a tenth slower. 0, in a configuration: all on GPUs, elsewhere "
    "one.",
    is_ours=True,
  )

  def __post_init__(self) -> None:
    keys.check(keys.of(self), vars(self))
    width, heads, problems = self.hidden_size, self.num_heads, []
    if self.input_size % self.patch_size:
      problems.append(
        f"input_size={self.input_size} must be a multiple of patch_size={self.patch_size}"
      )
    if width % 4:
      problems.append(f"hidden_size={width} must be a multiple of 4 to embed positions")
    if width % heads:
      problems.append(f"hidden_size={width} must be a multiple of num_heads={heads}")
    elif self.use_rope and width // heads % 4:
      problems.append(
        f"the head size hidden_size/num_heads={width // heads} must be a multiple of 4 "
        "for RoPE, or use_rope be False"
      )
    if self.early_head >= self.depth:
      problems.append(f"early_head={self.early_head} must be below depth={self.depth}")
    if self.dmf_depth >= self.depth:
      problems.append(f"dmf_depth={self.dmf_depth} must be below depth={self.depth}")
    if self.dmf_depth and self.early_head:
      problems.append("a flow map has no early head: early_head or dmf_depth must be 0")
    if problems:
      raise InputError("LightningDiT cannot be built: " + "; ".join(problems) + ".")

  @property
  def kept(self) -> str:
    """The one of `REMAT_POLICIES` that applies."""
    if not self.use_checkpoint:
      return "costly"
    return "full" if self.remat_policy == "auto" else self.remat_policy


# What the converter and the comparison with the reference need to know of the options.
TENSORS = {
  field.name: field.metadata["tensor"]
  for field in dataclasses.fields(Options)
  if field.metadata.get("tensor")
}
ONLY_OURS = tuple(
  field.name for field in dataclasses.fields(Options) if field.metadata.get("is_ours")
)


def preset(name: str) -> dict[str, int]:
  """The arguments of a published size; InputError, listing them, for an unknown name."""
  if name not in PRESETS:
    raise InputError(f"There is no preset {name!r}; choose one of {', '.join(PRESETS)}.")
  return dict(PRESETS[name])
