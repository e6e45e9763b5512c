# SPDX-License-Identifier: Apache-2.0
"""What every room may use: text for messages, and values within others.

Internal: the public names are those of ``deepspeed_autotp`` itself.
"""
