/* Noise and the steps that draw it, on a CPU: Philox4x32-10, Box-Muller, Langevin and GBM updates.

   philox.py, langevin_step.py, gbm_step.py and langevin_chain.py hold the formulas; native.py calls
   this by ctypes. Nothing but libc and pthreads is needed, Python's and torch's headers neither.

   Every number is a function of (seed, counter, stream, element) computed by IEEE additions,
   multiplications, square roots and whole-number operations in a written order, without contraction
   (-ffp-contract=off) and without a library's functions: so it has the same bits in any block,
   thread, instruction set and on any machine. Compilers vectorise the loops over LANES. */

#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>

#ifdef __FAST_MATH__
#error "results must not depend on the compiler: build without -ffast-math"
#endif

#define VERSION 1 /* of struct task and of the results: native.py has the same number */
#define LANES 128 /* groups of four elements that are worked on together */
#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define INDEPENDENT _Pragma("GCC ivdep")
#endif

enum { NORMALS, UNIFORMS, PLANES, LANGEVIN, GBM_LOG, GBM_UMS, GBM_DLS, CHAIN_WELL, CHAIN_GAUSSIAN };

/* A number for all items (stride 0) or one per item (stride 1). */
typedef struct {
    const float *at;
    int64_t stride;
} number;

typedef struct {
    int64_t op, threads, items, numel;
    const int64_t *seed;
    int64_t seed_stride;
    const int64_t *counter;
    int64_t counter_stride;
    int64_t stream;
    int64_t first, serial; /* item b's first group is first + b * serial */
    float *out;
    const float *y, *grad, *tether, *known;
    const uint8_t *mask;
    number step, noise, pull, clip; /* a, s, k and the largest |gradient|; GBM: v, s, shift */
    float low, high;
    int32_t *flips;
    int64_t steps;       /* of a chain */
    number shape, place; /* a chain's -4 h and c^2, or precision and mean; stride 1: per element */
} task;

/* Where a block of groups lies: one item's part, or groups of several items. */
typedef struct {
    int64_t groups, begin, count; /* groups of an item; first flat group; how many */
    int64_t item, group;          /* of the first */
    enum { ONE, KEYS, ALL } varies; /* nothing in the lanes; their keys; their counters too */
    uint32_t c0[LANES], k0[LANES], k1[LANES];
    uint64_t counter[LANES];
} block;

INLINE float as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE uint32_t as_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

/* The nearest float of a word: both halves are exact, their sum rounds once. */
INLINE float to_float(uint32_t word) {
    return (float)(int32_t)(word >> 16) * 65536.0f + (float)(int32_t)(word & 0xFFFF);
}

#define ROUND                                              \
    {                                                      \
        uint64_t p = (uint64_t)a * 0xD2511F53u;            \
        uint64_t q = (uint64_t)c * 0xCD9E8D57u;            \
        a = (uint32_t)(q >> 32) ^ b ^ k0, b = (uint32_t)q; \
        c = (uint32_t)(p >> 32) ^ d ^ k1, d = (uint32_t)p; \
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;              \
    }

/* w[j][i]: word j of lane i, at `step` counts after each lane's counter; two words, or all. */
INLINE void words_of(const block *at, uint32_t stream, uint64_t step, uint32_t w[4][LANES],
                     int all, int keys, int counters) {
    uint64_t counter = at->counter[0] + step;
    for (int i = 0; i < LANES; i++) {
        if (counters) counter = at->counter[i] + step;
        uint32_t k0 = at->k0[keys ? i : 0], k1 = at->k1[keys ? i : 0];
        uint32_t a = at->c0[i], b = (uint32_t)counter, c = (uint32_t)(counter >> 32), d = stream;
        ROUND ROUND ROUND ROUND ROUND ROUND ROUND ROUND ROUND ROUND
        w[0][i] = a, w[1][i] = b;
        if (all) w[2][i] = c, w[3][i] = d;
    }
}

