"""Runs raw launchers for the tests, in a process that imports neither torch nor anything that links CUDA.

Started as ``worker.py PATH_OF_BINDINGS``. Each request on stdin is a pickled (launcher, arguments, buffers, forced
plans); a buffer is (bytes or size, offset, read_back): its memory comes from cudaMalloc at exactly that size, so that
the simulator sees every access outside it, and a size instead of bytes leaves it unwritten. The answer is
("ok", plan, contents of the buffers to read back) or ("error", message).
"""

import importlib.util
import pickle
import struct
import sys


def serve(bindings, requests, answers):
    memory = bindings.memory
    while header := requests.read(8):
        launcher, arguments, buffers, forced = pickle.loads(requests.read(struct.unpack("<q", header)[0]))
        bindings.force_plans(forced)
        pointers, held = {}, []
        try:
            for name, (content, offset, _) in buffers.items():
                size = content if isinstance(content, int) else len(content)
                base = memory.malloc(max(size, 1))
                held.append(base)
                if not isinstance(content, int) and size > 0:
                    memory.copy_to_device(base, content)
                pointers[name] = base + offset
            plan = getattr(bindings.launch, launcher)(**arguments, **pointers)
            contents = {}
            for name, (content, offset, read_back) in buffers.items():
                if read_back:
                    contents[name] = bytearray(content if isinstance(content, int) else len(content))
                    if contents[name]:
                        memory.copy_to_host(contents[name], pointers[name] - offset)
            for base in held:
                memory.free(base)
            answer = ("ok", plan, contents)
        except Exception as error:
            answer = ("error", f"{type(error).__name__}: {error}")
        data = pickle.dumps(answer)
        answers.write(struct.pack("<q", len(data)) + data)
        answers.flush()


if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location("_bindings", sys.argv[1])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    serve(module, sys.stdin.buffer, sys.stdout.buffer)
