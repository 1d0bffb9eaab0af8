"""Runs the compiler given as arguments and fails where ptxas reports a potential loss of performance.

ptxas says so as a remark, which ``-Werror`` does not reach: ``wgmma`` that it serialises (C7510 and its kin: an
accumulator touched before the wait, too few registers) and ``setmaxnreg`` that it ignores. Either makes a Hopper
kernel several times slower without changing its results.
"""

import subprocess
import sys


def main(command: list[str]) -> int:
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    output = result.stdout.decode(errors="replace")
    sys.stdout.write(output)
    losses = [line for line in output.splitlines() if "Potential Performance Loss" in line]
    if result.returncode == 0 and losses:
        print(f"error: ptxas lost performance, {len(losses)} times; this build refuses it. First: {losses[0]}")
        return 1
    return result.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