INLINE void words(const block *at, uint32_t stream, uint64_t step, uint32_t w[4][LANES], int all) {
    if (at->varies == ONE) words_of(at, stream, step, w, all, 0, 0);
    else if (at->varies == KEYS) words_of(at, stream, step, w, all, 1, 0);
    else words_of(at, stream, step, w, all, 1, 1);
}

/* Natural logarithm of x in [2^-32, 1], to about one unit in the last place (Cephes logf). */
INLINE float logarithm(float x) {
    uint32_t bits = as_bits(x);
    int32_t exponent = (int32_t)(bits - 0x3F3504F3u) >> 23;
    float f = as_float(bits - ((uint32_t)exponent << 23)) - 1.0f; /* m in [sqrt 1/2, sqrt 2) */
    float e = (float)exponent, z = f * f, p = 7.0376836292e-2f;
    p = p * f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    p = p * f * z - 2.12194440e-4f * e - 0.5f * z;
    return f + p + 0.693359375f * e;
}

/* exp(x), to about one unit in the last place; infinities, zeros and NaN as they should be. */
INLINE float exponential(float x) {
    x = x > 89.0f ? 89.0f : x;
    x = x < -104.0f ? -104.0f : x;
    float t = x * 1.44269504088896341f + 12582912.0f; /* 1.5 2^23: rounds to a whole number */
    int32_t n = (int32_t)(as_bits(t) - 0x4B400000u);
    float whole = t - 12582912.0f;
    float r = x - whole * 0.693359375f;
    r = r - whole * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    int32_t half = n >> 1; /* in two factors: 2^n itself may be out of range */
    return p * as_float((uint32_t)(half + 127) << 23) * as_float((uint32_t)(n - half + 127) << 23);
}

/* Two normals by Box-Muller. The angle is the reference's, rounded as there, then reduced to an
   eighth of a turn: what is left of a difference from it is about one rounding of each function. */
INLINE void pair(uint32_t radius_word, uint32_t angle_word, float *first, float *second) {
    float uniform = (to_float(radius_word) + 1.0f) * 2.3283064365386963e-10f;
    float radius = sqrtf(-2.0f * logarithm(uniform));
    float angle = to_float(angle_word) * 1.4629180792671596e-09f;
    float t = angle * 0.636619772f + 12582912.0f; /* rounds to a whole number, as below */
    uint32_t quadrant = as_bits(t) - 0x4B400000u;
    float q = t - 12582912.0f; /* times pi / 2 in three parts, of which q holds two exactly */
    angle = angle - q * 1.5703125f;
    angle = angle - q * 4.837512969970703125e-4f;
    angle = angle - q * 7.54978995489188216e-8f;
    float z = angle * angle;
    float sine = angle + angle * z * (-0.1666666467f + z * (0.008332748635f - z * 0.0001958794987f));
    float cosine = 1.0f + z * (-0.5f + z * (0.04166666466f +
                                            z * (-0.001388830334f + z * 2.454799131e-05f)));
    uint32_t odd = 0u - (quadrant & 1);
    uint32_t a = (as_bits(sine) & odd) | (as_bits(cosine) & ~odd);
    uint32_t b = (as_bits(cosine) & odd) | (as_bits(sine) & ~odd);
    *first = radius * as_float(a ^ (((quadrant + 1) & 2) << 30));
    *second = radius * as_float(b ^ ((quadrant & 2) << 30));
}

INLINE void planar_normals(const uint32_t w[4][LANES], int both, float z[4][LANES]) {
    for (int i = 0; i < LANES; i++) pair(w[0][i], w[1][i], &z[0][i], &z[1][i]);
    if (both)
        for (int i = 0; i < LANES; i++) pair(w[2][i], w[3][i], &z[2][i], &z[3][i]);
}

INLINE void interleave(const float z[4][LANES], float *out) {
    for (int i = 0; i < LANES; i++) {
        out[4 * i] = z[0][i];
        out[4 * i + 1] = z[1][i];
        out[4 * i + 2] = z[2][i];
        out[4 * i + 3] = z[3][i];
    }
}

