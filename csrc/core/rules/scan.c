/* SPDX-License-Identifier: Apache-2.0 */
/* scan.c -- which patterns mean the same in Python and in PCRE2.
 *
 * A recursive descent over the pattern that gives up at the first construct it
 * does not know. Left out on purpose, although both engines have them: what
 * PCRE2 reads differently in newer versions ("{,n}", blanks in "{m, n}"), what
 * Python warns about ("[[", "--", "&&", "~~", "||" in a class), what changed
 * in Python (\B on empty text, \Z), and repeats of groups or lookaheads that
 * can match nothing, where engines differ in when a loop ends. */
#include "rules/scan.h"

#include "base/text.h"

/* Far below where either engine runs out of stack. */
#define DEEPEST 50

/* PCRE2 unrolls counted groups; larger counts are left to Python. */
#define LARGEST_COUNT 1000

typedef struct {
    const char *at;
    int depth;         /* of groups; 0 is the top level */
    bool alternatives; /* at the top level: nothing is required then */
    tp_pairs required; /* by the literals of the top level */
    char last;         /* the literal just before; NUL: none */
} scan;

typedef enum {
    ELEMENT_LITERAL,  /* one certain character, the one just read */
    ELEMENT_SOME,     /* at least one character, not known which */
    ELEMENT_NULLABLE, /* a group that can match nothing */
    ELEMENT_ASSERTION /* matches no character */
} element;

typedef struct {
    bool present;
    bool optional; /* zero times will do */
} repeat;

static bool
is_digit(char letter)
{
    return letter >= '0' && letter <= '9';
}

static bool
is_alphanumeric(char letter)
{
    return is_digit(letter) || (letter >= 'a' && letter <= 'z') ||
           (letter >= 'A' && letter <= 'Z');
}

static bool
is_printable(char letter)
{
    return letter >= ' ' && letter <= '~';
}

/* Punctuation, a blank included, stands for itself after a backslash. */
static bool
is_escapable(char letter)
{
    return is_printable(letter) && !is_alphanumeric(letter);
}

/* Behind a backslash, outside a class. */
static bool
scan_escape(scan *s, element *out)
{
    const char letter = *s->at++;
    if (tp_text_is_one_of(letter, "dDwWsS"))
        *out = ELEMENT_SOME;
    else if (tp_text_is_one_of(letter, "bA"))
        *out = ELEMENT_ASSERTION;
    else if (is_escapable(letter))
        *out = ELEMENT_LITERAL;
    else
        return false;
    return true;
}

/* Where Python warns of set operations to come. */
static bool
is_set_operation(const char *at)
{
    return tp_text_is_one_of(at[0], "-&~|") && at[0] == at[1];
}

/* One member or one range. Only letters and digits bound a range: what
 * "[\w-z]" or "[+-\-]" means is not the same everywhere. */
static bool
scan_member(scan *s)
{
    const bool escaped = *s->at == '\\';
    if (escaped)
        s->at++;
    const char letter = *s->at;
    if (escaped ? !is_escapable(letter) && !tp_text_is_one_of(letter, "dDwWsS")
                : !is_printable(letter) || letter == '[' || is_set_operation(s->at))
        return false;
    s->at++;
    if (s->at[0] != '-' || s->at[1] == ']')
        return true;

    const char last = s->at[1];
    if (escaped || !is_alphanumeric(letter) || !is_alphanumeric(last))
        return false;
    s->at += 2;
    return true;
}

/* Behind the opening bracket. A first "]" is a member in both engines. */
static bool
scan_class(scan *s)
{
    if (*s->at == '^')
        s->at++;
    do {
        if (!scan_member(s))
            return false;
    } while (*s->at != ']');
    s->at++;
    return true;
}

static bool scan_alternatives(scan *s, bool *nullable);

