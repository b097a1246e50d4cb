// Kernels that the model must accept, with what they compute, and kernels that it must reject, by an error
// of its own, a wrong result, or a sanitizer's report. `kernels NAME` runs one: it prints `ok`, or says what
// is wrong and exits with 1. tests/test_simt.py has the list of what is expected.
#include <cstdio>
#include <cstring>
#include <map>
#include <random>
#include <sstream>

#include "cuda/product.cuh"

extern "C" void simt_count(bool on);
extern "C" void simt_forget_counts();
extern "C" const char* simt_counts();

namespace fastlm::cuda {

void expect(bool holds, const char* what = "wrong result") {
  if (!holds) throw std::logic_error(what);
}

template <class P>
void run(void (*kernel)(P), unsigned blocks, unsigned threads, size_t shared, P p, bool together = false) {
  simt::launch(blocks, threads, shared, together, [&] { kernel(p); }, reinterpret_cast<void*>(kernel));
}

std::vector<float> random_values(size_t n) {
  std::mt19937 generator(1);
  std::normal_distribution<float> draw;
  std::vector<float> x(n);
  for (float& v : x) v = draw(generator);
  return x;
}

template <class T> std::vector<T> rounded(const std::vector<float>& x) {
  std::vector<T> y(x.size());
  for (size_t i = 0; i < x.size(); ++i) narrow_to(y[i], x[i]);
  return y;
}

float* shared_floats() { return reinterpret_cast<float*>(shared_memory()); }

struct Floats { const float* x; float* y; int n; };

// ---- barriers and reductions ---------------------------------------------------------------

template <bool BARRIER> __global__ void block_sums(Floats p) {
  const int i = int(threadIdx.x), n = int(blockDim.x);
  float* const s = shared_floats();
  s[i] = p.x[int(blockIdx.x) * n + i];
  if (BARRIER) __syncthreads();
  const float next = s[(i + 1) % n];
  __syncthreads();
  const float sum = block_reduce<4>(next, s, [](float a, float b) { return a + b; });
  if (i == 0) p.y[blockIdx.x] = sum;
}

template <bool BARRIER> void check_block_sums() {
  std::vector<float> x(3 * 128), y(3);
  for (size_t i = 0; i < x.size(); ++i) x[i] = float(i % 17);
  run(block_sums<BARRIER>, 3, 128, 128 * 4, Floats{x.data(), y.data(), 0});
  for (int b = 0; b < 3; ++b) {
    float sum = 0;
    for (int i = 0; i < 128; ++i) sum += x[size_t(128 * b + i)];
    expect(y[size_t(b)] == sum);
  }
}

template <bool SYNC> __global__ void turn_in_warp(Floats p) {
  float* const s = shared_floats() + warp_index() * 32;
  s[lane_index()] = p.x[threadIdx.x];
  if (SYNC) __syncwarp();
  p.y[threadIdx.x] = s[31 - lane_index()];
}

template <bool SYNC> void check_turn_in_warp() {
  const std::vector<float> x = random_values(64);
  std::vector<float> y(64);
  run(turn_in_warp<SYNC>, 1, 64, 256, Floats{x.data(), y.data(), 0});
  for (size_t i = 0; i < 64; ++i) expect(y[i] == x[i / 32 * 32 + 31 - i % 32]);
}

// A shuffle is no barrier for memory.
__global__ void turn_after_shuffle(Floats p) {
  float* const s = shared_floats();
  store_shared(s + lane_index(), p.x[lane_index()]);
  const float sum = warp_sum(1.f);
  p.y[lane_index()] = sum * load_shared(s + 31 - lane_index());
}

// The next round's writes may pass this one's reads.
template <bool COPY> __global__ void reuse_at_once(Floats p) {
  float* const s = shared_floats();
  const int i = 4 * int(threadIdx.x);
  for (int round = 0; round < 2; ++round) {
    if (COPY) cp_async(s + i, p.x + i, true);
    else store_shared(reinterpret_cast<float4*>(s + i), make_float4(0, 0, 0, 0));
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    p.y[i] = load_shared(s + (i + 128) % 256);
  }
}

void run_alone(void (*kernel)(Floats), unsigned threads) {
  std::vector<float> x(256), y(256);
  run(kernel, 1, threads, 1024, Floats{x.data(), y.data(), 0});
}

__global__ void transpose(Floats p) {
  float* const s = shared_floats();  // 32 rows of 33
  const int column = lane_index();
  for (int row = warp_index(); row < 32; row += 4) s[row * 33 + column] = p.x[row * p.n + int(blockIdx.x) * 32 + column];
  __syncthreads();
  for (int row = warp_index(); row < 32; row += 4) p.y[(int(blockIdx.x) * 32 + row) * 32 + column] = s[column * 33 + row];
}

void check_transpose() {
  const std::vector<float> x = random_values(32 * 96);
  std::vector<float> y(x.size());
  run(transpose, 3, 128, 32 * 33 * 4, Floats{x.data(), y.data(), 96});
  for (size_t i = 0; i < 32; ++i)
    for (size_t j = 0; j < 96; ++j) expect(y[j * 32 + i] == x[i * 96 + j]);
}

// ---- copies --------------------------------------------------------------------------------

enum class Flaw { none, no_wait, late_wait, no_commit, no_barrier, no_last_wait };

// Sums n tiles of 512 floats through a ring of three, two copies ahead.
template <Flaw FLAW> __global__ void pipeline(Floats p) {
  const int i = int(threadIdx.x);
  const auto start = [&](int tile) {
    if (tile < p.n) cp_async(shared_floats() + tile % 3 * 512 + 4 * i, p.x + tile * 512 + 4 * i, true);
    if (FLAW != Flaw::no_commit) cp_async_commit();
  };
  start(0);
  start(1);
  float sum = 0;
  for (int tile = 0; tile < p.n; ++tile) {
    if (FLAW == Flaw::late_wait) cp_async_wait<2>();
    else if (FLAW != Flaw::no_wait) cp_async_wait<1>();
    if (FLAW != Flaw::no_barrier) __syncthreads();
    start(tile + 2);
    for (int k = 0; k < 4; ++k) sum += shared_floats()[tile % 3 * 512 + (4 * i + 128 + k) % 512];
  }
  if (FLAW != Flaw::no_last_wait) cp_async_wait<0>();
  else cp_async(shared_floats() + 4 * i, p.x, true);
  p.y[i] = sum;
}

template <Flaw FLAW> void check_pipeline() {
  std::vector<float> x(7 * 512), y(128);
  for (size_t i = 0; i < x.size(); ++i) x[i] = float(i % 23);
  run(pipeline<FLAW>, 1, 128, 3 * 2048, Floats{x.data(), y.data(), 7});
  for (size_t i = 0; i < 128; ++i) {
    float sum = 0;
    for (size_t tile = 0; tile < 7; ++tile)
      for (size_t k = 0; k < 4; ++k) sum += x[tile * 512 + (4 * i + 128 + k) % 512];
    expect(y[i] == sum);
  }
}

// ---- matrices ------------------------------------------------------------------------------

struct Words { const uint16_t* x; uint32_t* y; };

template <bool TRANSPOSED> __global__ void load_matrices(Words p) {
  auto* const s = reinterpret_cast<uint16_t*>(shared_memory());
  for (int i = lane_index(); i < 256; i += 32) s[i] = p.x[i];
  __syncwarp();
  uint32_t r[4];
  if (TRANSPOSED) ldmatrix_transposed(r, s + 8 * lane_index());
  else ldmatrix(r, s + 8 * lane_index());
  for (int i = 0; i < 4; ++i) p.y[4 * lane_index() + i] = r[i];
}

void check_ldmatrix() {
  uint16_t x[4][8][8];
  uint32_t y[32][4], z[32][4];
  for (uint16_t i = 0; i < 256; ++i) x[i / 64][i / 8 % 8][i % 8] = uint16_t(1000 + i);
  run(load_matrices<false>, 1, 32, 512, Words{x[0][0], y[0]});
  run(load_matrices<true>, 1, 32, 512, Words{x[0][0], z[0]});
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int g = lane / 4, t = 2 * (lane % 4);
      expect(y[lane][i] == (uint32_t(x[i][g][t + 1]) << 16 | x[i][g][t]));
      expect(z[lane][i] == (uint32_t(x[i][t + 1][g]) << 16 | x[i][t][g]));
    }
}

