// What a device does with the parameters of an operator: cpu.cpp or cuda.cpp. `like` is a tensor
// of the device. Everything has been checked that can be without the data (checks.h).
#pragma once

#include "tensors.h"

namespace entrgi::ops::backend {

void run(LogitStatisticsParams& p, const Argument& like);
void run(SampleTokensParams& p, const Argument& like);
void run(GumbelPerturbParams& p, const Argument& like);
void run(LogitStatisticsBackwardParams& p, const Argument& like);
void run(RelaxedEmbeddingParams& p, const Argument& like);
void run(LogitUpdateParams& p, const Argument& like);
void run(CommitParams& p, const Argument& like);

}  // namespace entrgi::ops::backend
