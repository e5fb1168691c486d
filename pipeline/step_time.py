"""The time of a training step on many GPUs, from rates of the hardware.

Computation, communication and the optimizer are counted in FLOPs and bytes, and divided by what a GPU and its node
offer. Three numbers are fitted to published throughput by bench/published_steps.py, which prints the error: the share
of a GPU's matrix rate that computation reaches (`utilisation`), the share of a link's rate that collectives reach, and
how much of the communication hides behind computation.
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
    """What a GPU and its node of eight offer. Rates per second from NVIDIA's data sheets of the GPUs and DGX nodes."""
    flops: float         # dense matrix products in bf16
    memory_rate: float   # bytes of its own memory, read and written
    nvlink: float        # bytes that it receives from the other GPUs of its node
    network: float       # bytes that the node receives
    memory: float        # GiB
    utilisation: tuple[float, float]  # lowest and highest share of `flops` that computation reaches in published runs


HOPPER, AMPERE = (0.39, 0.54), (0.42, 0.70)  # fitted by bench/published_steps.py, to no run on an H200
GPUS = {"a100": Gpu(312e12, 2.0e12, 300e9, 200e9, 80, AMPERE), "h100": Gpu(989e12, 3.35e12, 450e9, 400e9, 80, HOPPER),
        "h200": Gpu(989e12, 4.8e12, 450e9, 400e9, 141, HOPPER)}


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
    recomputed: float = 0          # share of the forward pass that is computed twice: 1 with gradient checkpointing
    weight_bytes: int = 2
    gradient_bytes: int = 4        # in which gradients are reduced; train.py reduces them in fp32

    def flops(self) -> float:
        """FLOPs of a micro-step: the model's, causal attention's, and the second forward pass of checkpointing.

        In each layer a token attends to S/2 tokens on average. The products with their keys and their values take
        2·S·d FLOPs, for d dimensions of all heads, and the backward pass twice as many: half of what Korthikanti et al.
        (arXiv 2205.05198, appendix A) count without a causal mask.
        """
        c = self.config
        attention = 2 * c.num_hidden_layers * self.length * c.num_attention_heads * c.head_dim
        forward = 2 * c.num_parameters + attention
        return (c.flops(1, self.trained) + 3 * attention + self.recomputed * forward) * self.tokens

    def transfer(self, gpu: Gpu, bytes_per_parameter: float, parameters: int) -> float:
        """Seconds of an all-gather or a reduce-scatter.

        A GPU receives what the others of its node hold over NVLink, and the node what all other nodes hold over the
        network; the slower of both counts.
        """
        size, inside = bytes_per_parameter * parameters, min(self.processes, GPUS_PER_NODE)
        nvlink = size * (inside - 1) / inside / gpu.nvlink
        network = size * max(0, 1 - GPUS_PER_NODE / self.processes) / gpu.network
        return max(nvlink, network) / COLLECTIVES

    def micro_communication(self, gpu: Gpu) -> float:
        """Seconds of communication in each micro-step: ZeRO-3 gathers the weights twice and scatters the gradients,
        ZeRO-2 scatters the gradients (Rajbhandari et al., arXiv 1910.02054, section 7)."""
        gradients = self.transfer(gpu, self.gradient_bytes, self.trained) if self.zero >= 2 else 0
        weights = self.transfer(gpu, self.weight_bytes, self.config.num_parameters) if self.zero == 3 else 0
        return gradients + 2 * weights

    def final_communication(self, gpu: Gpu) -> float:
        """Seconds of communication once a step: ZeRO 0 and 1 reduce the gradients; all but ZeRO-3 then gather what the
        others have, for ZeRO 0 the reduced gradients, else the updated weights."""
        gradients = self.transfer(gpu, self.gradient_bytes, self.trained)
        gathered = self.transfer(gpu, self.weight_bytes if self.zero else self.gradient_bytes, self.trained)
        return (gradients if self.zero < 2 else 0) + (gathered if self.zero < 3 else 0)

    def computation(self, gpu: Gpu, utilisation: float) -> float:
        """Seconds of computation in a micro-step."""
        return self.flops() / (gpu.flops * utilisation)

    def optimizer(self, gpu: Gpu) -> float:
        """Seconds of the optimizer, which is bound by the memory."""
        return OPTIMIZER_BYTES * self.trained / (self.processes if self.zero else 1) / gpu.memory_rate

    def seconds(self, gpu: Gpu, utilisation: float) -> float:
        """Seconds of the step; utilisation: the share of the matrix rate that computation reaches."""
        compute, communication = self.computation(gpu, utilisation), self.micro_communication(gpu)
        micro_step = max(compute, communication) + EXPOSED * min(compute, communication)
        return self.micro_steps * micro_step + self.final_communication(gpu) + self.optimizer(gpu)

    def tokens_per_second(self, gpu: Gpu, utilisation: float) -> float:
        """Tokens per second of all processes."""
        return self.processes * self.micro_steps * self.tokens / self.seconds(gpu, utilisation)


def plan_step(plan: MemoryPlan, tokens: int) -> Step:
    """A step of at least `tokens` tokens, in as few micro-steps as the plan's size of a micro-batch allows."""
    per_process = math.ceil(tokens / plan.processes)
    micro_steps = math.ceil(per_process / plan.max_tokens_per_microbatch)
    return Step(plan.config, plan.processes, plan.zero, math.ceil(per_process / micro_steps), micro_steps,
                plan.sample_tokens, plan.num_trained, plan.gradient_checkpointing, plan.weight_bytes)
