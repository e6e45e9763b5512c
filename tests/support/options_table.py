# SPDX-License-Identifier: Apache-2.0
"""The table of options, by the headings of docs/options.md."""

from typing import Any

from tests.support.options import LOOP, NOT_OURS, NOT_TRIED, REFUSED, Option, zero
from tests.support.trainer_optimizers import OPTIMIZERS_OF_THE_TRAINER

EVERYWHERE = (LOOP, 0, 1)
ROUNDED = 0.3  # weights in 16 bits, whose rounding is a large part of a small step


def _optimizer(kind: str) -> Option:
    name, *options = kind.split()
    shown = ", ".join([f"`torch.optim.{name}`", *(f"`{option}`" for option in options)])
    return Option(shown, optimizer=kind, stages=EVERYWHERE)


def _refused_optimizer(name: str, kind: str, formed: str) -> Option:
    return Option(name, REFUSED, optimizer=kind, stages=EVERYWHERE, words=formed)


def _refused_type(name: str, formed: str) -> Option:
    return Option(
        f"`optimizer.type: {name}`",
        REFUSED,
        {"optimizer": {"type": name, "params": {"lr": 1e-2}}},
        optimizer="config",
        words=f"optimizer.type: got {name}, which forms {formed}",
    )


def _type(name: str, **params: Any) -> Option:
    params = {"lr": 1e-2, **params}
    config = {"optimizer": {"type": name, "params": params}}
    more = "".join(f", `{key}`" for key in params if key != "lr")
    return Option(f"`optimizer.type: {name}`{more}", config=config, optimizer="config")


def _zero(key: str, value: Any, stages: tuple[int, ...], **more: Any) -> Option:
    config = zero(**{key: value})
    return Option(f"`{key}`", config=config, stages=stages, replicas=2, optimizer="AdamW", **more)


def _removed(key: str, value: Any = None) -> Option:
    section, _, name = key.rpartition(".")
    config = {name: {} if value is None else value}
    return Option(
        f"`{key}`",
        REFUSED,
        {section: config} if section else config,
        words="DeepSpeed refuses the configuration: ",
    )


OPTIMIZERS = (
    Option("`torch.optim.SGD` with momentum", optimizer="SGD+momentum", stages=EVERYWHERE),
    _optimizer("AdamW"),
    _optimizer("AdamW fused"),
    _optimizer("AdamW foreach"),
    _optimizer("Adam amsgrad"),
    *(
        _optimizer(name)
        for name in ("Adadelta", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop")
    ),
    Option("`torch.optim.Adagrad`", optimizer="Adagrad", stages=(LOOP,)),
    Option(
        "`torch.optim.Adagrad`, a function that builds it",
        optimizer="Adagrad later",
        stages=(0, 1),
    ),
    Option(
        "`torch.optim.Adagrad`, built before `initialize`",
        REFUSED,
        optimizer="Adagrad",
        stages=(0, 1),
        words="the optimizer holds state of the full weights already",
        note="it makes its state when it is built",
    ),
    _type("AdamW", torch_adam=True),
    _type("Adagrad"),
    _type("SGD"),
    Option(
        "`optimizer.type: Adam`, `AdamW` (DeepSpeed's FusedAdam)",
        tested="integration/test_initialize_arguments.py",
    ),
    Option(
        "`optimizer.type: Lion`",
        NOT_TRIED,
        note="its kernels, which work element by element, need a GPU",
    ),
    Option(
        "`optimizer.type: MuAdam`, `MuAdamW`, `MuSGD`",
        NOT_TRIED,
        note="of the package mup, which sets rates from shapes before; they step element by "
        "element",
    ),
    Option(
        "an optimizer of your own, element by element",
        optimizer="Lion",
        stages=EVERYWHERE,
        note="tried on a small tensor and on its parts, which are updated alike; where it cannot "
        "be tried, as with tensors or modules among its attributes, a warning says so",
        fast=True,
    ),
    Option(
        "an optimizer of your own, with a number over a tensor (as LARS)",
        REFUSED,
        optimizer="Trusting",
        stages=EVERYWHERE,
        words="got Trusting, which updates a shard otherwise than the full tensor",
        note="found by trying it, whatever its name",
        fast=True,
    ),
    Option(
        "an optimizer of your own, with products of a matrix (as Shampoo)",
        REFUSED,
        optimizer="Preconditioned",
        stages=EVERYWHERE,
        words="got Preconditioned, which updates a shard otherwise than the full tensor",
        note="found by trying it; what begins only after many steps is not found",
    ),
    _refused_optimizer("`torch.optim.Muon`", "Muon", "got Muon, which forms an orthogonal matrix"),
    _refused_optimizer("`torch.optim.Adafactor`", "Adafactor", "got Adafactor, which forms"),
    _refused_optimizer(
        "`transformers.Adafactor`", "transformers.Adafactor", "got Adafactor, which forms"
    ),
    _refused_optimizer("`torch.optim.LBFGS`", "LBFGS", "got LBFGS, which forms one step size"),
    Option(
        "`torch.optim.SparseAdam`",
        NOT_OURS,
        note="takes sparse gradients alone; a rule that shards a sparse embedding is refused",
    ),
    *(
        _refused_type(name, formed)
        for name, formed in (
            ("Muon", "an orthogonal matrix"),
            ("Lamb", "a ratio of the norms"),
            ("OneBitAdam", "the mean size of a tensor"),
            ("OneBitLamb", "the mean size of a tensor"),
            ("ZeroOneAdam", "the mean size of a tensor"),
        )
    ),
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
