/* Sixteen floats at any address: one register with AVX-512, two with AVX2, four with NEON or SSE. */
#include <stdint.h>

typedef float vec __attribute__((vector_size(64), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(64), aligned(4)));
enum { LANES = 16 };

static inline vec load(const float *p) { return *(const vec *)p; }
static inline void store(float *p, vec v) { *(vec *)p = v; }
