"""The Triton kernels by the tables of cases: in Triton's interpreter, or on a GPU with TRITON_INTERPRET=0."""

import pytest
import torch
from cases import DTYPES, OPERATORS
from harness import compare, run
from test_operators import bits, every_case, name_of, only_in

import fastlm
import fastlm.triton
from fastlm import ops

pytest.importorskip("triton")

OF_FUNCTION = {
    "scaled_dot_product_attention": "attention_forward",
    "varlen_attn": "varlen_attention_forward",
    "gru": "gru_layer",
    "gru_cell": "gru_layer",
    "cross_entropy": "cross_entropy",
    "linear_cross_entropy": "linear_cross_entropy",
}


def served(operator, dtype):
    if OF_FUNCTION[operator.name] not in fastlm.triton.MODULES:
        pytest.skip("no Triton kernel for this operator yet")
    reason = fastlm.triton.refuses(operator.name, dtype)
    if reason:
        pytest.skip(reason)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@every_case
def test_matches_reference(operator, case, dtype, triton_device):
    only_in(case, dtype)
    served(operator, dtype)
    compare(operator, case, dtype, device=triton_device)
