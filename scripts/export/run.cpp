// Run an export of `pi0-export --to aoti` in C++, without Python:  run sample.pt2 CAMERAS HEIGHT WIDTH PROMPT STATE
// HORIZON ACTIONS FILE.  The inputs and their order are those of manifest.json; here zero images, a prompt of zeros, and
// noise of zeros, so that the actions, which are written to FILE as float32, can be compared.
#include <fstream>
#include <iostream>
#include <string>
#include <vector>

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

int main(int argc, char** argv) {
  if (argc != 10) {
    std::cerr << "usage: run sample.pt2 CAMERAS HEIGHT WIDTH PROMPT STATE HORIZON ACTIONS FILE\n";
    return 2;
  }
  std::vector<int64_t> n;
  for (int i = 2; i < 9; ++i) n.push_back(std::stoll(argv[i]));
  c10::InferenceMode guard;
  torch::inductor::AOTIModelPackageLoader loader(argv[1]);
  std::vector<torch::Tensor> inputs = {
      torch::zeros({1, n[0], n[1], n[2], 3}, torch::kUInt8),  // images [batch, cameras, height, width, 3], 0 to 255
      torch::ones({1, n[0]}, torch::kBool),                   // image_masks: which cameras are there
      torch::zeros({1, n[3]}, torch::kInt),                   // prompt: token ids
      torch::ones({1, n[3]}, torch::kBool),                   // prompt_mask: which are text
      torch::zeros({1, n[4]}),                                // state, normalized
      torch::zeros({1, n[5], n[6]}),                          // noise, of a normal distribution on a robot
  };
  std::vector<torch::Tensor> outputs = loader.run(inputs);
  torch::Tensor actions = outputs[0].contiguous().cpu();  // normalized [batch, horizon, actions]
  std::ofstream(argv[9], std::ios::binary)
      .write(static_cast<const char*>(actions.data_ptr()), actions.numel() * sizeof(float));
  std::cout << actions.sizes() << "\n";
}
