/* SPDX-License-Identifier: Apache-2.0 */
/* whole_experts.h -- modules of experts of which each rank has some, each of them
 * whole.
 *
 * Tokens are replicated, so none has to be sent: each rank runs its own experts, and
 * the module's output is the sum over the ranks, as with a shard of every expert, or
 * is gathered where each expert gives rows of its own. */
#ifndef TP_WHOLE_EXPERTS_H
#define TP_WHOLE_EXPERTS_H

#include "plan/plan_build.h"

/* Where the options ask for it, shard all parameters of the modules of experts along
 * the experts. Fails with TP_VALUE, naming the module, where one cannot be. Where they
 * leave it open, do so if that is right for all of the modules, and say why, or why
 * not, in the rules of the parameters. */
int tp_whole_experts_settle(tp_build *build, tp_error *err);

/* The first parameter of a module that is sharded so, or -1. */
int tp_whole_experts_first(const tp_build *build, int module);

/* What a module calls the number of its experts. */
extern const char *const tp_whole_experts_keys[];

#endif
