// Cross-entropy of logits X W^T + bias that never exist whole: X[N][D], W[C][S][D], bias[C][S], and
// for each of the S heads the loss of cross_entropy.h over C.
//
// Tokens go by in chunks. Lanes are tokens: a tile of logits^T[v][token] is the product of rows of W,
// read as they lie, and X^T, packed once a chunk; the softmax is vertical, in registers. The tiles of
// a chunk are kept (bounded scratch), their maxima and sums combined, and each then turns into the
// gradient tile G^T in the second-level cache, where both of its products are taken at once:
//   dX^T[d][token] += W[v][d] G^T[v][token]      dW[v][d] += G^T[v][token] X[token][d]
// so that loss and gradients cost three products. Where the upstream gradient comes only later, the
// backward recomputes the tile from the kept log-sum-exp (four products, no tiles kept).
//
// With dot products of bf16 the operands are pairs along the summed dimension: of D for the logits, of
// classes for dX, of tokens for dW. The gradient tile is then rounded to bf16, once for both.
//
// Work is divided into token blocks x vocabulary segments by the shapes alone, each summing its part
// in a fixed order, so that the bits do not depend on the number of threads.
#pragma once
#include "token_loss.h"

namespace fastlm {

struct LinearCrossEntropyParams {
  Pool pool;
  int64_t N, D, C, S;
  TokenLoss token;
  const void* input;          // [N][D], storage type like the rest
  const void* linear_weight;  // [C][S][D]
  const void* linear_bias;    // [C][S], or null
  void* dinput;               // [N][D], or null
  void* dlinear_weight;       // [C][S][D], or null
  void* dlinear_bias;         // [C][S], or null
  bool forward;               // compute lse and loss; otherwise lse is read
  void* scratch;              // scratch_bytes(params)
};

struct LinearCrossEntropyKernels {
  int64_t (*scratch_bytes[kDTypes])(const LinearCrossEntropyParams&);
  void (*run[kDTypes])(const LinearCrossEntropyParams&);
};

}  // namespace fastlm

#ifdef FASTLM_ISA
#include "gemm.h"

