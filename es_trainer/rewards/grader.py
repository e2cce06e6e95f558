"""The process in which `accuracy_reward` compares answers: a line of JSON for each, in and out."""

import json
import logging
import signal
import sys

from trl.rewards import accuracy_reward


def main(cpu_seconds: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training process, whose end is the end of stdin
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it would report every answer that takes too long
    replies, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        completion, solution = json.loads(line)
        # The kernel's own limit, which also ends arithmetic that no Python signal handler interrupts
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        (reward,) = accuracy_reward([[{"role": "assistant", "content": completion}]], [solution])
        print(json.dumps(reward), file=replies, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
