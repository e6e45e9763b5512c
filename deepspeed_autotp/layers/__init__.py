# SPDX-License-Identifier: Apache-2.0
"""Layers whose weight is sharded, and how a module becomes one."""
