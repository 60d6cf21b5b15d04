"""The commands by one name, and installed from a wheel, away from the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from launch import __main__ as commands
from tests.conftest import ROOT


def test_a_wheel_trains_samples_and_exports_away_from_the_checkout(tmp_path, environment, pipeline):
  source, there = tmp_path / "source", tmp_path / "there"
  ignore = shutil.ignore_patterns("__pycache__", "moved")
  for name in ("vavae_jax", "lightningdit_jax", "launch", "configs"):
    shutil.copytree(ROOT / name, source / name, ignore=ignore)
  for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
    shutil.copy(ROOT / name, source)
  words = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path]
  subprocess.run([sys.executable, *words, source], check=True)
  venv.create(tmp_path / "venv", with_pip=False)
  python = tmp_path / "venv" / "bin" / "python"
  (wheel,) = tmp_path.glob("*.whl")
  words = ["-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel]
  subprocess.run([sys.executable, *words], check=True)
  # Its requirements are those of this environment, whose own copy of the project comes behind.
  own = subprocess.run(
    [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
    capture_output=True,
    text=True,
    check=True,
  ).stdout.strip()
  Path(own, "requirements.pth").write_text(sysconfig.get_path("purelib") + "\n")
  there.mkdir()

  def run(*words: object) -> str:
    command = [tmp_path / "venv" / "bin" / "vavae", *map(str, words)]
    done = subprocess.run(
      command, cwd=there, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout

  assert "export" in run()
  run(
    *("train", "--config=configs/quickstart.py:diffusion,tiny", "--workdir=run"),
    *(f"--config.latents.path={pipeline / 'latents'}", "--config.num_steps=2"),
    "--config.evaluate_every_steps=0",
  )
  run("sample", "--workdir=run", "--output=samples.npz", "--num_samples=2")
  run("export", "--workdir=run", "--output=model", "--samples=0")
  load = (
    "import launch, lightningdit_jax as l; p = l.Pipeline.load('model'); print(launch.__file__)"
  )
  found = subprocess.run(
    [python, "-c", load], cwd=there, env=environment, capture_output=True, text=True, check=True
  )
  assert str(tmp_path / "venv") in found.stdout


def test_every_command_is_listed_with_its_first_line():
  done = subprocess.run(
    [sys.executable, "-m", "launch"], cwd=ROOT, capture_output=True, text=True, check=True
  )
  assert len(done.stdout.splitlines()) == 2 + len(commands.COMMANDS)
  assert "  export       Writes a trained model as a folder" in done.stdout
  wrong = subprocess.run(
    [sys.executable, "-m", "launch", "trian"], cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert (wrong.returncode, wrong.stderr) == (2, "error: no command 'trian'; did you mean train?\n")


def test_a_recipe_is_found_where_it_is_installed(tmp_path, monkeypatch):
  from launch.engine.command_line import expanded

  monkeypatch.chdir(tmp_path)
  word = expanded("--config=configs/quickstart.py:tokenizer,tiny")
  assert word == f"--config={ROOT / 'configs' / 'quickstart.py'}:tokenizer,tiny"
  assert expanded("--config=configs/mine.py") == "--config=configs/mine.py"
  os.mkdir("configs")
  Path("configs/quickstart.py").touch()
  assert expanded("--config=configs/quickstart.py") == "--config=configs/quickstart.py"
