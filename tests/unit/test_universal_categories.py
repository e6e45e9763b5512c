# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint says to readers of universal checkpoints that know no affine maps."""

from deepspeed_autotp.checkpoint.layout import Layout, SavedParameter, Sharding
from deepspeed_autotp.checkpoint.universal import universal_info

HALVES = ((0, 4), (4, 4))


def parameter(
    name: str, shape: tuple[int, ...], sharding: Sharding | None = None, tied_to: str | None = None
) -> SavedParameter:
    return SavedParameter(name, shape, sharding, tied_to)


def test_plain_shards_are_named_by_category_and_others_by_their_map_alone() -> None:
    columns = Sharding(0, (1, 8, 6), HALVES)
    rows = Sharding(1, (6, 8, 1), HALVES)
    swapped = Sharding(1, (6, 8, 1), HALVES[::-1])
    fused = Sharding(0, (1, 8, 6), ((0, 2, 4, 2), (2, 2, 6, 2)))
    interleaved = Sharding(0, (2, 4, 6), ((0, 2), (2, 2)))
    shared = Sharding(1, (6, 8, 1), ((0, 8), (0, 8)))
    parameters = [
        parameter("norm", (6,)),
        parameter("lm_head.weight", (8, 6), columns),
        parameter("tied.weight", (8, 6), columns, "lm_head.weight"),
        parameter("up.weight", (8, 6), columns),
        parameter("down.weight", (6, 8), rows),
        parameter("swapped.weight", (6, 8), swapped),
        parameter("qkv.weight", (8, 6), fused),
        parameter("embed.weight", (8, 6), interleaved),
        parameter("shared.weight", (6, 8), shared),
        parameter("frozen.weight", (6, 8), rows),
    ]
    info = universal_info(Layout(2, {p.name: p for p in parameters}), frozen=["frozen.weight"])
    assert info["parameter_with_row_parallelism_patterns"] == [r"^down\.weight$"]
    assert info["tp_replicated_parameter_patterns"] == ["^norm$"]
    assert info["vocabulary_parameter_patterns"] == [r"^lm_head\.weight$"]
    assert info["original_vocab_size"] == 8
    assert len(info["affine_map"]["params"]) == 8


def test_a_model_without_sharded_vocabulary_has_no_size_of_it() -> None:
    info = universal_info(Layout(2, {"norm": parameter("norm", (6,))}))
    assert info["vocabulary_parameter_patterns"] == [] and "original_vocab_size" not in info
