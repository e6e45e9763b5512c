/* SPDX-License-Identifier: Apache-2.0 */
/* replay CORPUS [LINE]: the inputs of a file, or one of them, without a fuzzer.
 *
 * A line is an input in hexadecimal digits. */
#define _POSIX_C_SOURCE 200809L /* getline */

#include <ctype.h>
#include <signal.h>
#include <unistd.h>

#include "input.h"

/* Of AddressSanitizer, where the program has it. */
void __sanitizer_set_death_callback(void (*callback)(void)) __attribute__((weak));

static const char *path;
static int line; /* of the input that runs */

static void
say_where(void)
{
    fprintf(stderr, "%s, line %d\n", path, line);
}

static void
say_where_and_abort(int signal)
{
    (void)signal;
    say_where();
    _exit(1);
}

static int
value_of(int digit)
{
    return digit <= '9' ? digit - '0' : digit - 'a' + 10;
}

/* Makes bytes of the digits in place, in memory of just their size. */
static void
run_line(const char *digits, size_t size)
{
    uint8_t *bytes = malloc(size / 2 + 1);
    REQUIRE(bytes != NULL && size % 2 == 0);
    for (size_t i = 0; i < size / 2; i++)
        bytes[i] =
            (uint8_t)(value_of(digits[2 * i]) << 4 | value_of(digits[2 * i + 1]));
    uint8_t *exact = realloc(bytes, size / 2 > 0 ? size / 2 : 1);
    REQUIRE(exact != NULL);
    LLVMFuzzerTestOneInput(exact, size / 2);
    free(exact);
}

int
main(int argc, char **argv)
{
    char *text = NULL;
    size_t room = 0;
    int count = 0;
    if (argc < 2) {
        fprintf(stderr, "usage: %s CORPUS [LINE]\n", argv[0]);
        return 2;
    }
    path = argv[1];
    const int wanted = argc > 2 ? atoi(argv[2]) : 0;
    FILE *file = fopen(path, "r");
    if (file == NULL) {
        perror(path);
        return 2;
    }
    if (__sanitizer_set_death_callback != NULL)
        __sanitizer_set_death_callback(say_where);
    signal(SIGABRT, say_where_and_abort);
    for (ssize_t size; (size = getline(&text, &room, file)) >= 0;) {
        line++;
        while (size > 0 && isspace((unsigned char)text[size - 1]))
            size--;
        if (wanted != 0 && wanted != line)
            continue;
        run_line(text, (size_t)size);
        count++;
    }
    free(text);
    fclose(file);
    printf("%s: %d inputs replayed\n", path, count);
    return count > 0 ? 0 : 1;
}
