// Under autocast the inputs stay as they are, half types included, and the loss is float32: no pass over memory is spent on
// conversion, and the terms have the accuracy of float32. float64 stays float64.
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "plan.h"
#include "signature.h"

namespace kl_ext {
namespace {

struct Autocast {
  static at::Tensor forward(const Call& call) {
    const c10::impl::ExcludeDispatchKeyGuard guard(c10::autocast_dispatch_keyset);
    Call in_float = call;
    in_float.dtype = call.dtype.value_or(arithmetic_type(call.tensors));
    return call.op->forward(in_float);
  }
};

TORCH_LIBRARY_IMPL(kl_ext, AutocastCPU, m) { register_layer<Autocast>(m); }
TORCH_LIBRARY_IMPL(kl_ext, AutocastCUDA, m) { register_layer<Autocast>(m); }
TORCH_LIBRARY_IMPL(kl_ext, AutocastHPU, m) { register_layer<Autocast>(m); }
TORCH_LIBRARY_IMPL(kl_ext, AutocastMAIA, m) { register_layer<Autocast>(m); }
TORCH_LIBRARY_IMPL(kl_ext, AutocastMPS, m) { register_layer<Autocast>(m); }
TORCH_LIBRARY_IMPL(kl_ext, AutocastMTIA, m) { register_layer<Autocast>(m); }
TORCH_LIBRARY_IMPL(kl_ext, AutocastPrivateUse1, m) { register_layer<Autocast>(m); }
TORCH_LIBRARY_IMPL(kl_ext, AutocastXPU, m) { register_layer<Autocast>(m); }

} // namespace
} // namespace kl_ext
