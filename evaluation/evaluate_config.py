"""Settings of one evaluation by evaluate.py."""
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from common.provenance import TemplateName
from common.settings import setting
from corpus.shards import WINDOW_TOKENS


@dataclass(frozen=True)
class EvaluateConfig:
    """Settings of one evaluation."""
    checkpoint: str = setting(None, "checkpoint to evaluate: a directory or a Hub id", required=True)
    out: str | None = setting(None, "folder for the results; none: eval in the checkpoint's directory, which one from "
                                    "the Hub does not have")
    text: str | None = setting(None, "held-out text whose loss is measured: a directory of token shards, or a .txt or "
                                     ".jsonl file")
    tasks: tuple[str, ...] = setting((), "tasks whose test sets are evaluated (files in configs/task)", names="task")
    data: str | None = setting(None, "folder of the preprocessed task files, <task>.json")
    decode: bool = setting(True, "decode the tasks' test items; false: only the losses of their references")
    reference: str | None = setting(None, "checkpoint for the KL divergence from it on the text and the references, "
                                          "such as m0: a directory or a Hub id")
    suite: str | None = setting(None, "suite of benchmarks: a name in configs/eval, or the path of a .toml file")
    suite_files: str | None = setting(None, "folder of the suite's local files; none: the folder of its .toml file")
    limit: int | None = setting(None, "use only N items: the first of the text and of each benchmark (of each task of "
                                      "a group), and of each task its prompts in turn", at_least=1)
    text_tokens: int = setting(100_000, "use the text up to this number of tokens", at_least=1)
    text_length: int | None = setting(None, f"maximum number of tokens of a window of the text; none: {WINDOW_TOKENS} "
                                            "for token shards, the model's context for a text file", at_least=1)
    max_source_length: int = setting(1024, "maximum number of tokens of a prompt, including <bos>", at_least=16)
    max_target_length: int = setting(256, "maximum number of tokens of a reference, including <eos>", at_least=2)
    template: TemplateName | None = setting(None, "prompts of the tasks, see train.py; with chat, benchmarks use the "
                                                  "chat template as well; not given: that of the last fine-tuning, or "
                                                  "alpaca")
    seed: int = setting(42, "seed for decoding of the tasks by sampling, and for posterior samples", at_least=0)
    posterior_samples: int = setting(0, "number of weight samples from the checkpoint's posterior; adds benchmark "
                                     "results with the options' probabilities averaged over them", at_least=0,
                                     at_most=1000)
    bertscore_model: str | None = setting(None, "directory of an encoder for BERTScore (needs the package bert-score)")
    bertscore_layer: int | None = setting(None, "layer of the encoder that BERTScore compares", at_least=1)
    dtype: Literal["auto", "bf16", "fp32"] = setting("auto", "dtype of the weights; auto: bf16 if the hardware "
                                                     "multiplies bf16 matrices")
    local_rank: int | None = setting(None, "set by the deepspeed launcher")

    def problems(self) -> list[str]:
        """Contradictions between settings, as sentences."""
        problems = ["--tasks needs --data, the folder of their files"] if self.tasks and not self.data else []
        if not self.tasks and not self.suite and not self.text:
            problems.append("there is nothing to evaluate: give --text, --tasks or --suite")
        if self.reference and not self.tasks and not self.text:
            problems.append("--reference needs --text or --tasks")
        problems += [f"{name} is for benchmarks: give --suite" for name in ("posterior_samples", "suite_files")
                     if getattr(self, name) and not self.suite]
        if self.text_length and not self.text:
            problems.append("text_length is that of windows of a text: give --text")
        if (self.bertscore_model is None) != (self.bertscore_layer is None):
            problems.append("bertscore_model and bertscore_layer must be given together")
        if self.bertscore_model is not None and not self.tasks:
            problems.append("bertscore_model is for the generated texts of tasks: give --tasks")
        if self.bertscore_model is not None and not Path(self.bertscore_model, "config.json").is_file():
            problems.append(f"bertscore_model {self.bertscore_model} is not the directory of an encoder: it holds no "
                            "config.json")
        if self.bertscore_model is not None and not find_spec("bert_score"):
            problems.append("bertscore_model needs a package that is not installed: pip install bert-score")
        return problems
