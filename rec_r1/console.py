"""What a person sees of a run: our own messages at INFO, everybody else's from WARNING on."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rec_r1.config import UserError, cache_folder, problems_of
from rec_r1.config.redaction import printable, redact_text
from retrievers import ToolkitError
from retrievers.core.index_folder import NO_SPACE, naming

OURS = ("rec_r1", "retrievers", "rewards")


def setup() -> None:
    """Make modules in the working folder importable, send log messages to stderr as plain lines, and let threads that
    wait for each other sleep. To be called before torch is loaded.

    Libraries set their own loggers' levels on import, so the filter sits on the handler.
    """
    # OpenMP's threads spin where they wait, by default: beside other processes on the same cores the one that is waited
    # for does not get its turn, and a step takes many times as long (figures in tests/benchmarks).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Modules of the user's own lie where the command is started; last, so that they shadow nothing.
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Plain("%(message)s"))
    handler.addFilter(lambda record: record.name.startswith(OURS) or record.levelno >= logging.WARNING)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # a bar for every table saved hides ours
    # Renamings announced by transformers for its next major release: nothing a user of a recipe can act on.
    warnings.filterwarnings("ignore", category=FutureWarning)


class _Plain(logging.Formatter):
    """Messages may quote servers, libraries and settings: no secret and no terminal escape gets through."""

    def format(self, record: logging.LogRecord) -> str:
        return redact_text(printable(super().format(record)))


def complain(message: str) -> None:
    """A mistake or a failure as one line on stderr, without secrets and terminal escapes; several as one line each."""
    for problem in problems_of(message):
        line = " ".join(part.strip() for part in printable(problem).splitlines())
        print(f"rec-r1: {redact_text(line)}", file=sys.stderr)  # noqa: T201


def of_file(error: OSError) -> str:
    """One line for a file that could not be read or written. Raises ``error`` itself where it is about no file."""
    if error.errno in NO_SPACE:
        return f"{error.filename}: {error.strerror}: free some space, or name another place"
    if error.filename is None:
        raise error
    return f"{error.filename}: {error.strerror}: name another place, or fix its permissions"


@contextlib.contextmanager
def blamed_on(section: str, keys: Iterable[str] = ()) -> Iterator[None]:
    """What another library raises inside is a mistake in ``section`` of the recipe: a UserError of one line. Where the
    library's message names one of ``keys``, so does ours.

    Only for calls that hand the user's own values to that library, so that no mistake of this toolkit is hidden.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        place = {key: at for key in keys if (at := _place(str(key), text)) >= 0}
        named = min(place, key=lambda key: place[key], default=None)
        raise UserError(f"{section}.{named}: {text}" if named else f"{section}: {text}") from error


def _place(key: str, text: str) -> int:
    """Where ``text`` names the option ``key``, a long one also as AcceleratorConfig or "Target modules"; else -1."""
    found = re.search(rf"\b{re.escape(key)}\b", text)
    spelt = key.replace("_", "[ _]?") if len(key) > 10 else "(?!)"
    found = found or re.search(spelt, text, re.IGNORECASE)
    return found.start() if found else -1


def guard(verb: Callable[[], int], interrupted: str = "run the command again", place: Path | None = None) -> int:
    """Run a command. Its exit code; 2 for a user's mistake, a retriever's failure or a file that cannot be written (one
    line on stderr); 130 for Ctrl-C, with what to do then: ``interrupted``.

    place: the folder that is named where the disk is full and the error names nothing; None = the cache.
    """
    try:
        with naming(place or cache_folder()):
            return verb()
    except BrokenPipeError:
        raise
    except ToolkitError as error:
        complain(str(error))
        return 2
    except OSError as error:
        complain(of_file(error))
        return 2
    except KeyboardInterrupt:
        complain(f"interrupted: {interrupted}")
        return 130


def make_callable(module: str, function: Callable[..., Any]) -> None:
    """Let a module be called as one of its functions, where a package offers both under one name."""

    class CallableModule(types.ModuleType):
        __call__ = staticmethod(function)

    sys.modules[module].__class__ = CallableModule
