// Forward of gru.h: the recurrence over what gru_input.h makes.
#pragma once
#include "gru_input.h"

namespace fastlm::FASTLM_ISA::gru {

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

// h W of a part's panels for the sequences b ... b + rows at step s, handed to f(panel, c). x: their x W + b.
template <class S> template <class Visit>
void Forward<S>::hidden_products(int64_t d, int64_t b, int64_t rows, int64_t part, int64_t s, const F* x,
                                 const Visit& f) const {
  const int64_t first = begin_of(part), last = begin_of(part + 1);
  const R* h = factors(d, s) + b * space.ldh;
  step_products<S>(
      p, rows, space.K, h, space.ldh, weights(d), kNV * first, kNV * last,
      [&](int64_t v, int64_t n, F* c) { f(v / kNV, n / kNV, c); },
      [&](int64_t v, int64_t, int64_t m) {
        for (int64_t i = v / kNV * kL; i < ldx; i += p.H) prefetch(kL, x + m * ldx + i);
      });
}

// Panel u at step s for `rows` sequences from b on, their rows being those from `row` on, or `units` panels from u on
// for one sequence: c[rows or units][3 lanes] is h W, and gives its place to the gates; x[rows][ldx] is x W + b.
template <class S>
void Forward<S>::make_gates(int64_t d, int64_t row, int64_t rows, int64_t u, int64_t units, const F* x, F* c,
                            int64_t b, int64_t s) const {
  const int64_t H = p.H, i = u * kL, ldout = p.D * H;
  const F* h = state(d, s) + b * space.ldh + i;
  F* next = state(d, s + 1) + b * space.ldh + i;
  R* factor = factors(d, s + 1) + b * space.ldh + i;
  x += i;
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
  if (space.input_weights && s % space.steps == 0) input_block(d, tile, part, s);
  if (rows <= 0) return;
  const F* x = products(d, tile, s);
  hidden_products(d, b, rows, part, s, x, [&](int64_t u, int64_t units, F* c) {
    make_gates(d, p.offsets[t] + b, rows, u, units, x, c, b, s);
  });
}

// The same for one sequence, with x W + b of the next block's steps beside h W: as many lots of the columns' vectors as
// this block has steps.
template <class S> void Forward<S>::step_beside(int64_t d, int64_t part, int64_t s) const {
  using Mul = typename Factors<S>::Mul;
  const int64_t K = space.K, first = kNV * begin_of(part), last = kNV * begin_of(part + 1);
  if (s == 0) {
    InputsBeside<S> now(*this, d, part, 0);
    now.take_rows();
    for (int64_t v = first; v < last; ++v) now.make(v);
  }
  const int64_t place = s % kRowsBeside;
  InputsBeside<S> next(*this, d, part, s - place + kRowsBeside);
  if (place == 0) next.take_rows();
  int64_t v = first + (last - first) * place / kRowsBeside;
  const int64_t end = next.begin < p.T ? first + (last - first) * (place + 1) / kRowsBeside : v;

  prefetch(space.ldh, factors(d, s));
  const E* h = reinterpret_cast<const E*>(factors(d, s));
  const F* x = products(d, 0, s);
  panel_products<Mul>(
      K, h, weights(d), first, last,
      [&](int64_t at, int64_t n, F* c) { make_gates(d, time(d, s), 1, at / kNV, n / kNV, x, c, 0, s); },
      [&](const E* panel, F* c) {
        if (v == end) return row_products<Mul, kBeside, kNV>(K, h, panel, c);
        row_products<Mul, kBeside, kNV>(K, h, panel, c, next.columns(v));
        next.put_sums(v++);
      });
  for (; v < end; ++v) next.make(v);
}

// With layer norm a step has two phases: products, then norms and gates. Every part forms the mean and
// the variance of whole rows for itself, which costs less than to wait for another part's.
template <class S>
void Forward<S>::step_normed(int64_t d, int64_t tile, int64_t part, int64_t phase) const {
  const int64_t s = phase / 2, t = time(d, s), b = space.bounds[tile], H = p.H;
  const int64_t rows = least(space.bounds[tile + 1], active(p, t)) - b;
  if (rows <= 0) return;
  const int64_t blocks = space.blocks, ldraw = space.ldraw, first = begin_of(part), last = begin_of(part + 1);
  F* raw = space.raw + (d * p.B + b) * ldraw;
  if (phase % 2 == 0) {
    hidden_products(d, b, rows, part, s, products(d, tile, s), [&](int64_t u, int64_t units, const F* c) {
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
      make_gates(d, row + m, 1, u, 1, products(d) + (row + m) * ldx, c, b + m, s);
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
      make_gates(d, m, 1, u, 1, products(d) + m * ldx, c, m, 0);
    }
}

template <class S> void Forward<S>::recurrence() const {
  const int64_t tiles = space.division.tiles;
  lockstep(p.pool, p.D * tiles, space.division.parts, norm() ? 2 * p.T : p.T, space.counters,
           [&](int64_t group, int64_t part, int64_t phase) {
             if (norm()) step_normed(group / tiles, group % tiles, part, phase);
             else if (space.inputs) step_beside(group, part, phase);
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
