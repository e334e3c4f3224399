// From a dtype known at run time to a kernel's element type.

#pragma once

#include "arguments.h"
#include "numeric.h"

namespace megascratch {
namespace {

// Call `f` with a number of the element type that `dtype` names.
template <typename F>
auto for_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::Float: return f(float{});
    case DType::Double: return f(double{});
    case DType::Half: return f(Half{});
    default: return f(BFloat16{});
  }
}

}  // namespace
}  // namespace megascratch
