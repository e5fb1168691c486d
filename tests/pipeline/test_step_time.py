"""The model of a step's time: by hand, and compared with published runs."""
from dataclasses import replace
from statistics import mean

import pytest

from bench.published_steps import RUNS, SHAPES, fitted_utilisations
from pipeline.memory_plan import MemoryPlan
from pipeline.pretraining import size_config
from pipeline.step_time import COLLECTIVES, EXPOSED, GPUS, Gpu, Step, plan_step

N = 5_933_109_248  # parameters of the 7B: 32 layers, and heads of 4,096 dimensions in all
GPU = Gpu(flops=1e15, memory_rate=2e12, nvlink=4e11, network=1e11, memory=80, utilisation=(0.5, 0.5))


def step(**changes) -> Step:
    return replace(Step(size_config("7b"), 8, 3, tokens=8192, micro_steps=2, length=1024, trained=N), **changes)


def test_flops():
    attention = 2 * 32 * 1024 * 4096
    assert step().flops() == (6 * N + 3 * attention) * 8192
    assert step(recomputed=1).flops() == (8 * N + 4 * attention) * 8192
    assert step(trained=0).flops() == (4 * N + 3 * attention) * 8192
    assert step().computation(GPU, 0.5) == step().flops() / 5e14


@pytest.mark.parametrize(("zero", "each", "once"), [(0, 0, 8), (1, 0, 6), (2, 4, 2), (3, 8, 0)])
def test_communication_of_the_stages(zero, each, once):
    """Bytes per parameter in each micro-step and once, in a node and over two nodes."""
    in_node = N * 7 / 8 / GPU.nvlink / COLLECTIVES
    assert step(zero=zero).micro_communication(GPU) == pytest.approx(each * in_node)
    assert step(zero=zero).final_communication(GPU) == pytest.approx(once * in_node)
    over_network = N / 2 / GPU.network / COLLECTIVES  # each node receives the half that the other has
    assert step(zero=zero, processes=16).micro_communication(GPU) == pytest.approx(each * over_network)
    assert step(zero=zero, processes=16).final_communication(GPU) == pytest.approx(once * over_network)
    assert step(zero=zero, processes=1).micro_communication(GPU) == 0


def test_only_gradients_of_what_is_trained_are_reduced():
    lora = step(trained=N // 1000)
    assert lora.micro_communication(GPU) == pytest.approx(step().micro_communication(GPU) * (4 + 0.004) / 8)
    assert step(zero=2, trained=0).micro_communication(GPU) == step(zero=2, trained=0).final_communication(GPU) == 0


def test_the_longer_part_hides_a_share_of_the_shorter():
    slow_network = replace(GPU, network=1e9)
    for gpu, processes in ((GPU, 8), (slow_network, 16)):
        a, b = step().computation(gpu, 0.5), step(processes=processes).micro_communication(gpu)
        expected = 2 * (max(a, b) + EXPOSED * min(a, b)) + 30 * N / processes / 2e12
        assert step(processes=processes).seconds(gpu, 0.5) == pytest.approx(expected)
        assert step(processes=processes).tokens_per_second(gpu, 0.5) == pytest.approx(processes * 2 * 8192 / expected)
    assert step(zero=0).optimizer(GPU) == pytest.approx(30 * N / 2e12)


def test_a_plan_cuts_a_step_into_micro_steps():
    plan = MemoryPlan(size_config("7b"), 8, 2, False, "bf16", 8192, False)
    assert (plan_step(plan, 32_768).tokens, plan_step(plan, 32_768).micro_steps) == (4096, 1)
    assert (plan_step(plan, 80_000).tokens, plan_step(plan, 80_000).micro_steps) == (5000, 2)
    assert plan_step(plan, 80_000).flops() == (6 * N + 6 * 32 * plan.sample_tokens * 4096) * 5000


def test_published_runs():
    """The shapes have the published numbers of parameters, and the model is within 10% on average."""
    published = {"MPT-7B": 6_658_859_008, "MPT-13B": 12_853_954_560, "MPT-30B": 29_975_214_080,
                 "MPT-70B": 64_862_437_376, "LLaMA-7B": 6_738_415_616, "Llama-3-8B": 8_030_261_248}
    for name, parameters in published.items():
        assert SHAPES[name].num_parameters == pytest.approx(parameters, rel=0.002)
    shares = fitted_utilisations(RUNS)
    assert mean(abs(run.error(shares[run.kind])) for run in RUNS) < 0.1
    for generation in ("a100", "h100"):
        reached = [share for kind, share in shares.items() if kind[1] == generation]
        assert GPUS[generation].utilisation == (min(reached), max(reached))
