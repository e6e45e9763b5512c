# SPDX-License-Identifier: Apache-2.0
"""From a model and the rules to a plan, and the plan as a table.

Internal: the public names are those of ``deepspeed_autotp`` itself.
"""
