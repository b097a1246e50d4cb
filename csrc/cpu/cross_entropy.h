// Softmax cross-entropy over logits x[N][C][S] (S: the product of trailing dimensions, often 1):
//
//   lse = log sum_c exp(x_c)      with x capped first:  x <- softcap * tanh(x / softcap)
//   loss = (1 - e) w_y (lse - x_y) + e/C sum_c w_c (lse - x_c) + z lse^2         class index y
//   loss = sum_c w_c q'_c (lse - x_c) + z lse^2,  q' = (1 - e) q + e/C           probabilities q
//   dx_c = a softmax_c - b [c = y] - s w_c - g w_c q'_c     (times 1 - (x_c / softcap)^2)
//
// with the label smoothing e, class weights w, z-loss z and the coefficients a, b, s, g of a token
// (struct Coefficients). One sweep over memory: a block of a row is brought into the first-level
// cache once for its maximum, its sum of exponentials (rescaled online, Milakov and Gimelshein,
// arXiv:1805.02867) and the sums that smoothing or probabilities need; where the upstream gradient
// is known in the forward, the exponentials are kept in the second level, and the gradient is a
// multiple of them, written while the next row is read. The backward otherwise needs x and lse. Two
// layouts: classes contiguous in memory (a row is a token) or positions contiguous (lanes are tokens,
// the softmax is vertical), so that neither (N, T, C).transpose(1, 2) nor an image is transposed. Short
// rows are, in the cache, since lanes that are classes would wait for each token's sum and logarithm.
#pragma once
#include "token_loss.h"

namespace fastlm {

struct CrossEntropyParams {
  Pool pool;
  int64_t N, C, S;
  TokenLoss token;
  const void* input;  // [N][C][S], storage type; c == 1 (rows) or s == 1 (tiles)
  Strides input_at;
  void* dinput;       // [N][C][S] with the same stride 1, or null
  Strides dinput_at;
  void* dprobs;       // [N][C][S], or null
  Strides dprobs_at;
  bool rows;          // classes are contiguous
  bool forward;       // compute lse and loss; otherwise lse is read
};

struct CrossEntropyKernels {
  void (*run[kDTypes])(const CrossEntropyParams&);
};

}  // namespace fastlm

#ifdef FASTLM_ISA
#include "gemm.h"

