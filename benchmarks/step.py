# SPDX-License-Identifier: Apache-2.0
"""What a sharded training step costs: DeepSpeed's AutoTP, transformers' TP and this package.

    python -m benchmarks.step --sequence 256,64 --json step.json --chart step.svg

Each way trains the same Llama from the same checkpoint on the same tokens: float32, plain SGD,
labels given, one thread for each rank, the ranks over gloo on this machine. Ways with FSDP have two
replicas of the TP group, with the same tokens. Every way has its own processes; they take turns, in
several rounds, and only ratios within a round are compared. A timed step is followed by the same
step with its collectives taken away. The losses of the first steps must agree, or the comparison is
void.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from benchmarks.step_chart import chart
from benchmarks.step_rank import Inspected, Job, Measured
from benchmarks.step_report import machine, print_tables
from benchmarks.step_rows import Round, Row, row_of, worst_loss
from benchmarks.step_ways import WAYS
from tests.support.worker_pool import Pool, PoolError

# Relative. The ways round differently; a mistake in one is larger by far.
LOSS_LIMIT = 1e-4
# Columns that the tables need.
WIDTH = 124
DEFAULT_WAYS = ("deepspeed", "transformers", "parallelize", "initialize")


@dataclass(frozen=True, slots=True)
class Setting:
    """The model and how it is trained; ``features`` is the width between gate and down."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    features: int
    vocabulary: int
    micro_batch: int
    tp: int
    steps: int
    rounds: int


class Bench:
    """The checkpoints, and for each way the processes that train in it."""

    def __init__(self, setting: Setting, ways: Sequence[str], *, timeout: float) -> None:
        self._setting = setting
        self._timeout = timeout
        self._folder = tempfile.TemporaryDirectory(prefix="autotp-step-")
        self._pools = {way: Pool(setting.tp * WAYS[way].replicas) for way in ways}
        # Two models that differ by one layer, whose difference is what a layer costs.
        for layers in (setting.layers, setting.layers + 1):
            save(setting, layers, self._checkpoint(layers))

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()
        self._folder.cleanup()

    def inspect(self, way: str, sequence: int, *, layers: int) -> list[Inspected]:
        """Collectives and memory of a step, by rank."""
        ranks = self._run(way, sequence, layers=layers, pairs=0, inspect=True)
        return [rank.inspected for rank in ranks if rank.inspected is not None]

    def time(self, way: str, sequence: int) -> list[Measured]:
        setting = self._setting
        return self._run(way, sequence, layers=setting.layers, pairs=setting.steps, inspect=False)

    def _run(
        self, way: str, sequence: int, *, layers: int, pairs: int, inspect: bool
    ) -> list[Measured]:
        setting = self._setting
        job = Job(
            way=way,
            checkpoint=str(self._checkpoint(layers)),
            rows=setting.micro_batch,
            sequence=sequence,
            vocabulary=setting.vocabulary,
            pairs=pairs,
            inspect=inspect,
        )
        ranks = setting.tp * WAYS[way].replicas
        return self._pools[way].run(
            "benchmarks.step_rank:measure", job, ranks=ranks, timeout=self._timeout
        )

    def _checkpoint(self, layers: int) -> Path:
        return Path(self._folder.name, f"layers-{layers}")


def save(setting: Setting, layers: int, folder: Path) -> None:
    """Write the full model, which every way loads."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=setting.hidden,
        intermediate_size=setting.features,
        num_hidden_layers=layers,
        num_attention_heads=setting.heads,
        num_key_value_heads=setting.kv_heads,
        vocab_size=setting.vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        use_cache=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def compare(bench: Bench, setting: Setting, ways: Sequence[str], sequence: int) -> list[Row]:
    """One row for each way; ratios are to the first way, within a round."""
    rounds: list[dict[str, Round]] = []
    inspected = {}
    for way in ways:
        say(f"sequence {sequence}: collectives and memory of {way}")
        models = [bench.inspect(way, sequence, layers=setting.layers + more) for more in (0, 1)]
        inspected[way] = (models[0], models[1])
    for number in range(setting.rounds):
        rounds.append({})
        for way in ways:
            say(f"sequence {sequence}: round {number + 1} of {setting.rounds}, {way}")
            rounds[-1][way] = Round.of(bench.time(way, sequence))
    return [row_of(way, sequence, *inspected[way], rounds, first=ways[0]) for way in ways]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _numbers(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a positive number")
    return number


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value, meaning in (
        ("hidden", 512, "hidden size"),
        ("layers", 4, "decoder layers"),
        ("heads", 16, "attention heads"),
        ("kv-heads", 4, "key and value heads"),
        ("vocabulary", 4096, "tokens in the vocabulary"),
        ("micro-batch", 2, "rows of a batch"),
        ("steps", 10, "timed steps of a round, and as many without collectives"),
        ("rounds", 5, "turns that each way gets"),
        ("tp", 2, "TP size"),
    ):
        parser.add_argument(
            f"--{name}", type=_positive, default=value, help=f"{meaning} (default: {value})"
        )
    parser.add_argument("--features", type=_positive, help="of the MLP (default: 3 x hidden)")
    parser.add_argument("--sequence", type=_numbers, default=[256, 64], help="tokens of a row")
    parser.add_argument(
        "--kinds",
        default=",".join(DEFAULT_WAYS),
        help=f"of {', '.join(WAYS)}; ratios are to the first (default: %(default)s)",
    )
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for a turn")
    parser.add_argument("--json", type=Path, help="write all figures as JSON")
    parser.add_argument("--chart", type=Path, default=Path("build/step.svg"), help="bar chart")
    options = parser.parse_args()
    options.kinds = options.kinds.split(",")
    unknown = sorted(set(options.kinds) - set(WAYS))
    if unknown:
        parser.error(f"--kinds: {', '.join(unknown)} is none of {', '.join(WAYS)}")
    if options.tp < 2:
        parser.error("--tp: a step has collectives from 2 ranks on")
    return options


def main() -> None:
    options = _options()
    console = Console(width=max(WIDTH, Console().width))
    names = [field.name for field in dataclasses.fields(Setting)]
    given = vars(options) | {"features": options.features or 3 * options.hidden}
    setting = Setting(**{name: given[name] for name in names})
    rows: list[Row] = []
    try:
        bench = Bench(setting, options.kinds, timeout=options.timeout)
        try:
            for sequence in options.sequence:
                rows += compare(bench, setting, options.kinds, sequence)
        finally:
            bench.close()
    except PoolError as error:
        sys.exit(f"a way did not train: {error}")
    about = machine()
    model = dataclasses.asdict(setting)
    print_tables(console, rows, model, about)
    record = {
        "setting": model,
        "machine": dataclasses.asdict(about),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    options.chart.parent.mkdir(parents=True, exist_ok=True)
    options.chart.write_text(chart(record))
    console.print(f"chart: {options.chart}", highlight=False)
    worst = worst_loss(rows)
    if not worst <= LOSS_LIMIT:
        sys.exit(
            f"the losses of the first steps differ by {worst:.1e} (allowed {LOSS_LIMIT:.0e}): the "
            "ways do not train the same model, and the comparison is void"
        )


if __name__ == "__main__":
    main()