/* Behind the opening parenthesis. */
static bool
scan_group(scan *s, element *out)
{
    const bool special = *s->at == '?';
    const bool assertion = special && tp_text_is_one_of(s->at[1], "=!");
    if (special && !assertion && s->at[1] != ':')
        return false;
    if (special)
        s->at += 2;
    bool nullable;
    if (s->depth++ == DEEPEST)
        return false;
    if (!scan_alternatives(s, &nullable) || *s->at != ')')
        return false;
    s->depth--;
    s->at++;
    *out = nullable ? ELEMENT_NULLABLE : ELEMENT_SOME;
    if (assertion)
        *out = ELEMENT_ASSERTION;
    return true;
}

static bool
scan_element(scan *s, element *out)
{
    const char letter = *s->at++;
    *out = ELEMENT_SOME;
    switch (letter) {
        case '\\':
            return scan_escape(s, out);
        case '[':
            return scan_class(s);
        case '(':
            return scan_group(s, out);
        case '.':
            return true;
        case '^':
        case '$':
            *out = ELEMENT_ASSERTION;
            return true;
        default:
            /* A lone bracket or brace is a literal to both, but hardly meant. */
            if (!is_printable(letter) || tp_text_is_one_of(letter, "]{}*+?"))
                return false;
            *out = ELEMENT_LITERAL;
            return true;
    }
}

static bool
scan_count(scan *s, int *out)
{
    if (!is_digit(*s->at))
        return false;
    int count = 0;
    while (is_digit(*s->at) && count <= LARGEST_COUNT)
        count = 10 * count + (*s->at++ - '0');
    *out = count;
    return count <= LARGEST_COUNT;
}

/* Behind the opening brace: "m}", "m,}" or "m,n}". */
static bool
scan_counts(scan *s, repeat *out)
{
    int least, most;
    if (!scan_count(s, &least))
        return false;
    if (*s->at == ',') {
        s->at++;
        if (*s->at != '}' && (!scan_count(s, &most) || most < least))
            return false;
    }
    out->optional = least == 0;
    return *s->at++ == '}';
}

static bool
scan_repeat(scan *s, repeat *out)
{
    *out = (repeat){false, false};
    if (!tp_text_is_one_of(*s->at, "*+?{"))
        return true;
    const char kind = *s->at++;
    out->present = true;
    out->optional = kind != '+';
    if (kind == '{' && !scan_counts(s, out))
        return false;
    if (*s->at == '?') /* lazy: finds as much as greedy, in another order */
        s->at++;
    return !tp_text_is_one_of(*s->at, "*+?{");
}

/* Add what an element of the top level and its repeat require. `letter` is the
 * element where it is a literal. */
static void
add_required(scan *s, element kind, char letter, repeat times)
{
    if (s->depth > 0)
        return;
    if (kind == ELEMENT_LITERAL && !times.optional && s->last != '\0')
        s->required |= tp_pairs_of(s->last, letter);
    s->last = kind == ELEMENT_LITERAL && !times.present ? letter : '\0';
}

/* Up to the end of the group or of the pattern. */
static bool
scan_alternatives(scan *s, bool *nullable)
{
    bool empty = true; /* this alternative, as far as it has been read */
    *nullable = false;
    while (*s->at != '\0' && *s->at != ')') {
        if (*s->at == '|') {
            s->at++;
            s->alternatives = s->alternatives || s->depth == 0;
            *nullable = *nullable || empty;
            empty = true;
            continue;
        }
        element kind;
        repeat times;
        if (!scan_element(s, &kind))
            return false;
        const char letter = s->at[-1];
        if (!scan_repeat(s, &times))
            return false;
        const bool may_be_empty = kind == ELEMENT_NULLABLE || kind == ELEMENT_ASSERTION;
        if (times.present && may_be_empty)
            return false;
        empty = empty && (may_be_empty || times.optional);
        add_required(s, kind, letter, times);
    }
    *nullable = *nullable || empty;
    return true;
}

bool
tp_scan(const char *pattern, tp_pairs *required)
{
    scan s = {.at = pattern};
    bool nullable;
    if (!scan_alternatives(&s, &nullable) || *s.at != '\0')
        return false;
    *required = s.alternatives ? 0 : s.required;
    return true;
}