namespace fastlm::FASTLM_ISA {

// ---- classes contiguous: a row is a token ----

inline constexpr int64_t kBlock = 2048;     // classes in the first-level cache at a time
inline constexpr int64_t kKept = 1 << 20;   // bytes of exponentials to keep at most
// Exponentials are relative to a logit of the blocks before, and a block's are taken again where one is greater than exp
// of this: no sum of 2^20 of those is near a float's largest number.
inline constexpr int kHeadroom = 40;

template <class S> struct Row {
  using T = compute_t<S>;
  using V = Vec<T>;
  const CrossEntropyParams& p;
  const S* x;        // [C]
  const S* q;        // [C], null with class indices; stride probs_at.c
  S* dx;             // [C], or null
  int64_t i;         // place in [N][S]
  T* values;         // [kBlock] scratch
  T* mixed;          // [kBlock] scratch: w_c q'_c
  T* kept;           // [C] exp(x_c - r), r = references[c / kBlock]; or null
  T* references;     // [C / kBlock]

  const T* weight() const { return static_cast<const T*>(p.token.weight); }

  // f(v) with v = x[c0 .. c0+n), capped: x itself, in its own type, where there is no cap.
  template <class F> FASTLM_INLINE auto with_block(int64_t c0, int64_t n, const F& f) const {
    const T cap = T(p.token.softcap);
    if (cap == 0) return f(x + c0);
    each_vector<T>(n, [&](int64_t c, auto w) {
      store(values + c, capped(load<T>(x + c0 + c, w), cap), w);
    });
    return f(static_cast<const T*>(values));
  }

  FASTLM_INLINE T value(int64_t c) const {
    const T v = to_compute(x[c]);
    return p.token.softcap == 0 ? v : capped(splat(v), T(p.token.softcap))[0];
  }

  // w_c q'_c for the block.
  const T* mixed_block(int64_t c0, int64_t n) const {
    const T e = T(p.token.label_smoothing), uniform = e / T(p.C);
    if (p.token.probs_at.c == 1)
      each_vector<T>(n, [&](int64_t c, auto w) {
        Vec<T> v = load<T>(q + c0 + c, w);
        if (e > 0) v = v * splat(1 - e) + splat(uniform);
        if (weight()) v *= load<T>(weight() + c0 + c, w);
        store(mixed + c, v, w);
      });
    else
      for (int64_t c = 0; c < n; ++c) {
        T v = to_compute(q[(c0 + c) * p.token.probs_at.c]);
        if (e > 0) v = v * (1 - e) + uniform;
        mixed[c] = weight() ? v * weight()[c0 + c] : v;
      }
    return mixed;
  }

  // sum_c f_c (x_c - r) and sum_c f_c; f null: 1.
  template <class X> FASTLM_INLINE void add_sums(const X* v, const T* f, int64_t n, Sums<T>& s) const {
    Vec<T> dot{}, mass{};
    each_vector<T>(n, [&](int64_t c, auto w) {
      const Vec<T> d = fill_rest(load<T>(v + c, w) - splat(s.r), w, T(0));
      const Vec<T> fs = f ? load<T>(f + c, w) : fill_rest(splat(T(1)), w, T(0));
      dot += f ? fs * d : d;
      mass += fs;
    });
    s.dot += double(reduce_add(dot));
    s.mass += double(reduce_add(mass));
  }

  template <class X> FASTLM_INLINE static T block_max(const X* v, int64_t n) {
    constexpr int kL = kLanes<T>;
    Vec<T> m[4];
    for (auto& each : m) each = splat(T(-kInfinity));
    int64_t c = 0;
    for (; c + 4 * kL <= n; c += 4 * kL)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) m[j] = max(m[j], load<T>(v + c + j * kL));
    each_vector<T>(n - c, [&](int64_t j, auto w) {
      m[0] = max(m[0], fill_rest(load<T>(v + c + j, w), w, T(-kInfinity)));
    });
    return reduce_max(max(max(m[0], m[1]), max(m[2], m[3])));
  }

  // The sum of exp(v_c - r), each of which `keep` sees, and the maximum of v.
  struct Block { double sum; T max; };
  template <class X, class Keep>
  FASTLM_INLINE static Block exponentials(const X* v, int64_t n, T r, const Keep& keep) {
    V sum{}, m = splat(T(-kInfinity));
    each_vector<T>(n, [&](int64_t c, auto w) {
      const V each = load<T>(v + c, w), e = exp_below<S>(each - splat(r));
      keep(c, e, w);
      m = max(m, fill_rest(each, w, T(-kInfinity)));
      sum += fill_rest(e, w, T(0));
    });
    return {double(reduce_add(sum)), reduce_max(m)};
  }

