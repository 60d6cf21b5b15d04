"""What `launch.lab.benchmark page` measures, by the size of the machine.

  python -m launch.lab.benchmark page --config=configs/lab/speed.py:gpu --workdir=runs/speed

Arguments:

  gpu     the published models, on one or more GPUs of 80 GB; about half an hour an H200
  cpu     small models and small batches, for two cores; about twenty minutes
  tiny    whether all of it runs; about two minutes on two cores

Each of `measurements`:

  name        of its file of results
  group       "paths" (the table), or a plot: "batch", "model", "resolution", "devices"
  label       its name in the table, or its place on the plot's axis
  flags       of `benchmark steps`
  devices     how many, virtual ones on CPUs; 0: all
  reference   whether the reference, if there is one, takes turns with it
"""

import functools

from ml_collections import ConfigDict

DIFFUSION, TOKENIZER = "configs/lightningdit.py", "configs/vavae_f16d32.py"
QUICKSTART = "configs/quickstart.py"
# Batch size at which both our training and the reference's fit on one GPU.
FITTING = 64
Measurement = dict[str, object]


def get_config(argument: str = "cpu") -> ConfigDict:
  """The measurements of a size."""
  sizes = {"gpu": _gpu, "cpu": _cpu, "tiny": _tiny}
  if argument not in sizes:
    raise ValueError(f"{argument!r} is none of {', '.join(sizes)}.")
  return ConfigDict({"size": argument, "measurements": tuple(sizes[argument]())})


def _path(name: str, label: str, *flags: str, **changes: bool | int) -> Measurement:
  """A row of the table, or one for each batch size and attention."""
  about: Measurement = {"name": name, "group": "paths", "label": label, "flags": flags}
  return about | {"devices": 0, "reference": True} | changes


def _point(group: str, label: str, *flags: str, devices: int = 0) -> Measurement:
  """A point of a plot, or a line of batch sizes."""
  point = _path(f"{group}_{label.partition('/')[0]}", label, *flags, devices=devices)
  return point | {"group": group, "reference": False}


def _train(config: str, batch: int | str, *flags: str) -> tuple[str, ...]:
  return (f"--config={config}", "--what=train", f"--batch_sizes={batch}", *flags)


def _gpu() -> list[Measurement]:
  xl, cudnn = f"{DIFFUSION}:XL/1", "--attention=cudnn"
  low = [f"--config.{part}dtype=bfloat16" for part in ("", "teacher.", "perceptual.")]
  sample = (f"--config={xl}", "--what=sample", "--steps=1")
  code = (f"--config={TOKENIZER}", "--batch_sizes=64")
  exact, fast = "--config.sample.dtype=float32", "--config.sample.dtype=bfloat16"
  path = functools.partial(_path, devices=1)  # since the reference takes one
  return [
    path("train", "train XL/1", *_train(xl, FITTING, cudnn)),
    path("train_xla", "train XL/1", *_train(xl, FITTING), reference=False),
    path("sample_bfloat16", "sample XL/1", *sample, "--batch_sizes=64", fast, cudnn),
    path("sample_float32", "sample XL/1", *sample, "--batch_sizes=32", exact),
    path("tokenizer", "train f16d32", *_train(TOKENIZER, 8)),
    path("tokenizer_bfloat16", "train f16d32", *_train(TOKENIZER, "8,32", *low), reference=False),
    path("encode", "encode f16d32", *code, "--what=encode"),
    path("decode", "decode f16d32", *code, "--what=decode"),
    path("loader", "load latents", f"--config={xl}", "--what=loader", "--batch_sizes=256"),
    path("fid", "Inception", f"--config={xl}", "--what=fid"),
    _point("batch", "XL/1", *_train(xl, "16,32,64,128,256,512", cudnn)),
    *(
      _point("model", size, *_train(f"{DIFFUSION}:{size}", FITTING, cudnn))
      for size in ("B/1", "L/1", "XL/1", "1p0B/1", "1p6B/1")
    ),
    *(
      _point("resolution", str(16 * n), *_train(xl, 64, cudnn, f"--config.model.input_size={n}"))
      for n in (16, 32)
    ),
    *(_point("devices", str(n), *_train(xl, 64 * n, cudnn), devices=n) for n in (1, 2, 4, 8)),
  ]


def _cpu() -> list[Measurement]:
  base, small = f"{DIFFUSION}:B/1", f"{QUICKSTART}:diffusion"
  exact = "--config.dtype=float32"
  few = (exact, "--steps=2")
  sample = (f"--config={base}", "--what=sample", "--config.sample.num_steps=11", "--steps=2")
  code = (f"--config={TOKENIZER}", "--batch_sizes=2", "--steps=3")
  toy = _train(f"{QUICKSTART}:tokenizer", 16, "--steps=40")
  return [
    _path("train", "train B/1", *_train(base, 8, exact, "--steps=4")),
    _path("train_small", "train the quickstart's", *_train(small, 32, "--steps=40")),
    _path("sample", "sample B/1, 10 steps", *sample, "--batch_sizes=4"),
    _path("tokenizer", "train f16d32", *_train(TOKENIZER, 1, *few)),
    _path("tokenizer_small", "train the quickstart's tokenizer", *toy, reference=False),
    _path("encode", "encode f16d32", *code, "--what=encode"),
    _path("decode", "decode f16d32", *code, "--what=decode"),
    _path("loader", "load latents", f"--config={base}", "--what=loader", "--batch_sizes=256"),
    _path("fid", "Inception", f"--config={base}", "--what=fid", "--steps=2"),
    _point("batch", "quickstart", *_train(small, "4,8,16,32,64,128", "--steps=20")),
    *(
      _point("model", size, *_train(f"{DIFFUSION}:{size}", 1, *few))
      for size in ("B/1", "L/1", "XL/1")
    ),
    *(
      _point("resolution", str(16 * n), *_train(base, 2, *few, f"--config.model.input_size={n}"))
      for n in (16, 32)
    ),
    *(_point("devices", str(n), *_train(small, 32, "--steps=40"), devices=n) for n in (1, 2)),
  ]


def _tiny() -> list[Measurement]:
  small = (f"--config={QUICKSTART}:diffusion,tiny", "--steps=2")
  train = (*small, "--what=train", "--config.accumulate_steps=1")
  two = (*train, "--batch_sizes=2")
  return [
    _path("train", "train", *train, "--batch_sizes=4"),
    _path("sample", "sample", *small, "--what=sample", "--batch_sizes=2"),
    _point("batch", "tiny", *train, "--batch_sizes=2,4"),
    *(_point("model", str(n), *two, f"--config.model.hidden_size={n}") for n in (32, 64)),
    *(_point("resolution", str(16 * n), *two, f"--config.model.input_size={n}") for n in (4, 8)),
    *(_point("devices", str(n), *two, devices=n) for n in (1, 2)),
  ]
