# SPDX-License-Identifier: Apache-2.0
"""On the path of the processes that tests start."""
