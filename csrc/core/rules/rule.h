/* SPDX-License-Identifier: Apache-2.0 */
/* rule.h -- the ordered rules that decide over parameters.
 *
 * Earlier rules win. A rule knows where it came from, so that a plan can say
 * who decided, and it counts nothing: which rules matched is the plan's. */
#ifndef TP_RULE_H
#define TP_RULE_H

#include <stdbool.h>

#include "rules/hf_tp_plan.h"
#include "rules/regex.h"
#include "rules/spec.h"

typedef enum {
    TP_FROM_CONFIG,    /* partition_config */
    TP_FROM_PRESET,    /* preset_model */
    TP_FROM_HF,        /* a transformers tp_plan */
    TP_FROM_FAMILY,    /* the family table, for a model type that was tried with it */
    TP_FROM_HEURISTIC, /* the family table, for any other model */
    TP_FROM_DEFAULT,   /* embeddings, heads, and what works inside a sharded block */
    TP_FROM_NOTHING    /* no rule: stays replicated */
} tp_source;

/* "partition_config", "preset", "tp_plan", "family", "heuristic", "default", "-". */
const char *tp_source_name(tp_source source);

typedef struct {
    tp_source source;
    tp_style style; /* other than TP_STYLE_SHARD: of a module; `spec` says nothing */
    tp_spec spec;
    tp_regex **patterns; /* owned; NULL for a transformers rule */
    int pattern_count;
    char *hf_pattern;   /* owned; NULL for a rule with patterns */
    bool required;      /* no plan is made where it matches nothing */
    tp_pairs hf_pairs;  /* that every name contains which hf_pattern matches */
    char **model_types; /* owned; empty: any model */
    int model_type_count;
    char *label; /* owned: what to call the rule, e.g. "layer_specs[2]" */
} tp_rule;

/* Release what the rule owns, as far as it has been filled. */
void tp_rule_clear(tp_rule *rule);

typedef struct tp_rules tp_rules;

int tp_rules_new(tp_rules **out, tp_error *err);

/* Append a rule; its pointers belong to `rules` from now on, even on failure. */
int tp_rules_add(tp_rules *rules, tp_rule *rule, tp_error *err);

/* Append a preset's rows as rules. */
int tp_rules_add_preset(tp_rules *rules, const char *name, tp_error *err);

/* Append one entry of a transformers plan. Those of transformers' own plans need not
 * match: they serve several models. */
int tp_rules_add_style(tp_rules *rules, const char *pattern, const char *style,
                       bool required, tp_error *err);

int tp_rules_count(const tp_rules *rules);

/* Whether any rule comes from there. */
bool tp_rules_have(const tp_rules *rules, tp_source source);

/* Whether there are rules, and all of them skip what they match. */
bool tp_rules_only_skip(const tp_rules *rules);

const tp_rule *tp_rules_at(const tp_rules *rules, int index);

/* Whether the rule is for models of this type at all; NULL: unknown. */
bool tp_rule_fits_model(const tp_rule *rule, const char *model_type);

/* What a name is looked up with. */
typedef struct {
    const char *parameter;  /* "model.layers.0.mlp.up_proj.weight" */
    const char *module;     /* "model.layers.0.mlp.up_proj"; NULL: none */
    const char *model_type; /* "llama"; NULL: unknown */
    const char *prefix;     /* "model", the base-model prefix; "": none */
    const tp_stars *stars;  /* of each rule; NULL: TP_STARS_INDICES for all */
} tp_query;

/* The rules that match, in order, at most `room` of them; returns how many
 * matched in all, or -1. A pattern is tried on the parameter's name, and on
 * the module's name when that fails: both are written in the wild. */
int tp_rules_find(const tp_rules *rules, const tp_query *query, int *found, int room,
                  tp_error *err);

/* The same for one of many names, as of tp_regex_match_counted. */
int tp_rules_find_counted(const tp_rules *rules, const tp_query *query,
                          tp_long_matches *matches, int *found, int room,
                          tp_error *err);

void tp_rules_free(tp_rules *rules);

#endif
