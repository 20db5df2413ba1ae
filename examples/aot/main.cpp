// Runs a package of tokcomp.export without Python: prints each image's five best classes, writes the logits.
//
//   classify PACKAGE [IMAGES [LOGITS]]
//
// IMAGES holds float32 images [B, C, H, W] one after the other, ready for the model; without it one of noise is made.
// LOGITS becomes a file of float32 [B, classes].
#include <ATen/ops/from_blob.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/topk.h>
#include <c10/util/Exception.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

// What tokcomp.export wrote down about the images that the model takes.
struct Inputs {
  int64_t channels, height, width, min_batch, max_batch;
  at::ScalarType dtype;
  at::Device device;

  explicit Inputs(const std::unordered_map<std::string, std::string>& metadata)
      : channels(std::stoll(metadata.at("tokcomp_channels"))),
        height(std::stoll(metadata.at("tokcomp_height"))),
        width(std::stoll(metadata.at("tokcomp_width"))),
        min_batch(std::stoll(metadata.at("tokcomp_min_batch"))),
        max_batch(std::stoll(metadata.at("tokcomp_max_batch"))),
        dtype(type_named(metadata.at("tokcomp_dtype"))),
        device(metadata.at("tokcomp_device")) {}

  int64_t pixels() const { return channels * height * width; }

 private:
  static at::ScalarType type_named(const std::string& name) {
    return name == "float16" ? at::kHalf : name == "bfloat16" ? at::kBFloat16 : at::kFloat;
  }
};

at::Tensor noise(const Inputs& inputs) {
  return at::rand({inputs.min_batch, inputs.channels, inputs.height, inputs.width}, at::kFloat);
}

at::Tensor read_images(const std::string& path, const Inputs& inputs) {
  const int64_t image_bytes = inputs.pixels() * static_cast<int64_t>(sizeof(float));
  const auto bytes = static_cast<int64_t>(std::filesystem::file_size(path));
  const int64_t batch = bytes / image_bytes;
  if (bytes % image_bytes != 0 || batch < inputs.min_batch || batch > inputs.max_batch) {
    throw std::runtime_error(path + " must hold " + std::to_string(inputs.min_batch) + " to " +
                             std::to_string(inputs.max_batch) + " images of " + std::to_string(image_bytes) +
                             " bytes, got " + std::to_string(bytes) + " bytes");
  }
  std::vector<float> values(static_cast<size_t>(batch * inputs.pixels()));
  std::ifstream(path, std::ios::binary).read(reinterpret_cast<char*>(values.data()), bytes);
  return at::from_blob(values.data(), {batch, inputs.channels, inputs.height, inputs.width}, at::kFloat).clone();
}

void print_best(const at::Tensor& logits) {
  const auto [shares, classes] = at::softmax(logits, -1).topk(std::min<int64_t>(5, logits.size(1)));
  for (int64_t image = 0; image < logits.size(0); ++image) {
    std::cout << "image " << image << ':';
    for (int64_t rank = 0; rank < classes.size(1); ++rank) {
      std::cout << "  class " << classes[image][rank].item<int64_t>() << ' ' << 100 * shares[image][rank].item<float>()
                << " %";
    }
    std::cout << '\n';
  }
}

void run(const std::vector<std::string>& arguments) {
  // Else the package trusts its caller with shape, type and layout, and reads out of bounds. Before it is loaded.
  setenv("AOTI_RUNTIME_CHECK_INPUTS", "1", /*replace=*/1);
  const c10::InferenceMode no_gradients;
  torch::inductor::AOTIModelPackageLoader package(arguments.at(0));
  const Inputs inputs(package.get_metadata());
  const at::Tensor images = arguments.size() > 1 ? read_images(arguments[1], inputs) : noise(inputs);
  const at::Tensor logits =
      package.run({images.to(inputs.device, inputs.dtype)}).at(0).to(at::kCPU, at::kFloat).contiguous();
  print_best(logits);
  if (arguments.size() > 2) {
    std::ofstream file(arguments[2], std::ios::binary);
    file.write(reinterpret_cast<const char*>(logits.const_data_ptr<float>()),
               static_cast<std::streamsize>(logits.nbytes()));
    if (!file.flush()) throw std::runtime_error(arguments[2] + " could not be written");
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2 || argc > 4) {
    std::cerr << "usage: classify PACKAGE [IMAGES [LOGITS]]\n";
    return 2;
  }
  try {
    run({argv + 1, argv + argc});
  } catch (const c10::Error& error) {
    std::cerr << "classify: " << error.what_without_backtrace() << '\n';
    return 1;
  } catch (const std::exception& error) {
    std::cerr << "classify: " << error.what() << '\n';
    return 1;
  }
  return 0;
}
