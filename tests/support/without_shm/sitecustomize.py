# SPDX-License-Identifier: Apache-2.0
"""Python reads this at its start where its folder is on the path: DeepSpeed's shared-memory
all-reduce, which it compiles for minutes at the first initialize, is not used."""

from types import ModuleType

import wrapt


def _leave_out(deepspeed: ModuleType) -> None:
    vars(deepspeed)["ops"].__compatible_ops__["deepspeed_shm_comm"] = False


wrapt.register_post_import_hook(_leave_out, "deepspeed")
