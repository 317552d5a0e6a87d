// The end of a classifier for every client of a stack, forward and backward: [ReLU,] a linear layer and mean
// cross-entropy. A client's samples stay in the core's cache from the first line to the last.
//
// Letters: C clients, B samples, I inputs and K classes of the layer. `real` and `exponential`: see fedsim/native.py.
#include <vector>

#if defined(__AVX512F__)
#define BYTES 64
#define COLUMNS 4  // vectors side by side in one tile
#elif defined(__AVX__)
#define BYTES 32
#define COLUMNS 2
#else
#define BYTES 16
#define COLUMNS 2
#endif
#define ROWS 6  // of a tile: its ROWS * COLUMNS sums fit the processor's registers

constexpr long LANES = BYTES / sizeof(real);
typedef real vec __attribute__((vector_size(BYTES), aligned(sizeof(real)), may_alias));

static inline vec& at(real* p) { return *(vec*)p; }
static inline const vec& at(const real* p) { return *(const vec*)p; }

// A matrix whose entry (r, j) is entry[r * down + j * across].
struct Matrix {
    const real* entry;
    long down, across;
    Matrix from(long r) const { return {entry + r * down, down, across}; }
};

// out[r, 0..] = sum_j a(r, j) x[j, 0..] for R rows and W vectors of columns.
template <int R, int W>
static inline void tile(Matrix a, long terms, const real* x, long x_row, real* out, long out_row) {
    vec sum[R][W];
    for (int r = 0; r < R; ++r)
        for (int w = 0; w < W; ++w) sum[r][w] = vec{};
    for (long j = 0; j < terms; ++j)
        for (int w = 0; w < W; ++w) {
            const vec line = at(x + j * x_row + w * LANES);
            for (int r = 0; r < R; ++r) sum[r][w] += a.entry[r * a.down + j * a.across] * line;
        }
    for (int r = 0; r < R; ++r)
        for (int w = 0; w < W; ++w) at(out + r * out_row + w * LANES) = sum[r][w];
}

template <int W>
static void stripe(long rows, Matrix a, long terms, const real* x, long x_row, real* out, long out_row) {
    const long tiles = (rows + ROWS - 1) / ROWS, most = tiles ? (rows + tiles - 1) / tiles : 0;
    for (; rows > 0; rows -= most, a = a.from(most), out += most * out_row) {
        switch (rows < most ? rows : most) {
            case 1: tile<1, W>(a, terms, x, x_row, out, out_row); break;
            case 2: tile<2, W>(a, terms, x, x_row, out, out_row); break;
            case 3: tile<3, W>(a, terms, x, x_row, out, out_row); break;
            case 4: tile<4, W>(a, terms, x, x_row, out, out_row); break;
            case 5: tile<5, W>(a, terms, x, x_row, out, out_row); break;
            default: tile<ROWS, W>(a, terms, x, x_row, out, out_row);
        }
    }
}

// out [rows, columns] = a [rows, terms] x [terms, columns], where columns >= LANES.
static void product(long rows, long columns, Matrix a, long terms, const real* x, long x_row, real* out,
                    long out_row) {
    long c = 0;
    for (; c + COLUMNS * LANES <= columns; c += COLUMNS * LANES)
        stripe<COLUMNS>(rows, a, terms, x + c, x_row, out + c, out_row);
    for (; c + LANES <= columns; c += LANES) stripe<1>(rows, a, terms, x + c, x_row, out + c, out_row);
    c = columns - LANES;  // the last vector begins where it fits: some columns are found twice, alike
    if (columns % LANES) stripe<1>(rows, a, terms, x + c, x_row, out + c, out_row);
}

