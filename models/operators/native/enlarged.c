/* Depthwise convolution of a full lattice with kernels that were resampled from k × k to an enlarged extent.

   The resampled kernel is Uᵀ K V with U (k, rows of the extent) and V (k, columns) linear interpolation, two nonzeros per
   column. So each row of the input is filtered along its columns by the k rows of V, the k results are combined by K
   into k more, and these are added, weighted by U, to the rows of the output they reach: 4·extent + k² multiply-adds per
   pixel and channel instead of extent².

   A task is a band of rows × COLUMNS columns × LANES channels. All it holds in between, but for sums that are not in
   reach, stays in the first cache. Sums run in one order whatever the number of threads. */

#include <stdint.h>
#include <string.h>

/* One register of channels, at any address; TOGETHER columns share each coefficient, twice as many sums fit the file. */
#ifdef __AVX512F__
enum { LANES = 16, TOGETHER = 8 };
#else
enum { LANES = 8, TOGETHER = 4 };
#endif
enum { COLUMNS = 16 };
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));

/* U or V: weights (k, extent), of which columns first[i] to first[i + 1] are zero but in the rows i and i + 1. */
typedef struct {
    int64_t extent;
    const int64_t *first;
    const float *weights;
} axis;

/* What a thread works in: a row of x with its margins, its k filtered and k combined rows, k² taps, sums of a band. */
typedef struct {
    vec *row, *filtered, *combined, *taps, *sums;
} scratch;

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* Pixels from `start` on of a row, zero beyond its ends and beyond its channels. */
static void copy_row(const float *x, int64_t width, int64_t channels, int64_t lanes, int64_t start, int64_t count,
                     vec *restrict row) {
    memset(row, 0, count * sizeof(vec));
    const int64_t end = least(start + count, width);
    for (int64_t c = most(start, 0); c < end; c++) memcpy(row + c - start, x + c * channels, lanes * sizeof(float));
}

/* filtered[i][c] = Σ_t V[i][t] x[c + t], pixels of x being `pitch` floats apart. */
static void filter_columns(const axis *a, int64_t k, const float *restrict x, int64_t pitch, vec *restrict filtered) {
    for (int64_t c0 = 0; c0 < COLUMNS; c0 += TOGETHER) {
        vec here[TOGETHER] = {0}, next[TOGETHER] = {0};
        for (int64_t i = 0; i < k; i++) {
            const float *weights = a->weights + i * a->extent;
            const int64_t end = i + 1 < k ? a->first[i + 1] : 0;
            for (int64_t t = a->first[i]; t < end; t++)
                for (int c = 0; c < TOGETHER; c++) {
                    const vec value = *(const vec *)(x + (c0 + t + c) * pitch);
                    here[c] += weights[t] * value;
                    next[c] += weights[a->extent + t] * value;
                }
            for (int c = 0; c < TOGETHER; c++) {
                filtered[i * COLUMNS + c0 + c] = here[c];
                here[c] = next[c];
                next[c] = (vec){0};
            }
        }
    }
}

/* combined[i][c] = Σ_j K[i][j] filtered[j][c]. */
static void combine(int64_t k, const vec *restrict taps, const vec *restrict filtered, vec *restrict combined) {
    for (int64_t i = 0; i < k; i++)
        for (int64_t c0 = 0; c0 < COLUMNS; c0 += TOGETHER) {
            vec sum[TOGETHER] = {0};
            for (int64_t j = 0; j < k; j++)
                for (int c = 0; c < TOGETHER; c++) sum[c] += taps[i * k + j] * filtered[j * COLUMNS + c0 + c];
            for (int c = 0; c < TOGETHER; c++) combined[i * COLUMNS + c0 + c] = sum[c];
        }
}

/* sums[reach - t][c] += Σ_i U[i][t] combined[i][c] for the taps `from` to `to`. */
static void spread_rows(const axis *a, int64_t k, const vec *restrict combined, int64_t reach, int64_t from, int64_t to,
                        vec *restrict sums) {
    for (int64_t i = 0; i + 1 < k; i++) {
        const float *weights = a->weights + i * a->extent;
        const int64_t start = most(a->first[i], from), end = least(a->first[i + 1], to);
        for (int64_t c0 = 0; c0 < COLUMNS; c0 += TOGETHER) {
            const vec *here = combined + i * COLUMNS + c0, *next = here + COLUMNS;
            for (int64_t t = start; t < end; t++) {
                vec *restrict sum = sums + (reach - t) * COLUMNS + c0;
                for (int c = 0; c < TOGETHER; c++) sum[c] += weights[t] * here[c] + weights[a->extent + t] * next[c];
            }
        }
    }
}

