# SPDX-License-Identifier: Apache-2.0
"""The table of options, by the headings of docs/options.md."""

from typing import Any

from tests.support.optimizer_options import OPTIMIZERS
from tests.support.options import LOOP, NOT_OURS, NOT_TRIED, REFUSED, Option, zero
from tests.support.trainer_optimizers import OPTIMIZERS_OF_THE_TRAINER
from tests.support.zero_options import OFFLOADING, ZERO

ROUNDED = 0.3  # weights in 16 bits, whose rounding is a large part of a small step


def _removed(key: str, value: Any = None) -> Option:
    section, _, name = key.rpartition(".")
    config = {name: {} if value is None else value}
    return Option(
        f"`{key}`",
        REFUSED,
        {section: config} if section else config,
        words="DeepSpeed refuses the configuration: ",
    )


CLIPPING = (
    Option("`gradient_clipping`", config={"gradient_clipping": 0.5}, stages=(0, 1, 2, 3)),
    Option("`gradient_clipping: 0`", config={"gradient_clipping": 0.0}, stages=(0, 1, 2, 3)),
    Option("`torch.nn.utils.clip_grad_value_`", stages=(LOOP,), special="clip values"),
    Option(
        "`deepspeed_autotp.clip_grad_norm_([parameter], ...)`, a norm for each parameter",
        stages=(LOOP,),
        special="clip each",
        note="so does `torch.nn.utils.clip_grad_norm_`, whose norm of a sharded model's gradients "
        "is that of the full tensors",
    ),
)

