# SPDX-License-Identifier: Apache-2.0
"""The ranks of a group: collectives and their autograd pairs, agreement, transports, RNG.

Internal: the public names are those of ``deepspeed_autotp`` itself.
"""
