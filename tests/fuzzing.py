"""Runs the scripts on damaged files, each time in a fork of one process that has imported everything.

`python tests/fuzzing.py` reads requests from standard input, one JSON array a line: the name of an entry, the words of
the command line, the working directory, and the files for standard output and standard error. It prints the exit
status (negative for a signal), the seconds of CPU time, and the bytes of memory beyond those that the fork began with.
`Runner` is the client.
"""
import contextlib
import faulthandler
import gc
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parent.parent
CPU_SECONDS, SECONDS = 10, 60  # of a command; other processes may take most of its time
MEMORY = 2 << 30
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
               "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
# Of a process that forks: with large pages a fork takes a third of the time.
LARGE_PAGES = {"PYTHONMALLOC": "malloc", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
LIBRARIES = "rouge_score.rouge_scorer", "sacrebleu", "sentencepiece", "tokenizers", "torch._dynamo"  # imported late


def make_entries():
    """{name: the commands of a script}. Parts that take seconds are left out, such as lm-eval's index and figures."""
    from lm_eval import evaluator

    import data_prep
    import evaluate
    import experiment
    import pretrain
    import report
    import stack
    import train
    from analysis.benchmark_catalog import shipped_benchmarks
    from common.distributed import Distributed
    from common.stop_request import StopRequest
    from evaluation import benchmarks, lm_eval_tasks
    from pipeline import growth_study, plan

    shipped_benchmarks()
    no_tasks = lm_eval_tasks.TaskManager(include_path=str(ROOT / "tests"), include_defaults=False)
    lm_eval_tasks.task_manager = benchmarks.task_manager = lambda: no_tasks
    evaluator.add_env_info = lambda storage: None
    experiment.machine_speed = lambda: 1e12
    train_step, decoding = train.train_step, evaluate.task_decoding
    evaluate.task_decoding = lambda *values: replace(decoding(*values), max_new_tokens=8)

    def check_evaluation(cfg):
        evaluate.prepare_evaluation(cfg)

    def check_training(cfg):
        with StopRequest() as request, Distributed() as dist:
            train.open_run(cfg, dist, request)

    def train_and_die(cfg):
        steps = iter(range(3))
        with mock.patch("train.train_step", lambda *values: train_step(*values) if next(steps) < 2 else os._exit(0)):
            train.main(cfg)

    def without(main, *names):
        def patched(cfg):
            with contextlib.ExitStack() as patches:
                for name in names:
                    patches.enter_context(mock.patch(name, return_value={}))
                main(cfg)
        return patched

    return {
        "stack": stack.COMMANDS,
        "task": (data_prep.TaskDataConfig, data_prep.prepare_task),
        "hub": (data_prep.HubDataConfig, data_prep.prepare_hub),
        "text": (data_prep.TextDataConfig, data_prep.prepare_text),
        "check evaluation": (evaluate.EvaluateConfig, check_evaluation),
        "evaluate": (evaluate.EvaluateConfig, evaluate.main),
        "check training": (train.TrainConfig, check_training),
        "train": (train.TrainConfig, train.main),
        "train and die": (train.TrainConfig, train_and_die),
        "report": (report.ReportConfig, without(report.main, "report.plot_record")),
        "report with figures": (report.ReportConfig, report.main),
        "pretrain": (pretrain.PretrainConfig, without(pretrain.main, "pretrain.run_jobs")),
        "experiment": (experiment.ExperimentConfig, experiment.main),
        "plan": (plan.PlanConfig, plan.main),
        "study": (growth_study.GrowthStudyConfig, without(growth_study.main, "pipeline.growth_study.run_jobs",
                                                          "pipeline.growth_study.plot_study")),
    }


def serve():
    """Answers requests until standard input ends."""
    os.environ |= ENVIRONMENT
    sys.path.insert(0, str(ROOT))
    with contextlib.redirect_stdout(sys.stderr):  # deepspeed logs to standard output
        import torch
        torch.set_num_threads(1)  # a fork would wait for threads that it does not have
        for name in LIBRARIES:
            importlib.import_module(name)
        from common.scripts import run
        from training.deepspeed_config import import_deepspeed
        import_deepspeed(torch.device("cpu"))
        entries = make_entries()
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        entry, words, folder, *files = json.loads(line)
        if not (pid := os.fork()):
            call(run, entries[entry], words, folder, files)
        _, status, usage = os.wait4(pid, 0)
        base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps([os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime,
                          1024 * max(0, usage.ru_maxrss - base)]), flush=True)


def call(run, commands, words, folder, files):
    """Runs a command of a script within the limits and ends this process."""
    try:
        for descriptor, path in enumerate([os.devnull, *files]):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), descriptor)
        os.chdir(folder)
        sys.argv = ["script.py", *words]
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 2 * MEMORY, size + 2 * MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        faulthandler.enable()
        for number in (signal.SIGPROF, signal.SIGALRM):
            faulthandler.register(number, chain=True)  # prints the stack, and the signal ends the process
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        signal.alarm(SECONDS)
        run(commands, "")
    except BaseException:
        traceback.print_exc()
    os._exit(1)


@dataclass
class Outcome:
    """The end of a command."""
    status: int
    seconds: float
    memory: int
    stdout: str
    stderr: str

    @property
    def errors(self):
        """The lines `error: …`, also those of other ranks."""
        return [line for line in self.stderr.splitlines() if line.startswith("error")]


class Runner:
    """The process that runs the commands."""

    def __init__(self, folder):
        self.files, self.log = [folder / "stdout", folder / "stderr"], folder / "log"
        with open(self.log, "w") as log:
            self.server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                           stderr=log, text=True,
                                           env=os.environ | LARGE_PAGES | {"HF_HOME": str(folder / "cache")})

    def run(self, entry, words, folder):
        """Runs a command in a folder; returns its Outcome."""
        self.server.stdin.write(json.dumps([entry, words.split(), str(folder), *map(str, self.files)]) + "\n")
        self.server.stdin.flush()
        answer = self.server.stdout.readline()
        assert answer, self.log.read_text()
        return Outcome(*json.loads(answer), *(file.read_text(errors="replace") for file in self.files))

    def close(self):
        """Ends the process."""
        self.server.stdin.close()
        self.server.wait()


if __name__ == "__main__":
    serve()