template <class T> struct Product { const T *a, *b; float* c; };

// c = a b, each element by the place that the PTX ISA gives it: a 16 x 16, b 16 x 8.
template <class T> __global__ void one_mma(Product<T> p) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  const auto two = [](T low, T high) { return uint32_t(high.bits) << 16 | low.bits; };
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; ++i) {
    const T* const from = p.a + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8;
    a[i] = two(from[0], from[1]);
  }
  for (int i = 0; i < 2; ++i) b[i] = two(p.b[(2 * t + 8 * i) * 8 + g], p.b[(2 * t + 8 * i + 1) * 8 + g]);
  float c[4] = {1, 1, 1, 1};
  mma(c, a, b[0], b[1], T{});
  for (int i = 0; i < 4; ++i) p.c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = c[i];
}

// The same of a 16 x 8, b 8 x 8.
__global__ void one_mma_tf32(Product<tf32> p) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  const auto word = [](tf32 x) { return __float_as_uint(x.value); };
  const auto a_at = [&](int i) { return word(p.a[(g + i % 2 * 8) * 8 + t + i / 2 * 4]); };
  const uint32_t a[4] = {a_at(0), a_at(1), a_at(2), a_at(3)};
  float c[4] = {1, 1, 1, 1};
  mma(c, a, word(p.b[t * 8 + g]), word(p.b[(t + 4) * 8 + g]), tf32{});
  for (int i = 0; i < 4; ++i) p.c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = c[i];
}

