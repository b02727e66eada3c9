"""The command line. Programs outside the package use its parser and its way to end: one message, an exit status."""

from atb_pllava.cli.command import run_command
from atb_pllava.cli.parser import Parser

__all__ = ["Parser", "run_command"]
