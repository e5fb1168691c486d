"""The memory and disk of a training run: the most that train.py holds at the same time, by what holds it.

bench/memory_use.py compares the plan with measured runs.
"""
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product

from common.configs import CONFIGS
from common.files import read_json
from model.attention import copies_heads, keeps_probabilities
from model.config import ModelConfig
from model.lora import A, is_adapter
from model.loss import chunk_rows
from training.selection import Shapes, count_elements, num_reached
from training.train_config import TrainConfig

GIB = 1 << 30
# Of the process itself: Python and libraries (fitted to 42 runs of bench/memory_use.py), or the CUDA context.
RUNTIME = {"cpu": 0.34 * GIB, "cuda": 0.6 * GIB}
# Elements: DeepSpeed's reduce_bucket_size, and its stage3_max_live_parameters and sub_group_size, which are equal.
BUCKET, LIVE = 500_000_000, 1_000_000_000
FILLED = 0.95  # share of a GPU's memory that a plan may fill: NCCL's buffers and fragmentation take some
PREFIX_TOKENS = 40  # typical length of the common prefix of a task's prompts


@dataclass(frozen=True)
class MemoryPlan:
    """The properties of a run that its memory and time depend on. settings: those of its method against forgetting
    count."""
    config: ModelConfig
    processes: int
    zero: int
    offload: bool
    dtype: str
    max_tokens_per_microbatch: int
    gradient_checkpointing: bool
    device: str = "cuda"
    settings: TrainConfig = field(default_factory=TrainConfig)
    sample_tokens: int = 128
    prefix_tokens: int = 0  # with which the samples of a micro-batch begin, computed once for all of them
    trained: Shapes | None = None  # the parameters that are trained, name -> shape; None: all

    @property
    def num_trained(self) -> int:
        """Number of parameters that are trained."""
        return self.config.num_parameters if self.trained is None else count_elements(self.trained)

    @property
    def num_reached(self) -> int:
        """Number of parameters that the backward pass reaches."""
        return self.config.num_parameters if self.trained is None else num_reached(self.config, self.trained)

    @property
    def num_frozen(self) -> int:
        """Number of parameters that are not trained; those of adapters come on top."""
        return self.config.num_parameters - (0 if self.has_adapters else self.num_trained)

    @property
    def has_adapters(self) -> bool:
        """Whether adapters are trained."""
        return self.trained is not None and any(map(is_adapter, self.trained))

    @property
    def num_stored(self) -> int:
        """Number of parameters, those of adapters included."""
        return self.num_frozen + self.num_trained

    @property
    def weight_bytes(self) -> int:
        """Bytes of one weight."""
        return 2 if self.dtype == "bf16" else 4

    @property
    def method_bytes(self) -> int:
        """Bytes per weight that a method keeps in a later task: the initial weights, with EWC also their Fisher
        information; with VCL mean and precision of the prior, and without ZeRO the mean while the weights are
        sampled."""
        if self.settings.optimizer == "ivon":
            return 12 if self.zero == 0 else 8
        return 8 if self.settings.ewc_strength else 4 if self.settings.anchored else 0

    def memory(self) -> dict[str, float]:
        """Bytes on a process's device by what holds them; on a CPU, bytes of the process."""
        shards = self.processes if self.zero else 1
        state_bytes = (12 if self.zero else 8) + self.method_bytes  # ZeRO 0: the weights themselves are fp32
        rows: dict[str, float] = {"weights": self.weight_bytes * self.num_stored,
                                  "fp32 weights and moments": state_bytes * self.num_trained / shards}
        if self.zero == 3:
            rows["weights"] /= shards  # DeepSpeed keeps master weights of an fp32 model as well
            rows["gathered weights"] = self.weight_bytes * min(self.num_stored, LIVE)
        if self.settings.self_replay_kl or self.settings.input_kl:
            rows["the start of the chain"] = self.weight_bytes * self.config.num_parameters
        rows |= {"gradients": self.gradients(), "activations": self.activations(), "logits": self.logits(),
                 "buffers": self.buffers(), "the process itself": RUNTIME[self.device]}
        if self.offload and self.device == "cuda":  # on a CPU, host memory is the device's memory
            rows["fp32 weights and moments"] = 0
            if self.zero == 3:
                rows["weights"] = rows["gradients"] = 0
        return rows

    def total(self) -> float:
        """Peak bytes on a process's device. The logits are freed before the buffers are filled; on a CPU, whose memory
        counts from the first write, so are the activations."""
        rows = self.memory()
        freed = rows["logits"] + (rows["activations"] if self.device == "cpu" else 0)
        return sum(rows.values()) - min(freed, rows["buffers"])

    def fits(self, memory: float) -> bool:
        """Whether the run fits a device with so many GiB."""
        return self.total() <= FILLED * memory * GIB

    def gradients(self) -> float:
        """Accumulated gradients in fp32, to which the gradient of each parameter is added at once; with ZeRO-3 also
        those of a step of a sub-group."""
        trained, shards = self.num_trained, self.processes
        if self.zero < 2:
            return 4 * trained
        return 4 * trained / shards + (4 * min(trained / shards, LIVE) if self.zero == 3 else 0)

    def buffers(self) -> float:
        """Bytes of the buckets in which gradients are reduced. Without ZeRO: one in fp32, if there are several
        processes. ZeRO 1 and 2: one in the dtype of the weights, two if the reduction overlaps on a GPU, one more if
        there are several processes, and for bf16 weights one in fp32. ZeRO 3: two in fp32."""
        bucket = BUCKET if self.device == "cuda" else min(BUCKET, self.num_trained)
        if self.zero == 0:
            return 4 * min(bucket, self.num_trained) if self.processes > 1 else 0
        if self.zero == 3:
            return 8 * bucket
        # one is filled while the other is reduced; on a CPU, memory that was never written does not count
        in_turn = 2 if self.overlaps and self.device == "cuda" else 1
        in_turn += self.processes > 1
        return bucket * (in_turn * self.weight_bytes + (4 if self.weight_bytes == 2 else 0))

    @property
    def overlaps(self) -> bool:
        """Whether the reduction of gradients overlaps with the backward pass."""
        path = CONFIGS / f"deepspeed/zero{self.zero}{'_offload' if self.offload else ''}.json"
        return bool(read_json(path)["zero_optimization"].get("overlap_comm"))

    def block_activations(self, trained: bool = True) -> float:
        """Bytes per token that one block keeps for the backward pass.

        Each norm keeps its input in fp32, the normalized input and a root. Its output is kept by the projections after
        it; where the norm follows attention or MLP, these keep their own input of the same size. The attention keeps
        query, key, value, output, and the log-sum-exp or the probabilities. Where samples share a prefix, each has a
        copy of its keys and values, and the output is kept twice, in parts and whole. The feed-forward keeps gate, up,
        the activation and the product. What only the gradient of a weight needs is not kept if the weight is frozen:
        the normalized input, the norm's output and the product. Adapters need the latter two, and keep their own hidden
        values.
        """
        c, width = self.config, self.weight_bytes
        adapters = self.has_adapters and self.trained or {}
        normalized = (trained and not adapters) * (4 if c.family.fp32_factors else width)
        norms = 2 * ((4 + trained * width + normalized) * c.hidden_size + 4)
        adapted = width * sum(shape[0] for name, shape in adapters.items() if name.startswith("model.layers.0.")
                              and name.endswith(A))
        kv_heads = c.num_attention_heads if copies_heads(self.device, width) else c.num_key_value_heads
        attention: float = width * 2 * (c.num_attention_heads + kv_heads) * c.head_dim
        if c.family.qk_norm:
            heads = c.num_attention_heads + c.num_key_value_heads
            norms += (4 + normalized) * heads * c.head_dim
            norms += 4 * (heads if c.family.qk_norm == "head" else 2)
        if self.prefix_tokens:
            tokens, prefix = self.max_tokens_per_microbatch, self.prefix_tokens
            copies = (tokens - prefix) / (self.sample_tokens - prefix) * prefix / tokens  # of the prefix, for a token
            attention += width * (2 * copies * kv_heads + c.num_attention_heads) * c.head_dim
        probabilities = c.num_attention_heads * self.sample_tokens  # of a token
        materialized = keeps_probabilities(self.device, width, self.max_tokens_per_microbatch * probabilities)
        attention += width * probabilities if materialized else 4 * c.num_attention_heads
        return norms + attention + width * (3 + trained) * c.intermediate_size + adapted

    def activations(self) -> float:
        """With checkpointing the input of each block and what one block keeps; otherwise what all blocks keep. Blocks
        below the first one that is trained keep nothing."""
        layers = range(self.config.num_hidden_layers)
        with_trained = [self.trained is None or any(name.startswith(f"model.layers.{layer}.") for name in self.trained)
                        for layer in layers]
        above = [layer for layer in layers if any(with_trained[:layer + 1])
                 or self.trained and "model.embed_tokens.weight" in self.trained]
        if self.gradient_checkpointing:
            inputs = len(above) * self.weight_bytes * self.config.hidden_size
            return self.max_tokens_per_microbatch * (inputs + 2 * self.block_activations())
        blocks = sum(self.block_activations(with_trained[layer]) for layer in above)
        return self.max_tokens_per_microbatch * (blocks + self.block_activations())

    def logits(self) -> float:
        """One chunk of the loss in fp32: the logits, and their log-softmax, which the gradient overwrites. With several
        chunks in bf16 also the head's gradient, as the fp32 sum and as the product that is added to it."""
        V, rows = self.config.vocab_size, chunk_rows(self.config.vocab_size, self.device)
        head = "model.embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight"
        head_is_trained = self.trained is None or head in self.trained
        summed = head_is_trained and self.weight_bytes == 2 and self.max_tokens_per_microbatch > rows
        return 8 * V * min(rows, self.max_tokens_per_microbatch) + 6 * summed * V * self.config.hidden_size

    def host(self) -> float:
        """Bytes of host memory of all processes together."""
        largest = 4 * self.config.vocab_size * self.config.hidden_size  # one tensor at a time is read or written
        # Offloaded: weights, moments and gradients in fp32, the weights in their dtype, and with ZeRO-3 a second copy
        # of the gradients.
        extra = self.weight_bytes if self.zero == 2 else self.weight_bytes + 4
        offloaded = (16 + extra + self.method_bytes) * self.num_trained if self.offload else 0
        if self.offload and self.zero == 3:
            offloaded += self.weight_bytes * self.num_frozen
        return self.processes * (RUNTIME["cpu"] + largest) + offloaded

    def disk(self, checkpoints: int) -> float:
        """Bytes on disk: final weights, epoch checkpoints, and the saved state, of which two may exist at a time."""
        # for the next task: the posterior, or Fisher information
        left = 8 if self.settings.optimizer == "ivon" else 4 if self.settings.ewc_strength else 0
        return ((1 + checkpoints) * self.weight_bytes + left) * self.config.num_parameters + 2 * 12 * self.num_trained


def alternatives(plan: MemoryPlan) -> Iterator[MemoryPlan]:
    """Plans that need less memory, ordered by how much time they cost."""
    most = plan.max_tokens_per_microbatch
    smaller = [(False, most), (False, 4096), (True, most), (True, 4096), (True, 2048)]
    for offload, (checkpointing, tokens) in product((False, True), smaller):
        for zero in range(max(plan.zero, 2 * offload), 4):
            yield replace(plan, zero=zero, offload=offload, max_tokens_per_microbatch=min(tokens, most),
                          gradient_checkpointing=checkpointing or plan.gradient_checkpointing)
