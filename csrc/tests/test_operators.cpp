// libtokcomp as a C++ program sees it: the operators, through the dispatcher, on every device there is.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <cmath>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using Tensors = std::vector<at::Tensor>;

int failures = 0;

void expect(bool holds, const std::string& what) {
  std::cout << (holds ? "ok    " : "FAILED ") << what << '\n';
  failures += !holds;
}

// Calls tokcomp::<name>; arguments that are left out take the schema's defaults.
Tensors call(const std::string& name, const std::vector<c10::IValue>& arguments) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(("tokcomp::" + name).c_str(), "");
  torch::jit::Stack stack(arguments.begin(), arguments.end());
  const auto& schema = op.schema().arguments();
  for (size_t i = stack.size(); i < schema.size(); ++i) {
    const auto& left_out = schema[i].default_value();
    if (!left_out) throw std::invalid_argument(name + ": " + schema[i].name() + " has no default");
    stack.push_back(*left_out);
  }
  op.callBoxed(stack);
  Tensors results;
  for (const auto& value : stack) results.push_back(value.toTensor());
  return results;
}

// Token 3 points the way token 1 does, so it merges into it.
void test_prune_merge(at::Device device, const std::string& where) {
  const auto options = at::TensorOptions(device).dtype(at::kFloat);
  const at::Tensor x = at::tensor({5., 5., 1., 0., 0., 2., 2., 0.}, at::kFloat).view({1, 4, 2}).to(options);
  const at::Tensor importance = at::tensor({0., .5, .3, .2}, at::kFloat).view({1, 4}).to(options);
  const Tensors merged = call("prune_merge", {x, importance, 4, 3});
  const at::Tensor x_out = at::tensor({5., 5., 1.5, 0., 0., 2.}, at::kFloat).view({1, 3, 2}).to(options);
  const at::Tensor size_out = at::tensor({1., 2., 1.}, at::kFloat).view({1, 3}).to(options);
  expect(at::allclose(merged[0], x_out), "prune_merge: tokens, " + where);
  expect(at::allclose(merged[1], size_out), "prune_merge: sizes, " + where);
  expect(merged[2].cpu().equal(at::tensor({0, 1, 2, 1}, at::kLong).view({1, 4})), "prune_merge: sources, " + where);
}

void test_masked_softmax(at::Device device, const std::string& where) {
  at::manual_seed(1);
  const at::Tensor scores = at::randn({2, 3, 7, 7}).to(device);
  const at::Tensor ones = at::ones({2, 7}).to(device);
  // With nothing masked this is a softmax, off by eps = 1e-6 of the row's sum, which is at least 1.
  expect(at::allclose(call("masked_softmax", {scores, ones})[0], at::softmax(scores, -1), 0., 2e-6),
         "masked_softmax: nothing masked, " + where);
}

void test_class_attention_sort(at::Device device, const std::string& where) {
  at::manual_seed(2);
  const at::Tensor q_cls = at::randn({2, 3, 8}).to(device), k = at::randn({2, 3, 9, 8}).to(device);
  const Tensors sorted = call("class_attention_sort", {q_cls, k});
  const at::Tensor expected = at::softmax(at::matmul(k, q_cls.unsqueeze(-1)).squeeze(-1) / std::sqrt(8.), -1).mean(1);
  expect(at::allclose(sorted[0], expected, 0., 1e-6), "class_attention_sort: attention, " + where);
  const at::Tensor ranked = at::gather(sorted[0], 1, sorted[1]).narrow(1, 1, 8).cpu();
  expect(sorted[1].select(1, 0).cpu().equal(at::zeros({2}, at::kLong)), "class_attention_sort: prefix, " + where);
  expect((ranked.diff(1, 1) <= 0).all().item<bool>(), "class_attention_sort: descending, " + where);
}

