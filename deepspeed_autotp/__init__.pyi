# SPDX-License-Identifier: Apache-2.0
# Where each public name is: read by type checkers, and by the package when a name is first used.
from .api.deepspeed_api import (
    initialize,
    merge_tp_model_init_into_config,
    record_tp_model_init_args,
    reset,
    tp_model_init,
)
from .api.install import install, uninstall
from .api.mode import is_autotp_training_mode, set_autotp_mode
from .api.sharded_loading import from_pretrained, sharded_init
from .api.torch_loop import parallelize
from .checkpoint.distributed_state import checkpoint_state
from .checkpoint.full_state import full_state_dict
from .checkpoint.gather_params import gather_params
from .checkpoint.iter_full_parameters import iter_full_parameters
from .checkpoint.save_pretrained import save_pretrained
from .config.autotp_config import AutoTPConfig, AutoTPPresets, merge_autotp_configs
from .config.dtypes import infer_config_dtype
from .config.layer_spec import PartitionType, TPLayerSpec
from .config.load_config import load_ds_config
from .config.training_config import (
    TPConfig,
    TPTrainingConfig,
    get_tensor_parallel_config,
)
from .planning.plan_table import plan_table
from .state.grad_norm import clip_grad_norm_
from .state.grad_scaler import GradScaler
from .state.replica_check import check_replicas
from .state.sharded_model import destroy, tensor_parallel
from .vocab_parallel.loss import vocab_parallel_cross_entropy

__version__: str

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
    "iter_full_parameters",
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
