# SPDX-License-Identifier: Apache-2.0
"""A shard of a weight in 4 bits has the values of the full one, whatever is sharded."""

import copy
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor

from deepspeed_autotp._core import Entry, Model, Plan, Rules
from deepspeed_autotp.interop.bitsandbytes import shape_of_4bit
from deepspeed_autotp.sharding.quantized import shard_quantized
from deepspeed_autotp.state.sharded_model import shard_of
from tests.support.core_llama import ROOT_MODULE

RANKS = 3
SIZE = (36, 192)
SPECS: dict[str, dict[str, Any]] = {
    "rows": {"partition_type": "column"},
    "columns": {"partition_type": "row"},
    "pieces": {"partition_type": "column", "shape": [[18, 9, 9], -1], "partition_dim": 0},
    "columns of 32": {"partition_type": "row", "shape": [-1, [96, 96]], "partition_dim": 1},
}


def entry_of(spec: dict[str, Any]) -> Entry:
    rules = Rules()
    rules.add(["w"], spec, label="r")
    modules = [ROOT_MODULE, ("w", "Linear", "linear", {})]
    model = Model(modules, [("w.weight", "weight", 1, SIZE, "uint8", 1, -1)])
    return Plan(model, rules, ranks=RANKS).entries[0]


def weight(kind: str, *, nested: bool) -> Any:
    drawn = torch.randn(SIZE, generator=torch.Generator().manual_seed(1))
    made = bitsandbytes.nn.Params4bit(drawn, quant_type=kind, compress_statistics=nested)
    return made.to("cpu")


def values(packed: Any) -> Tensor:
    found: Tensor = bitsandbytes.functional.dequantize_4bit(packed.data, packed.quant_state)
    return found


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("name", ["rows", "columns", "pieces"])
def test_a_shard_has_the_values_of_the_full_weight(name: str, kind: str, nested: bool) -> None:
    full, entry = weight(kind, nested=nested), entry_of(SPECS[name])
    expected = values(full)
    for rank in range(RANKS):
        shard = copy.deepcopy(full)
        shard_quantized(shard, entry, rank=rank)
        assert shape_of_4bit(shard) == entry.local_shape(rank)
        assert shard.data.numel() == shard.quant_state.shape.numel() // 2
        assert torch.equal(values(shard), shard_of(expected, entry=entry, rank=rank))


def test_a_shard_becomes_the_full_weight_again() -> None:
    full = weight("nf4", nested=True)
    expected, state, data = values(full), full.quant_state, full.data.clone()
    shard_quantized(full, entry_of(SPECS["rows"]), rank=1)()
    assert full.quant_state is state and state.nested
    assert torch.equal(full.data, data) and torch.equal(values(full), expected)


def test_a_shard_that_would_split_blocks_is_refused() -> None:
    entry = entry_of(SPECS["columns of 32"])
    with pytest.raises(ValueError, match="rank 0 would hold 32 elements from 0 on out of each 192"):
        shard_quantized(weight("nf4", nested=False), entry, rank=0)
    assert entry.blocks(0, 32) == (36, 6, (0, 1, 3, 1))
