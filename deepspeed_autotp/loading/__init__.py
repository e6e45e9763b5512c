# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's files read into the shards of a model, each rank its own slices alone.

Internal: the public names are those of ``deepspeed_autotp`` itself.
"""
