"""A listening socket in, answers out, all on one daemon thread.

One request for each connection. A client that is slow, idle or gone costs a socket for seconds
and nobody's time; a forked child keeps none of the sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import selectors
import socket
import threading
import time
import weakref
from asyncio import StreamReader, StreamWriter
from collections.abc import Callable

from gradwatch.export.messages import END_OF_HEAD, Answer, Request, Response, encoded, parsed

__all__ = ["Server"]

MOST_CONNECTIONS = 64
MOST_HEAD_BYTES = 16 * 1024
REQUEST_SECONDS = 5.0
"""For a client to send all of its request."""

ANSWER_SECONDS = 10.0
"""For a client to take all of its answer."""

START_SECONDS = STOP_SECONDS = 5.0


class Server:
    """Answers what comes in on `listener`, which it owns, from creation until `stop`."""

    def __init__(
        self,
        listener: socket.socket,
        answer: Callable[[Request], Answer],
        *,
        on_served: Callable[[Request, Response, float], None],
        on_error: Callable[[Exception], None],
    ) -> None:
        """
        Args:
            answer: must not raise. It is called on the thread that answers everybody.
            on_served: told when the last byte of a response was sent, with the monotonic time at
                which its request had come.
            on_error: told of what nobody expected.
        """
        self._listener = listener
        self._answer = answer
        self._on_served = on_served
        self._on_error = on_error
        self._pid = os.getpid()
        self._selector = selectors.DefaultSelector()
        self._loop = asyncio.SelectorEventLoop(self._selector)
        self._loop.set_exception_handler(lambda _, context: self._unexpected(context))
        self._stopping = asyncio.Event()
        self._ready = threading.Event()
        self._connections: dict[asyncio.Task[None], StreamWriter] = {}
        self._waiting: dict[asyncio.Task[None], None] = {}
        """Whose request is not complete, the longest first."""

        self._thread = threading.Thread(target=self._run, name="gradwatch-endpoint", daemon=True)
        _servers.add(self)
        self._thread.start()
        self._ready.wait(START_SECONDS)

    def stop(self) -> None:
        """Closes every socket and ends the thread; in a forked child there is nothing to stop."""
        if os.getpid() != self._pid or not self._thread.is_alive():
            return
        # The loop may close itself between the question and the call.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(STOP_SECONDS)

    def forget_sockets(self) -> None:
        """In a forked child: lets go of every socket without a word to the other ends."""
        nowhere = os.open(os.devnull, os.O_RDWR)
        for number in self._descriptors():
            # The objects that own a descriptor may close it once more, so it stays a valid one.
            os.dup2(nowhere, number, inheritable=False)
        os.close(nowhere)

    def _descriptors(self) -> list[int]:
        # Every socket of ours is registered: listener, connections and the loop's own wake-up.
        registered = [key.fd for key in (self._selector.get_map() or {}).values()]
        writers = tuple(self._connections.values())
        sockets = [writer.get_extra_info("socket") for writer in writers]
        numbers = {*registered, self._listener.fileno(), *(one.fileno() for one in sockets)}
        if isinstance(self._selector, selectors.EpollSelector):
            numbers.add(self._selector.fileno())
        return [number for number in numbers if number >= 0]

    def _run(self) -> None:
        try:
            with contextlib.closing(self._loop), contextlib.closing(self._listener):
                self._loop.run_until_complete(self._serve())
        except Exception as error:
            self._on_error(error)
        finally:
            self._ready.set()
            _servers.discard(self)

    async def _serve(self) -> None:
        server = await asyncio.start_server(
            self._connected, sock=self._listener, limit=MOST_HEAD_BYTES
        )
        self._ready.set()
        await self._stopping.wait()
        # A client that asyncio is still accepting when its server closes would hang for ever.
        self._loop.remove_reader(self._listener.fileno())
        this = asyncio.current_task()
        while others := asyncio.all_tasks() - {this}:
            for task in tuple(self._connections):
                task.cancel()
            await asyncio.wait(others, timeout=0.01)
        server.close()
        await asyncio.sleep(0)  # aborted transports close their sockets in the next round

    async def _connected(self, reader: StreamReader, writer: StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if not self._has_room():
            writer.transport.abort()
            return
        self._connections[task] = writer
        self._waiting[task] = None
        try:
            await self._converse(task, reader, writer)
        except (OSError, EOFError):
            pass  # the client is gone or too slow
        except Exception as error:
            self._on_error(error)
        finally:
            self._waiting.pop(task, None)
            del self._connections[task]
            writer.transport.abort()

    def _has_room(self) -> bool:
        """At the cap, the client that has been silent for longest makes room."""
        if len(self._connections) < MOST_CONNECTIONS:
            return True
        if not self._waiting:
            return False
        longest = next(iter(self._waiting))
        del self._waiting[longest]
        longest.cancel()
        return True

    async def _converse(
        self, task: asyncio.Task[None], reader: StreamReader, writer: StreamWriter
    ) -> None:
        async with asyncio.timeout(REQUEST_SECONDS):
            request = await _request(reader)
        self._waiting.pop(task, None)
        came = time.monotonic()
        if isinstance(request, Response):
            response, with_body = request, True
        else:
            answer, with_body = self._answer(request), request.method != "HEAD"
            response = answer if isinstance(answer, Response) else await answer
        async with asyncio.timeout(ANSWER_SECONDS):
            writer.write(encoded(response, with_body=with_body))
            writer.close()
            await writer.wait_closed()
        if isinstance(request, Request):
            self._on_served(request, response, came)

    def _unexpected(self, context: dict[str, object]) -> None:
        """What asyncio would log, such as that no descriptors are left."""
        error = context.get("exception")
        # Python 3.11 reports a connection task that was cancelled.
        if isinstance(error, (ConnectionError, asyncio.CancelledError)):
            return
        if not isinstance(error, Exception):
            error = RuntimeError(context.get("message"))
        self._on_error(error)


async def _request(reader: StreamReader) -> Request | Response:
    """The request, or what a client is told that sent none."""
    try:
        return parsed(await reader.readuntil(END_OF_HEAD))
    except asyncio.LimitOverrunError:
        return Response(status=431, body=b"The request is too large.\n")
    except ValueError:
        return Response(status=400, body=b"Expected an HTTP/1 request.\n")


_servers: weakref.WeakSet[Server] = weakref.WeakSet()


def _forget_all() -> None:
    for server in tuple(_servers):
        server.forget_sockets()


os.register_at_fork(after_in_child=_forget_all)
