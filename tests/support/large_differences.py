# SPDX-License-Identifier: Apache-2.0
"""The differences between two float64 runs that are larger than rounding makes them."""

EXACT = 1e-10


def large_differences(found: dict[str, float]) -> dict[str, float]:
    return {what: value for what, value in found.items() if not value < EXACT}
