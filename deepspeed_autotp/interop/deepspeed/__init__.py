# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed: its configuration, engine, checkpoints, groups, parameters and functions."""
