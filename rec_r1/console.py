"""Write messages to the console: the toolkit's own from INFO on, those of libraries from WARNING on."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from rec_r1.config import UserError, cache_folder, problems_of
from rec_r1.config.redaction import printable, redact_text
from retrievers import ToolkitError
from retrievers.core.index_folder import NO_SPACE, naming
from retrievers.core.progress import PATIENCE

T = TypeVar("T")
OWN_LOGGERS = ("rec_r1", "retrievers", "rewards")


def setup() -> None:
    """Prepare the process of a command. Must be called before torch is loaded.

    It makes modules in the working folder importable, sends log messages to stderr as plain lines, and lets OpenMP
    threads that wait for long sleep. Libraries set the levels of their loggers on import, so the handler filters the
    messages.
    """
    # By default, OpenMP's threads spin for long while they wait. If other processes use the same cores, the thread that
    # the others wait for then gets no core, and a step takes many times as long. Threads that sleep at once are slow to
    # wake between the many short operations of generation. So they spin for some microseconds, then sleep (figures in
    # tests/benchmarks). GOMP_SPINCOUNT is read by GNU's OpenMP, which torch brings on Linux.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    if isinstance(sys.stdout, io.TextIOWrapper):  # A terminal without UTF-8 gets escapes for what it cannot show.
        sys.stdout.reconfigure(errors="backslashreplace")
    # The user's own modules are in the folder where the command starts. It comes last, so that they shadow no package.
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Plain("%(message)s"))
    handler.addFilter(lambda record: record.name.startswith(OWN_LOGGERS) or record.levelno >= logging.WARNING)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # Its bars would overwrite the toolkit's own.
    # transformers announces renamings of its next major release, about which the user of a recipe can do nothing.
    warnings.filterwarnings("ignore", category=FutureWarning)


class _Plain(logging.Formatter):
    """Removes secrets and terminal escapes, because messages may quote servers, libraries and settings."""

    def format(self, record: logging.LogRecord) -> str:
        return redact_text(printable(super().format(record)))


def progress(items: Iterable[T], what: str, unit: str, total: int | None = None) -> Iterable[T]:
    """``items`` with a progress bar, which appears if the loop takes longer than five seconds.

    items: what is looped over.
    what: what the loop does, before the bar.
    unit: what one item is, in plural.
    total: the number of items, where ``items`` has no length.
    """
    from tqdm import tqdm

    bar: Iterable[T] = tqdm(items, what, total=total, unit=f" {unit}", delay=PATIENCE, mininterval=1)
    return bar


def number_of(n: int, one: str, many: str) -> str:
    """A number with its noun, and with its verb where the sentence goes on, such as "1 row has" or "1,200 rows have".

    n: the number.
    one: the words that follow 1.
    many: the words that follow any other number.
    """
    return f"{n:,} {one if n == 1 else many}"


def lines_of(stdin: Iterable[str]) -> Iterator[str]:
    """The lines of stdin. Raises UserError where they are not in its encoding."""
    try:
        yield from stdin
    except UnicodeDecodeError as error:
        raise UserError(f"stdin: not {error.encoding.upper()} ({error}): convert it") from error


def complain(message: str) -> None:
    """Print each mistake or failure in ``message`` as one line on stderr, without secrets and terminal escapes."""
    for problem in problems_of(message):
        line = " ".join(part.strip() for part in printable(problem).splitlines())
        print(f"rec-r1: {redact_text(line)}", file=sys.stderr)  # noqa: T201


def of_file(error: OSError) -> str:
    """The message for a file that cannot be read or written. Raises ``error`` itself where it names no file."""
    if error.filename is None and error.errno not in NO_SPACE:
        raise error
    cached = error.filename is not None and Path(str(error.filename)).is_relative_to(cache_folder())
    place = "set $REC_R1_CACHE to another place" if cached else "name another place"
    if error.errno in NO_SPACE:
        return f"{error.filename}: {error.strerror}: free some space, or {place}"
    return f"{error.filename}: {error.strerror}: {place}, or fix its permissions"


@contextlib.contextmanager
def blamed_on(section: str, keys: Iterable[str] = ()) -> Iterator[None]:
    """Turn every exception of the body into a UserError of one line, which blames a section of the recipe.

    section: the name of the section.
    keys: the section's keys. If the exception's message names one of them, the UserError names it, too.

    Use it only around calls that pass the user's own values to a library. It would hide a bug of the toolkit elsewhere.
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
    """The position in ``text`` that names the option ``key``, or -1. A long key is found in other spellings, too,
    such as AcceleratorConfig or "Target modules"."""
    found = re.search(rf"\b{re.escape(key)}\b", text)
    spelt = key.replace("_", "[ _]?") if len(key) > 10 else "(?!)"
    found = found or re.search(spelt, text, re.IGNORECASE)
    return found.start() if found else -1


def guard(verb: Callable[[], int], interrupted: str = "run the command again", place: Path | None = None) -> int:
    """Run a command, and turn the exceptions that a user can act on into one line on stderr.

    verb: the command.
    interrupted: what the user can do after Ctrl-C, for the message.
    place: the folder to name where the disk is full and the error names no file. None = the cache.

    Returns the command's own exit code, 2 after a user's mistake, a failure of the retriever, or a file that cannot be
    read or written, and 130 after Ctrl-C.
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
    """Make a module callable as one of its functions, because a package offers both under one name.

    module: the module's full name.
    function: the function that a call of the module calls.
    """

    class CallableModule(types.ModuleType):
        __call__ = staticmethod(function)

    sys.modules[module].__class__ = CallableModule
