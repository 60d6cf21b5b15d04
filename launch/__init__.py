"""The commands a person runs: `python -m launch.COMMAND --help` explains each."""