/* x, residual: (batch, height, width, channels); kernel: (channels, k, k); scale: (height, width); out: (batch, rows,
   width, channels), the rows from first_row on. scale and residual may be null. work: `share` floats for each thread. */
void infty_enlarged(const float *x, const float *kernel, const float *scale, const float *residual, float *out,
                    int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t k, int64_t first_row,
                    int64_t rows, int64_t band, int64_t vertical_extent, const int64_t *vertical_first,
                    const float *vertical_weights, int64_t horizontal_extent, const int64_t *horizontal_first,
                    const float *horizontal_weights, int64_t threads, float *work, int64_t share) {
    const axis vertical = {vertical_extent, vertical_first, vertical_weights};
    const axis horizontal = {horizontal_extent, horizontal_first, horizontal_weights};
    const int64_t up = vertical_extent / 2, left = horizontal_extent / 2, span = COLUMNS + 2 * left;
    const int64_t bands = (rows + band - 1) / band, tiles = (width + COLUMNS - 1) / COLUMNS;
    const int64_t slices = (channels + LANES - 1) / LANES, tasks = batch * bands * tiles * slices;
#pragma omp parallel for num_threads(threads)
    for (int64_t thread = 0; thread < threads; thread++) {
        vec *mine = (vec *)(work + thread * share);
        const scratch s = {mine, mine + span, mine + span + k * COLUMNS, mine + span + 2 * k * COLUMNS,
                           mine + span + 2 * k * COLUMNS + k * k};
        for (int64_t task = thread; task < tasks; task += threads) {
            const int64_t channel = task % slices * LANES, lanes = least(LANES, channels - channel);
            const int64_t column = task / slices % tiles * COLUMNS, columns = least(COLUMNS, width - column);
            const int64_t start = first_row + task / slices / tiles % bands * band;
            const int64_t end = least(start + band, first_row + rows), b = task / slices / tiles / bands;
            for (int64_t lane = 0; lane < LANES; lane++)
                for (int64_t tap = 0; tap < k * k; tap++)
                    ((float *)(s.taps + tap))[lane] = lane < lanes ? kernel[(channel + lane) * k * k + tap] : 0;
            memset(s.sums, 0, (end - start) * COLUMNS * sizeof(vec));

            const int inside = lanes == LANES && column >= left && column - left + span <= width;
            for (int64_t y = most(start - up, 0); y < least(end + up, height); y++) {
                const float *row = x + (b * height + y) * width * channels + channel;
                if (inside && y + 1 < height) /* the hardware does not foresee one line per pixel */
                    for (int64_t c = 0; c < span; c++)
                        __builtin_prefetch(row + (width + column - left + c) * channels);
                if (!inside) copy_row(row, width, channels, lanes, column - left, span, s.row);
                filter_columns(&horizontal, k, inside ? row + (column - left) * channels : (float *)s.row,
                               inside ? channels : LANES, s.filtered);
                combine(k, s.taps, s.filtered, s.combined);
                const int64_t reach = y + up - start;
                spread_rows(&vertical, k, s.combined, reach, most(reach - (end - start) + 1, 0),
                            least(reach + 1, vertical_extent), s.sums);
            }

            for (int64_t y = start; y < end; y++)
                for (int64_t c = column; c < column + columns; c++) {
                    const float *sum = (float *)(s.sums + (y - start) * COLUMNS + c - column);
                    const float factor = scale ? scale[y * width + c] : 1;
                    const float *add = residual ? residual + ((b * height + y) * width + c) * channels + channel : 0;
                    float *to = out + ((b * rows + y - first_row) * width + c) * channels + channel;
                    for (int64_t lane = 0; lane < lanes; lane++) to[lane] = factor * sum[lane] + (add ? add[lane] : 0);
                }
        }
    }
}
