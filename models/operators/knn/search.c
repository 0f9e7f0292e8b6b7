/* The nearest present pixels of every node of a coarse grid, and the transpose of a gather: what they are is said in
   models/operators/knn/search.py and models/interpolation.py.

   Node n of the batch is node n % nodes of image n / nodes. map: (batch, pixels), the row of each present pixel, else
   -1 (infty_index_map without a margin). Tables: (nodes, length), see models/operators/knn/pixel_order.py. */

#include <stdint.h>
#include <string.h>

/* A node's row of the tables, and whether the pixel in a column is present. */
#define NODE(n)                                                                                                        \
    const int64_t row = (n) % nodes * length;                                                                          \
    const int32_t *image = map + (n) / nodes * pixels;
#define PRESENT(column) (image[ids[row + (column)]] >= 0)

/* map: (batch, pixels). ids, begins, ends: (nodes, length). before, counts: (batch * nodes), the present pixels nearer
   than the K-th (K >= 1), and these with all that share with it, `width` at most. counts[n] is 0 where the row of the
   table does not tell. */
void infty_nearest_count(const int32_t *map, const int64_t *ids, const int64_t *begins, const int64_t *ends,
                         int64_t batch, int64_t pixels, int64_t nodes, int64_t length, int64_t k,
                         int64_t width, int64_t *before, int64_t *counts) {
#pragma omp parallel for
    for (int64_t n = 0; n < batch * nodes; n++) {
        NODE(n)
        int64_t seen = 0, column = 0;
        while (column < length && seen < k) seen += PRESENT(column++);
        const int64_t kth = row + column - 1, end = ends[kth];
        before[n] = seen;
        counts[n] = 0;
        if (seen < k || end > length) continue;
        for (int64_t c = begins[kth]; c < column; c++) before[n] -= PRESENT(c);
        for (; column < end; column++) seen += PRESENT(column);
        counts[n] = seen < width ? seen : width;
    }
}

/* Entries first[n] .. first[n + 1], nearest first: pixel ids, their rows, squared distances and shares. map, ids,
   before: as above. distances: (nodes, length). first: (batch * nodes + 1). found, rows, squared, shares: (last of
   first). */
void infty_nearest_fill(const int32_t *map, const int64_t *ids, const float *distances, const int64_t *before,
                        const int64_t *first, int64_t batch, int64_t pixels, int64_t nodes, int64_t length,
                        int64_t k, int64_t *found, int64_t *rows, float *squared, float *shares) {
#pragma omp parallel for
    for (int64_t n = 0; n < batch * nodes; n++) {
        NODE(n)
        const int64_t tied = first[n] + before[n], last = first[n + 1];
        const float share = (float)(k - before[n]) / (float)(last - tied);
        int64_t entry = first[n];
        for (int64_t c = 0; entry < last; c++) { /* written first, counted if present: no branch */
            found[entry] = ids[row + c];
            rows[entry] = image[ids[row + c]];
            squared[entry] = distances[row + c];
            shares[entry] = entry < tied ? 1 : share;
            entry += PRESENT(c);
        }
    }
}

/* rows: (entries). order: (entries), the entries by the row they read, in their order where it is the same; those that
   read row r are begins[r] .. begins[r + 1] of it. begins: (sources + 1). */
void infty_transpose(const int64_t *rows, int64_t entries, int64_t sources, int64_t *order, int64_t *begins) {
    memset(begins, 0, (sources + 1) * sizeof(int64_t));
    for (int64_t e = 0; e < entries; e++) begins[rows[e] + 1]++;
    for (int64_t r = 0; r < sources; r++) begins[r + 1] += begins[r];
    for (int64_t e = 0; e < entries; e++) order[begins[rows[e]]++] = e;
    memmove(begins + 1, begins, sources * sizeof(int64_t)); /* each has moved on to where the next began */
    begins[0] = 0;
}
