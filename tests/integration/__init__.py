# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed, transformers, Accelerate, TRL and PEFT around a sharded model."""