  // The loss, and sum_c w_c q'_c. before(c0) gives the lines to write beside the exponentials of the block from c0 on.
  template <class Before> T forward(const Before& before) const {
    const TokenLoss& t = p.token;
    const bool ignored = t.target && t.target[i] == t.ignore_index;
    T& loss = static_cast<T*>(t.loss)[i];
    if (ignored && !t.lse_everywhere)
      return loss = static_cast<T*>(t.lse)[i] = static_cast<T*>(t.low)[i] = T(0);
    const bool smooth = t.target && t.label_smoothing > 0;
    T m = T(-kInfinity), r = 0;  // the maximum so far, and what exponentials are relative to
    double sum = 0;
    Sums<T> sums{};
    for (int64_t c0 = 0; c0 < p.C; c0 += kBlock) {
      const int64_t n = least(kBlock, p.C - c0);
      Lines lines = before(c0);
      with_block(c0, n, [&](const auto* v) {
        // Before a maximum is known, the first logit will do.
        if (m == T(-kInfinity)) {
          r = to_compute(v[0]);
          if (!(r > T(-kInfinity))) r = finite_max(block_max(v, n));
        }
        const auto relative = [&] {
          // The memory works on the block after meanwhile: for the second level, where the first is to keep.
          const auto* const next = v + n;
          if (!kept) return exponentials(v, n, r, [next](int64_t c, V, auto) { __builtin_prefetch(next + c); });
          return exponentials(v, n, r, [next, lines, to = kept + c0](int64_t c, V e, auto w) FASTLM_INLINED {
            lines.write(c);
            __builtin_prefetch(next + c, 0, 2);
            store(to + c, e, w);
          });
        };
        Block block = relative();
        if (block.max > r + kHeadroom) {
          const T before = r;
          r = finite_max(block.max);
          // 0 before the first block, where the factor of logits far below 0 is infinite
          if (sum != 0) sum *= double(exp(splat(before - r))[0]);
          lines = {};
          block = relative();
        }
        m = greatest(m, block.max);
        if (c0 == 0) sums.r = m > T(-kInfinity) && m < T(kInfinity) ? m : T(0);
        sum += block.sum;
        if (kept) references[c0 / kBlock] = m > T(-kInfinity) ? r : m;
        if (smooth) add_sums(v, weight() ? weight() + c0 : nullptr, n, sums);
        if (q) add_sums(v, mixed_block(c0, n), n, sums);
      });
    }
    store_lse<T>(t, i, double(r), log(sum));
    loss = ignored ? T(0) : token_loss(t, p.C, i, t.target ? value(t.target[i]) : T(0), sums);
    return T(sums.mass);
  }

  T mass() const {
    if (!q) return T(0);
    Sums<T> sums{};
    for (int64_t c0 = 0; c0 < p.C; c0 += kBlock) {
      const int64_t n = least(kBlock, p.C - c0);
      const T* f = mixed_block(c0, n);
      Vec<T> s{};
      each_vector<T>(n, [&](int64_t c, auto w) { s += load<T>(f + c, w); });
      sums.mass += double(reduce_add(s));
    }
    return T(sums.mass);
  }

  T lse() const { return static_cast<const T*>(p.token.lse)[i]; }
  T low() const { return static_cast<const T*>(p.token.low)[i]; }

  // dx of the target, where there is one, after its block.
  void gradient_of_target(const Coefficients<T>& k) const {
    if (k.y < 0) return;
    const T cap = T(p.token.softcap);
    T d = k.softmax * exp(splat((value(k.y) - lse()) - low()))[0] - k.onehot;
    if (k.smooth != 0) d -= k.smooth * (weight() ? weight()[k.y] : T(1));
    if (cap != 0) d *= capped_slope(splat(value(k.y)), cap)[0];
    dx[k.y] = from_compute<S>(d);
  }

  // Too large for the caches: written in whole lines, without reading them first. Of short rows, whose first and last
  // line are written in two parts each, that takes twice as long.
  FASTLM_INLINE bool streams() const {
    const int64_t row = p.C * int64_t(sizeof(S));
    return row >= 2048 && p.N * p.S * row > (int64_t(8) << 20);
  }
  static constexpr int64_t kLine = kVectorBytes / int64_t(sizeof(S));  // classes in one such store
  struct Span { int64_t begin, end; };
  FASTLM_INLINE Span whole_lines(const S* to, int64_t n) const {
    if (!streams()) return {n, n};
    const size_t to_line = (kVectorBytes - reinterpret_cast<uintptr_t>(to) % kVectorBytes) % kVectorBytes;
    const int64_t begin = least(n, int64_t(to_line / sizeof(S)));
    return {begin, begin + (n - begin) / kLine * kLine};
  }
  template <class D> FASTLM_INLINE static void write_line(S* to, int64_t c, const D& d) {
    if constexpr (kLine == kLanes<T>) stream(to + c, d(c, Whole{}));
    else stream(to + c, d(c, Whole{}), d(c + kLanes<T>, Whole{}));
  }
  template <class D> FASTLM_INLINE static void write_edges(S* to, int64_t n, Span lines, const D& d) {
    each_vector<T>(lines.begin, [&](int64_t c, auto w) { store(to + c, d(c, w), w); });
    each_vector<T>(n - lines.end, [&](int64_t c, auto w) { store(to + lines.end + c, d(lines.end + c, w), w); });
  }

