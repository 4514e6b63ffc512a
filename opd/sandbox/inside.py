"""The script that runs first inside the sandbox: it sets the limits, then becomes the program.

Not imported: its text is given to an isolated Python, so it knows nothing of this package.
Arguments: a socket's descriptor or -1, a user id or -1, the folder, "limit:soft:hard,...", and the program's own.
"""

import _socket
import os
import resource
import sys

SHARED = ("/sandbox", "/tmp", "/dev/shm", "/proc")


def hand_over(number: int) -> None:
    """Give the folders of this sandbox to the watcher outside, and wait until it has filled them."""
    channel = _socket.socket(fileno=number)
    folders = [os.open(path, os.O_RDONLY | os.O_DIRECTORY) for path in SHARED]
    packed = b"".join(folder.to_bytes(4, sys.byteorder) for folder in folders)
    channel.sendmsg([b"r"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, packed)])
    if not channel.recv(1):
        os._exit(1)  # nobody is there any more


def become(user: int, limits: str) -> None:
    """Become an unprivileged user with these limits, and the first process to go when memory runs out."""
    with open("/proc/self/oom_score_adj", "w", encoding="utf-8") as file:
        file.write("1000")
    for limit in limits.split(","):
        name, soft, hard = map(int, limit.split(":"))
        resource.setrlimit(name, (soft, hard))
    if user >= 0:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)  # drops every capability


def main() -> None:
    channel, user, folder, limits, *program = sys.argv[1:]
    if int(channel) >= 0:
        hand_over(int(channel))
        os.closerange(3, 1024)  # that socket, those folders, and what bubblewrap left open
    os.chdir(folder)
    os.environ["PWD"] = folder
    become(int(user), limits)
    try:
        os.execvp(program[0], program)
    except OSError as error:
        os.write(2, f"{program[0]}: {error.strerror}\n".encode("utf-8", "replace"))
        os._exit(127)


main()