// Of the live tokens 0, 1, 3 two stay; token 3 points the way token 1 does, so it merges into it and stays where it is.
void test_masked_merge(at::Device device, const std::string& where) {
  const auto options = at::TensorOptions(device).dtype(at::kFloat);
  const at::Tensor x = at::tensor({5., 5., 1., 0., 0., 2., 2., 0.}, at::kFloat).view({1, 4, 2}).to(options);
  const at::Tensor importance = at::tensor({0., .5, .9, .2}, at::kFloat).view({1, 4}).to(options);
  const at::Tensor token_mask = at::tensor({1., 1., 0., 1.}, at::kFloat).view({1, 4}).to(options);
  const at::Tensor counts = at::tensor({4, 2}, at::kLong).to(device);
  const Tensors merged = call("masked_merge", {x, importance, token_mask, counts});
  const at::Tensor x_out = at::tensor({5., 5., 1.5, 0., 0., 2., 2., 0.}, at::kFloat).view({1, 4, 2}).to(options);
  const at::Tensor size_out = at::tensor({1., 2., 1., 1.}, at::kFloat).view({1, 4}).to(options);
  expect(at::allclose(merged[0], x_out), "masked_merge: tokens, " + where);
  expect(at::allclose(merged[1], size_out), "masked_merge: sizes, " + where);
  expect(merged[2].cpu().equal(at::tensor({0, 1, 3, 2}, at::kLong).view({1, 4})), "masked_merge: ranks, " + where);
  expect(merged[3].cpu().equal(at::tensor({0, 1, 2, 1}, at::kLong).view({1, 4})),
         "masked_merge: destinations, " + where);
}

void test_attention(at::Device device, const std::string& where) {
  at::manual_seed(4);
  const at::Tensor packed = at::randn({2, 9, 3, 4, 8}).permute({2, 0, 3, 1, 4}), size = at::rand({2, 9}) * 4;
  const at::Tensor scores = at::matmul(packed[0], packed[1].mT()) / std::sqrt(8.) + size.log().view({2, 1, 1, 9});
  const at::Tensor shares = at::softmax(scores, -1), there = packed.to(device);
  const Tensors got = call("attention", {there[0], there[1], there[2], size.to(device)});
  expect(at::allclose(got[0].cpu(), at::matmul(shares, packed[2]), 0., 1e-5), "attention: output, " + where);
  expect(at::allclose(got[1].cpu(), shares.select(2, 0).mean(1), 0., 1e-5), "attention: class row, " + where);
}

void test_attention_received(at::Device device, const std::string& where) {
  at::manual_seed(6);
  const at::Tensor q = at::randn({2, 3, 9, 8}), k = at::randn({2, 3, 9, 8}), size = at::rand({2, 9}) * 4;
  const at::Tensor scores = at::matmul(q, k.mT()) / std::sqrt(8.) + size.log().view({2, 1, 1, 9});
  const at::Tensor got = call("attention_received", {q.to(device), k.to(device), size.to(device)})[0].cpu();
  expect(at::allclose(got, at::softmax(scores, -1).mean({1, 2}), 0., 1e-6), "attention_received, " + where);
}

// With nothing masked this is attention, but for eps.
void test_masked_attention() {
  at::manual_seed(7);
  const at::Tensor q = at::randn({2, 3, 9, 8}), k = at::randn({2, 3, 9, 8}), v = at::randn({2, 3, 9, 8});
  const Tensors got = call("masked_attention", {q, k, v, at::ones({2, 9})}), plain = call("attention", {q, k, v});
  expect(at::allclose(got[0], plain[0], 0., 1e-5), "masked_attention: output");
  expect(at::allclose(got[1], plain[1], 0., 1e-5), "masked_attention: class row");
}

// Of tokens 2 and 4, token 4 is the more similar to one of tokens 1 and 3: to token 1, of which it becomes a part.
void test_tome_merge() {
  const at::Tensor x = at::tensor({5., 5., 1., 0., 0., 2., 0., -2., 2., 0.}, at::kFloat).view({1, 5, 2});
  const Tensors merged = call("tome_merge", {x, x, 1});
  const at::Tensor x_out = at::tensor({5., 5., 0., 2., 1.5, 0., 0., -2.}, at::kFloat).view({1, 4, 2});
  expect(at::allclose(merged[0], x_out), "tome_merge: tokens");
  expect(merged[1].equal(at::tensor({1., 1., 2., 1.}, at::kFloat).view({1, 4})), "tome_merge: sizes");
  expect(merged[2].equal(at::tensor({0, 2, 1, 3, 2}, at::kLong).view({1, 5})), "tome_merge: sources");
}

