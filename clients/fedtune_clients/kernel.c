/* Local SGD of one client, and the measurement of a model on examples, for networks of a few kinds of layers.

   fedtune_clients/compiled.py makes the table of layers, calls the functions at the end of this file through ctypes,
   and owns all memory. The file includes nothing of Python or torch; torch lends its matrix product, the sgemm of BLAS.

   The algorithm is ClientUpdate of McMahan et al. (2017), as in fedtune_clients/local_sgd.py. For each batch:
       forward     the outputs of each layer, from the first layer to the last
       output_gradient    the gradient of the mean loss with respect to the outputs of the last layer
       backward    that gradient with respect to each layer's inputs, from the last layer to the first; a layer's
                   weights are stepped as soon as its inputs' gradient is known

   Matrices are stored row by row. A batch of m examples is a matrix of m rows. A batch of m sequences of T tokens is a
   matrix of T * m rows: first the m rows of the first token, then the m rows of the second, and so on.

   Vectors have 16 lanes, whatever the processor: the compiler splits them. So the same numbers are added in the same
   order everywhere. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef _WIN32
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif
#define INLINE static inline __attribute__((always_inline))
#define EACH(i, count) _Pragma("GCC unroll 16") for (int i = 0; i < count; i++)

typedef int64_t num;

enum { MAX_LAYERS = 64 };
enum { FEW_ROWS = 128 }; /* sgemm adds a sum of at most so many rows to its target at once */
enum { NARROW = 16 };    /* a product with at most so many columns is faster by own loops than by sgemm */

enum kind { LINEAR, RELU, TANH, SIGMOID, DROPOUT, EMBEDDING, LSTM, LAST_STEP };
enum stored { BYTES, FLOATS, WHOLE_NUMBERS }; /* uint8, float32, int64 */
enum objective { CLASSIFICATION, REGRESSION };
enum status { DONE, BAD_LAYERS, BAD_MEMORY, BAD_ROW, BAD_LABEL, BAD_TOKEN };

typedef struct {
    num kind;
    num in, out; /* numbers in a row of the inputs and of the outputs; EMBEDDING: tokens that there are, their width */
    num weights[4]; /* where each tensor begins in the flat weights, -1 if there is none.
                       LINEAR: weight (out, in), bias. EMBEDDING: weight (in, out).
                       LSTM: weight_ih (4 out, in), weight_hh (4 out, out), bias_ih, bias_hh */
} Layer;

typedef void Sgemm(const char *, const char *, const int *, const int *, const int *, const float *, const float *,
                   const int *, const float *, const int *, const float *, float *, const int *);

typedef struct {
    const Layer *layers;
    num num_layers;
    float *weights; /* they are trained in place */
    num num_weights;
    /* the examples */
    num num_examples;
    const void *x;
    num x_stored;
    num x_stride;  /* bytes from an example to the next one */
    num width;     /* numbers, or tokens, of an example */
    double scale;  /* x is multiplied by it, if it is not tokens */
    const void *y; /* int64 classes, or float32 targets: as many for each example as the model has outputs */
    num objective;
    /* which examples, in which order, and how many at a time */
    const num *rows;
    num num_rows;
    num batch_size;
    /* training: v <- momentum v + gradient + (weight_decay + proximal_mu) w - proximal_mu sent, w <- w - rate v */
    double rate, momentum, weight_decay, proximal_mu;
    float *velocity;   /* v; NULL without momentum */
    const float *sent; /* the weights that the client was sent; NULL without the proximal term */
    const float *kept; /* for each batch and each of its DROPOUT layers, 1 for what is kept and 0 for what is not;
                          NULL without dropout */
    double dropout;
    /* measuring: a loss and an error for each row */
    float *losses, *errors;
    Sgemm *sgemm;
    float *memory; /* to work in; `kernel_memory` says how much */
    num memory_size;
} Job;

/* ---------------------------------------------------------------------------------------------- vectors of 16 lanes */

typedef float Floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(64)));

