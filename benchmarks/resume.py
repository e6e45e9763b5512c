# SPDX-License-Identifier: Apache-2.0
"""Going on at another TP size: seconds, and private memory above what a process had before.

    python -m benchmarks.resume --hidden 1024 --layers 8

A Llama in bfloat16 with Adam under ZeRO 1 is saved at TP 2. Four ranks load it at TP 4, each making
its own states, and then what ``autotp reshard`` has written for TP 4, which DeepSpeed reads itself.
``autotp merge`` is measured besides. The commands run in one process.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks.load_rank import PrivateMemory
from tests.support.engine_config import Setting
from tests.support.loss_curves import train_engine
from tests.support.resumed_runs import Case, make_engine
from tests.support.worker_pool import Pool

# Seconds, MB of private memory.
Measured = tuple[float, float]
MODULE = "benchmarks.resume"
TIMEOUT = 900.0
WAYS = (("made in memory", "run"), ("own size", "resharded"))


def setting(tp: int) -> Setting:
    return Setting(tp=tp, zero=1, clip=1.0, precision="bf16", self_check=False)


def save(case: Case, folder: str) -> int:
    """Save after a step; the number of parameters on this rank."""
    engine = make_engine(case, setting(2), seed=0)
    train_engine(engine, tp=2, steps=1)
    engine.save_checkpoint(folder)
    count = sum(p.numel() for p in engine.module.parameters())
    engine.destroy()
    return count


def load(case: Case, folder: str) -> Measured:
    engine = make_engine(case, setting(4), seed=1)
    found = _measured(lambda: engine.load_checkpoint(folder))
    engine.destroy()
    return found


def command(arguments: list[str]) -> Measured:
    from deepspeed_autotp.cli.main import main as autotp

    def work() -> None:
        assert autotp(arguments) == 0

    return _measured(work)


def _measured(work: Callable[[], Any]) -> Measured:
    with PrivateMemory() as memory:
        began = time.perf_counter()
        work()
        seconds = time.perf_counter() - began
    return seconds, memory.peak / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    asked = parser.parse_args()
    sizes = {"hidden_size": asked.hidden, "intermediate_size": 3 * asked.hidden}
    case = Case(changes={**sizes, "num_hidden_layers": asked.layers, "vocab_size": 16384})
    with tempfile.TemporaryDirectory(prefix="autotp-resume-") as root:
        with closing(Pool()) as pool:
            run = str(Path(root, "run"))
            shards = pool.run(f"{MODULE}:save", case, run, ranks=2, timeout=TIMEOUT)
        print(f"{sum(shards) / 1e6:.0f} million parameters in the shards of two ranks")
        # Processes that have trained have memory which they use again.
        with closing(Pool()) as pool:
            measure(pool, case, Path(root))


def measure(pool: Pool, case: Case, root: Path) -> None:
    run, resharded, merged = (str(root / name) for name in ("run", "resharded", "merged"))
    for arguments in (
        ["merge", run, merged, "--jobs", "1"],
        ["reshard", run, resharded, "--tp", "4", "--jobs", "1"],
    ):
        seconds, peak = pool.run(f"{MODULE}:command", arguments, ranks=1, timeout=TIMEOUT)[0]
        print(f"autotp {arguments[0]}: {seconds:.1f} s, {peak:.0f} MB")
    for words, folder in WAYS:
        ranks = pool.run(f"{MODULE}:load", case, str(root / folder), ranks=4, timeout=TIMEOUT)
        seconds, peak = max(s for s, _ in ranks), max(m for _, m in ranks)
        print(f"load_checkpoint, {words}: {seconds:.1f} s, {peak:.0f} MB per rank")


if __name__ == "__main__":
    main()