PRECISION = (
    Option("`bf16`", config={"bf16": {"enabled": True}}, stages=(0, 1, 2, 3), bound=ROUNDED),
    Option("`bfloat16`", config={"bfloat16": {"enabled": True}}, bound=ROUNDED),
    Option(
        "`bf16.immediate_grad_update`",
        config={
            "bf16": {"enabled": True, "immediate_grad_update": True},
            "data_types": {"grad_accum_dtype": "fp32"},
        },
        bound=ROUNDED,
    ),
    Option(
        "`fp16`, dynamic loss scale, with an overflow",
        config={"fp16": {"enabled": True, "initial_scale_power": 19, "hysteresis": 1}},
        stages=(1, 2, 3),
        replicas=2,
        bound=ROUNDED,
        special="overflows",
    ),
    Option(
        "`fp16.loss_scale`",
        config={"fp16": {"enabled": True, "loss_scale": 128.0}},
        stages=(1, 2, 3),
        bound=ROUNDED,
    ),
    Option(
        "`fp16.auto_cast`",
        config={"fp16": {"enabled": True, "auto_cast": True, "initial_scale_power": 8}},
        bound=ROUNDED,
    ),
    Option(
        "`fp16` with ZeRO 0",
        REFUSED,
        {"fp16": {"enabled": True}},
        stages=(0,),
        words="fp16.enabled: got true with ZeRO stage 0",
        note="DeepSpeed divides by a loss scale that the loss was not multiplied with",
    ),
    Option(
        "`fp16_master_weights_and_grads`, `bf16_master_weights_and_grads`",
        NOT_TRIED,
        note="need DeepSpeed's CPU Adam",
    ),
    Option(
        "`torch_autocast`, bfloat16",
        config={"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
        stages=(0, 1, 2, 3),
        replicas=2,
        bound=0.05,
    ),
    Option(
        "`torch_autocast`, float16 with ZeRO 1 to 3",
        REFUSED,
        {"torch_autocast": {"enabled": True, "dtype": "float16"}},
        stages=(1, 2, 3),
        words="torch_autocast.dtype: got float16 with ZeRO stage",
        note="each rank of DeepSpeed has a loss scale of its own there",
    ),
    Option(
        "`data_types.grad_accum_dtype`",
        config={"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
        stages=(1, 2, 3),
        replicas=2,
        bound=ROUNDED,
    ),
    Option(
        "`data_types.param_dtype`, `buffer_dtype`, `keep_in_fp32_modules`",
        config={
            "bf16": {"enabled": True},
            "data_types": {"param_dtype": "bf16", "buffer_dtype": "fp32"},
        },
        bound=ROUNDED,
    ),
    Option(
        "`communication_data_type`",
        config={"communication_data_type": "bf16"},
        stages=(0, 1, 2, 3),
        replicas=2,
        bound=0.05,
        note="of data-parallel sums; those over TP ranks are in the type of the gradients",
    ),
    Option(
        "`seq_parallel_communication_data_type`",
        config={"seq_parallel_communication_data_type": "bf16"},
        note="of `sequence_parallel_size` alone",
    ),
    Option(
        "`weight_quantization`",
        NOT_OURS,
        keys=("weight_quantization",),
        note="DeepSpeed reads it for inference alone",
    ),
)

PARALLELISM = (
    Option(
        "`sequence_parallel_size` (Ulysses)",
        REFUSED,
        {"sequence_parallel_size": 2},
        words="sequence_parallel_size: got 2",
        note="`tensor_parallel.sequence_parallel` shards the tokens between blocks",
        fast=True,
    ),
    Option(
        "`data_parallel_size`; `initialize(mesh_param=...)`",
        REFUSED,
        {"data_parallel_size": 2},
        words="data_parallel_size: got 2",
    ),
    Option(
        "`expert_parallel` (AutoEP)",
        config={"expert_parallel": {"enabled": True, "autoep_size": 2}},
        tested="integration/test_auto_ep.py",
        note="of experts with ZeRO 0 to 2, and [not beside everything](training.md#autoep)",
    ),
    Option(
        "`expert_parallel` (AutoEP) of a model without experts",
        REFUSED,
        {"expert_parallel": {"enabled": True, "autoep_size": 2}},
        words="expert_parallel: got a LlamaForCausalLM",
        note="DeepSpeed trains it as if the section were not there",
    ),
    Option(
        "`use_data_before_expert_parallelism`",
        NOT_OURS,
        keys=("use_data_before_expert_parallelism",),
        note="of layers of `deepspeed.moe`, which are refused",
    ),
    Option(
        "`pipeline`",
        NOT_OURS,
        keys=("pipeline",),
        note="of a `PipelineModule`, which is refused",
    ),
    Option(
        "`compile.deepcompile`",
        REFUSED,
        {"compile": {"deepcompile": True}},
        words="compile.deepcompile: got True",
        note="`torch.compile` works",
    ),
    Option(
        "`hybrid_engine`",
        REFUSED,
        {"hybrid_engine": {"enabled": True}},
        words="hybrid_engine.enabled: got True",
    ),
    *(
        Option(
            f"`{name}`",
            REFUSED,
            zero(**{name: value}),
            stages=(3,),
            words=f"zero_optimization.{name}: got {value}",
            note=note,
            fast=name == "zero_hpz_partition_size",
        )
        for name, value, note in (
            ("zero_hpz_partition_size", 2, "would train with other losses in silence"),
            ("zero_quantized_weights", True, ""),
            ("zero_quantized_nontrainable_weights", True, ""),
            ("zero_quantized_gradients", True, ""),
        )
    ),
)

STEPS = (
    Option(
        "`train_batch_size`, `train_micro_batch_size_per_gpu`",
        NOT_OURS,
        keys=("train_batch_size", "train_micro_batch_size_per_gpu"),
        note="[training.md](training.md#with-deepspeed) says what they count",
    ),
    Option(
        "`gradient_accumulation_steps`",
        config={"gradient_accumulation_steps": 2},
        stages=(0, 1, 2, 3),
        replicas=2,
    ),
    Option(
        "`managed_gradient_accumulation: false`",
        config={"managed_gradient_accumulation": False},
        stages=(0, 1, 2, 3),
    ),
    Option(
        "`prescale_gradients`",
        config={"prescale_gradients": True},
        stages=(0, 1),
        replicas=2,
        note="DeepSpeed refuses it with ZeRO 2 and `reduce_scatter`",
    ),
    Option(
        "`gradient_predivide_factor`",
        config={"prescale_gradients": True, "gradient_predivide_factor": 2.0},
        stages=(0, 1),
        replicas=2,
    ),
    Option(
        "`gradient_allreduce_op: sum`",
        config={"gradient_allreduce_op": "sum"},
        stages=(0, 1, 2),
        replicas=2,
        note="sums over data-parallel replicas, not over TP ranks",
    ),
    Option(
        "`scheduler`",
        config={
            "scheduler": {
                "type": "WarmupLR",
                "params": {
                    "warmup_min_lr": 0.01,
                    "warmup_max_lr": 0.1,
                    "warmup_num_steps": 3,
                },
            }
        },
    ),
    Option(
        "`activation_checkpointing`, with `deepspeed.checkpointing.checkpoint`",
        config={"activation_checkpointing": {"partition_activations": False}},
        special="checkpointed",
    ),
    Option(
        "`activation_checkpointing.partition_activations`, `cpu_checkpointing`",
        config={
            "activation_checkpointing": {"partition_activations": True, "cpu_checkpointing": True}
        },
        special="checkpointed",
        note="by keywords of `deepspeed.checkpointing.configure`, with `deepspeed.utils.groups` "
        "as `mpu_`; each TP rank keeps a part of the inputs of a layer",
    ),
    Option(
        "`data_efficiency`: random-LTD",
        REFUSED,
        {"data_efficiency": {"enabled": True, "data_routing": {"random_ltd": {"enabled": True}}}},
        words="data_efficiency.data_routing.random_ltd.enabled: got True",
    ),
    Option(
        "`data_efficiency`: curriculum learning",
        REFUSED,
        {
            "data_efficiency": {
                "enabled": True,
                "data_sampling": {"curriculum_learning": {"enabled": True}},
            }
        },
        words="data_efficiency.data_sampling.curriculum_learning.enabled: got True",
    ),
    Option("`dataloader_drop_last`", config={"dataloader_drop_last": True}),
    Option("`disable_allgather`", config={"disable_allgather": True}, stages=(0, 1)),
    Option("`disable_python_gc`", config={"disable_python_gc": True}),
    Option("`vocabulary_size`", config={"vocabulary_size": 96}, note="a warning about alignment"),
)

REPORTS = (
    Option(
        "`flops_profiler`",
        config={"flops_profiler": {"enabled": True, "profile_step": 1}},
        stages=(1, 3),
        note="the profile is of one rank and its shards",
    ),
    Option(
        "`comms_logger`",
        config={"comms_logger": {"enabled": True, "prof_all": True}},
        stages=(1, 3),
        note="it lists DeepSpeed's own collectives, not those over TP ranks",
    ),
    Option("`wall_clock_breakdown`", config={"wall_clock_breakdown": True}, stages=(0, 1, 3)),
    Option("`memory_breakdown`", config={"memory_breakdown": True}),
    Option("`dump_state`", config={"dump_state": True}),
    Option("`steps_per_print`", config={"steps_per_print": 1}),
    Option("`log_level`", config={"log_level": "warning"}),
    Option("`timers`", config={"timers": {"throughput": {"enabled": False}}}),
    Option("`csv_monitor`", config={"csv_monitor": {"enabled": True}}, special="in a folder"),
    Option(
        "`tensorboard`, `wandb`, `comet`",
        NOT_OURS,
        keys=("tensorboard", "wandb", "comet"),
        note="rank 0 writes numbers that it has",
    ),
    Option(
        "`autotuning`",
        REFUSED,
        {"autotuning": {"enabled": True}},
        words="autotuning.enabled: got True",
    ),
    Option(
        "`checkpoint`",
        config={"checkpoint": {"tag_validation": "fail", "use_node_local_storage": True}},
        stages=(1, 3),
        special="save",
        fast=True,
        note="`load_universal`: [checkpoints.md](checkpoints.md); `parallel_write` is of pipelines",
    ),
    Option(
        "`checkpoint.writer`, `datastates_ckpt`",
        NOT_TRIED,
        keys=("datastates_ckpt",),
        note="other engines that write the same files",
    ),
)

REMOVED = (
    *(
        _removed(key, True if key == "sparse_gradients" else None)
        for key in (
            "amp",
            "compression_training",
            "curriculum_learning",
            "eigenvalue",
            "elasticity",
            "graph_harvesting",
            "nebula",
            "progressive_layer_drop",
            "quantize_training",
            "sparse_attention",
            "sparse_gradients",
        )
    ),
    *(
        _removed(f"zero_optimization.{key}", 2)
        for key in ("mics_hierarchical_params_gather", "mics_shard_size", "zeropp_loco_param")
    ),
)

SECTIONS = {
    "Optimizers": OPTIMIZERS,
    "Optimizers of the Trainer": OPTIMIZERS_OF_THE_TRAINER,
    "Clipping": CLIPPING,
    "Precision": PRECISION,
    "Other kinds of parallelism": PARALLELISM,
    "Offloading": OFFLOADING,
    "ZeRO": ZERO,
    "Batches and steps": STEPS,
    "Reports and checkpoints": REPORTS,
    "Removed from DeepSpeed": REMOVED,
}
TABLE = [option for options in SECTIONS.values() for option in options]
