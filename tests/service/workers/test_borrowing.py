"""The listening sockets of another process."""

import asyncio
import socket
import subprocess
import sys

from service.http.server.listening import last_handshakes
from service.workers.borrowing import listening_sockets

LISTENING = """
import socket, sys
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
sys.stdin.readline()
connection, _ = server.accept()
print(connection.recv(5).decode(), flush=True)
"""


def test_a_child_s_listening_socket_takes_no_new_handshakes_and_loses_no_connection_that_was_made() -> None:
    command = [sys.executable, "-c", LISTENING]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin
        assert child.stdout
        port = int(child.stdout.readline())
        with listening_sockets(child.pid, port) as (borrowed,), socket.create_connection(("127.0.0.1", port)) as made:
            assert borrowed.getsockname()[1] == port
            made.sendall(b"hello")

            async def end() -> None:
                ending = asyncio.create_task(last_handshakes([borrowed]))
                await asyncio.sleep(0)
                late = socket.socket()
                late.setblocking(False)
                assert late.connect_ex(("127.0.0.1", port)) != 0
                assert child.stdin
                child.stdin.write("accept\n")
                child.stdin.flush()
                await ending
                # Its handshake was ignored, and not refused: the system tries again after a second.
                assert late.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
                late.close()

            asyncio.run(end())
            assert child.stdout.readline() == "hello\n"


def test_of_a_port_where_the_process_does_not_listen_there_is_none() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        with listening_sockets(child.pid, 1) as found:
            assert found == []
        child.communicate(b"\n")
