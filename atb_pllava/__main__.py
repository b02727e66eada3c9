"""The command line: `python -m atb_pllava run|predict|convert ...`. Each verb has a module in `cli`.

Answers go to stdout, everything else to stderr. `cli.command` lists the exit statuses.
"""

import sys

from atb_pllava.cli.verbs import main

if __name__ == "__main__":
    sys.exit(main())
