// What a forward call of gru.h has, and its x W + b. That is made in one of three ways: block by block of steps, by
// the threads that go on with them; for one sequence beside the recurrence; or for all rows at once, where there are
// more threads than parts, and with layer norm, which takes whole rows.
#pragma once
#include "few_tokens.h"
#include "gru_recurrence.h"

namespace fastlm::FASTLM_ISA::gru {

inline constexpr double kNormEps = 1e-5;
inline constexpr int64_t kBlockRows = 128;  // whose x W + b are made at a time

// A single step of a few sequences, as in generation: packed weights would be used once.
inline bool is_single(const GruParams& p) { return p.T == 1 && p.B <= kTokens && !p.weights[0].g_hh; }

// Scratch of a forward call. Panels u hold the three gates of units u * lanes ... .
template <class S> struct ForwardSpace {
  using F = compute_t<S>;
  using E = typename Factors<S>::E;
  using R = typename Factors<S>::R;
  Division division;
  int64_t blocks, K, KI, ldh, ldraw;  // K: steps of a sum over H, KI: over I
  int64_t steps, kept;  // of time: whose x W + b are made at once, and are kept
  E* weights;          // [D][blocks][K][3][lanes]
  E* input_weights;    // [D][blocks][KI][3][lanes], or null where x W is made for all steps at once
  E* inputs;           // [D][parts][KI][kRowsBeside] of x, for each part by itself, where x W is made beside h W
  F* state;            // [D][2][B][ldh], h of the step before and of this one
  R* rounded;          // [D][2][B][ldh], the same as factors, where these are rounded
  F* products;         // [D][N or B * kept][3H] x W + b, or null where these lie in the tensor of the gates
  F* raw;              // [D][B][ldraw] h W: in the order of the panels for layer norm, as it is for a single step
  F* bias;             // [D][2][3H + lanes]: b_ih + (b_hr, b_hz, 0), and b_hh for q alone
  F* gain;             // [D][2][3H + lanes]
  int64_t* lengths;    // [B]
  int64_t* bounds;     // [tiles + 1]
  Counter* counters;

  ForwardSpace(const GruParams& p, Arena& arena) {
    blocks = ceil_div<int64_t>(p.H, kLanes<F>);
    K = Factors<S>::steps(p, p.H);
    KI = ceil_div<int64_t>(p.I, Factors<S>::kPair);
    ldh = padded<F>(p.H);
    ldraw = padded<F>(blocks * kPanel<F>);
    division = divide(p, blocks, blocks * K * kPanel<F> * int64_t(sizeof(E)));
    const bool norm = p.weights[0].g_hh, single = is_single(p);
    // By the block where every thread has a part: then what is written is read in the second-level cache.
    const bool by_blocks = !norm && !single && p.D * division.tiles * division.parts >= p.pool.threads;
    // Registers for twice the sums, whole products, and weights of a part that come from the second-level cache: from
    // behind it they take what the product beside them would save.
    const bool beside = by_blocks && kMR == 2 * kBeside && !Factors<S>::kWidens && p.B == 1 &&
                        p.T >= 2 * kRowsBeside && K >= kLongRow && blocks >= kBeside * division.parts &&
                        blocks * (K + KI) * kPanel<F> * int64_t(sizeof(E)) <= 2 * caches().second * division.parts;
    const int64_t tile_rows = ceil_div(p.B, division.tiles);
    steps = beside ? kRowsBeside : greatest<int64_t>(1, kBlockRows / greatest<int64_t>(tile_rows, 1));
    kept = beside ? 2 * steps : steps;
    weights = arena.take<E>(single ? 0 : p.D * blocks * K * kPanel<F>);
    input_weights = by_blocks ? arena.take<E>(p.D * blocks * KI * kPanel<F>) : nullptr;
    inputs = beside ? arena.take<E>(p.D * division.parts * KI * kRowsBeside) : nullptr;
    state = arena.take<F>(p.D * 2 * p.B * ldh);
    rounded = arena.take<R>(Factors<S>::kRounded ? p.D * 2 * p.B * ldh : 0);
    products = arena.take<F>(p.gates ? 0 : p.D * (by_blocks ? p.B * kept : p.N) * 3 * p.H);
    raw = arena.take<F>(norm || single ? p.D * p.B * ldraw : 0);
    bias = arena.take<F>(p.D * 2 * (3 * p.H + kLanes<F>));
    gain = arena.take<F>(norm ? p.D * 2 * (3 * p.H + kLanes<F>) : 0);
    lengths = arena.take<int64_t>(p.B);
    bounds = arena.take<int64_t>(division.tiles + 1);
    counters = arena.take<Counter>(p.D * division.tiles * division.parts * kCounters);
  }
};

template <class S> int64_t forward_workspace(const GruParams& p) {
  Arena arena{nullptr};
  ForwardSpace<S>(p, arena);
  return arena.used;
}

// w[3H][terms] to panel u of [blocks][K][3][lanes], zeros behind the last unit.
template <class S, class E> void pack_gates(int64_t H, int64_t terms, const S* w, int64_t u, E* panels) {
  constexpr int64_t kL = kLanes<E>;
  const int64_t K = ceil_div<int64_t>(terms, Pack<E>::kPair), n = least(kL, H - u * kL);
  E* rows = static_cast<E*>(thread_scratch(kScratchPack, size_t(kL * K) * sizeof(E)));
  E* panel = panels + u * K * kPanel<E>;
  if (n < kL) __builtin_memset(panel, 0, size_t(K * kPanel<E>) * sizeof(E));
  for (int64_t g = 0; g < 3; ++g)
    pack_columns(n, terms, w + (g * H + u * kL) * terms, terms, panel + g * kL, kPanel<E>, rows);
}

template <class S> struct Forward {
  using F = compute_t<S>;
  using E = typename Factors<S>::E;
  using R = typename Factors<S>::R;
  static constexpr bool kRounded = Factors<S>::kRounded;
  static constexpr int64_t kL = kLanes<F>;
  const GruParams& p;
  const ForwardSpace<S>& space;
  int64_t lanes3 = 3 * p.H + kL;  // of bias and gain
  int64_t ldx = p.gates ? 4 * p.H : 3 * p.H;  // of products

  F* state(int64_t d, int64_t s) const { return space.state + (d * 2 + (s & 1)) * p.B * space.ldh; }
  R* factors(int64_t d, int64_t s) const {
    if constexpr (kRounded) return space.rounded + (d * 2 + (s & 1)) * p.B * space.ldh;
    else return state(d, s);
  }
  E* weights(int64_t d) const { return space.weights + d * space.blocks * space.K * kPanel<F>; }
  E* input_weights(int64_t d) const { return space.input_weights + d * space.blocks * space.KI * kPanel<F>; }
  F* bias(int64_t d, int which) const { return space.bias + (d * 2 + which) * lanes3; }
  F* gain(int64_t d, int which) const { return space.gain + (d * 2 + which) * lanes3; }
  F* gates(int64_t d) const { return static_cast<F*>(p.gates) + d * p.N * 4 * p.H; }
  // The gates' memory takes x W + b first, and each value is overwritten by its gate.
  F* products(int64_t d) const {
    if (p.gates) return gates(d);
    return space.products + d * p.N * 3 * p.H;
  }
  // Of the tile's rows at step s.
  F* products(int64_t d, int64_t tile, int64_t s) const {
    const int64_t b = space.bounds[tile];
    if (p.gates || !space.input_weights) return products(d) + (p.offsets[time(d, s)] + b) * ldx;
    const int64_t rows = space.bounds[tile + 1] - b;
    return space.products + ((d * p.B + b) * space.kept + s % space.kept * rows) * ldx;
  }
  F* normed(int64_t d) const { return static_cast<F*>(p.normed) + d * p.N * 6 * p.H; }
  F* rstd(int64_t d) const { return static_cast<F*>(p.rstd) + d * p.N * 2; }
  bool norm() const { return p.weights[0].g_hh; }
  int64_t begin_of(int64_t part) const { return space.blocks * part / space.division.parts; }  // its first panel
  // The time step that the direction d takes as its s-th.
  int64_t time(int64_t d, int64_t s) const { return d ? p.T - 1 - s : s; }

  void pack_weights() const;
  void prepare(int64_t d) const;
  void input_products(int64_t d) const;
  void begin_states(int64_t d) const;
  void end_states(int64_t d) const;
  void step(int64_t d, int64_t tile, int64_t part, int64_t s) const;
  void step_beside(int64_t d, int64_t part, int64_t s) const;
  void step_normed(int64_t d, int64_t tile, int64_t part, int64_t phase) const;
  void input_block(int64_t d, int64_t tile, int64_t part, int64_t s) const;
  template <class Visit> void hidden_products(int64_t d, int64_t b, int64_t rows, int64_t part, int64_t s,
                                              const F* x, const Visit& f) const;
  void make_gates(int64_t d, int64_t row, int64_t rows, int64_t u, int64_t units, const F* x, F* c, int64_t b,
                  int64_t s) const;
  void single_step(int64_t d) const;
  void recurrence() const;
  void run() const;
};

// Those of all directions at once: a thread gets the panels that the recurrence gives it where parts divide them.
template <class S> void Forward<S>::pack_weights() const {
  parallel(p.pool, p.D * space.blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t d = i / space.blocks, u = i % space.blocks;
      const S *w_hh = static_cast<const S*>(p.weights[d].w_hh), *w_ih = static_cast<const S*>(p.weights[d].w_ih);
      Factors<S>::pack(p, weights(d), [&](auto* to) { pack_gates(p.H, p.H, w_hh, u, to); });
      if (space.input_weights) pack_gates(p.H, p.I, w_ih, u, input_weights(d));
    }
  });
}

