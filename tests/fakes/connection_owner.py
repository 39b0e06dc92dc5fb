"""Asks the kernel which process has accepted a loopback connection."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable

from tests.fakes.open_files import open_files

NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY = 20
NLM_F_REQUEST = 1
NLMSG_ERROR = 2
ALL_STATES = 0xFFFFFFFF
NO_COOKIE = b"\xff" * 8
LOOPBACK = socket.inet_aton("127.0.0.1").ljust(16, b"\0")
HEADER = struct.Struct("=IHHII")
"""The header of a netlink message (netlink(7)): length, type, flags, sequence number, port."""
REQUEST = struct.Struct("=BBBxI")
"""The beginning of a request (sock_diag(7), `inet_diag_req_v2`): family, protocol, extensions, states."""
INODE_OFFSET = HEADER.size + 4 + 48 + 16
"""Offset of the inode number in a response (`inet_diag_msg`). Before it are the header, four numbers of one byte each,
the `inet_diag_sockid`, and four numbers of four bytes each."""


def accepting_process(server_port: int, client_port: int, pids: Iterable[int]) -> int | None:
    """Returns the process in `pids` that has accepted the connection between these ports of 127.0.0.1; None if none of
    them has accepted it yet."""
    inode = _socket_inode(server_port, client_port)
    return next((pid for pid in pids if inode and open_files(pid, f"socket:[{inode}]")), None)


def _socket_inode(local_port: int, remote_port: int) -> int:
    """Returns the inode of the socket at `local_port`; 0 if no process has accepted the connection.

    Requests only this one socket from the kernel. Reading all sockets from /proc/net/tcp would take 15 ms, because the
    kernel searches its whole hash table, which is full of closed connections of earlier tests."""
    ports = struct.pack(">HH", local_port, remote_port)
    identity = ports + LOOPBACK + LOOPBACK + struct.pack("=I", 0) + NO_COOKIE
    body = REQUEST.pack(socket.AF_INET, socket.IPPROTO_TCP, 0, ALL_STATES) + identity
    head = HEADER.pack(HEADER.size + len(body), SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as kernel:
        kernel.send(head + body)
        answer = kernel.recv(4096)
    if HEADER.unpack_from(answer)[1] == NLMSG_ERROR:  # there is no such connection
        return 0
    return int(struct.unpack_from("=I", answer, INODE_OFFSET)[0])
