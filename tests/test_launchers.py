"""The scripts for clusters: which commands they would run; what follows a preemption."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

SCRIPTS = [*ROOT.glob("launch/*.sh"), ROOT / "launch" / "slurm.sbatch", *ROOT.glob("tests/*.sh")]
POD = ["--name=pod", "--zone=us-west4-a", "--type=v5litepod-16"]


def bash(*words, **variables):
  return subprocess.run(
    ["bash", *map(str, words)],
    cwd=ROOT,
    env=os.environ | variables,
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
  program = Path(sys.executable).parent / "shellcheck"
  done = subprocess.run([program, "-x", script], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout


def test_a_dry_run_shows_every_step_and_needs_no_gcloud():
  words = ["launch.train", "--config=a b.py", "--workdir=gs://bucket/it's"]
  done = bash("launch/tpu_pod.sh", *POD, "--spot", "--print", "--delete", "--", *words, PATH="/bin")
  assert done.returncode == 0, done.stderr
  lines = [line for line in done.stdout.splitlines() if line.startswith("gcloud")]
  steps = ["create pod", "scp", "ssh pod", "ssh pod", "ssh pod", "delete pod"]
  assert len(lines) == len(steps)
  assert all(step in line for step, line in zip(steps, lines, strict=True))
  assert "--accelerator-type=v5litepod-16" in lines[0]
  assert "--spot" in lines[0]


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["--name=x"], "--zone=ZONE is missing"),
    (["--name=x", "--zone=z"], "no command"),
    (["--name=x", "--zone=z", "--", "launch.train"], "--type is missing"),
    (["--nam=x"], "unknown option --nam=x"),
    (["--name=x", "--zone=z", "--stop", "--delete"], "--stop saves a checkpoint"),
  ],
)
def test_a_pod_that_is_not_described_is_refused(words, message):
  done = bash("launch/tpu_pod.sh", *words, "--print" if "--nam=x" not in words else "--spot")
  assert done.returncode == 2
  assert message in done.stderr


@pytest.fixture
def pod(tmp_path):
  """Runs tpu_pod.sh with two workers whose `python` is a script; (run, folder)."""
  (tmp_path / "bin").mkdir()
  shutil.copy(ROOT / "tests" / "fake_gcloud.sh", tmp_path / "bin" / "gcloud")
  (tmp_path / "bin" / "gcloud").chmod(0o755)
  git = ["git", "-C", ROOT, "rev-parse", "--short", "HEAD"]
  commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
  variables = {
    "FAKE": str(tmp_path),
    "COMMIT": commit,
    "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
    "SECONDS_BETWEEN_LOOKS": "0",
  }

  def run(python, *words):
    (tmp_path / "python").write_text(f"#!/usr/bin/env bash\n{python}\n")
    (tmp_path / "python").chmod(0o755)
    return bash("launch/tpu_pod.sh", *POD, *words, **variables)

  return run, tmp_path


def test_a_command_runs_on_all_workers_again_after_a_preemption(pod):
  run, folder = pod
  # The first time the slice is taken away under it; the second time it succeeds.
  python = """
    echo "$DISTRIBUTED $*" >>"$FAKE/ran"
    [ "$(wc -l <"$FAKE/ran")" -gt 2 ] && exit 0
    echo SUSPENDED >"$FAKE/state"
    exit 143
  """
  done = run(python, "--", "launch.train", "--workdir=gs://bucket/it's here")
  assert done.returncode == 0, done.stderr
  assert "was taken away" in done.stdout
  assert (folder / "ran").read_text().splitlines() == [
    "1 -m launch.train --workdir=gs://bucket/it's here"
  ] * 4
  calls = (folder / "calls").read_text()
  assert calls.count("queued-resources create") == 2
  assert calls.count("queued-resources delete") == 1


def test_a_busy_slice_takes_no_other_command(pod):
  run, folder = pod
  first = ["--", "launch.train", "--workdir=gs://bucket/it's here"]
  assert run('echo ran >>"$FAKE/ran"', *first).returncode == 0
  for worker in "01":  # It goes on, as long as this test.
    (folder / worker / "vavae" / "run.pid").write_text(str(os.getpid()))
    (folder / worker / "vavae" / "run.code").unlink(missing_ok=True)
  (folder / "bin" / "tail").write_text("#!/bin/sh\necho 0 >run.code\n")
  (folder / "bin" / "tail").chmod(0o755)
  (folder / "calls").unlink()
  other = run('echo other >>"$FAKE/ran"', "--delete", "--", "launch.encode")
  assert other.returncode == 2, other.stdout
  assert r"pod runs: launch.train --workdir=gs://bucket/it\'s\ here; --logs" in other.stderr
  again = run('echo again >>"$FAKE/ran"', *first)
  assert again.returncode == 0, again.stderr
  assert (folder / "ran").read_text() == "ran\nran\n"
  calls = (folder / "calls").read_text()
  assert "scp" not in calls
  assert "delete" not in calls


def test_the_end_of_another_command_is_no_end(pod):
  run, folder = pod
  # Another command runs and ends while this one's output is not followed.
  (folder / "bin" / "tail").write_text(
    '#!/bin/sh\n[ -e "$FAKE/other" ] && exec /usr/bin/tail "$@"\n'
    "while [ ! -e run.code ]; do sleep 0.01; done\n"
    'touch "$FAKE/other"; echo launch.encode >run.command\n'
  )
  (folder / "bin" / "tail").chmod(0o755)
  done = run('echo ran >>"$FAKE/ran"', "--", "launch.train")
  assert done.returncode == 0, done.stderr
  assert (folder / "ran").read_text() == "ran\n" * 4


def test_a_command_that_fails_is_not_repeated(pod):
  run, folder = pod
  done = run('echo ran >>"$FAKE/ran"; exit 2', "--", "launch.train")
  assert done.returncode == 2
  assert "ended with code 2" in done.stderr
  assert (folder / "ran").read_text() == "ran\nran\n"


def test_a_slice_that_goes_while_it_is_prepared_is_asked_for_anew(pod):
  run, folder = pod
  (folder / "refused").write_text("1")
  (folder / "lost").write_text("SUSPENDED\n")
  done = run('echo ran >>"$FAKE/ran"', "--", "launch.train")
  assert done.returncode == 0, done.stderr
  assert "the workers cannot be reached" in done.stdout
  assert (folder / "calls").read_text().count("queued-resources create") == 2


def test_a_worker_that_fails_since_another_was_taken_away_runs_again(pod):
  run, _ = pod
  python = """
    echo ran >>"$FAKE/ran"
    [ "$(wc -l <"$FAKE/ran")" -gt 2 ] && exit 0
    echo SUSPENDED >"$FAKE/state"
    exit 1
  """
  done = run(python, "--", "launch.train")
  assert done.returncode == 0, done.stderr
  assert "the slice was lost (code 1)" in done.stdout


def test_workers_that_are_never_reached_are_given_up(pod):
  run, folder = pod
  (folder / "refused").write_text("100")
  done = run("exit 0", "--", "launch.train")
  assert done.returncode == 2
  assert "cannot be reached or installed" in done.stderr


def test_a_slice_that_cannot_be_had_is_not_asked_for_again(pod):
  run, folder = pod
  (folder / "state").write_text("FAILED\n")
  done = run("exit 0", "--", "launch.train")
  assert done.returncode == 2
  assert "pod cannot be had" in done.stderr
  assert "create" not in (folder / "calls").read_text()


def test_a_slurm_job_runs_a_process_for_each_gpu():
  done = bash("launch/slurm.sbatch", "launch.train", "--workdir=a b", PRINT="1")
  assert done.returncode == 0, done.stderr
  assert "DISTRIBUTED=1 srun" in done.stdout
  assert r"-m launch.train --workdir=a\ b" in done.stdout
  assert bash("launch/slurm.sbatch").returncode == 2


def test_a_slurm_job_that_saved_is_queued_again(tmp_path):
  for name, text in (("srun", "exit 143"), ("scontrol", 'echo "$*" >"$FAKE/asked"')):
    (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
    (tmp_path / name).chmod(0o755)
  done = bash(
    *("launch/slurm.sbatch", "launch.train"),
    PATH=f"{tmp_path}:{os.environ['PATH']}",
    FAKE=str(tmp_path),
    SLURM_JOB_ID="17",
    SLURM_SUBMIT_DIR=str(ROOT),
  )
  assert done.returncode == 143
  assert (tmp_path / "asked").read_text() == "requeue 17\n"


def test_a_checkout_of_any_name_keeps_its_environment(tmp_path):
  root = tmp_path / "a b[1]"
  (root / "launch").mkdir(parents=True)
  for name in ("launch/environment.sh", "setup.cfg"):
    shutil.copy(ROOT / name, root / name)
  (python := root / ".venv" / "bin" / "python").parent.mkdir(parents=True)
  python.write_text('#!/bin/sh\necho "$PWD" "$@" >>"$0.log"\n')
  python.chmod(0o755)
  (root / ".venv" / "installed-core").touch()  # of an earlier setup.cfg
  (root / ".venv" / "made-for").write_text("cpu\n")
  script = '. "$1"/launch/environment.sh; prepare_environment ""'
  environment = {"PATH": os.environ["PATH"], "ACCELERATOR": "cpu"}
  words = ["bash", "-euc", script, "-", root]
  subprocess.run(words, env=environment, check=True, capture_output=True)
  (told,) = (root / ".venv" / "bin" / "python.log").read_text().splitlines()
  assert told.startswith(f"{root} -m pip install ")
  assert told.endswith(" --editable .")