template <class T> void check_mma() {
  constexpr size_t K = 32 / sizeof(T);
  std::vector<T> x = rounded<T>(random_values(24 * K));
  for (T& v : x) v = operand(v);
  std::vector<float> c(128);
  const Product<T> p{x.data(), x.data() + 16 * K, c.data()};
  if constexpr (sizeof(T) == 4) run(one_mma_tf32, 1, 32, 0, p);
  else run(one_mma<T>, 1, 32, 0, p);
  for (size_t i = 0; i < 16; ++i)
    for (size_t j = 0; j < 8; ++j) {
      double sum = 1;
      for (size_t k = 0; k < K; ++k) sum += double(widen(x[i * K + k])) * widen(x[16 * K + k * 8 + j]);
      expect(fabs(c[i * 8 + j] - sum) < 1e-5);
    }
}

// (A B^T) B for A 16 x 32 and B 16 x 32, by copies, tiles and both products.
template <class T> __global__ void two_products(Product<T> p) {
  const Tile<T, 32> a{reinterpret_cast<T*>(shared_memory())}, b{a.data + 16 * 32};
  copy_tile<16, 32>(a, p.a, 32, 16, 32);
  copy_tile<16, 32>(b, p.b, 32, 15, 32);  // its last row is zero
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  float s[2][4] = {}, c[4][4] = {};
  multiply_rows<32>(s, a, 0, b, 0);
  multiply_registers(c, s, b, 0, 0);
  const int g = lane_index() / 4, t = lane_index() % 4;
  for (int n = 0; n < 4; ++n)
    for (int i = 0; i < 4; ++i) p.c[(g + i / 2 * 8) * 32 + 8 * n + 2 * t + i % 2] = c[n][i];
}

template <class T> void check_products(double bound) {
  const std::vector<T> x = rounded<T>(random_values(1024));
  std::vector<float> c(512);
  run(two_products<T>, 1, 32, 1024 * sizeof(T), Product<T>{x.data(), x.data() + 512, c.data()});
  for (size_t i = 0; i < 16; ++i)
    for (size_t j = 0; j < 32; ++j) {
      double sum = 0;
      for (size_t n = 0; n < 15; ++n) {
        double s = 0;
        for (size_t k = 0; k < 32; ++k) s += double(widen(x[i * 32 + k])) * widen(x[512 + n * 32 + k]);
        sum += s * widen(x[512 + n * 32 + j]);
      }
      expect(fabs(c[i * 32 + j] - sum) < bound);
    }
}

enum class Slip {
  none, no_wgmma_fence, no_fence_for_products, late_fence_for_products, no_wait, no_last_wait, sums_written,
  factors_written, matrix_written, three_warps, shifted,
};

// (A B^T) B for A 64 x 128 and B 64 x 128, by a warpgroup.
template <class T, Slip SLIP> __global__ void two_warpgroup_products(Product<T> p) {
  using Matrix = Panels<T, 128, 64>;
  const int warp = warp_index(), lane = lane_index(), g = lane / 4, t = lane % 4;
  const Matrix a{reinterpret_cast<T*>(shared_memory())}, b{a.data + 64 * 128 + (SLIP == Slip::shifted ? 64 : 0)};
  copy_tile<64, 128>(a, p.a, 128, 64, 128);
  copy_tile<64, 128>(b, p.b, 128, 63, 128);  // its last row is zero
  cp_async_commit();
  cp_async_wait<0>();
  if (SLIP != Slip::no_fence_for_products && SLIP != Slip::late_fence_for_products) fence_for_products();
  __syncthreads();
  if (SLIP == Slip::late_fence_for_products) fence_for_products();
  uint32_t x[8][4], words[4][4];
  for (int k = 0; k < 8; ++k) ldmatrix(x[k], a.chunk(16 * warp + lane % 16, 2 * k + lane / 16));
  float s[8][4], c[16][4] = {};
  if (SLIP != Slip::no_wgmma_fence) wgmma_fence(s, x);
  if (SLIP != Slip::three_warps || warp < 3) {
    start_rows(s, x, b, 0);
    wgmma_commit();
  }
  if (SLIP == Slip::sums_written) s[0][0] = 0;
  if (SLIP == Slip::factors_written) x[0][0] = 0;
  if (SLIP == Slip::matrix_written) {
    __syncthreads();
    if (threadIdx.x == 0) store_shared(reinterpret_cast<uint32_t*>(b.data), 0u);
  }
  if (SLIP != Slip::no_wait) wgmma_wait<0>(s, x);
  for (int n = 0; n < 8; ++n)
    for (int half = 0; half < 2; ++half) words[n / 2][n % 2 * 2 + half] = pack(s[n][2 * half], s[n][2 * half + 1], T{});
  wgmma_fence(c, words);
  start_columns(c, words, b, 0);
  wgmma_commit();
  if (SLIP != Slip::no_last_wait) wgmma_wait<0>(c, words);
  for (int n = 0; n < 16; ++n)
    for (int i = 0; i < 4; ++i) p.c[(16 * warp + g + i / 2 * 8) * 128 + 8 * n + 2 * t + i % 2] = c[n][i];
}

