/* SPDX-License-Identifier: Apache-2.0 */
/* dtype.h -- the spellings of a data type.
 *
 * Canonical names are torch's own without the prefix: "bfloat16". */
#ifndef TP_DTYPE_H
#define TP_DTYPE_H

#include "base/error.h"

/* The canonical name of "bf16", "torch.bfloat16", "BFloat16", "half", "float",
 * "fp32", ..., with static lifetime. Case and surrounding blanks do not count.
 * Fails with TP_VALUE, naming `where` and the nearest spellings. */
int tp_dtype_name(const char *spelling, const char *where, const char **out,
                  tp_error *err);

#endif
