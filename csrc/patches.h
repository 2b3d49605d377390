// Where does a patch of an image lie in memory, and which rows ask for it?
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace fuseer {

// Images [B, C, H, W] of any strides, cut into P patches of p x p, row by row.
struct Patches {
  Patches(const at::Tensor& images, int64_t patch)
      : p(patch),
        channels(images.size(1)),
        across(images.size(3) / patch),
        count(images.size(2) / patch * across),
        of_image(images.stride(0)),
        of_channel(images.stride(1)),
        of_line(images.stride(2)),
        of_pixel(images.stride(3)) {}
  int64_t numbers() const { return p * p * channels; }
  int64_t offset(int64_t b, int64_t id) const { return b * of_image + id / across * p * of_line + id % across * p * of_pixel; }
  // How many patches make a thread worth its waking.
  int64_t grain() const { return 1 + 16384 / numbers(); }
  int64_t p, channels, across, count, of_image, of_channel, of_line, of_pixel;
};

// ids [B, M] row by row; ValueError for one outside 0..bound-1.
std::vector<int64_t> patch_ids(const char* op, const char* name, const at::Tensor& ids, int64_t bound);

// The places 0, 1, ... of a list of keys, those of a key together and in their order: key k's are places[begin[k]] to places[begin[k + 1]].
struct ByKey {
  ByKey(const std::vector<int64_t>& keys, int64_t bound);
  std::vector<int64_t> begin, places;
};

}  // namespace fuseer
