"""Run the command line as `python -m gravlens.cli`."""

from gravlens.cli import app

app(prog_name="gravlens")
