# SPDX-License-Identifier: Apache-2.0
"""The page that ``autotp plan --html`` writes: one file that needs no network.

Internal: the public names are those of ``deepspeed_autotp`` itself.
"""
