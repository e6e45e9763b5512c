# SPDX-License-Identifier: Apache-2.0
"""What the transport is told of shards that it moves."""

from collections.abc import Sequence

from torch import Tensor

from deepspeed_autotp.distributed import transport


def sizes_like(parts: Sequence[Tensor]) -> transport.ShardSizes:
    return transport.ShardSizes("a weight", tuple(part.nbytes for part in parts))
