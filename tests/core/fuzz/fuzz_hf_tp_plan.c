/* SPDX-License-Identifier: Apache-2.0 */
/* Plans of transformers: styles, and patterns held against names. */
#include "input.h"
#include "model/adapters.h"
#include "model/names.h"
#include "rules/rule.h"

enum { LONGEST = 96 };

/* From the definition: `*` is any text. `row[i]`: the pattern so far is the first `i`
 * characters of the name. */
static bool
is_text(const char *pattern, const char *name)
{
    bool row[LONGEST + 1] = {true};
    const size_t size = strlen(name);
    for (; *pattern != '\0'; pattern++) {
        bool before = row[0];
        row[0] = row[0] && *pattern == '*';
        for (size_t i = 1; i <= size; i++) {
            const bool above = row[i];
            row[i] = *pattern == '*' ? above || row[i - 1]
                                     : before && *pattern == name[i - 1];
            before = above;
        }
    }
    return row[size];
}

/* From the definition: a part that is `*` is a part of digits. */
static bool
is_name(const char *pattern, const char *name)
{
    for (;;) {
        const size_t own = strcspn(pattern, "."), other = strcspn(name, ".");
        const bool star = own == 1 && pattern[0] == '*';
        if (star ? other == 0 || strspn(name, "0123456789") < other
                 : own != other || memcmp(pattern, name, own) != 0)
            return false;
        if (pattern[own] != name[other])
            return false;
        if (pattern[own] == '\0')
            return true;
        pattern += own + 1;
        name += other + 1;
    }
}

static const char *
behind(const char *name, const char *prefix)
{
    const size_t size = strlen(prefix);
    return size > 0 && strncmp(name, prefix, size) == 0 && name[size] == '.'
               ? name + size + 1
               : NULL;
}

static bool
is_like(const char *pattern, const char *prefix, const char *name, tp_stars stars)
{
    bool (*same)(const char *, const char *) =
        stars == TP_STARS_TEXT ? is_text : is_name;
    const char *rest = behind(name, prefix), *own = behind(pattern, prefix);
    return same(pattern, name) || (rest != NULL && same(pattern, rest)) ||
           (own != NULL && same(own, name));
}

static bool
is_like_plain(const char *pattern, const char *prefix, const char *name, tp_stars stars)
{
    char room[TP_LONGEST_NAME];
    tp_adapted part;
    const char *plain = tp_adapters_plain(name, room, &part);
    return is_like(pattern, prefix, name, stars) ||
           ((part == TP_ADAPTED_ROOT || part == TP_ADAPTED_LAYER) &&
            is_like(pattern, prefix, plain, stars));
}

/* A rule is found for just the names that its pattern is like. */
static void
check_rule(const char *style, const char *pattern, const tp_query *query)
{
    tp_error err = TP_NO_ERROR;
    tp_rules *rules = NULL;
    int found[1];
    REQUIRE(tp_rules_new(&rules, &err) == 0);
    if (is_done(tp_rules_add_style(rules, pattern, style, false, &err), &err)) {
        const tp_stars stars = query->stars[0];
        const int count = tp_rules_find(rules, query, found, 1, &err);
        REQUIRE(count ==
                (is_like_plain(pattern, query->prefix, query->parameter, stars) ||
                 is_like_plain(pattern, query->prefix, query->module, stars)));
        REQUIRE(tp_rules_count(rules) == 1);
    }
    tp_rules_free(rules);
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    input in = input_of(data, size);
    tp_error err = TP_NO_ERROR;
    tp_spec spec;
    tp_style style;
    const int kind = take_byte(&in);
    const tp_stars stars = (kind & 1) != 0 ? TP_STARS_TEXT : TP_STARS_INDICES;
    const char *known = tp_hf_plan_style_name(kind >> 1);
    const char *pattern = take_line(&in), *prefix = take_line(&in);
    const char *parameter = take_line(&in), *module = take_line(&in);
    const char *name = known != NULL ? known : take_line(&in);
    if (is_done(tp_hf_plan_style(name, pattern, &style, &spec, &err), &err) &&
        style == TP_STYLE_SHARD)
        REQUIRE(tp_spec_check(&spec, name, &err) == 0);
    is_done(tp_hf_plan_spec(name, pattern, &spec, &err), &err);
    if (strlen(parameter) <= LONGEST && strlen(module) <= LONGEST) {
        const tp_query query = {parameter, module, NULL, prefix, &stars};
        REQUIRE(tp_hf_plan_match(pattern, prefix, parameter, stars) ==
                is_like(pattern, prefix, parameter, stars));
        if (strchr(prefix, '*') == NULL) /* the name of an attribute */
            check_rule(name, pattern, &query);
    }
    input_end(&in);
    return 0;
}