INLINE Floats load(const float *from) { return *(const Floats *)from; }
INLINE void store(float *to, Floats values) { *(Floats *)to = values; }
INLINE Floats all(float x) { return (Floats){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

/* The first `count` lanes; the others are 0. */
INLINE Floats load_some(const float *from, num count) {
    if (count >= 16) return load(from);
    float lanes[16] = {0};
    for (num l = 0; l < count; l++) lanes[l] = from[l];
    return load(lanes);
}
INLINE void store_some(float *to, Floats values, num count) {
    if (count >= 16) {
        store(to, values);
        return;
    }
    for (num l = 0; l < count; l++) to[l] = values[l];
}

INLINE float sum(Floats v) {
    float s[8];
    for (int l = 0; l < 8; l++) s[l] = v[l] + v[l + 8];
    return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}

INLINE Floats choose(Ints condition, Floats yes, Floats no) {
    return (Floats)(((Ints)yes & condition) | ((Ints)no & ~condition));
}

/* e^x within 2 units in the last place, for x between -87 and 88; others are taken as the nearer of the two. NaN stays
   NaN. x = n log 2 + r, and e^r is a polynomial (Cephes, expf). */
INLINE Floats exponential(Floats x) {
    Ints is_number = (Ints)(x == x);
    Floats in_range = choose((Ints)(x < all(-87)), all(-87), choose((Ints)(x > all(88)), all(88), x));
    Floats scaled = in_range * all(1.44269504f);
    scaled = choose(is_number, scaled + choose((Ints)(scaled >= all(0)), all(.5f), all(-.5f)), all(0));
    Ints n = __builtin_convertvector(scaled, Ints);
    Floats whole = __builtin_convertvector(n, Floats);
    Floats r = (in_range - whole * all(0.693359375f)) + whole * all(2.12194440e-4f);
    Floats p = all(1.9875691500e-4f);
    p = p * r + all(1.3981999507e-3f);
    p = p * r + all(8.3334519073e-3f);
    p = p * r + all(4.1665795894e-2f);
    p = p * r + all(1.6666665459e-1f);
    p = p * r + all(5.0000001201e-1f);
    p = p * (r * r) + r + all(1);
    return p * (Floats)((n + 127) << 23);
}

INLINE Floats sigmoid(Floats x) { return all(1) / (all(1) + exponential(-x)); }

/* Near 0 a polynomial (Cephes, tanhf), since 1 - 2 / (e^2x + 1) would lose the digits of a small result. */
INLINE Floats hyperbolic_tangent(Floats x) {
    Floats square = x * x;
    Floats p = all(-5.70498872745e-3f);
    p = p * square + all(2.06390887954e-2f);
    p = p * square + all(-5.37397155531e-2f);
    p = p * square + all(1.33314422036e-1f);
    p = p * square + all(-3.33332819422e-1f);
    Floats near = p * square * x + x;
    Floats far = all(1) - all(2) / (exponential(x + x) + all(1));
    return choose((Ints)(square < all(.390625f)), near, far);
}

/* -------------------------------------------------------------------------------------------------- matrix products */

/* c(m, n) = beta c + alpha a b, where a(m, k) is given transposed if `ta`, and b(k, n) if `tb`. */
static void product(Sgemm *sgemm, int ta, int tb, num m, num n, num k, float alpha, const float *a, const float *b,
                    float beta, float *c) {
    /* sgemm stores matrices column by column: it computes the transposed product, b first. */
    int rows = (int)m, columns = (int)n, inner = (int)k, lda = ta ? rows : inner, ldb = tb ? inner : columns;
    sgemm(tb ? "T" : "N", ta ? "T" : "N", &columns, &rows, &inner, &alpha, b, &ldb, a, &lda, &beta, c, &columns);
}

/* y(R, C) += x(R, k) w(C, k)^T, with rows of y `ldy` apart */
INLINE void dot_tile(const float *x, const float *w, float *y, num k, num ldy, const int R, const int C) {
    Floats sums[4][4];
    EACH(i, R)
        EACH(j, C) sums[i][j] = all(0);
    num l = 0;
    for (; l + 16 <= k; l += 16) {
        Floats b[4];
        EACH(j, C) b[j] = load(w + j * k + l);
        EACH(i, R) {
            Floats a = load(x + i * k + l);
            EACH(j, C) sums[i][j] += a * b[j];
        }
    }
    EACH(i, R)
        EACH(j, C) {
            float s = sum(sums[i][j]);
            for (num rest = l; rest < k; rest++) s += x[i * k + rest] * w[j * k + rest];
            y[i * ldy + j] += s;
        }
}

/* y(m, n) += x(m, k) w(n, k)^T for a small n */
static void narrow_product(const float *x, const float *w, float *y, num m, num n, num k) {
    for (num j = 0; j < n; j += 4)
        for (num i = 0; i < m; i += 4) {
            const num c = n - j < 4 ? n - j : 4, r = m - i < 4 ? m - i : 4;
            const float *xi = x + i * k, *wj = w + j * k;
            float *yij = y + i * n + j;
            if (r == 4 && c == 4)
                dot_tile(xi, wj, yij, k, n, 4, 4);
            else if (r == 4 && c == 2)
                dot_tile(xi, wj, yij, k, n, 4, 2);
            else
                for (num a = 0; a < r; a++)
                    for (num b = 0; b < c; b++) dot_tile(xi + a * k, wj + b * k, yij + a * n + b, k, n, 1, 1);
        }
}

/* c(R, 16 V) = beta c + a^T b, where a(m, lda) has R columns from its pointer on, and b(m, n) */
INLINE void outer_tile(const float *a, num lda, const float *b, num n, float beta, float *c, num m, const int R,
                       const int V) {
    Floats sums[4][4];
    EACH(i, R)
        EACH(j, V) sums[i][j] = load(c + i * n + 16 * j) * all(beta);
    for (num p = 0; p < m; p++) {
        Floats x[4];
        EACH(j, V) x[j] = load(b + p * n + 16 * j);
        EACH(i, R) {
            Floats s = all(a[p * lda + i]);
            EACH(j, V) sums[i][j] += s * x[j];
        }
    }
    EACH(i, R)
        EACH(j, V) store(c + i * n + 16 * j, sums[i][j]);
}

/* c(k, n) = beta c + a(m, k)^T b(m, n) for a small k */
static void narrow_outer(const float *a, const float *b, float beta, float *c, num m, num n, num k) {
    for (num i = 0; i < k; i += 4) {
        const num r = k - i < 4 ? k - i : 4;
        num l = 0;
        if (r == 4) {
            for (; l + 64 <= n; l += 64) outer_tile(a + i, k, b + l, n, beta, c + i * n + l, m, 4, 4);
            for (; l + 16 <= n; l += 16) outer_tile(a + i, k, b + l, n, beta, c + i * n + l, m, 4, 1);
        } else if (r == 2) {
            for (; l + 64 <= n; l += 64) outer_tile(a + i, k, b + l, n, beta, c + i * n + l, m, 2, 4);
            for (; l + 16 <= n; l += 16) outer_tile(a + i, k, b + l, n, beta, c + i * n + l, m, 2, 1);
        } else {
            for (; l + 16 <= n; l += 16)
                for (num q = i; q < i + r; q++) outer_tile(a + q, k, b + l, n, beta, c + q * n + l, m, 1, 1);
        }
        for (; l < n; l++)
            for (num q = i; q < i + r; q++) {
                float s = beta * c[q * n + l];
                for (num p = 0; p < m; p++) s += a[p * k + q] * b[p * n + l];
                c[q * n + l] = s;
            }
    }
}

/* Copies a matrix b(k, n) into panels of 16 columns: each panel (k, 16) is of one piece, and the last one is filled up
   with zeros. A matrix that multiplies many small ones is copied once. `row` and `column` are the steps within b. */
static void pack(const float *b, num k, num n, num row, num column, float *panels) {
    for (num j = 0; j < n; j += 16, panels += 16 * k)
        for (num p = 0; p < k; p++)
            for (num l = 0; l < 16; l++) panels[16 * p + l] = j + l < n ? b[p * row + (j + l) * column] : 0;
}
static num packed_size(num k, num n) { return (n + 15) / 16 * 16 * k; }

/* c(R, 16) = a(R, k) panel(k, 16), added to c if `adds` */
INLINE void panel_tile(const float *a, num k, const float *panel, int adds, float *c, num ldc, num columns,
                       const int R) {
    Floats sums[6];
    EACH(i, R) sums[i] = adds ? load_some(c + i * ldc, columns) : all(0);
    for (num p = 0; p < k; p++) {
        Floats b = load(panel + 16 * p);
        EACH(i, R) sums[i] += all(a[i * k + p]) * b;
    }
    EACH(i, R) store_some(c + i * ldc, sums[i], columns);
}

/* c(m, n) = a(m, k) b(k, n), added to c if `adds`; `panels` is b as from `pack` */
static void packed_product(const float *a, num m, num k, const float *panels, num n, int adds, float *c) {
    const num blocks = (m + 5) / 6, most = (m + blocks - 1) / blocks; /* rows at a time: six tiles fill the registers */
    for (num j = 0; j < n; j += 16, panels += 16 * k)
        for (num i = 0; i < m; i += most) {
            const num rows = m - i < most ? m - i : most;
            const float *ai = a + i * k;
            float *cij = c + i * n + j;
            switch (rows) {
            case 6: panel_tile(ai, k, panels, adds, cij, n, n - j, 6); break;
            case 5: panel_tile(ai, k, panels, adds, cij, n, n - j, 5); break;
            case 4: panel_tile(ai, k, panels, adds, cij, n, n - j, 4); break;
            case 3: panel_tile(ai, k, panels, adds, cij, n, n - j, 3); break;
            case 2: panel_tile(ai, k, panels, adds, cij, n, n - j, 2); break;
            default: panel_tile(ai, k, panels, adds, cij, n, n - j, 1);
            }
        }
}

/* -------------------------------------------------------------------------------------------- the memory to work in */

typedef struct {
    num rows;           /* in the outputs: of a batch, or T times as many */
    float *outputs;     /* (rows, out) */
    float *gates;       /* LSTM: (T m, 4 out): i, f, g and o, then the gradients with respect to them */
    float *cells;       /* LSTM: (T m, out) */
    float *cell_tanh;   /* LSTM: (T m, out) */
    float *packed;      /* LSTM: weight_hh^T (out, 4 out), then weight_hh (4 out, out), as from `pack` */
    float *bias;        /* LSTM: bias_ih + bias_hh (4 out) */
    float *table;       /* LSTM after EMBEDDING: what each different token adds to the gates (token, 4 out) */
    float *chosen;      /* EMBEDDING: the vectors of the different tokens (token, out) */
    float *by_chosen;   /* EMBEDDING: the gradient with respect to them */
    int32_t *place;     /* EMBEDDING: where each token is among the different tokens (in), -1 if nowhere */
    int32_t *different; /* EMBEDDING: the different tokens */
    num num_different;
    int32_t *tokens;   /* EMBEDDING: the place of the token of each row (T m) */
    const float *kept; /* DROPOUT: of this batch */
} Place;

typedef struct {
    Place places[MAX_LAYERS];
    float *inputs;   /* (m, width), if they are not tokens */
    float *gradient; /* with respect to a layer's outputs, (rows, out) */
    float *spare;    /* the same, of the layer before */
    float *by_state; /* LSTM: the gradients with respect to a state, (m, out), */
    float *by_cell;  /* and with respect to a cell */
    float *sums;     /* the gradient with respect to a weight */
} Work;

/* Memory for `count` floats: its beginning is a multiple of 64 bytes from the beginning of all. */
static float *take(const Job *job, num *taken, num count) {
    float *memory = job->memory ? job->memory + *taken : NULL;
    *taken += (count + 15) / 16 * 16;
    return memory;
}

INLINE num larger(num a, num b) { return a > b ? a : b; }
INLINE num smaller(num a, num b) { return a < b ? a : b; }
/* Whether a layer's outputs take the place of its inputs: nobody needs the outputs of a LINEAR layer later. */
INLINE int works_in_place(const Job *job, num l) {
    const num kind = job->layers[l].kind;
    if (kind == DROPOUT) return job->kept == NULL;
    return (kind == RELU || kind == TANH || kind == SIGMOID) && l > 0 && job->layers[l - 1].kind == LINEAR;
}

/* Lays out the memory for batches of `m` examples. Returns how many floats it takes. */
static num lay_out(const Job *job, num m, Work *work) {
    num taken = 0, rows = m, widest = 0, widest_state = 0, largest = 0;
    work->inputs = job->layers[0].kind == EMBEDDING ? NULL : take(job, &taken, m * job->width);
    for (num l = 0; l < job->num_layers; l++) {
        const Layer *layer = &job->layers[l];
        Place *place = &work->places[l];
        memset(place, 0, sizeof *place);
        if (layer->kind == EMBEDDING) {
            rows = m * job->width;
            const num most = smaller(layer->in, rows);
            place->tokens = (int32_t *)take(job, &taken, rows);
            place->place = (int32_t *)take(job, &taken, layer->in);
            place->different = (int32_t *)take(job, &taken, most);
            place->chosen = take(job, &taken, most * layer->out);
            place->by_chosen = take(job, &taken, most * layer->out);
        }
        if (layer->kind == LSTM) {
            place->gates = take(job, &taken, rows * 4 * layer->out);
            place->cells = take(job, &taken, rows * layer->out);
            place->cell_tanh = take(job, &taken, rows * layer->out);
            place->packed = take(
                job, &taken, larger(packed_size(layer->out, 4 * layer->out), packed_size(4 * layer->out, layer->out)));
            place->bias = take(job, &taken, 4 * layer->out);
            if (job->layers[l - 1].kind == EMBEDDING)
                place->table = take(job, &taken, smaller(job->layers[l - 1].in, rows) * 4 * layer->out);
            widest_state = larger(widest_state, m * layer->out);
            largest = larger(largest, 4 * layer->out * larger(layer->in, layer->out));
        }
        if (layer->kind == LINEAR && rows > FEW_ROWS) largest = larger(largest, layer->in * layer->out);
        float *inputs = l == 0 ? work->inputs : work->places[l - 1].outputs;
        if (layer->kind == LAST_STEP) {
            place->outputs = inputs ? inputs + (rows - m) * layer->out : NULL;
            rows = m;
        } else if (works_in_place(job, l))
            place->outputs = inputs;
        else if (layer->kind != EMBEDDING) /* the LSTM after it reads the different tokens */
            place->outputs = take(job, &taken, rows * layer->out);
        place->rows = rows;
        widest = larger(widest, rows * larger(layer->in, layer->out));
    }
    work->gradient = take(job, &taken, widest);
    work->spare = take(job, &taken, widest);
    work->by_state = take(job, &taken, widest_state);
    work->by_cell = take(job, &taken, widest_state);
    work->sums = take(job, &taken, largest);
    return taken;
}

/* ----------------------------------------------------------------------------------------------------------- checks */

static int is_inside(const Job *job, num begin, num size) {
    return begin >= 0 && size >= 0 && begin <= job->num_weights - size;
}

static num largest_batch(const Job *job) { return smaller(job->batch_size, larger(job->num_rows, 1)); }

/* Whether the layers fit each other, the examples and the weights. */
static int check_layers(const Job *job) {
    if (job->num_layers < 1 || job->num_layers > MAX_LAYERS || job->batch_size < 1) return 0;
    if (job->width < 1 || job->width > INT32_MAX / largest_batch(job)) return 0; /* sgemm counts rows by int */
    num width = job->width;
    int is_sequence = 0;
    for (num l = 0; l < job->num_layers; l++) {
        const Layer *layer = &job->layers[l];
        const num in = layer->in, out = layer->out, *at = layer->weights;
        const int is_fresh = l == 0 || (job->layers[l - 1].kind != EMBEDDING);
        if (in < 1 || out < 1 || in > INT32_MAX / 4 || out > INT32_MAX / 4) return 0;
        switch (layer->kind) {
        case LINEAR:
            if (is_sequence || in != width || !is_inside(job, at[0], in * out) ||
                (at[1] != -1 && !is_inside(job, at[1], out)))
                return 0;
            break;
        case RELU:
        case TANH:
        case SIGMOID:
            if (is_sequence || in != width || out != width) return 0;
            break;
        case DROPOUT:
            if (in != width || out != width || !is_fresh) return 0;
            break;
        case EMBEDDING: /* an LSTM follows */
            if (l > 0 || !is_inside(job, at[0], in * out) || job->num_layers < 2 || job->layers[1].kind != LSTM)
                return 0;
            is_sequence = 1;
            break;
        case LSTM:
            if (!is_sequence || in != width || !is_inside(job, at[0], 4 * in * out) ||
                !is_inside(job, at[1], 4 * out * out) || !is_inside(job, at[2], 4 * out) ||
                !is_inside(job, at[3], 4 * out))
                return 0;
            break;
        case LAST_STEP: /* of an LSTM */
            if (!is_sequence || in != width || out != width || job->layers[l - 1].kind != LSTM) return 0;
            is_sequence = 0;
            break;
        default: return 0;
        }
        width = out;
    }
    const num wide = job->layers[0].kind == EMBEDDING ? WHOLE_NUMBERS : FLOATS;
    if (job->objective != CLASSIFICATION && job->objective != REGRESSION) return 0;
    return !is_sequence && (job->x_stored == BYTES || job->x_stored == wide);
}

/* ---------------------------------------------------------------------------------------------------------- forward */

static const void *example(const Job *job, num row) { return (const char *)job->x + row * job->x_stride; }

static enum status check_rows(const Job *job) {
    const num num_outputs = job->layers[job->num_layers - 1].out;
    for (num i = 0; i < job->num_rows; i++) {
        const num row = job->rows[i];
        if (row < 0 || row >= job->num_examples) return BAD_ROW;
        if (job->objective != CLASSIFICATION) continue;
        const num label = ((const int64_t *)job->y)[row];
        if (label < 0 || label >= num_outputs) return BAD_LABEL;
    }
    return DONE;
}

static void read_inputs(const Job *job, const num *rows, num m, float *inputs) {
    const float scale = (float)job->scale;
    for (num i = 0; i < m; i++, inputs += job->width) {
        if (job->x_stored == BYTES) {
            const uint8_t *bytes = example(job, rows[i]);
            for (num l = 0; l < job->width; l++) inputs[l] = bytes[l] * scale;
        } else {
            const float *floats = example(job, rows[i]);
            for (num l = 0; l < job->width; l++) inputs[l] = floats[l] * scale;
        }
    }
}

/* Finds the different tokens of a batch, and the place of each row's token among them. */
static enum status read_tokens(const Job *job, const num *rows, num m, Place *place) {
    const Layer *layer = &job->layers[0];
    for (num token = 0; token < layer->in; token++) place->place[token] = -1;
    place->num_different = 0;
    for (num i = 0; i < m; i++) {
        const void *tokens = example(job, rows[i]);
        for (num t = 0; t < job->width; t++) {
            const num token = job->x_stored == BYTES ? ((const uint8_t *)tokens)[t] : ((const int64_t *)tokens)[t];
            if (token < 0 || token >= layer->in) return BAD_TOKEN;
            if (place->place[token] < 0) {
                place->different[place->num_different] = (int32_t)token;
                place->place[token] = (int32_t)place->num_different++;
            }
            place->tokens[t * m + i] = place->place[token];
        }
    }
    const float *vectors = job->weights + layer->weights[0];
    for (num d = 0; d < place->num_different; d++)
        memcpy(place->chosen + d * layer->out, vectors + place->different[d] * layer->out,
               (size_t)layer->out * sizeof(float));
    return DONE;
}

static void linear_forward(const Job *job, const Layer *layer, num rows, const float *inputs, float *outputs) {
    const float *weight = job->weights + layer->weights[0], *bias = job->weights + layer->weights[1];
    const size_t size = (size_t)layer->out * sizeof(float);
    for (num i = 0; i < rows; i++) {
        if (layer->weights[1] >= 0)
            memcpy(outputs + i * layer->out, bias, size);
        else
            memset(outputs + i * layer->out, 0, size);
    }
    if (layer->out <= NARROW)
        narrow_product(inputs, weight, outputs, rows, layer->out, layer->in);
    else
        product(job->sgemm, 0, 1, rows, layer->out, layer->in, 1, inputs, weight, 1, outputs);
}

static void activate(num kind, const float *inputs, float *outputs, num count) {
    if (kind == RELU)
        for (num i = 0; i < count; i++) outputs[i] = inputs[i] <= 0 ? 0 : inputs[i]; /* NaN stays NaN */
    else
        for (num i = 0; i < count; i += 16) {
            Floats x = load_some(inputs + i, count - i);
            store_some(outputs + i, kind == TANH ? hyperbolic_tangent(x) : sigmoid(x), count - i);
        }
}

/* Multiplies by 0 or by 1 / (1 - dropout). */
static void drop(const Job *job, num count, const float *kept, const float *from, float *to) {
    const float factor = 1 / (float)(1 - job->dropout);
    for (num i = 0; i < count; i++) to[i] = from[i] * (kept[i] * factor);
}

static void lstm_forward(const Job *job, num l, num m, Work *work, const float *inputs) {
    const Layer *layer = &job->layers[l];
    Place *place = &work->places[l];
    const num rows = place->rows, H = layer->out, G = 4 * H;
    const float *weight_ih = job->weights + layer->weights[0], *weight_hh = job->weights + layer->weights[1];
    const float *bias_ih = job->weights + layer->weights[2], *bias_hh = job->weights + layer->weights[3];
    for (num q = 0; q < G; q++) place->bias[q] = bias_ih[q] + bias_hh[q];
    pack(weight_hh, H, G, 1, H, place->packed);
    /* What the inputs add to the gates. After an embedding, it is computed once for each different token. */
    if (place->table) {
        const Place *embedding = &work->places[l - 1];
        product(job->sgemm, 0, 1, embedding->num_different, G, layer->in, 1, embedding->chosen, weight_ih, 0,
                place->table);
        for (num i = 0; i < rows; i++)
            memcpy(place->gates + i * G, place->table + embedding->tokens[i] * G, (size_t)G * sizeof(float));
    } else
        product(job->sgemm, 0, 1, rows, G, layer->in, 1, inputs, weight_ih, 0, place->gates);
    /* One step after the other. */
    for (num t = 0; t < rows / m; t++) {
        float *gates = place->gates + t * m * G;
        const num before = (t - 1) * m * H, now = t * m * H;
        if (t > 0) packed_product(place->outputs + before, m, H, place->packed, G, 1, gates);
        for (num i = 0; i < m; i++, gates += G)
            for (num h = 0; h < H; h += 16) {
                const num count = H - h, at = i * H + h;
                Floats input = sigmoid(load_some(gates + h, count) + load_some(place->bias + h, count));
                Floats forget = sigmoid(load_some(gates + H + h, count) + load_some(place->bias + H + h, count));
                Floats candidate =
                    hyperbolic_tangent(load_some(gates + 2 * H + h, count) + load_some(place->bias + 2 * H + h, count));
                Floats output =
                    sigmoid(load_some(gates + 3 * H + h, count) + load_some(place->bias + 3 * H + h, count));
                Floats cell = input * candidate;
                if (t > 0) cell += forget * load_some(place->cells + before + at, count);
                Floats cell_tanh = hyperbolic_tangent(cell);
                store_some(gates + h, input, count);
                store_some(gates + H + h, forget, count);
                store_some(gates + 2 * H + h, candidate, count);
                store_some(gates + 3 * H + h, output, count);
                store_some(place->cells + now + at, cell, count);
                store_some(place->cell_tanh + now + at, cell_tanh, count);
                store_some(place->outputs + now + at, output * cell_tanh, count);
            }
    }
}

/* What layer `l` puts in: its inputs in this batch. */
static const float *inputs_of(const Work *work, num l) { return l == 0 ? work->inputs : work->places[l - 1].outputs; }

/* The outputs of every layer on a batch. `kept` is moved behind what the DROPOUT layers take of it. */
static enum status forward(const Job *job, const num *rows, num m, Work *work, const float **kept) {
    if (work->inputs) read_inputs(job, rows, m, work->inputs);
    for (num l = 0; l < job->num_layers; l++) {
        const Layer *layer = &job->layers[l];
        Place *place = &work->places[l];
        const float *inputs = inputs_of(work, l);
        switch (layer->kind) {
        case EMBEDDING:
            if (read_tokens(job, rows, m, place) != DONE) return BAD_TOKEN;
            break;
        case LINEAR: linear_forward(job, layer, place->rows, inputs, place->outputs); break;
        case DROPOUT:
            if (!job->kept) break;
            place->kept = *kept;
            drop(job, place->rows * layer->out, place->kept, inputs, place->outputs);
            *kept += place->rows * layer->out;
            break;
        case LSTM: lstm_forward(job, l, m, work, inputs); break;
        case LAST_STEP: break;
        default: activate(layer->kind, inputs, place->outputs, place->rows * layer->out);
        }
    }
    return DONE;
}

/* --------------------------------------------------------------------------------------------------------- backward */

/* The softmax of the logits. Returns the logarithm of the sum of e^logit. */
static float softmax(const float *logits, num count, float *probabilities) {
    float top = logits[0], total = 0;
    for (num l = 1; l < count; l++) top = logits[l] > top ? logits[l] : top;
    for (num l = 0; l < count; l += 16)
        store_some(probabilities + l, exponential(load_some(logits + l, count - l) - all(top)), count - l);
    for (num l = 0; l < count; l++) total += probabilities[l];
    for (num l = 0; l < count; l++) probabilities[l] /= total;
    return logf(total) + top;
}

static void output_gradient(const Job *job, const num *rows, num m, const float *outputs, float *gradient) {
    const num count = job->layers[job->num_layers - 1].out;
    for (num i = 0; i < m; i++, outputs += count, gradient += count) {
        if (job->objective == CLASSIFICATION) {
            softmax(outputs, count, gradient);
            gradient[((const int64_t *)job->y)[rows[i]]] -= 1;
            for (num l = 0; l < count; l++) gradient[l] /= (float)m;
        } else {
            const float *targets = (const float *)job->y + rows[i] * count;
            for (num l = 0; l < count; l++) gradient[l] = 2 * (outputs[l] - targets[l]) / (float)(m * count);
        }
    }
}

/* How a gradient gets to the weights: target <- kept target + scale gradient, then `finish_step`. The target is the
   velocity, or without momentum the weights themselves. */
typedef struct {
    float *target, kept, scale;
} Step;

static Step step_of(const Job *job) {
    const double decay = job->weight_decay + job->proximal_mu;
    if (job->velocity) return (Step){job->velocity, (float)job->momentum, 1};
    return (Step){job->weights, (float)(1 - job->rate * decay), (float)-job->rate};
}

static void finish_step(const Job *job, num begin, num size) {
    const float rate = (float)job->rate, mu = (float)job->proximal_mu,
                decay = (float)(job->weight_decay + job->proximal_mu);
    float *w = job->weights + begin;
    if (job->velocity) {
        float *v = job->velocity + begin;
        if (decay != 0)
            for (num i = 0; i < size; i++) v[i] += decay * w[i];
        if (job->sent)
            for (num i = 0; i < size; i++) v[i] -= mu * job->sent[begin + i];
        for (num i = 0; i < size; i++) w[i] -= rate * v[i];
    } else if (job->sent)
        for (num i = 0; i < size; i++) w[i] += rate * (mu * job->sent[begin + i]);
}

/* Steps biases that have the same gradient, the sum of the rows: of an LSTM two, of a linear layer one. */
static void step_biases(const Job *job, const num *biases, int num_biases, const float *gradient, num rows, num width) {
    const Step step = step_of(job);
    for (num l = 0; l < width; l += 16) {
        Floats total = all(0);
        for (num i = 0; i < rows; i++) total += load_some(gradient + i * width + l, width - l);
        for (int bias = 0; bias < num_biases; bias++) {
            float *target = step.target + biases[bias] + l;
            store_some(target, all(step.kept) * load_some(target, width - l) + all(step.scale) * total, width - l);
        }
    }
    for (int bias = 0; bias < num_biases; bias++) finish_step(job, biases[bias], width);
}

/* Steps a weight (out, in). Its gradient is gradient(rows, out)^T inputs(rows, in). sgemm adds a sum of many rows to
   the target in several parts, and each part rounds the target: such a sum is made apart, and added at once. */
static void step_weight(const Job *job, Work *work, num begin, const float *gradient, const float *inputs, num rows,
                        num out, num in) {
    const Step step = step_of(job);
    float *target = step.target + begin;
    if (rows <= FEW_ROWS)
        product(job->sgemm, 1, 0, out, in, rows, step.scale, gradient, inputs, step.kept, target);
    else {
        float *sums = work->sums;
        product(job->sgemm, 1, 0, out, in, rows, 1, gradient, inputs, 0, sums);
        for (num i = 0; i < out * in; i++) target[i] = step.kept * target[i] + step.scale * sums[i];
    }
    finish_step(job, begin, out * in);
}

static void linear_backward(const Job *job, const Layer *layer, num rows, Work *work, const float *inputs,
                            float *gradient, float *by_inputs) {
    const num in = layer->in, out = layer->out, weight = layer->weights[0], *bias = layer->weights + 1;
    if (by_inputs) product(job->sgemm, 0, 0, rows, in, out, 1, gradient, job->weights + weight, 0, by_inputs);
    if (*bias >= 0) step_biases(job, bias, 1, gradient, rows, out);
    if (out > NARROW)
        step_weight(job, work, weight, gradient, inputs, rows, out, in);
    else {
        const Step step = step_of(job);
        for (num i = 0; i < rows * out; i++) gradient[i] *= step.scale;
        narrow_outer(gradient, inputs, step.kept, step.target + weight, rows, in, out);
        finish_step(job, weight, in * out);
    }
}

static void activation_backward(num kind, const float *outputs, float *gradient, num count) {
    if (kind == RELU)
        for (num i = 0; i < count; i++) gradient[i] = outputs[i] <= 0 ? 0 : gradient[i];
    else if (kind == TANH)
        for (num i = 0; i < count; i++) gradient[i] *= 1 - outputs[i] * outputs[i];
    else
        for (num i = 0; i < count; i++) gradient[i] *= outputs[i] * (1 - outputs[i]);
}

/* Steps the vectors of an embedding. Only those of the tokens in the batch have a gradient that is not 0. */
static void step_embedding(const Job *job, const Layer *layer, const Place *place) {
    const Step step = step_of(job);
    const num begin = layer->weights[0], width = layer->out;
    float *target = step.target + begin;
    if (step.kept != 1)
        for (num i = 0; i < layer->in * width; i++) target[i] *= step.kept;
    for (num d = 0; d < place->num_different; d++)
        for (num l = 0; l < width; l++)
            target[place->different[d] * width + l] += step.scale * place->by_chosen[d * width + l];
    if (job->velocity || job->sent) finish_step(job, begin, layer->in * width);
}

/* `gradient` is with respect to the outputs: of all steps, or of the last step if `is_last_step`. */
static void lstm_backward(const Job *job, num l, num m, Work *work, int is_last_step, const float *gradient,
                          float *by_inputs) {
    const Layer *layer = &job->layers[l];
    Place *place = &work->places[l];
    const num rows = place->rows, steps = rows / m, H = layer->out, G = 4 * H, *at = layer->weights;
    float *by_state = work->by_state, *by_cell = work->by_cell;
    pack(job->weights + at[1], G, H, H, 1, place->packed);
    memset(by_cell, 0, (size_t)(m * H) * sizeof(float));
    /* The gradients with respect to the gates, before their activations, take the place of the gates. */
    for (num t = steps - 1; t >= 0; t--) {
        float *gates = place->gates + t * m * G;
        const float *above = !is_last_step ? gradient + t * m * H : t == steps - 1 ? gradient : NULL;
        for (num i = 0; i < m; i++, gates += G)
            for (num h = 0; h < H; h += 16) {
                const num count = H - h, here = i * H + h, now = t * m * H + here;
                Floats input = load_some(gates + h, count), forget = load_some(gates + H + h, count);
                Floats candidate = load_some(gates + 2 * H + h, count), output = load_some(gates + 3 * H + h, count);
                Floats cell_tanh = load_some(place->cell_tanh + now, count), one = all(1), by_output = all(0);
                if (t < steps - 1) by_output = load_some(by_state + here, count);
                if (above) by_output += load_some(above + here, count);
                Floats by_now = load_some(by_cell + here, count) + by_output * output * (one - cell_tanh * cell_tanh);
                Floats by_forget = all(0);
                if (t > 0) by_forget = by_now * load_some(place->cells + now - m * H, count) * forget * (one - forget);
                store_some(gates + h, by_now * candidate * input * (one - input), count);
                store_some(gates + H + h, by_forget, count);
                store_some(gates + 2 * H + h, by_now * input * (one - candidate * candidate), count);
                store_some(gates + 3 * H + h, by_output * cell_tanh * output * (one - output), count);
                store_some(by_cell + here, by_now * forget, count);
            }
        if (t > 0) packed_product(place->gates + t * m * G, m, G, place->packed, H, 0, by_state);
    }
    /* The weights, and the gradient with respect to the inputs while the weights are still those of `forward`. */
    if (place->table) {
        Place *embedding = &work->places[l - 1];
        const num different = embedding->num_different;
        memset(place->table, 0, (size_t)(different * G) * sizeof(float));
        for (num i = 0; i < rows; i++) {
            float *sums = place->table + embedding->tokens[i] * G;
            const float *gates = place->gates + i * G;
            for (num q = 0; q < G; q++) sums[q] += gates[q];
        }
        product(job->sgemm, 0, 0, different, layer->in, G, 1, place->table, job->weights + at[0], 0,
                embedding->by_chosen);
        step_weight(job, work, at[0], place->table, embedding->chosen, different, G, layer->in);
    } else {
        product(job->sgemm, 0, 0, rows, layer->in, G, 1, place->gates, job->weights + at[0], 0, by_inputs);
        step_weight(job, work, at[0], place->gates, inputs_of(work, l), rows, G, layer->in);
    }
    step_weight(job, work, at[1], place->gates + m * G, place->outputs, rows - m, G, H);
    step_biases(job, at + 2, 2, place->gates, rows, G);
}

static void swap(Work *work) {
    float *gradient = work->gradient;
    work->gradient = work->spare;
    work->spare = gradient;
}

/* Steps all weights. `work->gradient` is with respect to the outputs of the last layer. */
static void backward(const Job *job, num m, Work *work, num first) {
    for (num l = job->num_layers - 1; l >= first; l--) {
        const Layer *layer = &job->layers[l];
        const Place *place = &work->places[l];
        switch (layer->kind) {
        case LINEAR:
            linear_backward(job, layer, place->rows, work, inputs_of(work, l), work->gradient,
                            l > first ? work->spare : NULL);
            swap(work);
            break;
        case DROPOUT:
            if (place->kept) drop(job, place->rows * layer->out, place->kept, work->gradient, work->gradient);
            break;
        case LSTM:
            lstm_backward(job, l, m, work, job->layers[l + 1].kind == LAST_STEP, work->gradient, work->spare);
            swap(work);
            break;
        case LAST_STEP: break;
        case EMBEDDING: step_embedding(job, layer, place); break;
        default: activation_backward(layer->kind, place->outputs, work->gradient, place->rows * layer->out);
        }
    }
}

/* --------------------------------------------------------------------------------------------------- what is called */

/* What this library was built from: the digest of this file, the compiler, the target and the flags. */
EXPORT const char *kernel_built_from(void) { return BUILT_FROM; }

/* How many floats of memory the job needs, or -1 if its layers are wrong. */
EXPORT num kernel_memory(const Job *job) {
    Work work;
    return check_layers(job) ? lay_out(job, largest_batch(job), &work) : -1;
}

/* Whether the job can be done; if so, `work` is laid out. */
static enum status begin(const Job *job, Work *work) {
    if (!check_layers(job)) return BAD_LAYERS;
    if (!job->memory || lay_out(job, largest_batch(job), work) > job->memory_size) return BAD_MEMORY;
    return check_rows(job);
}

/* Trains on the rows, a batch at a time. After a status other than DONE the weights are worth nothing. */
EXPORT int kernel_train(const Job *job) {
    Work work;
    enum status status = begin(job, &work);
    num first = 0; /* the first layer with weights: nothing before it needs a gradient */
    while (status == DONE && first < job->num_layers - 1 && job->layers[first].weights[0] < 0) first++;
    const float *kept = job->kept;
    for (num done = 0; done < job->num_rows && status == DONE; done += job->batch_size) {
        const num m = smaller(job->batch_size, job->num_rows - done), *rows = job->rows + done;
        if (m < job->batch_size) lay_out(job, m, &work); /* the last batch is smaller */
        status = forward(job, rows, m, &work, &kept);
        if (status != DONE) break;
        output_gradient(job, rows, m, work.places[job->num_layers - 1].outputs, work.gradient);
        backward(job, m, &work, first);
    }
    return status;
}

/* Writes the loss and the error of each row. NaN among the outputs is an error. */
EXPORT int kernel_measure(const Job *job) {
    Work work;
    enum status status = begin(job, &work);
    const num count = status == DONE ? job->layers[job->num_layers - 1].out : 0;
    const float *kept = job->kept;
    for (num done = 0; done < job->num_rows && status == DONE; done += job->batch_size) {
        const num m = smaller(job->batch_size, job->num_rows - done), *rows = job->rows + done;
        if (m < job->batch_size) lay_out(job, m, &work);
        status = forward(job, rows, m, &work, &kept);
        if (status != DONE) break;
        const float *outputs = work.places[job->num_layers - 1].outputs;
        for (num i = 0; i < m; i++, outputs += count) {
            float *loss = job->losses + done + i, *error = job->errors + done + i;
            if (job->objective == CLASSIFICATION) {
                const num label = ((const int64_t *)job->y)[rows[i]];
                num best = 0;
                int has_nan = 0;
                for (num l = 0; l < count; l++) {
                    has_nan |= outputs[l] != outputs[l];
                    if (outputs[l] > outputs[best]) best = l;
                }
                *loss = softmax(outputs, count, work.gradient) - outputs[label];
                *error = best != label || has_nan;
            } else {
                const float *targets = (const float *)job->y + rows[i] * count;
                float total = 0;
                for (num l = 0; l < count; l++) total += (outputs[l] - targets[l]) * (outputs[l] - targets[l]);
                *loss = *error = total / (float)count;
            }
        }
    }
    return status;
}

#ifdef _WIN32
/* Windows calls this when it loads the library. There is nothing to do. */
int _DllMainCRTStartup(void *library, unsigned long reason, void *reserved);
int _DllMainCRTStartup(void *library, unsigned long reason, void *reserved) {
    (void)library, (void)reason, (void)reserved;
    return 1;
}
#endif
