/* Depthwise convolution of a full lattice with kernels that were resampled from k × k to a larger k'_h × k'_w.

   The resampled kernel is Uᵀ K V with U (k, k'_h) and V (k, k'_w) linear interpolation, two nonzeros per column. So
   each row of the input is filtered along its columns by the k rows of V, the k results are combined by K into k more,
   and these are added, weighted by U, to the rows of the output they reach: 2 (k'_h + k'_w) + k² multiply-adds per
   pixel and channel instead of k'_h·k'_w.

   A task is a band of rows × COLUMNS columns × LANES channels. All it holds in between, but for sums that are not in
   reach, stays in the first cache. Sums run in one order whatever the number of threads. */

#include <string.h>

#include "../vectors.h"

/* TOGETHER columns share each coefficient: twice as many sums fit the registers, 32 with AVX-512 and 16 else. */
enum { TOGETHER = LANES == 16 ? 8 : 4, COLUMNS = 16, BLOCK = 8 };

/* U or V: weights (k, taps) and first (k). Of weights, columns first[i] to first[i + 1] are zero but in the rows i and
   i + 1. */
typedef struct {
    int64_t taps;
    const int64_t *first;
    const float *weights;
} axis;

/* What a thread works in: row (COLUMNS + k'_w - 1), of x with its margins; filtered and combined (k, COLUMNS); and for
   each slice of channels taps (slices, k, k) and sums (slices, k'_h + BLOCK - 1, COLUMNS) of the rows in reach. */
typedef struct {
    vec *row, *filtered, *combined, *taps, *sums;
} scratch;

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* Pixels from `start` on of a row, zero beyond its ends and beyond its channels. x: (width, channels). row: (count). */
static void copy_row(const float *x, int64_t width, int64_t channels, int64_t lanes, int64_t start, int64_t count,
                     vec *restrict row) {
    memset(row, 0, count * sizeof(vec));
    const int64_t end = least(start + count, width);
    for (int64_t c = most(start, 0); c < end; c++) memcpy(row + c - start, x + c * channels, lanes * sizeof(float));
}

/* filtered[i][c] = Σ_t V[i][t] x[c + t]. x: (COLUMNS + taps - 1). filtered: (k, COLUMNS). */
static void filter_columns(const axis *a, int64_t k, const vec *restrict x, vec *restrict filtered) {
    for (int64_t c0 = 0; c0 < COLUMNS; c0 += TOGETHER) {
        vec here[TOGETHER] = {0}, next[TOGETHER] = {0};
        for (int64_t i = 0; i < k; i++) {
            const float *weights = a->weights + i * a->taps;
            const int64_t end = i + 1 < k ? a->first[i + 1] : 0;
            for (int64_t t = a->first[i]; t < end; t++)
                for (int c = 0; c < TOGETHER; c++) {
                    const vec value = x[c0 + t + c];
                    here[c] += weights[t] * value;
                    next[c] += weights[a->taps + t] * value;
                }
            for (int c = 0; c < TOGETHER; c++) {
                filtered[i * COLUMNS + c0 + c] = here[c];
                here[c] = next[c];
                next[c] = (vec){0};
            }
        }
    }
}

/* combined[i][c] = Σ_j K[i][j] filtered[j][c]. taps: (k, k), K. filtered, combined: (k, COLUMNS). */
static void combine(int64_t k, const vec *restrict taps, const vec *restrict filtered, vec *restrict combined) {
    for (int64_t i = 0; i < k; i++)
        for (int64_t c0 = 0; c0 < COLUMNS; c0 += TOGETHER) {
            vec sum[TOGETHER] = {0};
            for (int64_t j = 0; j < k; j++)
                for (int c = 0; c < TOGETHER; c++) sum[c] += taps[i * k + j] * filtered[j * COLUMNS + c0 + c];
            for (int c = 0; c < TOGETHER; c++) combined[i * COLUMNS + c0 + c] = sum[c];
        }
}

