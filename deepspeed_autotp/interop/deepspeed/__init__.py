# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed: its configuration, engine, checkpoints, groups, parameters and functions.

Internal: the public names are those of ``deepspeed_autotp`` itself.
"""
