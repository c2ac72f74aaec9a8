"""`python -m eclip COMMAND`: the `eclip` command where it is not installed."""

import sys

from eclip.cli import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m eclip"))
