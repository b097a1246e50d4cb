// What both directions in time of a GRU share: how the recurrence is divided among threads, and the
// product of a few rows with packed weights.
//
// A group is a tile of sequences in one direction; groups never wait for each other. Where there are
// fewer groups than threads, the hidden units of a group are divided into parts, which walk through
// time in lockstep. Each element is summed in the same order however the work is divided.
#pragma once
#include <sched.h>

#include "rows.h"

namespace fastlm::FASTLM_ISA::gru {

inline constexpr int64_t kLine = 64;  // bytes of a cache line

// Carves a workspace; with a null base it only measures.
struct Arena {
  char* base;
  int64_t used = 0;
  template <class E> E* take(int64_t n) {
    used = round_up<int64_t>(used, kLine);
    E* p = base ? reinterpret_cast<E*>(base + used) : nullptr;
    used += n * int64_t(sizeof(E));
    return p;
  }
};

// Leading dimension of scratch rows: a line more than the row, so that rows of a power of two don't
// all fall into the same sets of the cache.
template <class F> FASTLM_INLINE int64_t padded(int64_t n) {
  return round_up<int64_t>(n, kLine / sizeof(F)) + kLine / int64_t(sizeof(F));
}

// ---- division of the work ----

struct Division {
  int64_t tiles;   // of sequences, per direction
  int64_t parts;   // of hidden units, per tile
};

// Below this many multiply-adds a step is too short to be worth the wait for other threads.
inline constexpr int64_t kSplitWork = 32 * 1024;

// Rows of a tile at least, each of which reads all of the packed weights at each step: a micro-tile's where they come
// from a core's own cache, more where from one that cores share, as many as pay for memory's where they are larger.
inline int64_t least_rows(const GruParams& p, int64_t weights) {
  if (weights <= caches().second) return kMR;
  return weights <= caches().third / 2 ? kMR * least<int64_t>(greatest<int64_t>(p.pool.threads / 2, 1), 4) : 4 * kMR;
}

// The work of threads is divided by sequences as far as that goes: between two parts of the units all states go from
// one core to the other at every step. Not where larger weights would leave tiles uneven by a quarter, nor where
// sequences end before others.
inline Division divide(const GruParams& p, int64_t blocks, int64_t weights) {
  const int64_t threads = greatest<int64_t>(p.pool.threads, 1);
  const auto parts = [&](int64_t tiles) {
    const int64_t work = ceil_div(p.B, tiles) * 3 * p.H * p.H;
    return greatest<int64_t>(least(least(ceil_div(threads, p.D * tiles), blocks), work / kSplitWork), 1);
  };
  const auto uneven = [&](int64_t tiles) {
    return weights > caches().second / 2 &&
           (p.N < p.T * p.B || 4 * tiles * round_up<int64_t>(ceil_div(p.B, tiles), kMR) > 5 * p.B);
  };
  int64_t tiles = least(ceil_div(threads, p.D), ceil_div(p.B, least_rows(p, weights)));
  while (tiles > 1 && uneven(tiles) && parts(tiles - 1) > 1) --tiles;
  tiles = greatest<int64_t>(tiles, 1);
  return {tiles, parts(tiles)};
}

FASTLM_INLINE int64_t active(const GruParams& p, int64_t t) { return p.offsets[t + 1] - p.offsets[t]; }

// bounds[0 ... tiles]: tiles of sequences, whole micro-tiles each, with about as many rows each.
inline void cut_tiles(const GruParams& p, int64_t tiles, int64_t* bounds) {
  bounds[0] = 0;
  int64_t b = 0;
  for (int64_t i = 1; i < tiles; ++i) {
    const int64_t target = p.N * i / tiles;
    for (int64_t rows = 0; b < p.B; b += kMR) {
      rows = 0;
      for (int64_t t = 0; t < p.T; ++t) rows += least(active(p, t), b);
      if (rows >= target) break;
    }
    bounds[i] = least(b, p.B);
  }
  bounds[tiles] = p.B;
}

struct alignas(kLine) Counter { int64_t n; };

FASTLM_INLINE void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// A part's counters: the phases of it that were begun, and those that are done. Each has a line of its own, so that a
// part is begun without asking other cores, and what they look at changes once a phase.
inline constexpr int kCounters = 2;
inline constexpr int kPatience = 256, kLongWait = 4096;  // spins: a few microseconds, and many

// f(group, part, phase) for every phase of every group, a phase of a group only after all parts of the one before.
// A part that nobody has begun is taken over by whoever waits for it, after a while, or at once where it came to that in
// the phase before: so this ends with any number of threads at work, and one that is late does not hold up the others.
template <class F>
inline void lockstep(const Pool& pool, int64_t groups, int64_t parts, int64_t phases,
                     Counter* counters, const F& f) {
  for (int64_t i = 0; i < groups * parts * kCounters; ++i) counters[i].n = 0;
  parallel(pool, groups * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i / parts, own = i % parts;
      Counter *const begun = counters + group * parts * kCounters, *const done = begun + parts;
      // The phase of a part, if nobody else has begun it. What it needs was seen in the wait for the phase before.
      const auto take = [&](int64_t part, int64_t phase) FASTLM_INLINED {
        int64_t expected = phase;
        if (__atomic_load_n(&begun[part].n, __ATOMIC_RELAXED) != phase ||
            !__atomic_compare_exchange_n(&begun[part].n, &expected, phase + 1, false, __ATOMIC_RELAXED,
                                         __ATOMIC_RELAXED))
          return false;
        f(group, part, phase);
        __atomic_store_n(&done[part].n, phase + 1, __ATOMIC_RELEASE);
        return true;
      };
      int patience = kPatience;
      for (int64_t phase = 0; phase < phases; ++phase) {
        if (parts == 1) {
          f(group, 0, phase);
          continue;
        }
        take(own, phase);
        int spins = 0;
        for (int64_t j = 1; j <= parts; ++j) {
          const int64_t part = (own + j) % parts;
          for (; __atomic_load_n(&done[part].n, __ATOMIC_ACQUIRE) <= phase; ++spins) {
            if (spins == patience) {
              patience = kPatience;
              for (int64_t k = 1; k < parts; ++k)
                if (take((own + k) % parts, phase)) patience = 0;
            }
            relax();
            if (spins > kLongWait) sched_yield();
          }
        }
      }
    }
  });
}

