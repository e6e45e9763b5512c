/* SPDX-License-Identifier: Apache-2.0 */
/* scan.h -- which patterns mean the same in Python and in PCRE2.
 *
 * Decides by reading the pattern, never by running it. The subset is what
 * patterns for parameter names are made of; where the two engines differ, or
 * differ between versions, the pattern is outside it. */
#ifndef TP_SCAN_H
#define TP_SCAN_H

#include <stdbool.h>

#include "rules/pairs.h"

/* Whether `pattern`, which Python has accepted, is in the common subset. If so,
 * `required` gets pairs that every match contains. */
bool tp_scan(const char *pattern, tp_pairs *required);

#endif
