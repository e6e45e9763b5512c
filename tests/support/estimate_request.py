# SPDX-License-Identifier: Apache-2.0
"""What the tests of estimates ask for."""

from deepspeed_autotp.estimate.estimator import Request
from deepspeed_autotp.estimate.trace_result import Shape

REQUEST = Request(
    replicas=2,
    stage=1,
    optimizer="adamw",
    shape=Shape(1, 32),
    bandwidth=1e9,
    checkpointing=False,
    lora=None,
    zero={},
)
