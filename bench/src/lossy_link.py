"""A link between two hosts (network namespaces) that delays packets and loses some, for kernels without netem.

Run it on one of them: NEAR_NAME FAR_NAMESPACE DELAY_MS JITTER_MS LOSS SEED. It makes a TUN device on each, called
NEAR_NAME, says "ready", and carries every IP packet from one to the other: DELAY_MS late, give or take up to JITTER_MS,
and not at all with the probability LOSS (0 to 1). The kernel cuts what it sends to the device's MTU, 1500 bytes.
"""
import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import sys
import time

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000

name, far = sys.argv[1], sys.argv[2]
delay, jitter = float(sys.argv[3]) / 1e3, float(sys.argv[4]) / 1e3
loss, chance = float(sys.argv[5]), random.Random(int(sys.argv[6]))


def tun(device):
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", device.encode(), IFF_TUN | IFF_NO_PI))
    return fd


def ip(*args):
    subprocess.run(["ip", *args], check=True)


# The far one is made here and moved there; whoever has it open keeps it.
there = tun(name + "-far")
ip("link", "set", "dev", name + "-far", "netns", far, "name", name)
here = tun(name)
for args in (["ip"], ["ip", "-n", far]):
    subprocess.run([*args, "link", "set", "dev", name, "txqueuelen", "10000", "up"], check=True)
print("ready", flush=True)

sink = {here: there, there: here}
waiting, count = [], 0
while True:
    timeout = max(0, waiting[0][0] - time.monotonic()) if waiting else 1
    for fd in select.select([here, there], [], [], timeout)[0]:
        for _ in range(64):
            try:
                packet = os.read(fd, 65536)
            except BlockingIOError:
                break
            if chance.random() < loss:
                continue
            count += 1
            due = time.monotonic() + max(0, delay + chance.uniform(-jitter, jitter))
            heapq.heappush(waiting, (due, count, sink[fd], packet))
    now = time.monotonic()
    while waiting and waiting[0][0] <= now:
        _, _, fd, packet = heapq.heappop(waiting)
        try:
            os.write(fd, packet)
        except OSError:
            pass
