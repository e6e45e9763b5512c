/* SPDX-License-Identifier: Apache-2.0 */
/* cross_entropy.h -- cross-entropy over one rank's columns of the vocabulary, on a GPU.
 *
 * Two passes over the logits: one reads them, one puts the gradient in their place.
 * What the ranks exchange between the two is not done here. */
#ifndef TP_CROSS_ENTROPY_H
#define TP_CROSS_ENTROPY_H

#include <stdint.h>

typedef enum {
    TP_LOGIT_FLOAT32 = 0,
    TP_LOGIT_FLOAT16 = 1,
    TP_LOGIT_BFLOAT16 = 2
} tp_logit;

/* All memory is borrowed and on the current device. */
typedef struct {
    void *logits; /* [tokens, width], of type `type`; written by the gradient alone */
    const int64_t *columns; /* [tokens] the label's column; outside of [0, width) where
                             * another rank holds it or there is none */
    float *statistics; /* [3, tokens] largest logit, sum of exponentials less it, and
                        * the label's logit or 0 */
    const float *logsumexp; /* [tokens] */
    const float *scale;     /* [tokens] 0 where the gradient is 0 */
    int64_t tokens;
    int64_t width;
    float cap;    /* soft cap, 0 for none */
    int32_t type; /* a tp_logit */
} tp_cross_entropy_args;

#ifdef __cplusplus
extern "C" {
#endif

/* Fill `statistics`; reads `logits` and `columns`. The same call gives the same bits.
 * Returns a cudaError_t. */
int tp_cross_entropy_statistics(const tp_cross_entropy_args *args, void *stream);

/* Put scale (exp(x - logsumexp) - [label]) in the place of the logits. */
int tp_cross_entropy_gradient(const tp_cross_entropy_args *args, void *stream);

#ifdef __cplusplus
}
#endif

#endif