  // to_c = d(c), c < n.
  template <class D> FASTLM_INLINE void write(S* to, int64_t n, const D& d) const {
    const Span lines = whole_lines(to, n);
    write_edges(to, n, lines, d);
    for (int64_t c = lines.begin; c < lines.end; c += kLine) write_line(to, c, d);
  }

  // A block's gradient where exponentials are kept: these times a factor.
  struct Multiple {
    const T* e;
    V factor;
    template <class W> FASTLM_INLINE V operator()(int64_t c, W w) const { return load<T>(e + c, w) * factor; }
  };
  // Its whole lines. One by one beside the next row's exponentials, which take the place of these, they cost nothing;
  // all at once they wait for memory. write(c) reads exponentials from c on alone.
  struct Lines {
    S* to = nullptr;
    int64_t count = 0;  // of classes
    Multiple d{};
    FASTLM_INLINE void write(int64_t c) const {
      if (c % kLine == 0 && c < count) write_line(to, c, d);
    }
  };

  // dx of the block from c0 on, but for the lines that are returned.
  Lines gradient_block(const Coefficients<T>& k, int64_t c0) const {
    const int64_t n = least(kBlock, p.C - c0);
    const T lse = this->lse(), low = this->low();
    S* const to = dx + c0;
    if (k.softmax == 0 && k.onehot == 0 && k.smooth == 0 && k.probs == 0) {
      each_vector<T>(n, [&](int64_t c, auto w) { store(to + c, V{}, w); });
    } else if (k.smooth != 0 || k.probs != 0 || p.token.softcap != 0) {
      with_block(c0, n, [&](const auto* v) { general_block(to, c0, v, n, k); });
    } else if (kept) {
      const Multiple d{kept + c0, splat(k.softmax * exp(splat((references[c0 / kBlock] - lse) - low))[0])};
      const Span lines = whole_lines(to, n);
      write_edges(to, n, lines, d);
      return {to + lines.begin, lines.end - lines.begin, {d.e + lines.begin, d.factor}};
    } else {
      write(to, n, [&](int64_t c, auto w) { return softmax(load<T>(x + c0 + c, w), k.softmax, lse, low); });
    }
    return {};
  }

  FASTLM_INLINE static V softmax(V x, T a, T lse, T low) {
    return splat(a) * exp_below<S>((x - splat(lse)) - splat(low));
  }

  template <class X>
  void general_block(S* to, int64_t c0, const X* v, int64_t n, const Coefficients<T>& k) const {
    const T cap = T(p.token.softcap), lse = this->lse(), low = this->low();
    const T* f = k.probs != 0 ? mixed_block(c0, n) : k.smooth != 0 && weight() ? weight() + c0 : nullptr;
    const T scale = k.probs != 0 ? k.probs : k.smooth;
    write(to, n, [&](int64_t c, auto w) {
      const V xs = load<T>(v + c, w);
      V d = softmax(xs, k.softmax, lse, low);
      d -= f ? splat(scale) * load<T>(f + c, w) : splat(scale);
      if (cap != 0) d *= capped_slope(xs, cap);
      return d;
    });
  }

