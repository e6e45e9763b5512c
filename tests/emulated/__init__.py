# SPDX-License-Identifier: Apache-2.0
"""CUDA kernels, their operators and NCCL on a machine without a GPU."""
