# SPDX-License-Identifier: Apache-2.0
"""The tests are a package, so that a worker process imports them by name."""
