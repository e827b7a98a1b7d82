"""What a person sees of a run: our own messages at INFO, everybody else's from WARNING on."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from rec_r1.config import UserError, cache_folder
from retrievers import RetrieverError
from retrievers.store import NO_SPACE, naming

OURS = ("rec_r1", "retrievers", "rewards")


def setup() -> None:
    """Make modules in the working folder importable, and send log messages to stderr as plain lines.

    Libraries set their own loggers' levels on import, so the filter sits on the handler.
    """
    # Modules of the user's own lie where the command is started; last, so that they shadow nothing.
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.addFilter(lambda record: record.name.startswith(OURS) or record.levelno >= logging.WARNING)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # a bar for every table saved hides ours
    # Renamings announced by transformers for its next major release: nothing a user of a recipe can act on.
    warnings.filterwarnings("ignore", category=FutureWarning)


def of_file(error: OSError) -> str:
    """One line for a file that could not be read or written. Raises ``error`` itself where it is about no file."""
    if error.errno in NO_SPACE:
        return f"{error.filename}: {error.strerror}: free some space, or name another place"
    if error.filename is None:
        raise error
    return f"{error.filename}: {error.strerror}: name another place, or mend its permissions"


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
    except (UserError, RetrieverError) as error:
        print(f"rec-r1: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except OSError as error:
        print(f"rec-r1: {of_file(error)}", file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt:
        print(f"rec-r1: interrupted: {interrupted}", file=sys.stderr)  # noqa: T201
        return 130
