"""Makes the reference cases of teachers from the modules of transformers; needs the extra [torch].

  python tests/reference/make_teachers.py

Weights are procedural by the names of the published files, which differ from those of the modules:
each model is saved, its tensors are exchanged in the file, and the file is loaded again.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import procedural
import torch
import transformers
from safetensors.numpy import load_file, save_file

FOLDER = Path(__file__).parent
TINY = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}


def published(model: transformers.PreTrainedModel) -> tuple[transformers.PreTrainedModel, dict]:
  """The model with procedural weights, and their shapes by published names."""
  with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    file = Path(folder) / "model.safetensors"
    shapes = {name: list(array.shape) for name, array in sorted(load_file(file).items())}
    save_file(procedural.state_dict(shapes), file, metadata={"format": "pt"})
    return type(model).from_pretrained(folder).eval(), shapes


def image(height: int, width: int) -> torch.Tensor:
  shape = (2, 3, height, width)
  return torch.tensor(np.tanh(procedural.normal(f"image_{height}x{width}", shape)))


def write(name: str, what: str, config: dict, shapes: dict, arrays: dict) -> None:
  spec = {
    "what": f"{what}, transformers {transformers.__version__}, torch {torch.__version__}",
    "config": config,
    "state_dict_shapes": shapes,
    "inputs": {"image_HxW": "tanh(normal('image_HxW',(2,3,H,W)))"},
    "keys": {"tokens_HxW": "(2, tokens, width)", "features_HxW": "(2, channels, h, w)"},
  }
  (FOLDER / f"{name}.json").write_text(json.dumps(spec, indent=1) + "\n")
  np.savez_compressed(FOLDER / name, **{key: x.numpy() for key, x in arrays.items()})


def dinov2_swiglu() -> None:
  config = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "image_size": 56,
    "patch_size": 14,
    "use_swiglu_ffn": True,
  }
  model, shapes = published(
    transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**config))
  )
  tokens = {"tokens_56x56": model(image(56, 56)).last_hidden_state}
  write("dinov2_swiglu", "Dinov2WithRegistersModel, last_hidden_state", config, shapes, tokens)


def clip() -> None:
  vision = TINY | {"num_hidden_layers": 3, "image_size": 64, "patch_size": 16}
  text = {
    "hidden_size": 8,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "vocab_size": 10,
    "max_position_embeddings": 4,
  }
  config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=8)
  model, shapes = published(transformers.CLIPModel(config))
  tower = model.vision_model
  last = tower(image(64, 64)).last_hidden_state
  tokens = {"tokens_64x64": tower.post_layernorm(last)}
  what = "image tower of CLIPModel, last_hidden_state and post_layernorm of all tokens"
  write("clip_tiny", what, vision, shapes, tokens)


def sam() -> None:
  config = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "mlp_dim": 64,
    "num_hidden_layers": 3,
    "image_size": 96,
    "patch_size": 16,
    "window_size": 4,
    "global_attn_indexes": [1],
    "output_channels": 16,
  }
  model, shapes = published(transformers.SamVisionModel(transformers.SamVisionConfig(**config)))
  arrays = {"features_96x96": model(image(96, 96)).last_hidden_state}

  # At other sizes the published positions are resampled beforehand, as timm does; the module
  # resamples the relative ones itself.
  encoder = model.vision_encoder
  height, width = 80, 112
  positions = torch.nn.functional.interpolate(
    encoder.pos_embed.permute(0, 3, 1, 2),
    size=(height // 16, width // 16),
    mode="bicubic",
    antialias=True,
  )
  encoder.pos_embed = torch.nn.Parameter(positions.permute(0, 2, 3, 1))
  encoder.patch_embed.image_size = (height, width)
  arrays["features_80x112"] = model(image(height, width)).last_hidden_state
  write("sam_tiny", "SamVisionModel, last_hidden_state", config, shapes, arrays)


if __name__ == "__main__":
  with torch.no_grad():
    dinov2_swiglu()
    clip()
    sam()
