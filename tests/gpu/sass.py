"""What the compiler made of the kernels, read from the machine code: `make sass`. Needs no GPU.

    sass.py [PROGRAM]       (default ./speed-cuda)

Runs cuobjdump: on the PATH, beside nvcc, or in the Python package triton.

A kernel can be right and slow because of one decision of ptxas. Each of these happened once:
  - matvec had 2 or 3 loads in flight instead of 12: ptxas saved registers by moving each load down to its first use;
  - decode attention waited for the keys before it loaded the values: two memory latencies a step instead of one;
  - memcpy() of 4 bytes to a bf16* became 4 stores of a byte;
  - attention on Hopper waited for P V before the softmax that should have run beside it.
So for every GPU in the program this script checks that no kernel stores single bytes or uses local memory, that the
loops bound by memory issue all their loads before the first one is used, and that attention on Hopper uses that GPU's
own tensor-core instruction (HGMMA) and no other, with all exponentials of a tile between the waits for S and for P V.
Exit status 1 where one does not hold.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

# kernel (a regular expression for its whole name) -> 16-byte loads in flight in its main loop, at least
LOADS = {
    r"matvec<.*>": 12,  # 4 steps of two weight rows and x
    r"decode_attention<128>": 16,  # 16 slots: 8 of keys, 8 of values
    r"decode_attention<64>": 8,
    r"decode_attention<32>": 6,
    r"read_all": 8,
}
# kernel, on sm_90a -> how often it has HGMMA
HGMMA = {r"prefill_attention_hopper<128>": 32, r"prefill_attention_hopper<64>": 24}
OVERLAPPED = 64  # exponentials a thread computes for a tile of 64 x 128 scores


def cuobjdump():
    found = shutil.which("cuobjdump") or shutil.which("/usr/local/cuda/bin/cuobjdump")
    if not found:
        try:
            import triton
        except ImportError:
            raise SystemExit(
                "sass: no cuobjdump: install it with the CUDA toolkit, or the Python package triton"
            ) from None
        found = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return found


def functions(text):
    """(GPU, name, [(address, opcode, operands)]) of every kernel of the project."""
    for part in re.split(r"\n\s*code for ", text)[1:]:
        gpu = part.split()[0]
        for body in re.split(r"\n\s*Function : ", part)[1:]:
            mangled = body.split()[0]
            if "N5speed" in mangled:
                code = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", body)
                yield gpu, mangled, [(int(address, 16), op, operands) for address, op, operands in code]


def loops(code):
    """The bodies that end in a jump backwards."""
    for i, (address, op, operands) in enumerate(code):
        target = re.search(r"\b0x([0-9a-f]+)\b", operands)
        if op.startswith("BRA") and target and int(target[1], 16) < address:
            yield [c for c in code[: i + 1] if c[0] >= int(target[1], 16)]


def loads_in_flight(loop):
    """How many 16-byte loads it issues before an instruction needs a register that one of them fills."""
    filled, count = set(), 0
    for _, op, operands in loop:
        registers = [int(r) for r in re.findall(r"\bR(\d+)\b", operands)]
        if filled.intersection(registers):
            break
        if op.startswith("LDG") and ".128" in op:
            count += 1
            filled.update(range(registers[0], registers[0] + 4))
    return count


def overlapped(code):
    """The most exponentials between a wait for all products but the latest batch and the next wait for all."""
    most, count, latest_runs = 0, 0, False
    for _, op, operands in code:
        if op.startswith("WARPGROUP.DEPBAR"):
            if latest_runs:
                most = max(most, count)
            count, latest_runs = 0, operands.split()[-1] == "0x1"
        count += op.startswith("MUFU.EX2")
    return most


def wanted(table, name):
    return next((n for pattern, n in table.items() if re.fullmatch(pattern, name)), None)


def main():
    program = sys.argv[1] if len(sys.argv) > 1 else "speed-cuda"
    done = subprocess.run([cuobjdump(), "--dump-sass", program], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"sass: {done.stderr.strip()}")
    kernels = list(functions(done.stdout))
    names = subprocess.run(["c++filt"], input="\n".join(k[1] for k in kernels), capture_output=True, text=True)
    bad, seen = [], set()
    for (gpu, _, code), full in zip(kernels, names.stdout.splitlines(), strict=True):
        name = re.sub(r"^void |speed::|kernel::", "", full.split("(")[0])
        ops = [op for _, op, _ in code]
        local = sum(op.startswith(("LDL", "STL")) for op in ops)
        stored_bytes = sum(op.startswith(("STG", "ST.")) and ".U8" in op for op in ops)
        facts = []
        if local or stored_bytes:
            facts.append(f"{local} accesses to local memory, {stored_bytes} stores of a byte: both must be 0")
            bad.append(f"{gpu} {name}")
        need = wanted(LOADS, name)
        if need:
            seen.add(name)
            flight = max(map(loads_in_flight, loops(code)), default=0)
            facts.append(f"{flight} loads in flight of {need}")
            if flight < need:
                bad.append(f"{gpu} {name}")
        need = wanted(HGMMA, name) if gpu == "sm_90a" else None
        if need:
            seen.add(name)
            own, other = (sum(op.startswith(kind) for op in ops) for kind in ("HGMMA", "HMMA"))
            beside = overlapped(code)
            facts.append(f"{own} HGMMA of {need}, {other} HMMA of 0, {beside} e^x beside P V of {OVERLAPPED}")
            if own != need or other or beside < OVERLAPPED:
                bad.append(f"{gpu} {name}")
        if facts:
            print(f"{gpu:<8} {name:<28} {len(code):>5} instructions; {'; '.join(facts)}")
    absent = [p for p in (*LOADS, *HGMMA) if not any(re.fullmatch(p, name) for name in seen)]
    if absent or bad:
        raise SystemExit("sass: FAILED: " + ", ".join(sorted(set(bad)) + [f"no kernel {p}" for p in absent]))
    print(f"sass: {len(kernels)} kernels, all as they should be")


if __name__ == "__main__":
    main()
