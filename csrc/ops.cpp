// Every operator schema of fastlm, and nothing else. Kernels register in csrc/cpu, csrc/cuda and
// fastlm/triton; shapes and the meaning of each argument stand with the functions of fastlm/ops.
#include <torch/csrc/stable/library.h>

// -Dfastlm=... defines the operators under another name; torch 2.10's macro alone would not see that.
#define FASTLM_LIBRARY(ns, m) STABLE_TORCH_LIBRARY(ns, m)

FASTLM_LIBRARY(fastlm, m) {
  // attention: what is left out costs a small call little on its way, a None as much as a number; an eager call on a
  // CPU that has no options takes plain_attention
  m.def(
      "attention_forward(Tensor query, Tensor key, Tensor value, bool is_causal, float scale, "
      "Tensor? attn_mask=None, Tensor? alibi_slopes=None, Tensor? sinks=None, Tensor? seed=None, "
      "float dropout_p=0.0, int window_left=-1, int window_right=-1, float softcap=0.0) "
      "-> (Tensor out, Tensor lse)");
  m.def(
      "plain_attention_forward(Tensor query, Tensor key, Tensor value, bool is_causal, bool enable_gqa) "
      "-> (Tensor out, Tensor lse)");
  m.def(
      "plain_attention_backward(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
      "bool is_causal) -> (Tensor dquery, Tensor dkey, Tensor dvalue)");
  m.def(
      "attention_backward(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
      "bool is_causal, float scale, Tensor? dlse=None, Tensor? attn_mask=None, Tensor? alibi_slopes=None, "
      "Tensor? sinks=None, Tensor? seed=None, float dropout_p=0.0, int window_left=-1, int window_right=-1, "
      "float softcap=0.0, bool needs_mask=False, bool needs_slopes=False) "
      "-> (Tensor dquery, Tensor dkey, Tensor dvalue, Tensor dmask, Tensor dslopes, Tensor dsinks)");
  m.def(
      "varlen_attention_forward(Tensor query, Tensor key, Tensor value, Tensor cu_seq_q, Tensor? cu_seq_k, "
      "Tensor? seqused_k, Tensor? block_table, int max_q, int max_k, int window_left, int window_right, "
      "float scale, int num_splits) -> (Tensor out, Tensor lse)");
  m.def(
      "varlen_attention_backward(Tensor dout, Tensor? dlse, Tensor query, Tensor key, Tensor value, "
      "Tensor out, Tensor lse, Tensor cu_seq_q, Tensor cu_seq_k, int max_q, int max_k, int window_left, "
      "int window_right, float scale) -> (Tensor dquery, Tensor dkey, Tensor dvalue)");
  m.def(
      "cross_entropy(Tensor input, Tensor target, Tensor? weight, int reduction, int ignore_index, "
      "float label_smoothing, float z_loss, float softcap, bool return_lse, bool full_precision, "
      "bool gradient) -> (Tensor loss, Tensor lse, Tensor low, Tensor dinput)");
  m.def(
      "cross_entropy_backward(Tensor dloss, Tensor? dlse, Tensor input, Tensor target, "
      "Tensor? weight, Tensor lse, Tensor low, int reduction, int ignore_index, float label_smoothing, "
      "float z_loss, float softcap, bool input_gradient, bool target_gradient) "
      "-> (Tensor dinput, Tensor dtarget)");
  m.def(
      "linear_cross_entropy(Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, "
      "Tensor? weight, int reduction, int ignore_index, float label_smoothing, float z_loss, "
      "float softcap, bool full_precision, bool input_gradient, bool weight_gradient, "
      "bool bias_gradient) -> (Tensor loss, Tensor lse, Tensor low, Tensor dinput, Tensor dlinear_weight, "
      "Tensor dlinear_bias)");
  m.def(
      "linear_cross_entropy_backward(Tensor dloss, Tensor? dlse, Tensor input, Tensor linear_weight, "
      "Tensor target, Tensor? linear_bias, Tensor? weight, Tensor lse, Tensor low, int reduction, "
      "int ignore_index, float label_smoothing, float z_loss, float softcap, bool input_gradient, "
      "bool weight_gradient, bool bias_gradient) -> (Tensor dinput, Tensor dlinear_weight, "
      "Tensor dlinear_bias)");
  m.def("scale_(Tensor(a!)[] gradients, Tensor factor) -> ()");
  m.def("linear(Tensor input, Tensor weight, Tensor? scale, Tensor? bias) -> Tensor");
  m.def("sum_rows(Tensor input) -> Tensor");
  m.def("gelu(Tensor input, bool tanh) -> Tensor");
  m.def("gelu_backward(Tensor dout, Tensor input, bool tanh) -> Tensor");
  m.def("new_empty(Tensor self, int[] size, ScalarType dtype) -> Tensor");
  m.def(
      "gru_layer(Tensor input, Tensor? batch_sizes, Tensor hx, Tensor[] weights, bool has_biases, "
      "bool layer_norm, Tensor? update, float zoneout, bool save) -> (Tensor output, Tensor hn, "
      "Tensor gates, Tensor normed, Tensor rstd)");
  m.def(
      "gru_layer_backward(Tensor? grad_output, Tensor? grad_hn, Tensor input, Tensor? batch_sizes, "
      "Tensor hx, Tensor[] weights, bool has_biases, bool layer_norm, Tensor? update, float zoneout, "
      "Tensor output, Tensor gates, Tensor normed, Tensor rstd, bool input_wanted, "
      "bool weights_wanted) -> (Tensor grad_input, Tensor grad_hx, Tensor[] grad_weights)");
}
