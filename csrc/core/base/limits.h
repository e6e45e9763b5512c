/* SPDX-License-Identifier: Apache-2.0 */
/* limits.h -- the sizes of arrays that are not allocated. */
#ifndef TP_LIMITS_H
#define TP_LIMITS_H

#define TP_MAX_DIMS 8 /* dimensions of a parameter, or of the view of one */

#endif
