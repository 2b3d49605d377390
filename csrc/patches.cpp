// Which ids are patches, and which rows ask for one?
#include "patches.h"

#include "library.h"

namespace fuseer {

std::vector<int64_t> patch_ids(const char* op, const char* name, const at::Tensor& ids, int64_t bound) {
  const at::Tensor dense = ids.contiguous();
  check_ids(op, name, dense, bound);
  const int64_t* first = dense.const_data_ptr<int64_t>();
  return std::vector<int64_t>(first, first + dense.numel());
}

ByKey::ByKey(const std::vector<int64_t>& keys, int64_t bound) : begin(bound + 1, 0), places(keys.size()) {
  for (const int64_t key : keys) {
    ++begin[key + 1];
  }
  for (int64_t key = 0; key < bound; ++key) {
    begin[key + 1] += begin[key];
  }
  std::vector<int64_t> next(begin.begin(), begin.end() - 1);
  for (size_t place = 0; place < keys.size(); ++place) {
    places[next[keys[place]]++] = static_cast<int64_t>(place);
  }
}

}  // namespace fuseer