INLINE void locate(const task *t, int64_t index, block *at) {
    int64_t groups = (t->numel + 3) / 4, total = t->items * groups;
    at->groups = groups;
    at->begin = index * LANES;
    at->count = total - at->begin < LANES ? total - at->begin : LANES;
    at->item = at->begin / groups;
    at->group = at->begin - at->item * groups;
    int serial = !t->seed_stride && !t->counter_stride && t->serial == groups;
    at->varies = t->counter_stride ? ALL : KEYS;
    if (serial || at->group + at->count <= groups) at->varies = ONE;
    if (at->varies == ONE) {
        uint64_t seed = (uint64_t)t->seed[at->item * t->seed_stride];
        at->k0[0] = (uint32_t)seed, at->k1[0] = (uint32_t)(seed >> 32);
        at->counter[0] = (uint64_t)t->counter[at->item * t->counter_stride];
        uint32_t first = (uint32_t)(t->first + at->item * t->serial + at->group);
        for (int i = 0; i < LANES; i++) at->c0[i] = first + (uint32_t)i;
    } else {
        int64_t item = at->item, group = at->group;
        for (int i = 0; i < LANES; i++) {
            uint64_t seed = (uint64_t)t->seed[item * t->seed_stride];
            at->k0[i] = (uint32_t)seed, at->k1[i] = (uint32_t)(seed >> 32);
            at->counter[i] = (uint64_t)t->counter[item * t->counter_stride];
            at->c0[i] = (uint32_t)(t->first + item * t->serial + group);
            /* lanes past the end repeat the last item's key */
            if (++group == groups && item + 1 < t->items) item++, group = 0;
        }
    }
}

INLINE float clamped(float x, float low, float high) { /* NaN stays */
    x = x < low ? low : x;
    return x > high ? high : x;
}

INLINE float of(number n, int64_t item) { return n.at[item * n.stride]; }

INLINE void langevin(const task *t, int64_t item, int64_t offset, int64_t n, const float *z,
                     int tether, int mask) {
    float a = of(t->step, item), s = of(t->noise, item), clip = of(t->clip, item);
    float k = tether ? of(t->pull, item) : 0.0f, low = t->low, high = t->high;
    const float *y = t->y + offset, *grad = t->grad + offset, *known = t->known + offset;
    const float *x = tether ? t->tether + offset : y;
    const uint8_t *free = mask ? t->mask + offset : 0;
    float *out = t->out + offset;
    INDEPENDENT
    for (int64_t i = 0; i < n; i++) {
        float new = y[i] + a * clamped(grad[i], -clip, clip);
        if (tether) new = new + k * (x[i] - y[i]);
        new = clamped(new + s * z[i], low, high);
        out[i] = mask ? (free[i] ? new : known[i]) : new;
    }
}

INLINE void gbm(const task *t, int64_t item, int64_t offset, int64_t n, const float *z, int op) {
    float v = of(t->step, item), s = of(t->noise, item), shift = of(t->pull, item);
    const float *x = t->y + offset, *score = t->grad + offset;
    float *out = t->out + offset;
    int32_t flips = 0;
    INDEPENDENT
    for (int64_t i = 0; i < n; i++) {
        float e = v * score[i] + shift + s * z[i];
        if (op == GBM_LOG) {
            out[i] = x[i] + e;
        } else if (op == GBM_DLS) {
            out[i] = x[i] * exponential(e);
        } else {
            float factor = 1.0f + e;
            flips += factor <= 0.0f;
            out[i] = x[i] * factor;
        }
    }
    if (op == GBM_UMS && t->flips && flips) /* threads may share an item */
        __atomic_fetch_add(t->flips + item, flips, __ATOMIC_RELAXED);
}

