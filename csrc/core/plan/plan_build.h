/* SPDX-License-Identifier: Apache-2.0 */
/* plan_build.h -- what a plan is made of while it is made; for plan/ and the passes.
 *
 * Everybody else reads a plan through plan.h. */
#ifndef TP_PLAN_BUILD_H
#define TP_PLAN_BUILD_H

#include <stdbool.h>
#include <stdint.h>

#include "base/arena.h"
#include "base/text.h"
#include "layout/layout_cache.h"
#include "model/geometry.h"
#include "plan/plan.h"

struct tp_plan {
    tp_arena *arena; /* everything below lives here */
    const tp_model *model;
    int ranks;
    tp_entry *entries; /* one per parameter */
    int entry_count;
    tp_layer *layers;
    int layer_count;
    tp_local_integer *integers;
    int integer_count;
    tp_stack *stacks;
    int stack_count;
    tp_regions regions;
    int logits_layer; /* -1: none */
    tp_message *messages;
    int message_count;
    int message_room;
    uint64_t hash;
};

/* Why a parameter has its specification. */
typedef enum {
    TP_REASON_NONE,
    TP_REASON_RULE,   /* a rule matches its name */
    TP_REASON_FAMILY, /* names and sizes are those of a block or of experts */
    TP_REASON_FALLBACK_REPLICATED, /* the options ask for a replicated module */
    TP_REASON_FALLBACK_INDIVIDUAL, /* or for individually sharded layers in it */
    TP_REASON_DEFAULT, /* an embedding, a head, or what works inside a sharded block */
    TP_REASON_LARGE,   /* a large layer, individually sharded */
    TP_REASON_EXPERT_BIAS, /* added to the sum of the experts */
    TP_REASON_PER_HEAD     /* attention has a value of it for each head */
} tp_reason;

/* Which rule decides over a parameter. */
typedef struct {
    const tp_spec *spec; /* NULL: no rule */
    tp_source source;
    const char *rule; /* label; "" for no rule */
    tp_reason reason;
} tp_choice;

#define TP_NO_CHOICE                              \
    {                                             \
        NULL, TP_FROM_NOTHING, "", TP_REASON_NONE \
    }

enum { TP_ATTENTION_NEAR = -2 };

/* What the rule comes to for one parameter. */
typedef struct {
    tp_kind kind;
    int dim; /* -1: replicated */
    int64_t outer;
    int64_t inner;
    const tp_layout *layout; /* NULL: replicated */
    int attention;           /* module whose heads are sharded; -1: none */
    bool shards_keys;        /* its key/value heads are sharded here, too */
    bool gather_output;
    bool split_input;
} tp_decision;

#define TP_NO_DECISION                                         \
    {                                                          \
        TP_REPLICATED, -1, 1, 1, NULL, -1, false, false, false \
    }

typedef struct {
    const tp_model *model;
    const tp_rules *rules;
    const tp_plan_options *options;
    tp_plan *plan;
    tp_choice *choices;     /* one per parameter; a bias has its weight's */
    tp_decision *decisions; /* one per parameter */
    int *next_name;         /* one per parameter: the next name of its tensor, or -1 */
    tp_stars *stars;        /* one per rule: how the `*` of its pattern is read */
    bool *matched;          /* one per rule: it matched some parameter or module */
    int *module_rules;      /* one per module: the rule that names it, or -1 */
    bool *experts;          /* one per module: its output is a sum over ranks */
    int *stacked;    /* one per module: a weight of experts that it views, or -1 */
    int *attentions; /* one per module: the module whose heads its weight has, -1
                      * for none, TP_ATTENTION_NEAR where it is not known */
    int paired;      /* blocks of the family table that are sharded */
    int64_t
        aligned; /* elements: a multiple of the grain that is 16 bytes of a weight */
    tp_layout_cache *layouts;
    tp_geometries *geometries;
} tp_build;

/* The name that comes first of those that share the parameter's tensor. */
int tp_build_first(const tp_build *build, int parameter);

/* Whether a rule names the module, or one around it, as experts, whose output is a sum
 * over the ranks. */
bool tp_build_in_experts(const tp_build *build, int module);

/* The text in memory of the plan, or NULL with `err` filled; it is empty afterwards. */
const char *tp_build_text(tp_build *build, tp_text *text, tp_error *err);

/* Take the text over as a message of the plan; the text is empty afterwards. */
int tp_build_message(tp_build *build, tp_text *text, tp_error *err);

/* Put "cannot shard <parameter> [sizes] by rule '<label>' (<source>): " in front of
 * a TP_VALUE error. Returns -1. */
int tp_build_refuse(const tp_build *build, int parameter, const tp_choice *choice,
                    tp_error *err);

#endif
