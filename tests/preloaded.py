"""Runs Python scripts in forks of one process that has imported the libraries and this project's modules.

Importing takes longer than most runs that the tests make. `python tests/preloaded.py` reads requests from standard
input, one JSON array a line with an object for each rank: `words` (the command line after `python`), `environment`,
`stdout` and `stderr` (paths). It runs the ranks in forks at the same time and prints their exit statuses as a JSON
array. What a library reads from the environment when it is imported is the same for all forks. With LM_EVAL_TASKS, a
folder, in the environment of a rank lm-eval finds the tasks in this folder alone: an index of its own takes seconds.
"""
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path

LIBRARIES = ("deepspeed.comm.mori", "deepspeed.module_inject.auto_ep_layer", "deepspeed.moe.ep_repack",
             "deepspeed.ops.triton_ops", "deepspeed.runtime.superoffload.superoffload_stage3",
             "deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.runtime.zero.muon.original_muon",
             "deepspeed.runtime.zero.stage3", "deepspeed.runtime.zero.stage_1_and_2", "lm_eval.evaluator",
             "matplotlib.figure", "numpy", "rouge_score.rouge_scorer", "sacrebleu", "safetensors.torch", "tokenizers",
             "torch._dynamo", "torch._subclasses.schema_check_mode", "tqdm")
MODULES = [f"{path.parent.name}.{path.stem}" for folder in ("analysis", "corpus", "evaluation", "training")
           for path in sorted(Path(folder).glob("[a-z]*.py"))]  # and what they import
TIMEOUT, GRACE = 300, 10  # seconds for a run, and for the other ranks after one has failed


def run(words, environment, stdout, stderr):
    """Runs `python <words>` in this process and ends it."""
    signal.alarm(TIMEOUT)
    for path, descriptor in ((stdout, 1), (stderr, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(environment)
    if folder := environment.get("LM_EVAL_TASKS"):
        TaskManager.__init__ = functools.partialmethod(TaskManager.__init__, include_path=folder,
                                                       include_defaults=False)
    status = 0
    try:
        if words[0] == "-c":
            sys.argv, sys.path[0] = ["-c", *words[2:]], ""
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        elif words[0] == "-m":
            sys.argv, sys.path[0] = words[1:], ""
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = words, str(Path(words[0]).parent.absolute())
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as leaving:
        status = leaving.code or 0
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run_ranks(requests):
    """Runs each request in a fork; returns the exit statuses. When one fails, the others are ended after a while."""
    pids = []
    for request in requests:
        pids.append(os.fork())
        if not pids[-1]:
            run(**request)
    statuses, failed = {}, None
    while len(statuses) < len(pids):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            statuses[pid] = os.waitstatus_to_exitcode(status)
            failed = failed or (time.monotonic() if statuses[pid] else None)
        elif failed and time.monotonic() - failed > GRACE:
            for other in set(pids) - statuses.keys():
                os.kill(other, signal.SIGKILL)
            failed = None
        else:
            time.sleep(0.01)
    return [statuses[pid] for pid in pids]


if __name__ == "__main__":
    sys.path[0] = os.getcwd()
    with contextlib.redirect_stdout(sys.stderr):  # deepspeed logs to standard output
        for module in (*LIBRARIES, *MODULES):
            importlib.import_module(module)
        import torch
        from lm_eval.tasks import TaskManager
        from torch.utils import collect_env

        from training.deepspeed_config import import_deepspeed
        import_deepspeed(torch.device("cpu"))  # DeepSpeed looks for a compiler
    collect_env.get_pretty_env_info = lambda: ""  # as in tests/conftest.py
    os.fsync = lambda descriptor: None  # no test is about a loss of power
    gc.freeze()  # a collection in a fork would write to, and so copy, the memory of all objects
    for line in sys.stdin:
        print(json.dumps(run_ranks(json.loads(line))), flush=True)
