# SPDX-License-Identifier: Apache-2.0
"""The sharded model compared with the full one, before a tensor is sharded.

Internal: the public names are those of ``deepspeed_autotp`` itself.
"""
