"""What is measured and who competes: the `bench` cases of tests/cases.py, and the models' steps of training
and of generation."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from cases import LINEAR, OPERATORS, Operator
from harness import cotangents_for, differentiable, map_tensors, tensors_of
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.decoding_step import DecodingStep
from benchmarks.training_step import STEPS, TrainingStep
from fastlm import _C

EAGER, UNFUSED, COMPILED, FASTLM = "eager", "eager unfused", "torch.compile", "fastlm"
FORWARD, BOTH = "forward", "forward+backward"
DTYPES = (torch.float32, torch.bfloat16)
MEASURED = OPERATORS | {LINEAR.name: LINEAR}
STEPS_OF_MODELS = {step.operator: step for step in (TrainingStep, DecodingStep)}


@dataclass(frozen=True)
class Workload:
    """One shape and dtype of an operator. `problem()` makes its inputs anew, always the same."""

    operator: str
    shape: str
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"{self.operator}/{self.shape}/{str(self.dtype).removeprefix('torch.')}"

    @property
    def contenders(self) -> tuple[str, ...]:
        if self.operator in STEPS_OF_MODELS:
            return STEPS_OF_MODELS[self.operator].contenders
        if self.operator == "scaled_dot_product_attention":
            return (EAGER, UNFUSED, COMPILED, FASTLM)
        if self.operator == "gru":  # torch.compile leaves nn.GRU to eager
            return (EAGER, FASTLM)
        return (EAGER, COMPILED, FASTLM)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The passes that its problem may have."""
        return STEPS_OF_MODELS[self.operator].kinds if self.operator in STEPS_OF_MODELS else (FORWARD, BOTH)

    def problem(self):
        if self.operator in STEPS_OF_MODELS:
            return STEPS_OF_MODELS[self.operator](self.shape, self.dtype)
        return OperatorProblem(MEASURED[self.operator], self.shape, self.dtype)


def workloads() -> list[Workload]:
    found = [
        Workload(operator.name, case.id, dtype)
        for operator in MEASURED.values()
        for case in operator.bench
        for dtype in DTYPES
        if dtype in case.dtypes
    ]
    # Training in bfloat16 is for CPUs that can multiply it: others take minutes for a step.
    trained_in = DTYPES if _C.multiply_adds(1, bf16=True) else DTYPES[:1]
    found += [Workload(TrainingStep.operator, name, dtype) for name in STEPS for dtype in trained_in]
    return found + [Workload(DecodingStep.operator, *case) for case in DecodingStep.cases()]


class OperatorProblem:
    """An operator's inputs in memory, and the functions that compete on them.

    kinds: "forward" and, where an input wants a gradient, "forward+backward".
    floor: kind -> (operations, bytes).
    stateful: nothing lives from call to call.
    """

    stateful = False
    device = torch.device("cpu")

    def __init__(self, operator: Operator, shape: str, dtype: torch.dtype):
        grown = operator.growth.cases.values() if operator.growth else ()
        case = next(c for c in (*operator.bench, *grown) if c.id == shape)
        self.operator, self.dtype = operator, dtype
        self.arguments = args, kwargs = case.build(dtype, 0)
        self.inputs = differentiable(self.arguments)
        self.kinds = (FORWARD, BOTH) if self.inputs else (FORWARD,)
        operations, moved = operator.flops(*args, **kwargs), operator.bytes(*args, **kwargs)
        self.floor = {FORWARD: (operations[0], moved[0]), BOTH: (sum(operations), sum(moved))}

    def truth(self) -> list[Tensor]:
        """Outputs, then gradients, of the reference in float32."""
        arguments = map_tensors(lambda x: x.float() if x.is_floating_point() else x, self.arguments)
        args, kwargs = arguments
        outputs = tensors_of(self.operator.reference(*args, **kwargs))
        live = [x for x in outputs if x.requires_grad]
        self.draw_cotangents([x.shape for x in live])
        if not live:
            return outputs
        cotangents = [x.float() for x in self.cotangents]
        return outputs + list(torch.autograd.grad(live, differentiable(arguments), cotangents))

    def draw_cotangents(self, shapes: list[torch.Size]) -> None:
        """What is propagated back through outputs of these shapes: 1 through a loss, as loss.backward() does."""
        self.shapes = shapes
        like = [torch.empty((), dtype=self.dtype, device=self.device).expand(shape) for shape in shapes]
        self.cotangents = [c if c.dim() else torch.ones_like(c) for c in cotangents_for(like, 1)]

    def call(self, contender: str, kind: str) -> Callable[[], list[Tensor]]:
        """A call of the contender; it returns outputs and, for "forward+backward", gradients."""
        function = self.function(contender)
        args, kwargs = self.arguments

        def forward():
            with torch.no_grad():
                outputs = function(*args, **kwargs)
            return [outputs] if isinstance(outputs, Tensor) else list(outputs)

        def both():
            outputs = function(*args, **kwargs)
            outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
            return outputs + list(torch.autograd.grad(outputs, self.inputs, self.cotangents))

        return forward if kind == FORWARD else both

    def function(self, contender: str) -> Callable:
        if contender == FASTLM:
            return self.operator.function
        eager = self.operator.eager or self.operator.reference

        def call(*args, **kwargs):  # a Python function: torch.compile and the context need one
            return eager(*args, **kwargs)

        if contender == COMPILED:
            return torch.compile(call, dynamic=False)
        if contender == UNFUSED:
            return sdpa_kernel(SDPBackend.MATH)(call)
        return eager
