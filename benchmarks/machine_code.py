"""What does a compiled kernel say of itself: registers, spills, width of its loads, occupancy?"""

import collections
import math
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton


@dataclass(frozen=True)
class Arch:
    """What occupancy depends on; shared memory in bytes, `reserved` of it per block by the system."""

    card: str
    multiprocessors: int
    shared: int
    shared_per_block: int
    reserved: int = 1024
    registers: int = 65536
    warps: int = 64
    blocks: int = 32


ARCHES = {
    80: Arch("A100", 108, 164 << 10, 163 << 10),
    90: Arch("H100", 132, 228 << 10, 227 << 10),
    100: Arch("B200", 148, 228 << 10, 227 << 10),
}


def machine_code(cubin):
    """Registers and stack of a cubin, and what its instructions are."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = tool(triton.knobs.nvidia.cuobjdump.path, "-res-usage", path)
        listing = tool(triton.knobs.nvidia.nvdisasm.path, "-c", path)
    registers, stack = (int(re.search(rf"\b{word}:(\d+)", usage).group(1)) for word in ("REG", "STACK"))
    return {"registers": registers, "stack": stack, **instructions(listing)}


def tool(*command):
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True).stdout


def instructions(listing):
    """Static counts out of a disassembly: loads and stores by width in bits, local memory, exponentials and the like, tensor cores."""
    names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", listing)
    loads = collections.Counter(_width(name) for name in names if re.match(r"LDG|UBLKCP|UTMALDG", name))
    stores = collections.Counter(_width(name) for name in names if re.match(r"STG|UTMASTG", name))
    return {
        "spills": sum(name.startswith(("STL", "LDL")) for name in names),
        "loads": dict(sorted(loads.items())),
        "stores": dict(sorted(stores.items())),
        "mufu": sum(name.startswith("MUFU") for name in names),
        "tensor_core": sum(bool(re.match(r"(H|I|D|Q|B)MMA|HGMMA|IGMMA|QGMMA|UTC\w*MMA", name)) for name in names),
        "instructions": len(names),
    }


def _width(name):
    """Bits per thread; a bulk copy counts as 128, a load or store without a suffix is 32 wide."""
    if not name.startswith(("LDG", "STG")):
        return 128
    found = re.search(r"\.(?:[US]?(8|16)|(64|128|256))(?:\.|$)", name)
    return int(found.group(1) or found.group(2)) if found else 32


def wide(widths):
    """Share of the bytes that move by 128 bits or more, over all instructions of the kind; None where there are none."""
    moved = {int(bits): int(bits) * count for bits, count in widths.items()}
    return sum(bits for width, bits in moved.items() if width >= 128) / sum(moved.values()) if moved else None


def occupancy(arch, facts):
    """Resident warps over the most there can be: the least of what registers, shared memory, warps and blocks allow."""
    warps = facts["threads"] // 32
    per_warp = math.ceil(facts["registers"] * 32 / 256) * 256
    by_registers = arch.registers // per_warp // 4 * 4 // warps
    by_shared = arch.shared // (facts["shared"] + arch.reserved) if facts["shared"] <= arch.shared_per_block else 0
    return min(by_registers, by_shared, arch.warps // warps, arch.blocks) * warps / arch.warps
