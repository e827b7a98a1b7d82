"""Imports what a training imports. The process of forks.py imports it once, and its forks find it loaded."""

import gc

gc.disable()  # as in tests/conftest.py

import accelerate.commands.launch  # noqa: E402, F401
import bm25s  # noqa: E402, F401
import datasets  # noqa: E402, F401
import matplotlib.pyplot  # noqa: E402, F401
import numba  # noqa: E402, F401
import torch.distributed.run  # noqa: E402, F401

from rec_r1 import train  # noqa: E402, F401
from rec_r1.pages import plots  # noqa: E402
from rec_r1.training import callbacks, trainer  # noqa: E402, F401

gc.freeze()
gc.enable()

plots.render = lambda figure, path: path.write_bytes(b"")  # As in conftest.py
