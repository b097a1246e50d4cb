// Softmax cross-entropy over logits x[N][C][S]; the formulas stand in token_loss.cuh. A first sweep over
// the classes of a token finds its log-sum-exp and the sums that smoothing or probabilities need, a
// second one writes the gradient; the backward of a gradient not known in the forward is the second alone.
//
//   cross_entropy_rows    classes contiguous: a team, one warp or a block of up to 512 threads, has a row
//   cross_entropy_tokens  positions contiguous, or rows of at most 128 bytes, which L1 keeps while their
//                         classes go by: a lane has a token, up to 8 warps share its classes
//
// The second sweep reads the row again rather than keep it: 50257 bfloat16 logits would take 100 KB of
// shared memory, one block on a multiprocessor, whose loads and stores would wait for one another. It
// goes backwards, so that what was read last comes from L1; the rest comes from L2, as the rows under way,
// two a multiprocessor, are 22 MB on an A100 and 27 MB on an H100, of 40 and 50.
// Rows start at any element: classes before the first and behind the last 16-byte boundary go one by
// one, as do all where the streams of a sweep are not aligned alike; those are full sectors all the same.
#pragma once
#include "token_loss.cuh"

namespace fastlm::cuda {

struct CrossEntropyParams {
  int64_t N, S;
  int C;
  TokenLoss token;
  const void* input;   // [N][C][S]
  Strides input_at;
  const void* bias;    // [C][S] of the gradient's type, added to the logits; or null
  void* dinput;        // [N][C][S]; may be input; or null
  Strides dinput_at;
  void* dprobs;        // [N][C][S], or null
  Strides dprobs_at;
  bool forward;        // compute lse and loss; otherwise lse is read
  int team;            // threads of a row; warps that share the classes of 32 tokens
};

// PLAIN below: class indices without smoothing, softcap and bias.

inline constexpr int kRowThreads = 512, kTokenThreads = 256;

// Accesses of a thread under way: with 1024 threads 32 KB a multiprocessor, or 16 beside as many of
// probabilities. Registers leave no room for more, in float64 not even for 1024 threads.
template <bool PLAIN> inline constexpr int kBatch = PLAIN ? 2 : 1;
template <class In> inline constexpr int kBlocks = sizeof(In) < 8 ? 2 : 1;

// How a thread takes WIDTH neighbouring classes: in vectors, or one by one.
template <int WIDTH, bool VECTORS> struct Access {
  static constexpr int kWidth = WIDTH;
  static constexpr bool kVectors = VECTORS;
  template <class S> static constexpr int kPack = !VECTORS ? 1 : WIDTH < kPerVector<S> ? WIDTH : kPerVector<S>;
};

template <class S, class A> struct Classes {
  static constexpr int kPack = A::template kPack<S>;
  Pack<S, kPack> packs[A::kWidth / kPack];

  // from: class 0; stride: 1 where accesses are vectors
  FASTLM_DEVICE static Classes load(const S* from, int c, int64_t stride) {
    Classes loaded;
    from += A::kVectors ? c : c * stride;
#pragma unroll
    for (int i = 0; i < A::kWidth / kPack; ++i) {
      const S* const pack = from + i * (A::kVectors ? kPack : stride);
      loaded.packs[i] = load_global(reinterpret_cast<const Pack<S, kPack>*>(pack));
    }
    return loaded;
  }
  FASTLM_DEVICE auto operator[](int j) const { return widen(packs[j / kPack].x[j % kPack]); }
};

template <class A, class S, class T>
FASTLM_DEVICE void store_classes(S* to, int c, int64_t stride, const T (&x)[A::kWidth]) {
  constexpr int kPack = A::template kPack<S>;
  to += A::kVectors ? c : c * stride;
#pragma unroll
  for (int i = 0; i < A::kWidth / kPack; ++i) {
    if constexpr (sizeof(S) == 2 && kPack > 1) {
      Pack<uint32_t, kPack / 2> words;
#pragma unroll
      for (int j = 0; j < kPack / 2; ++j)
        words.x[j] = pack(x[i * kPack + 2 * j], x[i * kPack + 2 * j + 1], S{});
      store_global(reinterpret_cast<Pack<uint32_t, kPack / 2>*>(to + i * kPack), words);
    } else {
      Pack<S, kPack> values;
#pragma unroll
      for (int j = 0; j < kPack; ++j) values.x[j] = narrow<S>(x[i * kPack + j]);
      store_global(reinterpret_cast<Pack<S, kPack>*>(to + i * (A::kVectors ? kPack : stride)), values);
    }
  }
}

// The classes of a token: `head` one by one, `units` of them in wide accesses, the rest one by one.
struct Span { int head, units; };

// use(at, c, load(at, c)) for all classes that fall to `rank` of `team` threads; BATCH loads go first.
template <int BATCH, class A, class Load, class Use>
FASTLM_DEVICE void sweep_part(A at, Span s, int count, int rank, int team, bool backwards, const Load& load,
                              const Use& use) {
  const auto place = [&](int j) {
    if constexpr (A::kWidth == 1) return j < s.head ? j : s.units + j;
    else return s.head + (backwards ? s.units - 1 - j : j) * A::kWidth;
  };
  for (int first = rank; first < count; first += BATCH * team) {
    decltype(load(at, 0)) loaded[BATCH];
#pragma unroll
    for (int b = 0; b < BATCH; ++b) {
      const int j = first + b * team;
      loaded[b] = load(at, place(j < count ? j : first));
    }
#pragma unroll
    for (int b = 0; b < BATCH; ++b)
      if (first + b * team < count) use(at, place(first + b * team), loaded[b]);
  }
}

template <int BATCH, class A, class Load, class Use>
FASTLM_DEVICE void sweep(A wide, Span s, int C, int rank, int team, bool backwards, const Load& load,
                         const Use& use) {
  const int swept = s.units * A::kWidth;
  sweep_part<BATCH>(Access<1, false>{}, {s.head, swept}, C - swept, rank, team, false, load, use);
  sweep_part<BATCH>(wide, s, s.units, rank, team, backwards, load, use);
}

// One token and what is done with a few of its classes. In and Out: types of logits and of all else with
// classes in the layout of the logits.
template <class In, class Out, bool PLAIN> struct Token {
  using T = compute_t<In>;
  using Storage = Out;
  static constexpr int kBatch = cuda::kBatch<PLAIN>;
  static constexpr bool kBias = !PLAIN && sizeof(In) > 2;  // beside logits of the compute type alone
  const CrossEntropyParams& p;
  int64_t i;         // place in [N][S]
  const In* x;       // class 0 of this token in each of these
  const Out *q, *bias;
  Out *dx, *dq;
  int y;             // -1: none
  bool kept;         // the token counts
  T w_y;

  FASTLM_DEVICE Token(const CrossEntropyParams& p, int64_t i) : p(p), i(i), y(-1), kept(true), w_y(1) {
    const int64_t n = p.S == 1 ? i : i / p.S, s = p.S == 1 ? 0 : i % p.S;
    const auto at = [&](auto* base, Strides by) { return base ? base + n * by.n + s * by.s : nullptr; };
    x = at(static_cast<const In*>(p.input), p.input_at);
    q = PLAIN ? nullptr : at(static_cast<const Out*>(p.token.probs), p.token.probs_at);
    bias = kBias ? at(static_cast<const Out*>(p.bias), {0, p.S, 1}) : nullptr;
    dx = at(static_cast<Out*>(p.dinput), p.dinput_at);
    dq = PLAIN ? nullptr : at(static_cast<Out*>(p.dprobs), p.dprobs_at);
    if (PLAIN || p.token.target) {
      const int64_t target = p.token.target[i];
      kept = target != p.token.ignore_index && target >= 0 && target < p.C;
      if (kept) y = int(target);
      if (kept && p.token.weight) w_y = weight()[y];
    }
  }

  FASTLM_DEVICE const T* weight() const { return static_cast<const T*>(p.token.weight); }
  FASTLM_DEVICE bool sums() const { return !PLAIN && (q || p.token.label_smoothing > 0); }
  FASTLM_DEVICE T cap() const { return PLAIN ? T(0) : T(p.token.softcap); }

  // Wide accesses where they meet all of x, bias, q and what is written at 16 bytes.
  template <int WIDTH> FASTLM_DEVICE Span span(const Out* written, int64_t stride) const {
    const int none = int(reinterpret_cast<uintptr_t>(x) / sizeof(In) % WIDTH);
    bool alike = true;
    const auto check = [&](const Out* pointer, int64_t by) {
      if (pointer)
        alike = alike && by == 1 && int(reinterpret_cast<uintptr_t>(pointer) / sizeof(Out) % WIDTH) == none;
    };
    check(bias, p.S);
    check(q, p.token.probs_at.c);
    check(written, stride);
    const int head = (WIDTH - none) % WIDTH;
    if (!alike || head >= p.C) return {p.C, 0};
    return {head, (p.C - head) / WIDTH};
  }

  template <class A> struct Loaded {
    Classes<In, A> x;
    Classes<Out, A> q;
  };
  template <class A> FASTLM_DEVICE Loaded<A> load(A, int c) const {
    Loaded<A> loaded{Classes<In, A>::load(x, c, p.input_at.c), {}};
    if (q) loaded.q = Classes<Out, A>::load(q, c, p.token.probs_at.c);
    return loaded;
  }

  template <class A> FASTLM_DEVICE void logits(T (&v)[A::kWidth], int c, const Classes<In, A>& from) const {
#pragma unroll
    for (int j = 0; j < A::kWidth; ++j) v[j] = from[j];
    if (bias) {
      const auto b = Classes<Out, A>::load(bias, c, p.S);
#pragma unroll
      for (int j = 0; j < A::kWidth; ++j) v[j] += b[j];
    }
    if (cap() != 0) {
#pragma unroll
      for (int j = 0; j < A::kWidth; ++j) v[j] = capped(v[j], cap());
    }
  }

  // w_c, or w_c q'_c
  template <class A> FASTLM_DEVICE void shares(T (&f)[A::kWidth], int c, const Classes<Out, A>& from) const {
    const T e = T(p.token.label_smoothing), uniform = e / T(p.C);
#pragma unroll
    for (int j = 0; j < A::kWidth; ++j) {
      f[j] = q ? from[j] * (1 - e) + uniform : T(1);
      if (p.token.weight) f[j] *= weight()[c + j];
    }
  }

  FASTLM_DEVICE T target_logit() const {
    if (y < 0) return 0;
    T v[1];
    logits<Access<1, false>>(v, y, Classes<In, Access<1, false>>::load(x, y, p.input_at.c));
    return v[0];
  }

  template <class A> FASTLM_DEVICE void add(Running<T>& sum, int c, const Loaded<A>& loaded) const {
    T v[A::kWidth];
    logits<A>(v, c, loaded.x);
    if (sums()) {
      T f[A::kWidth];
      shares<A>(f, c, loaded.q);
      sum.add(v, f);
    } else {
      sum.add(v, nullptr);
    }
  }

  template <class A>
  FASTLM_DEVICE void gradient(int c, const Loaded<A>& loaded, const Coefficients<T>& k, LogSum<T> s) const {
    constexpr int W = A::kWidth;
    T v[W], d[W];
    logits<A>(v, c, loaded.x);
#pragma unroll
    for (int j = 0; j < W; ++j) d[j] = k.softmax * exp_of((v[j] - s.lse) - s.low);
    if (sums()) {
      T f[W];
      shares<A>(f, c, loaded.q);
#pragma unroll
      for (int j = 0; j < W; ++j) d[j] -= (q ? k.probs : k.smooth) * f[j];
    }
    if (y >= c && y < c + W) {
#pragma unroll
      for (int j = 0; j < W; ++j) d[j] -= c + j == y ? k.onehot : T(0);
    }
    if (cap() != 0) {
#pragma unroll
      for (int j = 0; j < W; ++j) d[j] *= capped_slope(v[j], cap());
    }
    store_classes<A>(dx, c, p.dinput_at.c, d);
  }

  // dq_c = g (1 - e) w_c (lse - x_c)
  template <class A>
  FASTLM_DEVICE void target_gradient(int c, const Loaded<A>& loaded, T g, LogSum<T> s) const {
    T v[A::kWidth];
    logits<A>(v, c, loaded.x);
    g *= 1 - T(p.token.label_smoothing);
#pragma unroll
    for (int j = 0; j < A::kWidth; ++j)
      v[j] = g * ((s.lse - v[j]) + s.low) * (p.token.weight ? weight()[c + j] : T(1));
    store_classes<A>(dq, c, p.dprobs_at.c, v);
  }
};

// A token from beginning to end, by `rank` of `team` threads. span(written, stride): how to sweep; join(sum):
// the team's sums from a thread's; inside: there is such a token.
template <class A, class Token, class SpanOf, class Join>
FASTLM_DEVICE void run_token(const Token& token, bool inside, int rank, int team, const SpanOf& span,
                             const Join& join) {
  using T = typename Token::T;
  const CrossEntropyParams& p = token.p;
  const TokenLoss& t = p.token;
  const auto load = [&](auto at, int c) { return token.load(at, c); };
  const bool stored = inside && (token.kept || t.lse_everywhere);
  Running<T> sum;
  LogSum<T> s{0, 0};
  if (p.forward) {
    const T x_y = inside ? token.target_logit() : T(0);
    if (stored)
      sweep<Token::kBatch>(A{}, span(nullptr, 1), p.C, rank, team, false, load, [&](auto at, int c, const auto& x) {
        token.template add<decltype(at)>(sum, c, x);
      });
    join(sum);
    if (stored) s = LogSum<T>::of(sum);
    if (inside && rank == 0) {
      static_cast<T*>(t.lse)[token.i] = s.lse;
      static_cast<T*>(t.low)[token.i] = s.low;
      static_cast<T*>(t.loss)[token.i] = token.kept ? token_loss(t, p.C, s, sum, x_y, token.w_y) : T(0);
    }
  } else {
    if (inside) s = {static_cast<const T*>(t.lse)[token.i], static_cast<const T*>(t.low)[token.i]};
    if (token.q && token.dx) {  // sum_c w_c q'_c
      using One = Access<1, false>;
      using Share = Classes<typename Token::Storage, One>;
      for (int c = rank; inside && c < p.C; c += team) {
        T f[1];
        token.template shares<One>(f, c, Share::load(token.q, c, t.probs_at.c));
        sum.mass += f[0];
      }
      join(sum);
    }
  }
  if (!inside || !(token.dx || token.dq)) return;
  const auto k = coefficients<T>(t, p.C, token.i, token.kept, token.w_y, s.lse, sum.mass);
  if (token.dx) {
    const Span all = span(token.dx, p.dinput_at.c);
    if (k.none())  // the logits may hold anything
      sweep<1>(A{}, all, p.C, rank, team, false, [](auto, int) { return 0; }, [&](auto at, int c, int) {
        const T zero[decltype(at)::kWidth] = {};
        store_classes<decltype(at)>(token.dx, c, p.dinput_at.c, zero);
      });
    else
      sweep<Token::kBatch>(A{}, all, p.C, rank, team, p.forward, load, [&](auto at, int c, const auto& x) {
        token.template gradient<decltype(at)>(c, x, k, s);
      });
  }
  if (token.dq)
    sweep<1>(A{}, span(token.dq, p.dprobs_at.c), p.C, rank, team, false, load, [&](auto at, int c, const auto& x) {
      token.template target_gradient<decltype(at)>(c, x, k.probs, s);
    });
}

// Classes in an access: 16 bytes of the wider type, so that both are full sectors.
template <class In, class Out>
inline constexpr int kRowWidth = kPerVector<In> < kPerVector<Out> ? kPerVector<In> : kPerVector<Out>;

// team: 32, several rows a block, or the block. Shared memory: a Running<T> for each warp of a block's team.
template <class In, class Out, bool PLAIN>
__global__ void __launch_bounds__(kRowThreads, kBlocks<In>)
    cross_entropy_rows(const __grid_constant__ CrossEntropyParams p) {
  using T = compute_t<In>;
  constexpr int W = kRowWidth<In, Out>;
  const int team = p.team, rank = int(threadIdx.x) % team;
  const int64_t i = int64_t(blockIdx.x) * (int(blockDim.x) / team) + int(threadIdx.x) / team;
  if (i >= p.N * p.S) return;  // a whole warp of a team of 32
  const Token<In, Out, PLAIN> token(p, i);
  run_token<Access<W, true>>(
      token, true, rank, team,
      [&](const Out* written, int64_t stride) { return token.template span<W>(written, stride); },
      [&](Running<T>& sum) {
        sum.join_lanes();
        if (team == 32) return __syncwarp();  // gradients may take the place of logits that other lanes have read
        Running<T>* const warps = reinterpret_cast<Running<T>*>(shared_memory());
        if (lane_index() == 0) warps[warp_index()] = sum;
        __syncthreads();
        sum = warps[0];
        for (int w = 1; w < team / 32; ++w) sum.join(warps[w]);
      });
}

// team: warps that take turns at the classes of the same 32 tokens. Shared memory: a Running<T> a thread.
template <class In, class Out, bool PLAIN>
__global__ void __launch_bounds__(kTokenThreads, 2 * kBlocks<In>)
    cross_entropy_tokens(const __grid_constant__ CrossEntropyParams p) {
  using T = compute_t<In>;
  constexpr int W = 4;
  const int team = p.team, rank = warp_index() % team, groups = int(blockDim.x) / 32 / team;
  const int64_t i = (int64_t(blockIdx.x) * groups + warp_index() / team) * 32 + lane_index(), count = p.N * p.S;
  const Token<In, Out, PLAIN> token(p, i < count ? i : count - 1);
  run_token<Access<W, false>>(
      token, i < count, rank, team, [&](const Out*, int64_t) { return Span{0, p.C / W}; },
      [&](Running<T>& sum) {
        if (team == 1) return;
        Running<T>* const warps = reinterpret_cast<Running<T>*>(shared_memory());
        warps[threadIdx.x] = sum;
        __syncthreads();
        const Running<T>* const first = warps + int(threadIdx.x) - rank * 32;
        sum = first[0];
        for (int w = 1; w < team; ++w) sum.join(first[w * 32]);
      });
}

// ---- gradients that the forward left -------------------------------------------------------

// x *= factor; where that is 1, as it mostly is, nothing else is read.
struct ScaleParams {
  void* x;             // [count] of S, from 16 bytes on
  int64_t count;
  const void* factor;  // one, of factor_type
  DType factor_type;
};

inline constexpr int kScaleThreads = 256;

template <class S>
__global__ void __launch_bounds__(kScaleThreads) scale_gradient(const __grid_constant__ ScaleParams p) {
  using T = compute_t<S>;
  constexpr int W = kPerVector<S>;
  const T factor = T(read_as(p.factor, p.factor_type, 0));
  if (factor == 1) return;
  S* const x = static_cast<S*>(p.x);
  const auto scale = [&](auto at, int64_t i) {
    using A = decltype(at);
    const auto before = Classes<S, A>::load(x + i, 0, 1);
    T after[A::kWidth];
#pragma unroll
    for (int j = 0; j < A::kWidth; ++j) after[j] = before[j] * factor;
    store_classes<A>(x + i, 0, 1, after);
  };
  const int64_t step = int64_t(gridDim.x) * kScaleThreads * W;
  int64_t i = (int64_t(blockIdx.x) * kScaleThreads + threadIdx.x) * W;
  for (; i + W <= p.count; i += step) scale(Access<W, true>{}, i);
  for (; i < p.count; ++i) scale(Access<1, false>{}, i);
}

}  // namespace fastlm::cuda