template <class T, Slip SLIP> void check_warpgroups(unsigned threads = 128) {
  const std::vector<T> x = rounded<T>(random_values(2 * 64 * 128));
  std::vector<float> c(64 * 128);
  run(two_warpgroup_products<T, SLIP>, 1, threads, 33 * 1024, Product<T>{x.data(), x.data() + 64 * 128, c.data()});
  for (size_t i = 0; i < 64; ++i) {
    double sums[128] = {};
    for (size_t n = 0; n < 63; ++n) {
      double s = 0;
      for (size_t k = 0; k < 128; ++k) s += double(widen(x[i * 128 + k])) * widen(x[(64 + n) * 128 + k]);
      for (size_t j = 0; j < 128; ++j) sums[j] += s * widen(x[(64 + n) * 128 + j]);
    }
    for (size_t j = 0; j < 128; ++j) expect(fabs(c[i * 128 + j] - sums[j]) < 2);  // of 90
  }
}

void check_conversions() {
  for (uint32_t i = 0; i < 65536; ++i) {
    const f16 x{uint16_t(i)}, next{uint16_t(i + 1)};
    const bf16 b{uint16_t(i)};
    if (const float y = widen(x); y == y) expect(narrow<f16>(y).bits == i);
    if (const float y = widen(b); y == y) expect(narrow<bf16>(y).bits == i);
    const float low = widen(x), high = widen(next), middle = (low + high) / 2;
    if (!(fabsf(low) < 65536 && fabsf(high) < 65536)) continue;
    expect(narrow<f16>(middle).bits == (i % 2 ? next.bits : i));  // ties to even
    expect(narrow<f16>(nextafterf(middle, low)).bits == i && narrow<f16>(nextafterf(middle, high)).bits == next.bits);
  }
  expect(widen(f16{0x3555}) == 0.333251953125f && widen(f16{1}) == 0x1p-24f && widen(f16{0xfbff}) == -65504);
  expect(narrow<f16>(65519.99f).bits == 0x7bff && narrow<f16>(65520.f).bits == 0x7c00);
  expect(narrow<f16>(NAN).bits == 0x7fff && narrow<bf16>(-NAN).bits == 0x7fff);
  expect(pack(1, -2, bf16{}) == 0xc0003f80 && pack(1, -2, f16{}) == 0xc0003c00);
  const float step = 0x1p-10f, tie = 1 + step / 2;  // away from 0
  expect(round_tf32(tie) == 1 + step && round_tf32(-tie) == -1 - step && round_tf32(nextafterf(tie, 0)) == 1);
  expect(round_tf32(1.9999f) == 2 && round_tf32(0x1.ffdp127f) == 0x1.ffcp127f);
  expect(round_tf32(INFINITY) == INFINITY && round_tf32(0x1.ffep127f) == INFINITY && round_tf32(NAN) != round_tf32(NAN));
}

// ---- lanes ---------------------------------------------------------------------------------

struct Ints { int* y; };

