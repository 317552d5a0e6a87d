"""A ClientApp of whatever answers its messages. Nothing here imports torch, which takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from flwr.app import Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp

Answer = Callable[[str, RecordDict, Context], RecordDict]
"""What a message of a kind (train, evaluate, query) is answered with; the context's state may change."""


def app_of(answer: Answer) -> ClientApp:
    """The app that a SuperNode runs; Flower starts a process for every message."""
    app = ClientApp()

    def reply(kind: str, message: Message, context: Context) -> Message:
        return Message(answer(kind, message.content, context), reply_to=message)

    app.train()(partial(reply, MessageType.TRAIN))
    app.evaluate()(partial(reply, MessageType.EVALUATE))
    app.query()(partial(reply, MessageType.QUERY))
    return app
