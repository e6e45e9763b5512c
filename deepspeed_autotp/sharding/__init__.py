# SPDX-License-Identifier: Apache-2.0
"""A plan applied to a model: classes, shards, weights that come from TP rank 0.

Internal: the public names are those of ``deepspeed_autotp`` itself.
"""
