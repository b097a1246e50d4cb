// Products of warpgroups that are under way: where the PTX ISA's descriptors say that their matrices lie, swizzled.
#pragma once
#include <cstdint>
#include <source_location>
#include <vector>

namespace simt {

inline constexpr uint32_t kUnderWay = 0xffffffff;  // what registers hold until the wait: a NaN

// Of one warp: its 16 rows.
struct Product {
  float* c[32];           // [tiles][4] of each lane
  const uint32_t* a[32];  // [4]
  uint32_t words[32][4];  // of a, at the start
  uint64_t b;
  bool transposed, add;
  int tiles;
  uint32_t group;
  std::source_location at;
  void (*make)(const Product&, const unsigned char* shared, float (&sums)[16][128]);
  std::vector<float> before;  // [32][tiles][4]: c at the start; empty where it is of a product that was under way then

  // 16 bytes of shared memory that hold element (k, n) of b and its neighbours, as an offset.
  uint32_t chunk(uint32_t k, uint32_t n) const {
    const auto field = [this](int bit) { return uint32_t(b >> bit & 0x3fff) * 16; };
    const uint32_t leading = field(16), stride = field(32);
    const uint32_t linear = field(0) + (transposed ? n % 64 * 2 + n / 64 * leading + k % 8 * 128 + k / 8 * stride
                                                   : n % 8 * 128 + n / 8 * stride + k * 2);
    return (linear ^ (linear >> 7 & 7) << 4) & ~15u;
  }
  // Calls f(offset) for each 16 bytes of b.
  template <class F> void each_chunk(const F& f) const {
    const uint32_t columns = 8 * uint32_t(tiles);
    for (uint32_t k = 0; k < 16; k += transposed ? 1 : 8)
      for (uint32_t n = 0; n < columns; n += transposed ? 8 : 1) f(chunk(k, n));
  }
  uint16_t element(const unsigned char* shared, uint32_t k, uint32_t n) const {
    uint16_t x;
    __builtin_memcpy(&x, shared + chunk(k, n) + 2 * (transposed ? n % 8 : k % 8), 2);
    return x;
  }
};

}  // namespace simt