namespace fastlm::FASTLM_ISA {

// Sizes, from the shapes alone.
template <class S> struct LinearPlan {
  using T = compute_t<S>;
  using Mul = ProductOf<S>;
  using E = typename Mul::elem;
  static constexpr int64_t kPair = Pack<E>::kPair;  // steps of a sum in an element
  static constexpr int64_t kL = kLanes<T>, kNR = kNV * kL;
  static constexpr int64_t kKC = 24 * 1024 / (kNR * int64_t(sizeof(E)));  // panels of B in a 32 KiB cache
  static constexpr int64_t kRows = 96 * kPair;  // classes in a tile: steps of the sums of dX
  static constexpr int64_t kItems = 32;    // pieces of work that a chunk divides into at least
  static constexpr int64_t kTokens = 528;  // in a block at most
  static constexpr bool kDirect = sizeof(S) == sizeof(T);

  int64_t tiles, segments;           // of the vocabulary
  int64_t blocks, width;             // of a chunk's tokens: blocks of `width`, in the last chunk of less
  int64_t chunks;
  int64_t weight_buffers;            // sums of dW beside the output
  bool keep;                         // the logits of a chunk
  int64_t logits, partial, dx, dw, db, xt, x, token, end;  // offsets in scratch, elements of T

  explicit LinearPlan(const LinearCrossEntropyParams& p) {
    const bool gradient = p.dinput || p.dlinear_weight || p.dlinear_bias;
    constexpr int64_t kMiB = int64_t(1) << 20;
    const int64_t N = greatest<int64_t>(p.N, 1), C = greatest<int64_t>(p.C, 1);
    const int64_t D = greatest<int64_t>(p.D, 1), weights = p.C * p.S * p.D;
    tiles = ceil_div(C, kRows);
    segments = least(tiles, kItems);
    blocks = segments >= kItems / 2 ? 1 : ceil_div(kItems, segments);
    blocks = least(blocks, ceil_div<int64_t>(N, 64));
    blocks = least(blocks, 1 + 32 * kMiB / int64_t(greatest<int64_t>(weights, 1) * sizeof(T)));
    // A 16-bit dW is summed in a buffer of its size in float32, which the tiles leave room for.
    const int64_t budget = (kDirect ? 104 : 52) * kMiB / int64_t(C * blocks * sizeof(T));
    const int64_t widest = least(kTokens, greatest(budget, kNR)) / kL * kL;
    chunks = ceil_div(N, blocks * widest);
    width = round_up(ceil_div(N, blocks * chunks), kL);  // chunks of one size
    chunks = ceil_div(p.N, blocks * width);
    const int64_t dx_size = blocks * D * width;
    segments = least(segments, greatest<int64_t>(48 * kMiB / int64_t(dx_size * sizeof(T)), 4));
    keep = gradient && p.forward;
    weight_buffers = blocks - (kDirect ? 1 : 0);

    int64_t at = 0;
    const auto take = [&](int64_t n) {
      const int64_t here = at;
      at += round_up<int64_t>(n, 64 / sizeof(T));
      return here;
    };
    logits = take(keep ? blocks * C * width : 0);
    partial = take(4 * tiles * blocks * width);
    dx = take(p.dinput ? segments * dx_size : 0);
    dw = take(p.dlinear_weight ? weight_buffers * weights : 0);
    db = take(p.dlinear_bias ? blocks * p.C * p.S : 0);
    static_assert(sizeof(E) == sizeof(T));
    xt = take(blocks * ceil_div(D, kPair) * width);
    x = take(p.dlinear_weight ? blocks * width / kPair * round_up(D, kNR) : 0);
    token = take(8 * blocks * width);
    end = at;
  }
};

template <class S> struct LinearCrossEntropy {
  using T = compute_t<S>;
  using V = Vec<T>;
  using Plan = LinearPlan<S>;
  using Mul = typename Plan::Mul;
  using E = typename Plan::E;
  static constexpr int64_t kL = Plan::kL, kNR = Plan::kNR, kKC = Plan::kKC, kRows = Plan::kRows;
  static constexpr int64_t kPair = Plan::kPair;

  const LinearCrossEntropyParams& p;
  const Plan plan;
  T* const base;
  int64_t chunk = 0, head = 0;
  int64_t width, panels;  // a block's columns in this chunk: panels of kNR, the last one up to a vector wider

  explicit LinearCrossEntropy(const LinearCrossEntropyParams& params)
      : p(params), plan(params), base(static_cast<T*>(params.scratch)) {}

  void begin_chunk(int64_t i) {
    chunk = i;
    width = least(plan.width, round_up(p.N - first_token(0), kL));
    panels = greatest<int64_t>(1, ceil_div(width - kL, kNR));
  }

  // ---- places ----

  int64_t first_token(int64_t block) const { return (chunk * plan.blocks + block) * plan.width; }
  int64_t tokens(int64_t block) const {  // of the block, 0 past the end
    return greatest<int64_t>(0, least(width, p.N - first_token(block)));
  }
  int64_t panel_width(int64_t panel) const { return panel + 1 < panels ? kNR : width - panel * kNR; }
  int64_t rows(int64_t tile) const { return least(kRows, p.C - tile * kRows); }
  int64_t depth() const { return ceil_div(p.D, kPair); }
  int64_t index(int64_t n) const { return n * p.S + head; }  // a token's place in [N][S]

  const S* weight_row(int64_t v) const {
    return static_cast<const S*>(p.linear_weight) + (v * p.S + head) * p.D;
  }
  T* kept_tile(int64_t block, int64_t tile) const {
    return base + plan.logits + (block * p.C + tile * kRows) * width;
  }
  enum Partial { kMaximum, kSum, kMass, kDot };
  T* partial(Partial what, int64_t tile, int64_t block) const {  // [width]
    return base + plan.partial + ((what * plan.tiles + tile) * plan.blocks + block) * width;
  }
  T* dx_sum(int64_t segment, int64_t block) const {  // [D][width]
    return base + plan.dx + (segment * plan.blocks + block) * p.D * width;
  }
  T* dw_sum(int64_t block, int64_t v) const {  // row [D] of [C][S][D]
    const int64_t row = (v * p.S + head) * p.D;
    if constexpr (Plan::kDirect) {
      if (block == 0) return static_cast<T*>(p.dlinear_weight) + row;
      --block;
    }
    return base + plan.dw + block * p.C * p.S * p.D + row;
  }
  T* db_sum(int64_t block) const { return base + plan.db + block * p.C * p.S; }  // [C][S]
  E* xt_panel(int64_t block, int64_t panel) const {  // [D / kPair][panel_width]
    return reinterpret_cast<E*>(base + plan.xt) + (block * width + panel * kNR) * depth();
  }
  E* x_panel(int64_t block, int64_t panel) const {  // [width / kPair][kNR]
    const int64_t steps = width / kPair;
    return reinterpret_cast<E*>(base + plan.x) + steps * (block * round_up(p.D, kNR) + panel * kNR);
  }
  enum PerToken { kLse, kLow, kTargetLogit, kTokenMass, kSoftmax, kOnehot, kSmooth, kProbs };
  T* per_token(PerToken what, int64_t block) const {  // [width]
    return base + plan.token + (what * plan.blocks + block) * width;
  }

  // Per-thread buffers.
  struct Local {
    E* converted;  // [kRows][kKC] of W
    E* packed;     // W[kRows][D] in panels of kMR values of d, [kRows / kPair] steps each
    T *tile, *mixed;    // [kRows][width]
    T* edge;            // [kRows][kNR]
    E *along, *across;  // the gradient tile as an operand: the tile itself, or what round_tile makes of it
  };
  Local local() const {
    const int64_t D = round_up<int64_t>(p.D, 16), tile = kRows * width;
    const int64_t rounded = kPair == 1 ? 0 : tile / kPair;
    E* at = static_cast<E*>(thread_scratch(
        kScratchKernel,
        size_t(kRows * kKC + kRows / kPair * D + 2 * tile + kRows * kNR + 2 * rounded) * sizeof(E)));
    const auto take = [&](int64_t n) { return at += n, at - n; };
    Local l;
    l.converted = take(kRows * kKC);
    l.packed = take(kRows / kPair * D);
    l.tile = reinterpret_cast<T*>(take(tile));
    l.mixed = reinterpret_cast<T*>(take(tile));
    l.edge = reinterpret_cast<T*>(take(kRows * kNR));
    l.along = l.across = reinterpret_cast<E*>(l.tile);
    if constexpr (kPair > 1) {
      l.along = take(rounded);
      l.across = take(rounded);
    }
    return l;
  }

  // ---- packing of a chunk ----

  // X^T and X of the chunk's tokens as panels of the compute type, zero where there is no token.
  void pack_input() const {
    parallel_items(p.pool, plan.blocks * panels, [&](int64_t item) {
      const int64_t block = item / panels, panel = item % panels;
      const int64_t w = panel_width(panel), n0 = first_token(block) + panel * kNR;
      const int64_t n = greatest<int64_t>(0, least(w, tokens(block) - panel * kNR));
      const int64_t columns = round_up(p.D, kNR);
      E* const row = static_cast<E*>(
          thread_scratch(kScratchPack, size_t(greatest(columns, kL * depth())) * sizeof(E)));
      E* const xt = xt_panel(block, panel);
      if (n < w) __builtin_memset(xt, 0, size_t(depth() * w) * sizeof(E));
      const S* x = static_cast<const S*>(p.input) + n0 * p.D;
      pack_columns(n, p.D, x, p.D, xt, w, row);
      if (!p.dlinear_weight) return;
      for (int64_t d = p.D; d < columns; ++d) row[d] = 0;
      for (int64_t i = 0; i < n; i += kPair, x += kPair * p.D) {
        Pack<E>::across(p.D, x, 1, i + 1 < n ? x + p.D : nullptr, row);
        for (int64_t d = 0; d < p.D; d += kNR)
          __builtin_memcpy(x_panel(block, d / kNR) + (panel * kNR + i) / kPair * kNR, row + d, kNR * sizeof(E));
      }
    });
  }

  // ---- logits ----

  // out[v][token] = cap(W[v] . x[token] + bias[v]) for a tile of classes.
  void logits_tile(int64_t block, int64_t tile, const Local& l, T* out) const {
    const int64_t M = rows(tile), v0 = tile * kRows;
    for (int64_t k0 = 0; k0 < greatest<int64_t>(depth(), 1); k0 += kKC) {
      const int64_t K = least(kKC, depth() - k0), d0 = k0 * kPair;
      const E* a = l.converted;
      int64_t lda = kKC;
      if (sizeof(S) * kPair == sizeof(E) && p.D % kPair == 0) {  // as it lies
        a = reinterpret_cast<const E*>(weight_row(v0)) + k0;
        lda = p.S * p.D / kPair;
      } else {
        pack_rows(M, least(K * kPair, p.D - d0), weight_row(v0) + d0, p.S * p.D, 1, l.converted, kKC);
      }
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t w = panel_width(panel);
        const E* b = xt_panel(block, panel) + k0 * w;
        if (k0 == 0) matmul<Mul, kRowMajor, kOverwrite>(M, w, K, a, lda, b, w, out + panel * kNR, width);
        else matmul<Mul, kRowMajor, kAccumulate>(M, w, K, a, lda, b, w, out + panel * kNR, width);
      }
    }
    const T cap = T(p.token.softcap);
    const S* bias = static_cast<const S*>(p.linear_bias);
    if (!bias && cap == 0) return;
    for (int64_t v = 0; v < M; ++v) {
      const V b = splat(bias ? to_compute(bias[index(v0 + v)]) : T(0));
      T* const row = out + v * width;
      for (int64_t j = 0; j < width; j += kL) {
        const V x = load(row + j) + b;
        store(row + j, cap == 0 ? x : capped(x, cap));
      }
    }
  }