INLINE void elements(const task *t, int64_t item, int64_t offset, int64_t n, const float *z) {
    switch (t->op) {
    case LANGEVIN:
        if (t->tether && t->mask) langevin(t, item, offset, n, z, 1, 1);
        else if (t->tether) langevin(t, item, offset, n, z, 1, 0);
        else if (t->mask) langevin(t, item, offset, n, z, 0, 1);
        else langevin(t, item, offset, n, z, 0, 0);
        break;
    case GBM_LOG: gbm(t, item, offset, n, z, GBM_LOG); break;
    case GBM_UMS: gbm(t, item, offset, n, z, GBM_UMS); break;
    case GBM_DLS: gbm(t, item, offset, n, z, GBM_DLS); break;
    default: memcpy(t->out + offset, z, (size_t)n * 4);
    }
}

/* What a block's elements become, item by item; z (4 LANES): its numbers in logical order. */
INLINE void scatter(const task *t, const block *at, const float *z) {
    int64_t item = at->item, group = at->group, left = at->count;
    int plain = t->op == NORMALS || t->op == UNIFORMS;
    if (plain && t->numel % 4 == 0) { /* elements follow one another across items */
        memcpy(t->out + 4 * at->begin, z, (size_t)left * 16);
        return;
    }
    while (left > 0) {
        int64_t here = at->groups - group < left ? at->groups - group : left;
        int64_t n = t->numel - 4 * group < 4 * here ? t->numel - 4 * group : 4 * here;
        elements(t, item, item * t->numel + 4 * group, n, z);
        z += 4 * here, left -= here, item++, group = 0;
    }
}

/* A chain of `steps` on LANES groups, in registers and the first cache. */
INLINE void chain(const task *t, const block *at, int both) {
    float y[4][LANES], z[4][LANES], q[4][LANES], m[4][LANES], a[LANES], s[LANES];
    uint32_t w[4][LANES];
    int width = both ? 4 : 2, gaussian = t->op == CHAIN_GAUSSIAN;
    memset(y, 0, sizeof y), memset(q, 0, sizeof q), memset(m, 0, sizeof m);
    for (int store = 0; store < 2; store++) {
        int64_t item = at->item, group = at->group;
        for (int i = 0; i < at->count; i++) {
            if (!store) a[i] = of(t->step, item), s[i] = of(t->noise, item);
            for (int j = 0; j < width && 4 * group + j < t->numel; j++) {
                float *place = t->out + item * t->numel + 4 * group + j;
                if (store) {
                    *place = y[j][i];
                } else {
                    y[j][i] = *place;
                    q[j][i] = of(t->shape, 4 * group + j);
                    m[j][i] = of(t->place, 4 * group + j);
                }
            }
            if (++group == at->groups) item++, group = 0;
        }
        if (store) return;
        for (int i = (int)at->count; i < LANES; i++) a[i] = s[i] = 0.0f;
        for (int64_t step = 0; step < t->steps; step++) {
            words(at, (uint32_t)t->stream, (uint64_t)step, w, both);
            planar_normals(w, both, z);
            for (int j = 0; j < width; j++)
                for (int i = 0; i < LANES; i++) {
                    float x = y[j][i];
                    float score = gaussian ? q[j][i] * (m[j][i] - x)
                                           : q[j][i] * x * (x * x - m[j][i]);
                    y[j][i] = x + a[i] * score + s[i] * z[j][i];
                }
        }
    }
}

/* Radii's uniforms and angles for torch's own logarithm, cosine and sine: planes (4, groups). */
INLINE void planes(const task *t, const block *at, const uint32_t w[4][LANES]) {
    int64_t total = t->items * at->groups;
    for (int j = 0; j < 4; j++) {
        float *out = t->out + j * total + at->begin;
        for (int i = 0; i < at->count; i++)
            out[i] = j % 2 ? to_float(w[j][i]) * 1.4629180792671596e-09f
                           : (to_float(w[j][i]) + 1.0f) * 2.3283064365386963e-10f;
    }
}

