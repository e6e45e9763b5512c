# SPDX-License-Identifier: Apache-2.0
"""Parameters gathered and models saved, whole or not at all; what a checkpoint says of itself.

Internal: the public names are those of ``deepspeed_autotp`` itself.
"""