__global__ void shuffles(Ints p) {
  const int lane = lane_index();
  int* y = p.y + lane;
  const auto put = [&](int x) { *y = x, y += 32; };
  put(__shfl_sync(kAllLanes, lane, 5));
  put(__shfl_sync(kAllLanes, lane, 5 + 8 * lane, 8));  // the lane in its group of 8
  put(__shfl_up_sync(kAllLanes, lane, 3));
  put(__shfl_up_sync(kAllLanes, lane, 1, 4));
  put(__shfl_down_sync(kAllLanes, lane, 3));
  put(__shfl_down_sync(kAllLanes, lane, 1, 4));
  put(__shfl_xor_sync(kAllLanes, lane, 12));
  put(int(__shfl_xor_sync(kAllLanes, double(lane), 16)));
  put(int(__ballot_sync(kAllLanes, lane % 3 == 0)));
  put(__any_sync(kAllLanes, lane == 7) + 2 * __all_sync(kAllLanes, lane < 32) + 4 * __all_sync(kAllLanes, lane));
  const uint32_t odd = 0xaaaaaaaau;
  if (lane % 2) {  // the two halves meet apart
    put(__shfl_sync(odd, lane, 9) + 100 * __all_sync(odd, lane % 2));
  } else {
    put(__shfl_sync(~odd, lane, 8) + 100 * __any_sync(~odd, lane % 2));
  }
  put(warp_sum(lane));
  put(warp_sum<8>(lane));
  put(warp_max(lane ^ 5));
}

void check_shuffles() {
  int y[14][32];
  run(shuffles, 1, 32, 0, Ints{y[0]});
  for (int l = 0; l < 32; ++l) {
    const int want[] = {5, l / 8 * 8 + 5, l < 3 ? l : l - 3, l % 4 ? l - 1 : l, l > 28 ? l : l + 3, l % 4 == 3 ? l : l + 1,
                        l ^ 12, l ^ 16, 0x49249249, 3, l % 2 ? 109 : 8, 496, l / 8 * 64 + 28, 31};
    for (int i = 0; i < 14; ++i) expect(y[i][l] == want[i]);
  }
}

__global__ void half_a_warp_more(Ints p) {
  const uint32_t mask = threadIdx.x < 32 ? kAllLanes : 0xffff;
  p.y[threadIdx.x] = int(__ballot_sync(mask, 1));
  __syncthreads();
}

void check_partial_warp() {
  int y[48];
  run(half_a_warp_more, 1, 48, 0, Ints{y});
  for (int i = 0; i < 48; ++i) expect(y[i] == (i < 32 ? -1 : 0xffff));
}

// ---- blocks --------------------------------------------------------------------------------

struct Ring { uint32_t* counters; int* y; int rounds; };

// Blocks in two groups of 3; each adds what its neighbour had in the round before.
template <bool BARRIER> __global__ void ring(Ring p) {
  const int group = int(blockIdx.x) / 3, own = int(blockIdx.x) % 3, rounds = p.rounds + group;
  int* const y = p.y + group * 192;  // two buffers of 3 blocks of 32
  uint32_t round = 0;
  for (int r = 0; r < rounds; ++r) {
    const int from = r % 2 * 96, to = 96 - from, at = int(threadIdx.x);
    y[to + own * 32 + at] = load_global(y + from + (own + 1) % 3 * 32 + 31 - at) + 1;
    if (BARRIER) grid_barrier(p.counters + group, round++, 3);
  }
}

template <bool BARRIER> void check_ring() {
  uint32_t counters[2] = {};
  int y[2][2][96] = {};
  run(ring<BARRIER>, 6, 32, 0, Ring{counters, y[0][0], 5}, true);
  for (int group = 0; group < 2; ++group)
    for (int x : y[group][1 - group]) expect(x == 5 + group);
}

struct Total { const int* x; int* partial; uint32_t* arrived; int* y; };

// The last block to arrive adds up what the others left.
template <bool FENCE> __global__ void total(Total p) {
  int* const last = reinterpret_cast<int*>(shared_memory());
  const int sum = warp_sum(p.x[blockIdx.x * 32 + threadIdx.x]);
  if (threadIdx.x == 0) {
    p.partial[blockIdx.x] = sum;
    if (FENCE) __threadfence();
    *last = atomicAdd(p.arrived, 1u) == gridDim.x - 1;
    if (FENCE) __threadfence();
  }
  __syncthreads();
  if (*last && threadIdx.x == 0)
    for (unsigned i = 0; i < gridDim.x; ++i) *p.y += p.partial[i];
}

template <bool FENCE> void check_total() {
  std::vector<int> x(160, 1), partial(5);
  uint32_t arrived = 0;
  int y = 0;
  run(total<FENCE>, 5, 32, 4, Total{x.data(), partial.data(), &arrived, &y});
  expect(y == 160);
}

__global__ void histogram(Ints p) {
  atomicAdd(p.y + threadIdx.x % 4, 1);
  atomicMax(p.y + 4, int(threadIdx.x + blockIdx.x));
}

