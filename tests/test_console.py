import pytest

from launch.engine import command_line, console


def test_without_a_terminal_the_end_of_a_work_is_told_once(monkeypatch, capsys):
  monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", -1.0)
  for ends in (2, 1):  # told by the last update; stopped before
    with console.Bar("work", 2) as bar:
      bar.update(1)
      if ends == 2:
        bar.update(2)
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in told] == ["1/2", "2/2"][:ends]


@pytest.mark.parametrize("called", ["vavae encode", "python -m launch.encode"])
def test_the_next_command_is_told_as_the_last_one_was_called(monkeypatch, capsys, called):
  words = ["/bin/vavae", "encode"] if called.startswith("vavae") else called.split()[1:]
  monkeypatch.setattr(command_line.sys, "orig_argv", ["python3", *words])
  console.say_next("encode", "--workdir=a b")
  assert capsys.readouterr().out == f"next: {called} '--workdir=a b'\n"
  if called.startswith("vavae"):
    assert command_line.own_command() == called
