"""Traces made by hand: what a page must be able to show."""

import math

from entrgi.trace import Result, Run, Trace, TracedPrompt, TraceStep, TrajectoryStep

HOSTILE = [
    " </script><script>alert(1)</script>",
    " <!--",
    ' "quoted"',
    " it's",
    " \\u003c",
    " &amp;",
    " ${x}",
    " `tick`",
    "\n",
    "\n\n",
    "\t",
    "    ",
    " \u2028",
    " \ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
    "\\xf0\\x9f",
    " \u05e9\u05dc\u05d5\u05dd",
    "\u4f60\u597d",
    " \x00\x1b[31m",
    " /*TRACE*/",
    " __proto__",
]


def trace(
    pieces=HOSTILE, steps=None, copies=2, complete=True, prompts=("Tell me", [{"role": "user", "content": "Hi"}])
):
    """Two runs, one unguided; every trajectory commits its ``pieces`` one a step, from right to left."""
    width = len(pieces)
    steps = width if steps is None else steps
    made = [
        _run(name, guided, pieces, steps, copies, complete, prompts)
        for name, guided in (("unguided", False), ("entrgi", True))
    ]
    traced = [TracedPrompt(prompt, width, []) for prompt in prompts]
    return Trace({"denoiser": "d </title>", "rewards": [{"name": "r"}], "seed": 1}, [" &amp;"], traced, copies, made)


def _run(name, guided, pieces, steps, copies, complete, prompts):
    width = len(pieces)
    keys = [(b, k) for b in range(len(prompts)) for k in range(copies)]
    rows = []
    for step in range(steps):
        columns = list(range(width - step))
        parts = [
            TrajectoryStep(
                prompt=b,
                trajectory=k,
                reward=round(math.sin(step / 3 + k), 4) if guided else None,
                columns=columns,
                entropy=[round(0.1 + 5 * (c + 1) / width, 4) for c in columns],
                weight=[round((c + 1) / width, 4) for c in columns] if guided else None,
                commits=[(columns[-1], pieces[columns[-1]])],
            )
            for b, k in keys
        ]
        rows.append(TraceStep(step, 0.01, parts))
    text = "".join(pieces[width - steps :])
    rewards = [0.5 - k if complete else None for k in range(copies)]
    results = [Result([text] * copies, [text] * copies, rewards, [b] * copies) for b in range(len(prompts))]
    config = {
        "guidance": "entrgi" if guided else "none",
        "optimizer": "adam",
        "guidance_steps": 3,
        "guidance_lr": 0.5,
        "max_new_tokens": width,
        "steps": width,
        "temperature": 0.7,
    }
    return Run(name, config, rows, complete, results, 1.0)
