# SPDX-License-Identifier: Apache-2.0
"""Random models, each trained sharded and in one process, and compared (``make prove``)."""
