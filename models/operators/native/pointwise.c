/* Norm, modulation and MLP of the residual block, a few rows at a time so that nothing in between leaves the cache.

   A row x of C channels, with mean and variance over its channels, gives n = (x - mean) / sqrt(variance + eps) and
   h = n * scale + shift; the block adds W2 gelu(W1 h + b1) + b2 to x. scale and shift are those of the row's image.
   C is a multiple of 16 and at most MOST_CHANNELS. Gradients of what rows share are summed over chunks of consecutive
   rows of one image, which depend on the sizes alone: results do not depend on the number of threads. */

#include <math.h>
#include <string.h>

#include "vectors.h"

enum { MOST_CHANNELS = 128, MOST_HIDDEN = 2 * MOST_CHANNELS, ROWS = 48 };

/* Tile of a product held in registers: TILE_ROWS x TILE_VECS accumulators, beside one row of factors. */
#ifdef __AVX512F__
enum { TILE_ROWS = 6, TILE_VECS = 4 };
#else
enum { TILE_ROWS = 3, TILE_VECS = 2 };
#endif

#define BUFFER(name, width) float name[ROWS * (width)] __attribute__((aligned(64)))

/* out(i, n) += sum over k of a(i, k) * w(k, n) for one tile; a(i, k) = a[i * a_row + k * a_col]. */
static inline __attribute__((always_inline)) void tile(const int rows, const int vecs, const float *a, int64_t a_row,
                                                       int64_t a_col, const float *w, int64_t w_row, int64_t depth,
                                                       float *out, int64_t out_row) {
    vec sum[TILE_ROWS][TILE_VECS];
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < vecs; v++) sum[i][v] = load(out + i * out_row + v * LANES);
    for (int64_t k = 0; k < depth; k++) {
        vec factor[TILE_VECS];
        for (int v = 0; v < vecs; v++) factor[v] = load(w + k * w_row + v * LANES);
        for (int i = 0; i < rows; i++) {
            const float value = a[i * a_row + k * a_col];
            for (int v = 0; v < vecs; v++) sum[i][v] += value * factor[v];
        }
    }
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < vecs; v++) store(out + i * out_row + v * LANES, sum[i][v]);
}

/* The same for a whole product; `columns` is a multiple of 16. */
static void product(int64_t rows, int64_t columns, int64_t depth, const float *a, int64_t a_row, int64_t a_col,
                    const float *w, int64_t w_row, float *out, int64_t out_row) {
    int64_t n = 0;
    for (; n + TILE_VECS * LANES <= columns; n += TILE_VECS * LANES) {
        int64_t i = 0;
        for (; i + TILE_ROWS <= rows; i += TILE_ROWS)
            tile(TILE_ROWS, TILE_VECS, a + i * a_row, a_row, a_col, w + n, w_row, depth, out + i * out_row + n, out_row);
        for (; i < rows; i++)
            tile(1, TILE_VECS, a + i * a_row, a_row, a_col, w + n, w_row, depth, out + i * out_row + n, out_row);
    }
    for (; n < columns; n += LANES) {
        int64_t i = 0;
        for (; i + TILE_ROWS <= rows; i += TILE_ROWS)
            tile(TILE_ROWS, 1, a + i * a_row, a_row, a_col, w + n, w_row, depth, out + i * out_row + n, out_row);
        for (; i < rows; i++)
            tile(1, 1, a + i * a_row, a_row, a_col, w + n, w_row, depth, out + i * out_row + n, out_row);
    }
}

static inline float total(vec v) {
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += v[lane];
    return sum;
}

/* n of one row; returns 1 / sqrt(variance + eps). */
static inline float normalise(const float *x, int64_t channels, float eps, float *n) {
    vec sum = {0}, squares = {0};
    for (int64_t c = 0; c < channels; c += LANES) sum += load(x + c);
    const float mean = total(sum) / channels;
    for (int64_t c = 0; c < channels; c += LANES) squares += (load(x + c) - mean) * (load(x + c) - mean);
    const float reciprocal = 1 / sqrtf(total(squares) / channels + eps);
    for (int64_t c = 0; c < channels; c += LANES) store(n + c, (load(x + c) - mean) * reciprocal);
    return reciprocal;
}

static inline void modulate(const float *n, const float *scale, const float *shift, int64_t channels, float *h) {
    for (int64_t c = 0; c < channels; c += LANES) store(h + c, load(n + c) * load(scale + c) + load(shift + c));
}

/* From the gradient dh of h to that of x, beside `direct`, a gradient of x that arrives on another way (or NULL); adds
   to the gradients of scale and shift. */
