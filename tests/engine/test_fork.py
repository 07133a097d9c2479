"""fork: the child answers on a CPU, whatever the parent's threads were doing; on a GPU it says what to do."""

import os
import subprocess
import sys

import pytest
import torch

from internlm3.runtime.engine.engine import Engine
from internlm3.tests.support.engine import ask, ids, random_model

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")

SCRIPT = """
import os, signal, sys, threading, time
import torch
from internlm3.runtime.engine.answer import Answer
from internlm3.tests.support.engine import ask, ids, random_model, result, run, alone

torch.set_num_threads(3)
model = random_model()
wanted = alone(model, ask(ids(300), 8))  # the main thread has used OpenMP, too
engine = model.engine(4, 1024)
begun, over = threading.Event(), threading.Event()

def generate():
    seed = 0
    while not over.is_set():
        seed += 1
        for _ in engine.run([Answer(ask(ids(40, seed), 50))]):
            begun.set()

def hold():
    with engine._lock:  # a step of another thread is under way
        begun.wait()
        held.set()
        over.wait()

held = threading.Event()
targets = [generate, hold] if "hold" in sys.argv else [generate]
threads = [threading.Thread(target=target, daemon=True) for target in targets]
threads[0].start()
begun.wait()
if len(threads) == 2:
    threads[1].start()
    held.wait()
for attempt in range(5):
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # ends a child that hangs
        ids_ = torch.tensor([ids(300)])
        same = model.generate(ids_, max_new_tokens=8, do_sample=False, eos_token_id=[])[0, 300:].tolist() == wanted[0]
        same &= result(*run(engine, ask(ids(300), 8)))[0] == wanted[0]
        same &= engine.pages.free == len(engine.pages)
        os._exit(0 if same else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0, (attempt, status)
over.set()
for thread in threads:
    thread.join()
print("as alone")
"""


@pytest.mark.parametrize("lock", ["free at times", "hold"])
def test_a_child_answers_while_a_thread_of_the_parent_generates(lock):
    done = subprocess.run([sys.executable, "-c", SCRIPT, lock], capture_output=True, text=True, timeout=300)
    assert (done.stdout, done.returncode) == ("as alone\n", 0), done.stderr[-2000:]


def test_a_child_of_a_process_with_a_gpu_is_told_so():
    engine = Engine(random_model(), max_batch_size=1, max_seq_len=128)
    engine.forked = True
    engine._device = torch.device("cuda")
    with pytest.raises(RuntimeError, match=r'CUDA does not survive a fork: .* "spawn" or "forkserver"'):
        engine.add([ask(ids(3))])
