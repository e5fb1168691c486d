"""The time of a training step on many GPUs, from rates of the hardware.

Computation, communication and the optimizer are counted in FLOPs and bytes, and divided by what a GPU and its node
offer. Four kinds of numbers are fitted to published throughput by bench/published_steps.py, which prints the error: the
share of a GPU's matrix rate that matrix products reach (`utilisation`, for each program and generation of GPUs), how
much slower attention is (`attention`, for each generation), the share of a link's rate that collectives reach, and how
much of the communication hides behind computation.
"""
import math
from dataclasses import dataclass

from model.config import ModelConfig
from pipeline.memory_plan import MemoryPlan

GPUS_PER_NODE = 8
COLLECTIVES = 0.7  # share of a link's rate that NCCL's collectives reach
EXPOSED = 0.75     # share of the shorter of computation and communication that does not overlap with the longer
# Bytes of the optimizer's step per parameter: fp32 weight and both moments read and written, gradient read, weight
# written in bf16.
OPTIMIZER_BYTES = 3 * 8 + 4 + 2


@dataclass(frozen=True)
class Gpu:
    """A GPU and its node of eight. Rates are per second, from NVIDIA's data sheets of the GPUs and DGX nodes."""
    flops: float         # dense matrix products in bf16
    memory_rate: float   # bytes of GPU memory, read and written
    nvlink: float        # bytes that it receives from the other GPUs of its node
    network: float       # bytes that the node receives
    memory: float        # GiB that PyTorch reports, of the 80 or 141 GB in the name
    utilisation: tuple[float, float]  # lowest and highest share of `flops` that matrix products reach in published runs
    attention: float     # time of attention's FLOPs, compared with as many in matrix products


# Fitted by bench/published_steps.py, to no run on an H200. The lower utilisation of H100s is that of cards limited to
# 500 W, against 700 W in the data sheet.
HOPPER, AMPERE = ((0.50, 0.62), 4), ((0.47, 0.72), 2.5)
GPUS = {"a100": Gpu(312e12, 2.0e12, 300e9, 200e9, 79, *AMPERE), "h100": Gpu(989e12, 3.35e12, 450e9, 400e9, 79, *HOPPER),
        "h200": Gpu(989e12, 4.8e12, 450e9, 400e9, 139, *HOPPER)}


@dataclass(frozen=True)
class Step:
    """An optimizer step of every process, cut into micro-steps."""
    config: ModelConfig
    processes: int
    zero: int                      # ZeRO stage
    tokens: int                    # of a micro-step of a process
    micro_steps: int
    length: int                    # of a text, on which the cost of attention depends
    trained: int                   # parameters that are trained
    reached: int                   # parameters that the backward pass reaches
    recomputed: float = 0          # share of the forward pass that is computed twice: 1 with gradient checkpointing
    weight_bytes: int = 2
    gradient_bytes: int = 4        # in which gradients are reduced; train.py reduces them in fp32

    @property
    def matrix_flops(self) -> float:
        """FLOPs of a micro-step in matrix products, with the second forward pass of checkpointing. The lookup of an
        untied input embedding has none, and the head is not computed twice."""
        c = self.config
        head = c.vocab_size * c.hidden_size
        blocks = c.num_parameters - (1 if c.tie_word_embeddings else 2) * head
        products = blocks + head
        return 2 * (products + min(self.reached, products) + min(self.trained, products) + self.recomputed * blocks) \
            * self.tokens

    @property
    def attention_flops(self) -> float:
        """FLOPs of a micro-step in attention, with the second forward pass of checkpointing.

        In each layer a token attends to S/2 tokens on average. The products with their keys and their values take
        2·S·d FLOPs, for d dimensions of all heads, and the backward pass twice as many: half of what Korthikanti et al.
        (arXiv 2205.05198, appendix A) count without a causal mask. A layer with a window shorter than S computes all
        scores, since the window is a mask.
        """
        c = self.config
        windows = [c.window(layer) for layer in range(c.num_hidden_layers)]
        halves = sum(2 if window and window < self.length else 1 for window in windows)
        forward = 2 * halves * self.length * c.num_attention_heads * c.head_dim
        return (3 + self.recomputed) * forward * self.tokens

    def transfer(self, gpu: Gpu, bytes_per_parameter: float, parameters: int) -> float:
        """Seconds of an all-gather or a reduce-scatter by rings: every GPU receives what the others hold, over NVLink,
        and as much enters each node over the network; the slower of both counts."""
        received = bytes_per_parameter * parameters * (self.processes - 1) / self.processes
        rate = gpu.nvlink if self.processes <= GPUS_PER_NODE else min(gpu.nvlink, gpu.network)
        return received / rate / COLLECTIVES

    def micro_communication(self, gpu: Gpu) -> float:
        """Seconds of communication in each micro-step: ZeRO-3 gathers the weights twice and scatters the gradients
        (Rajbhandari et al., arXiv 1910.02054, section 7). ZeRO-2 needs to scatter the gradients only, but DeepSpeed
        reduces them for all processes (use_multi_rank_bucket_allreduce), which moves twice as much."""
        gradients = self.transfer(gpu, self.gradient_bytes, self.trained)
        weights = self.transfer(gpu, self.weight_bytes, self.config.num_parameters)
        return {2: 2 * gradients, 3: gradients + 2 * weights}.get(self.zero, 0)

    def final_communication(self, gpu: Gpu) -> float:
        """Seconds of communication once a step: ZeRO 0 and 1 reduce the gradients for all processes; ZeRO 1 and 2 then
        gather the updated weights."""
        gradients = 2 * self.transfer(gpu, self.gradient_bytes, self.trained)
        weights = self.transfer(gpu, self.weight_bytes, self.trained)
        return (gradients if self.zero < 2 else 0) + (weights if self.zero in (1, 2) else 0)

    def computation(self, gpu: Gpu, utilisation: float) -> float:
        """Seconds of computation in a micro-step."""
        return (self.matrix_flops + gpu.attention * self.attention_flops) / (gpu.flops * utilisation)

    def optimizer(self, gpu: Gpu) -> float:
        """Seconds of the optimizer, which is bound by the memory."""
        return OPTIMIZER_BYTES * self.trained / (self.processes if self.zero else 1) / gpu.memory_rate

    def seconds(self, gpu: Gpu, utilisation: float) -> float:
        """Seconds of the step; utilisation: the share of the matrix rate that matrix products reach."""
        compute, communication = self.computation(gpu, utilisation), self.micro_communication(gpu)
        micro_step = max(compute, communication) + EXPOSED * min(compute, communication)
        return self.micro_steps * micro_step + self.final_communication(gpu) + self.optimizer(gpu)


def plan_step(plan: MemoryPlan, samples: int) -> Step:
    """A step of so many samples, in as few micro-steps as the plan's size of a micro-batch allows. The processes with
    most samples decide its time."""
    per_process = math.ceil(samples / plan.processes) * plan.sample_tokens
    micro_steps = math.ceil(per_process / plan.max_tokens_per_microbatch)
    return Step(plan.config, plan.processes, plan.zero, tokens=math.ceil(per_process / micro_steps),
                micro_steps=micro_steps, length=plan.sample_tokens, trained=plan.num_trained, reached=plan.num_reached,
                recomputed=plan.gradient_checkpointing, weight_bytes=plan.weight_bytes)
