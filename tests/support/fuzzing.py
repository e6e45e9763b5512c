# SPDX-License-Identifier: Apache-2.0
"""Random input of others: a fixed part of it in the suite, and as much as one likes without.

    python -m tests.support.fuzzing --minutes 60

runs the tests with the marker ``fuzz`` on examples that are drawn anew, until one fails.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from hypothesis import HealthCheck, settings

_EXAMPLES = "AUTOTP_FUZZ_EXAMPLES"
_TESTS = Path(__file__).parents[1] / "unit"
_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]

settings.register_profile(
    "fuzz",
    max_examples=int(os.environ.get(_EXAMPLES, "1")),
    derandomize=False,
    deadline=None,
    print_blob=True,
    suppress_health_check=_SLOW,
)


def fuzzed(examples: int) -> settings:
    """In the suite the same ``examples`` each time."""
    if _EXAMPLES in os.environ:
        return settings.get_profile("fuzz")
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=_SLOW,
    )


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--examples", type=int, default=500, help="of each test in a round")
    parser.add_argument("tests", nargs="*", help="files of tests (default: all)")
    asked = parser.parse_args()
    end = time.monotonic() + 60 * asked.minutes
    files = asked.tests or sorted(str(file) for file in _TESTS.glob("test_fuzz_*.py"))
    rounds = 0
    while time.monotonic() < end:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "fuzz", "-o", "timeout=0"]
        environment = {**os.environ, _EXAMPLES: str(asked.examples)}
        ended = subprocess.run([*command, *files], env=environment, check=False)
        if ended.returncode != 0:
            return ended.returncode
        rounds += 1
        print(f"{rounds} rounds of {asked.examples} examples of each test", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
