"""Entry of `python -m eclip.kernels.compile_check`."""

import sys

from . import main

sys.exit(1 if main() else 0)