static inline void normalise_backward(const float *n, float reciprocal, const float *dh, const float *scale,
                                      const float *direct, int64_t channels, float *dx, float *dscale, float *dshift) {
    vec sum = {0}, along = {0};
    for (int64_t c = 0; c < channels; c += LANES) {
        const vec dn = load(dh + c) * load(scale + c);
        sum += dn;
        along += dn * load(n + c);
        store(dscale + c, load(dscale + c) + load(dh + c) * load(n + c));
        store(dshift + c, load(dshift + c) + load(dh + c));
    }
    const float mean = total(sum) / channels, projection = total(along) / channels;
    for (int64_t c = 0; c < channels; c += LANES) {
        const vec through = (load(dh + c) * load(scale + c) - mean - load(n + c) * projection) * reciprocal;
        store(dx + c, direct ? load(direct + c) + through : through);
    }
}

/* e^x for x <= 0 to the last bits of float: 2^k * e^r with |r| <= ln(2) / 2. */
static inline vec exponential(vec x) {
    const ivec tiny = x < -87.0f;
    x = (vec)(((ivec)x & ~tiny) | ((ivec)((vec){0} - 87.0f) & tiny));
    const float rounding = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    const vec k = (x * 1.44269504f + rounding) - rounding;
    const vec r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
    vec p = r * 1.98756915e-4f + 1.39819995e-3f;
    p = p * r + 8.33345254e-3f;
    p = p * r + 4.16657962e-2f;
    p = p * r + 1.66666657e-1f;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    return p * (vec)((__builtin_convertvector(k, ivec) + 127) << 23);
}

/* The distribution function of a standard normal variable at u, and its density. For u < 0 it is exp(-u^2 / 2) times a
   polynomial in 1 / (1 + 0.304 |u|), fitted to a relative error of 1e-7 for |u| <= 13. */
static inline vec normal_distribution(vec u, vec *density) {
    const ivec negative = u < 0.0f;
    const vec size = (vec)((ivec)u & 0x7fffffff), t = 1.0f / (1.0f + 0.304f * size), e = exponential(-0.5f * u * u);
    vec p = t * 0.0368704677f - 0.155349875f;
    p = p * t + 0.192279043f;
    p = p * t - 0.0432156834f;
    p = p * t + 0.123600728f;
    p = p * t + 0.102407588f;
    p = p * t + 0.122173267f;
    p = p * t + 0.121234507f;
    const vec tail = p * t * e;
    *density = e * 0.398942280f;
    return (vec)(((ivec)tail & negative) | ((ivec)(1.0f - tail) & ~negative));
}

/* The chunk `part` of rows: those of image part / parts from `from` to `to`. */
#define CHUNK                                                                                                          \
    const int64_t image = part / parts, from = image * points + part % parts * chunk;                                  \
    const int64_t end = (image + 1) * points, to = from + chunk < end ? from + chunk : end;                            \
    const float *m = scale + image * channels, *a = shift + image * channels;

/* h for rows (images * points, channels); scale and shift: (images, channels). */
void infty_norm_modulate(const float *x, const float *scale, const float *shift, const float *eps, int64_t images,
                         int64_t points, int64_t channels, float *h) {
#pragma omp parallel for
    for (int64_t row = 0; row < images * points; row++) {
        const int64_t image = row / points;
        float *out = h + row * channels;
        normalise(x + row * channels, channels, *eps, out);
        modulate(out, scale + image * channels, shift + image * channels, channels, out);
    }
}

/* dx, and (images * parts, channels) sums over chunks for scale and shift, zeros on entry; parts * chunk >= points. */
void infty_norm_modulate_backward(const float *dh, const float *x, const float *scale, const float *shift,
                                  const float *eps, int64_t images, int64_t points, int64_t channels, int64_t parts,
                                  int64_t chunk, float *dx, float *dscale, float *dshift) {
#pragma omp parallel for schedule(dynamic)
    for (int64_t part = 0; part < images * parts; part++) {
        CHUNK
        (void)a;
        float n[MOST_CHANNELS];
        for (int64_t row = from; row < to; row++) {
            const int64_t at = row * channels;
            const float reciprocal = normalise(x + at, channels, *eps, n);
            normalise_backward(n, reciprocal, dh + at, m, NULL, channels, dx + at, dscale + part * channels,
                               dshift + part * channels);
        }
    }
}

/* x becomes X x + S skip + b for rows (count, channels); w: (2 channels, channels), the transposes of X and S. */
void infty_join(float *x, const float *skip, const float *w, const float *b, int64_t count, int64_t channels) {
#pragma omp parallel for
    for (int64_t first = 0; first < count; first += ROWS) {
        const int64_t rows = count - first < ROWS ? count - first : ROWS, at = first * channels;
        BUFFER(sum, MOST_CHANNELS);
        for (int64_t i = 0; i < rows; i++) memcpy(sum + i * channels, b, channels * sizeof(float));
        product(rows, channels, channels, x + at, channels, 1, w, channels, sum, channels);
        product(rows, channels, channels, skip + at, channels, 1, w + channels * channels, channels, sum, channels);
        memcpy(x + at, sum, rows * channels * sizeof(float));
    }
}

