"""`python -m rec_r1.cli` is `rec-r1`."""

import sys

from rec_r1.cli import main

if __name__ == "__main__":
    sys.exit(main())
