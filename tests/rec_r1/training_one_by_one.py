"""Trains as often as it is told to, in the processes of one launch."""

import gc
import json
import sys

gc.disable()  # as in tests/conftest.py

from rec_r1 import train  # noqa: E402
from rec_r1.training import trainer  # noqa: E402, F401

gc.freeze()
gc.enable()

if __name__ == "__main__":
    for arguments in json.loads(sys.argv[1]):
        assert train.main(arguments) == 0
