// What AdamW multiplies by in one step, in the accumulation type A, from the numbers that the step left in memory.

#pragma once

#include "arguments.h"
#include "numeric.h"

namespace megascratch {
namespace {

template <typename A>
struct AdamWStep {
  A grad_factor, keep, step_size, root_factor, new1, beta2, new2, eps;
  bool taken;

  MEGASCRATCH_DEVICE explicit AdamWStep(const AdamWArguments& a) {
    const double lr = a.step[1] * a.lr_scale;
    grad_factor = static_cast<A>(a.step[0]);
    keep = static_cast<A>(1 - lr * a.weight_decay);
    step_size = static_cast<A>(lr * a.step[2]);
    root_factor = static_cast<A>(a.step[3]);
    taken = a.step[4] != 0;
    new1 = static_cast<A>(1 - a.beta1), beta2 = static_cast<A>(a.beta2), new2 = static_cast<A>(1 - a.beta2);
    eps = static_cast<A>(a.eps);
  }
};

}  // namespace
}  // namespace megascratch
