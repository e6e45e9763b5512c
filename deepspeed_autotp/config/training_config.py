# SPDX-License-Identifier: Apache-2.0
"""The ``tensor_parallel`` section of a DeepSpeed configuration.

The classes carry DeepSpeed's names, fields and defaults. Every field has an effect or is refused,
and all problems of a section come in one ValueError.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import PlainValidator, field_serializer

from deepspeed_autotp.config.dtypes import parse_dtype
from deepspeed_autotp.config.tp_section import TPConfig, TPSection, section_of

__all__ = ["TPConfig", "TPTrainingConfig", "deepspeed_section", "get_tensor_parallel_config"]


class TPTrainingConfig(TPSection):
    __doc__ = TPSection.__doc__

    dtype: Annotated[torch.dtype, PlainValidator(functools.partial(parse_dtype, where="dtype"))] = (
        torch.float16
    )

    # Spelled out so that type checkers accept what the checks accept.
    def __init__(self, /, **data: Any) -> None:
        super().__init__(**data)

    @field_serializer("dtype")
    def _dtype_text(self, dtype: torch.dtype) -> str:
        return str(dtype)


def get_tensor_parallel_config(ds_config: Mapping[str, Any]) -> TPTrainingConfig:
    """The section of a DeepSpeed configuration; its defaults where there is none."""
    return TPTrainingConfig(**section_of(ds_config))


def deepspeed_section(config: TPTrainingConfig | Mapping[str, Any]) -> dict[str, Any]:
    """The section as DeepSpeed 0.19.8 takes it, for a model that is already sharded.

    It needs the TP size and the group and nothing that would have it shard the model again.
    """
    read = TPTrainingConfig.read(config)
    nested = read.tensor_parallel
    kept = {"mpu": nested.mpu, "tp_group": nested.tp_group}
    return {
        "autotp_size": read.autotp_size,
        "tp": {
            "tp_size": max(read.autotp_size, 1),
            **{key: value for key, value in kept.items() if value is not None},
        },
    }
