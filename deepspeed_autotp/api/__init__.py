# SPDX-License-Identifier: Apache-2.0
"""What users call: DeepSpeed's functions, install, parallelize; plan, agree, check, shard.

Internal: the public names are those of ``deepspeed_autotp`` itself.
"""
