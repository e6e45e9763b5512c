# SPDX-License-Identifier: Apache-2.0
"""One rank with a fault at each stage of a run, and what the others are told (``make faults``)."""
