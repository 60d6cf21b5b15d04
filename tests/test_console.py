from launch.engine import console


def test_without_a_terminal_the_end_of_a_work_is_told_once(monkeypatch, capsys):
  monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", -1.0)
  for ends in (2, 1):  # told by the last update; stopped before
    with console.Bar("work", 2) as bar:
      bar.update(1)
      if ends == 2:
        bar.update(2)
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in told] == ["1/2", "2/2"][:ends]
