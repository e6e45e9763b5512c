# SPDX-License-Identifier: Apache-2.0
"""The command line: ``autotp``.

Internal: the public names are those of ``deepspeed_autotp`` itself.
"""
