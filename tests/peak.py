"""The peak memory of a process, for tests that have one of their own, which `tests.forks` starts."""


def peak() -> int:
    """The most kB that this program has held; getrusage would begin with those of the process that started it.

    One that was forked begins with what it shares with the other.
    """
    with open("/proc/self/status") as status:
        lines = dict(line.split(":", 1) for line in status)
    return int(lines["VmHWM"].split()[0])
