# SPDX-License-Identifier: Apache-2.0
"""Seconds and private memory until a checkpoint is loaded sharded, beside transformers and
DeepSpeed.

    python -m benchmarks.load --tp 2 4

A Llama of 1.1 billion parameters in bfloat16 is written to disk, loaded by every way in processes
of its own, and deleted. The file is in the page cache. transformers shards while it loads, and maps
what it need not copy: that is read at its first use, and copied where a step writes it. DeepSpeed
shards what every rank has loaded in full. Thus the seconds until every rank has written all its
parameters once, as an optimizer does, stand beside those until the model is there. The seconds that
a rank had a processor for tell the ways apart on a machine that does other things as well.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.load_rank import WAYS, Loaded
from tests.support.worker_pool import Pool, PoolError

_MB = 1e6
SIZES: dict[str, dict[str, int]] = {
    "1.1B": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
    "150M": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
    "small": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 512,
    },
}


def write_checkpoint(folder: Path, size: str) -> None:
    """A checkpoint of a Llama with some values, without a model in memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SIZES[size], tie_word_embeddings=False, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shapes = {name: list(p.shape) for name, p in model.state_dict().items()}
    values = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).bfloat16()
    block = values.view(torch.int16).numpy().tobytes()
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _ in range(end // len(block)):
            file.write(block)
        file.write(block[: end % len(block)])


def measure(
    way: str, checkpoint: Path, small: Path, *, tp: int, repeats: int
) -> tuple[list[Loaded], str]:
    """The figures of the ranks in the quickest of some runs, or why there are none."""
    best: list[Loaded] = []
    for _ in range(repeats):
        pool = Pool(tp)
        try:
            found = pool.run(
                "benchmarks.load_rank:load", way, str(checkpoint), str(small), ranks=tp, timeout=300
            )
        except PoolError as error:
            return [], str(error).strip().splitlines()[-1]
        finally:
            pool.close()
        if not best or found[0].written < best[0].written:
            best = found
    return best, ""


def _rows(tps: Sequence[int], repeats: int, size: str) -> Iterator[tuple[str, ...]]:
    folder = Path(tempfile.mkdtemp(prefix="autotp-load-"))
    try:
        checkpoint, small = folder / "large", folder / "small"
        write_checkpoint(checkpoint, size)
        write_checkpoint(small, "small")
        for tp in tps:
            for way in WAYS:
                found, why = measure(way, checkpoint, small, tp=tp, repeats=repeats)
                if not found:
                    yield way, str(tp), why, "", "", "", "", ""
                    continue
                held, peak = max(f.held for f in found), max(f.peak for f in found)
                read = max((f.read or 0) / f.held for f in found)
                yield (
                    way,
                    str(tp),
                    f"{max(f.seconds for f in found):.2f}",
                    f"{max(f.written for f in found):.2f}",
                    f"{max(f.cpu for f in found):.2f}",
                    f"{peak / _MB:.0f}",
                    f"{held / _MB:.0f}",
                    f"{read:.3f}" if read else "",
                )
    finally:
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--tp", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--size", choices=list(SIZES), default="1.1B")
    options = parser.parse_args()
    table = Table(
        "way",
        "TP",
        "seconds",
        "until written",
        "CPU seconds of a rank",
        "private MB of a rank",
        "its shard, MB",
        "read / shard",
    )
    for row in _rows(options.tp, options.repeats, options.size):
        table.add_row(*row)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
