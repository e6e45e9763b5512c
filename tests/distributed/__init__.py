# SPDX-License-Identifier: Apache-2.0
"""What ranks do together, over gloo; x_ranks.py runs on the ranks of test_x.py."""
