// The CPU backend: csrc/cpu with torch's threads and matrix products.
#include "../cpu/cpu.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <exception>
#include <mutex>

#include "backend.h"

// In the libraries of torch where its matrix products are MKL's.
extern "C" int MKL_Set_Num_Threads_Local(int threads) __attribute__((weak));

namespace entrgi::ops::backend {
namespace {

// torch's intra-op threads. An exception must not cross the C interface as one: it is carried around it.
cpu::Parallel torch_threads() {
  cpu::Parallel parallel;
  parallel.threads = static_cast<int>(torch::stable::get_num_threads());
  parallel.run = [](int64_t count, int64_t cost, const cpu::Range& body) {
    constexpr int64_t kThreadCost = 16384;  // some 10 microseconds: what waking a thread costs
    const int64_t grain = std::max<int64_t>(1, kThreadCost / std::max<int64_t>(1, cost));
    if (count <= grain) {  // one thread's work, without a way through torch
      if (count > 0) body(0, count);
      return;
    }
    std::exception_ptr error;
    std::mutex mutex;
    torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
      try {
        body(begin, end);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex);
        if (!error) error = std::current_exception();
      }
    });
    if (error) std::rethrow_exception(error);
  };
  return parallel;
}

Tensor view_of(const Matrix& m, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride) {
  const int64_t sizes[] = {rows, columns}, strides[] = {row_stride, column_stride};
  const int32_t dtype = m.dtype == DType::kFloat64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(m.data, 2, sizes, strides, 0, dtype,
                                                                   aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// The order of MKL's sums depends on how many threads it uses, in a parallel region too, since torch turns
// its dynamic choice off. Without MKL the product keeps the threads that it has in torch's own operators.
class OneThread {
 public:
  OneThread() {
    if (MKL_Set_Num_Threads_Local != nullptr) before_ = MKL_Set_Num_Threads_Local(1);
  }
  ~OneThread() {
    if (MKL_Set_Num_Threads_Local != nullptr) MKL_Set_Num_Threads_Local(before_);
  }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  int before_ = 0;
};

// torch's matrix product on memory that is not a tensor's. The CPU kernel is called directly, below autograd
// and autocast: neither may change what happens inside an operator.
void torch_gemm(const MatrixProduct& p) {
  const OneThread one_thread;
  const Tensor a = view_of(p.a, p.m, p.k, p.a.stride, 1);
  const Tensor b =
      p.b_transposed ? view_of(p.b, p.k, p.n, 1, p.b.stride) : view_of(p.b, p.k, p.n, p.b.stride, 1);
  const Tensor c = view_of(p.c, p.m, p.n, p.c.stride, 1);
  if (p.accumulate) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(c.get(), c.get(), a.get(), b.get(), 1.0, 1.0));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(c.get(), a.get(), b.get()));
  }
}

}  // namespace

void run(LogitStatisticsParams& p, const Argument&) {
  cpu::logit_statistics(p, torch_threads());
}
void run(SampleTokensParams& p, const Argument&) {
  cpu::sample_tokens(p, torch_threads());
}
void run(GumbelPerturbParams& p, const Argument&) {
  cpu::gumbel_perturb(p, torch_threads());
}
void run(LogitStatisticsBackwardParams& p, const Argument&) {
  cpu::logit_statistics_backward(p, torch_threads());
}
void run(RelaxedEmbeddingParams& p, const Argument&) {
  cpu::relaxed_embedding(p, torch_threads(), torch_gemm);
}
void run(LogitUpdateParams& p, const Argument&) {
  cpu::logit_update(p, torch_threads(), torch_gemm);
}
void run(CommitParams& p, const Argument&) {
  cpu::commit(p);
}

}  // namespace entrgi::ops::backend
