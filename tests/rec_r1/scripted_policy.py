"""A stand-in for generation in the process of a served policy, which imports this file and no test file."""

import os
import signal
import time

from rec_r1.config import UserError


def scripted(asked, names, progress):
    """A stand-in for generation that fails as the query says; the process around it is real."""
    text = " ".join(names)
    if "hang" in text:
        time.sleep(3600)
    if "die" in text:
        os.kill(os.getpid(), signal.SIGKILL)
    if "too long" in text:
        raise UserError("query 'too long': shorten it")
    return ["" if "blank" in name else "party popper" for name in names]


def load_scripted():
    return scripted


def load_nothing():
    raise UserError("model.name: no such model")
