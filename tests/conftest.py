# SPDX-License-Identifier: Apache-2.0
"""What every test gets: the worker pool, fixed seeds, and a process left as it was found."""

import os
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.worker_pool import Pool

# Tests that start processes of their own wait for no compiler; those of `make long` do.
WITHOUT_SHM = Path(__file__).parent / "support" / "without_shm"
IS_LONG = os.environ.get("AUTOTP_LONG") == "1"


def pytest_configure() -> None:
    # A test that wants records of models says where they are kept.
    os.environ["AUTOTP_CACHE"] = "off"
    if not IS_LONG:
        paths = [str(WITHOUT_SHM), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)


def mark_all_but_samples(items: list[pytest.Item]) -> None:
    """Of each ``step`` cases in a row of a test with the marker ``sample(step)`` one stays in the
    suite, the others are long. It is in turn the first, the last, the last but one and so on, since
    the last parameter of a product of parameters would be the same each time."""
    seen: Counter[str] = Counter()
    for item in items:
        marker = item.get_closest_marker("sample")
        if marker is not None:
            name = item.nodeid.partition("[")[0]
            row, place = divmod(seen[name], marker.args[0])
            if (row + place) % marker.args[0] != 0:
                item.add_marker(pytest.mark.long)
            seen[name] += 1


def missing_gpu() -> str:
    """Why GPU tests cannot run here; empty where they can."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return "" if torch.cuda.is_available() else "torch sees no GPU"


@pytest.hookimpl(tryfirst=True)  # before -m looks at the markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests where there is no GPU, which AUTOTP_REQUIRE_GPU=1 makes an error, and long
    ones without AUTOTP_LONG=1."""
    mark_all_but_samples(items)
    if not IS_LONG:
        for item in items:
            if item.get_closest_marker("long") is not None:
                item.add_marker(pytest.mark.skip(reason="make long"))
    on_gpu = [item for item in items if item.get_closest_marker("gpu") is not None]
    reason = missing_gpu() if on_gpu else ""
    if reason and os.environ.get("AUTOTP_REQUIRE_GPU") == "1":
        raise pytest.UsageError(f"GPU tests were asked for, but {reason}")
    for item in on_gpu if reason else []:
        item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Where the GPU tests ran, or that they did not."""
    ended = {
        outcome: sum(
            "gpu" in report.keywords
            for report in terminalreporter.getreports(outcome)
            if isinstance(report, pytest.TestReport)  # and not one of a module that is skipped
        )
        for outcome in ("passed", "failed", "skipped")
    }
    ran = ended["passed"] + ended["failed"]
    if ran:
        import torch

        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        terminalreporter.write_line(f"GPU tests: {ran} ran on {', '.join(sorted(names))}")
    if ended["skipped"]:
        why = missing_gpu() or "for reasons of their own"
        terminalreporter.write_line(f"GPU tests: {ended['skipped']} did not run: {why}")


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """The worker processes of this run. They start with the first job that needs them."""
    workers = Pool()
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def deepspeed_imported() -> None:
    """DeepSpeed, whose import changes the environment."""
    import deepspeed  # noqa: F401


@pytest.fixture
def no_records(deepspeed_imported: None) -> Iterator[None]:
    """What ``tp_model_init`` records, process-wide, is empty before and after."""
    import deepspeed_autotp

    deepspeed_autotp.reset()
    yield
    deepspeed_autotp.reset()


@pytest.fixture
def compile_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """torch.compile sets this variable for good when nobody has."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))


@pytest.fixture(autouse=True)
def unchanged_process() -> Iterator[None]:
    """Seed every generator, and fail a test that leaves a process group or a changed environment
    behind: another test would then pass or fail by the order they run in."""
    random.seed(0)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(0)
    environment = dict(os.environ)
    yield
    after = {key: value for key, value in os.environ.items() if key != "PYTEST_CURRENT_TEST"}
    environment.pop("PYTEST_CURRENT_TEST", None)
    changed = sorted(
        key for key in environment.keys() | after.keys() if environment.get(key) != after.get(key)
    )
    for key in changed:
        if key in environment:
            os.environ[key] = environment[key]
        else:
            del os.environ[key]
    # The first optimizer of a process imports torch's compiler, which sets it.
    changed = [key for key in changed if key != "TORCHINDUCTOR_CACHE_DIR"]
    assert not changed, f"the test changed the environment and did not put it back: {changed}"
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
        pytest.fail("the test left a default process group behind")