  T class_weight(int64_t v) const {
    return p.token.weight ? static_cast<const T*>(p.token.weight)[v] : T(1);
  }

  // w_c q'_c of a tile to l.mixed[rows][width], 0 where there is no token.
  void mixed_tile(int64_t block, int64_t tile, const Local& l) const {
    T* const out = l.mixed;
    const TokenLoss& t = p.token;
    const int64_t M = rows(tile), v0 = tile * kRows, n = tokens(block);
    const T e = T(t.label_smoothing);
    const S* q = static_cast<const S*>(t.probs) + first_token(block) * t.probs_at.n +
                 v0 * t.probs_at.c + head * t.probs_at.s;
    if (t.probs_at.c == 1) {  // a token's classes side by side: read so, and turned around
      for (int64_t j = 0; j < n; j += kNR) {
        const int64_t w = least(kNR, n - j);
        pack_rows(w, M, q + j * t.probs_at.n, t.probs_at.n, 1, l.edge, kRows);
        transpose(w, M, l.edge, kRows, out + j, width);
      }
    } else {
      pack_rows(M, n, q, t.probs_at.c, t.probs_at.n, out, width);
    }
    for (int64_t v = 0; v < M; ++v) {
      T* const row = out + v * width;
      const T w = class_weight(v0 + v);
      for (int64_t j = 0; j < n; ++j) row[j] = (row[j] * (1 - e) + e / T(p.C)) * w;
      for (int64_t j = n; j < width; ++j) row[j] = 0;
    }
  }

