// The CUDA kernels' launchers: arguments and a stream in, a CUDA error code (0: none) out. They allocate nothing and
// wait for nothing.

#pragma once

#include "arguments.h"

extern "C" {
int megascratch_cuda_rope(const megascratch::RopeArguments* arguments, void* stream);
int megascratch_cuda_scaled_softmax(const megascratch::SoftmaxArguments* arguments, void* stream);
int megascratch_cuda_scaled_softmax_backward(const megascratch::SoftmaxBackwardArguments* arguments, void* stream);
int megascratch_cuda_activation(const megascratch::ActivationArguments* arguments, void* stream);
int megascratch_cuda_adamw(const megascratch::AdamWArguments* arguments, void* stream);
int megascratch_cuda_logit_gradient(const megascratch::LogitGradientArguments* arguments, void* stream);
int megascratch_cuda_logit_statistics(const megascratch::LogitStatisticsArguments* arguments, void* stream);
int megascratch_cuda_cast_transpose(const megascratch::CastTransposeArguments* arguments, void* stream);
int megascratch_cuda_norm(const megascratch::NormArguments* arguments, void* stream);
int megascratch_cuda_norm_backward(const megascratch::NormBackwardArguments* arguments, void* stream);
int megascratch_cuda_squared_norm(const megascratch::SquaredNormArguments* arguments, void* stream);
}
