"""The model of a step's time: by hand, and compared with published runs."""
from dataclasses import replace
from statistics import mean

import pytest

from bench.published_steps import SHAPES, fitted_utilisations, read_runs
from model.config import ModelConfig, size_config
from pipeline.memory_plan import MemoryPlan
from pipeline.step_time import COLLECTIVES, EXPOSED, GPUS, Gpu, Step, plan_step

N = 5_933_109_248  # parameters of the 7B: 32 layers, and heads of 4,096 dimensions in all
EMBEDDING = 32_000 * 4096  # its head has as many
GPU = Gpu(flops=1e15, memory_rate=2e12, nvlink=4e11, network=1e11, memory=80, utilisation=(0.5, 0.5), attention=3)


def step(**changes) -> Step:
    return replace(Step(size_config("7b"), 8, 3, tokens=8192, micro_steps=2, length=1024, trained=N, reached=N),
                   **changes)


def test_flops():
    """The input embedding is a lookup, and checkpointing computes the blocks once more."""
    products, attention = N - EMBEDDING, 2 * 32 * 1024 * 4096
    assert step().matrix_flops == 6 * products * 8192
    assert step(recomputed=1).matrix_flops == (6 * products + 2 * (products - EMBEDDING)) * 8192
    assert step(trained=5, reached=7).matrix_flops == (2 * products + 2 * 7 + 2 * 5) * 8192
    assert step().attention_flops == 3 * attention * 8192
    assert step(recomputed=1).attention_flops == 4 * attention * 8192
    assert step().computation(GPU, 0.5) == (step().matrix_flops + 3 * step().attention_flops) / 5e14


def test_flops_of_tied_embeddings_and_windows():
    """A layer whose window is shorter than the text computes all scores instead of half of them."""
    config = ModelConfig(512, 64, 128, 2, 4, tie_word_embeddings=True, model_type="mistral", sliding_window=256)
    short, long = (replace(step(config=config, trained=config.num_parameters, reached=config.num_parameters),
                           length=length) for length in (256, 512))
    assert short.matrix_flops == config.flops(8192)
    assert (short.attention_flops, long.attention_flops) == (
        3 * 2 * 2 * 256 * 64 * 8192, 3 * 2 * 2 * 2 * 512 * 64 * 8192)


@pytest.mark.parametrize(("zero", "each", "once"), [(0, 0, 8), (1, 0, 10), (2, 8, 2), (3, 8, 0)])
def test_communication_of_the_stages(zero, each, once):
    """Bytes per parameter in each micro-step and once, in a node and over two nodes."""
    in_node = N * 7 / 8 / GPU.nvlink / COLLECTIVES
    assert step(zero=zero).micro_communication(GPU) == pytest.approx(each * in_node)
    assert step(zero=zero).final_communication(GPU) == pytest.approx(once * in_node)
    over_network = N * 15 / 16 / GPU.network / COLLECTIVES
    assert step(zero=zero, processes=16).micro_communication(GPU) == pytest.approx(each * over_network)
    assert step(zero=zero, processes=16).final_communication(GPU) == pytest.approx(once * over_network)
    assert step(zero=zero, processes=1).micro_communication(GPU) == 0


def test_only_gradients_of_what_is_trained_are_reduced():
    lora = step(trained=N // 1000)
    assert lora.micro_communication(GPU) == pytest.approx(step().micro_communication(GPU) * (4 + 0.004) / 8)
    assert step(zero=2, trained=0).micro_communication(GPU) == step(zero=2, trained=0).final_communication(GPU) == 0


def test_a_faster_network_than_nvlink_does_not_help():
    assert step(processes=16).micro_communication(replace(GPU, network=1e12)) == pytest.approx(
        step(processes=16).micro_communication(replace(GPU, network=GPU.nvlink)))


def test_the_longer_part_hides_a_share_of_the_shorter():
    slow_network = replace(GPU, network=1e9)
    for gpu, processes in ((GPU, 8), (slow_network, 16)):
        a, b = step().computation(gpu, 0.5), step(processes=processes).micro_communication(gpu)
        expected = 2 * (max(a, b) + EXPOSED * min(a, b)) + 30 * N / processes / 2e12
        assert step(processes=processes).seconds(gpu, 0.5) == pytest.approx(expected)
    assert step(zero=0).optimizer(GPU) == pytest.approx(30 * N / 2e12)


def test_a_plan_cuts_a_step_into_micro_steps():
    plan = MemoryPlan(size_config("7b"), 8, 2, False, "bf16", 8192, False)
    for samples, tokens, micro_steps in ((256, 4096, 1), (625, 5056, 2), (1, 128, 1)):  # samples are not split
        found = plan_step(plan, samples)
        assert (found.tokens, found.micro_steps, found.length) == (tokens, micro_steps, 128), samples
    frozen = replace(plan, trained={"model.layers.31.mlp.up_proj.weight": (11008, 4096)})
    layer = (N - 2 * EMBEDDING - 4096) // 32
    assert plan_step(frozen, 256).reached == layer + 4096 + EMBEDDING
    assert plan_step(frozen, 256).trained == 11008 * 4096


def test_published_runs():
    """The shapes have the published numbers of parameters, and the model is within 6% of the runs on average,
    and within 8% of those with long texts or many GPUs."""
    runs = read_runs()
    published = {"MPT-7B": 6_658_859_008, "MPT-13B": 12_853_954_560, "MPT-30B": 29_975_214_080,
                 "MPT-70B": 64_862_437_376, "LLaMA-7B": 6_738_415_616, "Llama-3-8B": 8_030_261_248}
    for name, parameters in published.items():
        assert SHAPES[name].num_parameters == pytest.approx(parameters, rel=0.002)
    shares = fitted_utilisations(runs)
    assert mean(abs(run.error(shares[run.kind])) for run in runs) < 0.06
    for few in ([run for run in runs if run.length > 4096], [run for run in runs if run.gpus > 64]):
        assert mean(abs(run.error(shares[run.kind])) for run in few) < 0.08
    for generation in ("a100", "h100"):
        reached = [share for kind, share in shares.items() if kind[1] == generation]
        assert GPUS[generation].utilisation == (min(reached), max(reached))
