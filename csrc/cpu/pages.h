// Huge pages for large fresh results. A gradient the size of the logits is new memory at each call:
// in 4 KiB pages the faults alone take longer than computing it (Linux; a hint elsewhere absent).
#pragma once
#include "../check.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastlm {

inline void back_with_huge_pages(const Tensor& t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t(2) << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  const uintptr_t end = begin + uintptr_t(t.numel()) * t.element_size();
  const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge, last = end / kHuge * kHuge;
  // A failure (no such pages in this kernel) leaves ordinary ones.
  if (first < last) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)t;
#endif
}

}  // namespace fastlm
