# SPDX-License-Identifier: Apache-2.0
"""What a sharded model carries: its plan and shards, gradient sums, norm, replica check.

Internal: the public names are those of ``deepspeed_autotp`` itself.
"""
