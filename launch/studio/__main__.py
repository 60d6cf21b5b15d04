r"""A page in the browser to play with a model.

  vavae studio --model=MODEL
  python -m launch.studio --model=runs/mine/diffusion --workdir=runs/mine/tokenizer

--model is a model folder, a workdir, or USER/NAME on the hub. The page draws pictures while they
are denoised, takes pictures through the tokenizer, goes from one to another, shows the latent space
(--latents, where a workdir does not know them), follows trainings (--workdir, once for each; that
of --model by itself) and compares two models (--model2). Only this machine can open it, unless
--host says otherwise, and nothing of it comes from or goes to another one. Needs the extra
[studio].
"""

from __future__ import annotations

import importlib.util
import threading

from absl import flags

from launch.engine import console
from launch.studio import content
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import place


def main() -> None:
  if importlib.util.find_spec("gradio") is None:
    raise InputError(f"The studio needs Gradio, of the extra [studio]: {console.GRADIO}.")
  if not FLAGS.model and not FLAGS.workdir:
    raise InputError("Give --model=MODEL, or --workdir=WORKDIR to follow a training.")
  with content.listen(FLAGS.host, FLAGS.port) as listening:
    studio = content.open_studio(
      FLAGS.model,
      tokenizer=FLAGS.tokenizer,
      latents=FLAGS.latents,
      workdirs=[place(text) for text in FLAGS.workdir],
      second=FLAGS.model2,
      num=FLAGS.num,
      is_local=content.is_local(FLAGS.host),
    )
    if studio.pipe:
      threading.Thread(target=content.warm_up, args=[studio], daemon=True).start()
    from launch.studio import page  # with Gradio, while the model compiles

    server = page.serve(studio, listening)
    host, port = listening.getsockname()[:2]
    name = f"[{host}]" if ":" in host else host
    console.say(f"The studio is at http://{name}:{port}, until it is stopped (Ctrl+C).")
    server.run(sockets=[listening])


FLAGS = flags.FLAGS

if __name__ == "__main__":
  text = "A model folder, a workdir of a diffusion model, or USER/NAME on the hub."
  flags.DEFINE_string("model", "", text)
  flags.DEFINE_string("tokenizer", "", "Of a workdir, where it is not at its place any more.")
  flags.DEFINE_string("model2", "", "A second model to compare with.")
  flags.DEFINE_string("latents", "", "A latent store for the map; the workdir's if not given.")
  flags.DEFINE_multi_string("workdir", [], "A training to follow; once for each.")
  flags.DEFINE_integer("num", 12, "Pictures at once.", lower_bound=2, upper_bound=64)
  flags.DEFINE_string("host", "127.0.0.1", "Address to listen at; 0.0.0.0 lets others in.")
  flags.DEFINE_integer("port", 7860, "Its port; 0: any.", lower_bound=0, upper_bound=65535)
  console.run_command(main)
