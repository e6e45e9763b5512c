# SPDX-License-Identifier: Apache-2.0
"""The compiled operators: where they are loaded, and cutting and gathering with them."""