/* sums[reach - t][c] += Σ_i U[i][t] combined[i][c] for the taps `from` to `to`. combined: (k, COLUMNS). sums: (reach +
   1, COLUMNS) at least. */
static void spread_rows(const axis *a, int64_t k, const vec *restrict combined, int64_t reach, int64_t from, int64_t to,
                        vec *restrict sums) {
    for (int64_t i = 0; i + 1 < k; i++) {
        const float *weights = a->weights + i * a->taps;
        const int64_t start = most(a->first[i], from), end = least(a->first[i + 1], to);
        for (int64_t c0 = 0; c0 < COLUMNS; c0 += TOGETHER) {
            const vec *here = combined + i * COLUMNS + c0, *next = here + COLUMNS;
            for (int64_t t = start; t < end; t++) {
                vec *restrict sum = sums + (reach - t) * COLUMNS + c0;
                for (int c = 0; c < TOGETHER; c++) sum[c] += weights[t] * here[c] + weights[a->taps + t] * next[c];
            }
        }
    }
}

/* What a task computes, a band of rows × COLUMNS columns: its geometry, and the arrays of infty_enlarged. */
typedef struct {
    const float *x, *scale, *residual;
    float *out;
    int64_t height, width, channels, k, first_row, rows;
    axis vertical, horizontal;
} problem;

/* Rows `first` to `last` of image b in the columns and lanes from (column, channel) on: scale and add their sums,
   (last - first, COLUMNS). */
static void write_rows(const problem *p, int64_t b, int64_t first, int64_t last, int64_t column, int64_t channel,
                       const vec *sums) {
    const int64_t lanes = least(LANES, p->channels - channel), columns = least(COLUMNS, p->width - column);
    for (int64_t y = first; y < last; y++, sums += COLUMNS)
        for (int64_t c = 0; c < columns; c++) {
            const int64_t pixel = y * p->width + column + c, image = b * p->height * p->width;
            const float *sum = (const float *)(sums + c), factor = p->scale ? p->scale[pixel] : 1;
            const float *add = p->residual ? p->residual + (image + pixel) * p->channels + channel : 0;
            const int64_t row = b * p->rows + y - p->first_row;
            float *to = p->out + (row * p->width + column + c) * p->channels + channel;
            for (int64_t lane = 0; lane < lanes; lane++) to[lane] = factor * sum[lane] + (add ? add[lane] : 0);
        }
}

/* Add rows y to y + count of x to the sums of the rows from `base` on that lie before `end`. taps: (k, k). sums: (k'_h
   + BLOCK - 1, COLUMNS). The hardware does not foresee reads of lines that are a pixel apart. */
static void add_rows(const problem *p, int64_t b, int64_t y, int64_t count, int64_t base, int64_t end, int64_t column,
                     int64_t channel, const vec *taps, vec *sums, const scratch *s) {
    const int64_t up = p->vertical.taps / 2, left = p->horizontal.taps / 2, span = COLUMNS + 2 * left;
    const int64_t lanes = least(LANES, p->channels - channel), pitch = p->width * p->channels;
    const int inside = lanes == LANES && column >= left && column - left + span <= p->width;
    for (; count; count--, y++) {
        const float *row = p->x + (b * p->height + y) * pitch + channel, *first = row + (column - left) * p->channels;
        if (inside) {
            for (int64_t c = 0; c < span; c++) s->row[c] = *(const vec *)(first + c * p->channels);
            const int64_t ahead = least(BLOCK, p->height - 1 - y) * pitch;
            for (int64_t c = 0; c < span; c++) __builtin_prefetch(first + ahead + c * p->channels);
        } else
            copy_row(row, p->width, p->channels, lanes, column - left, span, s->row);
        filter_columns(&p->horizontal, p->k, s->row, s->filtered);
        combine(p->k, taps, s->filtered, s->combined);
        if (p->residual && y >= up)
            for (int64_t c = column; c < least(column + COLUMNS, p->width); c++)
                __builtin_prefetch(p->residual + ((b * p->height + y - up) * p->width + c) * p->channels + channel);
        const int64_t reach = y + up - base;
        spread_rows(&p->vertical, p->k, s->combined, reach, most(y + up - end + 1, 0),
                    least(reach + 1, p->vertical.taps), sums);
    }
}

