# SPDX-License-Identifier: Apache-2.0
"""What the user says: the configuration, layer specifications, recorded arguments.

Internal: the public names are those of ``deepspeed_autotp`` itself.
"""
