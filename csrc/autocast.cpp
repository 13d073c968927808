// Under autocast the inputs stay as they are, half types included, and the loss is float32: no pass over memory is spent on
// conversion, and the terms have the accuracy of float32. float64 stays float64. (Other devices: kl_ext/_other_devices.py.)
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "plan.h"
#include "signature.h"

namespace kl_ext {
namespace {

struct Autocast {
  static at::Tensor forward(const Call& call) {
    const c10::impl::ExcludeDispatchKeyGuard guard(
        c10::DispatchKeySet({c10::DispatchKey::AutocastCPU, c10::DispatchKey::AutocastCUDA}));
    Call in_float = call;
    in_float.dtype = call.dtype.value_or(arithmetic_type(call.tensors));
    return call.op->forward(in_float);
  }
};

TORCH_LIBRARY_IMPL(kl_ext, AutocastCPU, m) { register_layer<Autocast>(m); }
TORCH_LIBRARY_IMPL(kl_ext, AutocastCUDA, m) { register_layer<Autocast>(m); }

} // namespace
} // namespace kl_ext