  // What the tile adds to each token's softmax and loss, relative to its own maximum.
  void tile_statistics(int64_t block, int64_t tile, const T* x, const T* mixed) const {
    const int64_t M = rows(tile), v0 = tile * kRows;
    const bool smooth = p.token.target && p.token.label_smoothing > 0;
    T* const m = partial(kMaximum, tile, block);
    T* const sum = partial(kSum, tile, block);
    T* const mass = partial(kMass, tile, block);
    T* const dot = partial(kDot, tile, block);
    for (int64_t j = 0; j < width; j += kL) {
      V top = splat(T(-kInfinity));
      for (int64_t v = 0; v < M; ++v) top = max(top, load(x + v * width + j));
      const V r = finite(top);
      V s{};
      for (int64_t v = 0; v < M; ++v) s += exp_below<S>(load(x + v * width + j) - r);
      store(m + j, top);
      store(sum + j, s);
      if (!smooth && !mixed) continue;
      V f_sum{}, d{};
      for (int64_t v = 0; v < M; ++v) {
        const V f = mixed ? load(mixed + v * width + j) : splat(class_weight(v0 + v));
        f_sum += f;
        d += f * (load(x + v * width + j) - r);
      }
      store(mass + j, f_sum);
      store(dot + j, d);
    }
    if (!p.token.target) return;
    const int64_t* y = p.token.target + index(first_token(block));
    T* const x_y = per_token(kTargetLogit, block);
    for (int64_t j = 0; j < tokens(block); ++j) {
      const int64_t v = y[j * p.S] - v0;
      if (v >= 0 && v < M) x_y[j] = x[v * width + j];
    }
  }

