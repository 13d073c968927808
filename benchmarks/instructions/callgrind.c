/* Callgrind's requests as functions, for Python: forms.py. */
#include <valgrind/callgrind.h>

void start(void) { CALLGRIND_START_INSTRUMENTATION; }

void zero(void) { CALLGRIND_ZERO_STATS; }

void dump(const char* name) { CALLGRIND_DUMP_STATS_AT(name); }
