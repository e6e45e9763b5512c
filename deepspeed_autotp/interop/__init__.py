# SPDX-License-Identifier: Apache-2.0
"""The only package that looks into foreign objects: DeepSpeed, transformers, mpu and mesh.

Everything here reads an attribute that somebody else defined, or writes one that somebody
else reads. A new version of DeepSpeed or transformers is followed here alone.
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
from deepspeed_autotp.interop.deepspeed.install import (
    install_functions,
    uninstall_functions,
)
from deepspeed_autotp.interop.deepspeed.module import (
    deepspeed_module,
)
from deepspeed_autotp.interop.deepspeed.parameters import (
    ParameterKeeper,
    full_shape,
    gathered,
    is_partitioned,
    make_plain,
    mark_model,
    mark_parameters,
    stand_in,
)
from deepspeed_autotp.interop.deepspeed.save_16bit_model import save_full_weights
from deepspeed_autotp.interop.labels import LabelsArgument, labels_argument
from deepspeed_autotp.interop.process_groups import (
    backend_timeout,
    engine_group,
    engine_group_size,
    init_distributed,
    mesh_group,
    mpu_group,
    unwrapped,
)
from deepspeed_autotp.interop.transformers import (
    ModelFacts,
    config_values,
    drops_layers,
    guard_save_pretrained,
    is_conv1d,
    is_plain_linear,
    model_facts,
    other_adapter,
    other_parts,
    output_tensors,
    own_entries,
    text_config,
    tp_plan,
    trial_inputs,
    wants_hidden_states,
)

__all__ = [
    "backend_timeout",
    "LabelsArgument",
    "ModelFacts",
    "ParameterKeeper",
    "config_argument",
    "deepspeed_module",
    "drops_layers",
    "gather_weights_on_save",
    "engine_group",
    "engine_group_size",
    "engine_initialize",
    "engine_mode_is_training",
    "full_shape",
    "gathered",
    "guard_save_pretrained",
    "has_stepped",
    "init_distributed",
    "install_functions",
    "is_conv1d",
    "labels_argument",
    "is_partitioned",
    "is_plain_linear",
    "make_plain",
    "mark_model",
    "mark_parameters",
    "mesh_group",
    "config_values",
    "model_facts",
    "mpu_group",
    "other_adapter",
    "other_parts",
    "output_tensors",
    "own_entries",
    "refuse_engine_record",
    "refuse_pipeline",
    "save_full_weights",
    "set_engine_mode",
    "settle_engine_config",
    "stand_in",
    "text_config",
    "tp_plan",
    "trial_inputs",
    "uninstall_functions",
    "unwrapped",
    "watch_checkpoints",
    "wants_hidden_states",
    "without_config",
]
