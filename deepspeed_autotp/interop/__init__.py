# SPDX-License-Identifier: Apache-2.0
"""The only package that uses objects of DeepSpeed, transformers, PEFT, Megatron's mpu and meshes.

Every function reads an attribute that another library defines, or writes one that it reads. A new
version of such a library needs changes only here.
"""

from deepspeed_autotp.interop.deepspeed.checkpoints import watch_checkpoints
from deepspeed_autotp.interop.deepspeed.engine import (
    config_argument,
    engine_initialize,
    engine_mode_is_training,
    gather_weights_on_save,
    has_stepped,
    refuse_engine_record,
    refuse_pipeline,
    set_engine_mode,
    settle_engine_config,
    without_config,
)
from deepspeed_autotp.interop.deepspeed.groups import (
    engine_group,
    engine_group_size,
    init_distributed,
)
from deepspeed_autotp.interop.deepspeed.install import (
    install_functions,
    uninstall_functions,
)
from deepspeed_autotp.interop.deepspeed.module import (
    deepspeed_module,
)
from deepspeed_autotp.interop.deepspeed.parameters import (
    ParameterGatherer,
    copy_zero_status,
    full_shape,
    gathered_parameters,
    is_partitioned,
    mark_model,
    mark_parameters,
    remove_zero_partitioning,
)
from deepspeed_autotp.interop.deepspeed.save_16bit_model import save_full_weights
from deepspeed_autotp.interop.labels import LabelsArgument, labels_argument
from deepspeed_autotp.interop.peft import unsupported_adapter
from deepspeed_autotp.interop.process_groups import backend_timeout, mesh_group, mpu_group
from deepspeed_autotp.interop.transformers import (
    ModelFacts,
    config_values,
    drops_layers,
    guard_save_pretrained,
    is_conv1d,
    is_plain_linear,
    model_facts,
    other_modalities,
    output_tensors,
    text_config,
    token_inputs,
    tp_plan,
    user_tp_plan_entries,
    wants_hidden_states,
)
from deepspeed_autotp.interop.wrappers import unwrapped

__all__ = [
    "LabelsArgument",
    "ModelFacts",
    "ParameterGatherer",
    "backend_timeout",
    "config_argument",
    "config_values",
    "copy_zero_status",
    "deepspeed_module",
    "drops_layers",
    "engine_group",
    "engine_group_size",
    "engine_initialize",
    "engine_mode_is_training",
    "full_shape",
    "gather_weights_on_save",
    "gathered_parameters",
    "guard_save_pretrained",
    "has_stepped",
    "init_distributed",
    "install_functions",
    "is_conv1d",
    "is_partitioned",
    "is_plain_linear",
    "labels_argument",
    "mark_model",
    "mark_parameters",
    "mesh_group",
    "model_facts",
    "mpu_group",
    "other_modalities",
    "output_tensors",
    "refuse_engine_record",
    "refuse_pipeline",
    "remove_zero_partitioning",
    "save_full_weights",
    "set_engine_mode",
    "settle_engine_config",
    "text_config",
    "token_inputs",
    "tp_plan",
    "uninstall_functions",
    "unsupported_adapter",
    "unwrapped",
    "user_tp_plan_entries",
    "wants_hidden_states",
    "watch_checkpoints",
    "without_config",
]
