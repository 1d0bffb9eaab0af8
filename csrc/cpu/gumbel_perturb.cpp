// Gumbel perturbation: out = z + scale g, g the noise of the draw for every (key of the row, id).
//
// Philox and both logarithms in vectors of doubles, then one rounding to acc: no further from the exact sum
// than half a unit in the last place, whatever the logits' dtype. One read of z, one write of acc.
#include "vocabulary_rows.h"

namespace entrgi::cpu {

void gumbel_perturb(const GumbelPerturbParams& p, const Parallel& parallel) {
  const RowKernels& kernels = row_kernels(p.logits.dtype);
  std::vector<uint8_t> status(p.n, 0);
  for_rows(p.n, p.vocab, parallel, [&](int64_t row, const ChunkLoop& loop) {
    const PhiloxKey key(p.keys + 4 * row);
    std::vector<LogitKinds> kinds(loop.count());
    loop([&](int64_t chunk, int64_t id, int64_t n) {
      kinds[chunk] = kernels.gumbel_perturb(p.logits.at(row, id), n, id, p.scale, key, p.output.at(row, id));
    });
    const auto any = [&](bool LogitKinds::* kind) {
      return std::any_of(kinds.begin(), kinds.end(), [&](const LogitKinds& k) { return k.*kind; });
    };
    if (any(&LogitKinds::invalid) || !any(&LogitKinds::finite)) status[row] = kInvalidRow;
  });
  raise_bad_rows(status);
}

}  // namespace entrgi::cpu
