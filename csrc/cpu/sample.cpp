// Operator 1 with the draw: statistics, then x ~ softmax(filter(z / tau)) as a keyed Gumbel maximum.
//
// The filter keeps ids in the order (z descending, id ascending) while the mass strictly ahead is at most
// top_p of the total. No sort: masses are integers (row_kernels.h), summed in 1024 buckets of z; the boundary
// lies in one bucket, whose few ids are gathered and searched by quickselect. Three streaming passes over a
// row that the statistics have just brought into the second-level cache, one exponential an element each;
// Philox only for kept ids.
#include "vocabulary_rows.h"

namespace entrgi::cpu {
namespace {

// Memory that a thread reuses from row to row.
struct Workspace {
  std::vector<uint64_t> buckets;
  std::vector<Candidate> candidates, pool;
  std::vector<double> values;
};

struct RowContext {
  const RowKernels& kernels;
  const SampleTokensParams& p;
  const uint8_t* mask;  // [V] of forbidden ids, or null
  int64_t row;
  const ChunkLoop& loop;
  double zmax;  // over the allowed ids

  const char* at(int64_t id) const { return p.logits.at(row, id); }
  const uint8_t* forbidden(int64_t id) const { return mask == nullptr ? nullptr : mask + id; }
};

// Collects what `gather(first id, length, out)` writes for each chunk, in the order of ids.
template <class Item, class Gather>
void gather_chunks(const ChunkLoop& loop, std::vector<Item>& items, const Gather& gather) {
  items.clear();
  if (!loop.is_parallel()) {
    loop([&](int64_t, int64_t id, int64_t n) {
      const size_t size = items.size();
      items.resize(size + n);
      items.resize(size + gather(id, n, items.data() + size));
    });
    return;
  }
  std::vector<std::vector<Item>> parts(loop.count());
  loop([&](int64_t chunk, int64_t id, int64_t n) {
    parts[chunk].resize(n);
    parts[chunk].resize(gather(id, n, parts[chunk].data()));
  });
  for (const auto& part : parts) items.insert(items.end(), part.begin(), part.end());
}

double largest_allowed(const RowContext& c) {
  std::vector<double> maxima(c.loop.count());
  c.loop([&](int64_t chunk, int64_t id, int64_t n) {
    maxima[chunk] = c.kernels.allowed_max(c.at(id), c.forbidden(id), n);
  });
  return *std::max_element(maxima.begin(), maxima.end());
}

void sum_buckets(const RowContext& c, std::vector<uint64_t>& buckets) {
  buckets.assign(kBuckets, 0);
  const auto add = [&](int64_t id, int64_t n, uint64_t* into) {
    c.kernels.add_masses(c.at(id), c.forbidden(id), n, c.zmax, c.p.temperature, into);
  };
  if (!c.loop.is_parallel()) {
    c.loop([&](int64_t, int64_t id, int64_t n) { add(id, n, buckets.data()); });
    return;
  }
  std::vector<uint64_t> parts(c.loop.count() * kBuckets, 0);
  c.loop([&](int64_t chunk, int64_t id, int64_t n) { add(id, n, parts.data() + chunk * kBuckets); });
  for (size_t i = 0; i < parts.size(); ++i) buckets[i % kBuckets] += parts[i];
}

// Keeps an id iff the mass strictly ahead of it is at most top_p of the total, compared in double.
struct Nucleus {
  double limit;
  bool keeps(uint64_t ahead) const { return static_cast<double>(ahead) <= limit; }

