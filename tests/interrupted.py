"""train.py with a step before which something happens: `python tests/interrupted.py STEP SIGNAL RANK train.py …`.

SIGNAL is sent by the process to itself, if its rank is RANK (or that is "all"), before it takes that step.
"""
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import train
from common import settings

at, name, rank = sys.argv[1:4]
sys.argv = sys.argv[4:]
train_step, calls = train.train_step, []


def take_step_or_not(*args):
    calls.append(1)
    if len(calls) == int(at) and rank in ("all", os.environ.get("RANK")):
        os.kill(os.getpid(), signal.Signals[name])
    return train_step(*args)


train.train_step = take_step_or_not
settings.run((train.TrainConfig, train.main), train.__doc__)
