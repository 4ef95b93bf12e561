// The kernels for one instruction set; compiled with its own flags (see CMakeLists.txt).
#include "problem.h"

#ifdef GK_HAVE_AVX2
#include "simd_avx2.h"

#include "attend.h"

namespace gk {
const KernelSet *kernels_avx2() {
  static const KernelSet set{"avx2", MR, scratch_floats, attend, combine, read_all};
  return &set;
}
}  // namespace gk
#else
namespace gk {
const KernelSet *kernels_avx2() { return nullptr; }
}  // namespace gk
#endif
