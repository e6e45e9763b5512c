# SPDX-License-Identifier: Apache-2.0
"""Meshes, orders of calls and ways of saving that would be wrong are errors."""

from pathlib import Path

from tests.distributed.mesh_refusals_ranks import refusals
from tests.support.same_error import same_error
from tests.support.worker_pool import Pool


def test_what_would_train_or_save_wrongly_is_refused_by_name(pool: Pool, tmp_path: Path) -> None:
    results = pool.run(refusals, str(tmp_path), ranks=4)
    for key, words in {
        "fully_shard first": "call parallelize first, then fully_shard",
        "DDP first": "is in DistributedDataParallel already; call parallelize first",
        "wrapper first": "then call apply_activation_checkpointing",
        "DDP over TP ranks": 'process_group=mesh.get_group("dp") to DistributedDataParallel',
        "DDP over TP ranks, later": "which have different shards in one TP group",
        "DDP over TP ranks, compiled": "which have different shards in one TP group",
        "fully_shard around": "expected fully_shard (FSDP2) of the sharded model itself",
        "shards of one rank": "of the TP group of LlamaForCausalLM have the same shards of",
        "optimizer first": "SGD has parameters that fully_shard has replaced",
        "get_model_state_dict": "expected deepspeed_autotp.checkpoint_state(model, optimizer)",
        "save": "expected deepspeed_autotp.checkpoint_state(model, optimizer)",
        "norm of two models": "got gradients of several sharded models",
        "norm type": "norm_type: got 0 for gradients of a sharded model",
    }.items():
        for pair in ((0, 1), (2, 3)):  # the ranks of a TP group
            text = same_error([results[rank][key] for rank in pair])
            assert "ValueError: " in text and words in text, (key, text)
    said = same_error([each["norm, not finite"] for each in results])
    assert said.startswith("RuntimeError: The total norm of order 2.0")
