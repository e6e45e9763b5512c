# SPDX-License-Identifier: Apache-2.0
"""Layers whose weight is sharded, and how a module becomes one.

Internal: the public names are those of ``deepspeed_autotp`` itself.
"""