// The same tokens, of which 1 and 2 may leave and 3 and 4 receive: token 1 goes to token 4, which points its way.
void test_bipartite_merge() {
  const at::Tensor x = at::tensor({5., 5., 1., 0., 0., 2., 0., -2., 2., 0.}, at::kFloat).view({1, 5, 2});
  const at::Tensor role = at::tensor({0, 1, 1, 2, 2}, at::kLong).view({1, 5});
  const Tensors merged = call("bipartite_merge", {x, x, role, 1});
  const at::Tensor x_out = at::tensor({5., 5., 0., 2., 0., -2., 1.5, 0.}, at::kFloat).view({1, 4, 2});
  expect(at::allclose(merged[0], x_out), "bipartite_merge: tokens");
  expect(merged[2].equal(at::tensor({0, 3, 1, 2, 3}, at::kLong).view({1, 5})), "bipartite_merge: sources");
}

// Of four directions the one apart from the others comes first, then what is farthest from it.
void test_select_diverse() {
  const at::Tensor x = at::tensor({9., 9., 1., .1, 1., .2, -1., 1., 1., 0.}, at::kFloat).view({1, 5, 2});
  expect(call("select_diverse", {x, 3})[0].equal(at::tensor({0, 3, 4}, at::kLong).view({1, 3})), "select_diverse");
}

// Position 2 went into token 0, position 3 was pruned.
void test_unmerge() {
  const at::Tensor x = at::tensor({1., 2., 3., 4.}, at::kFloat).view({1, 2, 2});
  const at::Tensor source = at::tensor({0, 1, 0, -1}, at::kLong).view({1, 4});
  const at::Tensor expected = at::tensor({1., 2., 3., 4., 1., 2., 0., 0.}, at::kFloat).view({1, 4, 2});
  expect(call("unmerge", {x, source})[0].equal(expected), "unmerge");
  const at::Tensor sums = at::tensor({2., 4., 3., 4.}, at::kFloat).view({1, 2, 2});
  expect(call("_unmerge_backward", {expected, source, 2})[0].equal(sums), "unmerge: gradient");
}

void test_norms(at::Device device, const std::string& where) {
  at::manual_seed(8);
  const at::Tensor x = at::randn({2, 9, 16}), branch = at::randn({2, 9, 16}), importance = at::rand({2, 9});
  const at::Tensor weight = at::randn({16}), bias = at::randn({16});
  const auto there = [&](const at::Tensor& one) { return c10::IValue(one.to(device)); };
  const auto norm = [&](const at::Tensor& one) { return at::layer_norm(one, {16}, weight, bias, 1e-6); };
  const Tensors sum = call("add_layer_norm", {there(x), there(branch), there(weight), there(bias)});
  expect(sum[0].cpu().equal(x + branch), "add_layer_norm: sum, " + where);
  expect(at::allclose(sum[1].cpu(), norm(x + branch), 0., 1e-5), "add_layer_norm: normalized, " + where);
  const Tensors left = call("prune_merge", {there(x + branch), there(importance), 7, 5});
  const Tensors both =
      call("prune_merge_norm", {there(x), there(branch), there(importance), 7, 5, there(weight), there(bias)});
  expect(at::allclose(both[0], left[0], 0., 1e-5), "prune_merge_norm: tokens, " + where);
  expect(at::allclose(both[1].cpu(), norm(left[0].cpu()), 0., 1e-5), "prune_merge_norm: normalized, " + where);
  expect(both[3].equal(left[2]), "prune_merge_norm: sources, " + where);
}

void test_linear_gelu() {
  at::manual_seed(5);
  const at::Tensor x = at::randn({2, 3, 4}), weight = at::randn({5, 4}), bias = at::randn({5});
  const at::Tensor before = at::matmul(x, weight.t()) + bias;
  const at::Tensor expected = before * 0.5 * (1 + at::erf(before / std::sqrt(2.)));
  expect(at::allclose(call("linear_gelu", {x, weight, bias})[0], expected, 0., 1e-5), "linear_gelu");
}

