# SPDX-License-Identifier: Apache-2.0
"""A model-parallel unit with one TP group, as Megatron's."""

from typing import Any


class Mpu:
    """Knows one tensor-parallel group, as Megatron's does."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def get_tensor_model_parallel_group(self) -> Any:
        return self._group