/* out = x + W2 gelu(W1 h + b1) + b2; w1: (channels, hidden), w2: (hidden, channels), the transposes of the layers'. */
void infty_mlp(const float *x, const float *scale, const float *shift, const float *w1, const float *b1,
               const float *w2, const float *b2, const float *eps, int64_t images, int64_t points, int64_t channels,
               int64_t parts, int64_t chunk, float *out) {
    const int64_t hidden = 2 * channels;
#pragma omp parallel for schedule(dynamic)
    for (int64_t part = 0; part < images * parts; part++) {
        CHUNK
        BUFFER(h, MOST_CHANNELS);
        BUFFER(u, MOST_HIDDEN);
        for (int64_t first = from; first < to; first += ROWS) {
            const int64_t rows = to - first < ROWS ? to - first : ROWS, at = first * channels;
            for (int64_t i = 0; i < rows; i++) {
                float *row = h + i * channels, *result = out + at + i * channels;
                normalise(x + at + i * channels, channels, *eps, row);
                modulate(row, m, a, channels, row);
                memcpy(u + i * hidden, b1, hidden * sizeof(float));
                for (int64_t c = 0; c < channels; c += LANES)
                    store(result + c, load(x + at + i * channels + c) + load(b2 + c));
            }
            product(rows, hidden, channels, h, channels, 1, w1, hidden, u, hidden);
            for (int64_t i = 0; i < rows * hidden; i += LANES) {
                vec density;
                store(u + i, load(u + i) * normal_distribution(load(u + i), &density));
            }
            product(rows, channels, hidden, u, hidden, 1, w2, channels, out + at, channels);
        }
    }
}

/* Gradients of infty_mlp; w1, w2 as there and w1_rows: (hidden, channels), w2_rows: (channels, hidden) as in the layers.
   sums: for each chunk those of w1 (hidden, channels), w2 (channels, hidden), b1, b2, scale and shift one after the
   other, zeros on entry. */
void infty_mlp_backward(const float *dout, const float *x, const float *scale, const float *shift, const float *w1,
                        const float *b1, const float *w1_rows, const float *w2_rows, const float *eps, int64_t images,
                        int64_t points, int64_t channels, int64_t parts, int64_t chunk, float *dx, float *sums) {
    const int64_t hidden = 2 * channels, length = 2 * hidden * channels + hidden + 3 * channels;
#pragma omp parallel for schedule(dynamic)
    for (int64_t part = 0; part < images * parts; part++) {
        CHUNK
        BUFFER(n, MOST_CHANNELS);
        BUFFER(h, MOST_CHANNELS);
        BUFFER(dh, MOST_CHANNELS);
        BUFFER(u, MOST_HIDDEN);
        BUFFER(du, MOST_HIDDEN);
        float reciprocal[ROWS];
        float *dw1 = sums + part * length, *dw2 = dw1 + hidden * channels, *db1 = dw2 + hidden * channels;
        float *db2 = db1 + hidden, *dscale = db2 + channels, *dshift = dscale + channels;
        for (int64_t first = from; first < to; first += ROWS) {
            const int64_t rows = to - first < ROWS ? to - first : ROWS;
            const float *dy = dout + first * channels;
            for (int64_t i = 0; i < rows; i++) {
                reciprocal[i] = normalise(x + (first + i) * channels, channels, *eps, n + i * channels);
                modulate(n + i * channels, m, a, channels, h + i * channels);
                memcpy(u + i * hidden, b1, hidden * sizeof(float));
            }
            memset(du, 0, rows * hidden * sizeof(float));
            memset(dh, 0, rows * channels * sizeof(float));
            product(rows, hidden, channels, h, channels, 1, w1, hidden, u, hidden);
            product(rows, hidden, channels, dy, channels, 1, w2_rows, hidden, du, hidden);
            for (int64_t i = 0; i < rows * hidden; i += LANES) { /* u becomes gelu(u), du its gradient */
                vec density;
                const vec value = load(u + i), distribution = normal_distribution(value, &density);
                store(u + i, value * distribution);
                store(du + i, load(du + i) * (distribution + value * density));
            }
            for (int64_t i = 0; i < rows; i++) {
                for (int64_t c = 0; c < hidden; c += LANES) store(db1 + c, load(db1 + c) + load(du + i * hidden + c));
                for (int64_t c = 0; c < channels; c += LANES) store(db2 + c, load(db2 + c) + load(dy + i * channels + c));
            }
            product(channels, hidden, rows, dy, 1, channels, u, hidden, dw2, hidden);
            product(hidden, channels, rows, du, 1, hidden, h, channels, dw1, channels);
            product(rows, channels, hidden, du, hidden, 1, w1_rows, channels, dh, channels);
            for (int64_t i = 0; i < rows; i++)
                normalise_backward(n + i * channels, reciprocal[i], dh + i * channels, m, dy + i * channels, channels,
                                   dx + (first + i) * channels, dscale, dshift);
        }
    }
}
