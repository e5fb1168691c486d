"""train.py, interrupted by a signal: `python tests/interrupted.py STEP SIGNAL RANK train.py …`.

The process whose rank is RANK, or every process if RANK is "all", sends SIGNAL to itself before it takes step STEP.
"""
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import train
from common import scripts

interrupted_step, signal_name, rank = sys.argv[1:4]
sys.argv = sys.argv[4:]
train_step, calls, requests = train.train_step, [], []


def interrupted_train_step(*args):
    calls.append(1)
    if len(calls) == int(interrupted_step) and rank in ("all", os.environ.get("RANK")):
        os.kill(os.getpid(), signal.Signals[signal_name])
        while requests[0].signal is None:  # the listening thread needs some time
            time.sleep(0.01)
    return train_step(*args)


class KeptRequest(train.StopRequest):
    def __enter__(self):
        requests.append(self)
        return super().__enter__()


train.train_step, train.StopRequest = interrupted_train_step, KeptRequest
scripts.run((train.TrainConfig, train.main), train.__doc__)
