"""gradio's queue: the files of its requests, and answers that nobody fetches."""

import time
from typing import Any

import gradio as gr


def queued_files(blocks: gr.Blocks) -> set[str]:
    """Returns the files of all requests that wait in the queue or are being answered."""
    found = set()
    for event in list(blocks._queue.event_ids_to_events.values()):
        values: Any = event.data.data if event.data is not None else []
        found |= {value["path"] for value in values if isinstance(value, dict) and isinstance(value.get("path"), str)}
    return found


class Unread:
    """
    Drops answers that nobody fetches, and the waiting requests of their session. A client that listens fetches a
    message within milliseconds. gradio alone keeps the messages of 2,000 sessions, of any size.

    Args:
        blocks (`gr.Blocks`): the app.
        seconds (`float`): time after which unread messages are dropped.
        most (`int`): number of messages that one session may have.
    """

    def __init__(self, blocks: gr.Blocks, seconds: float = 600.0, most: int = 1000):
        self.blocks, self.seconds, self.most = blocks, seconds, most
        self._since: dict[str, float] = {}

    def sweep(self) -> None:
        queue, now = self.blocks._queue, time.monotonic()
        sizes = {key: messages.qsize() for key, messages in list(queue.pending_messages_per_session.items())}
        self._since = {key: self._since.get(key, now) for key, size in sizes.items() if size}
        for key, since in self._since.items():
            if now - since < self.seconds and sizes[key] <= self.most:
                continue
            for event in list(queue.event_ids_to_events.values()):
                if event.session_hash == key:
                    event.alive = False  # otherwise gradio would look for the dropped messages
            queue.pending_messages_per_session.pop(key, None)
            queue.pending_event_ids_session.pop(key, None)
