# SPDX-License-Identifier: Apache-2.0
"""The compiled operators: their loading, and the packing of shards with them.

Internal: the public names are those of ``deepspeed_autotp`` itself.
"""