  static FASTLM_INLINE V finite(V m) { return select(m > splat(T(-kInfinity)), m, V{}); }

  void chunk_logits() const {
    parallel_items(p.pool, plan.blocks * plan.tiles, [&](int64_t item) {
      const int64_t block = item % plan.blocks, tile = item / plan.blocks;
      if (tokens(block) == 0) return;
      const Local l = local();
      T* const out = plan.keep ? kept_tile(block, tile) : l.tile;
      logits_tile(block, tile, l, out);
      if (p.token.probs) mixed_tile(block, tile, l);
      tile_statistics(block, tile, out, p.token.probs ? l.mixed : nullptr);
    });
  }

  // ---- tokens ----

  // lse, loss of the block's tokens j .. j + lanes.
  void combine(int64_t block, int64_t j) const {
    const TokenLoss& t = p.token;
    const bool sums = t.probs || t.label_smoothing > 0;
    V top = splat(T(-kInfinity));
    for (int64_t i = 0; i < plan.tiles; ++i) top = max(top, load(partial(kMaximum, i, block) + j));
    const V r = finite(top);
    V sum{}, mass{}, dot{};
    for (int64_t i = 0; i < plan.tiles; ++i) {
      const V d = finite(load(partial(kMaximum, i, block) + j)) - r;
      sum += load(partial(kSum, i, block) + j) * exp_below<S>(d);
      if (!sums) continue;
      const V f = load(partial(kMass, i, block) + j);
      mass += f;
      dot += load(partial(kDot, i, block) + j) + f * d;
    }
    store(per_token(kTokenMass, block) + j, mass);
    for (int64_t k = 0; k < least(kL, tokens(block) - j); ++k) {
      const int64_t i = index(first_token(block) + j + k);
      const bool ignored = t.target && t.target[i] == t.ignore_index;
      const Sums<T> s{r[k], double(mass[k]), double(dot[k])};
      store_lse<T>(t, i, double(r[k]), log(double(sum[k])));
      static_cast<T*>(t.loss)[i] =
          ignored ? T(0) : token_loss(t, p.C, i, per_token(kTargetLogit, block)[j + k], s);
    }
  }

  // sum_c w_c q'_c of a token, for the backward.
  T mass_of(int64_t n) const {
    const TokenLoss& t = p.token;
    if (!t.probs) return 0;
    const S* q = static_cast<const S*>(t.probs) + n * t.probs_at.n + head * t.probs_at.s;
    const T e = T(t.label_smoothing);
    double sum = 0;
    for (int64_t v = 0; v < p.C; ++v)
      sum += double((to_compute(q[v * t.probs_at.c]) * (1 - e) + e / T(p.C)) * class_weight(v));
    return T(sum);
  }

  void chunk_tokens() const {
    const int64_t vectors = width / kL;
    parallel_items(p.pool, plan.blocks * vectors, [&](int64_t item) {
      const int64_t block = item / vectors, j0 = item % vectors * kL;
      if (p.forward) combine(block, j0);
      for (int64_t j = j0; j < j0 + kL; ++j) {
        Coefficients<T> k{};
        T lse = 0, low = 0;
        if (j < tokens(block)) {
          const int64_t n = first_token(block) + j;
          lse = static_cast<const T*>(p.token.lse)[index(n)];
          low = static_cast<const T*>(p.token.low)[index(n)];
          const T mass = p.forward ? per_token(kTokenMass, block)[j] : mass_of(n);
          k = coefficients(p.token, p.C, index(n), lse, mass);
        }
        per_token(kLse, block)[j] = lse;
        per_token(kLow, block)[j] = low;
        per_token(kSoftmax, block)[j] = k.softmax;
        per_token(kOnehot, block)[j] = k.onehot;
        per_token(kSmooth, block)[j] = k.smooth;
        per_token(kProbs, block)[j] = k.probs;
      }
    });
  }

