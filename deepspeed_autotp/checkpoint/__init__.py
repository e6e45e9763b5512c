# SPDX-License-Identifier: Apache-2.0
"""Weights out of a sharded model, and what a checkpoint says of how it is sharded.

Internal: the public names are those of ``deepspeed_autotp`` itself.
"""
