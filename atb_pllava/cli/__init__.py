"""The command line. Programs outside the package use its parser and `run_command`, which reports errors."""

from atb_pllava.cli.command import run_command
from atb_pllava.cli.parser import Parser

__all__ = ["Parser", "run_command"]