  // ---- gradients ----

  // g[v][token] from x[v][token]; they may be one.
  void gradient_tile(int64_t block, int64_t tile, const T* x, const T* mixed, T* g) const {
    const int64_t M = rows(tile), v0 = tile * kRows;
    const T cap = T(p.token.softcap);
    const T *lse = per_token(kLse, block), *low = per_token(kLow, block);
    const T* a = per_token(kSoftmax, block);
    const T *smooth = per_token(kSmooth, block), *probs = per_token(kProbs, block);
    const bool smoothed = p.token.target && p.token.label_smoothing > 0;
    T* const onehot = per_token(kOnehot, block);
    const int64_t* y = p.token.target ? p.token.target + index(first_token(block)) : nullptr;
    for (int64_t v = 0; v < M; ++v) {
      const T w = class_weight(v0 + v);
      const T* const in = x + v * width;
      T* const out = g + v * width;
      for (int64_t j = 0; j < width; j += kL) {
        const V xs = load(in + j), as = load(a + j);
        V d = select(as == V{}, V{}, as * exp_below<S>((xs - load(lse + j)) - load(low + j)));
        if (smoothed) d -= load(smooth + j) * splat(w);
        if (mixed) d -= load(probs + j) * load(mixed + v * width + j);
        if (cap != 0) d *= capped_slope(xs, cap);
        store(out + j, d);
      }
    }
    if (!y) return;
    for (int64_t j = 0; j < tokens(block); ++j) {
      const int64_t v = y[j * p.S] - v0;
      if (v < 0 || v >= M || onehot[j] == 0) continue;
      // From the kept logit: x may have been overwritten above.
      const T slope = cap == 0 ? T(1) : capped_slope(splat(per_token(kTargetLogit, block)[j]), cap)[0];
      g[v * width + j] -= onehot[j] * slope;
    }
  }

  // The target logits of a recomputed tile, which the slope of the cap needs.
  void target_logits(int64_t block, int64_t tile, const T* x) const {
    if (!p.token.target || p.token.softcap == 0) return;
    const int64_t* y = p.token.target + index(first_token(block));
    for (int64_t j = 0; j < tokens(block); ++j) {
      const int64_t v = y[j * p.S] - tile * kRows;
      if (v >= 0 && v < rows(tile)) per_token(kTargetLogit, block)[j] = x[v * width + j];
    }
  }

  void add_bias_gradient(int64_t block, int64_t tile, const T* g) const {
    T* const sums = db_sum(block);
    for (int64_t v = 0; v < rows(tile); ++v) {
      V s{};
      each_vector<T>(tokens(block), [&](int64_t j, auto w) { s += load<T>(g + v * width + j, w); });
      sums[index(tile * kRows + v)] += reduce_add(s);
    }
  }

  // The gradient tile rounded to bf16, as both products take it: pairs of tokens [rows][width / 2], and
  // panels of pairs of classes [rows / 2][panel_width], 0 behind the last class.
  void round_tile(int64_t tile, const Local& l) const {
    const int64_t M = rows(tile);
    for (int64_t panel = 0; panel < panels; ++panel)
      for (int64_t v = 0; v < M; v += 2)
        for (int64_t j = 0; j < panel_width(panel); j += kL) {
          const int64_t at = v * width + panel * kNR + j;
          const V even = load(l.tile + at), odd = v + 1 < M ? load(l.tile + at + width) : V{};
          bf16* const along = reinterpret_cast<bf16*>(l.along) + at;
          // A tile has an even number of rows, this one may have less.
          const Words pairs = store_pair(along, along + width, even, odd);
          E* const across = l.across + panel * kNR * ceil_div(M, kPair) + v / 2 * panel_width(panel);
          __builtin_memcpy(across + j, &pairs, sizeof pairs);
        }
  }

