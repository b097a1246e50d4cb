// What a profiler counts of a GPU's memory: bank conflicts of shared memory, sectors of global memory.
//
// Lanes run apart, so a warp's access is put together afterwards: between two meetings of all its lanes,
// the k-th accesses of the lanes at one place of the source belong together. Shared memory has 32 banks
// of 4 bytes; 128 bytes are served at once: 8 lanes of 16 bytes, 16 of 8, 32 of less. A conflict is one
// more turn that a bank needs. Global memory moves in sectors of 32 bytes.
#pragma once
#include <algorithm>
#include <cstring>
#include <map>
#include <sstream>
#include <tuple>

#include "model.h"

namespace simt {
namespace {

struct Counts { uint64_t requests = 0, conflicts = 0, sectors = 0, fewest_sectors = 0; };
// By kernel, file, line and memory.
std::map<std::tuple<std::string, std::string, uint32_t, Memory>, Counts> counts;

template <class T> size_t distinct(std::vector<T>& x) {
  std::sort(x.begin(), x.end());
  return size_t(std::unique(x.begin(), x.end()) - x.begin());
}

// An access of a warp; null for lanes that have no part in it.
void count_access(Memory memory, const void* const (&p)[32], size_t bytes, Site at) {
  Counts& to = counts[{current->name, at.file_name(), at.line(), memory}];
  ++to.requests;
  if (memory == Memory::global) {
    std::vector<uintptr_t> sectors, places;
    for (const void* x : p)
      if (x) sectors.push_back(uintptr_t(x) / 32), places.push_back(uintptr_t(x));
    to.sectors += distinct(sectors);
    to.fewest_sectors += (distinct(places) * bytes + 31) / 32;
    return;
  }
  const int together = std::min<int>(32, 128 / int(bytes));
  for (int begin = 0; begin < 32; begin += together) {
    std::vector<uintptr_t> words;
    for (int lane = begin; lane < begin + together; ++lane)
      for (size_t i = 0; p[lane] && i < bytes; i += 4) words.push_back((uintptr_t(p[lane]) + i) / 4);
    words.resize(distinct(words));
    uint32_t turns[32] = {}, most = 1;
    for (uintptr_t word : words) most = std::max(most, ++turns[word % 32]);
    to.conflicts += most - 1;
  }
}

}  // namespace

void count(Memory memory, const void* p, size_t bytes, Site at) {
  self->warp->accesses.push_back({p, at, memory, uint8_t(bytes), uint8_t(std::countr_zero(self->bit))});
}

void count_matrix(const void* const (&rows)[32], Site at) { count_access(Memory::shared, rows, 16, at); }

void flush_counts(Warp& warp) {
  struct Whole { const void* p[32] = {}; size_t bytes = 0; Site at; };
  std::map<std::tuple<const void*, Memory>, std::vector<Whole>> places;
  std::map<std::tuple<const void*, Memory, int>, size_t> seen;
  for (const Access& x : warp.accesses) {
    const void* place;  // a site is one pointer to constants
    static_assert(sizeof(Site) == sizeof(place));
    std::memcpy(&place, &x.at, sizeof(place));
    const size_t k = seen[{place, x.memory, x.lane}]++;
    std::vector<Whole>& list = places[{place, x.memory}];
    if (list.size() <= k) list.resize(k + 1);
    list[k].p[x.lane] = x.p;
    list[k].bytes = x.bytes;
    list[k].at = x.at;
  }
  for (const auto& [place, list] : places)
    for (const Whole& x : list) count_access(std::get<1>(place), x.p, x.bytes, x.at);
  warp.accesses.clear();
}

}  // namespace simt

#define SIMT_API extern "C" __attribute__((visibility("default")))

SIMT_API void simt_count(bool on) { simt::counting = on; }
SIMT_API void simt_forget_counts() { simt::counts.clear(); }

// A line for each kernel, place and memory, its fields separated by tabs.
SIMT_API const char* simt_counts() {
  static std::string text;
  std::ostringstream lines;
  for (const auto& [key, c] : simt::counts) {
    const auto& [kernel, file, line, memory] = key;
    lines << kernel << '\t' << file << '\t' << line << '\t'
          << (memory == simt::Memory::shared ? "shared" : "global") << '\t' << c.requests << '\t' << c.conflicts
          << '\t' << c.sectors << '\t' << c.fewest_sectors << '\n';
  }
  text = lines.str();
  return text.c_str();
}
