# SPDX-License-Identifier: Apache-2.0
"""The RNG states of Python, numpy and torch, kept around code that draws."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import torch


@contextmanager
def rng_kept(device: torch.device) -> Iterator[None]:
    """Afterwards the RNG states of Python, numpy, the CPU and ``device`` are as before."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with _forked(device):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _forked(device: torch.device) -> AbstractContextManager[None]:
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)