  // dq_c = g (1 - e) w_c (lse - x_c)
  void probability_gradient(S* dq) const {
    const TokenLoss& t = p.token;
    const T lse = this->lse(), low = this->low();
    const T g = coefficients(t, p.C, i, lse, T(0)).probs * T(1 - t.label_smoothing);
    for (int64_t c0 = 0; c0 < p.C; c0 += kBlock) {
      const int64_t n = least(kBlock, p.C - c0);
      with_block(c0, n, [&](const auto* v) {
        each_vector<T>(n, [&](int64_t c, auto w) {
          Vec<T> d = splat(g) * ((splat(lse) - load<T>(v + c, w)) + splat(low));
          if (weight()) d *= load<T>(weight() + c0 + c, w);
          if (p.dprobs_at.c == 1) store(dq + c0 + c, d, w);
          else store(mixed + c, d, w);
        });
      });
      if (p.dprobs_at.c != 1)
        for (int64_t c = 0; c < n; ++c) dq[(c0 + c) * p.dprobs_at.c] = from_compute<S>(mixed[c]);
    }
  }
};

template <class S> static void run_rows(const CrossEntropyParams& p) {
  using T = compute_t<S>;
  const TokenLoss& t = p.token;
  const int64_t grain = greatest<int64_t>(1, 16384 / greatest<int64_t>(p.C, 1));
  parallel(p.pool, p.N * p.S, grain, [&](int64_t begin, int64_t end) {
    const int64_t kept = p.forward && p.dinput && p.C * int64_t(sizeof(T)) <= kKept ? p.C : 0;
    const int64_t numbers = 2 * kBlock + round_up<int64_t>(kept, kLanes<T>) + kept / kBlock + 1;
    T* const scratch = static_cast<T*>(thread_scratch(kScratchKernel, size_t(numbers) * sizeof(T)));
    T* const exponentials = scratch + 2 * kBlock;
    const auto row_at = [&](int64_t i) {
      const int64_t n = p.S == 1 ? i : i / p.S, s = i - n * p.S;
      S* const dx = static_cast<S*>(p.dinput);
      return Row<S>{p, static_cast<const S*>(p.input) + n * p.input_at.n + s * p.input_at.s,
                    t.probs ? static_cast<const S*>(t.probs) + n * t.probs_at.n + s * t.probs_at.s : nullptr,
                    dx ? dx + n * p.dinput_at.n + s * p.dinput_at.s : nullptr, i, scratch, scratch + kBlock,
                    kept ? exponentials : nullptr, exponentials + round_up<int64_t>(kept, kLanes<T>)};
    };
    // The last row's gradient is written block by block, as the exponentials of this one take the place of its own.
    int64_t last = -1, written = 0;  // -1: none is left to write; classes of it
    Coefficients<T> k{};
    const auto begin_block = [&](int64_t c0) {
      if (last < 0) return typename Row<S>::Lines{};
      written = c0 + kBlock;
      return row_at(last).gradient_block(k, c0);
    };
    const auto finish = [&] {
      if (last < 0) return;
      while (written < p.C) {
        const auto lines = begin_block(written);
        for (int64_t c = 0; c < lines.count; c += Row<S>::kLine) lines.write(c);
      }
      row_at(last).gradient_of_target(k);
      last = -1;
    };
    for (int64_t i = begin; i < end; ++i) {
      const Row<S> row = row_at(i);
      const T mass = p.forward ? row.forward(begin_block) : row.mass();
      finish();
      if (row.dx) k = coefficients(t, p.C, i, row.lse(), mass), last = i, written = 0;
      if (p.dprobs)
        row.probability_gradient(static_cast<S*>(p.dprobs) + i / p.S * p.dprobs_at.n + i % p.S * p.dprobs_at.s);
    }
    finish();
    stream_end();
  });
}

// ---- positions contiguous, or short rows: lanes are tokens ----

// A tile is kTileVecs vectors of positions of one n, or of rows; classes go by in blocks.
inline constexpr int kTileVecs = 4;
inline constexpr int64_t kClassBlock = 32;
inline constexpr int64_t kShortRow = 32;  // classes
static_assert(kShortRow <= kClassBlock, "rows without a gap are read and written as one");

FASTLM_INLINE bool has_short_rows(const CrossEntropyParams& p) {
  return p.rows && p.C <= kShortRow && p.S == 1 && p.token.target;
}

