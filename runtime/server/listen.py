"""The sockets that a server listens on."""

from __future__ import annotations

import errno
import os
import socket


def listen(host: str, port: int) -> list[socket.socket]:
    """Sockets that listen at each address of a name or at an address.

    Raises OSError, with the reason and what to do, where none can listen.
    """
    sockets, refused = [], None
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, place in dict.fromkeys((family, place[:2]) for family, *_, place in found):
            try:
                sockets.append(socket.create_server(place, family=family, backlog=2048))
            except OSError as error:
                refused = error
                if error.errno == errno.EADDRINUSE:
                    break
    except OSError as error:  # no such name
        refused = error
    if refused is None or (sockets and refused.errno != errno.EADDRINUSE):
        return sockets  # localhost has an address of IPv6 where this machine may have none
    for each in sockets:
        each.close()
    port_is_wrong = refused.errno in (errno.EADDRINUSE, errno.EACCES)
    what = "choose another by --port" if port_is_wrong else "--host takes a name or an address of this machine"
    reason = refused.strerror if isinstance(refused, socket.gaierror) else os.strerror(refused.errno or 0)
    raise OSError(f"cannot listen on {host} port {port} ({reason}): {what}")
