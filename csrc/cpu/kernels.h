// The CPU kernels, declared once for each instruction-set level that they are compiled for.
//
// A kernel computes the rows [begin, end) of its operator; registration.cpp splits the rows over threads.

#pragma once

#include "arguments.h"

namespace megascratch {

#define MEGASCRATCH_DECLARE_KERNELS(level)                                                                             \
  namespace level {                                                                                                    \
  struct Kernels {                                                                                                     \
    /* Rows are the s·b tokens. Returns false if a position lies outside the table. */                                 \
    static bool rope(const RopeArguments& arguments, int64_t begin, int64_t end);                                      \
    /* Rows are the b·n·sq queries. `scratch` has room for sk numbers of the accumulation type. */                     \
    static void scaled_softmax(const SoftmaxArguments& arguments, void* scratch, int64_t begin, int64_t end);          \
    static void scaled_softmax_backward(const SoftmaxBackwardArguments& arguments, int64_t begin, int64_t end);        \
    /* Rows are tokens, then parts of the tokens, then columns. */                                                     \
    static void norm(const NormArguments& arguments, int64_t begin, int64_t end);                                      \
    static void norm_backward(const NormBackwardArguments& arguments, int64_t begin, int64_t end);                     \
    static void norm_add_parts(const NormBackwardArguments& arguments, int64_t begin, int64_t end);                    \
    /* Rows are tokens. */                                                                                             \
    static void activation(const ActivationArguments& arguments, int64_t begin, int64_t end);                          \
    /* Rows are tokens. */                                                                                             \
    static void logit_statistics(const LogitStatisticsArguments& arguments, int64_t begin, int64_t end);               \
    static void logit_gradient(const LogitGradientArguments& arguments, int64_t begin, int64_t end);                   \
    /* Rows are parameters. */                                                                                         \
    static void adamw(const AdamWArguments& arguments, int64_t begin, int64_t end);                                    \
    static void fill_normal(const NormalArguments& arguments, int64_t begin, int64_t end);                             \
    /* Rows are tiles of `cast_transpose_tile()` rows. */                                                              \
    static int64_t cast_transpose_tile();                                                                              \
    static void cast_transpose(const CastTransposeArguments& arguments, int64_t begin, int64_t end);                   \
    /* Rows are parts of x. */                                                                                         \
    static void squared_norm(const SquaredNormArguments& arguments, int64_t begin, int64_t end);                       \
    /* Rows are tasks: parts of the queries of a sample's key/value head; then keys. */                                \
    static void attention(const AttentionArguments& arguments, int64_t begin, int64_t end);                            \
    static void attention_backward(const AttentionArguments& arguments, int64_t begin, int64_t end);                   \
    static void attention_add_parts(const AttentionArguments& arguments, int64_t begin, int64_t end);                  \
    /* The elements of `partial` that a part adds to the gradient of keys, or of values. */                            \
    static int64_t attention_partial(const AttentionArguments& arguments);                                             \
    /* Rows are sequences' key/value heads. Returns false if a position lies outside the cache. */                      \
    static bool cached_attention(const CachedAttentionArguments& arguments, int64_t begin, int64_t end);               \
    /* Rows are sequences. */                                                                                          \
    static void draw(const DrawArguments& arguments, int64_t begin, int64_t end);                                      \
    /* Rows are blocks of the result. */                                                                               \
    static int64_t matmul_units(const MatmulArguments& arguments);                                                     \
    static void matmul(const MatmulArguments& arguments, int64_t begin, int64_t end);                                  \
  };                                                                                                                   \
  }

#ifdef __x86_64__
MEGASCRATCH_DECLARE_KERNELS(v2)
MEGASCRATCH_DECLARE_KERNELS(v3)
MEGASCRATCH_DECLARE_KERNELS(v4)
#else
MEGASCRATCH_DECLARE_KERNELS(baseline)
#endif

}  // namespace megascratch
