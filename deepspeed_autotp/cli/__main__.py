# SPDX-License-Identifier: Apache-2.0
"""``python -m deepspeed_autotp.cli``: the command ``autotp``."""

import sys

from deepspeed_autotp.cli.main import main

sys.exit(main())
