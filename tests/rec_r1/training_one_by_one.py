"""Trains as often as it is told to, in the processes of one launch."""

import json
import sys

from rec_r1 import train

if __name__ == "__main__":
    for arguments in json.loads(sys.argv[1]):
        assert train.main(arguments) == 0
