// Generation, a token of each sequence at a time: attention over a cache [t, b, k, d], and the draw of a token.

#pragma once

#include "torch_glue.h"

namespace megascratch {

template <typename Backend>
struct DecodingOperators {
  static Tensor cached_attention(
      Tensor q, Tensor k, Tensor v, Tensor keys, Tensor values, Tensor positions, int64_t window, double scale,
      double softcap) {
    check_same_shape(k, v, "cached_attention: k and v");
    check_same_shape(keys, values, "cached_attention: keys and values");
    STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && keys.dim() == 4 && q.size(0) == 1 && k.size(0) == 1,
                    "cached_attention: q and k must be [1, b, n, d] and [1, b, k, d], keys [t, b, k, d]");
    for (int64_t dim = 1; dim < 4; ++dim) {
      STD_TORCH_CHECK(k.size(dim) == keys.size(dim) && (dim == 2 || q.size(dim) == k.size(dim)),
                      "cached_attention: q, k and keys disagree");
    }
    const int64_t b = q.size(1), kv = k.size(2);
    STD_TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == keys.scalar_type(),
                    "cached_attention: q, k and keys differ in dtype");
    STD_TORCH_CHECK(kv > 0 ? q.size(2) % kv == 0 : q.size(2) == 0, "cached_attention: query heads must divide into groups");
    STD_TORCH_CHECK(keys.stride(3) == 1 && values.stride(3) == 1, "cached_attention: rows of the cache must be contiguous");
    STD_TORCH_CHECK(positions.scalar_type() == ScalarType::Long && positions.dim() == 1 && positions.size(0) == b,
                    "cached_attention: positions must be int64 [b]");
    STD_TORCH_CHECK(window > 0, "cached_attention: a query sees itself at least");
    q = with_contiguous_rows(q), k = with_contiguous_rows(k), v = with_contiguous_rows(v);
    Tensor out = empty_output(q);
    CachedAttentionArguments a{};
    a.q = heads(q), a.k = heads(k), a.v = heads(v), a.keys = cache(keys), a.values = cache(values);
    a.out = out.mutable_data_ptr();
    a.positions = positions.const_data_ptr<int64_t>(), a.positions_stride = positions.stride(0);
    a.t = keys.size(0), a.b = b, a.n = q.size(2), a.kv = kv, a.d = q.size(3), a.window = window;
    a.scale = scale, a.softcap = softcap, a.dtype = dtype_of(q);
    if (out.numel() > 0) Backend::run(a, q);
    return out;
  }

  static Tensor draw(Tensor logits, Tensor u, double temperature) {
    STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0, "draw: logits must be [b, v]");
    STD_TORCH_CHECK(u.scalar_type() == ScalarType::Double && u.dim() == 1 && u.size(0) == logits.size(0),
                    "draw: u must be float64 [b]");
    STD_TORCH_CHECK(temperature > 0, "draw: the temperature must be more than 0");
    const Rows rows = rows_of(logits);
    u = torch::stable::contiguous(u);
    Tensor drawn = torch::stable::new_empty(logits, {logits.size(0)}, ScalarType::Long);
    DrawArguments a{};
    a.logits = rows.data(), a.u = u.const_data_ptr<double>(), a.drawn = drawn.mutable_data_ptr<int64_t>();
    a.rows = logits.size(0), a.columns = logits.size(1), a.stride = rows.stride;
    a.temperature = temperature, a.dtype = dtype_of(logits);
    if (a.rows > 0) Backend::run(a, logits);
    return drawn;
  }

  static void add_to(Library& library) {
    library.impl("cached_attention", TORCH_BOX(&cached_attention));
    library.impl("draw", TORCH_BOX(&draw));
  }

 private:
  static AttentionHeads heads(const Tensor& x) { return {x.const_data_ptr(), 0, x.stride(1), x.stride(2)}; }
  static CacheHeads cache(const Tensor& x) {
    return {x.mutable_data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
  }
};

}  // namespace megascratch