template <class S> void Forward<S>::prepare(int64_t d) const {
  const GruWeights& w = p.weights[d];
  const int64_t H = p.H;
  F *in = bias(d, 0), *hidden = bias(d, 1);
  widen(3 * H, static_cast<const S*>(w.b_ih), in);
  widen(3 * H, static_cast<const S*>(w.b_hh), hidden);
  for (int64_t i = 0; i < 2 * H; ++i) in[i] += hidden[i];
  if (norm()) {
    widen(3 * H, static_cast<const S*>(w.g_ih), gain(d, 0));
    widen(3 * H, static_cast<const S*>(w.g_hh), gain(d, 1));
  }
}

// x W + b for all rows; with layer norm, a second pass normalises each row.
template <class S> void Forward<S>::input_products(int64_t d) const {
  const int64_t H = p.H;
  Gemm<S, S, F> g{p.N, 3 * H, p.I, static_cast<const S*>(p.x), p.I, 1,
                  static_cast<const S*>(p.weights[d].w_ih), 1, p.I, products(d), ldx};
  if (!norm()) g.bias = bias(d, 0);
  gemm(p.pool, g);
  if (!norm()) return;
  parallel(p.pool, p.N, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      F* y = products(d) + row * ldx;
      Vec<F> sum{}, squares{};
      each_vector<F>(0, 3 * H, [&](int64_t i, int64_t w) { sum += get<F>(y + i, w); });
      const F mean = reduce_add(sum) / F(3 * H);
      each_vector<F>(0, 3 * H, [&](int64_t i, int64_t w) {
        const Vec<F> v = select(first_lanes<F>(w), get<F>(y + i, w) - splat(mean), Vec<F>{});
        squares = fma(v, v, squares);
      });
      const F scale = F(1) / F(__builtin_sqrt(reduce_add(squares) / F(3 * H) + F(kNormEps)));
      if (p.rstd) rstd(d)[row * 2] = scale;
      each_vector<F>(0, 3 * H, [&](int64_t i, int64_t w) {
        const Vec<F> v = (get<F>(y + i, w) - splat(mean)) * splat(scale);
        if (p.normed) put<F>(normed(d) + row * 6 * H + i, v, w);
        put<F>(y + i, fma(v, get<F>(gain(d, 0) + i, w), get<F>(bias(d, 0) + i, w)), w);
      });
    }
  });
}

