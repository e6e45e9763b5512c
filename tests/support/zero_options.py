# SPDX-License-Identifier: Apache-2.0
"""ZeRO and offloading, as rows of the table of options."""

from typing import Any

from tests.support.options import NOT_OURS, NOT_TRIED, REFUSED, Option, zero


def _zero(key: str, value: Any, stages: tuple[int, ...], **more: Any) -> Option:
    config = zero(**{key: value})
    return Option(f"`{key}`", config=config, stages=stages, replicas=2, optimizer="AdamW", **more)


_CPU = {"device": "cpu", "pin_memory": False}

OFFLOADING = (
    Option(
        "`offload_optimizer`, to the CPU",
        config=zero(offload_optimizer=_CPU),
        optimizer="AdamW",
        stages=(1, 2, 3),
        replicas=2,
    ),
    Option("`offload_optimizer.ratio`", NOT_TRIED, note="needs DeepSpeed's CPU Adam"),
    Option(
        "`offload_param`, to the CPU",
        config=zero(offload_optimizer=_CPU, offload_param=_CPU),
        optimizer="AdamW",
        stages=(3,),
        replicas=2,
    ),
    Option(
        "`offload_optimizer`, `offload_param` to NVMe; `aio`",
        NOT_TRIED,
        keys=("aio",),
        note="need DeepSpeed's `async_io`, which is built where libaio is installed",
    ),
    Option(
        "`offload_optimizer.super_offload`",
        REFUSED,
        zero(offload_optimizer={**_CPU, "super_offload": True}),
        stages=(3,),
        words="zero_optimization.offload_optimizer.super_offload: got True",
    ),
    Option(
        "`zenflow`",
        REFUSED,
        zero(zenflow={"topk_ratio": 0.1}),
        stages=(2,),
        words="zero_optimization.zenflow: got",
    ),
    Option(
        "`zero_force_ds_cpu_optimizer`",
        config={"zero_force_ds_cpu_optimizer": False, **zero(offload_optimizer=_CPU)},
        optimizer="AdamW",
    ),
    Option(
        "`cpu_offload`, `cpu_offload_param`, `cpu_offload_use_pin_memory`",
        NOT_OURS,
        keys=tuple(
            f"zero_optimization.{key}"
            for key in ("cpu_offload", "cpu_offload_param", "cpu_offload_use_pin_memory")
        ),
        note="DeepSpeed's old names of `offload_optimizer` and `offload_param`",
    ),
)

ZERO = (
    Option(
        "`zero_optimization.stage`",
        config=zero(),
        keys=("zero_optimization.stage",),
        stages=(0, 1, 2, 3),
        replicas=2,
    ),
    *(
        _zero(key, value, stages)
        for key, value, stages in (
            ("contiguous_gradients", False, (1, 2, 3)),
            ("reduce_scatter", False, (1, 2, 3)),
            ("reduce_bucket_size", 1000, (1, 2, 3)),
            ("use_multi_rank_bucket_allreduce", False, (1, 2)),
            ("allgather_partitions", False, (1, 2)),
            ("allgather_bucket_size", 1000, (1, 2)),
            ("overlap_comm", True, (1, 2, 3)),
            ("load_from_fp32_weights", False, (1, 2)),
            ("elastic_checkpoint", True, (1,)),
            ("ignore_unused_parameters", False, (1, 2)),
            ("round_robin_gradients", True, (1, 2)),
            ("parameter_alignment", True, (1, 2)),
            ("sub_group_size", 1000, (3,)),
            ("stage3_prefetch_bucket_size", 100, (3,)),
            ("stage3_param_persistence_threshold", 0, (3,)),
            ("stage3_model_persistence_threshold", 0, (3,)),
            ("stage3_max_live_parameters", 100, (3,)),
            ("stage3_max_reuse_distance", 100, (3,)),
            ("stage3_module_granularity_threshold", 1, (3,)),
            ("stage3_use_all_reduce_for_fetch_params", True, (3,)),
            ("stage3_allgather_sequential", True, (3,)),
            ("stage3_gather_16bit_weights_on_model_save", False, (3,)),
            ("stage3_gather_fp16_weights_on_model_save", True, (3,)),
            ("leaf_module", {"classes": ["LlamaMLP"]}, (3,)),
            ("memory_efficient_linear", False, (3,)),
            ("log_trace_cache_warnings", True, (3,)),
            ("enable_sanity_checks", True, (3,)),
            ("override_module_apply", False, (3,)),
            ("pipeline_loading_checkpoint", True, (3,)),
        )
    ),
    Option(
        "`compute_grad_norm: false`",
        config={"gradient_clipping": 0.0, **zero(compute_grad_norm=False)},
        optimizer="AdamW",
        stages=(1, 2),
        replicas=2,
    ),
    Option(
        "`legacy_stage1`",
        REFUSED,
        zero(legacy_stage1=True),
        words="zero_optimization.legacy_stage1: got True",
    ),
    Option(
        "`save_muon_momentum_buffer_in_memory`",
        NOT_OURS,
        keys=("zero_optimization.save_muon_momentum_buffer_in_memory",),
        note="of Muon, which is refused",
    ),
    Option("`zero_allow_untested_optimizer`", config={"zero_allow_untested_optimizer": True}),
)