// ---- products with packed weights ----

// The columns of a part are cut into panels of up to 3 vectors, as each_panel() does: the one that begins with the
// part's vector v lies at v * K * lanes, [K][its vectors][lanes]. In the forward a panel holds the three gates of one
// vector of units, in the backward adjacent vectors of units.
template <class F> inline constexpr int64_t kPanel = kNV * kLanes<F>;
template <class F> inline constexpr int64_t kDepth = 24 * 1024 / (kPanel<F> * int64_t(sizeof(F)));

// What a step multiplies, for storage type S: rows of R, read as elements E. These are the states or
// gradients in the compute type themselves, or where the ISA has dot products of bf16, rounded to it.
template <class S> struct Factors {
  using Mul = ProductOf<S>;
  using E = typename Mul::elem;
  using R = typename Mul::value;
  static constexpr int64_t kPair = sizeof(E) / sizeof(R);
  static constexpr bool kRounded = kPair > 1;
  static constexpr bool kWidens = kSame<S, bf16> && !kRounded;
  // A single sequence waits for its weights: in half of the bytes it took 0.55 of the time for H = 1024
  // and 0.75 for 256 (Zen 3). More of them wait for the multiply-adds, which widening would hold up.
  static bool widened(const GruParams& p) { return kWidens && p.B == 1; }
  static int64_t step(const GruParams& p) { return widened(p) ? 2 : kPair; }  // of a sum: terms at once
  static int64_t steps(const GruParams& p, int64_t n) { return ceil_div<int64_t>(n, step(p)); }
  // f(weights) to pack them as elements of whichever type they have.
  template <class Fill> static void pack(const GruParams& p, E* weights, const Fill& f) {
    if constexpr (kWidens)
      if (widened(p)) return f(reinterpret_cast<uint32_t*>(weights));
    f(weights);
  }
};