template <class S> struct Tile {
  using T = compute_t<S>;
  using V = Vec<T>;
  static constexpr int kL = kLanes<T>;
  static constexpr int64_t kWidth = kTileVecs * kL;
  const CrossEntropyParams& p;
  const S* x;     // x(c, j) at x[c * input_at.c + j], or of short rows at x[j * input_at.n + c]
  const S* q;     // q(c, j) at q[c * probs_at.c + j * probs_at.s], or null
  int64_t i;      // of the first position
  int64_t width;  // 1 .. kWidth
  T* values;      // [kClassBlock][kWidth]
  T* mixed;       // [kClassBlock][kWidth]

  template <class F> FASTLM_INLINE void each(const F& f) const { each_vector<T>(width, f); }

  // The rows' classes from c0 on, as [n][kWidth].
  void take_rows(int64_t c0, int64_t n) const {
    const int64_t ld = p.input_at.n;
    if constexpr (kSame<S, T>) {
      transpose(width, n, x + c0, ld, values, kWidth);
    } else {
      if (ld == n) convert_row(width * n, x, 1, mixed);
      else
        for (int64_t j = 0; j < width; ++j) convert_row(n, x + j * ld + c0, 1, mixed + j * n);
      transpose(width, n, mixed, n, values, kWidth);
    }
  }
  // The other way.
  void put_rows(S* dx, int64_t c0, int64_t n) const {
    const int64_t ld = p.dinput_at.n;
    if constexpr (kSame<S, T>) {
      transpose(n, width, values, kWidth, dx + c0, ld);
    } else {
      const auto put = [](const T* from, int64_t n, S* to) {
        each_vector<T>(n, [&](int64_t c, auto w) { store(to + c, load<T>(from + c, w), w); });
      };
      transpose(n, width, values, kWidth, mixed, n);
      if (ld == n) put(mixed, width * n, dx);
      else
        for (int64_t j = 0; j < width; ++j) put(mixed + j * n, n, dx + j * ld + c0);
    }
  }

  void block(int64_t c0, int64_t n) const {
    if (p.rows)
      take_rows(c0, n);
    else
      for (int64_t c = 0; c < n; ++c)
        each([&](int64_t j, auto w) { store(values + c * kWidth + j, load<T>(x + (c0 + c) * p.input_at.c + j, w)); });
    const T cap = T(p.token.softcap);
    if (cap == 0) return;
    for (int64_t c = 0; c < n; ++c)
      each([&](int64_t j, auto) { store(values + c * kWidth + j, capped(load(values + c * kWidth + j), cap)); });
  }

  T weight(int64_t c) const {
    return p.token.weight ? static_cast<const T*>(p.token.weight)[c] : T(1);
  }

  void mixed_block(int64_t c0, int64_t n) const {
    const T e = T(p.token.label_smoothing);
    for (int64_t c = 0; c < n; ++c)
      for (int64_t j = 0; j < width; ++j) {
        const T v = to_compute(q[(c0 + c) * p.token.probs_at.c + j * p.token.probs_at.s]);
        mixed[c * kWidth + j] = (e > 0 ? v * (1 - e) + e / T(p.C) : v) * weight(c0 + c);
      }
  }

  // Loss and lse of the tile; mass [kWidth] receives sum_c w_c q'_c.
  void forward(T* mass) const {
    const TokenLoss& t = p.token;
    const bool smooth = t.target && t.label_smoothing > 0;
    T m[kWidth], sum[kWidth], r[kWidth], dot[kWidth], x_y[kWidth];
    for (int64_t j = 0; j < kWidth; ++j) {
      m[j] = T(-kInfinity);
      sum[j] = r[j] = dot[j] = mass[j] = x_y[j] = 0;
    }
    for (int64_t c0 = 0; c0 < p.C; c0 += kClassBlock) {
      const int64_t n = least(kClassBlock, p.C - c0);
      block(c0, n);
      if (q) mixed_block(c0, n);
      each([&](int64_t j, auto) {
        V block_m = load(m + j);
        for (int64_t c = 0; c < n; ++c) block_m = max(block_m, load(values + c * kWidth + j));
        const V before = finite(load(m + j)), ms = finite(block_m);
        if (c0 == 0) store(r + j, select(ms < splat(T(kInfinity)), ms, V{}));
        const V old = load(sum + j);
        V s = select(old == V{}, V{}, old * exp_below<S>(before - ms));
        for (int64_t c = 0; c < n; ++c) s += exp_below<S>(load(values + c * kWidth + j) - ms);
        store(m + j, block_m);
        store(sum + j, s);
        if (smooth || q) {
          V d = load(dot + j), total = load(mass + j);
          for (int64_t c = 0; c < n; ++c) {
            const V f = q ? load(mixed + c * kWidth + j) : splat(weight(c0 + c));
            d += f * (load(values + c * kWidth + j) - load(r + j));
            total += f;
          }
          store(dot + j, d);
          store(mass + j, total);
        }
      });
      if (t.target)
        for (int64_t j = 0; j < width; ++j) {
          const int64_t y = t.target[i + j] - c0;
          if (y >= 0 && y < n) x_y[j] = values[y * kWidth + j];
        }
    }
    double log_sum[kWidth];
    for (int64_t j = 0; j < kWidth; ++j) log_sum[j] = double(sum[j]);
    for (int64_t j = 0; j < width; j += kLanes<double>) store(log_sum + j, log(load(log_sum + j)));
    for (int64_t j = 0; j < width; ++j) {
      const bool ignored = t.target && t.target[i + j] == t.ignore_index;
      const Sums<T> sums{r[j], double(mass[j]), double(dot[j])};
      store_lse<T>(t, i + j, double(finite_max(m[j])), log_sum[j]);
      static_cast<T*>(t.loss)[i + j] = ignored ? T(0) : token_loss(t, p.C, i + j, x_y[j], sums);
    }
  }

  static FASTLM_INLINE V finite(V m) { return select(m > splat(T(-kInfinity)), m, V{}); }

  void sum_mass(T* mass) const {
    for (int64_t j = 0; j < kWidth; ++j) mass[j] = 0;
    if (!q) return;
    for (int64_t c0 = 0; c0 < p.C; c0 += kClassBlock) {
      const int64_t n = least(kClassBlock, p.C - c0);
      mixed_block(c0, n);
      for (int64_t c = 0; c < n; ++c)
        for (int64_t j = 0; j < width; ++j) mass[j] += mixed[c * kWidth + j];
    }
  }

  void gradient(S* dx, const T* mass) const {
    const TokenLoss& t = p.token;
    const T cap = T(t.softcap);
    const bool smooth = t.target && t.label_smoothing > 0;
    T lse[kWidth], low[kWidth], a[kWidth], b[kWidth], s[kWidth], g[kWidth];
    int64_t y[kWidth];
    for (int64_t j = 0; j < kWidth; ++j) lse[j] = low[j] = a[j] = b[j] = s[j] = g[j] = 0;
    for (int64_t j = 0; j < width; ++j) {
      lse[j] = static_cast<const T*>(t.lse)[i + j];
      low[j] = static_cast<const T*>(t.low)[i + j];
      const Coefficients<T> k = coefficients(t, p.C, i + j, lse[j], mass[j]);
      a[j] = k.softmax, b[j] = k.onehot, s[j] = k.smooth, g[j] = k.probs, y[j] = k.y;
    }
    for (int64_t c0 = 0; c0 < p.C; c0 += kClassBlock) {
      const int64_t n = least(kClassBlock, p.C - c0);
      block(c0, n);
      if (q) mixed_block(c0, n);
      for (int64_t c = 0; c < n; ++c)
        each([&](int64_t j, auto) {
          T* at = values + c * kWidth + j;
          const V xs = load(at);
          const V as = load(a + j);
          V d = select(as == V{}, V{}, as * exp_below<S>((xs - load(lse + j)) - load(low + j)));
          if (smooth) d -= load(s + j) * splat(weight(c0 + c));
          if (q) d -= load(g + j) * load(mixed + c * kWidth + j);
          if (cap != 0) d *= capped_slope(xs, cap);
          store(at, d);
        });
      for (int64_t j = 0; j < width; ++j)
        if (y[j] >= c0 && y[j] < c0 + n) {
          const int64_t c = y[j] - c0;
          T slope = 1;
          if (cap != 0) {
            const int64_t at = p.rows ? j * p.input_at.n + y[j] : y[j] * p.input_at.c + j;
            const T v = capped(splat(to_compute(x[at])), cap)[0];
            slope = capped_slope(splat(v), cap)[0];
          }
          values[c * kWidth + j] -= b[j] * slope;
        }
      if (p.rows) put_rows(dx, c0, n);
      else
        for (int64_t c = 0; c < n; ++c)
          each([&](int64_t j, auto w) {
            store(dx + (c0 + c) * p.dinput_at.c + j, load(values + c * kWidth + j), w);
          });
    }
  }

  void probability_gradient(S* dq) const {
    const TokenLoss& t = p.token;
    T g[kWidth];
    for (int64_t j = 0; j < width; ++j)
      g[j] = coefficients(t, p.C, i + j, T(0), T(0)).probs * T(1 - t.label_smoothing);
    for (int64_t c0 = 0; c0 < p.C; c0 += kClassBlock) {
      const int64_t n = least(kClassBlock, p.C - c0);
      block(c0, n);
      for (int64_t c = 0; c < n; ++c)
        for (int64_t j = 0; j < width; ++j) {
          const T lse = static_cast<const T*>(t.lse)[i + j];
          const T low = static_cast<const T*>(t.low)[i + j];
          dq[(c0 + c) * p.dprobs_at.c + j * p.dprobs_at.s] =
              from_compute<S>(g[j] * weight(c0 + c) * ((lse - values[c * kWidth + j]) + low));
        }
    }
  }
};