INLINE void blocks(const task *t, int64_t first, int64_t last) {
    for (int64_t index = first; index < last; index++) {
        block at;
        locate(t, index, &at);
        if (t->op == CHAIN_WELL || t->op == CHAIN_GAUSSIAN) {
            if (t->numel > 2) chain(t, &at, 1);
            else chain(t, &at, 0);
            continue;
        }
        uint32_t w[4][LANES];
        float z[4][LANES], numbers[4 * LANES];
        words(&at, (uint32_t)t->stream, 0, w, 1);
        if (t->op == PLANES) {
            planes(t, &at, w);
            continue;
        }
        if (t->op == UNIFORMS) {
            for (int j = 0; j < 4; j++)
                for (int i = 0; i < LANES; i++)
                    z[j][i] = (float)(int32_t)(w[j][i] >> 8) * 5.9604644775390625e-08f;
        } else {
            planar_normals(w, 1, z);
        }
        interleave(z, numbers);
        scatter(t, &at, numbers);
    }
}

static void blocks_plain(const task *t, int64_t first, int64_t last) { blocks(t, first, last); }

#if defined(__x86_64__)
__attribute__((target("avx2"))) static void blocks_avx2(const task *t, int64_t first, int64_t last) {
    blocks(t, first, last);
}
#ifdef __clang__
#define AVX512 "avx512f,avx512bw,avx512dq,avx512vl"
#else
#define AVX512 "avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"
#endif
__attribute__((target(AVX512))) static void blocks_avx512(const task *t, int64_t first,
                                                          int64_t last) {
    blocks(t, first, last);
}
#endif

/* The widest instruction set of this machine: 0 the compiler's default, 1 AVX2, 2 AVX-512. */
int genmodels_level(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return 2;
    if (__builtin_cpu_supports("avx2")) return 1;
#endif
    return 0;
}

int genmodels_version(void) { return VERSION; }

typedef void (*worker)(const task *, int64_t, int64_t);

typedef struct {
    pthread_t thread;
    const task *t;
    worker work;
    int64_t first, last;
} part;

static void *run_part(void *argument) {
    part *p = argument;
    p->work(p->t, p->first, p->last);
    return 0;
}

#define MOST_THREADS 64

/* Do a task with t->threads threads and at most this instruction set. */
void genmodels_run(const task *t, int level) {
    worker work = blocks_plain;
#if defined(__x86_64__)
    int best = genmodels_level();
    level = level < best ? level : best;
    if (level == 1) work = blocks_avx2;
    if (level == 2) work = blocks_avx512;
#endif
    int64_t count = (t->items * ((t->numel + 3) / 4) + LANES - 1) / LANES, made = 0;
    int64_t threads = t->threads < MOST_THREADS ? t->threads : MOST_THREADS;
    part parts[MOST_THREADS];
    for (int64_t i = 1; i < threads; i++) {
        part p = {.t = t, .work = work, .first = count * i / threads};
        p.last = count * (i + 1) / threads;
        parts[made] = p;
        if (pthread_create(&parts[made].thread, 0, run_part, &parts[made])) {
            work(t, p.first, p.last); /* no more threads to be had */
        } else {
            made++;
        }
    }
    work(t, 0, threads > 1 ? count / threads : count);
    for (int64_t i = 0; i < made; i++) pthread_join(parts[i].thread, 0);
}

/* What PLANES left, after torch's functions: radius, sine, radius, sine, cosine, cosine
   (6, n) -> out (n, 4) normals. */
void genmodels_combine(const float *planes, float *out, int64_t n) {
    const float *cosine = planes + 4 * n;
    for (int64_t i = 0; i < n; i++) {
        out[4 * i] = planes[i] * cosine[i];
        out[4 * i + 1] = planes[i] * planes[n + i];
        out[4 * i + 2] = planes[2 * n + i] * cosine[n + i];
        out[4 * i + 3] = planes[2 * n + i] * planes[3 * n + i];
    }
}