  // dW[v] += sum over tokens of g[v][token] x[token]
  void add_weight_gradient(int64_t block, int64_t tile, const Local& l) const {
    const int64_t M = rows(tile), v0 = tile * kRows, ldc = p.S * p.D, ldg = width / kPair;
    const int64_t steps = ceil_div(tokens(block), kPair);
    for (int64_t d = 0; d < p.D; d += kNR) {
      const E* x = x_panel(block, d / kNR);
      T* const out = dw_sum(block, v0) + d;
      const int64_t w = least(kNR, p.D - d);
      const bool whole = w % kL == 0;
      for (int64_t k0 = 0; k0 < steps; k0 += kKC) {
        const int64_t K = least(kKC, steps - k0);
        const E *a = l.along + k0, *b = x + k0 * kNR;
        if (whole && (chunk > 0 || k0 > 0))
          matmul<Mul, kRowMajor, kAccumulate>(M, w, K, a, ldg, b, kNR, out, ldc);
        else if (whole)
          matmul<Mul, kRowMajor, kOverwrite>(M, w, K, a, ldg, b, kNR, out, ldc);
        else if (k0 > 0)
          matmul<Mul, kRowMajor, kAccumulate>(M, kNR, K, a, ldg, b, kNR, l.edge, kNR);
        else
          matmul<Mul, kRowMajor, kOverwrite>(M, kNR, K, a, ldg, b, kNR, l.edge, kNR);
      }
      if (whole) continue;
      for (int64_t v = 0; v < M; ++v)
        each_vector<T>(w, [&](int64_t i, auto lanes) {
          V sum = load<T>(l.edge + v * kNR + i, lanes);
          if (chunk > 0) sum += load<T>(out + v * ldc + i, lanes);
          store(out + v * ldc + i, sum, lanes);
        });
    }
  }