template <class S> static void run_tiles(const CrossEntropyParams& p) {
  using T = compute_t<S>;
  constexpr int64_t kWidth = Tile<S>::kWidth;
  const TokenLoss& t = p.token;
  const int64_t positions = p.rows ? p.N : p.S, tiles = ceil_div(positions, kWidth);
  const int64_t grain = greatest<int64_t>(1, 16384 / greatest<int64_t>(p.C * kWidth, 1));
  // Of the position s, in elements.
  const auto offset = [&](const Strides& at, int64_t n, int64_t s) { return n * at.n + s * (p.rows ? at.n : at.s); };
  parallel(p.pool, (p.rows ? 1 : p.N) * tiles, grain, [&](int64_t begin, int64_t end) {
    constexpr int64_t kValues = kClassBlock * kWidth;
    T* const scratch = static_cast<T*>(thread_scratch(kScratchKernel, 2 * kValues * sizeof(T)));
    T mass[kWidth];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / tiles, s = item % tiles * kWidth;
      const Tile<S> tile{p, static_cast<const S*>(p.input) + offset(p.input_at, n, s),
                         t.probs ? static_cast<const S*>(t.probs) + offset(t.probs_at, n, s) : nullptr, n * p.S + s,
                         least(kWidth, positions - s), scratch, scratch + kValues};
      if (p.forward) tile.forward(mass);
      else tile.sum_mass(mass);
      if (p.dinput) tile.gradient(static_cast<S*>(p.dinput) + offset(p.dinput_at, n, s), mass);
      if (p.dprobs) tile.probability_gradient(static_cast<S*>(p.dprobs) + offset(p.dprobs_at, n, s));
    }
  });
}

template <class S> static void run_cross_entropy(const CrossEntropyParams& p) {
  if (p.rows && !has_short_rows(p)) run_rows<S>(p);
  else run_tiles<S>(p);
}

void fill(CrossEntropyKernels& k) {
  k.run[kF64] = run_cross_entropy<double>;
  k.run[kF32] = run_cross_entropy<float>;
  k.run[kBF16] = run_cross_entropy<bf16>;
  k.run[kF16] = run_cross_entropy<f16>;
}

}  // namespace fastlm::FASTLM_ISA
#endif