// Two patches of a pixel row each, behind one prefix token.
void test_embed_patches() {
  at::manual_seed(6);
  const at::Tensor images = at::randn({2, 3, 1, 4}), weight = at::randn({5, 3, 1, 2}), bias = at::randn({5});
  const at::Tensor position = at::randn({3, 5}), prefix = at::randn({1, 5});
  const Tensors found = call("_embed_patches", {images, weight, bias, position, prefix, at::ones({5}), bias});
  for (const int64_t patch : {0, 1}) {
    const at::Tensor pixels = images.narrow(3, 2 * patch, 2).flatten(1);
    const at::Tensor expected = at::matmul(pixels, weight.flatten(1).t()) + bias + position[patch + 1];
    expect(at::allclose(found[0].select(1, patch + 1), expected, 0., 1e-5), "_embed_patches: a patch");
  }
  expect(found[0].select(1, 0).equal((prefix[0] + position[0]).expand({2, 5})), "_embed_patches: the prefix");
  const at::Tensor normalized = at::layer_norm(found[0], {5}, at::ones({5}), bias, 1e-6);
  expect(at::allclose(found[1], normalized, 0., 1e-5), "_embed_patches: normalized");
}

// Where there is no kernel, attention is composed of PyTorch's operators: here asked on behalf of a device without any.
void test_composed_attention(at::ScalarType type, double atol) {
  at::manual_seed(3);
  const at::Tensor packed = at::randn({2, 9, 3, 4, 8}).to(type).permute({2, 0, 3, 1, 4});
  const at::Tensor size = at::rand({2, 9}) * 4;
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("tokcomp::attention", "");
  for (const c10::IValue& sizes : {c10::IValue(), c10::IValue(size)}) {
    for (const c10::IValue& scale : {c10::IValue(), c10::IValue(0.7)}) {
      const Tensors expected = call("attention", {packed[0], packed[1], packed[2], sizes, scale});
      torch::jit::Stack stack{packed[0], packed[1], packed[2], sizes, scale};
      op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), &stack);
      const at::Tensor out = stack.at(0).toTensor(), cls_attn = stack.at(1).toTensor();
      const std::string what = std::string(at::toString(type)) + (sizes.isNone() ? "" : ", sizes");
      expect(at::allclose(out.to(at::kFloat), expected[0].to(at::kFloat), 0., atol), "composed attention, " + what);
      expect(out.strides() == expected[0].strides(), "composed attention: strides, " + what);
      expect(at::allclose(cls_attn, expected[1], 0., 1e-5), "composed attention: class row, " + what);
    }
  }
}

void test_refusal() {
  std::string message;
  try {
    call("prune_merge", {at::ones({1, 4, 2}), at::ones({1, 4}), 4, 1});
  } catch (const c10::ValueError& error) {
    message = error.what_without_backtrace();
  }
  expect(message.find("prune_merge: num_merge_kept must be more than num_prefix_tokens (1)") == 0,
         "prune_merge: refuses to merge into the class token, got \"" + message + "\"");
}

void test_every_operator_answers_on_cpu() {
  int operators = 0;
  for (const auto& name : c10::Dispatcher::singleton().getAllOpNames()) {
    if (name.name.rfind("tokcomp::", 0) != 0) continue;
    ++operators;
    const auto op = c10::Dispatcher::singleton().findOp(name);
    expect(op && op->hasComputedKernelForDispatchKey(c10::DispatchKey::CPU), name.name + " answers on CPU");
  }
  expect(operators > 0, "operators are defined");
}

}  // namespace

int main() {
  test_every_operator_answers_on_cpu();
  test_refusal();
  test_masked_merge(at::kCPU, "cpu");
  test_masked_attention();
  test_tome_merge();
  test_bipartite_merge();
  test_select_diverse();
  test_unmerge();
  test_linear_gelu();
  test_embed_patches();
  test_composed_attention(at::kFloat, 1e-5);
  test_composed_attention(at::kBFloat16, 4e-2);  // values of up to 4 and 8 bits, rounded in other places
  std::vector<at::Device> devices{at::kCPU};
  if (at::hasCUDA()) devices.emplace_back(at::kCUDA);
  for (const at::Device& device : devices) {
    test_prune_merge(device, device.str());
    test_attention(device, device.str());
    test_attention_received(device, device.str());
    test_norms(device, device.str());
    test_masked_softmax(device, device.str());
    test_class_attention_sort(device, device.str());
  }
  std::cout << (failures ? "failures: " + std::to_string(failures) : "all passed") << '\n';
  return failures != 0;
}