void check_atomics() {
  int y[5] = {};
  run(histogram, 3, 64, 0, Ints{y});
  expect(y[0] == 48 && y[3] == 48 && y[4] == 65);
}

__global__ void same_place(Ints p) { *p.y = int(blockIdx.x); }

void check_blocks_race() {
  int y = 0;
  run(same_place, 2, 2, 0, Ints{&y});
}

__global__ void draws(Ints p) {
  const RandomWords r = random_words(0x123456789abcdefull, threadIdx.x, 7, 3);
  for (int i = 0; i < 4; ++i) p.y[4 * threadIdx.x + unsigned(i)] = int(r.x[i]);
}

void print_philox() {
  uint32_t y[32];
  run(draws, 1, 8, 0, Ints{reinterpret_cast<int*>(y)});
  for (uint32_t x : y) std::printf("%u\n", x);
}

// ---- what CUDA leaves undefined ------------------------------------------------------------

enum class Bad {
  barrier_and_return, barrier_in_branches, barrier_and_shuffle, shuffle_from_other_half, mask_without_caller,
  mask_with_returned, mask_differs, ops_differ, part_of_mma, factor_not_rounded, part_of_block_in_grid_barrier, wrong_round,
  shared_beyond, shared_beyond_plain, shared_misaligned, global_misaligned, matrix_misaligned, copy_beyond,
  copy_misaligned, shared_as_global,
};

struct Memory { float* x; uint32_t* counter; };

template <Bad BAD> __global__ void bad(Memory p) {
  const int i = int(threadIdx.x);
  float* const s = shared_floats();  // 64
  uint32_t r[4] = {};
  float c[4] = {};
  if constexpr (BAD == Bad::barrier_and_return) {
    if (i >= 32) return;
    __syncthreads();
  } else if constexpr (BAD == Bad::barrier_in_branches) {
    if (i < 32) __syncthreads();
    else
      __syncthreads();
  } else if constexpr (BAD == Bad::barrier_and_shuffle) {
    if (i == 0) __syncthreads();
    __shfl_sync(kAllLanes, i, 0);
  } else if constexpr (BAD == Bad::shuffle_from_other_half) {
    if (i < 16) __shfl_sync(0xffff, i, 20);
  } else if constexpr (BAD == Bad::mask_without_caller) {
    if (i < 16) __syncwarp(0xff);
  } else if constexpr (BAD == Bad::mask_with_returned) {
    if (i % 32 == 3) return;
    __ballot_sync(kAllLanes, 1);
  } else if constexpr (BAD == Bad::mask_differs) {
    __syncwarp(i % 32 ? kAllLanes : 0x7fffffff);
  } else if constexpr (BAD == Bad::ops_differ) {
    if (i % 32 < 16) __shfl_sync(kAllLanes, i, 0);
    else __ballot_sync(kAllLanes, i);
  } else if constexpr (BAD == Bad::part_of_mma) {
    if (i % 32 < 31) mma(c, r, 0, 0, bf16{});
  } else if constexpr (BAD == Bad::factor_not_rounded) {
    mma(c, r, 0, __float_as_uint(1 + 0x1p-11f), tf32{});
  } else if constexpr (BAD == Bad::part_of_block_in_grid_barrier) {
    if (i < 32) grid_barrier(p.counter, 0, 1);
  } else if constexpr (BAD == Bad::wrong_round) {
    grid_barrier(p.counter, 1, 1);
  } else if constexpr (BAD == Bad::shared_beyond) {
    load_shared(s + i + 1);
  } else if constexpr (BAD == Bad::shared_beyond_plain) {
    s[i + 1] = 0;
  } else if constexpr (BAD == Bad::shared_misaligned) {
    if (i < 4) load_shared(reinterpret_cast<const float4*>(s + i));
  } else if constexpr (BAD == Bad::global_misaligned) {
    load_global(reinterpret_cast<const float2*>(p.x + 1));
  } else if constexpr (BAD == Bad::matrix_misaligned) {
    ldmatrix(r, s + i % 32);
  } else if constexpr (BAD == Bad::copy_beyond) {
    cp_async(s + 4 * i, p.x, true);
    cp_async_commit();
    cp_async_wait<0>();
  } else if constexpr (BAD == Bad::copy_misaligned) {
    cp_async(s, p.x + 1, true);
  } else if constexpr (BAD == Bad::shared_as_global) {
    load_global(s);
  }
  (void)c, (void)r, (void)s;
}

template <Bad BAD> void run_bad() {
  alignas(16) float x[4] = {};
  uint32_t counter = 0;
  run(bad<BAD>, 1, 64, 256, Memory{x, &counter}, true);
}

