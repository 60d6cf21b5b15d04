r"""Runs the PyTorch reference beside this project on the same weights and inputs, layer by layer.

  python -m launch.lab.equivalence --reference=LIGHTNINGDIT --torch_python=PYTHON \
    --model=LightningDiT-XL/1 --output=runs/equivalence

--reference is a checkout of hustvl/LightningDiT, which --torch_python runs: an interpreter with
torch, timm, einops, numpy and pillow (trajectories also need torchdiffeq, fid_inception
torch-fidelity). Other imports of the reference (fairscale, pytorch_lightning, torchvision,
requests) do not affect these numbers; empty modules replace those that do not load.
Weights are random, or those of --checkpoint. --model is a preset of LightningDiT (with
",internal_guidance" for a checkout's LightningDiT folder of CVL-UESTC/Internal-Guidance) or of the
tokenizer (f16d32), a tokenizer's training step (f16d32_training, which also needs --taming), a
teacher, lpips or fid_inception. Writes a table, OUTPUT.json and OUTPUT.html; the exit status is 1
if a difference exceeds its limit.

  python -m launch.lab.equivalence training --help

says how whole trainings are compared.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from absl import flags

from launch.engine import command_line, console, subcommands
from launch.engine.circumstances import circumstances
from launch.lab.equivalence import side_by_side
from launch.lab.equivalence.cases import CASES, Settings
from launch.lab.equivalence.comparison import HEADER, compare, sections, summary
from launch.lab.reference import define_flags
from launch.report.html import write_page
from vavae_jax.common.files import write_json
from vavae_jax.common.keys import LAST_SEED


def main() -> None:
  given: dict[str, Any] = {f.name: FLAGS[f.name].value for f in dataclasses.fields(Settings)}
  settings = Settings(**given | {"reference": Path(FLAGS.reference)})
  rows, other = compare(settings)
  title = f"{other.get('weights', settings.model)} beside the reference"
  console.table(title, HEADER, summary(rows))
  console.say(f"replaced by empty modules: {other['replaced']}")
  chosen = {name: given[name] for name in ("batch_size", "image_size", "seed")}
  about = {**circumstances(), **other, **chosen}
  if FLAGS.output:
    json_file, page = (Path(f"{FLAGS.output}.{ending}") for ending in ("json", "html"))
    content = {**about, "model": settings.model, "rows": [row.to_dict() for row in rows]}
    write_json(json_file, content)
    write_page(page, title, sections(rows, about))
    console.say(f"written to {json_file} and {page}")
  if not all(row.holds for row in rows):
    console.say("not equivalent: a difference exceeds its limit")
    sys.exit(1)


FLAGS = flags.FLAGS

if __name__ == "__main__":
  if sys.argv[1:] and sys.argv[1] in side_by_side.SUBCOMMANDS:
    subcommands.run(__doc__ or "", side_by_side.SUBCOMMANDS)
  define_flags()
  flags.DEFINE_enum("model", None, [*CASES], "The model to compare.", required=True)
  flags.DEFINE_string("checkpoint", "", "Weights of that model; by default random ones.")
  flags.DEFINE_integer("batch_size", 2, "Samples of a batch.", lower_bound=1)
  text = "Pixels, for all models but LightningDiT."
  flags.DEFINE_integer("image_size", 256, text, lower_bound=16)
  flags.DEFINE_integer("steps", 2, "Steps of Adam if the model is trained; 0: none.", lower_bound=0)
  flags.DEFINE_integer("trajectory", 5, "Grid points of a sampling; 0: none.", lower_bound=0)
  dtypes = ["float32", "bfloat16"]
  text = "Dtypes of matrix products; bfloat16 only for LightningDiT, which is trained in it."
  flags.DEFINE_multi_enum("dtypes", dtypes, dtypes, text)
  flags.DEFINE_integer("seed", 0, "Seed of weights and inputs.", 0, LAST_SEED)
  command_line.define_output("output", None, "Results go to OUTPUT.json and OUTPUT.html.")
  console.run_command(main)
