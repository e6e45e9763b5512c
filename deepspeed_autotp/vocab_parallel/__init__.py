# SPDX-License-Identifier: Apache-2.0
"""The output head and the loss over a vocabulary that is sharded.

Internal: the public names are those of ``deepspeed_autotp`` itself.
"""
