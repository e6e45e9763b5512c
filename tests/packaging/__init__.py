# SPDX-License-Identifier: Apache-2.0
"""What is built and shipped: the build, the wheel, the CUDA library, the benchmarks."""