__global__ void beyond_global(Floats p) { p.y[threadIdx.x + 1] = p.x[threadIdx.x]; }

void run_beyond_global() {
  std::vector<float> x(32), y(32);
  run(beyond_global, 1, 32, 0, Floats{x.data(), y.data(), 0});
}

void run_barrier_of_apart() {
  std::vector<int> y(192);
  uint32_t counters[2] = {};
  run(ring<true>, 3, 32, 0, Ring{counters, y.data(), 1}, false);
}

void run_large_shared() { run(same_place, 1, 1, (99 << 10) + 1, Ints{nullptr}); }

void run_large_block() { run(same_place, 1, 1025, 0, Ints{nullptr}); }

// ---- counts --------------------------------------------------------------------------------

struct Access { float* global; int kind; };

__global__ void accesses(Access p) {
  const int lane = lane_index();
  float* const s = shared_floats();  // 1024
  const Tile<bf16, 64> tile{reinterpret_cast<bf16*>(s)};
  uint32_t r[4];
  switch (p.kind) {
    case 0: load_shared(s + lane); break;
    case 1: load_shared(s + 2 * lane); break;
    case 2: load_shared(s + 32 * lane); break;
    case 3: load_shared(s); break;
    case 4: store_shared(reinterpret_cast<float4*>(s) + lane, make_float4(0, 0, 0, 0)); break;
    case 5: store_shared(reinterpret_cast<float4*>(s) + 8 * lane, make_float4(0, 0, 0, 0)); break;
    case 6: load_shared(reinterpret_cast<float2*>(s) + lane); break;
    case 7: load_shared(reinterpret_cast<float2*>(s) + 2 * lane); break;
    case 8: ldmatrix(r, tile.chunk(lane, 1)); break;                       // rows turned
    case 9: ldmatrix(r, tile.data + 64 * lane); break;                     // rows of 128 bytes as they are
    case 10: load_global(p.global + lane); break;
    case 11: load_global(p.global + 1 + lane); break;
    case 12: load_global(p.global + 8 * lane); break;
    case 13: load_global(reinterpret_cast<float4*>(p.global) + lane); break;
    case 14: load_global(p.global); break;
    case 15: cp_async(s + 4 * lane, p.global + 4 * lane, lane < 16); break;
    case 16: for (int i = 0; i < 4; ++i) if (lane % 2) load_shared(s + 64 * i + 2 * lane); break;
  }
  cp_async_commit();
  cp_async_wait<0>();
}

void check_counts() {
  struct Want { int requests, conflicts, sectors, fewest; };
  const Want want[] = {{1, 0, 0, 0}, {1, 1, 0, 0}, {1, 31, 0, 0}, {1, 0, 0, 0}, {1, 0, 0, 0}, {1, 28, 0, 0},
                       {1, 0, 0, 0}, {1, 2, 0, 0}, {1, 0, 0, 0}, {1, 28, 0, 0}, {1, 0, 4, 4}, {1, 0, 5, 4},
                       {1, 0, 32, 4}, {1, 0, 16, 16}, {1, 0, 1, 1}, {2, 0, 8, 8}, {4, 4, 0, 0}};
  alignas(32) float global[256] = {};
  for (int kind = 0; const Want& w : want) {
    simt_forget_counts();
    simt_count(true);
    run(accesses, 1, 32, 4096, Access{global, kind++});
    simt_count(false);
    std::istringstream lines(simt_counts());
    int sums[4] = {};
    for (std::string line; std::getline(lines, line);) {
      std::istringstream fields(line);
      std::string name, file, at, memory;
      fields >> name >> file >> at >> memory;
      expect(name == "accesses" && file.ends_with("kernels.cpp"), "the counts' names");
      for (int& sum : sums) {
        int x = 0;
        fields >> x;
        sum += x;
      }
    }
    if (sums[0] != w.requests || sums[1] != w.conflicts || sums[2] != w.sectors || sums[3] != w.fewest)
      throw std::logic_error("wrong counts of access " + std::to_string(kind - 1) + ":\n" + simt_counts());
  }
}

// A warp's mma, many times: how fast the model is.
__global__ void many_mma(Floats p) {
  const uint32_t a[4] = {};
  float c[4] = {};
  for (int i = 0; i < p.n; ++i) mma(c, a, 0, 0, bf16{});
  p.y[threadIdx.x] = c[0];
}

