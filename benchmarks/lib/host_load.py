"""What the host of a measurement is busy with, from /proc: counters to subtract and levels."""

import os
import time
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")


def counters(root: int) -> dict[str, float]:
    """Of process ``root`` and all that it started and that still lives: seconds of the CPU in user
    and in system mode, page faults served without a disk, bytes that it had written to a disk. Of
    the whole machine: seconds of all CPUs in use and seconds that the hypervisor gave to others."""
    stat = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                stat[int(folder.name)] = (folder / "stat").read_text().rsplit(") ", 1)[1].split()
            except OSError:  # has ended
                continue
    family, grown = {root}, True
    while grown:
        children = {pid for pid, fields in stat.items() if int(fields[1]) in family}
        grown = not children <= family
        family |= children
    own = [stat[pid] for pid in family if pid in stat]
    written = 0
    for pid in family:
        try:
            io = Path(f"/proc/{pid}/io").read_text().split()
        except OSError:
            continue
        written += int(io[io.index("write_bytes:") + 1])
    cpu = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    user, nice, system, _, _, irq, softirq, steal = cpu  # the others are idle
    return {
        "wall_s": time.perf_counter(),
        "user_s": sum(int(fields[11]) for fields in own) / _TICK,
        "system_s": sum(int(fields[12]) for fields in own) / _TICK,
        "page_faults": sum(int(fields[7]) for fields in own),
        "written_bytes": written,
        "machine_busy_s": (user + nice + system + irq + softirq) / _TICK,
        "machine_stolen_s": steal / _TICK,
    }


def since(before: dict[str, float], root: int) -> dict[str, float]:
    """How far ``counters`` have gone, and the bytes that the page cache now holds for the disk."""
    grown = {key: round(value - before[key], 3) for key, value in counters(root).items()}
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    levels = {name[:-1]: int(kib) << 10 for name, kib, *_ in lines}
    return grown | {"dirty_bytes": levels["Dirty"], "writeback_bytes": levels["Writeback"]}
