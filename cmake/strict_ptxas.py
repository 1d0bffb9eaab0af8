"""Runs the compiler given as arguments and fails where ptxas reports a potential loss of performance.

ptxas says so as a remark, which ``-Werror`` does not reach: ``wgmma`` that it serialises (C7510 and its kin: an
accumulator touched before the wait, too few registers) and ``setmaxnreg`` that it ignores. Either makes a Hopper
kernel several times slower without changing its results.
"""

import subprocess
import sys


def main(command: list[str]) -> int:
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False)
    sys.stdout.write(result.stdout)
    losses = [line for line in result.stdout.splitlines() if "Potential Performance Loss" in line]
    if result.returncode == 0 and losses:
        print(f"error: ptxas lost performance, which this build refuses: {len(losses)} remarks, the first is {losses[0]}")
        return 1
    return result.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
