# SPDX-License-Identifier: Apache-2.0
"""Train one small Llama twice, sharded over four processes and in one, and compare the losses.

Runs ``train_deepspeed.py`` with TP 2 x DP 2 and then with a single process, prints both loss
curves side by side, draws them, and exits with 1 when they differ by more than 1e-4.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
# One thread per process: four processes share the cores. The warnings are DeepSpeed's, about
# names in torch that will change.
QUIET = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore::FutureWarning"}
ALLOWED = 1e-4  # relative; rounding of float32 over the run stays well below


def run(label: str, *, processes: int, tp: int, out: Path) -> list[float]:
    """Losses of one training run, one per step."""
    losses = out / f"losses-tp{tp}.json"
    command = [
        *([sys.executable, "-m", "torch.distributed.run", "--standalone"]),
        f"--nproc-per-node={processes}",
        str(HERE / "train_deepspeed.py"),
        f"--tp={tp}",
        f"--label={label}",
        f"--losses={losses}",
    ]
    environment = {"DS_ACCELERATOR": "cpu", **os.environ, **QUIET}
    if subprocess.run(command, env=environment, check=False).returncode:
        sys.exit(f"{label}: the training run failed; its own messages are above")
    values: list[float] = json.loads(losses.read_text())
    return values


def print_losses(console: Console, sharded: list[float], single: list[float]) -> None:
    table = Table(title="Loss of both runs")
    for name in ("step", "TP 2 x DP 2", "one process", "relative difference"):
        table.add_column(name, justify="right")
    for step in sorted({*range(0, len(single), 5), len(single) - 1}):
        a, b = sharded[step], single[step]
        table.add_row(str(step), f"{a:.6f}", f"{b:.6f}", f"{abs(a - b) / b:.1e}")
    console.print(table)


def draw(path: Path, sharded: list[float], single: list[float]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 6))
    top.plot(single, label="one process", linewidth=4, alpha=0.4)
    top.plot(sharded, label="TP 2 x DP 2, ZeRO 1", linewidth=1.2)
    top.set_ylabel("loss (nats per byte)")
    top.legend()
    bottom.semilogy([max(abs(a - b) / b, 1e-9) for a, b in zip(sharded, single, strict=True)])
    bottom.axhline(ALLOWED, color="red", linestyle="--", label="allowed")
    bottom.set_ylabel("relative difference")
    bottom.set_xlabel("step")
    bottom.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-output"))
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)

    sharded = run("TP 2 x DP 2", processes=4, tp=2, out=out)
    single = run("one process", processes=1, tp=1, out=out)
    console = Console()
    print_losses(console, sharded, single)
    picture = out / "losses.png"
    draw(picture, sharded, single)
    worst = max(abs(a - b) / b for a, b in zip(sharded, single, strict=True))
    console.print(f"largest relative difference {worst:.1e} (allowed {ALLOWED:.0e}); {picture}")
    if not worst <= ALLOWED:
        sys.exit("the sharded run is not the single-process run")


if __name__ == "__main__":
    main()
