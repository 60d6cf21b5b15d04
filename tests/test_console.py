import pytest

from launch.engine import command_line, console
from vavae_jax.common.errors import InputError


def test_without_a_terminal_the_end_of_a_work_is_told_once(monkeypatch, capsys):
  monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", -1.0)
  for ends in (2, 1):  # told by the last update; stopped before
    with console.Bar("work", 2) as bar:
      bar.update(1)
      if ends == 2:
        bar.update(2)
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in told] == ["1/2", "2/2"][:ends]


@pytest.mark.parametrize(
  ("told", "wanted"),
  [
    ("by --config.data.changed=allow", "by --config.tokenizer.data.changed=allow"),
    (
      "/x/config.json: config.a, config.b",
      "/x/config.json: config.tokenizer.a, config.tokenizer.b",
    ),
    ("its config.json and configs.base", "its config.json and configs.base"),
    ("another --output, or --outputs", "another --workdir, or --outputs"),
    ("config.sample.num_steps is 1", "--num_steps is 1"),
  ],
)
def test_messages_name_settings_as_who_gave_them_knows_them(told, wanted, capsys):
  names = {"config.": "config.tokenizer.", "config.sample.": "--", "--output": "--workdir"}

  @console.naming(names)
  @console.naming(names)
  def fail():
    console.say(told)
    raise InputError(told)

  with pytest.raises(InputError) as caught:
    fail()
  assert str(caught.value) == wanted
  console.say(told)
  assert capsys.readouterr().out == f"{wanted}\n{told}\n"


@pytest.mark.parametrize("called", ["vavae encode", "python -m launch.encode"])
def test_the_next_command_is_told_as_the_last_one_was_called(monkeypatch, capsys, called):
  words = ["/bin/vavae", "encode"] if called.startswith("vavae") else called.split()[1:]
  monkeypatch.setattr(command_line.sys, "orig_argv", ["python3", *words])
  console.say_next("encode", "--workdir=a b")
  assert capsys.readouterr().out == f"next: {called} '--workdir=a b'\n"
  if called.startswith("vavae"):
    assert command_line.own_command() == called
