# SPDX-License-Identifier: Apache-2.0
"""What DeepSpeed's engine is given, and what of its state is read or replaced."""
