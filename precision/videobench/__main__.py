"""`python -m precision.videobench`: this folder holds scripts, which `python -m precision` lists."""

import sys

from precision.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