  // How many of `count` equal ids of `mass` each are kept when `ahead` stands before them.
  int64_t kept_of_ties(uint64_t ahead, uint64_t mass, int64_t count) const {
    int64_t low = 0, high = count;  // keeps() is monotone: the first tie that is not kept
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (keeps(ahead + static_cast<uint64_t>(middle) * mass)) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }
};

// The value at which the nucleus ends among `pool` (reordered), whose ids all have mass, and how many ids of
// that value are kept. `ahead` is the mass before the pool; its first id is kept.
std::pair<double, int64_t> nucleus_boundary(std::vector<Candidate>& pool, uint64_t ahead,
                                            const Nucleus& nucleus) {
  auto begin = pool.begin(), end = pool.end();
  while (true) {
    // A pivot from the middle: sorted and constant stretches are common, and split well.
    const double a = begin->value, b = begin[(end - begin) / 2].value, d = end[-1].value;
    const double pivot = std::max(std::min(a, b), std::min(std::max(a, b), d));
    const auto equal = std::partition(begin, end, [&](const Candidate& x) { return x.value > pivot; });
    const auto less = std::partition(equal, end, [&](const Candidate& x) { return x.value == pivot; });
    uint64_t greater_mass = 0;
    for (auto i = begin; i != equal; ++i) greater_mass += i->mass;
    if (equal != begin && !nucleus.keeps(ahead + greater_mass)) {
      end = equal;  // it ends among the greater ones
      continue;
    }
    ahead += greater_mass;
    const int64_t ties = less - equal, kept = nucleus.kept_of_ties(ahead, equal->mass, ties);
    ahead += static_cast<uint64_t>(ties) * equal->mass;
    if (kept < ties || less == end || !nucleus.keeps(ahead)) return {pivot, kept};
    begin = less;
  }
}

// Kept by top-p.
Kept nucleus_of(const RowContext& c, Workspace& w) {
  const Kept everything{-kInfinity, c.p.vocab};
  if (c.p.top_p >= 1) return everything;
  sum_buckets(c, w.buckets);
  uint64_t total = 0;
  for (const uint64_t mass : w.buckets) total += mass;
  const Nucleus nucleus{c.p.top_p * static_cast<double>(total)};
  if (nucleus.keeps(total)) return everything;

  // The last bucket with mass whose first id is kept: the first one that reaches beyond the limit.
  uint64_t ahead = 0;
  int bucket = 0;
  while (w.buckets[bucket] == 0 || nucleus.keeps(ahead + w.buckets[bucket])) ahead += w.buckets[bucket++];
  gather_chunks(c.loop, w.candidates, [&](int64_t id, int64_t n, Candidate* out) {
    return c.kernels.gather_bucket(c.at(id), c.forbidden(id), n, id, c.zmax, c.p.temperature, bucket, out);
  });
  w.pool = w.candidates;
  auto [threshold, ties] = nucleus_boundary(w.pool, ahead, nucleus);
  for (const Candidate& candidate : w.candidates) {  // in the order of ids
    if (candidate.value == threshold && --ties == 0) return {threshold, candidate.id};
  }
  return {threshold, -1};
}

// The k-th largest allowed value, -inf where there are fewer.
double kth_largest(const RowContext& c, Workspace& w) {
  const int64_t k = c.p.top_k;
  if (k >= c.p.vocab) return -kInfinity;
  // k disjoint groups of ids with a maximum of at least `bound` hold k values of at least `bound`.
  constexpr int64_t kGroup = 64;
  constexpr int64_t kGroups = kChunk / kGroup;
  double bound = -kInfinity;
  const int64_t groups = (c.p.vocab + kGroup - 1) / kGroup;
  if (k < groups / 2) {
    w.values.resize(groups);
    c.loop([&](int64_t chunk, int64_t id, int64_t n) {
      c.kernels.group_max(c.at(id), c.forbidden(id), n, kGroup, w.values.data() + chunk * kGroups);
    });
    std::nth_element(w.values.begin(), w.values.begin() + (k - 1), w.values.end(), std::greater<double>());
    bound = w.values[k - 1];
  }
  gather_chunks(c.loop, w.values, [&](int64_t id, int64_t n, double* out) {
    return c.kernels.gather_above(c.at(id), c.forbidden(id), n, bound, out);
  });
  if (static_cast<int64_t>(w.values.size()) < k) return -kInfinity;
  std::nth_element(w.values.begin(), w.values.begin() + (k - 1), w.values.end(), std::greater<double>());
  return w.values[k - 1];
}

Draw draw_token(const RowContext& c, const Kept& kept) {
  const PhiloxKey key(c.p.keys + 4 * c.row);
  const Draw empty{0, 0, -kInfinity, -kInfinity, -kInfinity, -1};
  std::vector<Draw> parts(c.loop.count(), empty);
  // Lets later chunks skip noise that cannot win; the winner is the same without it.
  double best = -kInfinity;
  c.loop([&](int64_t chunk, int64_t id, int64_t n) {
    if (!c.loop.is_parallel()) parts[chunk].score = best;
    c.kernels.draw(c.at(id), c.forbidden(id), n, id, c.zmax, c.p.temperature, kept, key, parts[chunk]);
    if (!c.loop.is_parallel()) best = parts[chunk].score;
  });
  Draw result = empty;
  for (const Draw& part : parts) {
    result.sum += part.sum;
    result.weighted_sum += part.weighted_sum;
    if (part.first > result.first) {
      result.second = std::max(result.first, part.second);
      result.first = part.first;
    } else {
      result.second = std::max(result.second, part.first);
    }
    if (part.token >= 0 && part.score > result.score) {
      result.score = part.score;
      result.token = part.token;
    }
  }
  return result;
}

uint8_t sample_row(RowContext& c, const RowStatistics& statistics, Workspace& w) {
  const DType acc = accumulator_of(c.p.logits.dtype);
  c.zmax = c.mask == nullptr ? statistics.max : largest_allowed(c);
  if (c.zmax == -kInfinity) return kNothingAllowed;

  Kept kept = nucleus_of(c, w);
  if (c.p.top_k > 0) {
    const double least = kth_largest(c, w);
    if (least > kept.threshold) kept = {least, c.p.vocab};  // top-k keeps ties
  }
  const Draw draw = draw_token(c, kept);
  const double tau = c.p.temperature;
  const double e = c.kernels.scaled_exp(c.at(draw.token), c.zmax, tau);
  // e of the runner-up, in the arithmetic of the row: 0 where only one id is kept.
  double runner_up = 0;
  if (draw.second > -kInfinity) {
    runner_up = acc == DType::kFloat64
                    ? std::exp((draw.second - c.zmax) / tau)
                    : std::exp((static_cast<float>(draw.second) - static_cast<float>(c.zmax)) /
                               static_cast<float>(tau));
  }
  c.p.token[c.row] = draw.token;
  write(c.p.probability, c.row, e / draw.sum, acc);
  write(c.p.margin, c.row, (1.0 - runner_up) / draw.sum, acc);
  write(c.p.filtered_entropy, c.row, std::log(draw.sum) - draw.weighted_sum / draw.sum, acc);
  return 0;
}

// One byte for each id, as the inner loops read it; empty where nothing is forbidden.
std::vector<uint8_t> mask_of(const int32_t* ids, int64_t count, int64_t vocabulary) {
  std::vector<uint8_t> mask(count > 0 ? vocabulary : 0, 0);
  for (int64_t i = 0; i < count; ++i) {
    if (ids[i] < 0 || ids[i] >= vocabulary) {
      throw std::runtime_error("forbidden must hold ids in [0, " + std::to_string(vocabulary) + "), got " +
                               std::to_string(ids[i]) + " at " + std::to_string(i));
    }
    mask[ids[i]] = 1;
  }
  return mask;
}

}  // namespace

void sample_tokens(const SampleTokensParams& p, const Parallel& parallel) {
  const std::vector<uint8_t> listed = mask_of(p.forbidden_ids, p.num_forbidden, p.vocab);
  const uint8_t* mask = listed.empty() ? reinterpret_cast<const uint8_t*>(p.forbidden) : listed.data();
  const RowKernels& kernels = row_kernels(p.logits.dtype);
  std::vector<uint8_t> status(p.n, 0);
  for_rows(p.n, p.vocab, parallel, [&](int64_t row, const ChunkLoop& loop) {
    thread_local Workspace workspace;
    const RowStatistics row_result = row_statistics(p, row, loop);
    row_result.write_to(p, row);
    if (row_result.argmax < 0) {
      status[row] = kInvalidRow;
      return;
    }
    RowContext context{kernels, p, mask, row, loop, 0};
    status[row] = sample_row(context, row_result, workspace);
  });
  raise_bad_rows(status);
}

}  // namespace entrgi::cpu
