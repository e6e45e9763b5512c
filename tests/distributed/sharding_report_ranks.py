# SPDX-License-Identifier: Apache-2.0
"""Run on every rank by tests.distributed.test_sharding_report."""

import contextlib
import io

import torch.distributed as dist

import deepspeed_autotp
from tests.support.small_models import build


def printed() -> list[str]:
    """What a rank prints while a model is sharded, or the error."""
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        try:
            deepspeed_autotp.parallelize(build("llama", tied=False), tp_size=dist.get_world_size())
        except ValueError as error:
            return [str(error)]
    return shown.getvalue().splitlines()