// Rows of float times weights packed as pairs of bf16, summed in the order of Float.
struct WidenedPair {
  using elem = uint32_t;
  using acc = float;
  struct Factors { Vec<float> even, odd; };
  static FASTLM_INLINE Vec<float> madd(Factors a, Words b, Vec<float> c) {
    c = fma(a.even, bits_of<Vec<float>>(b << 16), c);
    return fma(a.odd, bits_of<Vec<float>>(b & (Words{} + 0xffff0000u)), c);
  }
};

// Step k of a row, in all lanes.
template <class Mul> struct RowOf {
  using type = typename Mul::elem;
  static FASTLM_INLINE Vec<type> step(const type* a, int64_t k) {
    type x;
    __builtin_memcpy(&x, a + k, sizeof x);
    return splat<type>(x);
  }
};
template <> struct RowOf<WidenedPair> {
  using type = float;
  static FASTLM_INLINE WidenedPair::Factors step(const float* a, int64_t k) {
    return {splat(a[2 * k]), splat(a[2 * k + 1])};
  }
};

inline constexpr int kBeside = 4;          // panels at once for one row
inline constexpr int64_t kLongRow = 128;  // steps of k

// kRowsBeside rows times a vector of columns, c[kRowsBeside][lanes]: a product that the row's may take along. While
// the weights of that one arrive from the second-level cache a core has time for as many multiply-adds again, and
// each vector of these weights serves all of the rows.
inline constexpr int kRowsBeside = kBeside * kNV;
template <class Mul> struct Columns {
  using E = typename Mul::elem;
  int64_t K;
  const E* a;  // [K][kRowsBeside]
  const E* b;  // [K][ldb]
  int64_t ldb;
  typename Mul::acc* c;
};
struct NoColumns {};

// One row times kPanels panels of kVecs vectors: c[kPanels][kVecs lanes].
template <class Mul, int kPanels, int kVecs, class Beside = NoColumns>
inline __attribute__((noinline)) void row_products(int64_t K, const typename RowOf<Mul>::type* a,
                                                   const typename Mul::elem* panel, typename Mul::acc* c,
                                                   Beside beside = {}) {
  using F = typename Mul::acc;
  using E = typename Mul::elem;
  constexpr int64_t kL = kLanes<F>, kWidth = kVecs * kL;
  constexpr int kRows = kSame<Beside, NoColumns> ? 0 : kRowsBeside;
  Vec<F> acc[kPanels + 1][kVecs] = {}, sums[kRows + 1] = {};
  const auto step = [&](int64_t k) FASTLM_INLINED {
    const auto x = RowOf<Mul>::step(a, k);
#pragma GCC unroll 8
    for (int i = 0; i < kPanels; ++i)
#pragma GCC unroll 3
      for (int v = 0; v < kVecs; ++v)
        acc[i][v] = Mul::madd(x, load_raw<Vec<E>>(panel + (i * K + k) * kWidth + v * kL), acc[i][v]);
  };
  int64_t k = 0;
  if constexpr (kRows > 0) {
    const auto step_beside = [&](int64_t k) FASTLM_INLINED {
      const Vec<E> column = load_raw<Vec<E>>(beside.b + k * beside.ldb);
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r)
        sums[r] = Mul::madd(RowOf<Mul>::step(beside.a + k * kRows, r), column, sums[r]);
    };
    for (; k < least(K, beside.K); ++k) {
      step(k);
      step_beside(k);
    }
    for (int64_t rest = k; rest < beside.K; ++rest) step_beside(rest);
  }
  for (; k < K; ++k) step(k);
#pragma GCC unroll 8
  for (int i = 0; i < kPanels; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < kVecs; ++v) store(c + i * kWidth + v * kL, acc[i][v]);
  if constexpr (kRows > 0)
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) store(beside.c + r * kL, sums[r]);
}

