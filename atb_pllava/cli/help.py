"""How --help of every command with a model looks."""

import argparse
from collections.abc import Iterable
from typing import Any

# The meaning of each prompt format. The epilog of --help lists them.
CONVERSATION_WORDS = {
    "plain": "USER: and ASSISTANT:, no system text (default)",
    "demo": "PLLaVA's demo: system text, video in its own turn",
    "npu": "PLLaVA-NPU's script: demo, the question first",
    "eval_vcgbench": "PLLaVA's script for VCGBench: long answers",
    "eval_mvbench": "PLLaVA's script for MVBench: multiple choice",
    "eval_recaption": "PLLaVA's script for captions",
    "eval_videoqabench": "PLLaVA's script for MSVD and others: short answers",
    "eval_vcg_llavanext": "eval_vcgbench for 34B (default there)",
    "eval_mvbench_llavanext": "eval_mvbench for 34B",
    "eval_recaption_llavanext": "eval_recaption for 34B",
    "eval_videoqa_llavanext": "eval_videoqabench for 34B",
}


class HelpFormatter(argparse.HelpFormatter):
    """An option's name and help share a line where 80 columns allow it. The usage line names required options only.

    Paragraphs of the description and the epilog are wrapped. A paragraph that has several lines keeps them.
    """

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)

    def add_usage(
        self,
        usage: str | None,
        actions: Iterable[argparse.Action],
        groups: Iterable[Any],
        prefix: str | None = None,
    ) -> None:
        if usage is None:
            wanted = [f"{a.option_strings[0]} {a.metavar}" for a in actions if a.required and a.option_strings]
            usage = " ".join(["%(prog)s", *wanted, "[OPTION ...]"])
            if len(f"usage: {usage % {'prog': self._prog}}") > self._width:
                usage = usage.replace("%(prog)s ", "%(prog)s\n           ")
        super().add_usage(usage, actions, groups, prefix)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.split("\n\n")
        return "\n\n".join(
            p if "\n" in p else super(HelpFormatter, self)._fill_text(p, width, indent) for p in paragraphs
        )
