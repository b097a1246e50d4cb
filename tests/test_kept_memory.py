"""Large results: the memory of one that was freed serves the next (csrc/kept_memory.h), and nobody notices."""

import os
import resource
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F

import fastlm

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or torch.__version__ < "2.11",
    reason="memory is kept on Linux, and from torch 2.11 on, which takes memory with a function that frees it",
)

C = 50257
TOKENS = 180  # 35 MiB of logits in float32
HUGE_PAGES = TOKENS * C * 4 >> 21


def inputs(N=TOKENS):
    generator = torch.Generator().manual_seed(N)
    return torch.randn(N, C, generator=generator, requires_grad=True), torch.randint(
        C, (N,), generator=generator
    )


def gradient(x, target):
    return torch.autograd.grad(fastlm.cross_entropy(x, target), x)[0]


def expected(x, target):
    return torch.autograd.grad(F.cross_entropy(x, target), x)[0]


def test_no_new_pages():
    x, target = inputs()
    first = gradient(x, target)
    address = first.data_ptr()
    del first
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    second = gradient(x, target)
    assert second.data_ptr() == address
    # New memory takes a fault for each huge page at least; the calls in between may take some of their own.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults < HUGE_PAGES
    torch.testing.assert_close(second, expected(x, target))


def test_two_at_once_are_two():
    x, target = inputs()
    a = gradient(x, target)
    b = gradient(2 * x, target)
    assert a.data_ptr() != b.data_ptr()
    torch.testing.assert_close(a, expected(x, target))


def test_gradients_of_a_layer_and_of_an_embedding():
    """As in a training step: freed before the next is made."""
    embedding = fastlm.nn.Embedding(4096, 512)
    layer = fastlm.nn.Linear(512, 4096)
    tokens = torch.randint(4096, (1024,))

    def step():
        embedding.weight.grad = layer.weight.grad = None
        layer(embedding(tokens)).square().mean().backward()
        return {embedding.weight.grad.data_ptr(), layer.weight.grad.data_ptr()}

    step()
    addresses = step()
    with fastlm.use_backend("eager"):
        step()
    assert step() == addresses


def test_small_results_leave_large_memory_alone():
    x, target = inputs()
    large = gradient(x, target)
    address = large.data_ptr()
    del large
    small = gradient(*inputs(TOKENS // 4))
    assert gradient(x, target).data_ptr() == address != small.data_ptr()


def test_other_sizes():
    for N in (TOKENS, 2 * TOKENS, TOKENS + 7, TOKENS, 2 * TOKENS + 1):
        x, target = inputs(N)
        torch.testing.assert_close(gradient(x, target), expected(x, target))


def test_what_is_kept_is_bounded_by_what_was_in_use():
    def mapped():
        with open("/proc/self/statm") as f:
            return int(f.read().split()[0]) * resource.getpagesize()

    sizes = range(TOKENS, TOKENS + 60, 10)
    made = [inputs(N) for N in sizes]
    gradient(*made[0])
    before = mapped()
    for x, target in made:
        gradient(x, target)
    assert mapped() - before < 2 * sizes[-1] * C * 4


LEFT = """
import torch, fastlm
def left():  # to the system, in bytes
    with open("/proc/self/smaps_rollup") as f:
        return sum(int(line.split()[1]) * 1024 for line in f if line.startswith("LazyFree"))
x, target = torch.randn(200, 50257, requires_grad=True), torch.randint(50257, (200,))
def gradients(n):
    return [torch.autograd.grad(fastlm.cross_entropy(x, target), x)[0] for _ in range(n)]
some = gradients(5)  # 40 MB each
del some
few = left()
many = gradients(10)
del many
print(few, left())
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="the system doesn't tell")
def test_what_was_freed_last_is_not_left_to_the_system():
    ran = subprocess.run([sys.executable, "-c", LEFT], capture_output=True, text=True, check=True)
    few, many = map(int, ran.stdout.split())
    size = 200 * C * 4
    assert few == 0
    assert 3 * size < many < 5 * size  # of 402 MB all but 256 MiB


def test_freed_on_another_thread():
    x, target = inputs()
    held = [gradient(x, target)]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    torch.testing.assert_close(gradient(x, target), expected(x, target))


def test_forked_process_has_results_but_not_what_is_kept():
    x, target = inputs()
    want = expected(x, target)
    used, freed = gradient(x, target), gradient(x, target)
    del freed
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # an OpenMP runtime's threads don't survive a fork
        right = torch.allclose(used, want, atol=1e-6) and torch.allclose(gradient(x, target), want, atol=1e-6)
        os._exit(0 if right else 1)
    again = gradient(x, target)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(used, again)
