"""The patches of the CPU engine, each against its plain twin."""

from types import SimpleNamespace

import torch

from drafthead.vllm_plugin import cpu_kernel_registry, cpu_short_conv, registry


def test_verify_rows_of_the_convolution():
    """Against one token at a time with nothing but the true inputs, whatever was rejected."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    taps, dim, k, requests, steps = 3, 8, 4, 5, 12
    weight, bias = random(dim, taps), random(dim)
    state = torch.full((requests + 1, dim, taps - 1 + k), float("nan"))
    slots = torch.randperm(requests, generator=generator) + 1
    state[:, :, : taps - 1] = 0
    history = [torch.zeros(taps - 1, dim) for _ in range(requests)]
    accepted = torch.ones(requests, dtype=torch.int32)
    for _ in range(steps):
        lengths = torch.randint(1, k + 2, (requests,), generator=generator)
        start = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
        x = random(int(start[-1]), dim)
        got = cpu_short_conv.causal_conv1d_verify(x, state, weight, bias, slots, accepted, start)
        for request in range(requests):
            rows = x[start[request] : start[request + 1]]
            inputs = torch.cat([history[request], rows])
            want = [(inputs[i : i + taps] * weight.T).sum(0) + bias for i in range(rows.shape[0])]
            torch.testing.assert_close(got[start[request] : start[request + 1]], torch.stack(want))
            accepted[request] = torch.randint(1, rows.shape[0] + 1, (1,), generator=generator)
            history[request] = inputs[accepted[request] : accepted[request] + taps - 1]


def test_rope_on_the_cpu_rotates_every_head():
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    registry.apply([registry.named("cpu_rope")])
    with set_current_vllm_config(VllmConfig()):
        rope = get_rope(
            32,
            max_position=64,
            rope_parameters={"rope_theta": 1e4, "rope_type": "default"},
            is_neox_style=True,
            dtype=torch.float32,
        )
    positions = torch.tensor([3, 9, 31])
    query, key = torch.randn(3, 4, 32), torch.randn(3, 2, 32)
    want = rope.forward_native(positions, query.clone(), key.clone())
    got = rope.forward_cpu(positions, query.clone(), key.clone())
    for one, other in zip(got, want):
        torch.testing.assert_close(one, other)


def test_temperatures_of_drafts_on_the_cpu():
    from vllm.utils import cpu_triton_utils

    registry.apply([registry.named("cpu_expand")])
    cu = torch.tensor([3, 3, 5], dtype=torch.int32)  # three drafts, none, two
    for values, want in (
        (torch.tensor([0.7, 2.0, 0.0]), torch.tensor([0.7, 0.7, 0.7, 1.0, 1.0])),
        (torch.tensor([40, 7, 0]), torch.tensor([40, 40, 40, 1, 1])),
    ):
        output = torch.full((5,), 9, dtype=values.dtype)
        cpu_triton_utils._expand_kernel_impl(output, values, cu, 0, 1, MAX_NUM_TOKENS=16)
        torch.testing.assert_close(output, want)


def test_vars_of_anything():
    class Odd:
        def __getattr__(self, name):
            return lambda: None

        @property
        def __dict__(self):
            return lambda: None

    assert cpu_kernel_registry.attributes(Odd()) == {}
    assert cpu_kernel_registry.attributes(SimpleNamespace(kernel=1)) == {"kernel": 1}
