# SPDX-License-Identifier: Apache-2.0
"""What ``check_replicas`` says."""

from torch import nn

import deepspeed_autotp


def replica_difference(model: nn.Module) -> str:
    """Its error, or "all equal"."""
    try:
        deepspeed_autotp.check_replicas(model)
    except RuntimeError as error:
        return str(error)
    return "all equal"
