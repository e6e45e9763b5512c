# SPDX-License-Identifier: Apache-2.0
"""What every test gets: the worker pool, fixed seeds, and a process left as it was found."""

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pool import Pool


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
    assert not changed, f"the test changed the environment and did not put it back: {changed}"
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
        pytest.fail("the test left a default process group behind")
