"""Runs the compiler given as arguments and repeats, last, what ptxas reports as a potential loss of performance.

ptxas says so as a remark in the middle of its output, which ``-Werror`` does not reach: ``wgmma`` that it serialises
(C7510 and its kin: an accumulator touched before the wait, too few registers) and ``setmaxnreg`` that it ignores.
Either makes a Hopper kernel several times slower without changing its results: a warning, and with ``--strict`` before
the compiler an error.
"""

import subprocess
import sys


def main(arguments: list[str]) -> int:
    strict = arguments[:1] == ["--strict"]
    command = arguments[1:] if strict else arguments
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    output = result.stdout.decode(errors="replace")
    sys.stdout.write(output)
    losses = [line for line in output.splitlines() if "Potential Performance Loss" in line]
    if result.returncode != 0 or not losses:
        return result.returncode
    print(
        f"entrgi: {'error' if strict else 'warning'}: ptxas lost performance, {len(losses)} times. First: {losses[0]}"
    )
    return 1 if strict else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