/* A band of rows `start` to `end`, BLOCK rows of x and LANES channels at a time: the sums of a slice of channels stay
   in the first cache meanwhile, and x comes once from memory for all slices. */
static void task(const problem *p, int64_t b, int64_t start, int64_t end, int64_t column, const scratch *s) {
    const int64_t up = p->vertical.taps / 2, held = p->vertical.taps + BLOCK - 1, size = held * COLUMNS;
    const int64_t slices = (p->channels + LANES - 1) / LANES, last = least(end + up, p->height);
    int64_t base = start;
    memset(s->sums, 0, slices * size * sizeof(vec));
    for (int64_t y = most(start - up, 0); y < last; y += BLOCK) {
        const int64_t next = least(y + BLOCK, last), done = next == last ? end : most(next - up, base);
        for (int64_t slice = 0; slice < slices; slice++) {
            vec *sums = s->sums + slice * size;
            add_rows(p, b, y, next - y, base, end, column, slice * LANES, s->taps + slice * p->k * p->k, sums, s);
            write_rows(p, b, base, done, column, slice * LANES, sums);
            const int64_t freed = (done - base) * COLUMNS;
            memmove(sums, sums + freed, (size - freed) * sizeof(vec));
            memset(sums + size - freed, 0, freed * sizeof(vec));
        }
        base = done;
    }
}

/* x, residual: (batch, height, width, channels); kernel: (channels, k, k); scale: (height, width); out: (batch, rows,
   width, channels), the rows from first_row on. scale and residual may be null, and residual may be out.
   vertical_first, horizontal_first: (k). vertical_weights: (k, kernel_h). horizontal_weights: (k, kernel_w). work:
   (threads, share). */
void infty_enlarged(const float *x, const float *kernel, const float *scale, const float *residual, float *out,
                    int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t k, int64_t first_row,
                    int64_t rows, int64_t band, int64_t kernel_h, const int64_t *vertical_first,
                    const float *vertical_weights, int64_t kernel_w, const int64_t *horizontal_first,
                    const float *horizontal_weights, int64_t threads, float *work, int64_t share) {
    const problem p = {x, scale, residual, out, height, width, channels, k, first_row, rows,
                       {kernel_h, vertical_first, vertical_weights},
                       {kernel_w, horizontal_first, horizontal_weights}};
    const int64_t bands = (rows + band - 1) / band, tiles = (width + COLUMNS - 1) / COLUMNS;
    const int64_t span = COLUMNS + kernel_w - 1, slices = (channels + LANES - 1) / LANES;
#pragma omp parallel for num_threads(threads)
    for (int64_t thread = 0; thread < threads; thread++) {
        vec *row = (vec *)(work + thread * share), *filtered = row + span, *combined = filtered + k * COLUMNS;
        const scratch s = {row, filtered, combined, combined + k * COLUMNS, combined + k * COLUMNS + slices * k * k};
        for (int64_t channel = 0; channel < slices * LANES; channel++)
            for (int64_t tap = 0; tap < k * k; tap++)
                ((float *)(s.taps + channel / LANES * k * k + tap))[channel % LANES] =
                    channel < channels ? kernel[channel * k * k + tap] : 0;
        for (int64_t number = thread; number < batch * bands * tiles; number += threads) {
            const int64_t start = first_row + number / tiles % bands * band;
            task(&p, number / tiles / bands, start, least(start + band, first_row + rows), number % tiles * COLUMNS, &s);
        }
    }
}
