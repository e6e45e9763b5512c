# SPDX-License-Identifier: Apache-2.0
"""Common GPUs by the memory that their makers name, and whether a rank fits."""

from __future__ import annotations

from dataclasses import dataclass

# Of a GPU's memory, above which a rank is said to be tight: the CUDA context, NCCL and gaps of
# the allocator are not in an estimate.
ROOMY = 0.9


@dataclass(frozen=True, slots=True)
class Gpu:
    """``memory`` is in GiB, which is what a maker's "80 GB" is, but for a few per cent."""

    memory: int
    names: str

    @property
    def bytes(self) -> int:
        return self.memory * 2**30

    def verdict(self, peak: int) -> str:
        """Of a rank that needs ``peak`` bytes: "fits", "tight" or "short"."""
        if peak > self.bytes:
            return "short"
        return "fits" if peak <= ROOMY * self.bytes else "tight"

    def share(self, peak: int) -> float:
        return peak / self.bytes


# From the data sheets of NVIDIA and AMD.
GPUS = (
    Gpu(24, "L4, A10, RTX 4090"),
    Gpu(32, "RTX 5090, V100 32GB"),
    Gpu(40, "A100 40GB"),
    Gpu(48, "L40S, A40, RTX 6000 Ada"),
    Gpu(80, "H100, A100 80GB"),
    Gpu(96, "H20, RTX PRO 6000"),
    Gpu(141, "H200"),
    Gpu(180, "B200"),
    Gpu(192, "MI300X"),
    Gpu(288, "B300, MI355X"),
)
