// A rank's part of vocabulary-parallel cross-entropy: logits [..., v/tp], labels [...].

#pragma once

#include <vector>

#include "torch_glue.h"

namespace megascratch {

template <typename Backend>
struct LogitOperators {
  static std::tuple<Tensor, Tensor, Tensor> logit_statistics(
      Tensor logits, Tensor labels, int64_t first, int64_t n_real) {
    check(logits, labels, n_real);
    const Rows rows = rows_of(logits);
    labels = torch::stable::contiguous(labels);
    const ScalarType type = acc_type(dtype_of(logits));
    Tensor peak = torch::stable::new_empty(logits, labels.sizes(), type);
    Tensor total = torch::stable::new_empty(logits, labels.sizes(), type);
    Tensor picked = torch::stable::new_empty(logits, labels.sizes(), type);
    LogitStatisticsArguments a{};
    a.logits = rows.data(), a.labels = labels.const_data_ptr<int64_t>();
    a.peak = peak.mutable_data_ptr(), a.total = total.mutable_data_ptr(), a.picked = picked.mutable_data_ptr();
    a.rows = labels.numel(), a.stride = rows.stride, a.first = first, a.n_real = n_real, a.dtype = dtype_of(logits);
    if (a.rows > 0) Backend::run(a, logits);
    return {peak, total, picked};
  }

  static Tensor logit_gradient(
      Tensor grad, Tensor logits, Tensor labels, Tensor log_total, int64_t first, int64_t n_real) {
    check(logits, labels, n_real);
    const Rows rows = rows_of(logits);
    Tensor out = empty_output(logits);
    run(grad, rows, labels, log_total, first, n_real, {out, rows.count, logits.size(logits.dim() - 1)});
    return out;
  }

  static void logit_gradient_(
      Tensor logits, Tensor grad, Tensor labels, Tensor log_total, int64_t first, int64_t n_real) {
    check(logits, labels, n_real);
    const Rows rows = rows_of(logits);
    STD_TORCH_CHECK(rows.data() == logits.const_data_ptr(), "logit_gradient_: the logits must be regular rows");
    run(grad, rows, labels, log_total, first, n_real, rows);
  }

  static void add_to(Library& library) {
    library.impl("logit_statistics", TORCH_BOX(&logit_statistics));
    library.impl("logit_gradient", TORCH_BOX(&logit_gradient));
    library.impl("logit_gradient_", TORCH_BOX(&logit_gradient_));
  }

 private:
  static void check(const Tensor& logits, const Tensor& labels, int64_t n_real) {
    bool fits = logits.dim() == labels.dim() + 1 && labels.scalar_type() == ScalarType::Long;
    for (int64_t dim = 0; fits && dim < labels.dim(); ++dim) fits = logits.size(dim) == labels.size(dim);
    STD_TORCH_CHECK(fits, "logits must be [..., v] and labels int64 [...]");
    STD_TORCH_CHECK(0 <= n_real && n_real <= logits.size(logits.dim() - 1), "n_real must be at most the columns");
  }

  static void run(Tensor grad, const Rows& rows, Tensor labels, Tensor log_total, int64_t first, int64_t n_real,
                  const Rows& out) {
    const ScalarType type = acc_type(dtype_of(rows.tensor));
    STD_TORCH_CHECK(grad.numel() == labels.numel() && log_total.numel() == labels.numel() &&
                        grad.scalar_type() == type && log_total.scalar_type() == type,
                    "logit_gradient: grad and log_total must be like labels, in the accumulation dtype");
    grad = torch::stable::contiguous(grad), log_total = torch::stable::contiguous(log_total);
    labels = torch::stable::contiguous(labels);
    LogitGradientArguments a{};
    a.grad = grad.const_data_ptr(), a.log_total = log_total.const_data_ptr();
    a.logits = rows.data(), a.labels = labels.const_data_ptr<int64_t>();
    a.grad_logits = out.tensor.mutable_data_ptr();
    a.rows = labels.numel(), a.columns = rows.tensor.size(rows.tensor.dim() - 1);
    a.stride = rows.stride, a.stride_out = out.stride;
    a.first = first, a.n_real = n_real, a.dtype = dtype_of(rows.tensor);
    if (a.rows > 0 && a.columns > 0) Backend::run(a, rows.tensor);
  }
};

}  // namespace megascratch
