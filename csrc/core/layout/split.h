/* SPDX-License-Identifier: Apache-2.0 */
/* split.h -- split one dimension into one width per rank.
 *
 * The only place where widths are computed. Sharding, gathering and export
 * read the widths stored in the plan; none of them derives its own. */
#ifndef TP_SPLIT_H
#define TP_SPLIT_H

#include <stdint.h>

#include "base/error.h"

/* Split `size` into `ranks` widths, each a multiple of `unit` (a head size for
 * attention, the grain size elsewhere). Earlier ranks take the remainder, so
 * two widths differ by at most one unit. A width is 0 when there are fewer
 * units than ranks. `widths` has room for `ranks` values.
 * Fails with TP_VALUE unless `unit` divides `size`. */
int tp_split(int64_t size, int64_t unit, int ranks, int64_t *widths, tp_error *err);

/* `unit`, halved until `size` has one for every rank; 1 where nothing larger does. */
int64_t tp_split_fit(int64_t size, int64_t unit, int ranks);

/* As tp_split, for a grain that is a wish and not a boundary of meaning: what
 * is left over when `grain` does not divide `size` goes to the last rank, and
 * the grain is that of tp_split_fit. Fails with TP_VALUE when there are more ranks than
 * elements. */
int tp_split_grain(int64_t size, int64_t grain, int ranks, int64_t *widths,
                   tp_error *err);

#endif
