"""Every test keeps its caches to itself and asks no hub."""

import gc
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import hypothesis
import pytest
import tiny_models

# Set before any library reads them; processes that tests start inherit them, and so do those of pytest-xdist, which
# therefore share one cache: what one has built, such as the converted SmolLM2, the others open.
OWN_CACHE = None if "REC_R1_TEST_CACHE" in os.environ else tempfile.mkdtemp(prefix="rec-r1-tests-")
os.environ["REC_R1_CACHE"] = os.environ.setdefault("REC_R1_TEST_CACHE", OWN_CACHE or "")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# A shell that starts tests in the background lets them ignore Ctrl-C, and the children that tests start inherit it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Speed is measured in tests/benchmarks and asserted in no test: a busy machine fails none.
# A property whose own @settings name no number is tried with so many examples; in the nightly run, with 500.
hypothesis.settings.register_profile(
    "some",
    max_examples=40,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile("many", hypothesis.settings.get_profile("some"), max_examples=500)
hypothesis.settings.load_profile(os.environ.get("REC_R1_EXAMPLES", "some"))

# The garbage collector takes a sixth of the time in which torch and TRL are imported, and afterwards half a second each
# time that an evaluation or accelerate calls it, because it searches all of their modules. So it begins after the
# tests are collected, and leaves out what is there then, at the end of each file, and after a test that imported many
# modules: a training calls it seven times.
gc.disable()
MANY_MODULES = 50
MODULES = pytest.StashKey[int]()


def pytest_unconfigure() -> None:
    if OWN_CACHE:  # The process of the command has made it, and its workers have ended.
        shutil.rmtree(OWN_CACHE, ignore_errors=True)


@pytest.fixture(autouse=True)
def logging_ends_with_the_test():
    """A command that a test calls lets the log go to that test's stderr, which is closed afterwards."""
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)
    for handler in root.handlers[:]:
        if type(handler) is logging.StreamHandler:  # pytest's own are of other types.
            root.removeHandler(handler)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items) -> None:
    """The files of this folder come first. Some of them take long, and would be run while other processes have ended.

    Naming them before `tests` in the command does not do it: since pytest 9, a folder takes in what lies in it.
    """
    items.sort(key=lambda item: (item.path.parent != Path(__file__).parent, item.path.parts))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """Each process of pytest-xdist begins at another file, and the hook above puts the tests back in order.

    In a fresh clone, pytest compiles each test file and keeps the result. In the same order, all processes would
    compile all files at the same time.
    """
    report = yield
    worker = os.environ.get("PYTEST_XDIST_WORKER")  # Only such a process has it.
    if worker is not None and isinstance(collector, pytest.Directory) and report.passed:
        workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        first = len(report.result) * int(worker.removeprefix("gw")) // workers
        report.result = report.result[first:] + report.result[:first]
    return report


def pytest_collection_finish() -> None:
    leave_out_of_collections()
    gc.enable()


@pytest.fixture(autouse=True, scope="module")
def imported_libraries_stay():
    yield
    leave_out_of_collections()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item):
    before = item.stash.get(MODULES, len(sys.modules))
    result = yield
    if len(sys.modules) - before > MANY_MODULES:
        leave_out_of_collections()
    return result


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    item.stash[MODULES] = len(sys.modules)


def leave_out_of_collections() -> None:
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """The folder of a random Llama, see `tiny_models.llama`."""
    return tiny_models.llama(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture
def zero3():
    """Turn ZeRO-3 on for transformers, as in the processes of a training. DeepSpeed need not be installed.

    Returns the function that says whether ZeRO-3 is on.
    """
    from transformers.integrations import deepspeed

    class Configuration:
        config: dict = {}  # noqa: RUF012

        def is_zero3(self) -> bool:
            return True

    on = Configuration()  # transformers refers to it weakly.
    deepspeed.set_hf_deepspeed_config(on)
    yield deepspeed.is_deepspeed_zero3_enabled
    deepspeed.unset_hf_deepspeed_config()


DOCUMENTS = {
    "d1": ("Trail running shoes", "light shoes with grip for rocky paths"),
    "d2": ("Road running shoes", "cushioned sneakers for asphalt"),
    "d3": ("Garden hose", "ten metres, for watering plants and lawns"),
    "d4": ("Watering can", "zinc can for flowers"),
    "d5": ("Espresso machine", "coffee with fifteen bar of pressure"),
    "d6": ("Coffee grinder", "burr mill for beans"),
    "d7": ("Tea kettle", "boils water for tea"),
    "d8": ("Desk lamp", "dimmable light for reading"),
    "d9": ("Head torch", "light for night runs and camping"),
    "d10": ("Camping tent", "two persons, waterproof"),
    "d11": ("Sleeping bag", "warm down to five degrees below zero"),
    "d12": ("Rain jacket", "waterproof and light"),
}
QUERIES = {
    "train": {
        "q1": ("shoes for running", {"d1": 3, "d2": 2, "d9": 1, "d12": 0}),
        "q2": ("water the plants", {"d3": 2, "d4": 3}),
        "q3": ("coffee at home", {"d5": 3, "d6": 2, "d7": 0}),
        "q4": ("light", {"d8": 2, "d9": 3, "d1": 1, "d12": 1}),
        "q5": ("camping", {"d10": 3, "d11": 2, "d9": 1}),
    },
    "dev": {"q6": ("waterproof gear", {"d10": 2, "d12": 3}), "q7": ("hot drinks", {"d5": 2, "d7": 3})},
    "test": {"q8": ("sneakers", {"d2": 3, "d1": 1}), "q9": ("sleep outdoors", {"d11": 3, "d10": 2})},
}


@pytest.fixture
def beir_folder(tmp_path) -> Path:
    """A small BEIR folder with graded judgments: 12 documents, 5 / 2 / 2 queries."""
    return write_beir_folder(tmp_path)


@pytest.fixture(scope="module")
def shared_beir_folder(tmp_path_factory) -> Path:
    """The same for all tests of a file, which change nothing in it."""
    return write_beir_folder(tmp_path_factory.mktemp("beir"))


def write_beir_folder(parent: Path) -> Path:
    folder = parent / "shop"
    (folder / "qrels").mkdir(parents=True)
    documents = [{"_id": i, "title": title, "text": text} for i, (title, text) in DOCUMENTS.items()]
    queries = [{"_id": i, "text": text} for part in QUERIES.values() for i, (text, _) in part.items()]
    for name, records in (("corpus", documents), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for part, judged in QUERIES.items():
        lines = [f"{q}\t{doc}\t{grade}" for q, (_, docs) in judged.items() for doc, grade in docs.items()]
        (folder / "qrels" / f"{part}.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n")
    return folder
