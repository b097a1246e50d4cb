// Forward of gru.h: input products, then the recurrence.
#pragma once
#include "few_tokens.h"
#include "gru_recurrence.h"

namespace fastlm::FASTLM_ISA::gru {

inline constexpr double kNormEps = 1e-5;

// A single step of a few sequences, as in generation: packed weights would be used once.
inline bool is_single(const GruParams& p) { return p.T == 1 && p.B <= kTokens && !p.weights[0].g_hh; }

// Scratch of a forward call. Panels u hold the three gates of units u * lanes ... .
template <class S> struct ForwardSpace {
  using F = compute_t<S>;
  using E = typename Factors<S>::E;
  using R = typename Factors<S>::R;
  Division division;
  int64_t blocks, K, KI, ldh, ldraw;  // K: steps of a sum over H, KI: over I
  E* weights;          // [D][blocks][K][3][lanes]
  E* input_weights;    // [D][blocks][KI][3][lanes], or null unless x W is made beside the recurrence
  E* inputs;           // [D][parts][KI][kRowsBeside] of x, for each part by itself
  F* state;            // [D][2][B][ldh], h of the step before and of this one
  R* rounded;          // [D][2][B][ldh], the same as factors, where these are rounded
  F* products;         // [D][N][3H] x W + b, or null where these lie in the tensor of the gates
  F* raw;              // [D][B][ldraw] h W: in the order of the panels for layer norm, as it is for a single step
  F* bias;             // [D][2][3H + lanes]: b_ih + (b_hr, b_hz, 0), and b_hh for q alone
  F* gain;             // [D][2][3H + lanes]
  int64_t* lengths;    // [B]
  int64_t* bounds;     // [tiles + 1]
  Counter* counters;

  ForwardSpace(const GruParams& p, Arena& arena) {
    blocks = ceil_div<int64_t>(p.H, kLanes<F>);
    K = Factors<S>::steps(p, p.H);
    KI = Factors<S>::steps(p, p.I);
    ldh = padded<F>(p.H);
    ldraw = padded<F>(blocks * kPanel<F>);
    division = divide(p, blocks, blocks * K * kPanel<F> * int64_t(sizeof(E)));
    const bool norm = p.weights[0].g_hh, single = is_single(p);
    // Registers for twice the sums, whole products, no thread without a part, and weights of a part that come from
    // the second-level cache: from behind it they take what the product beside them would save.
    const bool beside = kMR == 2 * kBeside && !Factors<S>::kWidens && p.B == 1 && !norm && p.T >= 2 * kRowsBeside &&
                        K >= kLongRow && blocks >= kBeside * division.parts &&
                        p.D * division.parts >= p.pool.threads &&
                        blocks * (K + KI) * kPanel<F> * int64_t(sizeof(E)) <= 4 * kResident * division.parts;
    weights = arena.take<E>(single ? 0 : p.D * blocks * K * kPanel<F>);
    input_weights = beside ? arena.take<E>(p.D * blocks * KI * kPanel<F>) : nullptr;
    inputs = arena.take<E>(beside ? p.D * division.parts * KI * kRowsBeside : 0);
    state = arena.take<F>(p.D * 2 * p.B * ldh);
    rounded = arena.take<R>(Factors<S>::kRounded ? p.D * 2 * p.B * ldh : 0);
    products = arena.take<F>(p.gates ? 0 : p.D * p.N * 3 * p.H);
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
  F* normed(int64_t d) const { return static_cast<F*>(p.normed) + d * p.N * 6 * p.H; }
  F* rstd(int64_t d) const { return static_cast<F*>(p.rstd) + d * p.N * 2; }
  bool norm() const { return p.weights[0].g_hh; }
  // The time step that the direction d takes as its s-th.
  int64_t time(int64_t d, int64_t s) const { return d ? p.T - 1 - s : s; }

  void pack_weights() const;
  void prepare(int64_t d) const;
  void input_products(int64_t d) const;
  void begin_states(int64_t d) const;
  void end_states(int64_t d) const;
  void step(int64_t d, int64_t tile, int64_t part, int64_t s) const;
  void step_beside(int64_t d, int64_t part, int64_t s) const;
  void take_inputs(int64_t d, int64_t begin, E* to) const;
  void step_normed(int64_t d, int64_t tile, int64_t part, int64_t phase) const;
  template <class Visit> void products(int64_t d, int64_t b, int64_t rows, int64_t part, int64_t s,
                                       const Visit& f) const;
  void make_gates(int64_t d, int64_t row, int64_t rows, int64_t u, int64_t units, F* c, int64_t b,
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

// The buffer that a sequence's first step reads depends on when it begins: backwards in time the
// shorter sequences join later.
template <class S> void Forward<S>::begin_states(int64_t d) const {
  for (int64_t b = 0; b < p.B; ++b) {
    const int64_t first = d ? p.T - space.lengths[b] : 0;
    const S* h0 = static_cast<const S*>(p.h0) + (d * p.B + b) * p.H;
    F* h = state(d, first) + b * space.ldh;
    convert_row(p.H, h0, 1, h);
    for (int64_t i = p.H; i < space.ldh; ++i) h[i] = F(0);
    if constexpr (kRounded) {
      __builtin_memcpy(factors(d, first) + b * space.ldh, h0, size_t(p.H) * sizeof(R));
      // What may stand beside the last unit in its pair.
      for (int64_t s = 0; s < 2; ++s) factors(d, s)[b * space.ldh + p.H] = R{};
    }
  }
}

template <class S> void Forward<S>::end_states(int64_t d) const {
  for (int64_t b = 0; b < p.B; ++b) {
    const F* h = state(d, d ? p.T : space.lengths[b]) + b * space.ldh;
    S* hn = static_cast<S*>(p.hn) + (d * p.B + b) * p.H;
    each_vector<F>(0, p.H, [&](int64_t i, int64_t w) { put<F>(hn + i, get<F>(h + i, w), w); });
  }
}

// h W of a part's panels for the sequences b ... b + rows at step s, handed to f(panel, c).
template <class S> template <class Visit>
void Forward<S>::products(int64_t d, int64_t b, int64_t rows, int64_t part, int64_t s, const Visit& f) const {
  const int64_t parts = space.division.parts, blocks = space.blocks;
  const int64_t first = blocks * part / parts, last = blocks * (part + 1) / parts;
  const R* h = factors(d, s) + b * space.ldh;
  const F* x = products(d) + (p.offsets[time(d, s)] + b) * ldx;
  step_products<S>(
      p, rows, space.K, h, space.ldh, weights(d), kNV * first, kNV * last,
      [&](int64_t v, int64_t n, F* c) { f(v / kNV, n / kNV, c); },
      [&](int64_t v, int64_t, int64_t m) {
        for (int64_t i = v / kNV * kL; i < ldx; i += p.H) prefetch(kL, x + m * ldx + i);
      });
}

// Panel u at step s for `rows` sequences from b on, their rows being those from `row` on, or `units` panels from u on
// for one sequence: c[rows or units][3 lanes] is h W, and gives its place to the gates.
template <class S>
void Forward<S>::make_gates(int64_t d, int64_t row, int64_t rows, int64_t u, int64_t units, F* c,
                            int64_t b, int64_t s) const {
  const int64_t H = p.H, i = u * kL, ldout = p.D * H;
  const F* h = state(d, s) + b * space.ldh + i;
  F* next = state(d, s + 1) + b * space.ldh + i;
  R* factor = factors(d, s + 1) + b * space.ldh + i;
  const F* x = products(d) + row * ldx + i;
  const F* bias_q = bias(d, 1) + 2 * H + i;
  F* gate = p.gates ? gates(d) + row * 4 * H + i : nullptr;
  S* out = static_cast<S*>(p.out) + row * ldout + d * H + i;
  const S* update = p.update ? static_cast<const S*>(p.update) + row * ldout + d * H + i : nullptr;
  const bool zoneout = p.update || p.zoneout != 0;
  // The panels, or else the rows, from `begin` to `end`: w lanes of each.
  const auto visit = [&]<bool kAcross>(int64_t begin, int64_t end, int64_t w) FASTLM_INLINED {
    const int64_t of_x = kAcross ? kL : ldx, of_h = kAcross ? kL : space.ldh, of_out = kAcross ? kL : ldout;
    const int64_t of_gate = kAcross ? kL : 4 * H, of_bias = kAcross ? kL : 0;
    // n waits long for r: with r and z of all of them before it, a core has several at work at the same time.
    for (int64_t m = begin; m < end; ++m) {
      const F* xm = x + m * of_x;
      F* cm = c + m * kPanel<F>;
      store(cm, sigmoid(get<F>(xm, w) + load(cm)));
      store(cm + kL, sigmoid(get<F>(xm + H, w) + load(cm + kL)));
    }
    for (int64_t m = begin; m < end; ++m) {
      const F *xm = x + m * of_x, *cm = c + m * kPanel<F>;
      const Vec<F> r = load(cm), z = load(cm + kL), q = load(cm + 2 * kL) + get<F>(bias_q + m * of_bias, w);
      const Vec<F> n = tanh(fma(r, q, get<F>(xm + 2 * H, w)));
      const Vec<F> before = load(h + m * of_h);
      Vec<F> hidden = fma(z, before - n, n);
      if (zoneout) {  // so that u = 0 keeps the old state to the bit
        const Vec<F> u = update ? get<F>(update + m * of_out, w) : splat(F(1 - p.zoneout));
        hidden = fma(u * (splat(F(1)) - z), n - before, before);
      }
      store(next + m * of_h, hidden);
      put<F>(out + m * of_out, hidden, w);
      if constexpr (kRounded) put<F>(factor + m * of_h, hidden, w);
      if (gate) {
        F* g = gate + m * of_gate;
        put<F>(g, r, w);
        put<F>(g + H, z, w);
        put<F>(g + 2 * H, n, w);
        put<F>(g + 3 * H, q, w);
      }
    }
  };
  const int64_t lanes = H - i, whole = least(units, lanes / kL);
  if (units > 1) {
    visit.template operator()<true>(0, whole, kL);
    if (whole < units) visit.template operator()<true>(whole, units, lanes % kL);
  } else if (whole) {
    visit.template operator()<false>(0, rows, kL);
  } else {
    visit.template operator()<false>(0, rows, lanes);
  }
}

// One step of one tile of sequences, for one part of the units.
template <class S>
void Forward<S>::step(int64_t d, int64_t tile, int64_t part, int64_t s) const {
  const int64_t t = time(d, s), b = space.bounds[tile];
  const int64_t rows = least(space.bounds[tile + 1], active(p, t)) - b;
  if (rows <= 0) return;
  products(d, b, rows, part, s, [&](int64_t u, int64_t units, F* c) {
    make_gates(d, p.offsets[t] + b, rows, u, units, c, b, s);
  });
}

// The same for one sequence, with x W + b of later steps beside h W: block by block of kRowsBeside steps, and the
// vectors of the next block's columns in as many lots as this one has steps.
template <class S> void Forward<S>::step_beside(int64_t d, int64_t part, int64_t s) const {
  using Mul = typename Factors<S>::Mul;
  const int64_t parts = space.division.parts, H = p.H, K = space.K, KI = space.KI;
  const int64_t first = kNV * (space.blocks * part / parts), last = kNV * (space.blocks * (part + 1) / parts);
  E* const inputs = space.inputs + (d * parts + part) * KI * kRowsBeside;
  F sums[kRowsBeside * kL];
  const auto columns = [&](int64_t v) {  // gate v % 3 of the units from v / 3 * lanes on
    const E* panel = input_weights(d) + v / kNV * KI * kPanel<F>;
    return Columns<Mul>{KI, inputs, panel + v % kNV * kL, kPanel<F>, sums};
  };
  const auto put_sums = [&](int64_t begin, int64_t v) {
    const int64_t i = v / kNV * kL, at = v % kNV * H + i, w = least(kL, H - i);
    const Vec<F> b = get<F>(bias(d, 0) + at, w);
    for (int64_t r = 0; r < kRowsBeside && begin + r < p.T; ++r)
      put<F>(products(d) + time(d, begin + r) * ldx + at, load(sums + r * kL) + b, w);
  };
  const auto alone = [&](int64_t begin, int64_t v) {
    row_products<Mul, 0, kNV>(0, nullptr, nullptr, nullptr, columns(v));
    put_sums(begin, v);
  };
  if (s == 0) {
    take_inputs(d, 0, inputs);
    for (int64_t v = first; v < last; ++v) alone(0, v);
  }
  const int64_t place = s % kRowsBeside, begin = s - place + kRowsBeside;
  int64_t v = first + (last - first) * place / kRowsBeside;
  const int64_t end = begin < p.T ? first + (last - first) * (place + 1) / kRowsBeside : v;
  if (place == 0) take_inputs(d, begin, inputs);
  prefetch(space.ldh, factors(d, s));
  const E* h = reinterpret_cast<const E*>(factors(d, s));
  panel_products<Mul>(
      K, h, weights(d), first, last,
      [&](int64_t at, int64_t n, F* c) { make_gates(d, time(d, s), 1, at / kNV, n / kNV, c, 0, s); },
      [&](const E* panel, F* c) {
        if (v == end) return row_products<Mul, kBeside, kNV>(K, h, panel, c);
        row_products<Mul, kBeside, kNV>(K, h, panel, c, columns(v));
        put_sums(begin, v++);
      });
  for (; v < end; ++v) alone(begin, v);
}

// The rows of x of the steps from `begin` on, [KI][kRowsBeside], zeros behind the last step.
template <class S> void Forward<S>::take_inputs(int64_t d, int64_t begin, E* to) const {
  const int64_t rows = greatest<int64_t>(0, least<int64_t>(kRowsBeside, p.T - begin));
  if (rows < kRowsBeside) __builtin_memset(to, 0, size_t(space.KI * kRowsBeside) * sizeof(E));
  E* scratch = static_cast<E*>(thread_scratch(kScratchPack, size_t(kL * space.KI) * sizeof(E)));
  pack_columns(rows, p.I, static_cast<const S*>(p.x) + time(d, begin) * p.I, d ? -p.I : p.I, to, kRowsBeside, scratch);
}

// With layer norm a step has two phases: products, then norms and gates. Every part forms the mean and
// the variance of whole rows for itself, which costs less than to wait for another part's.
template <class S>
void Forward<S>::step_normed(int64_t d, int64_t tile, int64_t part, int64_t phase) const {
  const int64_t s = phase / 2, t = time(d, s), b = space.bounds[tile], H = p.H;
  const int64_t rows = least(space.bounds[tile + 1], active(p, t)) - b;
  if (rows <= 0) return;
  const int64_t parts = space.division.parts, blocks = space.blocks, ldraw = space.ldraw;
  const int64_t first = blocks * part / parts, last = blocks * (part + 1) / parts;
  F* raw = space.raw + (d * p.B + b) * ldraw;
  if (phase % 2 == 0) {
    products(d, b, rows, part, s, [&](int64_t u, int64_t units, const F* c) {
      for (int64_t m = 0; m < rows; ++m)
        __builtin_memcpy(raw + m * ldraw + u * kPanel<F>, c + m * kPanel<F>, size_t(units * kPanel<F>) * sizeof(F));
    });
    return;
  }
  const int64_t row = p.offsets[t] + b;
  for (int64_t m = 0; m < rows; ++m) {
    const F* y = raw + m * ldraw;
    Vec<F> sum{}, squares{};  // padding holds zeros
    for (int64_t i = 0; i < blocks * kPanel<F>; i += kL) sum += load(y + i);
    const F mean = reduce_add(sum) / F(3 * H);
    for (int64_t u = 0; u < blocks; ++u) {
      const mask_t<Vec<F>> used = first_lanes<F>(least(kL, H - u * kL));
      for (int64_t g = 0; g < 3; ++g) {
        const Vec<F> v = select(used, load(y + u * kPanel<F> + g * kL) - splat(mean), Vec<F>{});
        squares = fma(v, v, squares);
      }
    }
    const F scale = F(1) / F(__builtin_sqrt(reduce_add(squares) / F(3 * H) + F(kNormEps)));
    if (p.rstd && part == 0) rstd(d)[(row + m) * 2 + 1] = scale;
    F c[kPanel<F>];
    for (int64_t u = first; u < last; ++u) {
      const int64_t i = u * kL, w = least(kL, H - i);
      for (int64_t g = 0; g < 3; ++g) {
        const Vec<F> v = (load(y + u * kPanel<F> + g * kL) - splat(mean)) * splat(scale);
        if (p.normed) put<F>(normed(d) + (row + m) * 6 * H + (3 + g) * H + i, v, w);
        store(c + g * kL, v * get<F>(gain(d, 1) + g * H + i, w));
      }
      make_gates(d, row + m, 1, u, 1, c, b + m, s);
    }
  }
}

// The products with both weights as they lie, a thread's part of the outputs at a time.
template <class S> void Forward<S>::single_step(int64_t d) const {
  const int64_t H = p.H, ldraw = space.ldraw;
  const GruWeights& w = p.weights[d];
  F* raw = space.raw + d * p.B * ldraw;
  const S* h0 = static_cast<const S*>(p.h0) + d * p.B * H;
  few_tokens<S, S, F>({p.pool, p.B, p.I, 3 * H, p.x, w.w_ih, p.I, false, nullptr, bias(d, 0), products(d), ldx});
  few_tokens<S, S, F>({p.pool, p.B, H, 3 * H, h0, w.w_hh, H, false, nullptr, nullptr, raw, ldraw});
  for (int64_t m = 0; m < p.B; ++m)
    for (int64_t u = 0; u < space.blocks; ++u) {
      const int64_t i = u * kL, lanes = least(kL, H - i);
      F c[kPanel<F>];
      for (int64_t g = 0; g < 3; ++g) store(c + g * kL, get<F>(raw + m * ldraw + g * H + i, lanes));
      make_gates(d, m, 1, u, 1, c, m, 0);
    }
}

template <class S> void Forward<S>::recurrence() const {
  const int64_t tiles = space.division.tiles;
  lockstep(p.pool, p.D * tiles, space.division.parts, norm() ? 2 * p.T : p.T, space.counters,
           [&](int64_t group, int64_t part, int64_t phase) {
             if (norm()) step_normed(group / tiles, group % tiles, part, phase);
             else if (space.input_weights) step_beside(group, part, phase);
             else step(group / tiles, group % tiles, part, phase);
           });
}

template <class S> void Forward<S>::run() const {
  sequence_lengths(p, space.lengths);
  cut_tiles(p, space.division.tiles, space.bounds);
  if (!is_single(p)) pack_weights();
  for (int64_t d = 0; d < p.D; ++d) {
    prepare(d);
    begin_states(d);
    if (is_single(p)) single_step(d);
    else if (!space.input_weights) input_products(d);
  }
  if (!is_single(p)) recurrence();
  for (int64_t d = 0; d < p.D; ++d) end_states(d);
}

template <class S> void forward(const GruParams& p) {
  Arena arena{static_cast<char*>(p.workspace)};
  const ForwardSpace<S> space(p, arena);
  Forward<S>{p, space}.run();
}

}  // namespace fastlm::FASTLM_ISA::gru
