// What a device does with the parameters of an operator: cpu.cpp or cuda.cpp. `like` is a tensor of the
// device. Everything has been checked that can be without the data (checks.h).
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "params.h"

namespace entrgi::ops::backend {

using torch::stable::Tensor;

void run(LogitStatisticsParams& p, const Tensor& like);
void run(SampleTokensParams& p, const Tensor& like);
void run(GumbelPerturbParams& p, const Tensor& like);
void run(LogitStatisticsBackwardParams& p, const Tensor& like);
void run(RelaxedEmbeddingParams& p, const Tensor& like);
void run(LogitUpdateParams& p, const Tensor& like);
void run(CommitParams& p, const Tensor& like);

}  // namespace entrgi::ops::backend
