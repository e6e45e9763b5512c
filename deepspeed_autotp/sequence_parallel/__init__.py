# SPDX-License-Identifier: Apache-2.0
"""Tokens that are sharded between the blocks of a model.

Internal: the public names are those of ``deepspeed_autotp`` itself.
"""