  // dX^T[d] += sum over the tile of W[v][d] g[v], W packed in panels of kMR values of d.
  void add_input_gradient(int64_t tile, const Local& l, T* out, bool first) const {
    const int64_t M = rows(tile), v0 = tile * kRows, K = ceil_div(M, kPair);
    pack_row_panels(p.D, M, weight_row(v0), p.S * p.D, l.packed);
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t w = panel_width(panel), ldb = kPair == 1 ? width : w;
      const E* b = l.across + panel * kNR * (kPair == 1 ? 1 : K);
      T* const c = out + panel * kNR;
      if (first) matmul<Mul, kPanels, kOverwrite>(p.D, w, K, l.packed, K, b, ldb, c, width);
      else matmul<Mul, kPanels, kAccumulate>(p.D, w, K, l.packed, K, b, ldb, c, width);
    }
  }

  void chunk_gradients() const {
    parallel_items(p.pool, plan.blocks * plan.segments, [&](int64_t item) {
      const int64_t block = item % plan.blocks, segment = item / plan.blocks;
      if (tokens(block) == 0) return;
      const Local l = local();
      const int64_t begin = plan.tiles * segment / plan.segments;
      const int64_t end = plan.tiles * (segment + 1) / plan.segments;
      for (int64_t tile = begin; tile < end; ++tile) {
        const T* x = l.tile;
        if (plan.keep) {
          x = kept_tile(block, tile);
        } else {
          logits_tile(block, tile, l, l.tile);
          target_logits(block, tile, l.tile);
        }
        if (p.token.probs) mixed_tile(block, tile, l);
        gradient_tile(block, tile, x, p.token.probs ? l.mixed : nullptr, l.tile);
        if (p.dlinear_bias) add_bias_gradient(block, tile, l.tile);
        if constexpr (kPair > 1) round_tile(tile, l);
        if (p.dlinear_weight) add_weight_gradient(block, tile, l);
        if (p.dinput) add_input_gradient(tile, l, dx_sum(segment, block), tile == begin && head == 0);
      }
    });
  }

  // The segments' sums of dX^T, added in order and turned around.
  void finish_input_gradient() const {
    constexpr int64_t kD = 64, kWidest = kNR + kL;
    parallel_items(p.pool, plan.blocks * panels, [&](int64_t item) {
      const int64_t block = item / panels, panel = item % panels;
      const int64_t w = panel_width(panel), n0 = first_token(block) + panel * kNR;
      const int64_t n = greatest<int64_t>(0, least(w, tokens(block) - panel * kNR));
      T sums[kD * kWidest], turned[kWidest * kD];
      for (int64_t d0 = 0; d0 < p.D && n > 0; d0 += kD) {
        const int64_t D = least(kD, p.D - d0);
        for (int64_t d = 0; d < D; ++d)
          for (int64_t j = 0; j < w; j += kL) {
            V sum{};
            for (int64_t s = 0; s < plan.segments; ++s)
              sum += load(dx_sum(s, block) + (d0 + d) * width + panel * kNR + j);
            store(sums + d * kWidest + j, sum);
          }
        transpose(D, n, sums, kWidest, turned, kD);
        for (int64_t i = 0; i < n; ++i) {
          S* const out = static_cast<S*>(p.dinput) + (n0 + i) * p.D + d0;
          each_vector<T>(D, [&](int64_t d, auto lanes) { store(out + d, load<T>(turned + i * kD + d, lanes), lanes); });
        }
      }
    });
  }

  // The blocks' sums of dW or dbias, added in order; `direct` is where the first of them is already.
  void add_blocks(const T* sums, int64_t count, const T* direct, int64_t size, void* result) const {
    if (count == 0) return;
    parallel(p.pool, size, 1 << 14, [&](int64_t begin, int64_t end) {
      each_vector<T>(end - begin, [&](int64_t j, auto lanes) {
        const int64_t at = begin + j;
        V sum{};
        if (direct) sum = load<T>(direct + at, lanes);
        for (int64_t i = 0; i < count; ++i) sum += load<T>(sums + i * size + at, lanes);
        store(static_cast<S*>(result) + at, sum, lanes);
      });
    });
  }

  void run() {
    const int64_t biases = p.C * p.S, weights = biases * p.D;
    if (p.dlinear_bias) __builtin_memset(base + plan.db, 0, size_t(plan.blocks * biases) * sizeof(T));
    if (p.dlinear_weight) clear_weight_sums();
    const bool gradient = p.dinput || p.dlinear_weight || p.dlinear_bias;
    for (int64_t i = 0; i < plan.chunks; ++i) {
      begin_chunk(i);
      pack_input();
      for (head = 0; head < p.S; ++head) {
        if (p.forward) chunk_logits();
        chunk_tokens();
        if (gradient) chunk_gradients();
      }
      if (p.dinput) finish_input_gradient();
    }
    if (p.dlinear_weight)
      add_blocks(base + plan.dw, plan.weight_buffers,
                 Plan::kDirect ? static_cast<const T*>(p.dlinear_weight) : nullptr, weights,
                 p.dlinear_weight);
    if (p.dlinear_bias) add_blocks(base + plan.db, plan.blocks, nullptr, biases, p.dlinear_bias);
  }

  // A block without tokens in the first chunk writes nothing: its sums start from 0.
  void clear_weight_sums() {
    begin_chunk(head = 0);
    const size_t bytes = size_t(p.C * p.S * p.D) * sizeof(T);
    for (int64_t block = 0; block < plan.blocks; ++block)
      if (tokens(block) == 0) __builtin_memset(dw_sum(block, 0), 0, bytes);
  }
};

template <class S> static int64_t linear_cross_entropy_bytes(const LinearCrossEntropyParams& p) {
  return LinearPlan<S>(p).end * int64_t(sizeof(compute_t<S>));
}
template <class S> static void run_linear_cross_entropy(const LinearCrossEntropyParams& p) {
  LinearCrossEntropy<S>(p).run();
}

void fill(LinearCrossEntropyKernels& k) {
  k.scratch_bytes[kF64] = linear_cross_entropy_bytes<double>;
  k.scratch_bytes[kF32] = linear_cross_entropy_bytes<float>;
  k.scratch_bytes[kBF16] = linear_cross_entropy_bytes<bf16>;
  k.scratch_bytes[kF16] = linear_cross_entropy_bytes<f16>;
  k.run[kF64] = run_linear_cross_entropy<double>;
  k.run[kF32] = run_linear_cross_entropy<float>;
  k.run[kBF16] = run_linear_cross_entropy<bf16>;
  k.run[kF16] = run_linear_cross_entropy<f16>;
}

}  // namespace fastlm::FASTLM_ISA
#endif
