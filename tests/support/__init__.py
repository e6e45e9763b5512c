# SPDX-License-Identifier: Apache-2.0
"""What tests import: models, scripts, worker processes and stand-ins. Never collected."""
