# SPDX-License-Identifier: Apache-2.0
"""What a run would need and send, worked out without ranks and weights.

Internal: the public names are those of ``deepspeed_autotp`` itself.
"""