// x W + b of a part's units for a tile's rows at the steps from s on, as many as are made at a time.
template <class S> void Forward<S>::input_block(int64_t d, int64_t tile, int64_t part, int64_t s) const {
  using Mul = typename Factors<S>::Mul;
  constexpr int64_t kPair = Factors<S>::kPair;
  const int64_t H = p.H, I = p.I, KI = space.KI;
  const int64_t b = space.bounds[tile], end = least(s + space.steps, p.T);
  const int64_t from = d ? p.T - end : s, to = d ? p.T - s : end;  // in time
  // f(time, rows) for each of the steps that has any.
  const auto each_time = [&](const auto& f) {
    for (int64_t t = from; t < to; ++t) {
      const int64_t n = least(space.bounds[tile + 1], active(p, t)) - b;
      if (n > 0) f(t, n);
    }
  };
  int64_t rows = 0;
  bool whole = true;
  each_time([&](int64_t t, int64_t n) {
    rows += n;
    whole = whole && n == active(p, t);
  });
  if (rows == 0) return;
  const S* x = static_cast<const S*>(p.x);
  const E* a;
  if (whole && sizeof(S) * kPair == sizeof(E) && I % kPair == 0) {  // as they lie
    a = reinterpret_cast<const E*>(x + p.offsets[from] * I);
  } else {
    E* packed = static_cast<E*>(thread_scratch(kScratchTile, size_t(rows * KI) * sizeof(E)));
    a = packed;
    each_time([&](int64_t t, int64_t n) {
      pack_rows(n, I, x + (p.offsets[t] + b) * I, I, 1, packed, KI);
      packed += n * KI;
    });
  }
  const F* const bias_x = bias(d, 0);
  panel_products<Mul>(
      rows, KI, a, KI, input_weights(d), kNV * begin_of(part), kNV * begin_of(part + 1),
      [&](int64_t v, int64_t n, const F* c) {
        for (; n > 0; v += kNV, n -= kNV) {
          const int64_t i = v / kNV * kL, w = least(kL, H - i);
          const F* sums = c;
          each_time([&](int64_t t, int64_t m) {
            F* row = products(d, tile, d ? p.T - 1 - t : t) + i;
            for (; m > 0; --m, row += ldx, sums += kPanel<F>)
              for (int64_t g = 0; g < 3; ++g)
                put<F>(row + g * H, load(sums + g * kL) + get<F>(bias_x + g * H + i, w), w);
          });
          c += kPanel<F>;
        }
      },
      [](int64_t, int64_t, int64_t) {});
}

