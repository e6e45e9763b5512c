# SPDX-License-Identifier: Apache-2.0
"""Automatic tensor parallelism for training, beside DeepSpeed.

initialize(...)            in place of deepspeed.initialize(...)
install()                  before a Hugging Face Trainer, Accelerate or TRL script
parallelize(model, ...)    in a torchrun loop without DeepSpeed
"""

from deepspeed_autotp.api.deepspeed_api import (
    initialize,
    merge_tp_model_init_into_config,
    record_tp_model_init_args,
    reset,
    tp_model_init,
)
from deepspeed_autotp.api.install import install, uninstall
from deepspeed_autotp.api.mode import is_autotp_training_mode, set_autotp_mode
from deepspeed_autotp.api.sharded_loading import from_pretrained, sharded_init
from deepspeed_autotp.api.torch_loop import parallelize
from deepspeed_autotp.checkpoint.distributed_state import checkpoint_state
from deepspeed_autotp.checkpoint.full_state import full_state_dict
from deepspeed_autotp.checkpoint.gather_params import gather_params
from deepspeed_autotp.checkpoint.save_pretrained import save_pretrained
from deepspeed_autotp.config.autotp_config import AutoTPConfig, AutoTPPresets, merge_autotp_configs
from deepspeed_autotp.config.layer_spec import PartitionType, TPLayerSpec
from deepspeed_autotp.config.load_config import infer_config_dtype, load_ds_config
from deepspeed_autotp.config.training_config import (
    TPConfig,
    TPTrainingConfig,
    get_tensor_parallel_config,
)
from deepspeed_autotp.planning.plan_table import plan_table
from deepspeed_autotp.state.grad_norm import clip_grad_norm_
from deepspeed_autotp.state.grad_scaler import GradScaler
from deepspeed_autotp.state.replica_check import check_replicas
from deepspeed_autotp.state.sharded_model import destroy, tensor_parallel
from deepspeed_autotp.vocab_parallel.loss import vocab_parallel_cross_entropy

__version__ = "0.1.0"

__all__ = [
    "AutoTPConfig",
    "AutoTPPresets",
    "GradScaler",
    "PartitionType",
    "TPConfig",
    "TPLayerSpec",
    "TPTrainingConfig",
    "check_replicas",
    "checkpoint_state",
    "clip_grad_norm_",
    "destroy",
    "from_pretrained",
    "full_state_dict",
    "gather_params",
    "get_tensor_parallel_config",
    "infer_config_dtype",
    "initialize",
    "install",
    "is_autotp_training_mode",
    "load_ds_config",
    "merge_autotp_configs",
    "merge_tp_model_init_into_config",
    "parallelize",
    "plan_table",
    "record_tp_model_init_args",
    "reset",
    "save_pretrained",
    "set_autotp_mode",
    "sharded_init",
    "tensor_parallel",
    "tp_model_init",
    "uninstall",
    "vocab_parallel_cross_entropy",
]
