# SPDX-License-Identifier: Apache-2.0
"""Tests of the native modules, below the Python layer."""