void run_many() {
  std::vector<float> y(128);
  run(many_mma, 1, 128, 0, Floats{nullptr, y.data(), 100'000});
}

#define BAD(name) {#name, run_bad<Bad::name>}
const std::map<std::string, void (*)()> kTests = {
    {"block_sums", check_block_sums<true>},
    {"turn_in_warp", check_turn_in_warp<true>},
    {"transpose", check_transpose},
    {"pipeline", check_pipeline<Flaw::none>},
    {"ldmatrix", check_ldmatrix},
    {"mma_bf16", check_mma<bf16>},
    {"mma_f16", check_mma<f16>},
    {"mma_tf32", check_mma<tf32>},
    {"products_bf16", [] { check_products<bf16>(0.5); }},
    {"products_f16", [] { check_products<f16>(0.5); }},
    {"products_tf32", [] { check_products<tf32>(0.1); }},
    {"products_float", [] { check_products<float>(1e-3); }},
    {"warpgroups_bf16", [] { check_warpgroups<bf16, Slip::none>(); }},
    {"warpgroups_f16", [] { check_warpgroups<f16, Slip::none>(); }},
    {"conversions", check_conversions},
    {"shuffles", check_shuffles},
    {"partial_warp", check_partial_warp},
    {"grid_barrier", check_ring<true>},
    {"last_block", check_total<true>},
    {"atomics", check_atomics},
    {"philox", print_philox},
    {"counts", check_counts},
    {"many_mma", run_many},
    {"missing_barrier", check_block_sums<false>},
    {"missing_syncwarp", check_turn_in_warp<false>},
    {"shuffle_for_barrier", [] { run_alone(turn_after_shuffle, 32); }},
    {"missing_second_barrier", [] { run_alone(reuse_at_once<false>, 64); }},
    {"copy_over_reads", [] { run_alone(reuse_at_once<true>, 64); }},
    {"missing_wait", check_pipeline<Flaw::no_wait>},
    {"wait_for_too_few", check_pipeline<Flaw::late_wait>},
    {"missing_commit", check_pipeline<Flaw::no_commit>},
    {"missing_barrier_after_wait", check_pipeline<Flaw::no_barrier>},
    {"missing_last_wait", check_pipeline<Flaw::no_last_wait>},
    {"missing_grid_barrier", check_ring<false>},
    {"missing_fence", check_total<false>},
    {"blocks_race", check_blocks_race},
    {"global_beyond", run_beyond_global},
    {"barrier_of_blocks_apart", run_barrier_of_apart},
    {"large_block", run_large_block},
    {"large_shared", run_large_shared},
    {"product_without_wgmma_fence", [] { check_warpgroups<bf16, Slip::no_wgmma_fence>(); }},
    {"product_without_fence", [] { check_warpgroups<bf16, Slip::no_fence_for_products>(); }},
    {"product_before_fence", [] { check_warpgroups<bf16, Slip::late_fence_for_products>(); }},
    {"product_without_wait", [] { check_warpgroups<bf16, Slip::no_wait>(); }},
    {"product_without_last_wait", [] { check_warpgroups<bf16, Slip::no_last_wait>(); }},
    {"sums_written_under_way", [] { check_warpgroups<bf16, Slip::sums_written>(); }},
    {"factors_written_under_way", [] { check_warpgroups<bf16, Slip::factors_written>(); }},
    {"matrix_written_under_way", [] { check_warpgroups<bf16, Slip::matrix_written>(); }},
    {"three_warps_of_four", [] { check_warpgroups<bf16, Slip::three_warps>(); }},
    {"matrix_not_at_1024_bytes", [] { check_warpgroups<bf16, Slip::shifted>(); }},
    {"part_of_warpgroup", [] { check_warpgroups<bf16, Slip::none>(96); }},
    BAD(barrier_and_return), BAD(barrier_in_branches), BAD(barrier_and_shuffle), BAD(shuffle_from_other_half),
    BAD(mask_without_caller), BAD(mask_with_returned), BAD(mask_differs), BAD(ops_differ), BAD(part_of_mma),
    BAD(factor_not_rounded),
    BAD(part_of_block_in_grid_barrier), BAD(wrong_round), BAD(shared_beyond), BAD(shared_beyond_plain),
    BAD(shared_misaligned), BAD(global_misaligned), BAD(matrix_misaligned), BAD(copy_beyond), BAD(copy_misaligned),
    BAD(shared_as_global),
};

}  // namespace fastlm::cuda

int main(int count, char** arguments) {
  using fastlm::cuda::kTests;
  const auto test = kTests.find(count == 2 ? arguments[1] : "");
  if (test == kTests.end()) {
    for (const auto& [name, function] : kTests) std::puts(name.c_str());
    return 2;
  }
  try {
    test->second();
  } catch (const std::exception& error) {
    std::puts(error.what());
    return 1;
  }
  std::puts("ok");
}
