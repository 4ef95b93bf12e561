// The kernels for one instruction set; compiled with its own flags (see CMakeLists.txt).
#include "problem.h"

#ifdef GK_HAVE_PORTABLE
#include "simd_portable.h"

#include "attend.h"

namespace gk {
const KernelSet *kernels_portable() {
  static const KernelSet set{"portable", MR, scratch_floats, attend, combine, read_all};
  return &set;
}
}  // namespace gk
#else
namespace gk {
const KernelSet *kernels_portable() { return nullptr; }
}  // namespace gk
#endif
