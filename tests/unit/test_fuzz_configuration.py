# SPDX-License-Identifier: Apache-2.0
"""A configuration of anybody's is read, or one ValueError says which key is wrong."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepspeed_autotp.cli.plan_arguments import accumulates, left_out, optimizer_of, zero_options
from deepspeed_autotp.config.autotp_config import AutoTPConfig
from deepspeed_autotp.config.dtypes import infer_config_dtype
from deepspeed_autotp.config.load_config import load_ds_config, refuse_misspelt_section
from deepspeed_autotp.config.merge_recorded_args import compare, copied
from deepspeed_autotp.config.recorded_args import Recorded
from deepspeed_autotp.config.refused_options import refuse_options
from deepspeed_autotp.config.training_config import (
    TPTrainingConfig,
    deepspeed_section,
    get_tensor_parallel_config,
)
from tests.support.fuzzing import fuzzed
from tests.support.hostile_values import VALUES, mutated
from tests.support.one_error import check_error

pytestmark = pytest.mark.fuzz

VALID: list[dict[str, Any]] = [
    {
        "train_batch_size": 8,
        "bf16": {"enabled": True},
        "fp16": {"enabled": "auto"},
        "gradient_clipping": 1.0,
        "zero_optimization": {
            "stage": 1,
            "zero_hpz_partition_size": 1,
            "offload_optimizer": {"device": "cpu", "super_offload": False},
        },
        "tensor_parallel": {
            "autotp_size": 2,
            "tp_grain_size": 64,
            "preset_model": "llama",
            "dtype": "bf16",
            "tp_overlap_comm": False,
            "vocab_parallel_lm_head": None,
            "vocab_parallel_ce_backend": "torch",
            "self_check": "auto",
            "sequence_parallel": False,
            "expert_partition": "width",
            "monitor": True,
            "keep_module_on_host": False,
            "tp": {"tp_size": 2, "mpu": None, "tp_group": None},
        },
    },
    {
        "tensor_parallel": {
            "autotp_size": 4,
            "tensor_parallel": {"tp_size": 4, "tp_grain_size": 1},
            "partition_config": {
                "tp_size": 4,
                "embedding_partition_dim": 0,
                "lm_head_patterns": ["lm_head"],
                "use_default_specs": False,
                "strict_mode": True,
                "layer_specs": [
                    {
                        "patterns": [r".*\.q_proj\.weight$", "(?i)up"],
                        "partition_type": "column",
                        "shape": [[8, 2, 2], -1],
                        "partition_dim": 0,
                        "model_types": ["llama"],
                        "gather_output": True,
                    },
                    {"patterns": [".*gate"], "partition_type": "skip", "grad_allreduce": True},
                    {"patterns": [".*o_proj"], "partition_type": "row", "shape": [-1, 2]},
                ],
            },
        },
        "sequence_parallel_size": 1,
        "data_efficiency": {"data_routing": {"random_ltd": {"enabled": False}}},
        "compile": {"deepcompile": False},
    },
]
CONFIGURATIONS = st.one_of(st.sampled_from(VALID).flatmap(mutated), VALUES)
RECORDED = Recorded((2, "bfloat16", 0, 0), None)


def tried(work: Callable[[], Any]) -> Any:
    """What ``work`` gives, or None where it raises one error for people."""
    try:
        return work()
    except ValueError as error:
        check_error(error)
        return None


@fuzzed(120)
@given(CONFIGURATIONS)
def test_a_dictionary_is_read_or_refused(config: Any) -> None:
    given_config = tried(lambda: load_ds_config(config))
    if given_config is None:
        return
    tried(lambda: refuse_misspelt_section(given_config))
    tried(lambda: refuse_options(given_config))
    tried(lambda: infer_config_dtype(given_config))
    for read in (zero_options, accumulates, left_out, optimizer_of):
        tried(lambda read=read: read(given_config))  # type: ignore[misc]
    assert repr(copied(given_config)) == repr(given_config)
    tried(lambda: compare(given_config, RECORDED, mpu=None, mesh_param=None, dist_module=None))
    settings = tried(lambda: get_tensor_parallel_config(given_config))
    if settings is None:
        return
    deepspeed_section(settings)
    tried(settings.get_partition_config_object)
    again = settings.model_dump(exclude_unset=True)
    assert TPTrainingConfig(**again) == settings


@fuzzed(60)
@given(CONFIGURATIONS, st.sampled_from(("json", "base64", "comments", "cut off", "bytes")))
def test_a_file_and_base64_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, config: Any, how: str
) -> None:
    try:
        text = json.dumps(config)
    except ValueError:  # an integer of thousands of digits
        text = '{"tensor_parallel": {"autotp_size": ' + "9" * 5000 + "}}"
    if how == "base64":
        tried(lambda: load_ds_config(base64.b64encode(text.encode()).decode()))
        return
    if how == "comments":
        text = f"# a comment\n{text} // another"
    data = text[: len(text) // 2].encode() if how == "cut off" else text.encode()
    file = tmp_path_factory.getbasetemp() / "configuration.json"
    file.write_bytes(b"\xff" + data if how == "bytes" else data)
    read = tried(lambda: load_ds_config(Path(file)))
    if how == "json" and isinstance(read, dict):
        assert json.dumps(read) == text


@fuzzed(80)
@given(st.sampled_from(VALID).flatmap(mutated))
def test_rules_are_read_or_refused(config: Any) -> None:
    section = config.get("tensor_parallel") if isinstance(config, dict) else config
    rules = section.get("partition_config") if isinstance(section, dict) else section
    read = tried(lambda: AutoTPConfig.from_dict(rules))
    if read is not None:
        tried(lambda: read.find_matching_spec("model.layers.0.self_attn.q_proj.weight", "llama"))