// a[K] times the columns from vector `first` to `last`, handed to f(vector, vectors, c). Whole panels go several at
// once, by several(panel, c), so that their sums overlap, and what f makes of them; of short ones a core begins the
// next beside f anyway.
template <class Mul, class Visit, class Several>
FASTLM_INLINE void panel_products(int64_t K, const typename RowOf<Mul>::type* a, const typename Mul::elem* panels,
                                  int64_t first, int64_t last, const Visit& f, const Several& several) {
  using F = typename Mul::acc;
  F c[kBeside * kPanel<F>];
  for (; K >= kLongRow && first_vectors(last - first - (kBeside - 1) * kNV) == kNV; first += kBeside * kNV) {
    several(panels + first * K * kLanes<F>, c);
    f(first, kBeside * kNV, c);
  }
  each_panel(first, last, [&](int64_t v, int64_t n) {
    const typename Mul::elem* panel = panels + v * K * kLanes<F>;
    if (n == 3) row_products<Mul, 1, 3>(K, a, panel, c);
    else if (n == 2) row_products<Mul, 1, 2>(K, a, panel, c);
    else row_products<Mul, 1, 1>(K, a, panel, c);
    f(v, n, c);
  });
}
template <class Mul, class Visit>
FASTLM_INLINE void panel_products(int64_t K, const typename RowOf<Mul>::type* a, const typename Mul::elem* panels,
                                  int64_t first, int64_t last, const Visit& f) {
  panel_products<Mul>(K, a, panels, first, last, f, [&](const typename Mul::elem* panel, typename Mul::acc* c) {
    row_products<Mul, kBeside, kNV>(K, a, panel, c);
  });
}

// The same for a[rows][K], c[rows][kPanel], panel by panel. Before that ahead(vector, vectors, row) is called for each
// row, here and there among the products: to prefetch what f, or what follows it, is going to read.
template <class Mul, class Visit, class Ahead>
FASTLM_INLINE void panel_products(int64_t rows, int64_t K, const typename Mul::elem* a, int64_t lda,
                                  const typename Mul::elem* panels, int64_t first, int64_t last,
                                  const Visit& f, const Ahead& ahead) {
  using F = typename Mul::acc;
  if (rows == 1) return panel_products<Mul>(K, a, panels, first, last, f);
  F* c = static_cast<F*>(thread_scratch(kScratchKernel, size_t(rows * kPanel<F>) * sizeof(F)));
  const int64_t depth = rows > kMR ? kDepth<F> : K;  // in the first-level cache while it is reused
  each_panel(first, last, [&](int64_t v, int64_t n) {
    const int64_t columns = n * kLanes<F>;
    const typename Mul::elem* panel = panels + v * K * kLanes<F>;
    for (int64_t k = 0, m = 0; k < K; k += depth) {
      const int64_t steps = least(K - k, depth);
      for (; m < rows * (k + steps) / K; ++m) ahead(v, n, m);
      if (k == 0)
        matmul<Mul, kRowMajor, kOverwrite>(rows, columns, steps, a, lda, panel, columns, c, kPanel<F>);
      else
        matmul<Mul, kRowMajor, kAccumulate>(rows, columns, steps, a + k, lda, panel + k * columns, columns, c,
                                            kPanel<F>);
    }
    f(v, n, c);
  });
}

// The same for the rows and weights of a step.
template <class S, class Visit, class Ahead>
FASTLM_INLINE void step_products(const GruParams& p, int64_t rows, int64_t K, const typename Factors<S>::R* a,
                                 int64_t lda, const typename Factors<S>::E* panels, int64_t first,
                                 int64_t last, const Visit& f, const Ahead& ahead) {
  using E = typename Factors<S>::E;
  if (rows == 1) prefetch(K * Factors<S>::step(p), a);  // all lines at once: they come from the cores that wrote them
  if constexpr (Factors<S>::kWidens)
    if (Factors<S>::widened(p))
      return panel_products<WidenedPair>(K, a, reinterpret_cast<const uint32_t*>(panels), first, last, f);
  panel_products<typename Factors<S>::Mul>(rows, K, reinterpret_cast<const E*>(a), lda / Factors<S>::kPair,
                                           panels, first, last, f, ahead);
}

// Gains, biases: n storage elements at src (null: zeros) to dst.
template <class F, class S> inline void widen(int64_t n, const S* src, F* dst) {
  if (src) convert_row(n, src, 1, dst);
  else __builtin_memset(dst, 0, size_t(n) * sizeof(F));
}

inline void sequence_lengths(const GruParams& p, int64_t* lengths) {
  for (int64_t t = 0; t < p.T; ++t)
    for (int64_t b = t + 1 < p.T ? active(p, t + 1) : 0; b < active(p, t); ++b) lengths[b] = t + 1;
}

}  // namespace fastlm::FASTLM_ISA::gru