// Logits z [K, B] become the gradient of the mean loss by them; returns that loss. share [B] is what each sample counts
// in the mean, or null for equal ones; top and sum [B] are room.
static real cross_entropy(long B, long K, real* __restrict z, const long* target, const real* share,
                          real* __restrict top, real* __restrict sum) {
    double loss = 0;
    const auto weight = [=](long b) { return share ? share[b] : real(1) / B; };
    for (long b = 0; b < B; ++b) {
        loss -= (double)weight(b) * z[target[b] * B + b];
        top[b] = z[b];
        sum[b] = 0;
    }
    for (long k = 1; k < K; ++k)
        for (long b = 0; b < B; ++b) top[b] = z[k * B + b] > top[b] ? z[k * B + b] : top[b];
    for (long k = 0; k < K; ++k)
        for (long b = 0; b < B; ++b) sum[b] += z[k * B + b] = exponential(z[k * B + b] - top[b]);
    for (long b = 0; b < B; ++b) {
        loss += weight(b) * ((double)log(sum[b]) + top[b]);
        sum[b] = weight(b) / sum[b];
    }
    for (long k = 0; k < K; ++k)
        for (long b = 0; b < B; ++b) z[k * B + b] *= sum[b];
    for (long b = 0; b < B; ++b) z[target[b] * B + b] -= weight(b);
    return loss;
}

struct Client {
    real* h;               // [B, I]: the layer's inputs, or what ReLU makes them of; then dh takes their place
    long h_row;
    const real *w, *bias;  // [K, I], [K] or null
    const long* target;    // [B]
    const real* share;     // [B] of each sample in the mean, or null for equal ones
    real *loss, *dw, *db;  // [1], [K, I], [K]
    real* dh;              // [B, I] without gaps, or null where nobody wants it or h takes it
};

static void work(const Client& c, long B, long I, long K, bool relu) {
    const long lanes = (K + LANES - 1) / LANES * LANES;
    std::vector<real> room(I * lanes + B * lanes + (K + 2) * B + ROWS * I);
    real *wt = room.data(), *scores = wt + I * lanes, *z = scores + B * lanes, *top = z + K * B, *sum = top + B,
         *part = sum + B;
    for (long k = 0; k < K; ++k)
        for (long i = 0; i < I; ++i) wt[i * lanes + k] = c.w[k * I + i];
    for (long b = 0; relu && b < B; ++b)
        for (long i = 0; i < I; ++i) c.h[b * c.h_row + i] = c.h[b * c.h_row + i] < 0 ? 0 : c.h[b * c.h_row + i];

    product(B, lanes, {c.h, c.h_row, 1}, I, wt, lanes, scores, lanes);
    for (long b = 0; b < B; ++b)
        for (long k = 0; k < K; ++k) z[k * B + b] = scores[b * lanes + k] + (c.bias ? c.bias[k] : 0);
    *c.loss = cross_entropy(B, K, z, c.target, c.share, top, sum);

    product(K, I, {z, B, 1}, B, c.h, c.h_row, c.dw, I);
    for (long k = 0; k < K; ++k) c.db[k] = 0;
    for (long b = 0; b < B; ++b)
        for (long k = 0; k < K; ++k) c.db[k] += z[k * B + b];
    if (c.dh) product(B, I, {z, 1, B}, K, c.w, I, c.dh, I);
    for (long b = 0; relu && b < B; b += ROWS) {
        const long rows = B - b < ROWS ? B - b : ROWS;
        product(rows, I, {z + b, 1, B}, K, c.w, I, part, I);
        for (long r = 0; r < rows; ++r) {
            real* h = c.h + (b + r) * c.h_row;
            for (long i = 0; i < I; ++i) h[i] = h[i] <= 0 ? 0 : part[r * I + i];
        }
    }
}

// Arrays of all clients; `..._client` is how far one client's part is from the next one's. Returns -1, or the first
// c * B + b whose target is no class: then nothing was done.
extern "C" long last_layer(long C, long B, long I, long K, real* h, long h_client, long h_row, const real* w,
                           const real* bias, long w_client, const long* target, long target_client, const real* share,
                           real* loss, real* dw, real* db, real* dh, int relu, int threads) {
    for (long c = 0; c < C; ++c)
        for (long b = 0; b < B; ++b)
            if ((unsigned long)target[c * target_client + b] >= (unsigned long)K) return c * B + b;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long c = 0; c < C; ++c)
        work({h + c * h_client, h_row, w + c * w_client, bias ? bias + c * w_client : bias, target + c * target_client,
              share ? share + c * B : share, loss + c, dw + c * K * I, db + c * K, dh ? dh + c * B * I : dh},
             B, I, K, relu);
    return -1;
}