// x W + b of one sequence, for kRowsBeside steps from `begin` on and a part's units: by vectors of columns, each of
// which is a gate of a vector of units.
template <class S> struct InputsBeside {
  using F = compute_t<S>;
  using E = typename Factors<S>::E;
  using Mul = typename Factors<S>::Mul;
  static constexpr int64_t kL = kLanes<F>;
  const Forward<S>& call;
  const int64_t d, begin;
  E* const rows;  // [KI][kRowsBeside]
  F sums[kRowsBeside * kL];

  InputsBeside(const Forward<S>& forward, int64_t direction, int64_t part, int64_t step)
      : call(forward), d(direction), begin(step),
        rows(call.space.inputs + (d * call.space.division.parts + part) * call.space.KI * kRowsBeside) {}

  void take_rows() const {  // zeros behind the last step
    const int64_t I = call.p.I, KI = call.space.KI;
    const int64_t n = greatest<int64_t>(0, least<int64_t>(kRowsBeside, call.p.T - begin));
    if (n < kRowsBeside) __builtin_memset(rows, 0, size_t(KI * kRowsBeside) * sizeof(E));
    E* scratch = static_cast<E*>(thread_scratch(kScratchPack, size_t(kL * KI) * sizeof(E)));
    pack_columns(n, I, static_cast<const S*>(call.p.x) + call.time(d, begin) * I, d ? -I : I, rows, kRowsBeside, scratch);
  }
  Columns<Mul> columns(int64_t v) {
    const int64_t KI = call.space.KI;
    return {KI, rows, call.input_weights(d) + v / kNV * KI * kPanel<F> + v % kNV * kL, kPanel<F>, sums};
  }
  void put_sums(int64_t v) const {
    const int64_t H = call.p.H, i = v / kNV * kL, at = v % kNV * H + i, w = least(kL, H - i);
    const Vec<F> b = get<F>(call.bias(d, 0) + at, w);
    for (int64_t r = 0; r < kRowsBeside && begin + r < call.p.T; ++r)
      put<F>(call.products(d, 0, begin + r) + at, load(sums + r * kL) + b, w);
  }
  void make(int64_t v) {  // by itself
    row_products<Mul, 0, kNV>(0, nullptr, nullptr, nullptr, columns(v));
    put_sums(v);
  }
};

}  // namespace fastlm::FASTLM_ISA::gru
